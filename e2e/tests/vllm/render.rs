//! The questions that the router asks for a prompt's tokens, and what real requests are made of.

use e2e::vllm::{MODEL, VllmOptions, VllmServer};
use serde_json::{Value, json};
use warmroute::request::{self, Api, Ask, Prompt, ReadOptions, TokensApi};
use warmroute::tokenizer::Tokens;
use warmroute::tokenizer::render::parse;

use crate::TURN;

/// What a body's prompt is asked as, and the answer.
async fn asked(server: &VllmServer, path: &str, body: &Value, options: &ReadOptions) -> (TokensApi, Tokens) {
    let text = body.to_string();
    let opened = request::open(Api::of_path(path), text.as_bytes()).unwrap();
    let Prompt::Text(question) = opened.read(options).prompt else { panic!("{path} {body} is no question") };
    let sent: Value = serde_json::from_slice(&question.body).unwrap();
    let answer = server.post(question.api.path(), &sent).await.unwrap();
    (question.api, parse(question.api, answer.to_string().as_bytes()).unwrap())
}

fn words(n: usize) -> String {
    "the quick brown fox naïve 日本語 🙂 jumps over the lazy dog ".repeat(n)
}

fn chats() -> Vec<Value> {
    let system = json!({"role": "system", "content": words(2)});
    let user =
        json!({"role": "user", "content": [{"type": "text", "text": "hello"}, {"type": "text", "text": words(1)}]});
    let call =
        json!({"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": "{\"city\": \"x\"}"}});
    let tool = json!({"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}});
    let turns = json!([
        system, user, {"role": "assistant", "content": null, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"}, {"role": "user", "content": "and then?"},
    ]);
    let begun = json!([user, {"role": "assistant", "content": "the quick"}]);
    vec![
        json!({"messages": [user]}),
        json!({"messages": [system, user], "cache_salt": "tenant"}),
        json!({"messages": turns, "tools": [tool], "tool_choice": "none"}),
        json!({"messages": turns, "tools": [tool], "tool_choice": null}),
        json!({"messages": [system, user], "reasoning_effort": "none"}),
        json!({
            "messages": [user], "reasoning_effort": "low",
            "chat_template_kwargs": {"enable_thinking": false, "reasoning_effort": "high"},
        }),
        json!({"messages": begun, "add_generation_prompt": false, "continue_final_message": true}),
        json!({"messages": [system, user], "add_special_tokens": true}),
        json!({"messages": [system, user], "truncate_prompt_tokens": 20}),
        json!({"messages": [system, user], "truncate_prompt_tokens": 20, "truncation_side": "right"}),
        json!({"messages": [system, user], "truncate_prompt_tokens": -1, "max_completion_tokens": 7}),
        json!({"messages": [user], "response_format": {"type": "text"}, "documents": [{"title": "a", "text": "b"}]}),
    ]
}

fn completions() -> Vec<Value> {
    vec![
        json!({"prompt": words(3)}),
        json!({"prompt": [words(3), "other"], "cache_salt": "tenant"}),
        json!({"prompt": words(3), "add_special_tokens": false}),
        json!({"prompt": words(3), "truncate_prompt_tokens": 11}),
        json!({"prompt": words(3), "truncate_prompt_tokens": 11, "truncation_side": "right"}),
    ]
}

fn responses() -> Vec<Value> {
    let tool = json!({"type": "function", "name": "get_weather", "parameters": {"type": "object"}, "strict": false});
    vec![
        json!({"input": words(2)}),
        json!({"input": words(2), "instructions": "be brief", "cache_salt": "tenant"}),
        json!({"input": [{"role": "user", "content": [{"type": "input_text", "text": words(1)}]}]}),
        json!({"input": words(1), "tools": [tool], "tool_choice": "none"}),
        json!({"input": words(1), "reasoning": {"effort": "none"}}),
        json!({
            "input": [
                {"role": "user", "content": "what?"},
                {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
            ],
        }),
    ]
}

fn messages() -> Vec<Value> {
    let tool = json!({"name": "get_weather", "input_schema": {"type": "object"}});
    let used = json!({"type": "tool_use", "id": "c1", "name": "get_weather", "input": {"city": "x"}});
    let result = json!({"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "sunny"}]});
    vec![
        json!({"messages": [{"role": "user", "content": words(2)}]}),
        json!({"messages": [{"role": "user", "content": words(1)}], "system": "be brief", "cache_salt": "tenant"}),
        json!({
            "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
            "system": [{"type": "text", "text": "be"}, {"type": "text", "text": " brief"}],
        }),
        json!({
            "messages": [
                {"role": "user", "content": "what?"}, {"role": "assistant", "content": [used]},
                {"role": "user", "content": [result]},
            ],
            "tools": [tool], "tool_choice": {"type": "none"},
        }),
        json!({"messages": [{"role": "user", "content": "x"}], "output_config": {"effort": "low"}}),
    ]
}

fn with(body: &Value, fields: Value) -> Value {
    let mut body = body.clone();
    let Value::Object(fields) = fields else { panic!("{fields} is no object") };
    fields.into_iter().for_each(|(name, value)| {
        body.as_object_mut().unwrap().entry(name).or_insert(value);
    });
    body
}

/// The ids that the engine used, where the API tells them.
async fn assert_ids(server: &VllmServer, path: &str, bodies: &[Value]) {
    let render = ReadOptions { ask: Ask::Render, ..ReadOptions::default() };
    for body in bodies {
        let body = with(body, json!({"model": MODEL, "max_tokens": 1, "temperature": 0, "return_token_ids": true}));
        let answer = server.post(path, &body).await.unwrap();
        let told = [&answer["prompt_token_ids"], &answer["choices"][0]["prompt_token_ids"]];
        let used = told.into_iter().find(|ids| ids.is_array()).unwrap_or_else(|| panic!("{answer} tells no ids"));
        let (_, rendered) = asked(server, path, &body, &render).await;
        assert_eq!(json!(rendered.ids), *used, "{body}");
        assert_eq!(json!(rendered.cache_salt), body["cache_salt"], "{body}");
        assert_eq!(rendered.mm, []);
        if body["truncate_prompt_tokens"].is_null() {
            let (api, tokenized) = asked(server, path, &body, &ReadOptions::default()).await;
            assert_eq!((api, tokenized.ids), (TokensApi::Tokenize, rendered.ids), "{body}");
        }
    }
}

/// Where the API does not tell the ids: their number, and that the engine finds them cached when it is given them as
/// they are.
async fn assert_used(server: &VllmServer, path: &str, bodies: &[Value], defaults: Value) {
    let render = ReadOptions { ask: Ask::Render, ..ReadOptions::default() };
    for body in bodies {
        server.reset_prefix_cache().await.unwrap();
        let body = with(body, with(&defaults, json!({"model": MODEL, "temperature": 0})));
        let (_, rendered) = asked(server, path, &body, &render).await;
        assert_eq!(json!(rendered.cache_salt), body["cache_salt"], "{body}");
        let answer = server.post(path, &body).await.unwrap();
        // Anthropic counts what is cached, before or by the request, apart from the rest.
        let counts = ["input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"];
        let n_used: u64 = counts.iter().filter_map(|count| answer["usage"][count].as_u64()).sum();
        assert_eq!(n_used, rendered.ids.len() as u64, "{body}");
        let salt = rendered.cache_salt.map_or(json!({}), |salt| json!({"cache_salt": salt}));
        let given = with(&salt, json!({"model": MODEL, "prompt": rendered.ids, "max_tokens": 1}));
        let answer = server.post("/v1/completions", &given).await.unwrap();
        let n_reusable = (rendered.ids.len() - 1) / 32 * 32;
        assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], n_reusable, "{body}");
        assert!(n_reusable > 0 || rendered.ids.len() <= 32, "{body}");
    }
}

#[tokio::test]
#[ignore = "needs real vLLM"]
async fn rendered_questions_give_the_tokens_that_the_engine_uses() {
    let _turn = TURN.lock().await;
    let args = vec!["--enable-scale-out".to_owned()];
    let options = VllmOptions { n_blocks: Some(512), args, ..VllmOptions::default() };
    let server = VllmServer::start(options).await.unwrap();
    assert_ids(&server, "/v1/chat/completions", &chats()).await;
    assert_ids(&server, "/v1/completions", &completions()).await;
    assert_used(&server, "/v1/responses", &responses(), json!({"max_output_tokens": 1})).await;
    assert_used(&server, "/v1/messages", &messages(), json!({"max_tokens": 1})).await;
    server.stop().await.unwrap();
}
