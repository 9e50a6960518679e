//! The prompt of `/v1/chat/completions`.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::{Body, JsonObject, Opaque, Prompt, Question, TokensApi, json_string, reasoning};

/// Content parts that the engine renders as text (vLLM 0.32.0, `chat_utils.py`). Anything else may be media.
const TEXT_PARTS: [&str; 5] = ["text", "input_text", "output_text", "refusal", "thinking"];

#[derive(Deserialize)]
struct Message<'a> {
    #[serde(borrow)]
    content: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Part<'a> {
    #[serde(borrow, rename = "type")]
    kind: Option<Cow<'a, str>>,
}

/// The body for `/tokenize`, or why there is none.
pub(super) fn prompt(body: &Body<'_>) -> Prompt {
    if body.chat_template.is_some() {
        return Prompt::Opaque(Opaque::ChatTemplate);
    }
    let Some(messages) = body.messages else { return Prompt::Opaque(Opaque::Invalid) };
    match has_media(messages) {
        Ok(false) => {}
        Ok(true) => return Prompt::Opaque(Opaque::Media),
        Err(_) => return Prompt::Opaque(Opaque::Invalid),
    }
    match template_kwargs(body) {
        Ok(kwargs) => Prompt::Text(question(body, messages, kwargs.as_deref())),
        Err(opaque) => Prompt::Opaque(opaque),
    }
}

fn question(body: &Body<'_>, messages: &RawValue, kwargs: Option<&str>) -> Question {
    let mut object = JsonObject::new(messages.get().len() + 256);
    if let Some(model) = &body.model {
        object.field("model", &json_string(model));
    }
    object.field("messages", &reasoning::renamed(messages.get()));
    object.optional("tools", body.tools);
    if let Some(kwargs) = kwargs {
        object.field("chat_template_kwargs", kwargs);
    }
    object.optional("add_generation_prompt", body.add_generation_prompt);
    object.optional("continue_final_message", body.continue_final_message);
    object.optional("add_special_tokens", body.add_special_tokens);
    Question { api: TokensApi::Tokenize, body: object.finish() }
}

fn has_media(messages: &RawValue) -> serde_json::Result<bool> {
    let messages: Vec<Message<'_>> = serde_json::from_str(messages.get())?;
    for content in messages.iter().filter_map(|message| message.content) {
        // The engine takes a string or a list of parts; what it makes of anything else we do not want to ask.
        let is_media = match content.get().as_bytes().first() {
            Some(b'"') => false,
            Some(b'[') => !is_text(content)?,
            _ => true,
        };
        if is_media {
            return Ok(true);
        }
    }
    Ok(false)
}

fn is_text(content: &RawValue) -> serde_json::Result<bool> {
    let parts: Vec<&RawValue> = serde_json::from_str(content.get())?;
    for part in parts {
        if part.get().starts_with('"') {
            continue;
        }
        let part: Part<'_> = serde_json::from_str(part.get())?;
        if !part.kind.is_some_and(|kind| TEXT_PARTS.contains(&kind.as_ref())) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The chat template's arguments as the engine builds them for a chat request: `/tokenize` itself ignores
/// `reasoning_effort` and `documents` (vLLM 0.32.0), so they travel as arguments, and win over arguments of the same name.
fn template_kwargs(body: &Body<'_>) -> Result<Option<String>, Opaque> {
    let mut kwargs: BTreeMap<Cow<'_, str>, Cow<'_, str>> = BTreeMap::new();
    if let Some(given) = body.chat_template_kwargs {
        let given: BTreeMap<Cow<'_, str>, &RawValue> =
            serde_json::from_str(given.get()).map_err(|_| Opaque::Invalid)?;
        kwargs.extend(given.into_iter().map(|(name, json)| (name, Cow::Borrowed(json.get()))));
    }
    if kwargs.contains_key("chat_template") {
        return Err(Opaque::ChatTemplate);
    }
    if let Some(effort) = body.reasoning_effort {
        let thinks = if effort.get() == "\"none\"" { "false" } else { "true" };
        kwargs.entry("enable_thinking".into()).or_insert(thinks.into());
        kwargs.insert("reasoning_effort".into(), effort.get().into());
    }
    if let Some(documents) = body.documents {
        kwargs.insert("documents".into(), documents.get().into());
    }
    if kwargs.is_empty() && body.chat_template_kwargs.is_none() {
        return Ok(None);
    }
    let fields: Vec<String> = kwargs.iter().map(|(name, json)| format!("{}:{json}", json_string(name))).collect();
    Ok(Some(format!("{{{}}}", fields.join(","))))
}
