//! Reads the parts of an OpenAI-style request that routing needs; nothing is kept, and nothing is changed but what
//! [`report`] says.
//!
//! Reading has two phases: [`open`] finds the model's name, and with it the pool whose [`ReadOptions`] say how
//! [`Opened::read`] reads the prompt. A prompt given as token ids is used as it is. Any other prompt becomes a
//! [`Question`]: the body of a call that an engine answers with tokens, made of an allow-list of the client's fields,
//! copied byte for byte.
//!
//! - [`Ask::Tokenize`]: `/tokenize`, which every engine has (vLLM 0.32.0, checked against a running server). It knows
//!   chats and completions; what else a chat request has to say to the template travels as template arguments.
//! - [`Ask::Render`]: `/v1/…/render`, which takes the request of the API itself and cuts it itself. It needs
//!   `--enable-scale-out`, and knows all APIs, media included.
//!
//! What cannot be made tokens exactly, or not without having an engine fetch what a client names, is [`Prompt::Opaque`]
//! with the reason. Of the request's headers nothing is ever sent.
//!
//! The body is walked once with borrowed slices; cost is linear in its size and deep nesting costs no stack.

mod chat;
mod completion;
mod content;
mod fields;
mod hidden;
mod messages;
mod reasoning;
pub mod report;
mod responses;
mod truncation;

use std::borrow::Cow;

use content::Content;
use fields::{Fields, JsonObject, walk};
pub use truncation::Truncation;
use truncation::Wish;

/// Which of the engine's APIs a path names. The query is ignored; a prefix before `/v1` is allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Api {
    /// `…/v1/chat/completions`
    ChatCompletions,
    /// `…/v1/completions`
    Completions,
    /// `…/v1/responses`
    Responses,
    /// `…/v1/messages`, Anthropic's.
    Messages,
    /// Anything else: routed by load.
    Other,
}

impl Api {
    /// The API that a `:path` names.
    pub fn of_path(path: &str) -> Self {
        let path = path.split('?').next().unwrap_or_default();
        if path.ends_with("/v1/chat/completions") {
            Self::ChatCompletions
        } else if path.ends_with("/v1/completions") {
            Self::Completions
        } else if path.ends_with("/v1/responses") {
            Self::Responses
        } else if path.ends_with("/v1/messages") {
            Self::Messages
        } else {
            Self::Other
        }
    }

    /// OpenTelemetry's `gen_ai.operation.name`.
    pub fn operation(self) -> &'static str {
        match self {
            Self::ChatCompletions | Self::Responses | Self::Messages => "chat",
            Self::Completions => "text_completion",
            Self::Other => "other",
        }
    }
}

/// What routing needs to know of a request.
#[derive(PartialEq)]
pub struct LlmRequest {
    /// The `model` field; none when the body names no model.
    pub model: Option<String>,
    /// The prompt whose cached prefix decides.
    pub prompt: Prompt,
    /// The `cache_salt` field, part of the first block's hash.
    pub cache_salt: Option<String>,
    /// How the engine cuts the prompt before it looks at its cache. None where the answer to the question is cut
    /// already.
    pub truncation: Option<Truncation>,
}

/// The prompt of a request.
#[derive(PartialEq)]
pub enum Prompt {
    /// Token ids, as the client gave them.
    Tokens(Vec<u32>),
    /// Text: what the engine is asked for its tokens.
    Text(Question),
    /// Tokens cannot be known, or would not help.
    Opaque(Opaque),
}

/// What an engine is asked for the tokens of a prompt.
#[derive(Clone, PartialEq, Eq)]
pub struct Question {
    /// Where it is asked.
    pub api: TokensApi,
    /// JSON text.
    pub body: Vec<u8>,
}

/// The engine's APIs that answer with the tokens of a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TokensApi {
    /// `/tokenize`
    Tokenize,
    /// `/v1/chat/completions/render`
    RenderChat,
    /// `/v1/completions/render`
    RenderCompletion,
    /// `/v1/responses/render`
    RenderResponses,
    /// `/v1/messages/render`
    RenderMessages,
}

impl TokensApi {
    /// Its path.
    pub fn path(self) -> &'static str {
        match self {
            Self::Tokenize => "/tokenize",
            Self::RenderChat => "/v1/chat/completions/render",
            Self::RenderCompletion => "/v1/completions/render",
            Self::RenderResponses => "/v1/responses/render",
            Self::RenderMessages => "/v1/messages/render",
        }
    }
}

/// Why a prompt's tokens are not asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opaque {
    /// The path is not one whose prompt we read.
    OtherPath,
    /// Images, audio, video or embeddings are part of the prompt.
    Media,
    /// The client brings its own `chat_template`.
    ChatTemplate,
    /// `prompt_logprobs` (or `echo` with `logprobs`): the engine does not read its prefix cache.
    CacheNotRead,
    /// The API is one whose prompt only [`Ask::Render`] can ask for.
    NeedsRender,
    /// The prompt continues a response that one engine remembers.
    Stateful,
    /// The engine makes something else of the prompt than of the question that could be asked.
    Inexact,
    /// The engine will refuse the prompt: missing, empty or of a wrong type.
    Invalid,
}

impl Opaque {
    /// Name in metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::OtherPath => "other_path",
            Self::Media => "media",
            Self::ChatTemplate => "chat_template",
            Self::CacheNotRead => "cache_not_read",
            Self::NeedsRender => "needs_render",
            Self::Stateful => "stateful",
            Self::Inexact => "inexact",
            Self::Invalid => "invalid_prompt",
        }
    }
}

/// Which of the engine's APIs is asked for tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ask {
    /// `/tokenize`
    #[default]
    Tokenize,
    /// `/v1/…/render`
    Render,
}

/// How the prompts of a pool are read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReadOptions {
    /// Whom to ask.
    pub ask: Ask,
    /// Whether a client's own chat template is sent to an engine that is asked for tokens. The engine takes it only
    /// with `--trust-request-chat-template`.
    pub allow_chat_template: bool,
    /// Whether an engine that is asked for tokens may fetch what a client names as media. Only [`Ask::Render`] tells
    /// what the engine's cache knows media by, so with [`Ask::Tokenize`] they stay opaque.
    pub allow_media: bool,
    /// Whether the engine was started with `--exclude-tools-when-tool-choice-none`. [`Ask::Render`] need not know.
    pub exclude_tools_when_none: bool,
}

impl ReadOptions {
    /// Refuses what must not be sent.
    fn allow(&self, found: serde_json::Result<Content>) -> Result<(), Opaque> {
        match found.map_err(|_| Opaque::Invalid)? {
            Content::Text => Ok(()),
            Content::Media if self.renders_media() => Ok(()),
            Content::Media | Content::Embeddings => Err(Opaque::Media),
        }
    }

    fn renders_media(&self) -> bool {
        self.allow_media && self.ask == Ask::Render
    }

    /// A question with these fields of the request. Of media the engine is to tell the identifiers and not the tensors,
    /// which would be megabytes (vLLM 0.32.0, `mm_payload`).
    fn render(&self, api: TokensApi, fields: &Fields<'_>, names: &[&str], capacity: usize) -> Question {
        let mut object = JsonObject::new(capacity);
        object.copy_given(fields, names);
        if self.renders_media() {
            object.copy_given(fields, &["media_io_kwargs", "mm_processor_kwargs"]);
            object.field("mm_payload", "\"none\"");
        }
        Question { api, body: object.finish() }
    }
}

/// The body is not a JSON object whose fields have the expected types. What it is instead is no part of the message: it
/// is the client's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("found no JSON object with the fields of an OpenAI request in the body, from line {line}, column {column} on")]
pub struct UnreadableBody {
    line: usize,
    column: usize,
}

impl From<serde_json::Error> for UnreadableBody {
    fn from(error: serde_json::Error) -> Self {
        Self { line: error.line(), column: error.column() }
    }
}

/// A body whose model is known and whose prompt is not read yet.
#[derive(Debug)]
pub struct Opened<'a> {
    api: Api,
    model: Option<Cow<'a, str>>,
    fields: Result<Fields<'a>, Opaque>,
}

/// Finds the model of a request.
///
/// # Errors
/// [`UnreadableBody`] when the body is not UTF-8, not JSON, not an object, or its model is not a string. The engine
/// gets the body unchanged and is the one to complain. A field that is given twice, or that the engine will refuse,
/// makes the prompt [`Opaque::Invalid`]: the request still goes to its model.
pub fn open(api: Api, body: &[u8]) -> Result<Opened<'_>, UnreadableBody> {
    if api == Api::Other {
        let model = if body.is_empty() { None } else { walk(body, false)?.model };
        return Ok(Opened { api, model, fields: Err(Opaque::OtherPath) });
    }
    if let Ok(found) = walk(body, true) {
        return Ok(Opened { api, model: found.model, fields: found.fields.ok_or(Opaque::Invalid) });
    }
    let model = walk(body, false)?.model;
    Ok(Opened { api, model, fields: Err(Opaque::Invalid) })
}

/// The `model` field of a body of which only the beginning is there; none where it does not stand in that.
pub fn model_in_beginning(beginning: &[u8]) -> Option<String> {
    fields::model_in_beginning(beginning)
}

impl Opened<'_> {
    /// The `model` field; none when the body names no model.
    pub fn model(&self) -> Option<&str> {
        self.model.as_deref()
    }

    /// Reads the prompt.
    pub fn read(&self, options: &ReadOptions) -> LlmRequest {
        let model = self.model.as_deref().map(str::to_owned);
        match self.try_read(options) {
            Ok(request) => LlmRequest { model, ..request },
            Err(opaque) => LlmRequest { model, prompt: Prompt::Opaque(opaque), cache_salt: None, truncation: None },
        }
    }

    fn try_read(&self, options: &ReadOptions) -> Result<LlmRequest, Opaque> {
        let fields = self.fields.as_ref().map_err(|opaque| *opaque)?;
        let (cache_salt, wish) = (fields.cache_salt()?, Wish::of(self.api, fields)?);
        let prompt = self.prompt(fields, options).unwrap_or_else(Prompt::Opaque);
        let truncation = wish.map_or(Ok(None), |wish| wish.of_prompt(&prompt, options.ask));
        Ok(match truncation {
            Ok(truncation) => LlmRequest { model: None, prompt, cache_salt, truncation },
            Err(opaque) => LlmRequest { model: None, prompt: Prompt::Opaque(opaque), cache_salt, truncation: None },
        })
    }

    fn prompt(&self, fields: &Fields<'_>, options: &ReadOptions) -> Result<Prompt, Opaque> {
        if self.skips_cache(fields) {
            return Err(Opaque::CacheNotRead);
        }
        match self.api {
            Api::ChatCompletions => chat::prompt(fields, options),
            Api::Completions => completion::prompt(fields, options),
            Api::Responses => responses::prompt(fields, options),
            Api::Messages => messages::prompt(fields, options),
            Api::Other => Err(Opaque::OtherPath),
        }
    }

    /// vLLM skips reading its prefix cache when it has to compute the prompt's log probabilities: asked for by name, or
    /// because a chat, or a completion with log probabilities, is to echo its prompt. The other APIs cannot ask for
    /// them.
    fn skips_cache(&self, fields: &Fields<'_>) -> bool {
        let echoes = fields.get("echo").is_some_and(|echo| echo.get() == "true");
        match self.api {
            Api::ChatCompletions => echoes || fields.has("prompt_logprobs"),
            Api::Completions => echoes && fields.has("logprobs") || fields.has("prompt_logprobs"),
            Api::Responses | Api::Messages | Api::Other => false,
        }
    }
}

#[cfg(test)]
mod tests;
