//! From the messages of a request to the messages that a chat template sees, as vLLM 0.32.0 goes.
//!
//! Two things happen to a message there. It is first fitted to one of several typed shapes (pydantic's smart union over
//! `ChatCompletionMessageParam`, `renderers/chat_utils.py`): the shape with the most known fields wins, the first of
//! equals. Unknown fields survive, behind the known ones. OpenAI's shapes take only the parts that they know and no
//! bare strings in a list; vLLM's own takes nearly all parts, but no null content. Then the message is rebuilt from
//! some of its fields (`_parse_chat_message_content`), and the arguments of tool calls become objects
//! (`_postprocess_messages`).
//!
//! What the engine refuses, and what is too rare to be worth following, is [`Unsupported`].

use super::Unsupported;
use super::json::{self, Json, Object};

/// How the content of a message reaches the template.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ContentFormat {
    /// One string; text parts are joined by line breaks.
    String,
    /// A list of parts.
    OpenAi,
}

/// Fields of a part that may stand for media, or that change which shape wins.
const STRANGE_PART_FIELDS: [&str; 15] = [
    "prompt_cache_breakpoint",
    "image_url",
    "image_pil",
    "image_embeds",
    "audio_url",
    "audio_embeds",
    "input_audio",
    "input_image",
    "video_url",
    "video_embeds",
    "prompt_embeds",
    "tool_reference",
    "file",
    "data",
    "uuid",
];

/// Fields of a part that the engine knows and does not hand on to the template.
const KNOWN_PART_FIELDS: [&str; 4] = ["closed", "name", "refusal", "thinking"];

/// Fields that pydantic counts in a tool call: `id`, `type`, `function`, and in it `name` and `arguments`.
const TOOL_CALL_FIELDS: usize = 5;
/// Fields that pydantic counts in a text or refusal part: its type and its text.
const PART_FIELDS: usize = 2;

/// The messages for the template. `knows_developer` says whether the template mentions that role.
pub(super) fn conversation(
    messages: Vec<Json>,
    format: ContentFormat,
    knows_developer: bool,
) -> Result<Vec<Object>, Unsupported> {
    if messages.is_empty() {
        return Err(Unsupported::Body("messages"));
    }
    let parsed = messages.into_iter().map(|message| rebuild(fit(message)?, format));
    let conversation = parsed.collect::<Result<Vec<Object>, _>>()?;
    let has_developer = conversation.iter().any(|message| role(message) == "developer");
    if has_developer && !knows_developer {
        return Ok(merge_system(conversation.into_iter().map(developer_to_system).collect()));
    }
    Ok(conversation)
}

/// The value of a message's field `role`, which every rebuilt message has.
fn role(message: &Object) -> &str {
    match message.get("role") {
        Some(Json::Str(role)) => role,
        _ => "",
    }
}

/// The fields of a message that are looked at.
struct Fitted {
    role: String,
    parts: Vec<Part>,
    name: Option<String>,
    task: Option<String>,
    reasoning: Option<String>,
    /// None when the client gave none.
    tool_call_id: Option<Json>,
    tool_calls: Option<Vec<Json>>,
}

/// A text part.
struct Part {
    kind: PartKind,
    text: String,
    /// Fields that the engine does not know; a template that gets lists of parts sees them.
    unknown: Object,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum PartKind {
    /// The whole content is one string.
    Content,
    /// A bare string in a list.
    Plain,
    Text,
    Refusal,
    Thinking,
    /// `input_text` or `output_text`, which no shape has as such.
    Loose,
}

impl Part {
    fn plain(text: String, kind: PartKind) -> Self {
        Self { kind, text, unknown: Object::default() }
    }
}

/// A field as the union sees it.
enum Field<T> {
    Absent,
    Null,
    Given(T),
}

impl<T> Field<T> {
    fn is_present(&self) -> bool {
        !matches!(self, Self::Absent)
    }

    fn given(self) -> Option<T> {
        match self {
            Self::Given(value) => Some(value),
            Self::Absent | Self::Null => None,
        }
    }
}

/// Reads a message's fields, and refuses what fits no shape.
fn fit(message: Json) -> Result<Fitted, Unsupported> {
    let Json::Object(mut message) = message else { return Err(Unsupported::Body("messages")) };
    let role = text(&mut message, "role")?.given().ok_or(Unsupported::Body("messages[].role"))?;
    let content = content(&mut message)?;
    let name = text(&mut message, "name")?;
    let refusal = text(&mut message, "refusal")?;
    let reasoning = text(&mut message, "reasoning")?;
    let task = text(&mut message, "task")?;
    let tool_call_id = text(&mut message, "tool_call_id")?;
    let tool_calls = tool_calls(&mut message)?;
    let (audio, tools) = (only_null(&mut message, "audio")?, only_null(&mut message, "tools")?);
    let function_call = function_call(&mut message)?;

    let has_name = !matches!(name, Field::Null);
    let openai = match role.as_str() {
        "assistant" if has_name && !matches!(tool_calls, Field::Null) => {
            let counted =
                [content.is_present(), name.is_present(), refusal.is_present(), tool_calls.is_present(), audio];
            Some(1 + count(&counted) + function_call)
        }
        "user" | "system" | "developer" if has_name && matches!(content, Field::Given(_)) => {
            Some(2 + count(&[name.is_present()]))
        }
        "tool" if matches!((&content, &tool_call_id), (Field::Given(_), Field::Given(_))) => Some(3),
        "function" if content.is_present() && matches!(name, Field::Given(_)) => Some(3),
        _ => None,
    };
    let fields = [&name, &reasoning, &task, &tool_call_id].map(Field::is_present);
    let nested = parts_fields(&content) + calls_fields(&tool_calls);
    let own = (has_name && !matches!(content, Field::Null))
        .then(|| 1 + count(&[content.is_present(), tool_calls.is_present(), tools]) + count(&fields) + nested);

    let parts = content.given().unwrap_or_default();
    match (openai, own) {
        (None, None) => return Err(Unsupported::Body("messages[]")),
        (Some(openai), own) if own.is_none_or(|own| own <= openai) => check_openai_parts(&role, &parts)?,
        _ => {}
    }
    Ok(Fitted {
        role,
        parts,
        name: name.given(),
        task: task.given(),
        reasoning: reasoning.given(),
        tool_call_id: tool_call_id.is_present().then(|| tool_call_id.given().map_or(Json::Null, Json::Str)),
        tool_calls: tool_calls.given(),
    })
}

fn count(present: &[bool]) -> usize {
    present.iter().filter(|is_present| **is_present).count()
}

fn parts_fields(content: &Field<Vec<Part>>) -> usize {
    let Field::Given(parts) = content else { return 0 };
    let counted = parts.iter().map(|part| match part.kind {
        PartKind::Content | PartKind::Plain | PartKind::Loose => 0,
        PartKind::Text | PartKind::Refusal | PartKind::Thinking => PART_FIELDS,
    });
    counted.sum()
}

fn calls_fields(calls: &Field<Vec<Json>>) -> usize {
    match calls {
        Field::Given(calls) => calls.len() * TOOL_CALL_FIELDS,
        Field::Absent | Field::Null => 0,
    }
}

/// OpenAI's shapes check the parts of a list only when they are read, and then have no bare strings.
fn check_openai_parts(role: &str, parts: &[Part]) -> Result<(), Unsupported> {
    let fits = |part: &Part| match part.kind {
        PartKind::Content | PartKind::Text => true,
        PartKind::Refusal => role == "assistant",
        PartKind::Plain | PartKind::Thinking | PartKind::Loose => false,
    };
    if parts.iter().all(fits) { Ok(()) } else { Err(Unsupported::Body("messages[].content")) }
}

fn text(message: &mut Object, name: &'static str) -> Result<Field<String>, Unsupported> {
    match message.take(name) {
        None => Ok(Field::Absent),
        Some(Json::Null) => Ok(Field::Null),
        Some(Json::Str(text)) => Ok(Field::Given(text)),
        Some(_) => Err(Unsupported::Body(name)),
    }
}

/// Whether the field is there; anything but null is not followed.
fn only_null(message: &mut Object, name: &'static str) -> Result<bool, Unsupported> {
    match message.take(name) {
        None => Ok(false),
        Some(Json::Null) => Ok(true),
        Some(_) => Err(Unsupported::Body(name)),
    }
}

/// How many fields pydantic counts for the call of a function, the old way.
fn function_call(message: &mut Object) -> Result<usize, Unsupported> {
    match message.take("function_call") {
        None => Ok(0),
        Some(Json::Null) => Ok(1),
        Some(Json::Object(call)) => match (call.get("name"), call.get("arguments")) {
            (Some(Json::Str(_)), Some(Json::Str(_))) => Ok(3),
            _ => Err(Unsupported::Body("function_call")),
        },
        Some(_) => Err(Unsupported::Body("function_call")),
    }
}

fn content(message: &mut Object) -> Result<Field<Vec<Part>>, Unsupported> {
    match message.take("content") {
        None => Ok(Field::Absent),
        Some(Json::Null) => Ok(Field::Null),
        Some(Json::Str(text)) => Ok(Field::Given(vec![Part::plain(text, PartKind::Content)])),
        Some(Json::List(parts)) => Ok(Field::Given(parts.into_iter().map(part).collect::<Result<_, _>>()?)),
        Some(_) => Err(Unsupported::Body("messages[].content")),
    }
}

fn part(part: Json) -> Result<Part, Unsupported> {
    let mut part = match part {
        Json::Str(text) => return Ok(Part::plain(text, PartKind::Plain)),
        Json::Object(part) => part,
        _ => return Err(Unsupported::Body("messages[].content[]")),
    };
    if STRANGE_PART_FIELDS.iter().any(|field| part.get(field).is_some_and(|value| !value.is_null())) {
        return Err(Unsupported::Media);
    }
    let Some(Json::Str(kind)) = part.take("type") else { return Err(Unsupported::Media) };
    let (kind, field) = match kind.as_str() {
        "text" => (PartKind::Text, "text"),
        "refusal" => (PartKind::Refusal, "refusal"),
        "thinking" => (PartKind::Thinking, "thinking"),
        "input_text" | "output_text" => (PartKind::Loose, "text"),
        _ => return Err(Unsupported::Media),
    };
    // Of two shapes that would do, the one with more known fields wins: which one that is, is not followed here.
    let is_clear =
        kind == PartKind::Text || KNOWN_PART_FIELDS.iter().all(|known| *known == field || part.get(known).is_none());
    match part.take(field) {
        Some(Json::Str(text)) if is_clear => {
            let is_known =
                |name: &str| KNOWN_PART_FIELDS.contains(&name) || STRANGE_PART_FIELDS.contains(&name) || name == "text";
            part.0.retain(|(name, _)| !is_known(name));
            Ok(Part { kind, text, unknown: part })
        }
        _ => Err(Unsupported::Body("messages[].content[]")),
    }
}

fn tool_calls(message: &mut Object) -> Result<Field<Vec<Json>>, Unsupported> {
    match message.take("tool_calls") {
        None => Ok(Field::Absent),
        Some(Json::Null) => Ok(Field::Null),
        Some(Json::List(calls)) => Ok(Field::Given(calls.into_iter().map(tool_call).collect::<Result<_, _>>()?)),
        Some(_) => Err(Unsupported::Body("messages[].tool_calls")),
    }
}

/// A call with its fields in the order of OpenAI's types, then the others as they came; its arguments are an object.
fn tool_call(call: Json) -> Result<Json, Unsupported> {
    let refused = Unsupported::Body("messages[].tool_calls[]");
    let Json::Object(mut given) = call else { return Err(refused) };
    let (Some(Json::Str(id)), Some(Json::Object(mut function)), Some(Json::Str(kind))) =
        (given.take("id"), given.take("function"), given.take("type"))
    else {
        return Err(refused);
    };
    let (Some(Json::Str(arguments)), Some(Json::Str(name))) = (function.take("arguments"), function.take("name"))
    else {
        return Err(refused);
    };
    if kind != "function" {
        return Err(refused);
    }
    let arguments = Json::Object(json::arguments(&arguments).ok_or(refused)?);
    let function = function.behind([("arguments", arguments), ("name", Json::Str(name))]);
    let known = [("id", Json::Str(id)), ("function", Json::Object(function)), ("type", Json::Str(kind))];
    Ok(Json::Object(given.behind(known)))
}

/// The message that the template sees.
fn rebuild(message: Fitted, format: ContentFormat) -> Result<Object, Unsupported> {
    let Fitted { role, mut parts, name, task, reasoning, tool_call_id, tool_calls } = message;
    if role == "system" {
        parts.retain_mut(keep_without_billing_header);
    }
    let content = match format {
        // The engine also joins the parts of a tool's result where other roles keep a list, then with the empty ones.
        ContentFormat::OpenAi if role == "tool" => Json::Str(join(&parts, |_| true)),
        ContentFormat::OpenAi => Json::List(parts.into_iter().map(text_part).collect()),
        ContentFormat::String => Json::Str(join(&parts, |part| !part.text.is_empty())),
    };
    let mut rebuilt = Object::default();
    rebuilt.push("role", Json::text(&role));
    rebuilt.push("content", content);
    if role == "assistant" {
        if let Some(calls) = tool_calls.filter(|calls| !calls.is_empty()) {
            rebuilt.push("tool_calls", Json::List(calls));
        }
        if let Some(reasoning) = reasoning {
            rebuilt.push("reasoning", Json::text(&reasoning));
            rebuilt.push("reasoning_content", Json::Str(reasoning));
        }
    }
    if let Some(id) = tool_call_id.filter(|_| role == "tool") {
        rebuilt.push("tool_call_id", id);
    }
    if let Some(name) = name {
        rebuilt.push("name", Json::Str(name));
    }
    if let Some(task) = task {
        rebuilt.push("task", Json::Str(task));
    }
    if role == "developer" {
        rebuilt.push("tools", Json::Null);
    }
    Ok(rebuilt)
}

fn join(parts: &[Part], keep: impl Fn(&Part) -> bool) -> String {
    let texts: Vec<&str> = parts.iter().filter(|part| keep(part)).map(|part| part.text.as_str()).collect();
    texts.join("\n")
}

fn text_part(part: Part) -> Json {
    Json::Object(part.unknown.behind([("type", Json::text("text")), ("text", Json::Str(part.text))]))
}

/// The engine drops a line that changes with every request of one client (`_strip_claude_code_billing_header`); only
/// parts of type `text` and bare strings are looked at.
fn keep_without_billing_header(part: &mut Part) -> bool {
    const HEADER: &str = "x-anthropic-billing-header";
    let is_looked_at = matches!(part.kind, PartKind::Content | PartKind::Plain | PartKind::Text);
    if !is_looked_at || !part.text.starts_with(HEADER) {
        return true;
    }
    let rest = part.text.split_once('\n').map_or("", |(_, rest)| rest);
    part.text = rest.to_owned();
    !part.text.is_empty()
}

fn developer_to_system(mut message: Object) -> Object {
    if role(&message) == "developer" {
        message.0.retain(|(name, _)| name != "tools");
        for (name, value) in &mut message.0 {
            if name == "role" {
                *value = Json::text("system");
            }
        }
    }
    message
}

/// Joins all system messages into one at the front, if there are several or one stands elsewhere.
fn merge_system(conversation: Vec<Object>) -> Vec<Object> {
    let mut systems = conversation.iter().enumerate().filter(|(_, message)| role(message) == "system");
    if systems.all(|(at, _)| at == 0) {
        return conversation;
    }
    let (systems, mut others): (Vec<_>, Vec<_>) =
        conversation.into_iter().partition(|message| role(message) == "system");
    let texts: Vec<String> = systems.iter().map(content_text).filter(|text| !text.is_empty()).collect();
    let mut merged = Object::default();
    merged.push("role", Json::text("system"));
    merged.push("content", Json::Str(texts.join("\n\n")));
    others.insert(0, merged);
    others
}

fn content_text(message: &Object) -> String {
    match message.get("content") {
        Some(Json::Str(text)) => text.clone(),
        Some(Json::List(parts)) => {
            let texts = parts.iter().filter_map(|part| match part {
                Json::Object(part) => part.get("text"),
                _ => None,
            });
            let texts = texts.filter_map(|text| if let Json::Str(text) = text { Some(text.as_str()) } else { None });
            texts.collect::<Vec<_>>().join("\n")
        }
        _ => String::new(),
    }
}
