//! Engines, router and Envoy for the tests.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use axum::body::Bytes;
use axum::extract::DefaultBodyLimit;
use axum::http::HeaderMap;
use e2e::engines::Engines;
use e2e::envoy::{Gateway, SERVED_BY};
use e2e::http::client;
use e2e::router::{EngineAddress, RouterOptions};
use e2e::service::free_addresses;
use e2e::sim::SimOptions;
use e2e::sim::driver::TimeModel;
use e2e::sim::publisher::{Publisher, PublisherOptions};
use e2e::stack::Stack;
use reqwest::Response;
use serde_json::json;
use tempfile::TempDir;
use tokio::task::JoinSet;

/// Tokens of a prompt that fills [`N_BLOCKS`] blocks of 16 and a bit.
pub(crate) const N_TOKENS: u32 = 330;
pub(crate) const N_BLOCKS: u64 = 20;

pub(crate) struct Setup {
    pub(crate) stack: Stack,
    pub(crate) engines: Engines,
    /// Has the router's configuration.
    pub(crate) dir: TempDir,
}

impl Setup {
    pub(crate) async fn start() -> Self {
        Self::start_with(Vec::new()).await
    }

    /// Three engines, and `others` that are in the list too.
    pub(crate) async fn start_with(others: Vec<EngineAddress>) -> Self {
        Self::behind(Gateway::OverrideHost, others).await
    }

    /// The same behind another kind of Envoy.
    pub(crate) async fn behind(gateway: Gateway, others: Vec<EngineAddress>) -> Self {
        let all = |options: RouterOptions| RouterOptions {
            gateway,
            engines: options.engines.into_iter().chain(others).collect(),
            ..options
        };
        Self::start_as(all).await
    }

    /// Three engines, and other options of the router.
    pub(crate) async fn start_as(change: impl FnOnce(RouterOptions) -> RouterOptions) -> Self {
        let engines = engines(3);
        let dir = tempfile::tempdir().unwrap();
        let options = change(RouterOptions::new(engines.addresses()).patient());
        let stack = Stack::start(dir.path(), &options).await.unwrap();
        Self { stack, engines, dir }
    }

    /// One engine that has computed `prompts` before the router came, and keeps no events for it.
    pub(crate) async fn late(prompts: &[Vec<u32>], reports: bool) -> Self {
        let engines = engines(1);
        for prompt in prompts {
            compute(engines.http()[0], prompt).await;
        }
        let dir = tempfile::tempdir().unwrap();
        let options = RouterOptions { replays: false, reports, ..RouterOptions::new(engines.addresses()).patient() };
        let stack = Stack::start(dir.path(), &options).await.unwrap();
        stack.wait_following(engines.http()[0]).await.unwrap();
        Self { stack, engines, dir }
    }

    /// Makes `engine` compute `prompt`, past Envoy, and waits until the router knows.
    pub(crate) async fn warm(&self, engine: SocketAddr, prompt: &[u32], n_blocks: u64) {
        compute(engine, prompt).await;
        self.stack.wait_indexed(engine, n_blocks).await.unwrap();
    }

    pub(crate) async fn complete(&self, prompt: &[u32]) -> Response {
        let body = json!({"model": "tiny", "prompt": prompt, "max_tokens": 1});
        client().post(self.stack.url("/v1/completions")).json(&body).send().await.unwrap()
    }
}

pub(crate) fn engines(n_engines: usize) -> Engines {
    let time = TimeModel { prefill_tokens_per_second: 1e6, decode_step: Duration::from_millis(5) };
    Engines::simulated(n_engines, &SimOptions { time, ..SimOptions::default() }).unwrap()
}

/// An engine's address that nobody listens on.
pub(crate) fn dead_engine() -> EngineAddress {
    let [http, events, replay] = free_addresses().unwrap();
    EngineAddress { http, events: format!("tcp://{events}"), replay: format!("tcp://{replay}") }
}

/// An answer that comes token by token.
pub(crate) struct Streamed {
    pub(crate) response: Response,
    /// What has come so far.
    pub(crate) text: String,
}

impl Streamed {
    /// Asks for `n_tokens`, 5 ms apart.
    pub(crate) async fn ask(stack: &Stack, n_tokens: u32) -> Self {
        let body = json!({"model": "tiny", "messages": [{"role": "user", "content": "kato"}], "max_tokens": n_tokens,
                          "stream": true, "stream_options": {"include_usage": true}});
        let request = client().post(stack.url("/v1/chat/completions")).json(&body);
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), 200);
        Self { response, text: String::new() }
    }

    /// Takes the next chunk; false when there is none any more.
    pub(crate) async fn next(&mut self) -> reqwest::Result<bool> {
        let chunk = self.response.chunk().await?;
        self.text.push_str(std::str::from_utf8(chunk.as_deref().unwrap_or_default()).unwrap());
        Ok(chunk.is_some())
    }

    pub(crate) async fn read_to_end(&mut self) -> reqwest::Result<()> {
        while self.next().await? {}
        Ok(())
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.text.ends_with("data: [DONE]\n\n")
    }
}

/// Waits until a metric of the router is `expected`.
pub(crate) async fn wait_metric(stack: &Stack, name: &str, expected: f64) {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let found = stack.metric(name).await.unwrap();
        if found == expected {
            return;
        }
        assert!(Instant::now() < deadline, "{name} is {found}, expected {expected}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Makes `engine` compute `prompt`, past Envoy.
pub(crate) async fn compute(engine: SocketAddr, prompt: &[u32]) {
    let url = format!("http://{engine}/v1/completions");
    let body = json!({"prompt": prompt, "max_tokens": 1});
    assert_eq!(client().post(url).json(&body).send().await.unwrap().status(), 200);
}

pub(crate) fn served_by(response: &Response) -> SocketAddr {
    response.headers()[SERVED_BY].to_str().unwrap().parse().unwrap()
}

/// A prompt that shares no block with another `number`'s.
pub(crate) fn prompt(number: u32) -> Vec<u32> {
    (0..N_TOKENS).map(|idx| 1000 * number + idx).collect()
}

/// An engine that answers with the body it got, and names the headers that told of its length.
pub(crate) struct Echo {
    pub(crate) stack: Stack,
    _publisher: Publisher,
    _server: JoinSet<std::io::Result<()>>,
    _dir: TempDir,
}

impl Echo {
    pub(crate) async fn start() -> Self {
        Self::start_with(|options| options).await
    }

    /// The same with other options of the router.
    pub(crate) async fn start_with(change: impl FnOnce(RouterOptions) -> RouterOptions) -> Self {
        let publisher = Publisher::start(PublisherOptions::default()).unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let engine = EngineAddress {
            http: listener.local_addr().unwrap(),
            events: publisher.endpoint().to_owned(),
            replay: publisher.replay_endpoint().to_owned(),
        };
        let echo = |headers: HeaderMap, body: Bytes| async move {
            let told = |name: &str| headers.get(name).map_or("none", |value| value.to_str().unwrap()).to_owned();
            ([("x-length", told("content-length")), ("x-encoding", told("transfer-encoding"))], body)
        };
        let app = axum::Router::new().fallback(echo).layer(DefaultBodyLimit::disable());
        let mut server = JoinSet::new();
        server.spawn(async move { axum::serve(listener, app).await });
        let dir = tempfile::tempdir().unwrap();
        let options = change(RouterOptions::new(vec![engine]));
        let stack = Stack::start(dir.path(), &options).await.unwrap();
        Self { stack, _publisher: publisher, _server: server, _dir: dir }
    }
}
