//! A router and an Envoy that send their spans to a collector, in front of simulated engines.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use e2e::cache::Cache;
use e2e::collector::Collector;
use e2e::engines::Engines;
use e2e::kube::tools;
use e2e::router::RouterOptions;
use e2e::service::lasting_addresses;
use e2e::sim::SimOptions;
use e2e::stack::Stack;
use serde_json::json;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

/// Everything, in the order in which it is to end.
pub(crate) struct Setup {
    pub(crate) stack: Stack,
    _engines: Engines,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) collector: Option<Collector>,
    pub(crate) binary: PathBuf,
    pub(crate) collector_address: SocketAddr,
    pub(crate) dir: TempDir,
}

impl Setup {
    /// Two engines, and a tokenizer that shows how it is asked; `change` has the last word on the router's options.
    pub(crate) async fn start(change: impl FnOnce(&mut RouterOptions)) -> Self {
        let binary = otelcol().await;
        let dir = tempfile::tempdir().unwrap();
        let [collector_address] = lasting_addresses().unwrap();
        let collector = Collector::start(&binary, dir.path(), collector_address).await.unwrap();
        let engines = Engines::simulated(2, &SimOptions::default()).unwrap();
        let tokenizer = Tokenizer::start().await;
        let mut options = RouterOptions::new(engines.addresses());
        options.tokenizer =
            Some(json!({"kind": "remote", "budget": "800ms", "endpoint": format!("http://{}", tokenizer.address)}));
        options.env.push(("WARMROUTE_TRACE_OTLP_ENDPOINT".to_owned(), format!("http://{collector_address}")));
        change(&mut options);
        let stack = Stack::start_traced(dir.path(), &options, Some(collector_address)).await.unwrap();
        Self { stack, _engines: engines, tokenizer, collector: Some(collector), binary, collector_address, dir }
    }

    pub(crate) fn collector(&self) -> &Collector {
        self.collector.as_ref().unwrap()
    }
}

/// The collector's program, built first if need be.
async fn otelcol() -> PathBuf {
    let built = tokio::task::spawn_blocking(|| tools::otelcol(&Cache::from_env().unwrap()).unwrap());
    built.await.unwrap()
}

/// A server that tokenizes in the engines' place: a token per byte, and what it was told of traces.
pub(crate) struct Tokenizer {
    pub(crate) address: SocketAddr,
    asked: Arc<Asked>,
    _server: JoinSet<()>,
}

#[derive(Default)]
struct Asked {
    /// `traceparent` of each question, in order; empty where there was none.
    parents: Mutex<Vec<String>>,
    /// The questions.
    bodies: Mutex<Vec<Bytes>>,
    /// Answers with an error that repeats the question.
    echoes: Mutex<bool>,
}

impl Tokenizer {
    async fn start() -> Self {
        let asked = Arc::<Asked>::default();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let app = axum::Router::new().fallback(tokenize).with_state(asked.clone());
        let mut server = JoinSet::new();
        server.spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self { address, asked, _server: server }
    }

    /// `traceparent` of the questions so far.
    pub(crate) fn parents(&self) -> Vec<String> {
        self.asked.parents.lock().unwrap().clone()
    }

    /// Whether some question had `text` in it.
    pub(crate) fn was_asked(&self, text: &str) -> bool {
        let bodies = self.asked.bodies.lock().unwrap();
        bodies.iter().any(|body| String::from_utf8_lossy(body).contains(text))
    }

    /// From now on every answer is an error that repeats the question.
    pub(crate) fn echo_as_error(&self) {
        *self.asked.echoes.lock().unwrap() = true;
    }
}

async fn tokenize(State(asked): State<Arc<Asked>>, headers: HeaderMap, body: Bytes) -> Response {
    let parent = headers.get("traceparent").map_or("", |value| value.to_str().unwrap());
    asked.parents.lock().unwrap().push(parent.to_owned());
    asked.bodies.lock().unwrap().push(body.clone());
    if *asked.echoes.lock().unwrap() {
        return (StatusCode::BAD_REQUEST, body).into_response();
    }
    let tokens: Vec<u32> = body.iter().map(|byte| u32::from(*byte)).collect();
    json!({"count": tokens.len(), "max_model_len": 1 << 20, "tokens": tokens}).to_string().into_response()
}
