//! The spans of a request: what it was, how it was decided, who served it.
//!
//! Envoy sends the W3C trace context of its own span in the metadata of the gRPC stream; [`request_span`] continues it,
//! so that a trace shows the pick next to the request it was made for. Attributes have the names of OpenTelemetry's
//! semantic conventions where there is one (RPC for the stream, GenAI for what is asked), else they begin with
//! `warmroute.`: the terms that the decision rests on.
//!
//! Whether a request is sampled is decided when its span is opened, by Envoy or, for want of a trace context, by the
//! ratio that is configured. One that is not has a disabled span, below which nothing is made: where few are sampled,
//! that is what tracing costs the others.

use std::ops::Deref;
use std::sync::OnceLock;

use opentelemetry::propagation::{Extractor, TextMapPropagator as _};
use opentelemetry::trace::TraceContextExt as _;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tonic::Code;
use tonic::metadata::{KeyRef, MetadataMap};
use tracing::field::{Empty, display};
use tracing::{Instrument as _, Span, info_span};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

use crate::routing::pick::{Decision, Outcome};
use crate::telemetry::metrics::Stage;

/// Names of the attributes that [`request_span`] declares; recording any other name does nothing.
///
/// Numbers are recorded as `i64`: tracing-opentelemetry 0.34 exports a `u64` as text.
pub mod attribute {
    /// Status of the span: `error` where the fault is ours, else `ok`. That a request is picked by load alone is none.
    pub const STATUS_CODE: &str = "otel.status_code";
    /// Name of the gRPC status that the stream ended with.
    pub const RPC_STATUS_CODE: &str = "rpc.response.status_code";
    /// Kind of the error, where it is ours.
    pub const ERROR_TYPE: &str = "error.type";
    /// The model, alias or adapter that the client named, where it is one of ours; else the pool's model.
    pub const REQUEST_MODEL: &str = "gen_ai.request.model";
    /// `chat` or `text_completion`, as the GenAI conventions name them, or `other`: they allow a value of one's own where
    /// none of theirs applies. It stands for all paths whose requests we do not read, embeddings among them.
    pub const OPERATION_NAME: &str = "gen_ai.operation.name";
    /// Tokens of the prompt.
    pub const INPUT_TOKENS: &str = "gen_ai.usage.input_tokens";
    /// Status of the response, as Envoy shows it to us.
    pub const RESPONSE_STATUS_CODE: &str = "http.response.status_code";
    /// Model of the pool that the request was routed in.
    pub const POOL: &str = "warmroute.pool";
    /// [`Outcome`](crate::routing::pick::Outcome) of the decision.
    pub const DECISION_OUTCOME: &str = "warmroute.decision.outcome";
    /// Why the decision rests on load alone, or why there is none.
    pub const DECISION_FALLBACK: &str = "warmroute.decision.fallback";
    /// `ip:port` of the endpoint that was picked.
    pub const ENDPOINT_PICKED: &str = "warmroute.endpoint.picked";
    /// `ip:port` of the endpoint that served the request.
    pub const ENDPOINT_SERVED: &str = "warmroute.endpoint.served";
    /// [`Policy`](crate::routing::pick::Policy) that ordered the candidates.
    pub const POLICY: &str = "warmroute.decision.policy";
    /// Endpoints that could have been picked.
    pub const CANDIDATES: &str = "warmroute.candidates";
    /// Endpoints that are avoided.
    pub const AVOIDED: &str = "warmroute.candidates.avoided";
    /// Tokens that the picked endpoint was to hold by earlier picks alone.
    pub const PROMISED_TOKENS: &str = "warmroute.promised_tokens";
    /// Requests that the picked endpoint had before this one.
    pub const IN_FLIGHT: &str = "warmroute.in_flight";
    /// `ip:port` of the next best endpoint.
    pub const RUNNER_UP: &str = "warmroute.runner_up.endpoint";
    /// Tokens of the prompt that it holds.
    pub const RUNNER_UP_MATCHED_TOKENS: &str = "warmroute.runner_up.matched_tokens";
    /// Requests that it had.
    pub const RUNNER_UP_IN_FLIGHT: &str = "warmroute.runner_up.in_flight";
    /// Whether it had so many that what it holds did not count.
    pub const RUNNER_UP_TOO_FAR_AHEAD: &str = "warmroute.runner_up.is_too_far_ahead";
    /// Data-parallel rank whose blocks were credited.
    pub const RANK: &str = "warmroute.rank";
    /// Tokens of the prompt that the picked endpoint holds.
    pub const MATCHED_TOKENS: &str = "warmroute.matched_tokens";
    /// Those of them that lie outside the GPU's memory.
    pub const OFFLOADED_TOKENS: &str = "warmroute.offloaded_tokens";
    /// Full blocks of the prompt that were looked up.
    pub const PROMPT_BLOCKS: &str = "warmroute.prompt_blocks";
    /// Whether Envoy was told the pick: `active`, or `shadow` where it was not.
    pub const ROLLOUT_MODE: &str = "warmroute.rollout.mode";
    /// Attempts that Envoy made.
    pub const ATTEMPTS: &str = "warmroute.attempts";
}

/// Share of the requests without a trace context that are sampled; all of them unless told otherwise. One per process,
/// as is the subscriber that takes the spans.
static ROOT_RATIO: OnceLock<f64> = OnceLock::new();

/// Samples this share of the requests that have no trace context, 0 to 1. The first call decides.
pub(super) fn sample_roots(ratio: f64) {
    ROOT_RATIO.get_or_init(|| ratio);
}

/// Whether one of the requests is sampled of which this share is.
fn is_drawn(ratio: f64) -> bool {
    // Below 1, always.
    fastrand::f64() < ratio
}

/// The span of one ext_proc stream. It ends with the stream, whatever is still under way below it: what is learned
/// after the answer keeps it in memory, not open.
#[derive(Debug)]
pub struct RequestSpan {
    span: Span,
    is_ended: bool,
}

/// Opens the span of one ext_proc stream, named `warmroute.route`, as a child of the trace context in the stream's
/// metadata, or as a root when there is none. It is disabled where the request is not sampled.
///
/// Attributes to record once they are known, with [`Span::record`] and the names in [`attribute`].
pub fn request_span(metadata: &MetadataMap) -> RequestSpan {
    let parent =
        metadata.contains_key("traceparent").then(|| TraceContextPropagator::new().extract(&Metadata(metadata)));
    let is_sampled = parent.as_ref().and_then(|parent| {
        let parent = parent.span();
        parent.span_context().is_valid().then(|| parent.span_context().is_sampled())
    });
    if !is_sampled.unwrap_or_else(|| is_drawn(*ROOT_RATIO.get().unwrap_or(&1.0))) {
        return RequestSpan { span: Span::none(), is_ended: true };
    }
    let span = declared();
    if let Some(parent) = parent {
        // Fails when spans are not exported or this one is filtered out: there is nothing to link then.
        let _ = span.set_parent(parent);
    }
    // Starts it, and the sampler decides.
    let is_sampled = !span.is_disabled() && span.context().span().span_context().is_sampled();
    let span = if is_sampled { span } else { Span::none() };
    RequestSpan { is_ended: !is_sampled, span }
}

fn declared() -> Span {
    info_span!(
        "warmroute.route",
        otel.kind = "server",
        rpc.system.name = "grpc",
        rpc.method = "envoy.service.ext_proc.v3.ExternalProcessor/Process",
        gen_ai.provider.name = "vllm",
        otel.status_code = Empty,
        rpc.response.status_code = Empty,
        error.type = Empty,
        gen_ai.request.model = Empty,
        gen_ai.operation.name = Empty,
        gen_ai.usage.input_tokens = Empty,
        http.response.status_code = Empty,
        warmroute.pool = Empty,
        warmroute.decision.outcome = Empty,
        warmroute.decision.fallback = Empty,
        warmroute.endpoint.picked = Empty,
        warmroute.endpoint.served = Empty,
        warmroute.decision.policy = Empty,
        warmroute.candidates = Empty,
        warmroute.candidates.avoided = Empty,
        warmroute.promised_tokens = Empty,
        warmroute.in_flight = Empty,
        warmroute.runner_up.endpoint = Empty,
        warmroute.runner_up.matched_tokens = Empty,
        warmroute.runner_up.in_flight = Empty,
        warmroute.runner_up.is_too_far_ahead = Empty,
        warmroute.rank = Empty,
        warmroute.matched_tokens = Empty,
        warmroute.offloaded_tokens = Empty,
        warmroute.prompt_blocks = Empty,
        warmroute.rollout.mode = Empty,
        warmroute.attempts = Empty,
    )
}

impl RequestSpan {
    /// Records the terms of the decision.
    pub fn decided(&self, decision: &Decision) {
        if self.span.is_disabled() {
            return;
        }
        let Decision { model, requested, policy, pick, outcome, prompt_tokens, .. } = decision;
        let record = |name, n: u32| self.span.record(name, i64::from(n));
        self.span.record(attribute::REQUEST_MODEL, &**requested);
        self.span.record(attribute::POOL, &**model);
        self.span.record(attribute::DECISION_OUTCOME, outcome.as_str());
        if let Outcome::Fallback(fallback) = outcome {
            self.span.record(attribute::DECISION_FALLBACK, fallback.as_str());
        }
        self.span.record(attribute::POLICY, policy.as_str());
        self.span.record(attribute::ENDPOINT_PICKED, display(pick.endpoint.address));
        if let Some(rank) = pick.rank {
            record(attribute::RANK, rank);
        }
        record(attribute::INPUT_TOKENS, *prompt_tokens);
        record(attribute::PROMPT_BLOCKS, decision.prompt_blocks);
        record(attribute::MATCHED_TOKENS, pick.matched_tokens);
        record(attribute::OFFLOADED_TOKENS, pick.offloaded_tokens);
        record(attribute::CANDIDATES, decision.n_candidates);
        record(attribute::AVOIDED, decision.n_avoided);
        if let Some(first) = decision.standings.first() {
            record(attribute::PROMISED_TOKENS, first.promised_tokens);
            record(attribute::IN_FLIGHT, first.in_flight);
        }
        if let Some(second) = decision.runner_up() {
            self.span.record(attribute::RUNNER_UP, display(second.endpoint));
            record(attribute::RUNNER_UP_MATCHED_TOKENS, second.matched_tokens);
            record(attribute::RUNNER_UP_IN_FLIGHT, second.in_flight);
            self.span.record(attribute::RUNNER_UP_TOO_FAR_AHEAD, second.is_too_far_ahead);
        }
    }

    /// Ends it with the status of the stream; what is recorded later is lost.
    pub fn end(&mut self, code: Code) {
        if std::mem::replace(&mut self.is_ended, true) {
            return;
        }
        let name = code_name(code);
        self.span.record(attribute::RPC_STATUS_CODE, name);
        if is_our_fault(code) {
            self.span.record(attribute::ERROR_TYPE, name);
            self.span.record(attribute::STATUS_CODE, "error");
        } else {
            self.span.record(attribute::STATUS_CODE, "ok");
        }
        end(&self.span);
    }
}

impl Deref for RequestSpan {
    type Target = Span;

    fn deref(&self) -> &Span {
        &self.span
    }
}

impl Drop for RequestSpan {
    /// The stream was cut off before its end: mostly because the client has left.
    fn drop(&mut self) {
        self.end(Code::Cancelled);
    }
}

/// The span of one step of a decision; it ends when it is dropped, also where something below it goes on.
#[derive(Debug)]
pub struct StageSpan(Span);

impl StageSpan {
    /// Opens it below the current span; disabled where that is, or where there is none.
    pub fn open(stage: Stage) -> Self {
        if Span::current().is_disabled() {
            return Self(Span::none());
        }
        Self(match stage {
            Stage::Parse => info_span!("warmroute.parse"),
            Stage::Tokenize => info_span!("warmroute.tokenize", error.type = Empty),
            Stage::Hash => info_span!("warmroute.hash"),
            Stage::Lookup => info_span!("warmroute.lookup"),
            Stage::Pick => info_span!("warmroute.score"),
        })
    }

    /// Does `step` within it.
    pub fn within<T>(&self, step: impl FnOnce() -> T) -> T {
        self.0.in_scope(step)
    }

    /// Does `work` within it.
    pub async fn during<T>(&self, work: impl Future<Output = T>) -> T {
        work.instrument(self.0.clone()).await
    }
}

/// Records, within the span of a step, why it has failed, by the name that the metrics have for it.
pub fn stage_failed(reason: &'static str) {
    Span::current().record(attribute::ERROR_TYPE, reason);
}

impl Drop for StageSpan {
    fn drop(&mut self) {
        end(&self.0);
    }
}

/// Ends a span now. Its own end would wait for those below it, which it is not to be measured by.
fn end(span: &Span) {
    if !span.is_disabled() {
        span.context().span().end();
    }
}

/// Whether a server's span is in error with this status (semantic conventions for gRPC).
fn is_our_fault(code: Code) -> bool {
    use Code::{DataLoss, DeadlineExceeded, Internal, Unavailable, Unimplemented, Unknown};
    matches!(code, Unknown | DeadlineExceeded | Unimplemented | Internal | Unavailable | DataLoss)
}

/// The status as the semantic conventions for gRPC write it.
fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

/// Reads the trace context from gRPC metadata.
struct Metadata<'a>(&'a MetadataMap);

impl Extractor for Metadata<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        let ascii = |key| match key {
            KeyRef::Ascii(key) => Some(key.as_str()),
            KeyRef::Binary(_) => None,
        };
        self.0.keys().filter_map(ascii).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use opentelemetry::trace::{Status, TracerProvider as _};
    use opentelemetry_sdk::error::OTelSdkResult;
    use opentelemetry_sdk::trace::{SdkTracerProvider, SpanData, SpanExporter};
    use tracing_subscriber::layer::SubscriberExt as _;

    use super::*;

    #[derive(Clone, Debug, Default)]
    struct Ended(Arc<Mutex<Vec<SpanData>>>);

    impl SpanExporter for Ended {
        async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
            self.0.lock().expect("no panic").extend(batch);
            Ok(())
        }
    }

    /// Does `work` where all spans are exported, telling it how many have ended, and returns them.
    fn exported(work: impl FnOnce(&dyn Fn() -> usize)) -> Vec<SpanData> {
        let ended = Ended::default();
        let provider = SdkTracerProvider::builder().with_simple_exporter(ended.clone()).build();
        let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("test"));
        let n_ended = || ended.0.lock().expect("no panic").len();
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || work(&n_ended));
        std::mem::take(&mut *ended.0.lock().expect("no panic"))
    }

    fn text(span: &SpanData, key: &str) -> Option<String> {
        span.attributes.iter().find(|found| found.key.as_str() == key).map(|found| found.value.to_string())
    }

    #[test]
    fn every_attribute_name_is_declared_by_the_span() {
        exported(|_| {
            let span = request_span(&MetadataMap::new());
            for name in [
                attribute::STATUS_CODE,
                attribute::RPC_STATUS_CODE,
                attribute::ERROR_TYPE,
                attribute::REQUEST_MODEL,
                attribute::OPERATION_NAME,
                attribute::INPUT_TOKENS,
                attribute::RESPONSE_STATUS_CODE,
                attribute::POOL,
                attribute::DECISION_OUTCOME,
                attribute::DECISION_FALLBACK,
                attribute::ENDPOINT_PICKED,
                attribute::ENDPOINT_SERVED,
                attribute::POLICY,
                attribute::CANDIDATES,
                attribute::AVOIDED,
                attribute::PROMISED_TOKENS,
                attribute::IN_FLIGHT,
                attribute::RUNNER_UP,
                attribute::RUNNER_UP_MATCHED_TOKENS,
                attribute::RUNNER_UP_IN_FLIGHT,
                attribute::RUNNER_UP_TOO_FAR_AHEAD,
                attribute::RANK,
                attribute::MATCHED_TOKENS,
                attribute::OFFLOADED_TOKENS,
                attribute::PROMPT_BLOCKS,
                attribute::ROLLOUT_MODE,
                attribute::ATTEMPTS,
            ] {
                assert!(span.has_field(name), "{name}");
            }
        });
    }

    #[test]
    fn status_is_an_error_only_where_the_fault_is_ours() {
        for (code, expected, name) in [
            (Some(Code::Ok), Status::Ok, "OK"),
            (None, Status::Ok, "CANCELLED"),
            (Some(Code::FailedPrecondition), Status::Ok, "FAILED_PRECONDITION"),
            (Some(Code::Internal), Status::error(""), "INTERNAL"),
        ] {
            let spans = exported(|_| {
                let mut span = request_span(&MetadataMap::new());
                if let Some(code) = code {
                    span.end(code);
                }
            });
            assert_eq!((spans.len(), &spans[0].status), (1, &expected), "{code:?}");
            assert_eq!(text(&spans[0], attribute::RPC_STATUS_CODE).as_deref(), Some(name));
            let error = text(&spans[0], attribute::ERROR_TYPE);
            assert_eq!(error.as_deref(), matches!(expected, Status::Error { .. }).then_some(name));
        }
    }

    #[test]
    fn spans_end_in_time_while_something_below_them_goes_on() {
        let spans = exported(|n_ended| {
            let request = request_span(&MetadataMap::new());
            let stage = request.in_scope(|| StageSpan::open(Stage::Tokenize));
            let late = stage.within(|| info_span!("late"));
            drop(stage);
            assert_eq!(n_ended(), 1, "the step has ended");
            drop(request);
            assert_eq!(n_ended(), 2, "the request has ended");
            drop(late);
        });
        let names: Vec<_> = spans.iter().map(|span| &*span.name).collect();
        assert_eq!(names, ["warmroute.tokenize", "warmroute.route", "late"]);
        let [stage, request, late] = &spans[..] else { panic!("three spans") };
        assert_eq!(stage.parent_span_id, request.span_context.span_id());
        assert_eq!(late.parent_span_id, stage.span_context.span_id());
        assert!(late.end_time >= request.end_time);
    }

    #[test]
    fn requests_are_drawn_by_their_share() {
        let n_drawn = |ratio| (0..10_000).filter(|_| is_drawn(ratio)).count();
        assert_eq!((n_drawn(0.0), n_drawn(1.0)), (0, 10_000));
        let few = n_drawn(0.1);
        assert!((700..1_300).contains(&few), "{few} of 10,000 at 0.1");
    }

    #[test]
    fn nothing_is_made_below_a_request_that_is_not_sampled() {
        let mut metadata = MetadataMap::new();
        metadata.insert(
            "traceparent",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00".parse().expect("metadata"),
        );
        let spans = exported(|_| {
            let request = request_span(&metadata);
            assert!(request.is_disabled());
            request.in_scope(|| assert!(StageSpan::open(Stage::Parse).0.is_disabled()));
        });
        assert!(spans.is_empty(), "{spans:?}");
    }
}
