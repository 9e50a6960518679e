//! A chat template, rendered as transformers renders it.
//!
//! The engine is minijinja 3 with the Python methods of minijinja-contrib. `hf-chat-template` 1.0.0 was tried first: it
//! stands on minijinja 2, which prints `true` and `none` where Python prints `True` and `None` and finds an object's
//! key before its method; its `tojson` ignores all arguments but `indent`, and its environment takes neither fuel nor a
//! limit of recursion. `llm-tokenizer` 1.10.0 brings 249 crates and a client of the hub. What transformers adds to
//! Jinja2 is here and in [`super::dumps`]: `tojson`, `raise_exception`, `strftime_now`, `{% generation %}`, and a
//! message's open end.
//!
//! Where minijinja may differ from Jinja2 in what it prints, the template or the request is [`Unsupported`]:
//! [`super::exact`] says which templates are rendered at all, and [`super::python`] has the filters and methods that
//! replace minijinja's. A method of `dict` that is read as a key is refused, as is an object or a list that becomes
//! text without `tojson`, and control characters that Python strips and Rust does not.

use std::borrow::Cow;
use std::io;
use std::time::SystemTime;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Output, State, Value, machinery};

use super::Unsupported;
use super::json::{Json, Object};
use super::messages::ContentFormat;
use super::syntax::Nodes;
use super::{dumps, exact, python};

/// Instructions that one rendering may take: about a second if they copy little, which [`MAX_COPIED`] is for. A
/// conversation of 10,000 messages takes a tenth of it.
const FUEL: u64 = 20_000_000;
/// Bytes that a template may copy which adds to a text in a loop over everything: items times bytes of text. A prompt
/// of 1 MiB may have 8,192 items, one of 8 MiB 1,024.
const MAX_COPIED: u64 = 8 << 30;
/// Text that a template may write besides four times what it is given.
const MAX_OWN_TEXT: usize = 1 << 20;
/// Nested calls of macros. Templates recurse over the types of a tool's parameters.
const RECURSION_LIMIT: usize = 100;
/// What stands for the end of a message that is to be continued, while the template runs (transformers).
const OPEN_END: &str = "CONTINUE_FINAL_MESSAGE_TAG ";
/// Functions and names of the template language, which an argument must not replace.
const RESERVED: [&str; 14] = [
    "caller",
    "cycler",
    "debug",
    "dict",
    "joiner",
    "kwargs",
    "lipsum",
    "loop",
    "namespace",
    "raise_exception",
    "range",
    "self",
    "strftime_now",
    "varargs",
];

/// A compiled chat template.
#[derive(Debug)]
pub(super) struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    format: ContentFormat,
}

/// What a template is given besides the special tokens.
pub(super) struct Input {
    pub(super) messages: Vec<Object>,
    pub(super) tools: Option<Vec<Json>>,
    /// The client's `chat_template_kwargs`.
    pub(super) arguments: Vec<(String, Json)>,
    pub(super) add_generation_prompt: bool,
    pub(super) continue_final_message: bool,
}

impl ChatTemplate {
    /// Compiles `source`.
    ///
    /// # Errors
    /// Why it cannot be rendered here.
    pub(super) fn new(source: &str) -> Result<Self, Error> {
        let plain = without_generation_tags(source);
        let tree = machinery::parse(&plain, NAME, syntax()?)?;
        let nodes = Nodes::of(&tree);
        if nodes.reads_a_method() {
            return Err(Error::new(ErrorKind::InvalidOperation, "a method of dict is read as if it were a key"));
        }
        exact::check(&nodes)?;
        let format = nodes.content_format();
        let (guarded, n_guards) = exact::guard(&plain, &nodes)?;
        if !exact::is_guarded(&Nodes::of(&machinery::parse(&guarded, NAME, syntax()?)?), n_guards) {
            return Err(Error::new(ErrorKind::InvalidOperation, "an operand of ~ cannot be guarded"));
        }
        let mut environment = environment()?;
        environment.add_template_owned(NAME, guarded)?;
        Ok(Self { environment, source: source.to_owned(), format })
    }

    /// How the content of messages reaches the template.
    pub(super) fn format(&self) -> ContentFormat {
        self.format
    }

    /// Whether messages of the role `developer` are left as they are (vLLM looks for the quoted name).
    pub(super) fn knows_developer(&self) -> bool {
        self.source.contains("\"developer\"") || self.source.contains("'developer'")
    }

    /// The prompt's text.
    pub(super) fn render(&self, mut input: Input, special_tokens: &[(String, String)]) -> Result<String, Unsupported> {
        check_arguments(&input.arguments)?;
        let end = if input.continue_final_message { Some(self.open_end(&mut input.messages)?) } else { None };
        let template = self.environment.get_template(NAME).map_err(|error| Unsupported::template(&error))?;
        let extent = Extent::of(&input)?;
        let mut out = Capped { text: Vec::new(), left: MAX_OWN_TEXT.saturating_add(extent.n_bytes.saturating_mul(4)) };
        template
            .render_captured_to(context(input, special_tokens), &mut out)
            .map_err(|error| Unsupported::template(&error))?;
        let text = String::from_utf8(out.text).map_err(|_| Unsupported::Template("failed"))?;
        match end {
            None => Ok(text),
            Some(message) => cut_open_end(text, &message).ok_or(Unsupported::Template("open end")),
        }
    }

    /// Marks where the last message ends, and returns its text.
    fn open_end(&self, messages: &mut [Object]) -> Result<String, Unsupported> {
        let refused = Unsupported::Body("continue_final_message");
        if !self.source.contains("content") {
            return Err(refused);
        }
        let last = messages.last_mut().and_then(|message| message.0.iter_mut().find(|(name, _)| name == "content"));
        let text = match last {
            Some((_, Json::Str(text))) => text,
            Some((_, Json::List(parts))) => match parts.last_mut() {
                Some(Json::Object(part)) => match part.0.iter_mut().find(|(name, _)| name == "text") {
                    Some((_, Json::Str(text))) => text,
                    _ => return Err(refused),
                },
                _ => return Err(refused),
            },
            _ => return Err(refused),
        };
        let message = text.clone();
        text.push_str(OPEN_END);
        Ok(message)
    }
}

/// How much a template is given.
#[derive(Default)]
struct Extent {
    /// Bytes of text.
    n_bytes: usize,
    /// What loops may go over: items of lists, and fields of objects other than messages.
    n_items: usize,
}

impl Extent {
    /// Refuses what may take long, and control characters that Python strips as spaces and Rust does not.
    fn of(input: &Input) -> Result<Self, Unsupported> {
        let mut extent = Self { n_bytes: 0, n_items: input.messages.len() };
        let fields = input.messages.iter().flat_map(|message| &message.0).chain(&input.arguments);
        let is_clean = fields.map(|(name, value)| extent.add_text(name) & extent.add(value)).fold(true, |a, b| a & b);
        let are_tools_clean = input.tools.iter().flatten().map(|tool| extent.add_item(tool)).fold(true, |a, b| a & b);
        if !is_clean || !are_tools_clean {
            return Err(Unsupported::Body("control characters"));
        }
        if (extent.n_items as u64).saturating_mul(extent.n_bytes as u64) > MAX_COPIED {
            return Err(Unsupported::TooLong);
        }
        Ok(extent)
    }

    fn add_item(&mut self, item: &Json) -> bool {
        self.n_items += 1;
        self.add(item)
    }

    /// Whether the value has none of U+001C to U+001F.
    fn add(&mut self, value: &Json) -> bool {
        match value {
            Json::Str(text) => self.add_text(text),
            Json::List(items) => items.iter().map(|item| self.add_item(item)).fold(true, |a, b| a & b),
            Json::Object(object) => {
                let fields = object.0.iter();
                fields.map(|(name, value)| self.add_text(name) & self.add_item(value)).fold(true, |a, b| a & b)
            }
            _ => true,
        }
    }

    fn add_text(&mut self, text: &str) -> bool {
        self.n_bytes += text.len();
        !text.bytes().any(|byte| matches!(byte, 0x1c..=0x1f))
    }
}

/// What a template writes, up to a limit.
struct Capped {
    text: Vec<u8>,
    left: usize,
}

impl io::Write for Capped {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.left = self.left.checked_sub(bytes.len()).ok_or(io::ErrorKind::FileTooLarge)?;
        self.text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The only template of an environment.
const NAME: &str = "chat";

fn syntax() -> Result<SyntaxConfig, Error> {
    SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()
}

fn environment() -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(syntax()?);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    python::install(&mut environment);
    environment.set_formatter(print);
    environment.set_fuel(Some(FUEL));
    environment.set_recursion_limit(RECURSION_LIMIT);
    environment.add_filter("tojson", |value: &Value, ensure_ascii: Option<bool>, kwargs: Kwargs| {
        dumps::tojson(value, ensure_ascii, &kwargs)
    });
    environment.add_function("raise_exception", |_: &Value| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, "the template refuses the request"))
    });
    environment.add_function("strftime_now", |format: &str| -> Result<String, Error> {
        let text = super::clock::strftime(format, SystemTime::now());
        text.ok_or_else(|| Error::new(ErrorKind::InvalidOperation, "the time of day is not the engine's"))
    });
    Ok(environment)
}

/// Prints text, integers and the like as Python does, and refuses lists and objects.
fn print(output: &mut Output<'_>, _: &mut State<'_, '_>, value: &Value) -> Result<(), Error> {
    match value.as_str() {
        Some(text) => output.write_str(text)?,
        None => output.write_str(&python::text(value)?)?,
    }
    Ok(())
}

/// Arguments that transformers takes for itself, and what would replace a part of the template language.
fn check_arguments(arguments: &[(String, Json)]) -> Result<(), Unsupported> {
    const TAKEN: [&str; 11] = [
        "chat_template",
        "conversation",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "truncation",
    ];
    for (name, value) in arguments {
        let is_documents = |value: &Json| matches!(value, Json::List(items) if items.iter().all(|item| matches!(item, Json::Object(_))));
        if TAKEN.contains(&name.as_str())
            || RESERVED.contains(&name.as_str())
            || name == "documents" && !is_documents(value)
        {
            return Err(Unsupported::Body("chat_template_kwargs"));
        }
    }
    Ok(())
}

/// The variables of a template: an argument replaces a special token, the request's own fields replace arguments.
fn context(input: Input, special_tokens: &[(String, String)]) -> Value {
    let mut variables: Vec<(String, Value)> =
        special_tokens.iter().map(|(name, token)| (name.clone(), Value::from(token.as_str()))).collect();
    variables.push(("documents".to_owned(), Value::from(())));
    variables.extend(input.arguments.into_iter().map(|(name, value)| (name, value.into_value())));
    let messages: Value = input.messages.into_iter().map(|message| Json::Object(message).into_value()).collect();
    let tools = input.tools.map_or(Value::from(()), |tools| tools.into_iter().map(Json::into_value).collect());
    variables.push(("messages".to_owned(), messages));
    variables.push(("tools".to_owned(), tools));
    variables.push(("add_generation_prompt".to_owned(), Value::from(input.add_generation_prompt)));
    Value::from_pairs(variables)
}

/// Cuts the text where the last message ends (transformers 5.19, `render_jinja_template`); none where transformers
/// fails.
fn cut_open_end(mut text: String, message: &str) -> Option<String> {
    let tag = OPEN_END.trim_end();
    let at = text.rfind(tag)?;
    if !text.contains(message.trim()) {
        return None;
    }
    let keeps_spaces = text[at..].starts_with(OPEN_END);
    text.truncate(at);
    if !keeps_spaces {
        text.truncate(text.trim_end().len());
    }
    Some(text)
}

/// `{% generation %}` blocks mark what the assistant wrote and print what is in them: they become a block
/// with variables of its own.
fn without_generation_tags(source: &str) -> Cow<'_, str> {
    let mut out = String::new();
    let mut copied = 0;
    let mut from = 0;
    while let Some(open) = source[from..].find("{%").map(|at| from + at) {
        let Some(close) = source[open..].find("%}").map(|at| open + at) else { break };
        let inner = &source[open + 2..close];
        let word = inner.trim_matches(['-', '+']).trim();
        let replaced = match word {
            "generation" => Some("with"),
            "endgeneration" => Some("endwith"),
            _ => None,
        };
        if let Some(statement) = replaced {
            out.push_str(&source[copied..open + 2]);
            out.push_str(&inner.replacen(word, &format!(" {statement} "), 1));
            copied = close;
        }
        from = close + 2;
    }
    if copied == 0 {
        return Cow::Borrowed(source);
    }
    out.push_str(&source[copied..]);
    Cow::Owned(out)
}
