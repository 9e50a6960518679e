//! The tools of a request as a chat template sees them: what vLLM 0.32.0 writes when it dumps `ChatCompletionToolsParam`
//! (`entrypoints/openai/chat_completion/protocol.py`). The fields stand in the order of the types, `description` and
//! `parameters` are there even when the client gave none, `strict` only when it gave one, and unknown fields are gone.

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
    let is_deferred = |object: &Object| object.get("defer_loading").is_some_and(|value| !value.is_null());
    let Some(Json::Object(mut function)) = tool.take("function") else { return Err(refused) };
    if !is_function || is_deferred(&tool) || is_deferred(&function) {
        return Err(refused);
    }
    let mut dumped = Object::default();
    dumped.push("type", Json::text("function"));
    dumped.push("function", Json::Object(dump_function(&mut function)?));
    Ok(Json::Object(dumped))
}

fn dump_function(function: &mut Object) -> Result<Object, Unsupported> {
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
    match function.take("strict") {
        None | Some(Json::Null) => {}
        Some(Json::Bool(strict)) => dumped.push("strict", Json::Bool(strict)),
        Some(_) => return Err(refused),
    }
    Ok(dumped)
}
