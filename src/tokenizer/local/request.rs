//! The body of a `/tokenize` request (vLLM 0.32.0, `entrypoints/serve/tokenize/protocol.py`).

use super::Unsupported;
use super::json::{Json, Object};
use super::messages::ContentFormat;
use super::template::Input;
use super::{json, messages, tools};

/// What is to be tokenized.
pub(super) enum Ask {
    Text { prompt: String, add_special_tokens: bool },
    Chat(Chat),
}

/// A chat, before it is known which template renders it.
pub(super) struct Chat {
    messages: Vec<Json>,
    pub(super) tools: Option<Vec<Json>>,
    arguments: Vec<(String, Json)>,
    add_generation_prompt: bool,
    continue_final_message: bool,
    pub(super) add_special_tokens: bool,
}

/// Fields that change the engine's answer in ways that we do not follow.
const STRANGE_FIELDS: [&str; 4] = ["chat_template", "kv_transfer_params", "media_io_kwargs", "mm_processor_kwargs"];

impl Ask {
    /// Reads a body.
    pub(super) fn read(body: &[u8]) -> Result<Self, Unsupported> {
        let text = std::str::from_utf8(body).map_err(|_| Unsupported::Body("body"))?;
        let Ok(Json::Object(mut body)) = json::read(text) else { return Err(Unsupported::Body("body")) };
        if let Some(field) = STRANGE_FIELDS.iter().find(|field| body.get(field).is_some_and(|value| !value.is_null())) {
            return Err(Unsupported::Body(field));
        }
        match (body.take("prompt"), body.take("messages")) {
            (Some(Json::Str(prompt)), None) => {
                Ok(Self::Text { prompt, add_special_tokens: flag(&body, "add_special_tokens", true)? })
            }
            (None, Some(Json::List(messages))) => Ok(Self::Chat(Chat::read(messages, body)?)),
            _ => Err(Unsupported::Body("prompt or messages")),
        }
    }
}

impl Chat {
    fn read(messages: Vec<Json>, mut body: Object) -> Result<Self, Unsupported> {
        let add_generation_prompt = flag(&body, "add_generation_prompt", true)?;
        let continue_final_message = flag(&body, "continue_final_message", false)?;
        if add_generation_prompt && continue_final_message {
            return Err(Unsupported::Body("continue_final_message"));
        }
        let add_special_tokens = flag(&body, "add_special_tokens", false)?;
        let mut tools = match body.take("tools") {
            None | Some(Json::Null) => None,
            Some(Json::List(tools)) => Some(tools::dump(tools)?),
            Some(_) => return Err(Unsupported::Body("tools")),
        };
        let mut arguments = match body.take("chat_template_kwargs") {
            None | Some(Json::Null) => Object::default(),
            Some(Json::Object(arguments)) => Object(arguments.0.into_iter().filter(is_set).collect()),
            Some(_) => return Err(Unsupported::Body("chat_template_kwargs")),
        };
        // Tools that come as an argument win, and reach the template as they are.
        match arguments.take("tools") {
            None => {}
            Some(Json::List(given)) if given.iter().all(|tool| matches!(tool, Json::Object(_))) => tools = Some(given),
            Some(_) => return Err(Unsupported::Body("chat_template_kwargs")),
        }
        let arguments = arguments.0;
        Ok(Self { messages, tools, arguments, add_generation_prompt, continue_final_message, add_special_tokens })
    }

    /// What the template is given.
    pub(super) fn into_input(self, format: ContentFormat, knows_developer: bool) -> Result<Input, Unsupported> {
        Ok(Input {
            messages: messages::conversation(self.messages, format, knows_developer)?,
            tools: self.tools,
            arguments: self.arguments,
            add_generation_prompt: self.add_generation_prompt,
            continue_final_message: self.continue_final_message,
        })
    }
}

/// Whether an argument survives the engine's merge with its defaults (`renderers/params.py`, `merge_kwargs`). The two
/// switches are fields of the body, which win.
fn is_set((name, value): &(String, Json)) -> bool {
    let is_auto = matches!(value, Json::Str(text) if text == "auto");
    !value.is_null() && !is_auto && name != "add_generation_prompt" && name != "continue_final_message"
}

fn flag(body: &Object, name: &'static str, default: bool) -> Result<bool, Unsupported> {
    match body.get(name) {
        None => Ok(default),
        Some(Json::Bool(flag)) => Ok(*flag),
        Some(_) => Err(Unsupported::Body(name)),
    }
}
