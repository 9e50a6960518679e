//! What is declared of the metrics is what is documented, what appears, and what others send for.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]
#![allow(clippy::disallowed_methods, reason = "fakes run beside the test")]

use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use opentelemetry_proto::tonic::collector::metrics::v1::metrics_service_server::{
    MetricsService, MetricsServiceServer,
};
use opentelemetry_proto::tonic::collector::metrics::v1::{ExportMetricsServiceRequest, ExportMetricsServiceResponse};
use opentelemetry_proto::tonic::metrics::v1::metric::Data;
use opentelemetry_proto::tonic::metrics::v1::number_data_point::Value;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use warmroute::events::stats::{DECODE_FAILURES, SourceState};
use warmroute::extproc::message::{BodyMode, Modes};
use warmroute::telemetry::metrics::labels::{self, Label, Values};
use warmroute::telemetry::metrics::push::Push;
use warmroute::telemetry::metrics::{Instrument, Kind, Metrics};

#[path = "it/declared.rs"]
mod declared;

/// Longer than anything here takes; only a hang reaches it.
const PATIENCE: Duration = Duration::from_secs(20);

const INTRODUCTION: &str = "# Metrics

<!-- Written by `UPDATE_DOCS=1 cargo test --test metrics`: change the instruments in src/telemetry/metrics, not this page. -->

All are served at `/metrics` of the admin port, as OpenMetrics text, or in Prometheus' older text format (0.0.4) to a scraper that
accepts only that. `metrics.otlp_endpoint` pushes the same to an OpenTelemetry collector every `metrics.otlp_interval`: cumulative
sums, gauges and histograms with explicit bounds, under the name without `_total`.

Every label has a closed set of values, listed here, or one that the configuration or the cluster bounds. Series of an endpoint or
an event source leave with it, so a sum over them can fall: `rate()` and `increase()` take each series by itself and are not
misled. A histogram `name` has the series `name_bucket`, `name_sum` and `name_count`. What has never happened may have no series yet;
what a model has is there from the start.

The index evicts nothing by itself: a block leaves it when its engine says so, or with all that is known of its source. Only promises
are evicted (`warmroute_promised_blocks_evicted_total`); blocks beyond the index's bound are refused and counted
(`warmroute_index_refused_blocks_total`).

Where both clocks are involved (`warmroute_event_lag_seconds`, `warmroute_event_source_lag_seconds`) a difference between the machines is part of the value.

";

const AIBRIX: &str = "## AIBrix's names

Only with `metrics.aibrix_names: true`. Names, labels, values and buckets are as in AIBrix's gateway plugin
(`pkg/plugins/gateway/algorithms/prefix_cache.go`, `createPrefixCacheMetrics`), so that the prefix-cache row of its dashboard
`observability/grafana/AIBrix_Envoy_Gateway_Plugins_Dashboard.json` goes on working. `using_kv_sync` is `false` for models that
do not follow KV events, and `aibrix_prefix_cache_indexer_status` has the model in place of AIBrix's `_init_`. Decisions of a shadow,
which Envoy is not told, do not count. Not kept, because there is no such thing here: `aibrix_prefix_cache_load_imbalance_total`, the selection `prefix_match_skipped`, and every error reason
but `tokenize_failed`. AIBrix's metrics of its ZMQ client are never exported by AIBrix itself.

";

fn reference(instruments: &[Instrument]) -> String {
    let mut page = INTRODUCTION.to_owned();
    let (aibrix, others): (Vec<_>, Vec<_>) =
        instruments.iter().partition(|instrument| instrument.name.starts_with("aibrix_"));
    let (own, process): (Vec<_>, Vec<_>) =
        others.into_iter().partition(|instrument| instrument.name.starts_with("warmroute_"));
    page += &section("## The router", &own);
    page += &section("## The process", &process);
    page += AIBRIX;
    page += &table(&aibrix);
    page
}

fn section(title: &str, instruments: &[&Instrument]) -> String {
    format!("{title}\n\n{}\n", table(instruments))
}

fn table(instruments: &[&Instrument]) -> String {
    let mut sorted = instruments.to_vec();
    sorted.sort_by(|one, other| one.name.cmp(&other.name));
    let rows = sorted.into_iter().map(|instrument| {
        let Instrument { name, help, kind, labels } = instrument;
        let labels: Vec<String> = labels.iter().map(shown).collect();
        let unit = instrument.unit().unwrap_or("–");
        format!("| `{name}` | {} | {unit} | {} | {help} |\n", kind.as_str(), labels.join("; "))
    });
    format!(
        "| name | type | unit | labels and their values | what it is |\n|---|---|---|---|---|\n{}",
        rows.collect::<String>()
    )
}

fn shown(label: &Label) -> String {
    match label.values {
        Values::Closed(values) => {
            let values: Vec<String> = values.iter().map(|value| format!("`{value}`")).collect();
            format!("`{}`: {}", label.name, values.join(", "))
        }
        Values::Bounded(what) => format!("`{}`: {what}", label.name),
    }
}

#[test]
fn reference_is_what_is_declared() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/metrics.md");
    let expected = reference(Metrics::with_aibrix_names().instruments());
    if std::env::var_os("UPDATE_DOCS").is_some() {
        fs::write(&path, &expected).unwrap();
    }
    let found = fs::read_to_string(&path).unwrap_or_default();
    assert!(found == expected, "docs/metrics.md is not what is declared: UPDATE_DOCS=1 cargo test --test metrics");
}

#[test]
fn names_are_as_prometheus_wants_them_and_unique() {
    let metrics = Metrics::with_aibrix_names();
    let mut seen = BTreeSet::new();
    for instrument in metrics.instruments() {
        let Instrument { name, help, kind, labels } = instrument;
        assert!(seen.insert(name), "{name} is declared twice");
        assert_eq!(*kind == Kind::Counter, name.ends_with("_total"), "{name}");
        assert!(!help.is_empty() && !help.ends_with('.'), "{name}: the encoder ends the sentence: {help:?}");
        let label_names: BTreeSet<&str> = labels.iter().map(|label| label.name).collect();
        assert_eq!(label_names.len(), labels.len(), "{name} has a label twice");
        assert!(!label_names.contains("le"), "{name}");
    }
    assert!(seen.len() > 60, "{seen:?}");
}

#[test]
fn what_appears_has_the_declared_labels_with_the_declared_values() {
    let metrics = Metrics::with_aibrix_names();
    metrics.add_model(&Arc::from("m"));
    let n_closed = declared::check(&metrics.encode());
    assert!(n_closed > 20, "only {n_closed} labels were looked at");
}

#[test]
#[should_panic(expected = "reason is \"what a client sent\"")]
fn a_value_that_is_not_declared_is_noticed() {
    let metrics = Metrics::new();
    metrics.count_left_to_envoy("what a client sent");
    declared::check(&metrics.encode());
}

/// The lists in `telemetry::metrics::labels` repeat names of enums that it may not know.
#[test]
fn closed_sets_are_those_of_the_enums() {
    let Values::Closed(states) = labels::SOURCE_STATE.values else { panic!("open") };
    assert_eq!(states, SourceState::ALL.map(SourceState::as_str));
    let Values::Closed(kinds) = labels::DECODE_KIND.values else { panic!("open") };
    assert_eq!(kinds, DECODE_FAILURES);
    // Enums whose variants carry values have no list: their names are read where they are written.
    for (label, file, begins, ends) in [
        (labels::LEAVE_REASON, "src/extproc/decide/verdict.rs", "impl Leave", "\n}"),
        (labels::REFUSAL_REASON, "src/extproc/decide/verdict.rs", "impl Refusal", "\n    }"),
        (labels::FALLBACK_REASON, "src/tokenizer/local/mod.rs", "impl Unsupported", "\n    }"),
        (labels::FALLBACK_REASON, "src/tokenizer/mod.rs", "impl Error", "\n}"),
        (labels::FALLBACK_REASON, "src/request/mod.rs", "impl Opaque", "\n}"),
        (labels::CALL_REASON, "src/tokenizer/remote/status.rs", "impl Failure", "\n}"),
        (labels::BREAKER_STATE, "src/tokenizer/remote/status.rs", "impl BreakerState", "\n}"),
        (labels::DISCOVERY_REASON, "src/discovery/dns.rs", "fn as_str", "\n    }"),
        (labels::DISCOVERY_REASON, "src/discovery/file.rs", "fn as_str", "\n    }"),
        (labels::DISCOVERY_REASON, "src/discovery/kubernetes/reflect.rs", "fn as_str", "\n    }"),
        (labels::RELOAD_RESULT, "src/telemetry/metrics/rollout.rs", "impl Reload", "\n}"),
        (labels::RECORD_REASON, "src/telemetry/metrics/rollout.rs", "impl RecordDropped", "\n}"),
        (labels::SHADOW_AGREED, "src/telemetry/metrics/rollout.rs", "impl Agreed", "\n}"),
        (labels::SNAPSHOT_STEP, "src/telemetry/metrics/snapshots.rs", "impl SnapshotStep", "\n}"),
        (labels::NOT_SERVED_CAUSE, "src/telemetry/metrics/endpoints.rs", "impl NotServedCause", "\n}"),
        (labels::STAGE, "src/telemetry/metrics/request.rs", "impl Stage", "\n}"),
        (labels::ROLLOUT_MODE, "src/extproc/rollout.rs", "impl Mode", "\n}"),
    ] {
        let Values::Closed(values) = label.values else { panic!("open: {label:?}") };
        let source = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap();
        let (_, after) = source.split_once(begins).unwrap_or_else(|| panic!("{file} has no {begins:?}"));
        let (body, _) = after.split_once(ends).unwrap();
        let names: Vec<&str> =
            body.split("=> \"").skip(1).filter_map(|arm| arm.split_once('"')).map(|(name, _)| name).collect();
        assert!(!names.is_empty(), "{file}: no names after {begins:?}");
        for name in names {
            assert!(values.contains(&name), "{file}: {name:?} is no declared value of {}: {values:?}", label.name);
        }
    }
}

/// Where a label's values are no enum's, they are read where they are listed.
#[test]
fn closed_sets_are_those_that_are_listed() {
    for (label, file, begins, ends) in [
        (labels::CALL_RESULT, "src/supervisor/tokenizers.rs", "fn calls", "\n}"),
        (labels::CONVERSATION_RESULT, "src/supervisor/tokenizers.rs", "fn conversations", "\n}"),
        (labels::DISCOVERY_CHANGE, "src/supervisor/publisher.rs", "let changes = ", ";"),
    ] {
        let Values::Closed(values) = label.values else { panic!("open: {label:?}") };
        let source = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap();
        let (_, after) = source.split_once(begins).unwrap_or_else(|| panic!("{file} has no {begins:?}"));
        let (body, _) = after.split_once(ends).unwrap();
        let names: Vec<&str> =
            body.split("(\"").skip(1).filter_map(|pair| pair.split_once('"')).map(|(name, _)| name).collect();
        assert_eq!(names, values, "{file}: {begins}");
    }
}

#[test]
fn modes_of_misconfigured_streams_are_declared() {
    let Values::Closed(values) = labels::STREAM_MODE.values else { panic!("open") };
    let modes = [
        BodyMode::None,
        BodyMode::Streamed,
        BodyMode::Buffered,
        BodyMode::BufferedPartial,
        BodyMode::FullDuplexStreamed,
        BodyMode::Grpc,
    ];
    let pairs = modes.into_iter().flat_map(|request| modes.map(|response| Modes { request, response }));
    let found: BTreeSet<&str> = pairs.filter_map(Modes::misconfigured).chain(["observability"]).collect();
    assert_eq!(found, values.iter().copied().collect());
}

/// Receives metrics like a collector and hands the requests to the test.
struct FakeCollector {
    requests: mpsc::UnboundedSender<ExportMetricsServiceRequest>,
}

#[tonic::async_trait]
impl MetricsService for FakeCollector {
    async fn export(
        &self,
        request: tonic::Request<ExportMetricsServiceRequest>,
    ) -> Result<tonic::Response<ExportMetricsServiceResponse>, tonic::Status> {
        let _ = self.requests.send(request.into_inner());
        Ok(tonic::Response::new(ExportMetricsServiceResponse::default()))
    }
}

async fn collector(address: SocketAddr) -> (SocketAddr, mpsc::UnboundedReceiver<ExportMetricsServiceRequest>) {
    let (requests, received) = mpsc::unbounded_channel();
    let listener = TcpListener::bind(address).await.unwrap();
    let address = listener.local_addr().unwrap();
    let service = MetricsServiceServer::new(FakeCollector { requests });
    let server = tonic::transport::Server::builder().add_service(service);
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    (address, received)
}

fn sum_of(request: &ExportMetricsServiceRequest, name: &str) -> Option<i64> {
    let metrics = request.resource_metrics.iter().flat_map(|resource| &resource.scope_metrics);
    let metric = metrics.flat_map(|scope| &scope.metrics).find(|metric| metric.name == name)?;
    let Some(Data::Sum(sum)) = &metric.data else { panic!("{metric:?}") };
    let number = |value: &Option<Value>| match value {
        Some(Value::AsInt(number)) => *number,
        other => panic!("{other:?}"),
    };
    Some(sum.data_points.iter().map(|point| number(&point.value)).sum())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_declared_metric_with_series_reaches_a_collector_also_the_last_ones() {
    let (address, mut received) = collector(([127, 0, 0, 1], 0).into()).await;
    let metrics = Arc::new(Metrics::new());
    metrics.add_model(&Arc::from("m"));
    let shutdown = CancellationToken::new();
    let push = Push { endpoint: format!("http://{address}"), interval: Duration::from_secs(3600) };
    let task = tokio::spawn(push.run(metrics.clone(), shutdown.clone()));
    let first = tokio::time::timeout(PATIENCE, received.recv()).await.unwrap().unwrap();
    assert_eq!(sum_of(&first, "warmroute_stream_panics"), Some(0));

    metrics.count_stream_panic();
    shutdown.cancel();
    task.await.unwrap().unwrap();

    let last = received.recv().await.unwrap();
    assert_eq!(sum_of(&last, "warmroute_stream_panics"), Some(1), "what is counted after the last interval");
    let resource = last.resource_metrics[0].resource.as_ref().unwrap();
    assert!(resource.attributes.iter().any(|attribute| attribute.key == "service.name"), "{resource:?}");
    let sent: BTreeSet<&str> =
        last.resource_metrics[0].scope_metrics[0].metrics.iter().map(|metric| metric.name.as_str()).collect();
    let text = metrics.encode();
    let described = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
    let described: BTreeSet<String> =
        described.map(|(name, kind)| if kind == "info" { format!("{name}_info") } else { name.to_owned() }).collect();
    assert_eq!(sent, described.iter().map(String::as_str).collect());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_is_counted_and_nobody_waits_for_it() {
    let (address, _) = collector(([127, 0, 0, 1], 0).into()).await;
    // A port that nobody listens on: the next one of the system's that we let go again.
    let unused = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    assert_ne!(unused, address);
    let metrics = Arc::new(Metrics::new());
    let shutdown = CancellationToken::new();
    let push = Push { endpoint: format!("http://{unused}"), interval: Duration::from_millis(50) };
    let task = tokio::spawn(push.run(metrics.clone(), shutdown.clone()));
    let failed = |metrics: &Metrics| {
        let text = metrics.encode();
        let line = text.lines().find(|line| line.starts_with("warmroute_metric_pushes_total{result=\"failed\"}"));
        line.unwrap().rsplit_once(' ').unwrap().1.parse::<u64>().unwrap()
    };
    let counted = async {
        while failed(&metrics) < 2 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, counted).await.unwrap();

    let (_, mut received) = collector(unused).await;
    let request = tokio::time::timeout(PATIENCE, received.recv()).await.unwrap().unwrap();
    assert!(sum_of(&request, "warmroute_metric_pushes").unwrap() >= 2, "the outage is told afterwards");

    shutdown.cancel();
    tokio::time::timeout(PATIENCE, task).await.unwrap().unwrap().unwrap();
}
