use serde_json::{Value, json};

use super::*;

mod content;
mod render;

fn read(api: Api, body: &[u8]) -> Result<LlmRequest, UnreadableBody> {
    Ok(open(api, body)?.read(&ReadOptions::default()))
}

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
        ("/v1/responses?a=b", Api::Responses),
        ("/anthropic/v1/messages", Api::Messages),
        ("/v1/messages/count_tokens", Api::Other),
        ("/v1/responses/resp_1", Api::Other),
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
    // What the request says wins, as in a chat request.
    let body = json!({
        "messages": message, "reasoning_effort": "high", "documents": [1],
        "chat_template_kwargs": {"reasoning_effort": "low", "documents": []}
    });
    let expected = json!({"enable_thinking": true, "reasoning_effort": "high", "documents": [1]});
    assert_eq!(tokenize_body(chat(&body))["chat_template_kwargs"], expected);
    let body = json!({"messages": message, "chat_template_kwargs": {"reasoning_effort": "low"}});
    assert_eq!(tokenize_body(chat(&body))["chat_template_kwargs"], json!({"reasoning_effort": "low"}));
}

#[test]
fn media_and_client_templates_are_opaque() {
    let image = json!({"type": "image_url", "image_url": {"url": "http://example.invalid/x.png"}});
    for content in
        [json!([image]), json!([{"image_url": "u"}]), json!([{"type": "input_audio"}]), json!([{"type": "new"}]), image]
    {
        let body = json!({"messages": [{"role": "user", "content": content}]});
        assert_eq!(chat(&body).prompt, Prompt::Opaque(Opaque::Media), "{body}");
    }
    let body = json!({"messages": [{"role": "user", "content": "x"}], "chat_template": "{{ x }}"});
    assert_eq!(chat(&body).prompt, Prompt::Opaque(Opaque::ChatTemplate));
    let body =
        json!({"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"chat_template": "{{ x }}"}});
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
    for bad in
        [json!([]), json!([[]]), json!(7), json!([-1]), json!([4_294_967_296_u64]), json!({"a": 1}), json!([1, "x"])]
    {
        assert_eq!(completion(&json!({"prompt": bad})).prompt, Prompt::Opaque(Opaque::Invalid), "{bad}");
    }
    assert_eq!(completion(&json!({})).prompt, Prompt::Opaque(Opaque::Invalid));
}

#[test]
fn prompt_log_probabilities_skip_the_cache() {
    for body in [json!({"prompt": "x", "prompt_logprobs": 0}), json!({"prompt": "x", "echo": true, "logprobs": 1})] {
        assert_eq!(completion(&body).prompt, Prompt::Opaque(Opaque::CacheNotRead));
    }
    assert!(matches!(completion(&json!({"prompt": "x", "logprobs": 1})).prompt, Prompt::Text(_)));
}

fn cut(request: &LlmRequest) -> Vec<u32> {
    let mut tokens = vec![1, 2, 3];
    match request.prompt {
        Prompt::Opaque(opaque) => panic!("expected tokens, found {opaque:?}"),
        Prompt::Text(_) | Prompt::Tokens(_) => {}
    }
    if let Some(truncation) = request.truncation {
        truncation.apply(&mut tokens);
    }
    tokens
}

#[test]
fn truncation_keeps_the_side_the_engine_keeps() {
    for (mut fields, expected) in [
        (json!({"truncate_prompt_tokens": 2}), &[2, 3][..]),
        (json!({"truncate_prompt_tokens": 2, "truncation_side": null}), &[2, 3]),
        (json!({"truncate_prompt_tokens": 2, "truncation_side": "left"}), &[2, 3]),
        (json!({"truncate_prompt_tokens": 2, "truncation_side": "right"}), &[1, 2]),
        (json!({"truncate_prompt_tokens": 9}), &[1, 2, 3]),
        (json!({"truncate_prompt_tokens": "2"}), &[2, 3]),
        (json!({"truncate_prompt_tokens": 2.0}), &[2, 3]),
        (json!({"truncate_prompt_tokens": null}), &[1, 2, 3]),
        (json!({"truncation_side": "right"}), &[1, 2, 3]),
    ] {
        fields["prompt"] = json!([1, 2, 3]);
        assert_eq!(cut(&completion(&fields)), expected, "{fields}");
        fields["prompt"] = json!("a text");
        fields["add_special_tokens"] = json!(false);
        assert_eq!(cut(&completion(&fields)), expected, "{fields}");
        fields.as_object_mut().expect("an object").remove("add_special_tokens");
        fields["messages"] = json!([]);
        assert_eq!(cut(&chat(&fields)), expected, "{fields}");
    }
}

#[test]
fn a_text_that_the_tokenizer_itself_cuts_is_not_asked_for() {
    // It keeps its special tokens, which a cut of the list would lose.
    for adds in [json!(null), json!(true), json!(1)] {
        let mut body = json!({"prompt": "x", "messages": [], "truncate_prompt_tokens": 2, "add_special_tokens": adds});
        assert_eq!(completion(&body).prompt, Prompt::Opaque(Opaque::Inexact), "{body}");
        if !adds.is_null() {
            assert_eq!(chat(&body).prompt, Prompt::Opaque(Opaque::Inexact), "{body}");
        }
        for side in ["left", "right"] {
            body["truncation_side"] = json!(side);
            assert_eq!(cut(&completion(&body)).len(), 2, "of a side that is named the engine cuts the list");
            assert_eq!(cut(&chat(&body)).len(), 2);
        }
    }
    // The client's own list has no special tokens to keep.
    assert_eq!(cut(&completion(&json!({"prompt": [1, 2, 3], "truncate_prompt_tokens": 1}))), [3]);
}

#[test]
fn a_limit_that_only_the_engine_knows_is_not_guessed() {
    for prompt in [json!("x"), json!([1, 2, 3])] {
        let body = json!({
            "prompt": prompt, "messages": [], "cache_salt": "s",
            "truncate_prompt_tokens": -1, "truncation_side": "left", "add_special_tokens": false
        });
        for request in [completion(&body), chat(&body)] {
            assert_eq!((request.prompt, request.truncation), (Prompt::Opaque(Opaque::Inexact), None), "{body}");
        }
    }
    let body = json!({"prompt": "x", "truncate_prompt_tokens": -1}).to_string();
    let render = ReadOptions { ask: Ask::Render, ..ReadOptions::default() };
    let request = open(Api::Completions, body.as_bytes()).expect("readable").read(&render);
    assert!(matches!(request.prompt, Prompt::Text(_)), "who renders knows its limit");
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
        r#""prompt":"x","truncate_prompt_tokens":-2"#,
        r#""prompt":"x","truncate_prompt_tokens":1.5"#,
        r#""prompt":"x","truncation_side":"middle""#,
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

#[test]
fn tools_that_the_engine_leaves_out_are_left_out() {
    let excludes = ReadOptions { exclude_tools_when_none: true, ..ReadOptions::default() };
    let sent = |options: &ReadOptions, choice: Value| {
        let body = json!({"messages": [], "tools": [{"type": "function"}], "tool_choice": choice}).to_string();
        tokenize_body(open(Api::ChatCompletions, body.as_bytes()).expect("readable").read(options))
    };
    assert_eq!(sent(&excludes, json!("none")), json!({"messages": []}));
    for (options, choice) in [
        (&ReadOptions::default(), json!("none")),
        (&excludes, json!("auto")),
        (&excludes, Value::Null),
        (&excludes, json!({"type": "function", "function": {"name": "none"}})),
    ] {
        assert_eq!(sent(options, choice), json!({"messages": [], "tools": [{"type": "function"}]}));
    }
}

#[test]
fn model_is_found_in_a_beginning_that_holds_its_name() {
    for (beginning, expected) in [
        (r#"{"model":"tiny","prompt":"and so o"#, Some("tiny")),
        (r#"{"messages":[{"content":"x\ud83d"}],"model":"tiny","#, Some("tiny")),
        (r#"{"a":{"model":"inner"},"model":"tiny""#, Some("tiny")),
        (r#"{"model":"ti"#, None),
        (r#"{"model":7,"#, None),
        (r#"{"model":null,"#, None),
        (r#"{"prompt":"and so o"#, None),
        (r#"["model","tiny""#, None),
        ("", None),
    ] {
        assert_eq!(model_in_beginning(beginning.as_bytes()).as_deref(), expected, "{beginning}");
    }
    assert_eq!(model_in_beginning(b"{\"model\":\"tiny\",\"prompt\":\"\xc3").as_deref(), Some("tiny"));
}
