//! An engine's `/tokenize`, and a router on a real port with a gRPC client that speaks Envoy's part.

use std::fmt::Display;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::declared;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use envoy_types::pb::envoy::config::core::v3::{HeaderMap, HeaderValue};
use envoy_types::pb::envoy::service::ext_proc::v3::external_processor_client::ExternalProcessorClient;
use envoy_types::pb::envoy::service::ext_proc::v3::processing_request::Request;
use envoy_types::pb::envoy::service::ext_proc::v3::processing_response;
use envoy_types::pb::envoy::service::ext_proc::v3::{
    HeaderMutation, HttpBody, HttpHeaders, ProcessingRequest, ProcessingResponse,
};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;
use tonic::metadata::MetadataMap;
use tonic::transport::Channel;
use tonic_health::pb::health_client::HealthClient;
use warmroute::engine::{Access, EngineClient};
use warmroute::extproc::decide::{Pool, Pools, Router};
use warmroute::extproc::message::BodyMode;
use warmroute::extproc::reply::{Selection, SelectionMode};
use warmroute::extproc::report::Reports;
use warmroute::extproc::rollout::Switch;
use warmroute::extproc::{self, Config};
use warmroute::request::{Question, ReadOptions, TokensApi};
use warmroute::routing::endpoint::{Endpoint, EndpointId, EndpointSet};
use warmroute::routing::hash::{BlockHasher, BlockSize, HashAlgorithm, Scope};
use warmroute::routing::index::{
    Holder, IndexLimits, KeyKinds, Keyspace, KeyspaceKind, PrefixIndex, PromiseLimits, Promises, SlotWriter, Tier,
};
use warmroute::telemetry::metrics::Metrics;
use warmroute::tokenizer::local::LocalTokenizer;
use warmroute::tokenizer::remote::{RemoteConfig, RemoteTokenizer};
use warmroute::tokenizer::{self, Budget, Source, Tokenizer};

/// Longest that any wait in a test may take.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);
pub(crate) const BLOCK_SIZE: u32 = 4;
/// Largest request body.
const BODY_BYTES: usize = 32 << 20;
pub(crate) const HEADER: &str = "x-gateway-destination-endpoint";

/// How a fake engine answers `/tokenize`.
#[derive(Clone, Debug)]
pub(crate) enum Tokenize {
    /// One token per character of the prompt or of the messages' JSON.
    Characters,
    Status(u16),
    Body(&'static str),
    Never,
    /// As [`Tokenize::Characters`], but only after a while.
    After(Duration),
    /// As a tokenizer of ours says.
    Local(Arc<LocalTokenizer>),
}

/// The HTTP side of an engine.
pub(crate) struct FakeEngine {
    pub(crate) address: SocketAddr,
    behaviour: Arc<Mutex<Tokenize>>,
    asked: Arc<Mutex<Vec<Value>>>,
}

impl FakeEngine {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let behaviour = Arc::new(Mutex::new(Tokenize::Characters));
        let asked = Arc::default();
        let state = (behaviour.clone(), Arc::clone(&asked));
        let app = axum::Router::new().route("/tokenize", axum::routing::post(tokenize)).with_state(state);
        tokio::spawn(async move { axum::serve(listener, app).await });
        Self { address, behaviour, asked }
    }

    pub(crate) fn set(&self, behaviour: Tokenize) {
        *self.behaviour.lock().unwrap() = behaviour;
    }

    pub(crate) fn asked(&self) -> Vec<Value> {
        self.asked.lock().unwrap().clone()
    }
}

type EngineState = (Arc<Mutex<Tokenize>>, Arc<Mutex<Vec<Value>>>);

async fn tokenize(State((behaviour, asked)): State<EngineState>, body: Bytes) -> Response {
    let body: Value = serde_json::from_slice(&body).unwrap();
    asked.lock().unwrap().push(body.clone());
    let behaviour = behaviour.lock().unwrap().clone();
    match behaviour {
        Tokenize::Characters => answer(&characters(&text(&body))),
        Tokenize::Status(status) => StatusCode::from_u16(status).unwrap().into_response(),
        Tokenize::Body(body) => body.into_response(),
        Tokenize::Never => std::future::pending().await,
        Tokenize::After(delay) => {
            tokio::time::sleep(delay).await;
            answer(&characters(&text(&body)))
        }
        Tokenize::Local(tokenizer) => {
            let question = Question { api: TokensApi::Tokenize, body: body.to_string().into_bytes() };
            answer(&tokenizer.tokenize(&question).unwrap().ids)
        }
    }
}

fn text(body: &Value) -> String {
    body["prompt"].as_str().map_or_else(|| body["messages"].to_string(), str::to_owned)
}

fn answer(tokens: &[u32]) -> Response {
    json!({ "count": tokens.len(), "max_model_len": 2048, "tokens": tokens }).to_string().into_response()
}

/// What [`Tokenize::Characters`] makes of a text.
pub(crate) fn characters(text: &str) -> Vec<u32> {
    text.chars().map(u32::from).collect()
}

/// Asks the engines of a pool, each request within `budget`.
pub(crate) fn remote_tokenizer(access: &Access, budget: Duration) -> Arc<RemoteTokenizer> {
    let config = RemoteConfig { budget: Budget { base: budget, max: budget }, endpoint: None };
    Arc::new(RemoteTokenizer::new(EngineClient::new(access).unwrap(), config))
}

/// A tokenizer for `tiny` with [`BUDGET`].
pub(crate) fn tokenizer_of(source: Source) -> Arc<Tokenizer> {
    let config = tokenizer::Config { budget: Budget { base: BUDGET, max: BUDGET }, cache_bytes: 1 << 20 };
    Arc::new(Tokenizer::new("tiny".into(), source, &config))
}

/// Longest wait for tokens in a [`FakeRouter`].
pub(crate) const BUDGET: Duration = Duration::from_secs(1);

/// Checks in the end that whatever a test has made a router count is declared.
struct Declared(Arc<Metrics>);

impl Drop for Declared {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            declared::check(&self.0.encode());
        }
    }
}

/// A router with one pool, `tiny`, serving on a real port.
pub(crate) struct FakeRouter {
    pub(crate) address: SocketAddr,
    pub(crate) endpoints: Vec<Arc<Endpoint>>,
    pub(crate) set: watch::Sender<Arc<EndpointSet>>,
    pub(crate) ready: watch::Sender<bool>,
    pub(crate) router: Arc<Router>,
    pub(crate) metrics: Arc<Metrics>,
    /// Looked at when the test is over.
    _declared: Declared,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) shutdown: CancellationToken,
    pub(crate) server: tokio::task::JoinHandle<Result<(), extproc::Error>>,
    index: Arc<PrefixIndex>,
    hasher: BlockHasher,
    client: ExternalProcessorClient<Channel>,
}

impl FakeRouter {
    /// A default pool over `addresses`, with an adapter `lora-a`.
    pub(crate) async fn start(addresses: &[SocketAddr]) -> Self {
        Self::start_with(addresses, SelectionMode::OverrideHost, BODY_BYTES).await
    }

    /// The same for another way of telling Envoy the endpoint, and with bodies up to `body_bytes`.
    pub(crate) async fn start_with(addresses: &[SocketAddr], mode: SelectionMode, body_bytes: usize) -> Self {
        let router = Self::start_unready(addresses, mode, body_bytes).await;
        router.ready.send_replace(true);
        router
    }

    /// The same before it is ready.
    pub(crate) async fn start_unready(addresses: &[SocketAddr], mode: SelectionMode, body_bytes: usize) -> Self {
        let number = |(i, address): (usize, &SocketAddr)| Arc::new(Endpoint::new(EndpointId(i as u32 + 1), *address));
        let endpoints: Vec<_> = addresses.iter().enumerate().map(number).collect();
        let (set, receiver) = watch::channel(Arc::new(EndpointSet { synced: true, endpoints: endpoints.clone() }));
        let hasher = BlockHasher::new(HashAlgorithm::Sha256Cbor, None).unwrap();
        let source = Source::Remote { remote: remote_tokenizer(&Access::default(), BUDGET), stand_in: None };
        let tokenizer = tokenizer_of(source);
        let pool = Arc::new(Pool {
            model: "tiny".into(),
            adapters: vec![("lora-a".into(), "path".into())],
            hasher: Some(hasher.clone()),
            reading: ReadOptions::default(),
            tokenizer: tokenizer.clone(),
            endpoints: receiver,
            reports: Some(Reports::new(BODY_BYTES)),
            sync: true,
            predictions: Arc::default(),
            learned: Promises::new(PromiseLimits::LEARNED),
            rollout: Switch::default(),
        });
        let mut pools = Pools::default();
        pools.add(&pool, &["alias".to_owned()], true);
        let (metrics, index) = (Arc::new(Metrics::new()), Arc::new(PrefixIndex::new(IndexLimits::default())));
        let router = Router::new(pools, index.clone(), metrics.clone());
        let router = Arc::new(if mode.has_fallback() { router } else { router.without_fallback() });
        let selection = Selection { mode, header: HEADER.to_owned() };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let config = Config { selection, assumed_mode: BodyMode::Buffered, body_bytes };
        let (ready, is_ready) = watch::channel(false);
        let server = tokio::spawn(extproc::run(listener, config, router.clone(), is_ready, shutdown.clone()));
        let client = ExternalProcessorClient::connect(format!("http://{address}")).await.unwrap();
        let _declared = Declared(metrics.clone());
        Self {
            address,
            endpoints,
            set,
            ready,
            router,
            metrics,
            _declared,
            tokenizer,
            shutdown,
            server,
            index,
            hasher,
            client,
        }
    }

    /// Lets an endpoint hold all full blocks of `tokens`, as an engine's events would.
    pub(crate) fn warm(&self, endpoint_idx: usize, tokens: &[u32], scope: &Scope, proved: KeyKinds) -> SlotWriter {
        self.warm_rank(endpoint_idx, 0, tokens, scope, proved)
    }

    /// [`Self::warm`] for one data-parallel rank.
    pub(crate) fn warm_rank(
        &self,
        endpoint_idx: usize,
        rank: u32,
        tokens: &[u32],
        scope: &Scope,
        proved: KeyKinds,
    ) -> SlotWriter {
        let block_size = BlockSize::new(BLOCK_SIZE).unwrap();
        let kind = KeyspaceKind::Engine { algorithm: self.hasher.algorithm(), root: self.hasher.root() };
        let keyspace = Keyspace { model: "tiny".into(), block_size, kind };
        let holder = Holder { endpoint: self.endpoints[endpoint_idx].id, rank, tier: Tier::Gpu };
        let mut slot = self.index.acquire(&keyspace, holder).unwrap();
        slot.store(&self.hasher.scoped_chain(tokens, block_size, scope));
        slot.prove(proved);
        slot
    }

    /// Opens a stream, as Envoy does for each request.
    pub(crate) async fn open(&self) -> EnvoyStream {
        EnvoyStream::open(self.client.clone()).await
    }

    /// Sends a POST with a body and returns the reply to the body.
    pub(crate) async fn post(&self, path: &str, body: &[u8]) -> (EnvoyStream, ProcessingResponse) {
        let mut stream = self.open().await;
        let reply = stream.post(path, body).await;
        (stream, reply)
    }

    /// Sends a completion and returns where it goes.
    pub(crate) async fn complete(&self, body: Value) -> (EnvoyStream, Option<String>) {
        let (stream, reply) = self.post("/v1/completions", body.to_string().as_bytes()).await;
        (stream, destination(&reply))
    }

    pub(crate) fn in_flight(&self) -> Vec<u32> {
        self.endpoints.iter().map(|endpoint| endpoint.load.in_flight()).collect()
    }

    /// Value of a series at `/metrics`, 0 when it is not there.
    pub(crate) fn metric(&self, series: &str) -> f64 {
        let text = self.metrics.encode();
        let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        line.map_or(0.0, |value| value.parse().unwrap())
    }
}

/// Forwards one connection to `server` until `is_cut`; then it keeps both ends open and lets nothing through, like a
/// node that is gone.
pub(crate) async fn cuttable_proxy(server: SocketAddr, is_cut: CancellationToken) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut near, _) = listener.accept().await.unwrap();
        let mut far = tokio::net::TcpStream::connect(server).await.unwrap();
        tokio::select! {
            result = tokio::io::copy_bidirectional(&mut near, &mut far) => drop(result),
            () = is_cut.cancelled() => std::future::pending().await,
        }
    });
    address
}

/// Asks for the health of the server at `address`.
pub(crate) async fn health_client(address: impl Display) -> HealthClient<Channel> {
    HealthClient::new(Channel::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap())
}

/// Waits until `condition` holds.
pub(crate) async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = tokio::time::Instant::now() + DEADLINE;
    while !condition() {
        assert!(tokio::time::Instant::now() < deadline, "{what} did not come true in {DEADLINE:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Envoy's end of one request.
pub(crate) struct EnvoyStream {
    requests: Option<mpsc::UnboundedSender<ProcessingRequest>>,
    responses: Streaming<ProcessingResponse>,
}

impl EnvoyStream {
    pub(crate) async fn open(client: ExternalProcessorClient<Channel>) -> Self {
        Self::open_with(client, MetadataMap::new()).await
    }

    /// With the gRPC metadata that Envoy adds when it traces.
    pub(crate) async fn open_with(mut client: ExternalProcessorClient<Channel>, metadata: MetadataMap) -> Self {
        let (requests, receiver) = mpsc::unbounded_channel();
        let mut call = tonic::Request::new(UnboundedReceiverStream::new(receiver));
        *call.metadata_mut() = metadata;
        let responses = client.process(call).await.unwrap();
        Self { requests: Some(requests), responses: responses.into_inner() }
    }

    pub(crate) fn send(&self, message: ProcessingRequest) {
        self.requests.as_ref().unwrap().send(message).unwrap();
    }

    /// The next reply; none when the router has ended the stream with OK.
    pub(crate) async fn next(&mut self) -> Result<Option<ProcessingResponse>, tonic::Status> {
        tokio::time::timeout(DEADLINE, self.responses.message()).await.expect("a reply within the deadline")
    }

    pub(crate) async fn exchange(&mut self, message: ProcessingRequest) -> ProcessingResponse {
        self.send(message);
        self.next().await.unwrap().expect("a reply")
    }

    pub(crate) async fn post(&mut self, path: &str, body: &[u8]) -> ProcessingResponse {
        let reply = self.exchange(request_headers(path, false)).await;
        assert_clears_routing_headers(&reply);
        self.exchange(request_body(body)).await
    }

    /// Ends the sending half, as Envoy does when the answer has ended.
    pub(crate) fn close(&mut self) {
        self.requests = None;
    }
}

pub(crate) fn headers(pairs: &[(&str, &str)], end_of_stream: bool) -> HttpHeaders {
    let header = |(key, value): &(&str, &str)| HeaderValue {
        key: (*key).to_owned(),
        raw_value: value.as_bytes().to_vec(),
        ..Default::default()
    };
    let headers = Some(HeaderMap { headers: pairs.iter().map(header).collect() });
    HttpHeaders { headers, end_of_stream, ..Default::default() }
}

pub(crate) fn request_headers(path: &str, end_of_stream: bool) -> ProcessingRequest {
    let forged = [(":path", path), (HEADER, "6.6.6.6:6"), ("target-pod", "6.6.6.6:6")];
    let request = Some(Request::RequestHeaders(headers(&forged, end_of_stream)));
    ProcessingRequest { request, ..Default::default() }
}

pub(crate) fn request_body(body: &[u8]) -> ProcessingRequest {
    let body = HttpBody { body: body.to_vec(), end_of_stream: true, ..Default::default() };
    ProcessingRequest { request: Some(Request::RequestBody(body)), ..Default::default() }
}

fn mutation(reply: &ProcessingResponse) -> HeaderMutation {
    let common = match reply.response.clone().unwrap() {
        processing_response::Response::RequestHeaders(reply) => reply.response,
        processing_response::Response::RequestBody(reply) => reply.response,
        other => panic!("expected the reply to a request step, found {other:?}"),
    };
    common.unwrap().header_mutation.unwrap()
}

/// The client's copies of the routing headers are removed or overwritten.
pub(crate) fn assert_clears_routing_headers(reply: &ProcessingResponse) {
    let mutation = mutation(reply);
    let set = mutation.set_headers.iter().map(|option| option.header.as_ref().unwrap().key.as_str());
    let cleared: Vec<&str> = mutation.remove_headers.iter().map(String::as_str).chain(set).collect();
    for header in [HEADER, "target-pod"] {
        assert!(cleared.contains(&header), "{header} is not cleared: {mutation:?}");
    }
}

/// Value of the selection header, which must stand in the metadata as well; none when the request is left to Envoy.
pub(crate) fn destination(reply: &ProcessingResponse) -> Option<String> {
    assert_clears_routing_headers(reply);
    let mutation = mutation(reply);
    let header = mutation.set_headers.iter().map(|option| option.header.as_ref().unwrap()).find(|h| h.key == HEADER);
    let header = header.map(|header| String::from_utf8(header.raw_value.clone()).unwrap());
    assert_eq!(metadata(reply), header, "metadata and header agree");
    header
}

/// Value of a header that a reply sets.
pub(crate) fn set_header(reply: &ProcessingResponse, name: &str) -> Option<String> {
    let headers = mutation(reply).set_headers.into_iter().filter_map(|option| option.header);
    let header = headers.into_iter().find(|header| header.key == name)?;
    Some(String::from_utf8(header.raw_value).unwrap())
}

fn metadata(reply: &ProcessingResponse) -> Option<String> {
    use envoy_types::pb::google::protobuf::value::Kind;
    let namespace = reply.dynamic_metadata.as_ref()?.fields.get("envoy.lb")?;
    let Some(Kind::StructValue(inner)) = &namespace.kind else { panic!("expected a struct, found {namespace:?}") };
    match &inner.fields.get(HEADER)?.kind {
        Some(Kind::StringValue(value)) => Some(value.clone()),
        other => panic!("expected a string, found {other:?}"),
    }
}
