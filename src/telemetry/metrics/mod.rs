//! All instruments of the process, on one registry.
//!
//! What lives as long as the process (decisions, streams, reasons) is counted here, through a method per
//! instrument. What lives as long as an endpoint or an event source is read from its owner at the scrape, as
//! [`EndpointRow`]s and [`SourceRow`]s, so that a series leaves together with the thing it describes.
//!
//! Labels are enums, `&'static str`s that an enum of another module yields, or model names from the
//! configuration; the number of series is therefore bounded by the configuration. Every name carries the
//! prefix `warmroute_`; the encoder appends `_total` to counters and the unit to histograms.
//!
//! Counting costs a read lock and an atomic add, observing a duration a short mutex; nothing allocates after
//! the first use of a label set.

mod discovery;
mod rows;
mod tokenizers;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::encoding::text;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

use crate::routing::pick::Outcome;
pub use discovery::DiscoveryChanges;
use discovery::Instruments;
use rows::Rows;
pub use rows::{EndpointRow, EventPlaneRow, PromiseRow, ReadRows, SourceRow};
pub use tokenizers::TokenizerRow;

/// Media type of [`Metrics::encode`]'s text.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Shortest duration that a histogram tells apart: below it, a decision is as fast as it needs to be.
const SHORTEST_BUCKET_SECONDS: f64 = 20e-6;
/// Doublings from 20 µs up to 2.6 s, which is beyond every budget that a request has.
const N_BUCKETS: u16 = 18;
/// Shortest lag that is told apart: a batch crosses a loopback socket in less.
const SHORTEST_LAG_SECONDS: f64 = 100e-6;
/// Doublings from 100 µs up to 26 s.
const N_LAG_BUCKETS: u16 = 19;

/// The instruments of the process.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    decisions: Family<DecisionLabels, Counter>,
    fallbacks: Family<ReasonLabels, Counter>,
    decision_duration: Histogram,
    stage_duration: Family<StageLabels, Histogram>,
    event_lag: Histogram,
    matched_tokens: Family<ModelLabels, Counter>,
    prompt_tokens: Family<ModelLabels, Counter>,
    left_to_envoy: Family<ReasonLabels, Counter>,
    immediate_responses: Family<ReasonLabels, Counter>,
    streams: Counter,
    streams_in_flight: Gauge,
    stream_panics: Counter,
    misconfigured_streams: Family<ModeLabels, Counter>,
    full_reports_requested: Family<ModelLabels, Counter>,
    picks_not_served: Family<NotServedLabels, Counter>,
    endpoint_avoided: Family<ModelLabels, Counter>,
    event_sources_refused: Family<ModelLabels, Counter>,
    discovery: Instruments,
    snapshots: Family<SnapshotLabels, Counter>,
    snapshot_failures: Family<SnapshotLabels, Counter>,
    snapshot_bytes: Family<SnapshotLabels, Counter>,
    endpoint_rows: Arc<Rows<EndpointRow>>,
    source_rows: Arc<Rows<SourceRow>>,
    event_plane_rows: Arc<Rows<EventPlaneRow>>,
    tokenizer_rows: Arc<Rows<TokenizerRow>>,
    promise_rows: Arc<Rows<PromiseRow>>,
}

/// A step of the request path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Reading the request body.
    Parse,
    /// Getting the prompt's token ids.
    Tokenize,
    /// Hashing the token ids into block hashes.
    Hash,
    /// Asking the index.
    Lookup,
    /// Scoring the endpoints and picking one.
    Pick,
}

/// Why another endpoint than the picked one served a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NotServedCause {
    /// Envoy gave up on the picked endpoint and retried elsewhere.
    Retried,
    /// Envoy went elsewhere at once: our endpoints and its cluster differ.
    OtherEndpoint,
}

/// What happens to snapshots of event sources.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SnapshotStep {
    /// Written to disk.
    Write,
    /// Loaded from disk, and offered to its source.
    Load,
    /// Fetched from a sibling, and offered to its source.
    Fetch,
    /// Given to a sibling.
    Serve,
}

/// An open stream; dropping it ends the count in `streams_in_flight`.
#[derive(Debug)]
pub struct StreamInFlight {
    streams_in_flight: Gauge,
}

impl Metrics {
    /// Registers all instruments.
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("warmroute");
        let r = &mut registry;
        r.register("build", "Version of the running program", build_info());
        let endpoint_rows = Arc::<Rows<EndpointRow>>::default();
        let source_rows = Arc::<Rows<SourceRow>>::default();
        r.register_collector(Box::new(Arc::clone(&endpoint_rows)));
        r.register_collector(Box::new(Arc::clone(&source_rows)));
        let event_plane_rows = Arc::<Rows<EventPlaneRow>>::default();
        r.register_collector(Box::new(Arc::clone(&event_plane_rows)));
        let tokenizer_rows = Arc::<Rows<TokenizerRow>>::default();
        r.register_collector(Box::new(Arc::clone(&tokenizer_rows)));
        let promise_rows = Arc::<Rows<PromiseRow>>::default();
        r.register_collector(Box::new(Arc::clone(&promise_rows)));
        Self {
            decisions: add(r, "decisions", "Picks, by what they rested on"),
            fallbacks: add(r, "fallbacks", "Picks by load alone, by what kept the index out"),
            decision_duration: add_seconds(
                r,
                "decision_duration",
                "Time from the complete request body to the pick",
                histogram(),
            ),
            stage_duration: add_seconds(
                r,
                "stage_duration",
                "Time that one step of a pick took",
                Family::new_with_constructor(histogram as fn() -> Histogram),
            ),
            matched_tokens: add(r, "matched_tokens", "Prompt tokens held by the picked endpoint"),
            prompt_tokens: add(r, "prompt_tokens", "Prompt tokens of picks that knew them"),
            event_lag: add_seconds(
                r,
                "event_lag",
                "Time from the engine's clock in a live KV event batch to the index, clocks of two machines included",
                Histogram::new(exponential_buckets(SHORTEST_LAG_SECONDS, 2.0, N_LAG_BUCKETS)),
            ),
            left_to_envoy: add(r, "left_to_envoy", "Requests passed on for Envoy's policy to pick"),
            immediate_responses: add(r, "immediate_responses", "Requests answered with an error"),
            streams: add(r, "streams", "ext_proc streams opened by Envoy"),
            streams_in_flight: add(r, "streams_in_flight", "ext_proc streams that are open"),
            stream_panics: add(r, "stream_panics", "ext_proc streams ended by a panic of ours"),
            misconfigured_streams: add(
                r,
                "misconfigured_streams",
                "ext_proc streams whose body modes show no whole prompt before the pick, or end before the answer",
            ),
            full_reports_requested: add(
                r,
                "full_reports_requested",
                "Requests that had their engine announce the blocks that it reused",
            ),
            picks_not_served: add(r, "picks_not_served", "Picks that did not serve at the first attempt"),
            event_sources_refused: add(
                r,
                "event_sources_refused",
                "Addresses of KV events that endpoints named and that are not their own",
            ),
            endpoint_avoided: add(r, "endpoint_avoided", "Times an endpoint began to be avoided"),
            discovery: Instruments::register(r),
            snapshots: add(
                r,
                "snapshots",
                "Snapshots of event sources written, served, or loaded or fetched and offered",
            ),
            snapshot_failures: add(
                r,
                "snapshot_failures",
                "Snapshots of event sources that could not be used, by step",
            ),
            snapshot_bytes: add(r, "snapshot_bytes", "Bytes of the snapshots of event sources, by step"),
            endpoint_rows,
            source_rows,
            event_plane_rows,
            tokenizer_rows,
            promise_rows,
            registry,
        }
    }

    /// All instruments in the OpenMetrics text format; [`CONTENT_TYPE`] is its media type.
    pub fn encode(&self) -> String {
        let mut text = String::new();
        text::encode(&mut text, &self.registry).expect("writing to a String cannot fail");
        text
    }

    /// Makes a pool's series exist at zero, so that the first increment is visible as one.
    pub fn add_model(&self, model: &Arc<str>) {
        for outcome in Outcome::NAMES {
            let labels = DecisionLabels { model: Arc::clone(model), outcome };
            drop(self.decisions.get_or_create(&labels));
        }
        let labels = ModelLabels { model: Arc::clone(model) };
        drop(self.matched_tokens.get_or_create(&labels));
        drop(self.prompt_tokens.get_or_create(&labels));
        drop(self.endpoint_avoided.get_or_create(&labels));
        drop(self.full_reports_requested.get_or_create(&labels));
        drop(self.event_sources_refused.get_or_create(&labels));
        self.add_discovery(model);
    }

    /// Counts a pick in `decisions_total`.
    pub fn count_decision(&self, model: &Arc<str>, outcome: &Outcome) {
        let labels = DecisionLabels { model: Arc::clone(model), outcome: outcome.as_str() };
        self.decisions.get_or_create(&labels).inc();
    }

    /// Counts a pick by load alone in `fallbacks_total`; `reason` is the fallback's name.
    pub fn count_fallback(&self, reason: &'static str) {
        self.fallbacks.get_or_create(&ReasonLabels { reason }).inc();
    }

    /// Records how long a live KV event batch was on its way to the index.
    pub fn observe_event_lag(&self, lag: Duration) {
        self.event_lag.observe(lag.as_secs_f64());
    }

    /// Records how long a pick took in all.
    pub fn observe_decision(&self, duration: Duration) {
        self.decision_duration.observe(duration.as_secs_f64());
    }

    /// Records how long one step of a pick took.
    pub fn observe_stage(&self, stage: Stage, duration: Duration) {
        self.stage_duration.get_or_create(&StageLabels { stage }).observe(duration.as_secs_f64());
    }

    /// Counts the tokens of a prompt, and those of them that the picked endpoint held.
    pub fn count_tokens(&self, model: &Arc<str>, n_prompt: u64, n_matched: u64) {
        let labels = ModelLabels { model: Arc::clone(model) };
        self.prompt_tokens.get_or_create(&labels).inc_by(n_prompt);
        self.matched_tokens.get_or_create(&labels).inc_by(n_matched);
    }

    /// Counts a request that was passed on without a pick.
    pub fn count_left_to_envoy(&self, reason: &'static str) {
        self.left_to_envoy.get_or_create(&ReasonLabels { reason }).inc();
    }

    /// Counts a request that was answered with an error of ours.
    pub fn count_immediate_response(&self, reason: &'static str) {
        self.immediate_responses.get_or_create(&ReasonLabels { reason }).inc();
    }

    /// Counts a stream, and holds it in `streams_in_flight` until the value is dropped.
    pub fn open_stream(&self) -> StreamInFlight {
        self.streams.inc();
        self.streams_in_flight.inc();
        StreamInFlight { streams_in_flight: self.streams_in_flight.clone() }
    }

    /// Counts a stream that a panic of ours ended.
    pub fn count_stream_panic(&self) {
        self.stream_panics.inc();
    }

    /// Counts a stream whose body modes are of no use; `mode` is Envoy's name of the one at fault.
    pub fn count_misconfigured_stream(&self, mode: &'static str) {
        self.misconfigured_streams.get_or_create(&ModeLabels { mode }).inc();
    }

    /// Counts a request whose engine was asked to announce the blocks that it reuses.
    pub fn count_full_report(&self, model: &Arc<str>) {
        self.full_reports_requested.get_or_create(&ModelLabels { model: Arc::clone(model) }).inc();
    }

    /// Counts a request that another endpoint than the picked one served.
    pub fn count_pick_not_served(&self, model: &Arc<str>, cause: NotServedCause) {
        let labels = NotServedLabels { model: Arc::clone(model), cause };
        self.picks_not_served.get_or_create(&labels).inc();
    }

    /// Counts that an endpoint began to be avoided.
    pub fn count_endpoint_avoided(&self, model: &Arc<str>) {
        self.endpoint_avoided.get_or_create(&ModelLabels { model: Arc::clone(model) }).inc();
    }

    /// Counts addresses of KV events that an endpoint named and that are not its own.
    pub fn count_event_sources_refused(&self, model: &Arc<str>, n_addresses: u64) {
        self.event_sources_refused.get_or_create(&ModelLabels { model: Arc::clone(model) }).inc_by(n_addresses);
    }

    /// Counts a step that a snapshot took, and its bytes.
    pub fn count_snapshot(&self, step: SnapshotStep, n_bytes: u64) {
        self.snapshots.get_or_create(&SnapshotLabels { step }).inc();
        self.snapshot_bytes.get_or_create(&SnapshotLabels { step }).inc_by(n_bytes);
    }

    /// Counts a step that failed.
    pub fn count_snapshot_failure(&self, step: SnapshotStep) {
        self.snapshot_failures.get_or_create(&SnapshotLabels { step }).inc();
    }

    /// Sets where the per-endpoint series are read from.
    ///
    /// # Panics
    ///
    /// When called twice: there is one owner of the endpoints.
    pub fn set_endpoint_collector(&self, read: ReadRows<EndpointRow>) {
        self.endpoint_rows.set(read);
    }

    /// Sets where the per-source series are read from.
    ///
    /// # Panics
    ///
    /// When called twice: there is one owner of the sources.
    pub fn set_source_collector(&self, read: ReadRows<SourceRow>) {
        self.source_rows.set(read);
    }

    /// Sets where the series of the event plane as a whole are read from: one row.
    ///
    /// # Panics
    ///
    /// When called twice: there is one event plane.
    pub fn set_event_plane_collector(&self, read: ReadRows<EventPlaneRow>) {
        self.event_plane_rows.set(read);
    }

    /// Lets each scrape read what is promised.
    ///
    /// # Panics
    ///
    /// When called twice.
    pub fn set_promise_collector(&self, read: ReadRows<PromiseRow>) {
        self.promise_rows.set(read);
    }

    /// Lets each scrape read the models' tokenizers.
    ///
    /// # Panics
    ///
    /// When called twice.
    pub fn set_tokenizer_collector(&self, read: ReadRows<TokenizerRow>) {
        self.tokenizer_rows.set(read);
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for StreamInFlight {
    fn drop(&mut self) {
        self.streams_in_flight.dec();
    }
}

impl Stage {
    /// The label's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Parse => "parse",
            Self::Tokenize => "tokenize",
            Self::Hash => "hash",
            Self::Lookup => "lookup",
            Self::Pick => "pick",
        }
    }
}

impl NotServedCause {
    /// The label's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Retried => "retried",
            Self::OtherEndpoint => "other_endpoint",
        }
    }
}

impl SnapshotStep {
    /// The label's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Write => "write",
            Self::Load => "load",
            Self::Fetch => "fetch",
            Self::Serve => "serve",
        }
    }
}

impl EncodeLabelValue for SnapshotStep {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        self.as_str().encode(encoder)
    }
}

impl EncodeLabelValue for Stage {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        self.as_str().encode(encoder)
    }
}

impl EncodeLabelValue for NotServedCause {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        self.as_str().encode(encoder)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DecisionLabels {
    model: Arc<str>,
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabels {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StageLabels {
    stage: Stage,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SnapshotLabels {
    step: SnapshotStep,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ModelLabels {
    model: Arc<str>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ModeLabels {
    mode: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct NotServedLabels {
    model: Arc<str>,
    cause: NotServedCause,
}

fn add<M>(registry: &mut Registry, name: &str, help: &str) -> M
where
    M: prometheus_client::registry::Metric + Clone + Default,
{
    let metric = M::default();
    registry.register(name, help, metric.clone());
    metric
}

fn add_seconds<M>(registry: &mut Registry, name: &str, help: &str, metric: M) -> M
where
    M: prometheus_client::registry::Metric + Clone,
{
    registry.register_with_unit(name, help, Unit::Seconds, metric.clone());
    metric
}

fn histogram() -> Histogram {
    Histogram::new(exponential_buckets(SHORTEST_BUCKET_SECONDS, 2.0, N_BUCKETS))
}

fn build_info() -> Info<[(&'static str, &'static str); 1]> {
    Info::new([("version", env!("CARGO_PKG_VERSION"))])
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    fn model() -> Arc<str> {
        Arc::from("llama")
    }

    fn endpoint_row(port: u16, n_in_flight: u64) -> EndpointRow {
        EndpointRow { model: model(), endpoint: SocketAddr::from(([10, 0, 0, 1], port)), n_in_flight }
    }

    fn source_row() -> SourceRow {
        SourceRow {
            model: model(),
            endpoint: SocketAddr::from(([10, 0, 0, 1], 8000)),
            rank: 1,
            state: "live",
            proved: true,
            n_blocks: 7,
            n_batches: 6,
            n_stored: 5,
            n_removed: 4,
            n_cleared: 3,
            n_gaps: 2,
            n_replays: 1,
            n_decode_failures: 8,
            n_skipped: 9,
            n_refused: 10,
            n_quarantines: 11,
            n_panics: 12,
            n_generations: 13,
        }
    }

    #[track_caller]
    fn assert_line(text: &str, line: &str) {
        assert!(text.lines().any(|found| found == line), "no line {line:?} in:\n{text}");
    }

    #[test]
    fn counts_appear_under_their_labels() {
        let metrics = Metrics::new();
        metrics.count_decision(&model(), &Outcome::PrefixMatch);
        metrics.count_decision(&model(), &Outcome::PrefixMatch);
        metrics.count_fallback("tokenizer_timeout");
        metrics.count_tokens(&model(), 100, 64);
        metrics.count_left_to_envoy("unknown_model");
        metrics.count_immediate_response("no_endpoint");
        metrics.count_stream_panic();
        metrics.count_misconfigured_stream("STREAMED");
        metrics.count_pick_not_served(&model(), NotServedCause::OtherEndpoint);
        metrics.count_endpoint_avoided(&model());
        metrics.count_event_sources_refused(&model(), 2);
        metrics.count_listing(&model(), 3, [("added", 3), ("left", 0), ("moved", 0)]);
        metrics.count_snapshot(SnapshotStep::Write, 100);
        metrics.count_snapshot_failure(SnapshotStep::Fetch);

        let text = metrics.encode();
        for line in [
            r#"warmroute_decisions_total{model="llama",outcome="prefix_match"} 2"#,
            r#"warmroute_fallbacks_total{reason="tokenizer_timeout"} 1"#,
            r#"warmroute_prompt_tokens_total{model="llama"} 100"#,
            r#"warmroute_matched_tokens_total{model="llama"} 64"#,
            r#"warmroute_left_to_envoy_total{reason="unknown_model"} 1"#,
            r#"warmroute_immediate_responses_total{reason="no_endpoint"} 1"#,
            "warmroute_stream_panics_total 1",
            r#"warmroute_misconfigured_streams_total{mode="STREAMED"} 1"#,
            r#"warmroute_picks_not_served_total{model="llama",cause="other_endpoint"} 1"#,
            r#"warmroute_endpoint_avoided_total{model="llama"} 1"#,
            r#"warmroute_event_sources_refused_total{model="llama"} 2"#,
            r#"warmroute_endpoints{model="llama"} 3"#,
            r#"warmroute_snapshots_total{step="write"} 1"#,
            r#"warmroute_snapshot_bytes_total{step="write"} 100"#,
            r#"warmroute_snapshot_failures_total{step="fetch"} 1"#,
            concat!(r#"warmroute_build_info{version=""#, env!("CARGO_PKG_VERSION"), r#""} 1"#),
            "# EOF",
        ] {
            assert_line(&text, line);
        }
    }

    #[test]
    fn durations_fall_into_buckets_from_20_microseconds_to_2_seconds() {
        let metrics = Metrics::new();
        metrics.observe_decision(Duration::from_micros(15));
        metrics.observe_decision(Duration::from_millis(2500));
        metrics.observe_stage(Stage::Lookup, Duration::from_micros(30));

        let text = metrics.encode();
        assert_line(&text, r#"warmroute_decision_duration_seconds_bucket{le="0.00002"} 1"#);
        assert_line(&text, r#"warmroute_decision_duration_seconds_bucket{le="2.62144"} 2"#);
        assert_line(&text, r#"warmroute_stage_duration_seconds_count{stage="lookup"} 1"#);
    }

    #[test]
    fn added_model_has_its_series_at_zero() {
        let metrics = Metrics::new();
        metrics.add_model(&model());

        let text = metrics.encode();
        assert_line(&text, r#"warmroute_decisions_total{model="llama",outcome="no_match"} 0"#);
        assert_line(&text, r#"warmroute_endpoints{model="llama"} 0"#);
    }

    #[test]
    fn open_stream_is_in_flight_until_it_is_dropped() {
        let metrics = Metrics::new();
        let stream = metrics.open_stream();
        assert_line(&metrics.encode(), "warmroute_streams_in_flight 1");

        drop(stream);

        let text = metrics.encode();
        assert_line(&text, "warmroute_streams_in_flight 0");
        assert_line(&text, "warmroute_streams_total 1");
    }

    #[test]
    fn series_of_an_endpoint_leave_with_it() {
        let metrics = Metrics::new();
        let rows = Arc::new(std::sync::Mutex::new(vec![endpoint_row(8000, 2), endpoint_row(8001, 0)]));
        let reader = Arc::clone(&rows);
        metrics.set_endpoint_collector(Box::new(move || reader.lock().unwrap().clone()));
        assert_line(&metrics.encode(), r#"warmroute_endpoint_in_flight{model="llama",endpoint="10.0.0.1:8000"} 2"#);

        rows.lock().unwrap().remove(0);

        let text = metrics.encode();
        assert!(!text.contains("10.0.0.1:8000"), "{text}");
        assert_line(&text, r#"warmroute_endpoint_in_flight{model="llama",endpoint="10.0.0.1:8001"} 0"#);
    }

    #[test]
    fn event_plane_has_its_series_without_labels() {
        let metrics = Metrics::new();
        metrics.set_event_plane_collector(Box::new(|| vec![EventPlaneRow { n_foreign_messages: 3, n_replays: 2 }]));

        let text = metrics.encode();
        assert_line(&text, "warmroute_event_foreign_messages_total 3");
        assert_line(&text, "warmroute_event_replays_in_flight 2");
    }

    #[test]
    fn what_is_promised_has_its_series() {
        let metrics = Metrics::new();
        let row = PromiseRow { model: "m".into(), n_blocks: 3, n_evicted: 2 };
        metrics.set_promise_collector(Box::new(move || vec![row.clone()]));
        let text = metrics.encode();
        assert_line(&text, r#"warmroute_promised_blocks{model="m"} 3"#);
        assert_line(&text, r#"warmroute_promised_blocks_evicted_total{model="m"} 2"#);
    }

    #[test]
    fn tokenizers_have_their_series() {
        let metrics = Metrics::new();
        let row = TokenizerRow {
            model: "m".into(),
            n_cache_hits: 1,
            n_cache_misses: 2,
            cache_bytes: 3,
            is_trusted: Some(true),
            n_equal: 4,
            n_different: 5,
            calls: vec![("asked", 6)],
            failures: vec![("overdue", 7)],
            breakers: vec![("open", 8)],
            conversations: vec![("reused", 9)],
        };
        metrics.set_tokenizer_collector(Box::new(move || vec![row.clone()]));
        let text = metrics.encode();
        for line in [
            r#"warmroute_tokenizer_cache_total{model="m",result="hit"} 1"#,
            r#"warmroute_tokenizer_cache_total{model="m",result="miss"} 2"#,
            r#"warmroute_tokenizer_cache_bytes{model="m"} 3"#,
            r#"warmroute_tokenizer_trusted{model="m"} 1"#,
            r#"warmroute_tokenizer_comparisons_total{model="m",result="equal"} 4"#,
            r#"warmroute_tokenizer_comparisons_total{model="m",result="different"} 5"#,
            r#"warmroute_tokenizer_calls_total{model="m",result="asked"} 6"#,
            r#"warmroute_tokenizer_failures_total{model="m",reason="overdue"} 7"#,
            r#"warmroute_tokenizer_endpoints{model="m",state="open"} 8"#,
            r#"warmroute_tokenizer_conversations_total{model="m",result="reused"} 9"#,
        ] {
            assert_line(&text, line);
        }
    }

    #[test]
    fn every_count_of_a_source_has_a_series() {
        let metrics = Metrics::new();
        metrics.set_source_collector(Box::new(|| vec![source_row()]));

        let text = metrics.encode();
        let labels = r#"model="llama",endpoint="10.0.0.1:8000",rank="1""#;
        assert_line(&text, &format!(r#"warmroute_source_state{{{labels},state="live"}} 1"#));
        for (kind, n) in [("stored", 5), ("removed", 4), ("cleared", 3)] {
            assert_line(&text, &format!(r#"warmroute_events_total{{{labels},kind="{kind}"}} {n}"#));
        }
        for (name, value) in [
            ("index_blocks", 7),
            ("index_source_proved", 1),
            ("event_batches_total", 6),
            ("event_gaps_total", 2),
            ("event_replays_total", 1),
            ("event_decode_failures_total", 8),
            ("event_skipped_total", 9),
        ] {
            assert_line(&text, &format!("warmroute_{name}{{{labels}}} {value}"));
        }
    }
}
