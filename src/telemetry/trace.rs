//! Traces: one server span per ext_proc stream, below the span of Envoy that the stream belongs to.
//!
//! Envoy sends the W3C trace context of its own span in the metadata of the gRPC stream; [`request_span`]
//! continues it, so that a trace shows the pick next to the request it was made for. The attributes use the
//! names of the OpenTelemetry semantic conventions for generative AI where there is one.
//!
//! Spans leave in batches on a thread of the SDK, through a queue whose size `OTEL_BSP_MAX_QUEUE_SIZE` bounds
//! (default 2048). An outage of the collector is logged when it begins and when it ends.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use opentelemetry::Key;
use opentelemetry::propagation::{Extractor, TextMapPropagator as _};
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_otlp::{OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_EXPORTER_OTLP_TRACES_ENDPOINT, WithExportConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{Sampler, SdkTracer, SdkTracerProvider, SpanData, SpanExporter};
use tokio::sync::oneshot;
use tonic::metadata::{KeyRef, MetadataMap};
use tracing::field::Empty;
use tracing::{Span, info, info_span, warn};
use tracing_opentelemetry::{OpenTelemetryLayer, OpenTelemetrySpanExt as _};
use tracing_subscriber::registry::LookupSpan;

use super::{Config, Error};

/// Longest that the process waits for its last spans; a fraction of what Kubernetes grants after SIGTERM.
pub const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(2);

/// What the SDK is given of the deadline, so that it reports its own timeout rather than being left behind.
const FLUSH_DEADLINE: Duration = Duration::from_millis(1500);

/// `service.name` when the environment names none.
const SERVICE_NAME: &str = env!("CARGO_PKG_NAME");

/// Opens the span of one ext_proc stream, named `warmroute.route`, as a child of the trace context in the
/// stream's metadata, or as a root when there is none.
///
/// Attributes to record once they are known, with [`Span::record`] and the names in [`attribute`].
pub fn request_span(metadata: &MetadataMap) -> Span {
    let span = info_span!(
        "warmroute.route",
        otel.kind = "server",
        otel.status_code = Empty,
        gen_ai.request.model = Empty,
        gen_ai.operation.name = Empty,
        server.address = Empty,
        server.port = Empty,
        http.response.status_code = Empty,
        warmroute.decision.outcome = Empty,
        warmroute.decision.fallback = Empty,
        warmroute.matched_tokens = Empty,
        warmroute.prompt_tokens = Empty,
        warmroute.endpoint.served = Empty,
    );
    if metadata.contains_key("traceparent") {
        let parent = TraceContextPropagator::new().extract(&Metadata(metadata));
        // Fails when spans are not exported or this one is filtered out: there is nothing to link then.
        let _ = span.set_parent(parent);
    }
    span
}

/// Names of the attributes that [`request_span`] declares; recording any other name does nothing.
///
/// Numbers are recorded as `i64`: tracing-opentelemetry 0.34 exports a `u64` as text.
pub mod attribute {
    /// Status of the span: `error` or `ok`.
    pub const STATUS_CODE: &str = "otel.status_code";
    /// Model of the pool that the request was routed in, also where the request used an alias or an adapter.
    pub const REQUEST_MODEL: &str = "gen_ai.request.model";
    /// `chat` or `text_completion`.
    pub const OPERATION_NAME: &str = "gen_ai.operation.name";
    /// IP address of the picked endpoint.
    pub const SERVER_ADDRESS: &str = "server.address";
    /// Port of the picked endpoint.
    pub const SERVER_PORT: &str = "server.port";
    /// Status of the response, as Envoy shows it to us.
    pub const RESPONSE_STATUS_CODE: &str = "http.response.status_code";
    /// [`Outcome`](crate::routing::pick::Outcome) of the decision.
    pub const DECISION_OUTCOME: &str = "warmroute.decision.outcome";
    /// Why the decision rests on load alone.
    pub const DECISION_FALLBACK: &str = "warmroute.decision.fallback";
    /// Tokens of the prompt that the picked endpoint holds.
    pub const MATCHED_TOKENS: &str = "warmroute.matched_tokens";
    /// Tokens of the prompt.
    pub const PROMPT_TOKENS: &str = "warmroute.prompt_tokens";
    /// `ip:port` of the endpoint that served the request.
    pub const ENDPOINT_SERVED: &str = "warmroute.endpoint.served";
}

/// Spans on their way to a collector.
#[derive(Debug)]
pub(super) struct Exporting {
    provider: SdkTracerProvider,
}

impl Exporting {
    /// Starts the export if a collector is configured, here or in the environment.
    pub(super) fn start(config: &Config) -> Result<Option<Self>, Error> {
        if !(0.0..=1.0).contains(&config.sample_ratio) {
            return Err(Error::SampleRatio { found: config.sample_ratio });
        }
        if config.otlp_endpoint.is_none() && !collector_in_environment() {
            return Ok(None);
        }

        let mut exporter = opentelemetry_otlp::SpanExporter::builder().with_tonic();
        if let Some(endpoint) = &config.otlp_endpoint {
            exporter = exporter.with_endpoint(endpoint);
        }
        let exporter = exporter.build().map_err(Error::Exporter)?;
        let root_sampler = Sampler::TraceIdRatioBased(config.sample_ratio);
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(OutageReporter { exporter, failing: AtomicBool::new(false) })
            .with_sampler(Sampler::ParentBased(Box::new(root_sampler)))
            .with_resource(resource())
            .build();
        Ok(Some(Self { provider }))
    }

    /// The layer that turns spans of `tracing` into exported ones.
    pub(super) fn layer<S>(&self) -> OpenTelemetryLayer<S, SdkTracer>
    where
        S: tracing::Subscriber + for<'a> LookupSpan<'a>,
    {
        tracing_opentelemetry::layer()
            .with_tracer(self.provider.tracer(SERVICE_NAME))
            .with_location(false)
            .with_threads(false)
            .with_target(false)
    }

    /// Sends what is queued. The SDK blocks while it does, so a thread of its own calls it, which neither this
    /// function nor the end of the runtime waits for beyond the deadline.
    pub(super) async fn shutdown(self) {
        let (done, is_done) = oneshot::channel();
        let flush = move || {
            // The SDK logs its failures itself.
            let _ = self.provider.shutdown_with_timeout(FLUSH_DEADLINE);
            let _ = done.send(());
        };
        let thread = std::thread::Builder::new().name("trace-shutdown".to_owned()).spawn(flush);
        if let Err(error) = thread {
            warn!(%error, "no thread to send the last spans, dropping them");
            return;
        }
        if tokio::time::timeout(SHUTDOWN_DEADLINE, is_done).await.is_err() {
            warn!(deadline = ?SHUTDOWN_DEADLINE, "last spans not sent in time, dropping them");
        }
    }
}

/// Exports spans and says once when that begins to fail and once when it works again.
///
/// Failures are handled here and not returned, because the SDK would log each of them.
#[derive(Debug)]
struct OutageReporter<E> {
    exporter: E,
    failing: AtomicBool,
}

impl<E: SpanExporter> SpanExporter for OutageReporter<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let result = self.exporter.export(batch).await;
        let was_failing = self.failing.swap(result.is_err(), Ordering::Relaxed);
        match result {
            Err(error) if !was_failing => warn!(%error, "spans cannot be exported, dropping them"),
            Ok(()) if was_failing => info!("spans are exported again"),
            _ => {}
        }
        Ok(())
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
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

/// Whether the SDK's own variables name a collector.
fn collector_in_environment() -> bool {
    [OTEL_EXPORTER_OTLP_TRACES_ENDPOINT, OTEL_EXPORTER_OTLP_ENDPOINT]
        .iter()
        .any(|name| std::env::var_os(name).is_some_and(|value| !value.is_empty()))
}

/// Attributes of the service, as the SDK reads them from the environment, under our name unless given one.
fn resource() -> Resource {
    let from_environment = Resource::builder().build();
    let name = from_environment.get(&Key::from_static_str("service.name"));
    let is_named = name.is_some_and(|name| !name.as_str().starts_with("unknown_service"));
    let builder = Resource::builder();
    if is_named { builder.build() } else { builder.with_service_name(SERVICE_NAME).build() }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex};

    use opentelemetry_sdk::error::OTelSdkError;

    use super::*;

    #[test]
    fn every_attribute_name_is_declared_by_the_span() {
        let subscriber = tracing_subscriber::registry();
        let span = tracing::subscriber::with_default(subscriber, || request_span(&MetadataMap::new()));

        let metadata = span.metadata().unwrap();
        for name in [
            attribute::STATUS_CODE,
            attribute::REQUEST_MODEL,
            attribute::OPERATION_NAME,
            attribute::SERVER_ADDRESS,
            attribute::SERVER_PORT,
            attribute::RESPONSE_STATUS_CODE,
            attribute::DECISION_OUTCOME,
            attribute::DECISION_FALLBACK,
            attribute::MATCHED_TOKENS,
            attribute::PROMPT_TOKENS,
            attribute::ENDPOINT_SERVED,
        ] {
            assert!(metadata.fields().field(name).is_some(), "{name}");
        }
    }

    /// Exports with the next of the given results.
    #[derive(Debug)]
    struct Scripted {
        results: Mutex<Vec<OTelSdkResult>>,
    }

    impl SpanExporter for Scripted {
        async fn export(&self, _batch: Vec<SpanData>) -> OTelSdkResult {
            self.results.lock().unwrap().remove(0)
        }
    }

    /// Log lines, in memory.
    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[tokio::test]
    async fn outage_is_logged_when_it_begins_and_when_it_ends() {
        let refused = || Err(OTelSdkError::InternalFailure("refused".to_owned()));
        let results = vec![Ok(()), refused(), refused(), refused(), Ok(()), Ok(())];
        let n_batches = results.len();
        let exporter = Scripted { results: Mutex::new(results) };
        let reporter = OutageReporter { exporter, failing: AtomicBool::new(false) };
        let lines = Lines::default();
        let writer = lines.clone();
        let subscriber = tracing_subscriber::fmt().with_writer(move || writer.clone()).finish();
        let _guard = tracing::subscriber::set_default(subscriber);

        for _ in 0..n_batches {
            assert!(reporter.export(Vec::new()).await.is_ok());
        }

        let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        assert_eq!(text.lines().count(), 2, "{text}");
        assert!(text.contains("spans cannot be exported"), "{text}");
        assert!(text.contains("spans are exported again"), "{text}");
    }
}
