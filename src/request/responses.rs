//! The prompt of `/v1/responses`: only an engine's render API makes tokens of it.

use super::content::Content;
use super::fields::Fields;
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
    if fields.brings_tokens() {
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
