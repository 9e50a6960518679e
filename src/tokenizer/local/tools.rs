//! The tools of a request as a chat template sees them: what vLLM 0.32.0 writes when it dumps
//! `ChatCompletionToolsParam` (`entrypoints/openai/chat_completion/protocol.py`). The fields stand in the order of the
//! types, `description` and `parameters` are there even when the client gave none, `strict` and `defer_loading` only
//! when it gave them, and unknown fields are gone.

use super::Unsupported;
use super::json::{Json, Object};

/// The tools for the template.
pub(super) fn dump(tools: Vec<Json>) -> Result<Vec<Json>, Unsupported> {
    tools.into_iter().map(tool).collect()
}

fn tool(tool: Json) -> Result<Json, Unsupported> {
    let refused = Unsupported::Body("tools[]");
    let Json::Object(mut tool) = tool else { return Err(refused) };
    let is_function = match tool.take("type") {
        None => true,
        Some(Json::Str(kind)) => kind == "function",
        Some(_) => false,
    };
    let Some(Json::Object(mut function)) = tool.take("function") else { return Err(refused) };
    if !is_function {
        return Err(refused);
    }
    let is_deferred = flag(&mut tool, "defer_loading")?;
    let mut dumped = Object::default();
    dumped.push("type", Json::text("function"));
    dumped.push("function", Json::Object(dump_function(&mut function, is_deferred)?));
    push_flag(&mut dumped, "defer_loading", is_deferred);
    Ok(Json::Object(dumped))
}

/// A switch that is left out unless it is set.
fn flag(object: &mut Object, name: &'static str) -> Result<Option<bool>, Unsupported> {
    match object.take(name) {
        None | Some(Json::Null) => Ok(None),
        Some(Json::Bool(flag)) => Ok(Some(flag)),
        Some(_) => Err(Unsupported::Body(name)),
    }
}

fn push_flag(object: &mut Object, name: &str, flag: Option<bool>) {
    if let Some(flag) = flag {
        object.push(name, Json::Bool(flag));
    }
}

/// `is_deferred` is what the tool says, unless the function says it itself.
fn dump_function(function: &mut Object, is_deferred: Option<bool>) -> Result<Object, Unsupported> {
    let refused = Unsupported::Body("tools[].function");
    let Some(Json::Str(name)) = function.take("name") else { return Err(refused) };
    let description = match function.take("description") {
        None | Some(Json::Null) => Json::Null,
        Some(Json::Str(text)) => Json::Str(text),
        Some(_) => return Err(refused),
    };
    let parameters = match function.take("parameters") {
        None | Some(Json::Null) => Json::Null,
        Some(Json::Object(parameters)) => Json::Object(parameters),
        Some(_) => return Err(refused),
    };
    let mut dumped = Object::default();
    dumped.push("name", Json::Str(name));
    dumped.push("description", description);
    dumped.push("parameters", parameters);
    push_flag(&mut dumped, "strict", flag(function, "strict")?);
    push_flag(&mut dumped, "defer_loading", flag(function, "defer_loading")?.or(is_deferred));
    Ok(dumped)
}
