//! Series of endpoints and event sources, read from their owners at each scrape, so that they leave with them.

use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;

/// One endpoint at the time of a scrape.
#[derive(Clone, Debug)]
pub struct EndpointRow {
    /// Model name of the endpoint's pool, as configured.
    pub model: Arc<str>,
    /// Address that Envoy dials.
    pub endpoint: SocketAddr,
    /// Requests that this router sent there and that have not ended.
    pub n_in_flight: u64,
}

/// One event source (one data-parallel rank of one endpoint) at the time of a scrape.
#[derive(Clone, Debug)]
pub struct SourceRow {
    /// Model name of the endpoint's pool, as configured.
    pub model: Arc<str>,
    /// Address that Envoy dials; the event socket's own port is not shown.
    pub endpoint: SocketAddr,
    /// Data-parallel rank.
    pub rank: u32,
    /// Name of the state that the source is in.
    pub state: &'static str,
    /// Whether the source's hashes are proved to be the engine's, so that its blocks are credited.
    pub proved: bool,
    /// Blocks that the index holds for the source.
    pub n_blocks: u64,
    /// Batches applied since the source was discovered, as are all counts below.
    pub n_batches: u64,
    /// `BlockStored` events applied.
    pub n_stored: u64,
    /// `BlockRemoved` events applied.
    pub n_removed: u64,
    /// `AllBlocksCleared` events applied.
    pub n_cleared: u64,
    /// Times that sequence numbers were missing.
    pub n_gaps: u64,
    /// Replays requested.
    pub n_replays: u64,
    /// Batches that could not be decoded.
    pub n_decode_failures: u64,
    /// Events skipped inside decoded batches.
    pub n_skipped: u64,
    /// Blocks that the index had no room for.
    pub n_refused: u64,
    /// Times that it was left alone because it sent too much that is wrong.
    pub n_quarantines: u64,
    /// Panics of its code.
    pub n_panics: u64,
    /// Generations started: each drops what was known before.
    pub n_generations: u64,
}

/// The event plane as a whole at the time of a scrape.
#[derive(Clone, Copy, Debug)]
pub struct EventPlaneRow {
    /// Messages of engines that dial in without being listed.
    pub n_foreign_messages: u64,
    /// Replays that run now.
    pub n_replays: u64,
}

/// What our own picks have promised in one pool, at the time of a scrape.
#[derive(Clone, Debug)]
pub struct PromiseRow {
    /// Model name, as configured.
    pub model: Arc<str>,
    /// Blocks that endpoints are expected to hold because requests with them were sent there.
    pub n_blocks: u64,
    /// Promised blocks that made room for others.
    pub n_evicted: u64,
}

/// Reads the rows of a scrape from their owner; must neither block nor await.
pub type ReadRows<R> = Box<dyn Fn() -> Vec<R> + Send + Sync>;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ModelLabels {
    model: Arc<str>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EndpointLabels {
    model: Arc<str>,
    endpoint: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SourceLabels {
    model: Arc<str>,
    endpoint: String,
    rank: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SourceStateLabels {
    model: Arc<str>,
    endpoint: String,
    rank: u32,
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SourceEventLabels {
    model: Arc<str>,
    endpoint: String,
    rank: u32,
    kind: &'static str,
}

impl EndpointRow {
    fn labels(&self) -> EndpointLabels {
        EndpointLabels { model: Arc::clone(&self.model), endpoint: self.endpoint.to_string() }
    }
}

impl SourceRow {
    fn labels(&self) -> SourceLabels {
        SourceLabels { model: Arc::clone(&self.model), endpoint: self.endpoint.to_string(), rank: self.rank }
    }

    fn state_labels(&self) -> SourceStateLabels {
        let SourceLabels { model, endpoint, rank } = self.labels();
        SourceStateLabels { model, endpoint, rank, state: self.state }
    }

    fn event_labels(&self, kind: &'static str) -> SourceEventLabels {
        let SourceLabels { model, endpoint, rank } = self.labels();
        SourceEventLabels { model, endpoint, rank, kind }
    }
}

/// The rows of one kind, read from their owner at each scrape.
pub(super) struct Rows<R> {
    /// Set once, when the owner exists; until then there are no rows.
    read: OnceLock<ReadRows<R>>,
}

impl<R> Rows<R> {
    pub(super) fn set(&self, read: ReadRows<R>) {
        assert!(self.read.set(read).is_ok(), "the owner of the rows is set once");
    }

    pub(super) fn read(&self) -> Vec<R> {
        self.read.get().map_or_else(Vec::new, |read| read())
    }
}

impl<R> Default for Rows<R> {
    fn default() -> Self {
        Self { read: OnceLock::new() }
    }
}

impl<R> fmt::Debug for Rows<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rows").field("set", &self.read.get().is_some()).finish()
    }
}

impl Collector for Rows<EndpointRow> {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let rows = self.read();
        let mut in_flight = gauge(&mut encoder, "endpoint_in_flight", "Requests that this router has in flight there")?;
        for row in &rows {
            in_flight.encode_family(&row.labels())?.encode_gauge(&row.n_in_flight)?;
        }
        Ok(())
    }
}

impl Collector for Rows<SourceRow> {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let rows = self.read();

        let mut state = gauge(&mut encoder, "source_state", "State of the event source: always 1, the label tells")?;
        for row in &rows {
            state.encode_family(&row.state_labels())?.encode_gauge(&1_u64)?;
        }

        let mut events = counter(&mut encoder, "events", "KV events applied to the index")?;
        for row in &rows {
            let counts = [("stored", row.n_stored), ("removed", row.n_removed), ("cleared", row.n_cleared)];
            for (kind, n_events) in counts {
                encode_count(&mut events.encode_family(&row.event_labels(kind))?, n_events)?;
            }
        }

        for (name, help, value) in SOURCE_GAUGES {
            let mut gauge = gauge(&mut encoder, name, help)?;
            for row in &rows {
                gauge.encode_family(&row.labels())?.encode_gauge(&value(row))?;
            }
        }

        for (name, help, value) in SOURCE_COUNTERS {
            let mut counter = counter(&mut encoder, name, help)?;
            for row in &rows {
                encode_count(&mut counter.encode_family(&row.labels())?, value(row))?;
            }
        }
        Ok(())
    }
}

impl Collector for Rows<EventPlaneRow> {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        for row in self.read() {
            let (name, help) = ("event_foreign_messages", "Messages of engines that dial in without being listed");
            encode_count(&mut counter(&mut encoder, name, help)?, row.n_foreign_messages)?;
            let (name, help) = ("event_replays_in_flight", "Replays that run now");
            gauge(&mut encoder, name, help)?.encode_gauge(&row.n_replays)?;
        }
        Ok(())
    }
}

impl Collector for Rows<PromiseRow> {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let rows = self.read();
        let help = "Blocks that endpoints are expected to hold because requests with them were sent there";
        let mut blocks = gauge(&mut encoder, "promised_blocks", help)?;
        for row in &rows {
            blocks.encode_family(&ModelLabels { model: row.model.clone() })?.encode_gauge(&row.n_blocks)?;
        }
        let help = "Promised blocks that made room for others before their time";
        let mut evicted = counter(&mut encoder, "promised_blocks_evicted", help)?;
        for row in &rows {
            let labels = ModelLabels { model: row.model.clone() };
            encode_count(&mut evicted.encode_family(&labels)?, row.n_evicted)?;
        }
        Ok(())
    }
}

/// Name, description and value of a series that each source has.
type SourceSeries = (&'static str, &'static str, fn(&SourceRow) -> u64);

const SOURCE_GAUGES: [SourceSeries; 2] = [
    ("index_blocks", "Blocks that the index holds for the source", |row| row.n_blocks),
    ("index_source_proved", "Whether the source's hashes are proved, so that its blocks are credited", |row| {
        u64::from(row.proved)
    }),
];

const SOURCE_COUNTERS: [SourceSeries; 9] = [
    ("event_batches", "Event batches applied to the index", |row| row.n_batches),
    ("event_gaps", "Times that sequence numbers were missing", |row| row.n_gaps),
    ("event_replays", "Replays requested from the engine", |row| row.n_replays),
    ("event_decode_failures", "Event batches that could not be decoded", |row| row.n_decode_failures),
    ("event_skipped", "Events skipped inside decoded batches", |row| row.n_skipped),
    ("event_refused_blocks", "Blocks that the index had no room for", |row| row.n_refused),
    ("source_quarantines", "Times a source was left alone because it sent too much that is wrong", |row| {
        row.n_quarantines
    }),
    ("source_panics", "Times the code of a source panicked", |row| row.n_panics),
    ("source_generations", "Times a source's knowledge began anew", |row| row.n_generations),
];

pub(super) fn gauge<'a>(
    encoder: &'a mut DescriptorEncoder<'_>,
    name: &'a str,
    help: &str,
) -> Result<MetricEncoder<'a>, fmt::Error> {
    encoder.encode_descriptor(name, help, None, MetricType::Gauge)
}

pub(super) fn counter<'a>(
    encoder: &'a mut DescriptorEncoder<'_>,
    name: &'a str,
    help: &str,
) -> Result<MetricEncoder<'a>, fmt::Error> {
    encoder.encode_descriptor(name, help, None, MetricType::Counter)
}

pub(super) fn encode_count(encoder: &mut MetricEncoder<'_>, n: u64) -> fmt::Result {
    encoder.encode_counter::<NoLabelSet, u64, u64>(&n, None)
}
