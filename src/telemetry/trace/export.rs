//! Spans on their way to a collector.
//!
//! They wait in a queue and leave in batches on a thread of the SDK. The queue is bounded: what does not fit is dropped
//! and counted, and so is what a collector did not take. So a collector that is gone, or that takes connections and
//! answers nothing, costs that memory and one line in the log when it begins and one when it ends, and no request waits
//! for it. What was sent and what was dropped is in [`SpanCounts`].

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use opentelemetry::Context;
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_otlp::{OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_EXPORTER_OTLP_TRACES_ENDPOINT, WithExportConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracer, SdkTracerProvider, Span, SpanData, SpanExporter,
    SpanProcessor,
};
use tokio::sync::oneshot;
use tracing::{info, warn};
use tracing_opentelemetry::OpenTelemetryLayer;
use tracing_subscriber::registry::LookupSpan;

use crate::telemetry::{Config, Error, service};

/// Longest that the process waits for its last spans; a fraction of what Kubernetes grants after SIGTERM.
pub const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(2);

/// What the SDK is given of the deadline, so that it reports its own timeout rather than being left behind.
const FLUSH_DEADLINE: Duration = Duration::from_millis(1500);
/// Longest that a batch may take, after which it is dropped. The SDK's default of 10 s would let the queue run over
/// three times as often when a collector is slow for a moment.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(3);
/// Spans that may wait where `OTEL_BSP_MAX_QUEUE_SIZE` says nothing: the requests of half a second at a thousand per
/// second that are all sampled, in a few MiB.
const QUEUE: usize = 4096;
/// Sets the length of the queue, as for every program with an SDK of OpenTelemetry.
const QUEUE_VARIABLE: &str = "OTEL_BSP_MAX_QUEUE_SIZE";
/// Longest that a span waits for its batch to fill. The SDK's default of 5 s is a long time to look for one's trace.
const DELAY: Duration = Duration::from_secs(1);

/// What became of the spans so far.
#[derive(Debug, Default)]
pub struct SpanCounts {
    exported: AtomicU64,
    queue_full: AtomicU64,
    export_failed: AtomicU64,
}

impl SpanCounts {
    /// Spans that the collector has taken.
    pub fn n_exported(&self) -> u64 {
        self.exported.load(Relaxed)
    }

    /// Spans that were dropped, by reason.
    pub fn n_dropped(&self) -> [(&'static str, u64); 2] {
        [("queue_full", self.queue_full.load(Relaxed)), ("export_failed", self.export_failed.load(Relaxed))]
    }
}

/// Spans on their way to a collector.
#[derive(Debug)]
pub(in crate::telemetry) struct Exporting {
    provider: SdkTracerProvider,
}

impl Exporting {
    /// Starts the export if a collector is configured, here or in the environment.
    pub(in crate::telemetry) fn start(config: &Config, counts: &Arc<SpanCounts>) -> Result<Option<Self>, Error> {
        if !(0.0..=1.0).contains(&config.sample_ratio) {
            return Err(Error::SampleRatio { found: config.sample_ratio });
        }
        if config.otlp_endpoint.is_none() && !collector_in_environment() {
            return Ok(None);
        }

        let mut exporter = opentelemetry_otlp::SpanExporter::builder().with_tonic().with_timeout(EXPORT_TIMEOUT);
        if let Some(endpoint) = &config.otlp_endpoint {
            exporter = exporter.with_endpoint(endpoint);
        }
        let exporter = exporter.build().map_err(Error::Exporter)?;
        // Those without a trace context are drawn before anything is made of them.
        super::span::sample_roots(config.sample_ratio);
        let provider = SdkTracerProvider::builder()
            .with_span_processor(Queue::new(exporter, queue_length(), counts))
            .with_sampler(Sampler::ParentBased(Box::new(Sampler::AlwaysOn)))
            .with_resource(service::resource())
            .build();
        Ok(Some(Self { provider }))
    }

    /// The layer that turns spans of `tracing` into exported ones.
    pub(in crate::telemetry) fn layer<S>(&self) -> OpenTelemetryLayer<S, SdkTracer>
    where
        S: tracing::Subscriber + for<'a> LookupSpan<'a>,
    {
        tracing_opentelemetry::layer()
            .with_tracer(self.provider.tracer(service::NAME))
            .with_location(false)
            .with_threads(false)
            .with_target(false)
            .with_tracked_inactivity(false)
    }

    /// Sends what is queued. The SDK blocks while it does, so a thread of its own calls it, which neither this
    /// function nor the end of the runtime waits for beyond the deadline.
    pub(in crate::telemetry) async fn shutdown(self) {
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

/// The SDK's queue, with a count of what it drops, which the SDK keeps for itself.
#[derive(Debug)]
struct Queue {
    batches: BatchSpanProcessor,
    n_waiting: Arc<AtomicUsize>,
    length: usize,
    counts: Arc<SpanCounts>,
}

impl Queue {
    fn new<E: SpanExporter + 'static>(exporter: E, length: usize, counts: &Arc<SpanCounts>) -> Self {
        let n_waiting = Arc::<AtomicUsize>::default();
        let taking = Taking {
            exporter,
            n_waiting: n_waiting.clone(),
            counts: counts.clone(),
            is_failing: AtomicBool::new(false),
        };
        // Its own queue is never full before ours: a span is counted before it is put in and until it is taken out.
        let config = BatchConfigBuilder::default().with_max_queue_size(length).with_scheduled_delay(DELAY).build();
        let batches = BatchSpanProcessor::builder(taking).with_batch_config(config).build();
        Self { batches, n_waiting, length, counts: counts.clone() }
    }
}

impl SpanProcessor for Queue {
    fn on_start(&self, span: &mut Span, context: &Context) {
        self.batches.on_start(span, context);
    }

    fn on_end(&self, span: SpanData) {
        if self.n_waiting.fetch_add(1, Relaxed) >= self.length {
            self.n_waiting.fetch_sub(1, Relaxed);
            self.counts.queue_full.fetch_add(1, Relaxed);
            return;
        }
        self.batches.on_end(span);
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.batches.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.batches.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.batches.set_resource(resource);
    }
}

/// Takes batches out of the queue, counts what becomes of them, and says once when the collector begins to fail and
/// once when it works again.
///
/// Failures are handled here and not returned, because the SDK would log each of them.
#[derive(Debug)]
struct Taking<E> {
    exporter: E,
    n_waiting: Arc<AtomicUsize>,
    counts: Arc<SpanCounts>,
    is_failing: AtomicBool,
}

impl<E: SpanExporter> SpanExporter for Taking<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let n_spans = batch.len();
        self.n_waiting.fetch_sub(n_spans, Relaxed);
        let result = self.exporter.export(batch).await;
        let count = if result.is_ok() { &self.counts.exported } else { &self.counts.export_failed };
        count.fetch_add(n_spans as u64, Relaxed);
        let was_failing = self.is_failing.swap(result.is_err(), Relaxed);
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

fn queue_length() -> usize {
    let configured = std::env::var(QUEUE_VARIABLE).ok().and_then(|value| value.parse().ok());
    configured.filter(|length| *length > 0).unwrap_or(QUEUE)
}

/// Whether the SDK's own variables name a collector.
fn collector_in_environment() -> bool {
    [OTEL_EXPORTER_OTLP_TRACES_ENDPOINT, OTEL_EXPORTER_OTLP_ENDPOINT]
        .iter()
        .any(|name| std::env::var_os(name).is_some_and(|value| !value.is_empty()))
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Mutex;

    use opentelemetry::trace::{Span as _, Tracer as _};
    use opentelemetry_sdk::error::OTelSdkError;

    use super::*;

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

    /// Takes a batch and does not return until it is told to.
    #[derive(Debug)]
    struct BlackHole {
        is_open: Arc<Mutex<()>>,
    }

    impl SpanExporter for BlackHole {
        async fn export(&self, _batch: Vec<SpanData>) -> OTelSdkResult {
            drop(self.is_open.lock().unwrap());
            Ok(())
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
        let taking =
            Taking { exporter, n_waiting: Arc::default(), counts: Arc::default(), is_failing: AtomicBool::new(false) };
        let lines = Lines::default();
        let writer = lines.clone();
        let subscriber = tracing_subscriber::fmt().with_writer(move || writer.clone()).finish();
        let _guard = tracing::subscriber::set_default(subscriber);

        for _ in 0..n_batches {
            assert!(taking.export(Vec::new()).await.is_ok());
        }

        let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        assert_eq!(text.lines().count(), 2, "{text}");
        assert!(text.contains("spans cannot be exported"), "{text}");
        assert!(text.contains("spans are exported again"), "{text}");
    }

    /// Makes spans through a queue of `length` and returns the provider and what was counted.
    fn provider(exporter: impl SpanExporter + 'static, length: usize) -> (SdkTracerProvider, Arc<SpanCounts>) {
        let counts = Arc::<SpanCounts>::default();
        let queue = Queue::new(exporter, length, &counts);
        (SdkTracerProvider::builder().with_span_processor(queue).build(), counts)
    }

    fn make_spans(provider: &SdkTracerProvider, n_spans: usize) {
        let tracer = provider.tracer("test");
        (0..n_spans).for_each(|_| tracer.start("span").end());
    }

    #[test]
    fn what_does_not_fit_the_queue_is_dropped_and_counted_while_the_collector_is_silent() {
        let is_open = Arc::new(Mutex::new(()));
        let closed = is_open.lock().unwrap();
        let (provider, counts) = provider(BlackHole { is_open: is_open.clone() }, 64);
        make_spans(&provider, 10_000);
        let [(_, n_full), _] = counts.n_dropped();
        // The queue, and the batches that were taken out of it before the silence.
        assert!(n_full >= 10_000 - 2 * 64 - 512, "{counts:?}");
        assert_eq!(counts.n_exported(), 0);
        drop(closed);
        provider.shutdown().unwrap();
        assert_eq!(counts.n_exported() + n_full, 10_000, "each span is counted once");
    }

    #[test]
    fn what_the_collector_does_not_take_is_counted() {
        let refused = || Err(OTelSdkError::InternalFailure("refused".to_owned()));
        let results = vec![refused(), Ok(())];
        let (provider, counts) = provider(Scripted { results: Mutex::new(results) }, 64);
        make_spans(&provider, 3);
        provider.force_flush().unwrap();
        make_spans(&provider, 2);
        provider.force_flush().unwrap();
        assert_eq!((counts.n_dropped()[1], counts.n_exported()), (("export_failed", 3), 2));
    }
}
