//! Requests for LoRA adapters, through a real Envoy: they go where the adapter is loaded.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use e2e::envoy::SERVED_BY;
use e2e::http::client;
use e2e::router::{EngineAddress, RouterOptions};
use e2e::sim::publisher::PublisherOptions;
use e2e::sim::{SimOptions, Simulator};
use e2e::stack::Stack;
use reqwest::StatusCode;
use serde_json::json;

/// Above the pause between two questions for an engine's adapters, on a busy machine.
const DEADLINE: Duration = Duration::from_secs(30);

fn engine(adapters: &[&str]) -> Simulator {
    let adapters = adapters.iter().map(|name| ((*name).to_owned(), format!("/loras/{name}"))).collect();
    Simulator::start(SimOptions { adapters, ..SimOptions::default() }).unwrap()
}

/// The same server, started again with other adapters.
fn restarted(engine: Simulator, adapters: &[&str]) -> Simulator {
    let (listen, events) = (engine.address(), engine.events().to_owned());
    let replay_endpoint = engine.replay().to_owned();
    drop(engine);
    let adapters = adapters.iter().map(|name| ((*name).to_owned(), format!("/loras/{name}"))).collect();
    let events = PublisherOptions { endpoint: events, replay_endpoint, ..PublisherOptions::default() };
    Simulator::start(SimOptions { listen, events, adapters, ..SimOptions::default() }).unwrap()
}

/// The next prompt, which has nothing in common with any other: no engine is warm for it.
fn new_prompt() -> Vec<u32> {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    vec![NUMBER.fetch_add(1, Ordering::Relaxed); 40]
}

/// Sends `n` new prompts; who answered each, or with what status it was refused.
async fn answers(stack: &Stack, model: &str, n: u32) -> Vec<Result<SocketAddr, StatusCode>> {
    let mut answers = Vec::new();
    for _ in 0..n {
        let body = json!({"model": model, "prompt": new_prompt(), "max_tokens": 1});
        let response = client().post(stack.url("/v1/completions")).json(&body).send().await.unwrap();
        let server = || response.headers()[SERVED_BY].to_str().unwrap().parse().unwrap();
        answers.push(if response.status().is_success() { Ok(server()) } else { Err(response.status()) });
    }
    answers
}

/// Asks again until all of a row of answers are as expected: engines are asked for their adapters from time to time.
async fn wait_served_by(stack: &Stack, model: &str, expected: &[SocketAddr]) {
    let expected: BTreeSet<_> = expected.iter().map(|address| Ok(*address)).collect();
    let deadline = Instant::now() + DEADLINE;
    loop {
        let found: BTreeSet<_> = answers(stack, model, 24).await.into_iter().collect();
        if found == expected {
            return;
        }
        assert!(Instant::now() < deadline, "{model} is answered by {found:?}, expected {expected:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn adapter_is_served_where_it_is_loaded() {
    let configured = [("lora-a".to_owned(), "/loras/lora-a".to_owned())];
    let engines = [engine(&["lora-a"]), engine(&["lora-b"]), engine(&[])];
    let [a, b, c] = [0, 1, 2].map(|idx: usize| engines[idx].address());
    let dir = tempfile::tempdir().unwrap();
    let options = RouterOptions::new(engines.iter().map(EngineAddress::from).collect());
    let stack = Stack::start(dir.path(), &RouterOptions { adapters: configured.into(), ..options }).await.unwrap();

    wait_served_by(&stack, "lora-a", &[a]).await;
    wait_served_by(&stack, "lora-b", &[b]).await;
    wait_served_by(&stack, "tiny", &[a, b, c]).await;
    assert_eq!(answers(&stack, "lora-c", 1).await, [Err(StatusCode::NOT_FOUND)], "the engine says so");

    let [first, second, third] = engines;
    let _engines = (first, second, restarted(third, &["lora-a", "lora-b"]));
    wait_served_by(&stack, "lora-a", &[a, c]).await;
    wait_served_by(&stack, "lora-b", &[b, c]).await;
}
