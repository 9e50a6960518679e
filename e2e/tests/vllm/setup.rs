//! Real vLLM servers behind a real Envoy and the router, and requests whose answers are compared with the router's
//! word.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use e2e::engines::Engines;
use e2e::envoy::SERVED_BY;
use e2e::http::client;
use e2e::router::RouterOptions;
use e2e::stack::Stack;
use e2e::vllm::{MODEL, VllmOptions};
use serde_json::{Value, json};
use tempfile::TempDir;

/// vLLM's block size on the CPU.
pub(crate) const BLOCK_SIZE: u64 = 32;
pub(crate) const COMPLETIONS: &str = "/v1/completions";
/// Longest that the router may take to follow its sources.
const FOLLOW_DEADLINE: Duration = Duration::from_secs(60);

pub(crate) struct Setup {
    pub(crate) engines: Engines,
    pub(crate) stack: Stack,
    _dir: TempDir,
}

/// What the router took for cached, and what the engine found cached, in tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Credit {
    pub(crate) predicted: u64,
    pub(crate) reported: u64,
}

impl Setup {
    /// Starts the engines, and in front of them the router with what `router` makes of its options.
    pub(crate) async fn start(
        n_engines: usize,
        options: &VllmOptions,
        router: impl FnOnce(RouterOptions) -> RouterOptions,
    ) -> Self {
        let engines = Engines::vllm(n_engines, options).await.unwrap();
        let dir = tempfile::tempdir().unwrap();
        let router = router(RouterOptions::new(engines.addresses()).patient());
        let stack = Stack::start(dir.path(), &router).await.unwrap();
        Self { engines, stack, _dir: dir }
    }

    /// Sends a request through Envoy; returns who served, the answer, and the tokens that the router took for cached.
    pub(crate) async fn ask(&self, path: &str, body: &Value) -> (SocketAddr, Value, u64) {
        self.ask_with(path, &[], body).await
    }

    /// [`Self::ask`] with headers.
    pub(crate) async fn ask_with(
        &self,
        path: &str,
        headers: &[(&str, &str)],
        body: &Value,
    ) -> (SocketAddr, Value, u64) {
        self.stack.wait_quiet().await.unwrap();
        let before = self.stack.matched_tokens().await.unwrap();
        let mut request = client().post(self.stack.url(path)).json(body);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), 200, "{path} {body}");
        let served = response.headers()[SERVED_BY].to_str().unwrap().parse().unwrap();
        let answer = response.json().await.unwrap();
        let predicted = self.stack.matched_tokens().await.unwrap() - before;
        (served, answer, predicted)
    }

    /// Sends a completion of one token and prints what was predicted and reported.
    pub(crate) async fn complete(&self, name: &str, headers: &[(&str, &str)], mut body: Value) -> Credit {
        let defaults = json!({ "model": MODEL, "max_tokens": 1, "temperature": 0, "ignore_eos": true });
        for (field, value) in defaults.as_object().unwrap() {
            body.as_object_mut().unwrap().entry(field).or_insert(value.clone());
        }
        let (_, answer, predicted) = self.ask_with(COMPLETIONS, headers, &body).await;
        let reported = cached_tokens(&answer);
        println!("{name}: {predicted} predicted, {reported} reported");
        Credit { predicted, reported }
    }

    /// Waits until the router follows `n` sources completely.
    pub(crate) async fn wait_live(&self, n: usize) {
        let router = self.stack.router.as_ref().unwrap();
        let deadline = Instant::now() + FOLLOW_DEADLINE;
        loop {
            let metrics = router.metrics().await.unwrap();
            let states = metrics.lines().filter(|line| line.starts_with("warmroute_source_state{"));
            let n_live = states.filter(|line| line.contains(r#"state="live""#)).count();
            if n_live == n {
                return;
            }
            assert!(Instant::now() < deadline, "{n_live} sources are live, expected {n}\n{metrics}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

pub(crate) fn cached_tokens(answer: &Value) -> u64 {
    answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or(0)
}

/// Token ids that differ from seed to seed from the first one on.
pub(crate) fn ids(n: u32, seed: u32) -> Vec<u32> {
    (0..n).map(|i| 10 + (i * 7 + seed * 131) % 600).collect()
}
