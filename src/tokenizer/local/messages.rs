//! From the messages of a request to the messages that a chat template sees, as vLLM 0.32.0 goes.
//!
//! Two things happen to a message there. It is first fitted to one of several typed shapes, and the shape decides which fields
//! survive (pydantic's smart union over `ChatCompletionMessageParam`, `renderers/chat_utils.py`): the shape with the most
//! fields wins, the first of equals. OpenAI's shape of an assistant message has `refusal`, `audio` and `function_call` but no
//! `reasoning`; vLLM's own has `reasoning` and `task`, but no null content. Then the message is rebuilt from what is left
//! (`_parse_chat_message_content`), and the arguments of tool calls become objects (`_postprocess_messages`).
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

/// Fields of a part that may stand for media or for what we do not follow.
const STRANGE_PART_FIELDS: [&str; 14] = [
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
];

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

/// A message in the shape that won.
struct Fitted {
    role: String,
    parts: Vec<Part>,
    name: Option<String>,
    task: Option<String>,
    reasoning: Option<String>,
    /// None when the shape has no such field or the client gave none.
    tool_call_id: Option<Json>,
    tool_calls: Option<Vec<Json>>,
}

/// A text part; `is_plain` when the client gave a bare string in a list.
struct Part {
    text: String,
    kind: PartKind,
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

/// Reads a message's known fields and keeps those of the shape that wins.
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
    let nulls: Vec<bool> = ["audio", "function_call", "tools"]
        .iter()
        .map(|name| only_null(&mut message, name))
        .collect::<Result<_, _>>()?;
    let [audio, function_call, tools] = nulls[..] else { return Err(Unsupported::Body("messages")) };
    if matches!(name, Field::Null) {
        return Err(Unsupported::Body("messages[].name"));
    }

    let openai = match role.as_str() {
        "assistant" if !matches!(tool_calls, Field::Null) => {
            let counted = [content.is_present(), name.is_present(), refusal.is_present(), tool_calls.is_present()];
            Some(1 + count(&counted) + count(&[audio, function_call]))
        }
        "user" | "system" | "developer" if matches!(content, Field::Given(_)) => Some(2 + count(&[name.is_present()])),
        "tool" if matches!((&content, &tool_call_id), (Field::Given(_), Field::Given(_))) => Some(3),
        "function" if content.is_present() && name.is_present() => Some(3),
        _ => None,
    };
    let fields = [&name, &reasoning, &task, &tool_call_id].map(Field::is_present);
    let nested = parts_fields(&content) + calls_fields(&tool_calls);
    let custom = (!matches!(content, Field::Null))
        .then(|| 1 + count(&[content.is_present(), tool_calls.is_present(), tools]) + count(&fields) + nested);

    let parts = |content: Field<Vec<Part>>| content.given().unwrap_or_default();
    match (openai, custom) {
        (None, None) => Err(Unsupported::Body("messages[]")),
        (Some(openai), custom) if custom.is_none_or(|custom| custom <= openai) => {
            let parts = parts(content);
            check_openai_parts(&role, &parts)?;
            let is_tool = role == "tool";
            let tool_call_id = tool_call_id.given().filter(|_| is_tool).map(Json::Str);
            let tool_calls = tool_calls.given();
            Ok(Fitted { role, parts, name: name.given(), task: None, reasoning: None, tool_call_id, tool_calls })
        }
        _ => Ok(Fitted {
            role,
            parts: parts(content),
            name: name.given(),
            task: task.given(),
            reasoning: reasoning.given(),
            tool_call_id: tool_call_id.is_present().then(|| tool_call_id.given().map_or(Json::Null, Json::Str)),
            tool_calls: tool_calls.given(),
        }),
    }
}

fn count(present: &[bool]) -> usize {
    present.iter().filter(|is_present| **is_present).count()
}

fn parts_fields(content: &Field<Vec<Part>>) -> usize {
    let Field::Given(parts) = content else { return 0 };
    let counted = parts.iter().filter(|part| !matches!(part.kind, PartKind::Content | PartKind::Plain));
    counted.count() * PART_FIELDS
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
        PartKind::Plain | PartKind::Thinking => false,
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

fn content(message: &mut Object) -> Result<Field<Vec<Part>>, Unsupported> {
    match message.take("content") {
        None => Ok(Field::Absent),
        Some(Json::Null) => Ok(Field::Null),
        Some(Json::Str(text)) => Ok(Field::Given(vec![Part { text, kind: PartKind::Content }])),
        Some(Json::List(parts)) => Ok(Field::Given(parts.into_iter().map(part).collect::<Result<_, _>>()?)),
        Some(_) => Err(Unsupported::Body("messages[].content")),
    }
}

fn part(part: Json) -> Result<Part, Unsupported> {
    let mut part = match part {
        Json::Str(text) => return Ok(Part { text, kind: PartKind::Plain }),
        Json::Object(part) => part,
        _ => return Err(Unsupported::Body("messages[].content[]")),
    };
    if STRANGE_PART_FIELDS.iter().any(|field| part.get(field).is_some()) {
        return Err(Unsupported::Media);
    }
    let (kind, field) = match part.take("type") {
        Some(Json::Str(kind)) if kind == "text" => (PartKind::Text, "text"),
        Some(Json::Str(kind)) if kind == "refusal" => (PartKind::Refusal, "refusal"),
        Some(Json::Str(kind)) if kind == "thinking" => (PartKind::Thinking, "thinking"),
        _ => return Err(Unsupported::Media),
    };
    // A `uuid` makes the engine look for media, and a flag of another type makes another shape win.
    let is_plain = kind == PartKind::Text || part.get("uuid").is_none() && part.get("closed").is_none();
    match part.take(field) {
        Some(Json::Str(text)) if is_plain => Ok(Part { text, kind }),
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

/// A call with its fields in the order of OpenAI's types and nothing else, its arguments an object.
fn tool_call(call: Json) -> Result<Json, Unsupported> {
    let refused = Unsupported::Body("messages[].tool_calls[]");
    let Json::Object(mut call) = call else { return Err(refused) };
    let (Some(Json::Str(id)), Some(Json::Object(mut function)), Some(Json::Str(kind))) =
        (call.take("id"), call.take("function"), call.take("type"))
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
    let arguments = json::arguments(&arguments).ok_or(refused)?;
    let mut function = Object::default();
    function.push("arguments", Json::Object(arguments));
    function.push("name", Json::Str(name));
    let mut call = Object::default();
    call.push("id", Json::Str(id));
    call.push("function", Json::Object(function));
    call.push("type", Json::Str(kind));
    Ok(Json::Object(call))
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
        ContentFormat::OpenAi => Json::List(parts.into_iter().map(|part| text_part(part.text)).collect()),
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

fn text_part(text: String) -> Json {
    let mut part = Object::default();
    part.push("type", Json::text("text"));
    part.push("text", Json::Str(text));
    Json::Object(part)
}

/// The engine drops a line that changes with every request of one client (`_strip_claude_code_billing_header`); only parts of
/// type `text` and bare strings are looked at.
fn keep_without_billing_header(part: &mut Part) -> bool {
    const HEADER: &str = "x-anthropic-billing-header";
    if matches!(part.kind, PartKind::Refusal | PartKind::Thinking) || !part.text.starts_with(HEADER) {
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
