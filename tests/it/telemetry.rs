//! Spans, as an OTLP collector receives them.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use envoy_types::pb::envoy::service::ext_proc::v3::ProcessingRequest;
use envoy_types::pb::envoy::service::ext_proc::v3::external_processor_client::ExternalProcessorClient;
use envoy_types::pb::envoy::service::ext_proc::v3::processing_request::Request;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use opentelemetry_proto::tonic::trace::v1::Span;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::metadata::{MetadataMap, MetadataValue};
use warmroute::telemetry::trace::{attribute, request_span};
use warmroute::telemetry::{self, Config, LogFormat};

use crate::fakes::{EnvoyStream, headers};
use crate::process::Process;

const TRACE_ID: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const ENVOY_SPAN_ID: &str = "00f067aa0ba902b7";

/// Receives spans like a collector and hands the requests to the test.
struct FakeCollector {
    requests: mpsc::UnboundedSender<ExportTraceServiceRequest>,
}

#[tonic::async_trait]
impl TraceService for FakeCollector {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        let _ = self.requests.send(request.into_inner());
        Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
    }
}

async fn start_collector() -> (SocketAddr, mpsc::UnboundedReceiver<ExportTraceServiceRequest>) {
    let (requests, received) = mpsc::unbounded_channel();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = tonic::transport::Server::builder()
        .add_service(TraceServiceServer::new(FakeCollector { requests }))
        .serve_with_incoming(TcpListenerStream::new(listener));
    tokio::spawn(server);
    (address, received)
}

fn config(collector: SocketAddr) -> Config {
    Config {
        log_format: LogFormat::Text,
        log_filter: "off".to_owned(),
        otlp_endpoint: Some(format!("http://{collector}")),
        sample_ratio: 1.0,
    }
}

fn envoy_metadata(flags: &str) -> MetadataMap {
    let traceparent = format!("00-{TRACE_ID}-{ENVOY_SPAN_ID}-{flags}");
    let mut metadata = MetadataMap::new();
    metadata.insert("traceparent", MetadataValue::try_from(traceparent).unwrap());
    metadata.insert("tracestate", MetadataValue::from_static("vendor=value"));
    metadata
}

/// Makes one span for `metadata`, shuts telemetry down and returns what the collector received.
async fn spans_received(metadata: &MetadataMap) -> Vec<(Vec<KeyValue>, Span)> {
    let (address, mut received) = start_collector().await;
    let (telemetry, dispatch) = telemetry::build(&config(address)).unwrap();

    tracing::dispatcher::with_default(&dispatch, || {
        let span = request_span(metadata);
        span.record(attribute::REQUEST_MODEL, "llama");
        span.record(attribute::MATCHED_TOKENS, 7_i64);
    });
    telemetry.shutdown().await;
    spans_in(&mut received)
}

fn spans_in(received: &mut mpsc::UnboundedReceiver<ExportTraceServiceRequest>) -> Vec<(Vec<KeyValue>, Span)> {
    let mut spans = Vec::new();
    while let Ok(request) = received.try_recv() {
        for resource_spans in request.resource_spans {
            let resource = resource_spans.resource.unwrap_or_default().attributes;
            let scopes = resource_spans.scope_spans.into_iter();
            spans.extend(scopes.flat_map(|scope| scope.spans).map(|span| (resource.clone(), span)));
        }
    }
    spans
}

fn value<'a>(attributes: &'a [KeyValue], key: &str) -> Option<&'a Value> {
    let attribute = attributes.iter().find(|attribute| attribute.key == key)?;
    attribute.value.as_ref().and_then(|AnyValue { value }| value.as_ref())
}

#[tokio::test]
async fn stream_is_a_server_span_below_the_span_of_envoy() {
    let spans = spans_received(&envoy_metadata("01")).await;

    let [(resource, span)] = spans.as_slice() else { panic!("expected one span: {spans:?}") };
    assert_eq!(span.name, "warmroute.route");
    assert_eq!(span.kind(), SpanKind::Server);
    assert_eq!(hex::encode(&span.trace_id), TRACE_ID);
    assert_eq!(hex::encode(&span.parent_span_id), ENVOY_SPAN_ID);
    assert_eq!(span.trace_state, "vendor=value");
    let model = value(&span.attributes, "gen_ai.request.model");
    assert_eq!(model, Some(&Value::StringValue("llama".to_owned())));
    assert_eq!(value(&span.attributes, "warmroute.matched_tokens"), Some(&Value::IntValue(7)));
    assert_eq!(value(&span.attributes, "server.address"), None);
    let service = value(resource, "service.name");
    assert_eq!(service, Some(&Value::StringValue("warmroute".to_owned())));
}

/// The program itself, from the stream's metadata to the collector.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_one_span_with_its_decision_and_who_served_above_its_steps() {
    let (collector, mut received) = start_collector().await;
    let settings = format!("log: {{format: json}}\ntrace: {{otlp_endpoint: 'http://{collector}'}}");
    let mut process = Process::start("trace", ([127, 0, 0, 1], 0).into(), &settings);
    let addresses = process.wait_for_log("warmroute is starting");
    let url = format!("http://{}", addresses["extproc"].as_str().unwrap());
    let client = ExternalProcessorClient::connect(url).await.unwrap();
    let mut stream = EnvoyStream::open_with(client, envoy_metadata("01")).await;
    stream.post("/v1/completions", br#"{"model":"tiny","prompt":"secret"}"#).await;
    let served = Request::ResponseHeaders(headers(&[(":status", "200")], false));
    stream.exchange(ProcessingRequest { request: Some(served), ..Default::default() }).await;
    drop(stream);
    process.terminate();
    assert!(process.child.wait().unwrap().success());

    let spans = spans_in(&mut received);
    let (routes, steps): (Vec<_>, Vec<_>) =
        spans.iter().map(|(_, span)| span).partition(|span| span.name == "warmroute.route");
    let [span] = routes[..] else { panic!("expected one span of a request: {spans:?}") };
    assert_eq!(span.kind(), SpanKind::Server);
    let mut names: Vec<_> =
        steps.iter().filter(|step| step.parent_span_id == span.span_id).map(|step| &*step.name).collect();
    names.sort_unstable();
    assert_eq!(names, ["warmroute.parse", "warmroute.score", "warmroute.tokenize"], "without tokens nothing is hashed");
    let is_known = |id: &Vec<u8>| spans.iter().any(|(_, span)| span.span_id == *id);
    assert!(steps.iter().all(|step| step.trace_id == span.trace_id && is_known(&step.parent_span_id)), "{steps:?}");
    assert_eq!(
        (hex::encode(&span.trace_id), hex::encode(&span.parent_span_id)),
        (TRACE_ID.into(), ENVOY_SPAN_ID.into())
    );
    let text = |text: &str| Some(Value::StringValue(text.to_owned()));
    for (key, expected) in [
        (attribute::REQUEST_MODEL, text("tiny")),
        (attribute::OPERATION_NAME, text("text_completion")),
        (attribute::ENDPOINT_PICKED, text("127.0.0.1:1")),
        (attribute::DECISION_OUTCOME, text("fallback")),
        (attribute::RESPONSE_STATUS_CODE, Some(Value::IntValue(200))),
    ] {
        assert_eq!(value(&span.attributes, key), expected.as_ref(), "{key}");
    }
    let fallback = value(&span.attributes, attribute::DECISION_FALLBACK);
    // The checks of the tokenizer may have failed often enough before the request came.
    let expected = ["tokenizer_unreachable", "tokenizer_open"].map(text);
    assert!(expected.iter().any(|expected| expected.as_ref() == fallback), "{fallback:?}");
    assert!(!format!("{spans:?}").contains("secret"));
}

#[tokio::test]
async fn stream_without_trace_context_is_a_root() {
    let spans = spans_received(&MetadataMap::new()).await;

    let [(_, span)] = spans.as_slice() else { panic!("expected one span: {spans:?}") };
    assert!(span.parent_span_id.is_empty());
    assert_ne!(hex::encode(&span.trace_id), TRACE_ID);
}

#[tokio::test]
async fn decision_of_envoy_not_to_sample_holds() {
    assert_eq!(spans_received(&envoy_metadata("00")).await.len(), 0);
}

#[tokio::test]
async fn shutdown_returns_in_time_while_the_collector_refuses() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);

    assert_shutdown_in_time(address).await;
}

#[tokio::test]
async fn shutdown_returns_in_time_while_the_collector_is_silent() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();

    assert_shutdown_in_time(listener.local_addr().unwrap()).await;
}

async fn assert_shutdown_in_time(collector: SocketAddr) {
    let (telemetry, dispatch) = telemetry::build(&config(collector)).unwrap();
    tracing::dispatcher::with_default(&dispatch, || drop(request_span(&MetadataMap::new())));

    let start = Instant::now();
    telemetry.shutdown().await;

    // Four seconds for a busy machine; what must not happen is the exporter's own 10 s.
    let deadline = telemetry::trace::SHUTDOWN_DEADLINE + Duration::from_secs(4);
    assert!(start.elapsed() < deadline, "{:?}", start.elapsed());
}
