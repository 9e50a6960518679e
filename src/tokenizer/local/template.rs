//! A chat template, rendered as transformers renders it.
//!
//! The engine is minijinja 3 with the Python methods of minijinja-contrib. `hf-chat-template` 1.0.0 was tried first: it stands on
//! minijinja 2, which prints `true` and `none` where Python prints `True` and `None` and finds an object's key before its method;
//! its `tojson` ignores all arguments but `indent`, and its environment takes neither fuel nor a limit of recursion.
//! `llm-tokenizer` 1.10.0 brings 249 crates and a client of the hub. What transformers adds to Jinja2 is here and in
//! [`super::dumps`]: `tojson`, `raise_exception`, `strftime_now`, `{% generation %}`, and a message's open end.
//!
//! Where minijinja is known to differ from Jinja2 in what it prints, the template or the request is [`Unsupported`]: a method of
//! `dict` that is read as a key, an object or a list that is printed without `tojson`, and control characters that Python
//! strips and Rust does not.

use std::borrow::Cow;
use std::time::SystemTime;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Output, State, Value, machinery};

use super::Unsupported;
use super::dumps;
use super::json::{Json, Object};
use super::messages::ContentFormat;
use super::syntax::Nodes;

/// Instructions that one rendering may take: about a second. A conversation of 10,000 messages takes a tenth of it.
const FUEL: u64 = 20_000_000;
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
        let format = nodes.content_format();
        let mut environment = environment()?;
        environment.add_template_owned(NAME, plain.clone().into_owned())?;
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
        let text = template.render(context(input, special_tokens)).map_err(|error| Unsupported::template(&error))?;
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

/// The only template of an environment.
const NAME: &str = "chat";

fn syntax() -> Result<SyntaxConfig, Error> {
    SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()
}

fn environment() -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(syntax()?);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
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

/// Prints what Python and minijinja print alike: everything but lists, objects and the like, and floats with an exponent.
fn print(output: &mut Output<'_>, state: &mut State<'_, '_>, value: &Value) -> Result<(), Error> {
    let is_alike = match value.kind() {
        ValueKind::Undefined | ValueKind::None | ValueKind::Bool | ValueKind::String => true,
        ValueKind::Number => value.is_integer(),
        _ => false,
    };
    if !is_alike {
        return Err(Error::new(ErrorKind::InvalidOperation, "Python would print this value in another way"));
    }
    minijinja::escape_formatter(output, state, value)
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

/// Cuts the text where the last message ends (transformers 5.19, `render_jinja_template`); none where transformers fails.
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

/// `{% generation %}` blocks mark what the assistant wrote and print what is in them: they become a condition that holds.
fn without_generation_tags(source: &str) -> Cow<'_, str> {
    let mut out = String::new();
    let mut copied = 0;
    let mut from = 0;
    while let Some(open) = source[from..].find("{%").map(|at| from + at) {
        let Some(close) = source[open..].find("%}").map(|at| open + at) else { break };
        let inner = &source[open + 2..close];
        let word = inner.trim_matches(['-', '+']).trim();
        let replaced = match word {
            "generation" => Some("if true"),
            "endgeneration" => Some("endif"),
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
