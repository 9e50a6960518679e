//! What clients ask for: bodies of the OpenAI endpoints and of `/tokenize`, read as vLLM 0.32 reads them.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::sequence::{Adapter, CacheRead, NewRequest, ReportMode};
use super::tokenizer::{self, BOS, Chat, Ending};

/// An error answer in OpenAI's form.
#[derive(Clone, Debug, PartialEq)]
pub struct ApiError {
    /// HTTP status.
    pub status: u16,
    kind: &'static str,
    message: String,
    param: Option<&'static str>,
}

impl ApiError {
    /// The body of the answer.
    pub fn body(&self) -> Value {
        json!({"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.status}})
    }

    /// 400 for a body that does not have the right shape.
    pub fn malformed(message: impl Into<String>, param: Option<&'static str>) -> Self {
        Self { status: 400, kind: "Bad Request", message: message.into(), param }
    }

    /// 503 when the engine cannot answer any more.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self { status: 503, kind: "ServiceUnavailableError", message: message.into(), param: None }
    }

    /// 500 for what a server does not do on purpose.
    pub fn internal(message: impl Into<String>) -> Self {
        Self { status: 500, kind: "InternalServerError", message: message.into(), param: None }
    }

    fn bad_request(message: impl Into<String>) -> Self {
        Self { status: 400, kind: "BadRequestError", message: message.into(), param: None }
    }
}

/// The models that an engine serves, and its limits.
#[derive(Clone, Debug)]
pub struct Served {
    /// `--served-model-name`.
    pub model: String,
    /// Adapters in the order of loading.
    pub adapters: Vec<Arc<Adapter>>,
    /// `--max-model-len`.
    pub max_model_len: usize,
}

/// Which of the two generating endpoints was called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `/v1/completions`
    Completions,
    /// `/v1/chat/completions`
    Chat,
}

/// A request to generate, checked.
#[derive(Debug)]
pub struct Generate {
    /// Model name to repeat in the answer.
    pub model: String,
    /// One engine request per prompt and choice, in the order of the answer's choices.
    pub requests: Vec<NewRequest>,
    /// Choices per prompt.
    pub n_choices: usize,
    /// `stream`.
    pub stream: bool,
    /// `stream_options.include_usage`.
    pub include_usage: bool,
    /// `return_token_ids`.
    pub return_token_ids: bool,
    /// Why every choice ends: `length` if the client set a limit, else `stop`.
    pub finish_reason: &'static str,
}

impl Served {
    /// Reads a generating request; `session` is the header `X-Session-ID`.
    ///
    /// # Errors
    /// What vLLM would refuse: an unknown model, no prompt, a prompt that is too long, a bad salt.
    pub fn generate(&self, endpoint: Endpoint, body: &Value, session: Option<&str>) -> Result<Generate, ApiError> {
        let body = object(body)?;
        let (model, adapter) = self.model(body)?;
        let prompts = match endpoint {
            Endpoint::Completions => completion_prompts(body)?,
            Endpoint::Chat => vec![chat_prompt(body, Effort::Honoured)?],
        };
        let limit = ["max_completion_tokens", "max_tokens"].iter().find_map(|key| body.get(*key)?.as_u64());
        let limit = limit.or((endpoint == Endpoint::Completions).then_some(16));
        let n_choices = body.get("n").and_then(Value::as_u64).unwrap_or(1).clamp(1, 64) as usize;
        let template = NewRequest {
            cache_salt: cache_salt(body)?,
            adapter,
            cache_read: if is_set(body, "prompt_logprobs") { CacheRead::Skip } else { CacheRead::Lookup },
            report: report_mode(body),
            session_id: session_id(body, session),
            ..NewRequest::default()
        };
        let mut requests = Vec::new();
        for prompt in prompts {
            let prompt = truncate(prompt, body);
            let room = self.max_model_len.saturating_sub(prompt.len());
            if prompt.is_empty() || room == 0 {
                return Err(self.wrong_length(prompt.len()));
            }
            for choice in 0..n_choices {
                let n_output = limit.map_or_else(|| default_answer(&prompt), |limit| limit.max(1) as usize).min(room);
                let output = say(&prompt, choice, n_output);
                requests.push(NewRequest { prompt: prompt.clone(), output, ..template.clone() });
            }
        }
        let stream_options = body.get("stream_options");
        Ok(Generate {
            model,
            requests,
            n_choices,
            stream: body.get("stream").and_then(Value::as_bool).unwrap_or(false),
            include_usage: stream_options.is_some_and(|options| options["include_usage"] == true),
            return_token_ids: body.get("return_token_ids") == Some(&Value::Bool(true)),
            finish_reason: if limit.is_some() { "length" } else { "stop" },
        })
    }

    /// The tokens of a `/tokenize` body.
    ///
    /// # Errors
    /// What vLLM would refuse: an unknown model, neither a prompt string nor messages.
    pub fn tokenize(&self, body: &Value) -> Result<Vec<u32>, ApiError> {
        let body = object(body)?;
        if body.contains_key("messages") {
            self.model(body)?;
            return chat_prompt(body, Effort::Ignored);
        }
        match body.get("prompt") {
            Some(Value::String(prompt)) => {
                self.model(body)?;
                Ok(encode_prompt(prompt, body))
            }
            Some(_) => Err(ApiError::malformed("Input should be a valid string", Some("body.prompt"))),
            None => Err(ApiError::malformed("Field required", Some("body.prompt"))),
        }
    }

    fn model(&self, body: &Map<String, Value>) -> Result<(String, Option<Arc<Adapter>>), ApiError> {
        let Some(name) = body.get("model").and_then(Value::as_str) else {
            return Ok((self.model.clone(), None));
        };
        if name == self.model {
            return Ok((self.model.clone(), None));
        }
        let adapter = self.adapters.iter().find(|adapter| adapter.name == name);
        let adapter = adapter.ok_or_else(|| ApiError {
            status: 404,
            kind: "NotFoundError",
            message: format!("The model `{name}` does not exist. Valid aliases: {}.", self.model),
            param: Some("model"),
        })?;
        Ok((name.to_owned(), Some(adapter.clone())))
    }

    fn wrong_length(&self, n_prompt: usize) -> ApiError {
        ApiError::bad_request(format!(
            "This model's maximum context length is {} tokens. However, your request has {n_prompt} input tokens.",
            self.max_model_len
        ))
    }
}

/// Whether `reasoning_effort` reaches the template: in chat it does, in `/tokenize` it does not.
#[derive(Clone, Copy, PartialEq)]
enum Effort {
    Honoured,
    Ignored,
}

fn object(body: &Value) -> Result<&Map<String, Value>, ApiError> {
    body.as_object().ok_or_else(|| ApiError::malformed("Input should be a valid dictionary", Some("body")))
}

fn chat_prompt(body: &Map<String, Value>, effort: Effort) -> Result<Vec<u32>, ApiError> {
    let messages = body.get("messages").and_then(Value::as_array);
    let messages = messages.ok_or_else(|| ApiError::malformed("Field required", Some("body.messages")))?;
    if messages.is_empty() {
        return Err(ApiError::bad_request(
            "Cannot apply chat template to an empty conversation. Provide at least one message.",
        ));
    }
    if messages.iter().any(|message| !message["role"].is_string()) {
        return Err(ApiError::malformed("Field required", Some("body.messages")));
    }
    if is_set(body, "chat_template") {
        return Err(ApiError::bad_request(
            "Chat template is passed with request, but --trust-request-chat-template is not set. Refused request with untrusted chat template.",
        ));
    }
    if messages.iter().any(has_media) {
        return Err(ApiError::bad_request("the simulated model is not a multimodal model"));
    }
    let tools = body.get("tools").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let prompt = tokenizer::render_chat(&Chat { messages, tools, ending: ending(body, effort)? });
    let mut tokens = tokenizer::encode(&prompt);
    if flag(body, "add_special_tokens", false) {
        tokens.insert(0, BOS);
    }
    Ok(tokens)
}

fn ending(body: &Map<String, Value>, effort: Effort) -> Result<Ending, ApiError> {
    let answer = flag(body, "add_generation_prompt", true);
    match (flag(body, "continue_final_message", false), answer) {
        (true, true) => {
            Err(ApiError::bad_request("Cannot set both `continue_final_message` and `add_generation_prompt` to True."))
        }
        (true, false) => Ok(Ending::Continue),
        (false, false) => Ok(Ending::Closed),
        (false, true) => {
            let asked = body.get("chat_template_kwargs").and_then(|kwargs| kwargs["enable_thinking"].as_bool());
            let effort = effort == Effort::Honoured && body.get("reasoning_effort") == Some(&json!("none"));
            Ok(Ending::Answer { thinking: asked.unwrap_or(!effort) })
        }
    }
}

fn has_media(message: &Value) -> bool {
    let parts = message["content"].as_array();
    parts.is_some_and(|parts| parts.iter().any(|part| part["type"] != "text"))
}

fn completion_prompts(body: &Map<String, Value>) -> Result<Vec<Vec<u32>>, ApiError> {
    let unreadable =
        || ApiError::malformed("Input should be a string, token ids or a list of them", Some("body.prompt"));
    match body.get("prompt").ok_or_else(unreadable)? {
        Value::String(prompt) => Ok(vec![encode_prompt(prompt, body)]),
        Value::Array(items) if items.first().is_some_and(Value::is_number) => {
            Ok(vec![token_ids(items).ok_or_else(unreadable)?])
        }
        Value::Array(items) if !items.is_empty() => {
            let prompts = items.iter().map(|item| match item {
                Value::String(prompt) => Some(encode_prompt(prompt, body)),
                Value::Array(ids) => token_ids(ids),
                _ => None,
            });
            prompts.collect::<Option<_>>().ok_or_else(unreadable)
        }
        _ => Err(unreadable()),
    }
}

fn encode_prompt(prompt: &str, body: &Map<String, Value>) -> Vec<u32> {
    let mut tokens = tokenizer::encode(prompt);
    if flag(body, "add_special_tokens", true) {
        tokens.insert(0, BOS);
    }
    tokens
}

fn token_ids(items: &[Value]) -> Option<Vec<u32>> {
    items.iter().map(|item| u32::try_from(item.as_u64()?).ok()).collect()
}

/// Keeps the last `truncate_prompt_tokens` tokens.
fn truncate(mut prompt: Vec<u32>, body: &Map<String, Value>) -> Vec<u32> {
    let keep = body.get("truncate_prompt_tokens").and_then(Value::as_u64);
    if let Some(keep) = keep.and_then(|keep| usize::try_from(keep).ok()) {
        prompt.drain(..prompt.len().saturating_sub(keep));
    }
    prompt
}

fn cache_salt(body: &Map<String, Value>) -> Result<Option<String>, ApiError> {
    let Some(salt) = body.get("cache_salt").filter(|salt| !salt.is_null()) else {
        return Ok(None);
    };
    let salt = salt.as_str().filter(|salt| !salt.is_empty() && salt.chars().count() <= 128);
    let salt = salt.filter(|salt| !salt.contains(['@', '/', '\\', '\0']));
    let salt = salt.ok_or_else(|| ApiError::malformed("Parameter 'cache_salt' is not valid", Some("cache_salt")))?;
    Ok(Some(salt.to_owned()))
}

fn report_mode(body: &Map<String, Value>) -> ReportMode {
    let full = body.get("vllm_xargs").is_some_and(|xargs| xargs["kv_cache_report_mode"] == "full");
    if full { ReportMode::Full } else { ReportMode::Incremental }
}

fn session_id(body: &Map<String, Value>, header: Option<&str>) -> Option<String> {
    let named = body.get("session_id").and_then(Value::as_str).or(header);
    let named = named.or_else(|| body.get("vllm_xargs")?.get("session_id")?.as_str());
    named.map(str::to_owned)
}

fn is_set(body: &Map<String, Value>, key: &str) -> bool {
    body.get(key).is_some_and(|value| !value.is_null())
}

fn flag(body: &Map<String, Value>, key: &str, default: bool) -> bool {
    body.get(key).and_then(Value::as_bool).unwrap_or(default)
}

/// Length of an answer to which the client set no limit: 32 to 95 tokens, always the same for a prompt.
fn default_answer(prompt: &[u32]) -> usize {
    32 + fastrand::Rng::with_seed(seed(prompt, 0)).usize(..64)
}

/// What the model says: words, always the same ones for a prompt and a choice.
fn say(prompt: &[u32], choice: usize, n_tokens: usize) -> Vec<u32> {
    let mut random = fastrand::Rng::with_seed(seed(prompt, choice + 1));
    (0..n_tokens).map(|_| tokenizer::word_token(random.u32(..tokenizer::N_WORDS))).collect()
}

fn seed(prompt: &[u32], salt: usize) -> u64 {
    prompt
        .iter()
        .fold(salt as u64, |seed, token| (seed ^ u64::from(*token)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29))
}
