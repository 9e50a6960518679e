//! The router behind a real Envoy, in front of simulated engines.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use axum::body::Bytes;
use e2e::engines::Engines;
use e2e::envoy::SERVED_BY;
use e2e::http::client;
use e2e::router::{EngineAddress, RouterOptions};
use e2e::service::free_addresses;
use e2e::sim::SimOptions;
use e2e::sim::driver::TimeModel;
use e2e::sim::publisher::{Publisher, PublisherOptions};
use e2e::stack::Stack;
use futures_util::StreamExt;
use reqwest::{Response, StatusCode};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Tokens of a prompt that fills [`N_BLOCKS`] blocks of 16 and a bit.
const N_TOKENS: u32 = 330;
const N_BLOCKS: u64 = 20;

struct Setup {
    stack: Stack,
    engines: Engines,
    _dir: TempDir,
}

impl Setup {
    async fn start() -> Self {
        Self::start_with(Vec::new()).await
    }

    /// Three engines, and `others` that are in the list too.
    async fn start_with(others: Vec<EngineAddress>) -> Self {
        let time = TimeModel { prefill_tokens_per_second: 1e6, decode_step: Duration::from_millis(5) };
        let engines = Engines::simulated(3, &SimOptions { time, ..SimOptions::default() }).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let listed: Vec<EngineAddress> = engines.addresses().into_iter().chain(others).collect();
        let stack = Stack::start(dir.path(), &RouterOptions::new(listed)).await.unwrap();
        Self { stack, engines, _dir: dir }
    }

    /// Makes `engine` compute `prompt`, past Envoy, and waits until the router knows.
    async fn warm(&self, engine: SocketAddr, prompt: &[u32], n_blocks: u64) {
        let url = format!("http://{engine}/v1/completions");
        let body = json!({"prompt": prompt, "max_tokens": 1});
        assert_eq!(client().post(url).json(&body).send().await.unwrap().status(), 200);
        self.stack.wait_indexed(engine, n_blocks).await.unwrap();
    }

    async fn complete(&self, prompt: &[u32]) -> Response {
        let body = json!({"model": "tiny", "prompt": prompt, "max_tokens": 1});
        client().post(self.stack.url("/v1/completions")).json(&body).send().await.unwrap()
    }
}

fn served_by(response: &Response) -> SocketAddr {
    response.headers()[SERVED_BY].to_str().unwrap().parse().unwrap()
}

/// A prompt that shares no block with another `number`'s.
fn prompt(number: u32) -> Vec<u32> {
    (0..N_TOKENS).map(|idx| 1000 * number + idx).collect()
}

#[tokio::test]
async fn request_goes_to_the_engine_that_holds_its_prefix() {
    let setup = Setup::start().await;
    for round in 0..3 {
        for (idx, engine) in (0..).zip(setup.engines.http()) {
            let prompt = prompt(1 + 3 * round + idx);
            setup.warm(engine, &prompt, N_BLOCKS * u64::from(round + 1)).await;
            let response = setup.complete(&prompt).await;
            assert_eq!(served_by(&response), engine, "round {round}");
            let answer: Value = response.json().await.unwrap();
            assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 16 * N_BLOCKS);
        }
    }
}

#[tokio::test]
async fn conversation_stays_where_its_first_turn_went() {
    let setup = Setup::start().await;
    let question = "kato lemi ".repeat(100);
    let mut messages = vec![json!({"role": "user", "content": question})];
    let mut engine = None;
    for turn in 0..4 {
        let body = json!({"model": "tiny", "messages": messages, "max_tokens": 40});
        let request = client().post(setup.stack.url("/v1/chat/completions")).json(&body);
        let response = request.send().await.unwrap();
        let served = served_by(&response);
        assert_eq!(*engine.get_or_insert(served), served, "turn {turn}");
        let answer: Value = response.json().await.unwrap();
        let n_stored = (answer["usage"]["total_tokens"].as_u64().unwrap() - 1) / 16;
        messages.push(answer["choices"][0]["message"].clone());
        messages.push(json!({"role": "user", "content": "and then"}));
        setup.stack.wait_indexed(served, n_stored).await.unwrap();
    }
}

#[tokio::test]
async fn forged_routing_headers_are_ignored() {
    let setup = Setup::start().await;
    let [warm, other, _] = setup.engines.http()[..] else { panic!("three engines") };
    setup.warm(warm, &prompt(1), N_BLOCKS).await;
    let outside = setup.stack.envoy.admin();
    for forged in [other, outside] {
        let body = json!({"model": "tiny", "prompt": prompt(1), "max_tokens": 1});
        let request = client().post(setup.stack.url("/v1/completions")).json(&body);
        let request = request.header("x-gateway-destination-endpoint", forged.to_string());
        let response = request.header("target-pod", forged.to_string()).send().await.unwrap();
        assert_eq!((response.status(), served_by(&response)), (StatusCode::OK, warm), "forged {forged}");
    }
    // Requests for which the router names nobody: Envoy must not follow the client either.
    let mut served = BTreeSet::new();
    for _ in 0..30 {
        let request = client().get(setup.stack.url("/v1/models"));
        let request = request.header("x-gateway-destination-endpoint", other.to_string());
        served.insert(served_by(&request.send().await.unwrap()));
    }
    assert!(served.len() > 1, "all went to {served:?}");
}

#[tokio::test]
async fn dead_endpoint_never_yields_an_error() {
    let [http, events, replay] = free_addresses().unwrap();
    let dead = EngineAddress { http, events: format!("tcp://{events}"), replay: format!("tcp://{replay}") };
    let setup = Setup::start_with(vec![dead.clone()]).await;
    for number in 0..40 {
        let response = setup.complete(&prompt(number)).await;
        assert_eq!(response.status(), 200, "request {number}");
        assert_ne!(served_by(&response), dead.http);
    }
}

#[tokio::test]
async fn answers_stream_token_by_token() {
    let setup = Setup::start().await;
    let body = json!({"model": "tiny", "messages": [{"role": "user", "content": "kato"}], "max_tokens": 100,
                      "stream": true, "stream_options": {"include_usage": true}});
    let start = Instant::now();
    let request = client().post(setup.stack.url("/v1/chat/completions")).json(&body);
    let mut bytes = request.send().await.unwrap().bytes_stream();
    let mut text = String::new();
    let mut first = None;
    while let Some(chunk) = bytes.next().await {
        first.get_or_insert(start.elapsed());
        text.push_str(std::str::from_utf8(&chunk.unwrap()).unwrap());
    }
    // A hundred tokens at 5 ms: a buffered answer would come at once, at the end.
    assert!(first.unwrap() < start.elapsed() / 2, "first chunk after {first:?} of {:?}", start.elapsed());
    assert!(text.ends_with("data: [DONE]\n\n"), "{text}");
    assert!(text.contains(r#""completion_tokens":100"#), "{text}");
}

#[tokio::test]
async fn models_are_listed_through_envoy() {
    let setup = Setup::start().await;
    let response = client().get(setup.stack.url("/v1/models")).send().await.unwrap();
    assert_eq!(response.status(), 200);
    let models: Value = response.json().await.unwrap();
    assert_eq!(models["data"][0]["id"], "tiny");
}

#[tokio::test]
async fn requests_pass_when_the_router_is_gone() {
    let mut setup = Setup::start().await;
    setup.stack.stop_router();
    for number in 0..5 {
        assert_eq!(setup.complete(&prompt(number)).await.status(), 200, "request {number}");
    }
}

#[tokio::test]
async fn malformed_bodies_reach_an_engine_unchanged() {
    let publisher = Publisher::start(PublisherOptions::default()).unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let engine = EngineAddress {
        http: listener.local_addr().unwrap(),
        events: publisher.endpoint().to_owned(),
        replay: publisher.replay_endpoint().to_owned(),
    };
    let echo = axum::Router::new().fallback(|body: Bytes| async { body });
    let mut server = tokio::task::JoinSet::new();
    server.spawn(async move { axum::serve(listener, echo).await });
    let dir = tempfile::tempdir().unwrap();
    let stack = Stack::start(dir.path(), &RouterOptions::new(vec![engine])).await.unwrap();

    let long = format!(r#"{{"model": "tiny", "prompt": "{}"#, "kato ".repeat(200_000));
    let bodies: [&[u8]; 8] = [
        b"{not json",
        b"\xff\xfe\x00\x01",
        b"",
        b"[]",
        br#"{"model": 7, "messages": "no list"}"#,
        br#"{"model": "unknown", "prompt": "kato"}"#,
        br#"{"model": "tiny", "model": "tiny", "prompt": ["kato", 1, null]}"#,
        long.as_bytes(),
    ];
    for body in bodies {
        for path in ["/v1/completions", "/v1/chat/completions"] {
            let request = client().post(stack.url(path)).header("content-type", "application/json");
            let response = request.body(body.to_vec()).send().await.unwrap();
            let shown = String::from_utf8_lossy(&body[..body.len().min(80)]).into_owned();
            assert_eq!(response.status(), 200, "{path} {shown}");
            assert_eq!(response.bytes().await.unwrap(), body, "{path} {shown}");
        }
    }
}
