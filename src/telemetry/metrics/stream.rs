//! Instruments of the ext_proc streams.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;

use super::Metrics;
use super::catalog::Catalog;
use super::labels::STREAM_MODE;

/// Registered with the others, in [`Metrics`].
#[derive(Debug)]
pub(super) struct Instruments {
    streams: Counter,
    streams_in_flight: Gauge,
    stream_panics: Counter,
    misconfigured_streams: Family<ModeLabels, Counter>,
}

/// An open stream; dropping it ends the count in `streams_in_flight`.
#[derive(Debug)]
pub struct StreamInFlight {
    streams_in_flight: Gauge,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ModeLabels {
    mode: &'static str,
}

impl Instruments {
    pub(super) fn register(catalog: &mut Catalog) -> Self {
        Self {
            streams: catalog.add("streams", "ext_proc streams opened by Envoy", &[]),
            streams_in_flight: catalog.add("streams_in_flight", "ext_proc streams that are open", &[]),
            stream_panics: catalog.add("stream_panics", "ext_proc streams ended by a panic of ours", &[]),
            misconfigured_streams: catalog.add(
                "misconfigured_streams",
                "ext_proc streams whose body modes show no whole prompt before the pick, or end before the answer",
                &[STREAM_MODE],
            ),
        }
    }
}

impl Metrics {
    /// Counts a stream, and holds it in `streams_in_flight` until the value is dropped.
    pub fn open_stream(&self) -> StreamInFlight {
        self.streams.streams.inc();
        self.streams.streams_in_flight.inc();
        StreamInFlight { streams_in_flight: self.streams.streams_in_flight.clone() }
    }

    /// Counts a stream that a panic of ours ended.
    pub fn count_stream_panic(&self) {
        self.streams.stream_panics.inc();
    }

    /// Counts a stream whose body modes are of no use; `mode` is Envoy's name of the one at fault.
    pub fn count_misconfigured_stream(&self, mode: &'static str) {
        self.streams.misconfigured_streams.get_or_create(&ModeLabels { mode }).inc();
    }
}

impl Drop for StreamInFlight {
    fn drop(&mut self) {
        self.streams_in_flight.dec();
    }
}
