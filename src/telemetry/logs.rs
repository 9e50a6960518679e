//! Log lines: their form, and which of them there may be.
//!
//! What is logged is configured, down to `trace`; but no filter lets a line through that could hold what a client sent.
//! Our own modules never write that. The libraries that carry it do: at `debug` and `trace` h2, hyper, tonic and reqwest
//! write headers, frames and buffers. So no crate but ours says more than `info`, except those that never see a
//! request, whose details are of use (`MAY_DEBUG`): a library that comes later is quiet unless it is put there.
//! Spans are no part of log lines, for the same reason.

use std::io::IsTerminal as _;

use tracing::{Level, Metadata};
use tracing_subscriber::filter::{EnvFilter, FilterFn};
use tracing_subscriber::layer::Layer;
use tracing_subscriber::registry::LookupSpan;

use super::{Error, LogFormat, is_own};

/// Directives that a configured filter may override: the span exporter reports on itself, once per outage
/// (see [`super::trace`]), and therefore needs no line per failed attempt from the crates below it.
const QUIET: &str = "opentelemetry-otlp=off,opentelemetry_sdk=warn";

/// Crates that talk to DNS and to Kubernetes' API, and to nobody else.
const MAY_DEBUG: [&str; 4] = ["hickory_resolver", "hickory_proto", "kube_client", "kube_runtime"];

/// The configured filter. What it lets through is also bounded by [`bound`].
///
/// # Errors
///
/// When it cannot be parsed.
pub(super) fn filter(configured: &str) -> Result<EnvFilter, Error> {
    EnvFilter::try_new(format!("{QUIET},{configured}"))
        .map_err(|source| Error::LogFilter { found: configured.to_owned(), source })
}

/// What no configured filter lets through.
pub(super) fn bound() -> FilterFn {
    FilterFn::new(may_be_logged)
}

fn may_be_logged(metadata: &Metadata<'_>) -> bool {
    // A level is greater the more it says.
    metadata.is_event() && *metadata.level() <= most_of(metadata.target())
}

/// The most talkative level that `target` may have.
fn most_of(target: &str) -> Level {
    let name = target.split("::").next().unwrap_or_default();
    if is_own(target) {
        Level::TRACE
    } else if MAY_DEBUG.contains(&name) {
        Level::DEBUG
    } else {
        Level::INFO
    }
}

/// Writes lines to standard error.
pub(super) fn layer<S>(format: LogFormat) -> Box<dyn Layer<S> + Send + Sync>
where
    S: tracing::Subscriber + for<'a> LookupSpan<'a>,
{
    let layer = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    match format {
        LogFormat::Text => layer.with_ansi(std::io::stderr().is_terminal()).boxed(),
        LogFormat::Json => layer.json().flatten_event(true).with_span_list(false).boxed(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_that_carry_requests_say_no_more_than_info() {
        for carrier in ["h2::codec::framed_read", "hyper_util::client", "tonic::transport", "reqwest::connect", "new"] {
            assert_eq!(most_of(carrier), Level::INFO, "{carrier}");
        }
        assert_eq!(most_of("kube_runtime::watcher"), Level::DEBUG);
        assert_eq!(most_of("warmroute::extproc"), Level::TRACE);
        assert_eq!(most_of("warmroute"), Level::TRACE);
        assert_eq!(most_of("warmroute_like"), Level::INFO, "another crate");
    }
}
