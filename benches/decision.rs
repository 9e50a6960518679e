//! A whole decision, from the request's body to the pick, by where the tokens come from.
//!
//! `cargo bench --bench decision`. The engine of `remote` is a server in this process that tokenizes with the same
//! tokenizer, and has nothing else to do; what `remote` costs beyond `local` is the way there and back.

#![allow(clippy::unwrap_used, reason = "a panic is how a benchmark fails")]
#![allow(clippy::disallowed_methods, reason = "the engine runs beside the benchmark")]

mod support;

use std::cell::Cell;
use std::hint::black_box;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::State;
use criterion::{BatchSize, BenchmarkId, Criterion};
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use tokio::sync::watch;
use warmroute::engine::{Access, EngineClient};
use warmroute::extproc::decide::{Pool, Pools, Router, Verdict};
use warmroute::extproc::message::RequestHead;
use warmroute::extproc::rollout::Switch;
use warmroute::request::{Question, ReadOptions, TokensApi};
use warmroute::routing::endpoint::{Endpoint, EndpointId, EndpointSet};
use warmroute::routing::index::{PrefixIndex, PromiseLimits, Promises};
use warmroute::telemetry::metrics::Metrics;
use warmroute::tokenizer::local::LocalTokenizer;
use warmroute::tokenizer::remote::{RemoteConfig, RemoteTokenizer};
use warmroute::tokenizer::{Budget, Config, Source, Tokenizer};

use support::{MESSAGE, conversation, words, write_model};

const SIZES: [usize; 4] = [1_000, 8_000, 32_000, 100_000];
/// Nothing is cut off here.
const AMPLE: Budget = Budget { base: Duration::from_secs(60), max: Duration::from_secs(60) };

fn main() {
    let directory = tempfile::tempdir().unwrap();
    write_model(directory.path());
    let local = Arc::new(LocalTokenizer::load(directory.path()).unwrap());
    let runtime = Runtime::new().unwrap();
    let engine = runtime.block_on(start_engine(local.clone()));
    let client = EngineClient::new(&Access::default()).unwrap();
    let remote = Arc::new(RemoteTokenizer::new(client, RemoteConfig { budget: AMPLE, endpoint: None }));
    let with_local = Bench { router: router(Source::Local(local.clone()), engine), runtime: &runtime };
    let with_remote = Bench { router: router(Source::Remote { remote, stand_in: None }, engine), runtime: &runtime };

    let mut criterion = Criterion::default().sample_size(10).configure_from_args();
    let mut group = criterion.benchmark_group("decision");
    for n_tokens in SIZES {
        let messages = conversation(&local, n_tokens);
        let nth = Cell::new(0_usize);
        let next = || nth.replace(nth.get() + 1);
        let known = || messages.clone();
        let one_more_turn = || {
            let mut messages = messages.clone();
            messages.push(json!({"role": "user", "content": words(MESSAGE, 2_000_000 + next())}));
            messages
        };
        let unknown = || {
            let mut messages = messages.clone();
            messages[0]["content"] = json!(words(MESSAGE, n_tokens + 1_000_000 + next()));
            messages
        };
        let cases: [(&str, &Bench<'_>, Messages<'_>); 4] = [
            ("tokens cached", &with_local, &known),
            ("prefix cached", &with_local, &one_more_turn),
            ("local", &with_local, &unknown),
            ("remote", &with_remote, &unknown),
        ];
        with_local.decide(&body(&known()));
        for (name, bench, messages) in cases {
            group.bench_function(BenchmarkId::new(name, n_tokens), |bencher| {
                bencher.iter_batched(|| body(&messages()), |body| bench.decide(&body), BatchSize::PerIteration);
            });
        }
    }
    group.finish();
    criterion.final_summary();
}

/// Makes the messages of the next request.
type Messages<'a> = &'a dyn Fn() -> Vec<Value>;

struct Bench<'a> {
    router: Router,
    runtime: &'a Runtime,
}

impl Bench<'_> {
    fn decide(&self, body: &[u8]) {
        let head = RequestHead { path: "/v1/chat/completions".to_owned(), ..RequestHead::default() };
        let answer = self.runtime.block_on(self.router.decide(&head, body));
        let Verdict::Route(routed) = answer.verdict else { panic!("no pick") };
        assert!(routed.decision.prompt_tokens > 0, "{:?}", routed.decision.outcome);
        black_box(routed);
    }
}

fn body(messages: &[Value]) -> Vec<u8> {
    json!({ "model": "m", "messages": messages }).to_string().into_bytes()
}

/// A router for the model `m`, whose index is learned from its own picks.
fn router(source: Source, engine: SocketAddr) -> Router {
    let endpoint = Arc::new(Endpoint::new(EndpointId(0), engine));
    let config = Config { budget: AMPLE, cache_bytes: 64 << 20 };
    let pool = Arc::new(Pool {
        model: "m".into(),
        adapters: Vec::new(),
        hasher: None,
        reading: ReadOptions::default(),
        tokenizer: Arc::new(Tokenizer::new("m".into(), source, &config)),
        endpoints: watch::channel(Arc::new(EndpointSet { synced: true, endpoints: vec![endpoint] })).1,
        reports: None,
        sync: false,
        learned: Promises::new(PromiseLimits::LEARNED),
        predictions: Arc::default(),
        rollout: Switch::default(),
    });
    let mut pools = Pools::default();
    pools.add(&pool, &[], true);
    Router::new(pools, Arc::new(PrefixIndex::default()), Arc::new(Metrics::new()))
}

/// Answers `/tokenize` by tokenizing.
async fn start_engine(tokenizer: Arc<LocalTokenizer>) -> SocketAddr {
    async fn tokenize(State(tokenizer): State<Arc<LocalTokenizer>>, body: Bytes) -> String {
        let question = Question { api: TokensApi::Tokenize, body: body.to_vec() };
        let ids = tokenizer.tokenize(&question).unwrap().ids;
        json!({ "count": ids.len(), "max_model_len": 1 << 20, "tokens": ids }).to_string()
    }
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let limit = axum::extract::DefaultBodyLimit::disable();
    let app = axum::Router::new().route("/tokenize", axum::routing::post(tokenize)).layer(limit).with_state(tokenizer);
    tokio::spawn(async move { axum::serve(listener, app).await });
    address
}
