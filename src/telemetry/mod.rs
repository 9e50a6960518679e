//! What the process tells about itself: logs, metrics and traces.
//!
//! [`init`] sets up logs and, if a collector is configured, traces; [`metrics::Metrics`] holds the counters
//! that [`crate::admin`] serves. Prompts, token ids, salts and credentials are in none of them: [`logs`] and [`panics`]
//! see to that where code speaks that is not ours.
//!
//! A collector that is down costs nothing but one warning: spans wait in a bounded queue and are dropped when
//! it is full, and [`Telemetry::shutdown`] waits at most [`trace::SHUTDOWN_DEADLINE`] for the last of them.

pub mod logs;
pub mod metrics;
pub mod panics;
mod service;
pub mod trace;

use std::str::FromStr;
use std::sync::Arc;

use serde::Serialize;
use tracing::{Dispatch, Metadata};
use tracing_subscriber::filter::{EnvFilter, FilterExt as _, FilterFn, LevelFilter, ParseError};
use tracing_subscriber::layer::{Layer, SubscriberExt as _};
use tracing_subscriber::registry::Registry;
use tracing_subscriber::reload;
use tracing_subscriber::util::{SubscriberInitExt as _, TryInitError};

use trace::export::{Exporting, SpanCounts};

/// How the process logs and where it sends its spans.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Form of the log lines on standard error.
    pub log_format: LogFormat,
    /// Which events are logged, in the syntax of `RUST_LOG`; default `info`.
    pub log_filter: String,
    /// OTLP/gRPC collector, such as `http://collector:4317`. When unset, the SDK's variables
    /// `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT` and `OTEL_EXPORTER_OTLP_ENDPOINT` decide; without those, no spans
    /// are made. Name and other attributes of the service come from `OTEL_SERVICE_NAME` and
    /// `OTEL_RESOURCE_ATTRIBUTES`.
    pub otlp_endpoint: Option<String>,
    /// Share of requests that are traced, 0 to 1, when Envoy has not decided already; its decision holds.
    pub sample_ratio: f64,
}

/// Form of a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

impl FromStr for LogFormat {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err(()),
        }
    }
}

/// Why telemetry could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The log filter cannot be parsed.
    #[error("log filter {found:?} is not a list of directives such as info,warmroute::events=debug")]
    LogFilter {
        /// The filter as configured.
        found: String,
        /// What is wrong with it.
        #[source]
        source: ParseError,
    },
    /// The sample ratio is out of range.
    #[error("trace sample ratio {found} is not between 0 and 1")]
    SampleRatio {
        /// The ratio as configured.
        found: f64,
    },
    /// The exporter cannot be built, usually because of the endpoint.
    #[error("OTLP exporter cannot be set up, expected an endpoint such as http://collector:4317")]
    Exporter(#[source] opentelemetry_otlp::ExporterBuildError),
    /// There is no subscriber any more whose filter could be another.
    #[error("the log filter cannot be changed")]
    Reload(#[source] reload::Error),
    /// Another subscriber is in place.
    #[error("a log subscriber is already set, expected to be the first")]
    AlreadySet(#[source] TryInitError),
}

/// Running telemetry; ends with [`Telemetry::shutdown`].
#[derive(Debug)]
#[must_use = "spans that are still queued are lost without shutdown"]
pub struct Telemetry {
    traces: Option<Exporting>,
    span_counts: Arc<SpanCounts>,
    log_filter: LogFilter,
}

/// What is logged, to be changed while the process runs.
#[derive(Clone, Debug)]
pub struct LogFilter(reload::Handle<EnvFilter, Registry>);

impl LogFilter {
    /// Makes `directives` the filter, beside those that keep the exporter's crates quiet.
    ///
    /// # Errors
    ///
    /// When they are none.
    pub fn set(&self, directives: &str) -> Result<(), Error> {
        self.0.reload(logs::filter(directives)?).map_err(Error::Reload)
    }
}

/// Sets up logs and traces for the whole process, and how it reports panics.
///
/// # Errors
///
/// When the configuration is wrong or a subscriber is already set.
///
/// # Panics
///
/// Outside a tokio runtime, when a collector is configured.
pub fn init(config: &Config) -> Result<Telemetry, Error> {
    let (telemetry, dispatch) = build(config)?;
    dispatch.try_init().map_err(Error::AlreadySet)?;
    panics::report_without_content();
    Ok(telemetry)
}

/// What [`init`] sets for the whole process, for one thread or future to use.
///
/// # Errors
///
/// When the configuration is wrong.
///
/// # Panics
///
/// Outside a tokio runtime, when a collector is configured.
pub fn build(config: &Config) -> Result<(Telemetry, Dispatch), Error> {
    let (filter, handle) = reload::Layer::new(logs::filter(&config.log_filter)?);
    let span_counts = Arc::<SpanCounts>::default();
    let traces = Exporting::start(config, &span_counts)?;
    // The log filter must not decide on spans: each layer has its own.
    let subscriber = Registry::default()
        .with(logs::layer(config.log_format).with_filter(filter.and(logs::bound())))
        .with(traces.as_ref().map(|traces| traces.layer().with_filter(own_spans())));
    Ok((Telemetry { traces, span_counts, log_filter: LogFilter(handle) }, Dispatch::new(subscriber)))
}

impl Telemetry {
    /// What becomes of the spans.
    pub fn span_counts(&self) -> Arc<SpanCounts> {
        self.span_counts.clone()
    }

    /// Changes what is logged.
    pub fn log_filter(&self) -> LogFilter {
        self.log_filter.clone()
    }

    /// Sends the spans that are queued, for at most [`trace::SHUTDOWN_DEADLINE`].
    pub async fn shutdown(self) {
        if let Some(traces) = self.traces {
            traces.shutdown().await;
        }
    }
}

/// Spans of this program only: those of the gRPC stack would trace the export of the spans itself.
/// Log lines are no part of a span: what they say is for those who may read the log.
fn own_spans() -> FilterFn {
    let is_own_span: fn(&Metadata<'_>) -> bool = |metadata| metadata.is_span() && is_own(metadata.target());
    FilterFn::new(is_own_span).with_max_level_hint(LevelFilter::INFO)
}

/// Whether a target is of this program.
fn is_own(target: &str) -> bool {
    target.strip_prefix(env!("CARGO_CRATE_NAME")).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        Config { log_format: LogFormat::Text, log_filter: "info".to_owned(), otlp_endpoint: None, sample_ratio: 1.0 }
    }

    #[test]
    fn wrong_log_filter_is_refused_with_what_was_found() {
        let config = Config { log_filter: "warmroute=loud".to_owned(), ..config() };

        let error = build(&config).unwrap_err();

        assert!(error.to_string().contains("\"warmroute=loud\""), "{error}");
    }

    #[test]
    fn sample_ratio_outside_0_to_1_is_refused() {
        for sample_ratio in [-0.1, 1.1, f64::NAN] {
            let config = Config { sample_ratio, ..config() };
            assert!(matches!(build(&config), Err(Error::SampleRatio { .. })), "{sample_ratio}");
        }
    }

    #[tokio::test]
    async fn endpoint_without_tls_support_is_refused() {
        let config = Config { otlp_endpoint: Some("https://collector:4317".to_owned()), ..config() };
        assert!(matches!(build(&config), Err(Error::Exporter(_))));
    }
}
