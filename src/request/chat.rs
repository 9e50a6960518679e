//! The prompt of `/v1/chat/completions`.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde_json::value::RawValue;

use super::content::Content;
use super::fields::{Fields, JsonObject, json_string};
use super::{Ask, Opaque, Prompt, Question, ReadOptions, TokensApi, reasoning};

/// What a render call needs of a chat request to give the tokens that the request itself would have (vLLM 0.32.0,
/// `openai/chat_completion/protocol.py`): the limits of the output are part of how a prompt is cut.
const RENDERED: [&str; 17] = [
    "model",
    "messages",
    "tools",
    "tool_choice",
    "reasoning_effort",
    "documents",
    "chat_template",
    "chat_template_kwargs",
    "add_generation_prompt",
    "continue_final_message",
    "add_special_tokens",
    "response_format",
    "truncate_prompt_tokens",
    "truncation_side",
    "max_tokens",
    "max_completion_tokens",
    "cache_salt",
];

type TemplateKwargs<'a> = BTreeMap<Cow<'a, str>, Cow<'a, str>>;

/// The question, or why there is none.
pub(super) fn prompt(fields: &Fields<'_>, options: &ReadOptions) -> Result<Prompt, Opaque> {
    if fields.has("chat_template") && !options.allow_chat_template {
        return Err(Opaque::ChatTemplate);
    }
    if fields.brings_tokens() {
        return Err(Opaque::Inexact);
    }
    let messages = fields.get("messages").ok_or(Opaque::Invalid)?;
    options.allow(Content::of_messages(messages))?;
    let mut kwargs = template_kwargs(fields, options)?;
    let question = match options.ask {
        Ask::Tokenize => {
            add_request_kwargs(&mut kwargs, fields);
            tokenize(fields, messages, &kwargs, options)
        }
        Ask::Render => options.render(TokensApi::RenderChat, fields, &RENDERED, messages.get().len() + 256),
    };
    Ok(Prompt::Text(question))
}

fn tokenize(fields: &Fields<'_>, messages: &RawValue, kwargs: &TemplateKwargs<'_>, options: &ReadOptions) -> Question {
    let mut object = JsonObject::new(messages.get().len() + 256);
    object.copy(fields, &["model"]);
    object.field("messages", &reasoning::renamed(messages.get()));
    let calls_no_tool = fields.get("tool_choice").is_some_and(|choice| choice.get() == "\"none\"");
    if !(calls_no_tool && options.exclude_tools_when_none) {
        object.copy(fields, &["tools"]);
    }
    object.copy(fields, &["chat_template"]);
    if !kwargs.is_empty() || fields.has("chat_template_kwargs") {
        let kwargs: Vec<String> = kwargs.iter().map(|(name, json)| format!("{}:{json}", json_string(name))).collect();
        object.field("chat_template_kwargs", &format!("{{{}}}", kwargs.join(",")));
    }
    object.copy(fields, &["add_generation_prompt", "continue_final_message", "add_special_tokens"]);
    Question { api: TokensApi::Tokenize, body: object.finish() }
}

/// The client's arguments of the chat template.
pub(super) fn template_kwargs<'a>(fields: &Fields<'a>, options: &ReadOptions) -> Result<TemplateKwargs<'a>, Opaque> {
    let Some(given) = fields.get("chat_template_kwargs") else { return Ok(TemplateKwargs::new()) };
    let given: BTreeMap<Cow<'a, str>, &'a RawValue> = serde_json::from_str(given.get()).map_err(|_| Opaque::Invalid)?;
    let has_template = given.get("chat_template").is_some_and(|template| template.get() != "null");
    if has_template && !options.allow_chat_template {
        return Err(Opaque::ChatTemplate);
    }
    Ok(given.into_iter().map(|(name, json)| (name, Cow::Borrowed(json.get()))).collect())
}

/// `/tokenize` ignores `reasoning_effort` and `documents` (vLLM 0.32.0), so they travel as arguments, and as for a chat
/// request they win over arguments of the same name, while the client's own `enable_thinking` stands.
fn add_request_kwargs<'a>(kwargs: &mut TemplateKwargs<'a>, fields: &Fields<'a>) {
    if let Some(effort) = fields.get("reasoning_effort") {
        let thinks = if effort.get() == "\"none\"" { "false" } else { "true" };
        kwargs.entry("enable_thinking".into()).or_insert(thinks.into());
        kwargs.insert("reasoning_effort".into(), effort.get().into());
    }
    if let Some(documents) = fields.get("documents") {
        kwargs.insert("documents".into(), documents.get().into());
    }
}
