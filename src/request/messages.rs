//! The prompt of Anthropic's `/v1/messages`: only an engine's render API makes tokens of it.

use std::borrow::Cow;

use serde::Deserialize;

use super::content::Content;
use super::fields::Fields;
use super::{Ask, Opaque, Prompt, ReadOptions, TokensApi, chat};

/// What a render call needs of a request (vLLM 0.32.0, `anthropic/protocol.py`).
const RENDERED: [&str; 10] = [
    "model",
    "messages",
    "system",
    "tools",
    "tool_choice",
    "thinking",
    "output_config",
    "chat_template_kwargs",
    "max_tokens",
    "cache_salt",
];

#[derive(Deserialize)]
struct Thinking<'a> {
    #[serde(borrow, rename = "type")]
    kind: Option<Cow<'a, str>>,
}

/// The question, or why there is none.
pub(super) fn prompt(fields: &Fields<'_>, options: &ReadOptions) -> Result<Prompt, Opaque> {
    if options.ask == Ask::Tokenize {
        return Err(Opaque::NeedsRender);
    }
    if fields.brings_tokens() || disables_thinking(fields)? {
        return Err(Opaque::Inexact);
    }
    chat::template_kwargs(fields, options)?;
    let messages = fields.get("messages").ok_or(Opaque::Invalid)?;
    options.allow(Content::of_anthropic_messages(messages))?;
    options.allow(Content::of_blocks(fields.get("system")))?;
    let capacity = messages.get().len() + 256;
    Ok(Prompt::Text(options.render(TokensApi::RenderMessages, fields, &RENDERED, capacity)))
}

/// How thinking is turned off depends on a flag of the server and on what it finds out of its template; the render API
/// knows of neither (vLLM 0.32.0, `anthropic/serving.py`).
fn disables_thinking(fields: &Fields<'_>) -> Result<bool, Opaque> {
    let Some(thinking) = fields.get("thinking") else { return Ok(false) };
    let thinking: Thinking<'_> = serde_json::from_str(thinking.get()).map_err(|_| Opaque::Invalid)?;
    Ok(thinking.kind.is_some_and(|kind| kind == "disabled"))
}
