//! Requests through a real Envoy and the router to real vLLM servers.

use e2e::http::client;
use e2e::router::RouterOptions;
use e2e::vllm::{LORA, LORA_PATH, MODEL, VllmOptions};
use serde_json::{Value, json};
use warmroute::routing::hash::HashAlgorithm;

use crate::TURN;
use crate::setup::{BLOCK_SIZE, COMPLETIONS, Setup, cached_tokens, ids};

/// One engine has an adapter besides.
async fn start(n_engines: usize, algorithm: HashAlgorithm) -> Setup {
    let lora = n_engines == 1;
    // Without a limit vLLM touches a gigabyte of cache at once.
    let options = VllmOptions { algorithm, lora, n_blocks: Some(512), ..VllmOptions::default() };
    let adapters = if lora { vec![(LORA.to_owned(), LORA_PATH.to_owned())] } else { Vec::new() };
    Setup::start(n_engines, &options, |router| RouterOptions { algorithm, adapters, ..router }).await
}

/// Requests whose cached part depends on everything that goes into a block's hash, each with a name for the message.
fn requests() -> Vec<(&'static str, &'static str, Value)> {
    const CHAT: &str = "/v1/chat/completions";
    let words = |n: usize, word: &str| format!("{word} quick brown fox jumps over the lazy dog because ").repeat(n);
    let system = json!({ "role": "system", "content": words(9, "please") });
    let user = |text: &str| json!({ "role": "user", "content": text });
    let turn_1 = json!([system, user("tell me about history")]);
    let answer = json!({ "role": "assistant", "content": words(5, "naïve 日本語 🙂") });
    let turn_2 = json!([system, user("tell me about history"), answer, user("and then?")]);
    let tool = json!({ "type": "function", "function": { "name": "get_weather", "parameters": { "type": "object" } } });
    let one_more = [ids(32, 1), vec![7]].concat();
    let (text, extended) = (words(30, "a"), words(30, "a") + &words(9, "b"));
    vec![
        ("short", COMPLETIONS, json!({ "prompt": "the quick brown fox" })),
        ("one block", COMPLETIONS, json!({ "prompt": ids(32, 1) })),
        ("one block again", COMPLETIONS, json!({ "prompt": ids(32, 1) })),
        ("one block and a token", COMPLETIONS, json!({ "prompt": one_more })),
        ("text", COMPLETIONS, json!({ "prompt": text })),
        ("text again", COMPLETIONS, json!({ "prompt": text })),
        ("text extended", COMPLETIONS, json!({ "prompt": extended })),
        ("list of texts", COMPLETIONS, json!({ "prompt": [text] })),
        ("no special tokens", COMPLETIONS, json!({ "prompt": text, "add_special_tokens": false })),
        ("salt", COMPLETIONS, json!({ "prompt": ids(100, 2), "cache_salt": "tenant-a" })),
        ("salt again", COMPLETIONS, json!({ "prompt": ids(100, 2), "cache_salt": "tenant-a" })),
        ("other salt", COMPLETIONS, json!({ "prompt": ids(100, 2), "cache_salt": "sälz-日本" })),
        ("no salt", COMPLETIONS, json!({ "prompt": ids(100, 2) })),
        ("adapter", COMPLETIONS, json!({ "model": LORA, "prompt": ids(100, 2) })),
        ("adapter again", COMPLETIONS, json!({ "model": LORA, "prompt": ids(100, 2) })),
        ("adapter and salt", COMPLETIONS, json!({ "model": LORA, "prompt": ids(100, 2), "cache_salt": "x" })),
        ("adapter and salt again", COMPLETIONS, json!({ "model": LORA, "prompt": ids(100, 2), "cache_salt": "x" })),
        ("generation", COMPLETIONS, json!({ "prompt": ids(60, 3), "max_tokens": 80 })),
        ("log probabilities", COMPLETIONS, json!({ "prompt": ids(100, 2), "prompt_logprobs": 1 })),
        ("truncation", COMPLETIONS, json!({ "prompt": ids(200, 4), "truncate_prompt_tokens": 98 })),
        ("truncation again", COMPLETIONS, json!({ "prompt": ids(200, 4), "truncate_prompt_tokens": 98 })),
        ("chat", CHAT, json!({ "messages": turn_1 })),
        ("chat again", CHAT, json!({ "messages": turn_1 })),
        ("second turn", CHAT, json!({ "messages": turn_2 })),
        ("second turn again", CHAT, json!({ "messages": turn_2 })),
        ("tools", CHAT, json!({ "messages": turn_2, "tools": [tool], "tool_choice": "none" })),
        ("tools again", CHAT, json!({ "messages": turn_2, "tools": [tool], "tool_choice": "none" })),
        ("no thinking", CHAT, json!({ "messages": turn_1, "chat_template_kwargs": { "enable_thinking": false } })),
        ("no effort", CHAT, json!({ "messages": turn_1, "reasoning_effort": "none" })),
        ("adapter chat", CHAT, json!({ "model": LORA, "messages": turn_1 })),
        ("adapter chat again", CHAT, json!({ "model": LORA, "messages": turn_1 })),
    ]
}

/// One idle engine: nothing can change between the prediction and the engine's own lookup.
async fn predicted_equals_reported(algorithm: HashAlgorithm) {
    let _turn = TURN.lock().await;
    let setup = start(1, algorithm).await;
    let mut n_cached = 0;
    let mut n_warm = 0;
    for (name, path, mut body) in requests() {
        let defaults = json!({ "model": MODEL, "max_tokens": 1, "temperature": 0, "ignore_eos": true });
        for (field, value) in defaults.as_object().unwrap() {
            body.as_object_mut().unwrap().entry(field).or_insert(value.clone());
        }
        let (_, answer, predicted) = setup.ask(path, &body).await;
        let reported = cached_tokens(&answer);
        println!("{algorithm} {name}: {predicted} predicted, {reported} reported");
        assert_eq!(predicted, reported, "{name}");
        n_cached += reported;
        n_warm += u32::from(reported > 0);
    }
    assert!(n_warm >= 12 && n_cached > 30 * BLOCK_SIZE, "only {n_warm} requests with {n_cached} cached tokens");
}

#[tokio::test]
#[ignore = "needs real vLLM"]
async fn predicted_equals_reported_with_sha256() {
    predicted_equals_reported(HashAlgorithm::Sha256).await;
}

#[tokio::test]
#[ignore = "needs real vLLM"]
async fn predicted_equals_reported_with_sha256_cbor() {
    predicted_equals_reported(HashAlgorithm::Sha256Cbor).await;
}

#[tokio::test]
#[ignore = "needs real vLLM"]
async fn requests_go_to_the_vllm_that_holds_their_prefix() {
    let _turn = TURN.lock().await;
    let setup = start(2, HashAlgorithm::Sha256).await;
    let engines = setup.engines.http();
    for (round, engine) in (0..).zip(engines.iter().chain(&engines)) {
        let body = json!({ "model": MODEL, "prompt": ids(200, 20 + round), "max_tokens": 1 });
        let past_envoy = client().post(format!("http://{engine}/v1/completions")).json(&body).send().await.unwrap();
        assert_eq!(past_envoy.status(), 200);
        setup.stack.wait_indexed(*engine, 1).await.unwrap();
        let (served, answer, predicted) = setup.ask("/v1/completions", &body).await;
        assert_eq!(served, *engine, "round {round}");
        assert_eq!((predicted, cached_tokens(&answer)), (192, 192), "round {round}");
    }
}
