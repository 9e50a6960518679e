//! Reads the parts of an OpenAI-style request that routing needs; nothing is kept, and nothing is changed but what [`report`] says.
//!
//! A prompt given as token ids is used as it is. Any other prompt becomes the body of a `/tokenize` call, made of an
//! allow-list of the client's fields, copied byte for byte (vLLM 0.32.0 `/tokenize`, checked against a running server).
//! What cannot be tokenized exactly without the engine, such as images or a client's own chat template, is
//! [`Prompt::Opaque`] with the reason.
//!
//! The body is walked once with borrowed slices; cost is linear in its size and deep nesting costs no stack.

mod chat;
mod completion;
mod reasoning;
pub mod report;

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::value::RawValue;

/// Which of the engine's APIs a path names. The query is ignored; a prefix before `/v1` is allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Api {
    /// `…/v1/chat/completions`
    ChatCompletions,
    /// `…/v1/completions`
    Completions,
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
        } else {
            Self::Other
        }
    }

    /// OpenTelemetry's `gen_ai.operation.name`.
    pub fn operation(self) -> &'static str {
        match self {
            Self::ChatCompletions => "chat",
            Self::Completions => "text_completion",
            Self::Other => "other",
        }
    }
}

/// What routing needs to know of a request.
#[derive(Debug, PartialEq)]
pub struct LlmRequest {
    /// The `model` field; none when the body names no model.
    pub model: Option<String>,
    /// The prompt whose cached prefix decides.
    pub prompt: Prompt,
    /// The `cache_salt` field, part of the first block's hash.
    pub cache_salt: Option<String>,
    /// How the engine cuts the prompt before it looks at its cache.
    pub truncation: Option<Truncation>,
}

/// The prompt of a request.
#[derive(Debug, PartialEq)]
pub enum Prompt {
    /// Token ids, as the client gave them.
    Tokens(Vec<u32>),
    /// Text: what the engine is asked for its tokens.
    Text(Question),
    /// Tokens cannot be known, or would not help.
    Opaque(Opaque),
}

/// What an engine is asked for the tokens of a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
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
}

impl TokensApi {
    /// Its path.
    pub fn path(self) -> &'static str {
        match self {
            Self::Tokenize => "/tokenize",
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
            Self::Invalid => "invalid_prompt",
        }
    }
}

/// `truncate_prompt_tokens` with `truncation_side`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Truncation {
    /// The engine keeps the last tokens (its default side).
    KeepLast(usize),
    /// The engine keeps the first tokens.
    KeepFirst(usize),
}

impl Truncation {
    /// Cuts `tokens` as the engine does.
    pub fn apply(self, tokens: &mut Vec<u32>) {
        match self {
            Self::KeepLast(n) if n < tokens.len() => drop(tokens.drain(..tokens.len() - n)),
            Self::KeepFirst(n) => tokens.truncate(n),
            Self::KeepLast(_) => {}
        }
    }
}

/// The body is not a JSON object whose fields have the expected types.
#[derive(Debug, thiserror::Error)]
#[error("the body is not a JSON object with the fields of an OpenAI request")]
pub struct UnreadableBody(#[source] serde_json::Error);

/// The fields that are read. Everything else in the body is skipped.
#[derive(Deserialize)]
struct Body<'a> {
    #[serde(borrow)]
    model: Option<Cow<'a, str>>,
    #[serde(borrow)]
    messages: Option<&'a RawValue>,
    #[serde(borrow)]
    prompt: Option<&'a RawValue>,
    #[serde(borrow)]
    prompt_embeds: Option<&'a RawValue>,
    #[serde(borrow)]
    tools: Option<&'a RawValue>,
    #[serde(borrow)]
    chat_template: Option<&'a RawValue>,
    #[serde(borrow)]
    chat_template_kwargs: Option<&'a RawValue>,
    #[serde(borrow)]
    reasoning_effort: Option<&'a RawValue>,
    #[serde(borrow)]
    documents: Option<&'a RawValue>,
    #[serde(borrow)]
    add_generation_prompt: Option<&'a RawValue>,
    #[serde(borrow)]
    continue_final_message: Option<&'a RawValue>,
    #[serde(borrow)]
    add_special_tokens: Option<&'a RawValue>,
    #[serde(borrow)]
    cache_salt: Option<&'a RawValue>,
    #[serde(borrow)]
    truncate_prompt_tokens: Option<&'a RawValue>,
    #[serde(borrow)]
    truncation_side: Option<&'a RawValue>,
    #[serde(borrow)]
    prompt_logprobs: Option<&'a RawValue>,
    #[serde(borrow)]
    logprobs: Option<&'a RawValue>,
    #[serde(borrow)]
    echo: Option<&'a RawValue>,
}

impl Body<'_> {
    /// None when the engine does not cut; the engine takes a number also as text. Negative: its own limit.
    fn truncation(&self) -> Result<Option<Truncation>, Opaque> {
        let Some(given) = self.truncate_prompt_tokens else { return Ok(None) };
        let n: f64 = given.get().trim_matches('"').parse().map_err(|_| Opaque::Invalid)?;
        let is_right = self.truncation_side.is_some_and(|side| side.get() == "\"right\"");
        Ok(match n {
            n if n < 0.0 => None,
            n if is_right => Some(Truncation::KeepFirst(n as usize)),
            n => Some(Truncation::KeepLast(n as usize)),
        })
    }

    fn cache_salt(&self) -> Result<Option<String>, Opaque> {
        let parse = |salt: &RawValue| serde_json::from_str(salt.get()).map_err(|_| Opaque::Invalid);
        self.cache_salt.map(parse).transpose()
    }

    /// vLLM skips reading its prefix cache when it has to compute the prompt's log probabilities: asked for by name, or
    /// because a chat, or a completion with log probabilities, is to echo its prompt.
    fn skips_cache(&self, api: Api) -> bool {
        let echoes = self.echo.is_some_and(|echo| echo.get() == "true");
        self.prompt_logprobs.is_some() || echoes && (api == Api::ChatCompletions || self.logprobs.is_some())
    }

    fn prompt(&self, api: Api) -> Prompt {
        if self.skips_cache(api) {
            Prompt::Opaque(Opaque::CacheNotRead)
        } else if api == Api::ChatCompletions {
            chat::prompt(self)
        } else {
            completion::prompt(self)
        }
    }
}

/// Only the model's name, for paths whose body we do not know.
#[derive(Deserialize)]
struct Named<'a> {
    #[serde(borrow)]
    model: Option<Cow<'a, str>>,
}

/// Reads a request body.
///
/// # Errors
/// [`UnreadableBody`] when the body is not UTF-8, not JSON, not an object, or its model is not a string. The engine gets the
/// body unchanged and is the one to complain. A field that is given twice, or that the engine will refuse, makes the prompt
/// [`Opaque::Invalid`]: the request still goes to its model.
pub fn read(api: Api, body: &[u8]) -> Result<LlmRequest, UnreadableBody> {
    if api == Api::Other {
        return read_model(body);
    }
    let Ok(fields) = serde_json::from_slice::<Body<'_>>(body) else {
        return Ok(LlmRequest { prompt: Prompt::Opaque(Opaque::Invalid), ..read_model(body)? });
    };
    let (prompt, cache_salt, truncation) = match (fields.cache_salt(), fields.truncation()) {
        (Ok(cache_salt), Ok(truncation)) => (fields.prompt(api), cache_salt, truncation),
        (Err(opaque), _) | (_, Err(opaque)) => (Prompt::Opaque(opaque), None, None),
    };
    Ok(LlmRequest { model: fields.model.map(Cow::into_owned), prompt, cache_salt, truncation })
}

fn read_model(body: &[u8]) -> Result<LlmRequest, UnreadableBody> {
    let named =
        if body.is_empty() { Named { model: None } } else { serde_json::from_slice(body).map_err(UnreadableBody)? };
    Ok(LlmRequest {
        model: named.model.map(Cow::into_owned),
        prompt: Prompt::Opaque(Opaque::OtherPath),
        cache_salt: None,
        truncation: None,
    })
}

/// Writes a JSON object of fields whose values are already JSON text.
struct JsonObject(Vec<u8>);

impl JsonObject {
    fn new(capacity: usize) -> Self {
        Self(Vec::with_capacity(capacity))
    }

    /// Adds a field; `name` needs no escaping.
    fn field(&mut self, name: &str, json: &str) {
        self.0.push(if self.0.is_empty() { b'{' } else { b',' });
        self.0.extend_from_slice(b"\"");
        self.0.extend_from_slice(name.as_bytes());
        self.0.extend_from_slice(b"\":");
        self.0.extend_from_slice(json.as_bytes());
    }

    fn optional(&mut self, name: &str, json: Option<&RawValue>) {
        if let Some(json) = json {
            self.field(name, json.get());
        }
    }

    fn finish(mut self) -> Vec<u8> {
        if self.0.is_empty() {
            self.0.push(b'{');
        }
        self.0.push(b'}');
        self.0
    }
}

/// JSON text of a string.
fn json_string(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn chat(body: &Value) -> LlmRequest {
        read(Api::ChatCompletions, body.to_string().as_bytes()).expect("readable")
    }

    fn completion(body: &Value) -> LlmRequest {
        read(Api::Completions, body.to_string().as_bytes()).expect("readable")
    }

    fn tokenize_body(request: LlmRequest) -> Value {
        match request.prompt {
            Prompt::Text(question) => serde_json::from_slice(&question.body).expect("the tokenize body is JSON"),
            other => panic!("expected a text prompt, found {other:?}"),
        }
    }

    #[test]
    fn paths_name_their_api_whatever_the_query_or_prefix() {
        for (path, api) in [
            ("/v1/chat/completions", Api::ChatCompletions),
            ("/v1/completions?x=/v1/chat/completions", Api::Completions),
            ("/openai/v1/completions", Api::Completions),
            ("/v1/embeddings", Api::Other),
            ("/v1/chat/completions/", Api::Other),
            ("", Api::Other),
        ] {
            assert_eq!(Api::of_path(path), api, "{path}");
        }
    }

    #[test]
    fn chat_forwards_only_the_allow_list() {
        let body = json!({
            "model": "tiny", "messages": [{"role": "user", "content": "hi"}], "tools": [{"type": "function"}],
            "chat_template_kwargs": {"enable_thinking": false}, "add_generation_prompt": true, "stream": true,
            "max_tokens": 3, "user": "u", "cache_salt": "s", "mm_processor_kwargs": {"a": 1}, "vllm_xargs": {"b": 2}
        });
        let request = chat(&body);
        assert_eq!(request.model.as_deref(), Some("tiny"));
        assert_eq!(request.cache_salt.as_deref(), Some("s"));
        let sent = tokenize_body(request);
        let expected = json!({
            "model": "tiny", "messages": [{"role": "user", "content": "hi"}], "tools": [{"type": "function"}],
            "chat_template_kwargs": {"enable_thinking": false}, "add_generation_prompt": true
        });
        assert_eq!(sent, expected);
    }

    #[test]
    fn reasoning_effort_and_documents_become_template_arguments() {
        let message = json!([{"role": "user", "content": "hi"}]);
        let sent = tokenize_body(chat(&json!({"messages": message, "reasoning_effort": "none"})));
        assert_eq!(sent["chat_template_kwargs"], json!({"reasoning_effort": "none", "enable_thinking": false}));
        let body = json!({
            "messages": message, "reasoning_effort": "high", "documents": [1], "chat_template_kwargs": {"enable_thinking": false, "x": 1}
        });
        let expected = json!({"enable_thinking": false, "x": 1, "reasoning_effort": "high", "documents": [1]});
        assert_eq!(tokenize_body(chat(&body))["chat_template_kwargs"], expected);
    }

    #[test]
    fn media_and_client_templates_are_opaque() {
        let image = json!({"type": "image_url", "image_url": {"url": "http://example.invalid/x.png"}});
        for content in [
            json!([image]),
            json!([{"image_url": "u"}]),
            json!([{"type": "input_audio"}]),
            json!([{"type": "new"}]),
            image,
        ] {
            let body = json!({"messages": [{"role": "user", "content": content}]});
            assert_eq!(chat(&body).prompt, Prompt::Opaque(Opaque::Media), "{body}");
        }
        let body = json!({"messages": [{"role": "user", "content": "x"}], "chat_template": "{{ x }}"});
        assert_eq!(chat(&body).prompt, Prompt::Opaque(Opaque::ChatTemplate));
        let body = json!({"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"chat_template": "{{ x }}"}});
        assert_eq!(chat(&body).prompt, Prompt::Opaque(Opaque::ChatTemplate));
        let body = json!({"prompt": [1, 2], "prompt_embeds": "AAAA"});
        assert_eq!(completion(&body).prompt, Prompt::Opaque(Opaque::Media));
    }

    #[test]
    fn text_parts_are_text() {
        let body = json!({"messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, "b", {"type": "refusal", "refusal": "c"}]},
            {"role": "assistant", "content": null, "tool_calls": [{"id": "1"}]},
        ]});
        assert_eq!(tokenize_body(chat(&body))["messages"], body["messages"]);
    }

    #[test]
    fn first_completion_prompt_decides() {
        assert_eq!(tokenize_body(completion(&json!({"prompt": "a\"\u{1F642}"})))["prompt"], "a\"\u{1F642}");
        assert_eq!(
            tokenize_body(completion(&json!({"prompt": ["b", "c"], "add_special_tokens": false}))),
            json!({"prompt": "b", "add_special_tokens": false})
        );
        assert_eq!(completion(&json!({"prompt": [1, 2]})).prompt, Prompt::Tokens(vec![1, 2]));
        assert_eq!(completion(&json!({"prompt": [[3, 4], [5]]})).prompt, Prompt::Tokens(vec![3, 4]));
        for bad in [
            json!([]),
            json!([[]]),
            json!(7),
            json!([-1]),
            json!([4_294_967_296_u64]),
            json!({"a": 1}),
            json!([1, "x"]),
        ] {
            assert_eq!(completion(&json!({"prompt": bad})).prompt, Prompt::Opaque(Opaque::Invalid), "{bad}");
        }
        assert_eq!(completion(&json!({})).prompt, Prompt::Opaque(Opaque::Invalid));
    }

    #[test]
    fn prompt_log_probabilities_skip_the_cache() {
        for body in [json!({"prompt": "x", "prompt_logprobs": 0}), json!({"prompt": "x", "echo": true, "logprobs": 1})]
        {
            assert_eq!(completion(&body).prompt, Prompt::Opaque(Opaque::CacheNotRead));
        }
        assert!(matches!(completion(&json!({"prompt": "x", "logprobs": 1})).prompt, Prompt::Text(_)));
    }

    #[test]
    fn truncation_keeps_the_side_the_engine_keeps() {
        let cut = |body: Value| {
            let mut tokens = vec![1, 2, 3];
            if let Some(truncation) = completion(&body).truncation {
                truncation.apply(&mut tokens);
            }
            tokens
        };
        assert_eq!(cut(json!({"truncate_prompt_tokens": 2})), [2, 3]);
        assert_eq!(cut(json!({"truncate_prompt_tokens": 2, "truncation_side": "right"})), [1, 2]);
        assert_eq!(cut(json!({"truncate_prompt_tokens": 9})), [1, 2, 3]);
        assert_eq!(cut(json!({"truncate_prompt_tokens": -1})), [1, 2, 3]);
        assert_eq!(cut(json!({"truncate_prompt_tokens": "2"})), [2, 3]);
        assert_eq!(cut(json!({"truncate_prompt_tokens": 2.0})), [2, 3]);
    }

    #[test]
    fn bad_bodies_are_unreadable_and_never_panic() {
        let deep = format!("{}{}", "[".repeat(200_000), "]".repeat(200_000));
        let deep_model = format!("{{\"model\":{deep}}}");
        for body in [
            &b"{"[..],
            b"[]",
            b"null",
            b"\xff\xfe",
            b"{\"model\":1}",
            b"{\"model\":\"a\",\"model\":\"b\"}",
            deep_model.as_bytes(),
        ] {
            assert!(read(Api::ChatCompletions, body).is_err(), "{:?}", &body[..body.len().min(20)]);
        }
        let deep_messages = format!("{{\"model\":\"m\",\"messages\":{deep}}}");
        let request = read(Api::ChatCompletions, deep_messages.as_bytes()).expect("depth is skipped");
        assert_eq!(request.prompt, Prompt::Opaque(Opaque::Invalid));
    }

    #[test]
    fn a_field_that_is_not_understood_does_not_lose_the_model() {
        for fields in [
            r#""cache_salt":5"#,
            r#""echo":true,"echo":true"#,
            r#""truncate_prompt_tokens":"many""#,
            r#""truncate_prompt_tokens":[]"#,
            r#""prompt":{"a":1}"#,
        ] {
            let body = format!("{{\"model\":\"m\",{fields}}}");
            let request = read(Api::Completions, body.as_bytes()).expect("the model is readable");
            assert_eq!(request.model.as_deref(), Some("m"), "{body}");
            assert_eq!(request.prompt, Prompt::Opaque(Opaque::Invalid), "{body}");
        }
    }

    #[test]
    fn other_paths_only_tell_their_model() {
        let request = read(Api::Other, br#"{"model":"m","input":[1]}"#).expect("readable");
        assert_eq!((request.model.as_deref(), request.prompt), (Some("m"), Prompt::Opaque(Opaque::OtherPath)));
        assert_eq!(read(Api::Other, b"").expect("a bodyless request").model, None);
    }
}
