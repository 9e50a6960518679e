//! All instruments of the process, on one registry.
//!
//! What lives as long as the process (decisions, streams, reasons) is counted here, through a method per
//! instrument. What lives as long as an endpoint or an event source is read from its owner at the scrape, as
//! [`EndpointRow`]s and [`SourceRow`]s, so that a series leaves together with the thing it describes.
//!
//! Labels are enums, `&'static str`s that an enum of another module yields, or model names from the
//! configuration; the number of series is therefore bounded by the configuration. Every name carries the
//! prefix `warmroute_`; the encoder appends `_total` to counters and the unit to histograms. What is declared, with
//! every value that a label may have, is told by [`Metrics::instruments`].
//!
//! Counting costs a read lock and an atomic add, observing a duration a short mutex; nothing allocates after
//! the first use of a label set.

mod aibrix;
mod catalog;
mod discovery;
mod endpoints;
mod events;
mod exposition;
mod index;
pub mod labels;
mod otlp;
mod process;
pub mod push;
mod request;
mod rollout;
mod rows;
mod snapshots;
mod spans;
mod stream;
#[cfg(test)]
mod tests;
mod tokenizers;

use std::sync::Arc;

use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::info::Info;

pub use aibrix::AibrixIndexer;
use catalog::Catalog;
pub use catalog::{Instrument, Kind};
pub use discovery::DiscoveryChanges;
pub use endpoints::{EndpointRow, NotServedCause};
pub use events::{EventPlaneRow, SourceRow};
pub use index::{IndexRow, PredictionRow, PromiseRow};
pub use request::Stage;
pub use rollout::{Agreed, RecordDropped, Reload};
pub use rows::ReadRows;
use rows::Rows;
pub use snapshots::SnapshotStep;
pub use stream::StreamInFlight;
pub use tokenizers::TokenizerRow;

/// Media type of [`Metrics::encode`]'s text.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Media type of [`Metrics::encode_classic`]'s text.
pub const CLASSIC_CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The instruments of the process.
#[derive(Debug)]
pub struct Metrics {
    catalog: Catalog,
    requests: request::Instruments,
    streams: stream::Instruments,
    endpoints: endpoints::Instruments,
    events: events::Instruments,
    index: Arc<Rows<IndexRow>>,
    promises: Arc<Rows<PromiseRow>>,
    predictions: Arc<Rows<PredictionRow>>,
    tokenizers: Arc<Rows<TokenizerRow>>,
    discovery: discovery::Instruments,
    rollout: rollout::Instruments,
    snapshots: snapshots::Instruments,
    pushes: push::Instruments,
    /// Only where AIBrix's names are wanted.
    aibrix: Option<aibrix::Instruments>,
    started_unix_nanos: u64,
    spans: Arc<Rows<spans::SpanRow>>,
}

impl Metrics {
    /// Registers all instruments of ours.
    pub fn new() -> Self {
        Self::registered(false)
    }

    /// As [`Metrics::new`], and AIBrix's names for some of them.
    pub fn with_aibrix_names() -> Self {
        Self::registered(true)
    }

    fn registered(with_aibrix_names: bool) -> Self {
        let mut catalog = Catalog::default();
        let c = &mut catalog;
        let process = process::Process::new();
        let started_unix_nanos = process.started_unix_nanos();
        c.add_process(process);
        let build = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        c.add_info("build", "Version of the running program", &[labels::VERSION], build);
        Self {
            requests: request::Instruments::register(c),
            streams: stream::Instruments::register(c),
            endpoints: endpoints::Instruments::register(c),
            events: events::Instruments::register(c),
            index: c.add_rows(),
            promises: c.add_rows(),
            predictions: c.add_rows(),
            tokenizers: c.add_rows(),
            discovery: discovery::Instruments::register(c),
            rollout: rollout::Instruments::register(c),
            snapshots: snapshots::Instruments::register(c),
            pushes: push::Instruments::register(c),
            aibrix: with_aibrix_names.then(|| aibrix::Instruments::register(c)),
            started_unix_nanos,
            spans: c.add_rows(),
            catalog,
        }
    }

    /// All instruments in the OpenMetrics text format; [`CONTENT_TYPE`] is its media type.
    pub fn encode(&self) -> String {
        let mut text = String::new();
        let Catalog { registry, foreign, .. } = &self.catalog;
        let written = text::encode_registry(&mut text, registry)
            .and_then(|()| text::encode_registry(&mut text, foreign))
            .and_then(|()| text::encode_eof(&mut text));
        written.expect("writing to a String cannot fail");
        text
    }

    /// The same in the text format that Prometheus had before, for scrapers that know no OpenMetrics;
    /// [`CLASSIC_CONTENT_TYPE`] is its media type.
    pub fn encode_classic(&self) -> String {
        exposition::classic(&self.encode())
    }

    /// What is declared, in the order of the text format, whether there are series yet or not.
    pub fn instruments(&self) -> &[Instrument] {
        &self.catalog.instruments
    }

    /// Makes a pool's series exist at zero, so that the first increment is visible as one.
    pub fn add_model(&self, model: &Arc<str>) {
        self.add_requests(model);
        self.add_endpoints(model);
        self.add_events(model);
        self.add_discovery(model);
        self.add_rollout(model);
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabels {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ModelLabels {
    model: Arc<str>,
}
