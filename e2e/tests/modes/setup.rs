//! Engines, the router in one of its modes, and Envoy.

use std::net::SocketAddr;
use std::time::Duration;

use e2e::envoy::SERVED_BY;
use e2e::http::client;
use e2e::router::{self, EngineAddress, Router, RouterOptions};
use e2e::sim::driver::TimeModel;
use e2e::sim::fault::{TokenizeControl, TokenizeFault};
use e2e::sim::{SimOptions, Simulator, tokenizer};
use e2e::stack::Stack;
use reqwest::{Response, StatusCode};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::files;

const N_ENGINES: usize = 3;
/// Longest that a request may wait for its tokens: more than on any machine it has to, since what is looked at is where
/// it goes.
const BUDGET: &str = "800ms";

/// What a mode's configuration may name.
pub(crate) struct Given {
    files: TempDir,
    endpoint: Simulator,
}

/// How the router is configured, and what it does then.
#[derive(Clone, Default)]
pub(crate) struct Mode {
    pub(crate) sync: Option<bool>,
    pub(crate) tokenizer: Option<Value>,
    pub(crate) env: Vec<(&'static str, String)>,
    /// What becomes of `/tokenize`.
    pub(crate) fault: TokenizeFault,
    /// Whether it follows the engines' events.
    pub(crate) follows: bool,
    /// Whether it asks for tokens.
    pub(crate) asks: bool,
    /// Whom it asks, if that is not the engines.
    pub(crate) endpoint: Option<TokenizeControl>,
}

/// Everything together.
pub(crate) struct Setup {
    pub(crate) stack: Stack,
    pub(crate) engines: Vec<Simulator>,
    pub(crate) mode: Mode,
    options: RouterOptions,
    dir: TempDir,
}

impl Given {
    pub(crate) fn new() -> Self {
        let given = Self { files: tempfile::tempdir().unwrap(), endpoint: Simulator::start(engine()).unwrap() };
        files::write(given.files.path());
        given
    }

    /// The directory with a tokenizer.
    pub(crate) fn files(&self) -> &str {
        self.files.path().to_str().unwrap()
    }

    /// The URL of a tokenizer that is not an engine of the pool.
    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.endpoint.address())
    }
}

impl Mode {
    /// What the file says of the tokenizer, which always is how long it is waited for.
    fn patient_tokenizer(&self) -> Value {
        let mut tokenizer = self.tokenizer.clone().unwrap_or_else(|| json!({}));
        tokenizer["budget"] = BUDGET.into();
        tokenizer
    }

    /// Whether tokens are asked for, and of the endpoint that was given.
    pub(crate) fn asking_endpoint(self, given: &Given) -> Self {
        Self { asks: true, endpoint: Some(given.endpoint.tokenize().clone()), ..self }
    }
}

impl Setup {
    pub(crate) async fn start(mode: Mode) -> Self {
        let engines: Vec<Simulator> = (0..N_ENGINES).map(|_| Simulator::start(engine()).unwrap()).collect();
        for engine in &engines {
            engine.tokenize().set(mode.fault);
        }
        let options = RouterOptions {
            sync: mode.sync,
            tokenizer: Some(mode.patient_tokenizer()),
            env: mode.env.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect(),
            ..RouterOptions::new(engines.iter().map(EngineAddress::from).collect())
        };
        let dir = tempfile::tempdir().unwrap();
        let stack = Stack::start(dir.path(), &options).await.unwrap();
        let setup = Self { stack, engines, mode, options, dir };
        setup.wait_following().await;
        setup
    }

    /// Waits until the router knows what all engines hold, if it is to.
    pub(crate) async fn wait_following(&self) {
        for engine in self.engines.iter().filter(|_| self.mode.follows) {
            self.stack.wait_following(engine.address()).await.unwrap();
        }
    }

    /// Ends the router as Kubernetes does, and starts another one in its place.
    pub(crate) async fn restart_router(&mut self) {
        let binary = tokio::task::spawn_blocking(router::binary).await.unwrap().unwrap();
        let router = self.stack.router.take().unwrap();
        let addresses = [router.extproc(), router.admin()];
        router.stop().await.unwrap();
        let router = Router::start_at(&binary, self.dir.path(), &self.options, addresses).await.unwrap();
        self.stack.router = Some(router);
    }

    /// What the running router has logged.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("warmroute.log")).unwrap()
    }

    /// What the router has decided so far, and why it picked by load.
    pub(crate) async fn decided(&self) -> String {
        let metrics = self.stack.router.as_ref().unwrap().metrics().await.unwrap();
        let is_shown = |line: &&str| {
            line.starts_with("warmroute_decisions_total{") || line.starts_with("warmroute_fallbacks_total{")
        };
        metrics.lines().filter(is_shown).collect::<Vec<_>>().join("\n")
    }

    /// Calls of `/tokenize` by the router.
    pub(crate) fn n_asked(&self) -> u64 {
        match &self.mode.endpoint {
            Some(endpoint) => endpoint.n_calls(),
            None => self.engines.iter().map(|engine| engine.tokenize().n_calls()).sum(),
        }
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Response {
        client().post(self.stack.url(path)).json(body).send().await.unwrap()
    }

    /// Has `prompt`, a text or token ids, completed, and says by whom.
    pub(crate) async fn complete(&self, prompt: impl Into<Value>) -> SocketAddr {
        let body = json!({"model": "tiny", "prompt": prompt.into(), "max_tokens": 1});
        let response = self.post("/v1/completions", &body).await;
        assert_eq!(response.status(), StatusCode::OK);
        served_by(&response)
    }
}

/// A conversation as a client has it.
pub(crate) struct Conversation(Vec<Value>);

impl Conversation {
    /// One that has no block in common with those of other numbers.
    pub(crate) fn new(number: u32) -> Self {
        Self(vec![json!({"role": "user", "content": text(number)})])
    }

    /// Asks, takes in the answer and the next question, and says who has answered.
    pub(crate) async fn go_on(&mut self, setup: &Setup) -> SocketAddr {
        let body = json!({"model": "tiny", "messages": self.0, "max_tokens": 20});
        let response = setup.post("/v1/chat/completions", &body).await;
        assert_eq!(response.status(), StatusCode::OK);
        let served = served_by(&response);
        let answer: Value = response.json().await.unwrap();
        self.0.push(answer["choices"][0]["message"].clone());
        self.0.push(json!({"role": "user", "content": format!("and then {}", self.0.len())}));
        served
    }
}

pub(crate) fn served_by(response: &Response) -> SocketAddr {
    response.headers()[SERVED_BY].to_str().unwrap().parse().unwrap()
}

/// Two hundred words; texts of two numbers differ from the first word on.
pub(crate) fn text(number: u32) -> String {
    let words: Vec<String> = (0..200).map(|idx| tokenizer::word(97 * number + idx)).collect();
    words.join(" ")
}

fn engine() -> SimOptions {
    let time = TimeModel { prefill_tokens_per_second: 1e6, decode_step: Duration::from_millis(5) };
    SimOptions { time, ..SimOptions::default() }
}
