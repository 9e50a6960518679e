//! Questions to the render APIs.

use super::*;

const RENDER: ReadOptions =
    ReadOptions { ask: Ask::Render, allow_chat_template: false, allow_media: false, exclude_tools_when_none: false };
const RENDER_MEDIA: ReadOptions = ReadOptions { allow_media: true, ..RENDER };

fn request(api: Api, body: &str, options: &ReadOptions) -> LlmRequest {
    open(api, body.as_bytes()).expect("readable").read(options)
}

fn prompt(api: Api, body: &Value, options: &ReadOptions) -> Prompt {
    request(api, &body.to_string(), options).prompt
}

fn asked(api: Api, body: &str, options: &ReadOptions) -> (TokensApi, String) {
    match request(api, body, options).prompt {
        Prompt::Text(question) => (question.api, String::from_utf8(question.body).expect("text")),
        other => panic!("expected a text prompt of {body}, found {other:?}"),
    }
}

#[test]
fn fields_that_make_tokens_are_copied_byte_for_byte_and_no_others() {
    let cases = [
        (
            Api::ChatCompletions,
            TokensApi::RenderChat,
            r#"{"model":"m","messages":[ {"role":"user","content":"\u0061"} ],"tools":[{}],"tool_choice":null,
               "reasoning_effort":"low","documents":[],"chat_template_kwargs":{"b": 1, "a":2.50},"add_generation_prompt":true,
               "continue_final_message":false,"add_special_tokens":false,"response_format":{},"truncate_prompt_tokens":5,
               "truncation_side":"left","max_tokens":1,"max_completion_tokens":2,"cache_salt":"s"}"#,
        ),
        (
            Api::Completions,
            TokensApi::RenderCompletion,
            r#"{"model":"m","prompt":"a","suffix":"b","add_special_tokens":false,"truncate_prompt_tokens":5,
               "truncation_side":"left","max_tokens":1,"cache_salt":"s"}"#,
        ),
        (
            Api::Responses,
            TokensApi::RenderResponses,
            r#"{"model":"m","input":"a","instructions":"b","previous_input_messages":[],"tools":[],"tool_choice":"auto",
               "reasoning":{"effort":"low"},"text":{},"chat_template_kwargs":{},"truncation":"auto","max_output_tokens":5,
               "cache_salt":"s"}"#,
        ),
        (
            Api::Messages,
            TokensApi::RenderMessages,
            r#"{"model":"m","messages":[{"role":"user","content":"a"}],"system":"b","tools":[],"tool_choice":{"type":"auto"},
               "thinking":{"type":"adaptive"},"output_config":{"effort":"low"},"chat_template_kwargs":{},"max_tokens":5,
               "cache_salt":"s"}"#,
        ),
    ];
    for (api, tokens_api, body) in cases {
        let (asked_api, question) = asked(api, body, &RENDER);
        let fields: std::collections::BTreeMap<&str, &serde_json::value::RawValue> =
            serde_json::from_str(body).expect("JSON");
        let copied: std::collections::BTreeMap<&str, &serde_json::value::RawValue> =
            serde_json::from_str(&question).expect("JSON");
        assert_eq!(asked_api, tokens_api);
        assert_eq!(copied.keys().collect::<Vec<_>>(), fields.keys().collect::<Vec<_>>(), "{api:?}");
        for (name, value) in &fields {
            assert_eq!(copied[name].get(), value.get(), "{name} of {api:?}");
        }
        // Neither what is of no use nor what would have the engine do something.
        let others = r#"{"stream":true,"n":4,"user":"u","vllm_xargs":{"a":1},"kv_transfer_params":{"do_remote_decode":true},
            "mm_processor_kwargs":{},"media_io_kwargs":{},"mm_payload":"tensors","chat_template_file":"x","store":true,"#;
        let more = format!("{others}{}", &body[1..]);
        assert_eq!(asked(api, &more, &RENDER).1, question, "{api:?}");
        let request = request(api, body, &RENDER);
        assert_eq!((request.cache_salt.as_deref(), request.truncation), (Some("s"), None), "the engine cuts");
    }
}

#[test]
fn token_ids_need_no_question_and_are_cut_by_us() {
    let request = request(Api::Completions, r#"{"prompt":[[1,2,3]],"truncate_prompt_tokens":2}"#, &RENDER);
    assert_eq!(request.prompt, Prompt::Tokens(vec![1, 2, 3]));
    assert_eq!(request.truncation, Some(Truncation::KeepLast(2)));
}

#[test]
fn first_prompt_of_a_list_is_rendered_alone() {
    let (_, question) = asked(Api::Completions, r#"{"prompt":["a","b"],"suffix":"c"}"#, &RENDER);
    assert_eq!(question, r#"{"prompt":"a","suffix":"c"}"#);
    let prompt = prompt(Api::Completions, &json!({"prompt": "a", "suffix": "c"}), &ReadOptions::default());
    assert_eq!(prompt, Prompt::Opaque(Opaque::Inexact), "/tokenize knows no suffix");
}

#[test]
fn responses_and_messages_can_only_be_rendered() {
    let messages = json!({"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": "x"}]});
    for (api, body) in [(Api::Responses, json!({"model": "m", "input": "x"})), (Api::Messages, messages)] {
        let opened = body.to_string();
        let opened = open(api, opened.as_bytes()).expect("readable");
        assert_eq!(opened.model(), Some("m"));
        for allow_media in [false, true] {
            let options = ReadOptions { allow_media, ..ReadOptions::default() };
            assert_eq!(opened.read(&options).prompt, Prompt::Opaque(Opaque::NeedsRender));
        }
        assert!(matches!(opened.read(&RENDER).prompt, Prompt::Text(_)));
    }
}

#[test]
fn what_the_render_apis_do_not_know_is_not_asked() {
    let (chat, answered) = (json!([{"role": "user", "content": "x"}]), json!({"prompt_token_ids": [1]}));
    for (api, body, opaque) in [
        (Api::Responses, json!({"input": "x", "previous_response_id": "r"}), Opaque::Stateful),
        (Api::Responses, json!({"input": "x", "prompt": {"id": "p"}}), Opaque::Invalid),
        (Api::Responses, json!({"input": 5}), Opaque::Media),
        (Api::Responses, json!({}), Opaque::Invalid),
        (Api::Responses, json!({"input": "x", "kv_transfer_params": answered}), Opaque::Inexact),
        (Api::Messages, json!({"messages": chat, "thinking": {"type": "disabled"}}), Opaque::Inexact),
        (Api::Messages, json!({"messages": chat, "thinking": 5}), Opaque::Invalid),
        (Api::Messages, json!({"messages": chat, "kv_transfer_params": answered}), Opaque::Inexact),
        (Api::Messages, json!({"messages": "x"}), Opaque::Invalid),
        (Api::ChatCompletions, json!({"messages": chat, "kv_transfer_params": answered}), Opaque::Inexact),
        (Api::ChatCompletions, json!({"messages": chat, "prompt_logprobs": 1}), Opaque::CacheNotRead),
        (Api::ChatCompletions, json!({"messages": chat, "echo": true}), Opaque::CacheNotRead),
        (Api::Completions, json!({"prompt": "x", "prompt_embeds": "AA"}), Opaque::Media),
        (Api::Completions, json!({"prompt": "x", "echo": true, "logprobs": 1}), Opaque::CacheNotRead),
    ] {
        assert_eq!(prompt(api, &body, &RENDER), Prompt::Opaque(opaque), "{body}");
    }
    let unstated = json!({"input": "x", "previous_response_id": null, "prompt": null, "kv_transfer_params": {"a": 1}});
    assert!(matches!(prompt(Api::Responses, &unstated, &RENDER), Prompt::Text(_)));
}

#[test]
fn forwarded_tokens_are_seen_however_their_name_is_written() {
    for (params, brings) in [
        (r#"{"prompt_token_ids":[1]}"#, true),
        (r#"{"prompt\u005ftoken_ids":[1]}"#, true),
        (r#"{"a":{"\u0070rompt_token_ids":[1]}}"#, true),
        (r#"{"remote\u005fhost":"h\u00e9"}"#, false),
        ("{}", false),
        ("null", false),
    ] {
        let body = format!(r#"{{"messages":[],"kv_transfer_params":{params}}}"#);
        for options in [RENDER, ReadOptions::default()] {
            let found = request(Api::ChatCompletions, &body, &options).prompt;
            assert_eq!(found == Prompt::Opaque(Opaque::Inexact), brings, "{params}");
        }
    }
}

#[test]
fn credentials_of_tools_are_not_sent_to_who_is_asked_for_tokens() {
    let function = json!({"type": "function", "name": "f", "parameters": {"properties": {"headers": {}}}});
    for tool in [
        json!({"type": "mcp", "server_label": "s", "server_url": "http://example.invalid"}),
        json!({"type": "function", "authorization": "secret"}),
        json!({"type": "function", "headers": {"authorization": "secret"}}),
        json!({"type": "code_interpreter", "container": {"type": "auto", "network_policy": {"domain_secrets": []}}}),
        json!({"type": "not known to us"}),
    ] {
        let body = json!({"input": "x", "tools": [function, tool]});
        assert_eq!(prompt(Api::Responses, &body, &RENDER), Prompt::Opaque(Opaque::Inexact), "{body}");
    }
    let escaped = r#"{"input":"x","tools":[{"type":"m\u0063p","authorization":"secret"}]}"#;
    assert_eq!(request(Api::Responses, escaped, &RENDER).prompt, Prompt::Opaque(Opaque::Inexact));
    for tools in [json!(5), json!(["x"])] {
        let body = json!({"input": "x", "tools": tools});
        assert_eq!(prompt(Api::Responses, &body, &RENDER), Prompt::Opaque(Opaque::Invalid), "{body}");
    }
    let interpreter = json!({"type": "code_interpreter", "container": {"type": "auto"}});
    for tools in [json!([function, {"type": "web_search_preview"}, interpreter]), json!([]), Value::Null] {
        assert!(matches!(prompt(Api::Responses, &json!({"input": "x", "tools": tools}), &RENDER), Prompt::Text(_)));
    }
}

#[test]
fn client_templates_are_sent_only_where_they_are_allowed() {
    let allowed = ReadOptions { allow_chat_template: true, ..RENDER };
    let tokenize = ReadOptions { allow_chat_template: true, ..ReadOptions::default() };
    let kwargs = json!({"chat_template": "{{ x }}"});
    let bodies = [
        (Api::ChatCompletions, json!({"messages": [], "chat_template": "{{ x }}"})),
        (Api::ChatCompletions, json!({"messages": [], "chat_template_kwargs": kwargs})),
        (Api::Responses, json!({"input": "x", "chat_template_kwargs": kwargs})),
        (Api::Messages, json!({"messages": [], "chat_template_kwargs": kwargs})),
    ];
    for (api, body) in &bodies {
        assert_eq!(prompt(*api, body, &RENDER), Prompt::Opaque(Opaque::ChatTemplate), "{body}");
        let (_, question) = asked(*api, &body.to_string(), &allowed);
        assert_eq!(serde_json::from_str::<Value>(&question).expect("JSON"), *body);
    }
    for (api, body) in &bodies[..2] {
        let (_, question) = asked(*api, &body.to_string(), &tokenize);
        assert_eq!(serde_json::from_str::<Value>(&question).expect("JSON"), *body);
    }
    let none = json!({"messages": [], "chat_template": null, "chat_template_kwargs": {"chat_template": null}});
    assert!(matches!(prompt(Api::ChatCompletions, &none, &RENDER), Prompt::Text(_)), "no template at all");
}

#[test]
fn media_are_rendered_where_an_engine_may_fetch_them_without_their_tensors() {
    let image = json!({"type": "image_url", "image_url": {"url": "http://example.invalid/x.png"}});
    let kwargs = json!({"mm_processor_kwargs": {"a": 1}, "media_io_kwargs": {"image": {}}});
    let block = json!({"type": "image", "source": {"type": "url", "url": "http://example.invalid/x.png"}});
    let result = json!({"type": "tool_result", "tool_use_id": "t", "content": [block]});
    for (api, body) in [
        (Api::ChatCompletions, json!({"messages": [{"role": "user", "content": [image]}]})),
        (Api::Responses, json!({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "u"}]}]})),
        (Api::Responses, json!({"input": [{"type": "function_call_output", "output": [image]}]})),
        (Api::Responses, json!({"input": "x", "previous_input_messages": [{"role": "user", "content": [image]}]})),
        (Api::Messages, json!({"messages": [{"role": "user", "content": [block]}]})),
        (Api::Messages, json!({"messages": [{"role": "user", "content": [result]}]})),
        (Api::Messages, json!({"messages": [], "system": [block]})),
    ] {
        assert_eq!(prompt(api, &body, &RENDER), Prompt::Opaque(Opaque::Media), "{body}");
        let mut whole = body.clone();
        whole.as_object_mut().expect("an object").extend(kwargs.as_object().expect("an object").clone());
        let mut expected = whole.clone();
        expected["mm_payload"] = json!("none");
        let found = asked(api, &whole.to_string(), &RENDER_MEDIA).1;
        assert_eq!(serde_json::from_str::<Value>(&found).expect("JSON"), expected);
    }
    let tokenize = ReadOptions { allow_media: true, ..ReadOptions::default() };
    let body = json!({"messages": [{"role": "user", "content": [image]}]});
    assert_eq!(
        prompt(Api::ChatCompletions, &body, &tokenize),
        Prompt::Opaque(Opaque::Media),
        "ids alone would be wrong"
    );
    for part in [json!({"type": "prompt_embeds", "data": "AA"}), json!({"type": "text", "prompt_embeds": "AA"})] {
        let body = json!({"messages": [{"role": "user", "content": [part]}]});
        assert_eq!(prompt(Api::ChatCompletions, &body, &RENDER_MEDIA), Prompt::Opaque(Opaque::Media), "{body}");
    }
}
