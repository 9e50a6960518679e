//! Instruments of the event plane: its sources, one by one, and the whole.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};

use super::catalog::Catalog;
use super::labels::{DECODE_KIND, ENDPOINT, EVENT_KIND, Label, MODEL, RANK, SOURCE_STATE};
use super::rows::{ReadRows, Row, Rows, Series, no_labels};
use super::{Metrics, ModelLabels};

/// Shortest lag that is told apart: a batch crosses a loopback socket in less.
const SHORTEST_LAG_SECONDS: f64 = 100e-6;
/// Doublings from 100 µs up to 26 s.
const N_LAG_BUCKETS: u16 = 19;

/// Registered with the others, in [`Metrics`].
#[derive(Debug)]
pub(super) struct Instruments {
    event_lag: Histogram,
    event_sources_refused: Family<ModelLabels, Counter>,
    sources: Arc<Rows<SourceRow>>,
    plane: Arc<Rows<EventPlaneRow>>,
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
    /// Whether some of them are proved to be other ones than the configuration says.
    pub disproved: bool,
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
    /// Messages and batches that could not be decoded, by what is wrong with them.
    pub decode_failures: Vec<(&'static str, u64)>,
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
    /// Time from the engine's clock in the last live batch to the index; none before the first.
    pub lag: Option<Duration>,
}

/// The event plane as a whole at the time of a scrape.
#[derive(Clone, Copy, Debug)]
pub struct EventPlaneRow {
    /// Messages of engines that dial in without being listed.
    pub n_foreign_messages: u64,
    /// Replays that run now.
    pub n_replays: u64,
}

impl Row for SourceRow {
    const LABELS: &'static [Label] = &[MODEL, ENDPOINT, RANK];
    const SERIES: &'static [Series<Self>] = &[
        Series::gauge_by("source_state", "State of the event source: always 1, the label tells", SOURCE_STATE, |row| {
            vec![(row.state, 1)]
        }),
        Series::counter_by("events", "KV events applied to the index", EVENT_KIND, |row| {
            vec![("stored", row.n_stored), ("removed", row.n_removed), ("cleared", row.n_cleared)]
        }),
        Series::gauge("index_blocks", "Blocks that the index holds for the source", |row| row.n_blocks),
        Series::gauge(
            "index_source_proved",
            "Whether the source's hashes are proved, so that its blocks are credited",
            |row| u64::from(row.proved),
        ),
        Series::gauge(
            "index_source_disproved",
            "Whether hashes of the source differ from what the configuration says, so that an index of our own is kept",
            |row| u64::from(row.disproved),
        ),
        Series::counter("event_batches", "Event batches applied to the index", |row| row.n_batches),
        Series::counter("event_gaps", "Times that sequence numbers were missing", |row| row.n_gaps),
        Series::counter("event_replays", "Replays requested from the engine", |row| row.n_replays),
        Series::counter_by(
            "event_decode_failures",
            "Event messages that could not be decoded, by what is wrong with them",
            DECODE_KIND,
            |row| row.decode_failures.clone(),
        ),
        Series::counter("event_skipped", "Events skipped inside decoded batches", |row| row.n_skipped),
        Series::counter("index_refused_blocks", "Blocks that the index had no room for", |row| row.n_refused),
        Series::counter(
            "source_quarantines",
            "Times a source was left alone because it sent too much that is wrong",
            |row| row.n_quarantines,
        ),
        Series::counter("source_panics", "Times the code of a source panicked", |row| row.n_panics),
        Series::counter("source_generations", "Times a source's knowledge began anew", |row| row.n_generations),
        Series::seconds(
            "event_source_lag_seconds",
            "Time from the engine's clock in the source's last live batch to the index, clocks of two machines included",
            |row| row.lag,
        ),
    ];

    fn label_values(&self) -> Vec<String> {
        vec![self.model.to_string(), self.endpoint.to_string(), self.rank.to_string()]
    }
}

impl Row for EventPlaneRow {
    const LABELS: &'static [Label] = &[];
    const SERIES: &'static [Series<Self>] = &[
        Series::counter("event_foreign_messages", "Messages of engines that dial in without being listed", |row| {
            row.n_foreign_messages
        }),
        Series::gauge("event_replays_in_flight", "Replays that run now", |row| row.n_replays),
    ];

    fn label_values(&self) -> Vec<String> {
        no_labels()
    }
}

impl Instruments {
    pub(super) fn register(catalog: &mut Catalog) -> Self {
        Self {
            event_lag: catalog.add_seconds(
                "event_lag",
                "Time from the engine's clock in a live KV event batch to the index, clocks of two machines included",
                &[],
                Histogram::new(exponential_buckets(SHORTEST_LAG_SECONDS, 2.0, N_LAG_BUCKETS)),
            ),
            event_sources_refused: catalog.add(
                "event_sources_refused",
                "Addresses of KV events that endpoints named and that are not their own",
                &[MODEL],
            ),
            sources: catalog.add_rows(),
            plane: catalog.add_rows(),
        }
    }
}

impl Metrics {
    /// Makes the series of a pool whose endpoints have named no wrong address exist.
    pub(super) fn add_events(&self, model: &Arc<str>) {
        drop(self.events.event_sources_refused.get_or_create(&ModelLabels { model: Arc::clone(model) }));
    }

    /// Records how long a live KV event batch was on its way to the index.
    pub fn observe_event_lag(&self, lag: Duration) {
        self.events.event_lag.observe(lag.as_secs_f64());
    }

    /// Counts addresses of KV events that an endpoint named and that are not its own.
    pub fn count_event_sources_refused(&self, model: &Arc<str>, n_addresses: u64) {
        let labels = ModelLabels { model: Arc::clone(model) };
        self.events.event_sources_refused.get_or_create(&labels).inc_by(n_addresses);
    }

    /// Sets where the per-source series are read from.
    ///
    /// # Panics
    ///
    /// When called twice: there is one owner of the sources.
    pub fn set_source_collector(&self, read: ReadRows<SourceRow>) {
        self.events.sources.set(read);
    }

    /// Sets where the series of the event plane as a whole are read from: one row.
    ///
    /// # Panics
    ///
    /// When called twice: there is one event plane.
    pub fn set_event_plane_collector(&self, read: ReadRows<EventPlaneRow>) {
        self.events.plane.set(read);
    }
}
