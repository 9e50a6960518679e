//! The prompt of `/v1/responses`: only an engine's render API makes tokens of it.

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::value::RawValue;

use super::content::Content;
use super::fields::{Fields, Text};
use super::{Ask, Opaque, Prompt, ReadOptions, TokensApi, chat};

/// What a render call needs of a request (vLLM 0.32.0, `openai/responses/protocol.py`).
const RENDERED: [&str; 12] = [
    "model",
    "input",
    "instructions",
    "previous_input_messages",
    "tools",
    "tool_choice",
    "reasoning",
    "text",
    "chat_template_kwargs",
    "truncation",
    "max_output_tokens",
    "cache_salt",
];

/// The question, or why there is none.
pub(super) fn prompt(fields: &Fields<'_>, options: &ReadOptions) -> Result<Prompt, Opaque> {
    if options.ask == Ask::Tokenize {
        return Err(Opaque::NeedsRender);
    }
    if fields.has("previous_response_id") {
        return Err(Opaque::Stateful);
    }
    if fields.has("prompt") {
        return Err(Opaque::Invalid);
    }
    if fields.brings_tokens() || fields.get("tools").map_or(Ok(false), brings_credentials)? {
        return Err(Opaque::Inexact);
    }
    chat::template_kwargs(fields, options)?;
    let input = fields.get("input").ok_or(Opaque::Invalid)?;
    options.allow(Content::of_input(input))?;
    if let Some(messages) = fields.get("previous_input_messages") {
        options.allow(Content::of_messages(messages))?;
    }
    let capacity = input.get().len() + 256;
    Ok(Prompt::Text(options.render(TokensApi::RenderResponses, fields, &RENDERED, capacity)))
}

/// Tools that bring nothing but descriptions.
const PLAIN_TOOLS: [&str; 6] = ["function", "custom", "namespace", "file_search", "local_shell", "apply_patch"];

#[derive(Deserialize)]
struct Tool<'a> {
    #[serde(borrow, rename = "type")]
    kind: Option<Text<'a>>,
    authorization: Option<IgnoredAny>,
    headers: Option<IgnoredAny>,
    container: Option<&'a RawValue>,
}

impl Tool<'_> {
    /// Not so servers of the client's (`mcp`), which come with what the client would be let in with there, and
    /// containers that may have secrets in their `network_policy`.
    fn is_plain(&self) -> bool {
        let kind = self.kind.as_ref().map_or("", |Text(kind)| kind);
        let is_plain_kind = PLAIN_TOOLS.contains(&kind) || kind.starts_with("web_search") || kind == "code_interpreter";
        let has_policy =
            |container: &&RawValue| ["network_policy", r"\u"].iter().any(|name| container.get().contains(name));
        is_plain_kind
            && self.authorization.is_none()
            && self.headers.is_none()
            && !self.container.as_ref().is_some_and(has_policy)
    }
}

/// Whether a tool may bring credentials. They are for the engine that serves the request, and for nobody who is only
/// asked for tokens.
fn brings_credentials(tools: &RawValue) -> Result<bool, Opaque> {
    let tools: Vec<Tool<'_>> = serde_json::from_str(tools.get()).map_err(|_| Opaque::Invalid)?;
    Ok(!tools.iter().all(Tool::is_plain))
}
