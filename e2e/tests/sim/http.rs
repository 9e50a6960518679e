//! The HTTP surface of the simulator.

use std::time::{Duration, Instant};

use e2e::http::client;
use e2e::sim::driver::TimeModel;
use e2e::sim::engine::EngineOptions;
use e2e::sim::{SimOptions, Simulator};
use futures_util::StreamExt;
use reqwest::StatusCode;
use serde_json::{Value, json};

fn start() -> Simulator {
    start_with(TimeModel { prefill_tokens_per_second: 1e6, decode_step: Duration::from_millis(2) })
}

fn start_with(time: TimeModel) -> Simulator {
    let engine = EngineOptions { max_model_len: 2048, ..EngineOptions::default() };
    let adapters = vec![("lora-a".to_owned(), "model/lora-a".to_owned())];
    Simulator::start(SimOptions { engine, time, adapters, ..SimOptions::default() }).unwrap()
}

async fn post(engine: &Simulator, path: &str, body: Value) -> (StatusCode, Value) {
    let url = format!("http://{}{path}", engine.address());
    let answer = client().post(url).json(&body).send().await.unwrap();
    (answer.status(), answer.json().await.unwrap())
}

async fn get(engine: &Simulator, path: &str) -> String {
    let url = format!("http://{}{path}", engine.address());
    client().get(url).send().await.unwrap().text().await.unwrap()
}

fn ids(range: std::ops::Range<u32>) -> Vec<u32> {
    range.collect()
}

#[tokio::test]
async fn second_request_reports_the_reused_tokens() {
    let engine = start();
    let body = json!({"prompt": ids(0..100), "max_tokens": 3});
    let (_, first) = post(&engine, "/v1/completions", body.clone()).await;
    let (_, second) = post(&engine, "/v1/completions", body).await;
    assert_eq!(first["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    assert_eq!(second["usage"]["prompt_tokens_details"]["cached_tokens"], 96);
    assert_eq!(second["usage"]["completion_tokens"], 3);
    let metrics = get(&engine, "/metrics").await;
    assert!(metrics.contains(r#"vllm:prefix_cache_hits_total{engine="0",model_name="tiny"} 96"#), "{metrics}");
}

#[tokio::test]
async fn salt_and_adapter_do_not_share_blocks() {
    let engine = start();
    for extra in [json!({}), json!({"cache_salt": "a"}), json!({"model": "lora-a"})] {
        let mut body = json!({"prompt": ids(0..100), "max_tokens": 1});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let (_, answer) = post(&engine, "/v1/completions", body).await;
        assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 0, "{extra}");
    }
}

#[tokio::test]
async fn every_form_of_prompt_is_answered() {
    let engine = start();
    let forms = [(json!("kato lemi"), 1), (json!([1, 2]), 1), (json!(["a", "b"]), 2), (json!([[1], [2]]), 2)];
    for (prompt, n_choices) in forms {
        let (status, answer) = post(&engine, "/v1/completions", json!({"prompt": prompt})).await;
        assert_eq!(status, 200, "{answer}");
        assert_eq!(answer["choices"].as_array().unwrap().len(), n_choices, "{prompt}");
    }
}

#[tokio::test]
async fn tokenize_agrees_with_the_engine() {
    let engine = start();
    let tool = json!({"type": "function", "function": {"name": "f"}});
    let messages = json!([{"role": "system", "content": "be kind"}, {"role": "user", "content": "kato lemi"}]);
    let chats = [
        json!({"messages": messages}),
        json!({"messages": messages, "tools": [tool]}),
        json!({"messages": messages, "chat_template_kwargs": {"enable_thinking": false}}),
        json!({"messages": messages, "add_generation_prompt": false}),
        json!({"messages": messages, "add_generation_prompt": false, "continue_final_message": true}),
    ];
    for mut body in chats {
        let (_, tokens) = post(&engine, "/tokenize", body.clone()).await;
        body["return_token_ids"] = json!(true);
        let (_, answer) = post(&engine, "/v1/chat/completions", body).await;
        assert_eq!(tokens["tokens"], answer["prompt_token_ids"]);
    }
    let (_, tokens) = post(&engine, "/tokenize", json!({"prompt": "kato lemi"})).await;
    assert_eq!(tokens["tokens"][0], 1, "completions begin with BOS");
}

#[tokio::test]
async fn tokenize_refuses_what_vllm_refuses() {
    let engine = start();
    let refused = [
        (json!({"prompt": [1, 2]}), 400),
        (json!({"prompt": ["a"]}), 400),
        (json!({}), 400),
        (json!({"messages": []}), 400),
        (json!({"messages": [{"content": "x"}]}), 400),
        (json!({"prompt": "x", "model": "nope"}), 404),
    ];
    for (body, status) in refused {
        let (found, answer) = post(&engine, "/tokenize", body.clone()).await;
        assert_eq!(found, status, "{body}");
        assert_eq!(answer["error"]["code"], status, "{body}");
    }
    let url = format!("http://{}/tokenize", engine.address());
    let unreadable = client().post(&url).header("content-type", "application/json").body("{not json");
    assert_eq!(unreadable.send().await.unwrap().status(), 400);
    let wrong_type = client().post(&url).body(r#"{"prompt":"x"}"#);
    assert_eq!(wrong_type.send().await.unwrap().status(), 400);
}

#[tokio::test]
async fn stream_ends_with_usage_and_done() {
    let engine = start();
    let url = format!("http://{}/v1/chat/completions", engine.address());
    let body = json!({"messages": [{"role": "user", "content": "kato"}], "max_tokens": 5, "stream": true,
                      "stream_options": {"include_usage": true}});
    let mut answer = client().post(url).json(&body).send().await.unwrap().bytes_stream();
    let mut text = String::new();
    while let Some(chunk) = answer.next().await {
        text.push_str(std::str::from_utf8(&chunk.unwrap()).unwrap());
    }
    let chunks: Vec<&str> = text.split("\n\n").filter_map(|event| event.strip_prefix("data: ")).collect();
    assert_eq!(chunks.len(), 1 + 5 + 1 + 1, "role, tokens, usage, [DONE]: {text}");
    assert_eq!(chunks[7], "[DONE]");
    let usage: Value = serde_json::from_str(chunks[6]).unwrap();
    assert_eq!(usage["usage"]["completion_tokens"], 5);
}

#[tokio::test]
async fn answer_of_the_last_turn_is_cached_for_the_next() {
    let engine = start();
    let question = json!({"role": "user", "content": "kato"});
    let (_, first) = post(&engine, "/v1/chat/completions", json!({"messages": [question], "max_tokens": 80})).await;
    let messages = json!([question, first["choices"][0]["message"], {"role": "user", "content": "and then"}]);
    let (_, second) = post(&engine, "/v1/chat/completions", json!({"messages": messages, "max_tokens": 1})).await;
    let n_in_cache = first["usage"]["total_tokens"].as_u64().unwrap() - 1;
    assert_eq!(second["usage"]["prompt_tokens_details"]["cached_tokens"], n_in_cache / 16 * 16);
}

#[tokio::test]
async fn long_prefill_delays_everyone() {
    let time = TimeModel { prefill_tokens_per_second: 5000.0, decode_step: Duration::from_millis(1) };
    let engine = start_with(time);
    let long = post(&engine, "/v1/completions", json!({"prompt": ids(0..1500), "max_tokens": 1}));
    let start = Instant::now();
    let short = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        post(&engine, "/v1/completions", json!({"prompt": [1, 2, 3], "max_tokens": 1})).await
    };
    tokio::join!(long, short);
    assert!(start.elapsed() > Duration::from_millis(300), "took {:?}", start.elapsed());
}

#[tokio::test]
async fn client_that_leaves_frees_its_place() {
    let engine = start_with(TimeModel { decode_step: Duration::from_millis(50), ..TimeModel::default() });
    let url = format!("http://{}/v1/completions", engine.address());
    let body = json!({"prompt": [1], "max_tokens": 1000});
    let request = client().post(url).json(&body).timeout(Duration::from_millis(200));
    assert!(request.send().await.unwrap_err().is_timeout());
    let deadline = Instant::now() + Duration::from_secs(5);
    while engine.snapshot().n_running > 0 {
        assert!(Instant::now() < deadline, "still {:?}", engine.snapshot());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
