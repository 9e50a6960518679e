//! What it costs a decision to be observed: processor time with nothing on, and with everything: the journal, watching
//! whether predictions come true, and 1 % of the requests traced.
//!
//! `cargo bench --bench observability`. Counters are always on: they are part of both. Each way runs in processes of its
//! own, in turn, now the one and now the other first, and the whole process is measured, so that the threads which export
//! are part of it. Two processes that follow each other are one round, with a ratio of its own, since a machine is not as
//! fast from one minute to the next; what is printed is the median of the ratios, and their quartiles. Prompts are token
//! ids, of which one of the endpoints holds three quarters: a decision that has to wait for a tokenizer costs more, of
//! which observing is a smaller part.

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
use warmroute::extproc::journal::Journal;
use warmroute::extproc::message::RequestHead;
use warmroute::extproc::report::Reports;
use warmroute::request::ReadOptions;
use warmroute::routing::endpoint::{Endpoint, EndpointId, EndpointSet};
use warmroute::routing::hash::own::OwnHasher;
use warmroute::routing::hash::{BlockSize, Scope};
use warmroute::routing::index::{Holder, KeyKinds, Keyspace, KeyspaceKind, SlotWriter, Tier};
use warmroute::routing::index::{PrefixIndex, PromiseLimits, Promises};
use warmroute::telemetry::metrics::Metrics;
use warmroute::telemetry::trace::request_span;
use warmroute::telemetry::{self, LogFormat};
use warmroute::tokenizer::{Config, Source, Tokenizer};

const ROUNDS: usize = 21;
const SIZES: [usize; 2] = [1_000, 8_000];
/// Tokens that a process decides on; as many requests as that makes.
const TOKENS: usize = 40_000_000;
const ENDPOINTS: u32 = 16;
const SAMPLED: f64 = 0.01;
const MODEL: &str = "m";

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
        for round in 0..ROUNDS {
            let mut ways = [("way-off", &mut off), ("way-on", &mut on)];
            ways.rotate_left(round % 2);
            ways.into_iter().for_each(|(way, measured)| measured.push(measure(way, n_tokens)));
        }
        let mut ratios: Vec<f64> = off.iter().zip(&on).map(|(off, on)| *on as f64 / *off as f64).collect();
        ratios.sort_by(f64::total_cmp);
        let [low, ratio, high] = [1, 2, 3].map(|quarter| ratios[ROUNDS * quarter / 4]);
        let (usual, observed) = (median(&mut off), median(&mut on));
        println!(
            "{n_tokens} tokens: {usual} ns of processor per decision, {observed} ns observed: {ratio:.3} ({low:.3} to {high:.3})"
        );
    }
}

/// Processor time of this process per decision; it is observed where there is a collector, to which spans go.
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
    let prompts: Vec<_> = (0..64).map(|nth| prompt(nth, n_tokens)).collect();
    let index = Arc::new(PrefixIndex::default());
    let _held = hold(&prompts, &index);
    let router = router(index, if collector.is_some() { Observed::Wholly } else { Observed::ByCountersAlone });
    let bodies: Vec<_> =
        prompts.iter().map(|prompt| json!({ "model": MODEL, "prompt": prompt }).to_string().into_bytes()).collect();
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
    let record = router.journal().keep(Some("a1f0c9d2-0000-4000-8000-000000000000"), &answer.verdict, None);
    let Verdict::Route(routed) = answer.verdict else { panic!("no pick") };
    assert_eq!(routed.watched.is_some(), record.is_some(), "observed in every way or in none");
    span.decided(&routed.decision);
    span.end(tonic::Code::Ok);
    black_box(routed).end(router.now());
    black_box(record);
}

fn prompt(seed: u64, n_tokens: usize) -> Vec<u32> {
    let mut random = fastrand::Rng::with_seed(seed);
    (0..n_tokens).map(|_| random.u32(..128_256)).collect()
}

/// Lets the endpoints hold the first three quarters of the prompts, in turn, until what is returned is dropped.
fn hold(prompts: &[Vec<u32>], index: &PrefixIndex) -> Vec<SlotWriter> {
    let block_size = BlockSize::new(16).unwrap();
    let keyspace = Keyspace { model: MODEL.into(), block_size, kind: KeyspaceKind::Own };
    let holder = |id| Holder { endpoint: EndpointId(id), rank: 0, tier: Tier::Gpu };
    let mut slots: Vec<_> = (0..ENDPOINTS).map(|id| index.acquire(&keyspace, holder(id)).unwrap()).collect();
    for (nth, prompt) in prompts.iter().enumerate() {
        let chain = OwnHasher::new(MODEL).scoped_chain(prompt, block_size, &Scope::default());
        let slot = &mut slots[nth % ENDPOINTS as usize];
        slot.store(&chain[..chain.len() * 3 / 4]);
        slot.prove(KeyKinds::PLAIN);
    }
    slots
}

/// Which observers a router has.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Observed {
    Wholly,
    ByCountersAlone,
}

/// A router for the model, whose engines' events feed the index.
fn router(index: Arc<PrefixIndex>, observed: Observed) -> Router {
    let endpoint = |id| Arc::new(Endpoint::new(EndpointId(id), ([127, 0, 0, 1], 1 + id as u16).into()));
    let endpoints = (0..ENDPOINTS).map(endpoint).collect();
    // A pool whose engines are asked for reports is not watched; none of these endpoints lacks anything to report.
    let reports = (observed == Observed::ByCountersAlone).then(|| Reports::new(1 << 20));
    let pool = Arc::new(Pool {
        model: MODEL.into(),
        adapters: Vec::new(),
        hasher: None,
        reading: ReadOptions::default(),
        tokenizer: Arc::new(Tokenizer::new(MODEL.into(), Source::Text, &Config::default())),
        endpoints: watch::channel(Arc::new(EndpointSet { synced: true, endpoints })).1,
        reports,
        sync: true,
        learned: Promises::new(PromiseLimits::LEARNED),
        rollout: Default::default(),
        predictions: Arc::default(),
    });
    let mut pools = Pools::default();
    pools.add(&pool, &[], true);
    let router = Router::new(pools, index, Arc::new(Metrics::new()));
    match observed {
        Observed::Wholly => router,
        Observed::ByCountersAlone => router.with_journal(Journal::new(0)),
    }
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
