//! What it costs a decision to be observed: processor time with traces off, and with 1 % of the requests traced.
//!
//! `cargo bench --bench observability`. Counters are always on: they are part of both. Each way runs in processes of its
//! own, in turn, and the whole process is measured, so that the threads which export are part of it; what is printed is
//! the ratio of the medians. The prompts' tokens are their bytes: a decision that has to wait for a tokenizer costs more,
//! of which observing is a smaller part.

#![allow(clippy::unwrap_used, reason = "a panic is how a benchmark fails")]
#![allow(clippy::disallowed_methods, reason = "the collector runs beside the benchmark")]

use std::hint::black_box;
use std::net::SocketAddr;
use std::process::Command;
use std::sync::Arc;

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::metadata::MetadataMap;
use tracing::Instrument as _;
use warmroute::extproc::decide::{Pool, Pools, Router, Verdict};
use warmroute::extproc::message::RequestHead;
use warmroute::request::ReadOptions;
use warmroute::routing::endpoint::{Endpoint, EndpointId, EndpointSet};
use warmroute::routing::index::{PrefixIndex, PromiseLimits, Promises};
use warmroute::telemetry::metrics::Metrics;
use warmroute::telemetry::trace::request_span;
use warmroute::telemetry::{self, LogFormat};
use warmroute::tokenizer::{Config, Source, Tokenizer};

const ROUNDS: usize = 7;
const SIZES: [usize; 2] = [1_000, 8_000];
/// Tokens that a process decides on; as many requests as that makes.
const TOKENS: usize = 100_000_000;
const ENDPOINTS: u32 = 16;
const SAMPLED: f64 = 0.01;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, way, collector, n_tokens] = &arguments[..]
        && way.starts_with("way-")
    {
        let collector = (way == "way-on").then(|| collector.parse().unwrap());
        println!("{}", nanoseconds_per_decision(collector, n_tokens.parse().unwrap()));
        return;
    }
    let runtime = Runtime::new().unwrap();
    let collector = runtime.block_on(start_collector()).to_string();
    let program = std::env::current_exe().unwrap();
    let measure = |way: &str, n_tokens: usize| -> u64 {
        let output = Command::new(&program).args([way, &collector, &n_tokens.to_string()]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().parse().unwrap()
    };
    for n_tokens in SIZES {
        let [mut off, mut on] = [const { Vec::new() }; 2];
        for _ in 0..ROUNDS {
            off.push(measure("way-off", n_tokens));
            on.push(measure("way-on", n_tokens));
        }
        let (usual, observed) = (median(&mut off), median(&mut on));
        let ratio = observed as f64 / usual as f64;
        println!("{n_tokens} tokens: {usual} ns of processor per decision, {observed} ns observed: {ratio:.3}");
        println!("  off {off:?}\n  on  {on:?}");
    }
}

/// Processor time of this process per decision; spans go to `collector`, if there is one.
fn nanoseconds_per_decision(collector: Option<SocketAddr>, n_tokens: usize) -> u64 {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let exporting = Runtime::new().unwrap();
    let config = telemetry::Config {
        log_format: LogFormat::Text,
        log_filter: "info".to_owned(),
        otlp_endpoint: collector.map(|collector| format!("http://{collector}")),
        sample_ratio: SAMPLED,
    };
    let telemetry = {
        let _guard = exporting.enter();
        telemetry::init(&config).unwrap()
    };
    let router = router();
    let bodies: Vec<_> = (0..64).map(|nth| body(nth, n_tokens)).collect();
    let decide = |nth: usize| runtime.block_on(decide(&router, &bodies[nth % bodies.len()]));
    (0..bodies.len()).for_each(decide);
    let n_decisions = TOKENS / n_tokens;
    let before = cpu_nanoseconds();
    (0..n_decisions).for_each(decide);
    exporting.block_on(telemetry.shutdown());
    (cpu_nanoseconds() - before) / n_decisions as u64
}

async fn decide(router: &Router, body: &[u8]) {
    let mut span = request_span(&MetadataMap::new());
    let head = RequestHead { path: "/v1/completions".to_owned(), ..RequestHead::default() };
    let answer = router.decide(&head, body).instrument(span.clone()).await;
    let Verdict::Route(routed) = answer.verdict else { panic!("no pick") };
    span.decided(&routed.decision);
    span.end(tonic::Code::Ok);
    black_box(routed).end(router.now());
}

/// A prompt of as many bytes as it is to have tokens.
fn body(seed: u64, n_tokens: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    let prompt: String = (0..n_tokens).map(|_| random.alphanumeric()).collect();
    json!({ "model": "m", "prompt": prompt }).to_string().into_bytes()
}

/// A router for the model `m`, whose index is learned from its own picks.
fn router() -> Router {
    let endpoint = |id| Arc::new(Endpoint::new(EndpointId(id), ([127, 0, 0, 1], 1 + id as u16).into()));
    let endpoints = (0..ENDPOINTS).map(endpoint).collect();
    let pool = Arc::new(Pool {
        model: "m".into(),
        adapters: Vec::new(),
        hasher: None,
        reading: ReadOptions::default(),
        tokenizer: Arc::new(Tokenizer::new("m".into(), Source::Text, &Config::default())),
        endpoints: watch::channel(Arc::new(EndpointSet { synced: true, endpoints })).1,
        reports: None,
        sync: false,
        learned: Promises::new(PromiseLimits::LEARNED),
        rollout: Default::default(),
        predictions: Arc::default(),
    });
    let mut pools = Pools::default();
    pools.add(&pool, &[], true);
    Router::new(pools, Arc::new(PrefixIndex::default()), Arc::new(Metrics::new()))
}

/// Processor time of all threads so far, also of those that have ended, in steps of 10 ms.
fn cpu_nanoseconds() -> u64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    // Fields 14 and 15 (proc(5)), counted behind the name, which may hold spaces.
    let (_, fields) = stat.rsplit_once(')').unwrap();
    let n_ticks: u64 = fields.split_whitespace().skip(11).take(2).map(|field| field.parse::<u64>().unwrap()).sum();
    n_ticks * 10_000_000
}

fn median(values: &mut [u64]) -> u64 {
    values.sort_unstable();
    values[values.len() / 2]
}

/// Takes spans and forgets them.
struct Sink;

#[tonic::async_trait]
impl TraceService for Sink {
    async fn export(
        &self,
        _request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
    }
}

async fn start_collector() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = tonic::transport::Server::builder()
        .add_service(TraceServiceServer::new(Sink))
        .serve_with_incoming(TcpListenerStream::new(listener));
    tokio::spawn(server);
    address
}
