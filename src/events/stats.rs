//! What is shown of a source: counters that its thread writes and a scrape reads.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::continuity::{Phase, SeqNo};
use super::wire::WireError;
use crate::routing::endpoint::EndpointId;
use crate::routing::index::{ContentDigest, KeyKinds};

/// State of a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceState {
    /// Not connected, and nothing is known.
    Connecting,
    /// Connected; a replay is running.
    CatchingUp,
    /// Everything since the publisher's start is known.
    Live,
    /// The live stream is followed, but not everything that the engine holds is known.
    Incomplete,
    /// What is known may be out of date: no connection, or one that is not proved yet.
    Stale,
    /// Left alone for a while because it sent too much that is wrong.
    Quarantined,
    /// Its code panicked. It is started again after a while; nothing of it is credited until then.
    Failed,
}

impl SourceState {
    /// All states.
    pub const ALL: [Self; 7] = [
        Self::Connecting,
        Self::CatchingUp,
        Self::Live,
        Self::Incomplete,
        Self::Stale,
        Self::Quarantined,
        Self::Failed,
    ];

    /// The state as a label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::CatchingUp => "catching_up",
            Self::Live => "live",
            Self::Incomplete => "incomplete",
            Self::Stale => "stale",
            Self::Quarantined => "quarantined",
            Self::Failed => "failed",
        }
    }

    /// The state of a source in `phase`, which the index had no room for if `is_full`.
    pub(super) fn of(phase: Phase, is_full: bool) -> Self {
        match phase {
            Phase::Connecting => Self::Connecting,
            Phase::CatchingUp => Self::CatchingUp,
            Phase::Live if is_full => Self::Incomplete,
            Phase::Live => Self::Live,
            Phase::Incomplete => Self::Incomplete,
            Phase::Stale => Self::Stale,
            Phase::Quarantined => Self::Quarantined,
        }
    }
}

/// A source at one moment. Counts are since the source was added.
#[derive(Clone, Debug)]
pub struct SourceStatus {
    /// Model of the endpoint's pool.
    pub model: Arc<str>,
    /// The endpoint.
    pub endpoint: EndpointId,
    /// Address that Envoy dials.
    pub address: SocketAddr,
    /// Data-parallel rank.
    pub rank: u32,
    /// What it is doing.
    pub state: SourceState,
    /// Kinds of hashes that are proved, hence credited.
    pub proved: KeyKinds,
    /// Kinds of hashes that are not what the configuration says.
    pub disproved: KeyKinds,
    /// Number of the last batch applied.
    pub last_seq: Option<SeqNo>,
    /// What the index holds for it after that batch; the same in every router that knows the whole cache.
    pub digest: ContentDigest,
    /// Blocks that the index holds for it.
    pub n_blocks: u64,
    /// Generations started.
    pub n_generations: u64,
    /// Batches applied.
    pub n_batches: u64,
    /// `BlockStored` events applied.
    pub n_stored: u64,
    /// `BlockRemoved` events applied.
    pub n_removed: u64,
    /// `AllBlocksCleared` events applied.
    pub n_cleared: u64,
    /// Times that the live stream lost batches.
    pub n_gaps: u64,
    /// Replays requested.
    pub n_replays: u64,
    /// Messages or payloads that could not be decoded.
    pub n_decode_failures: u64,
    /// The same by what is wrong with them; [`DECODE_FAILURES`] names the positions.
    pub decode_failures: [u64; DECODE_FAILURES.len()],
    /// Events that are of no use to the index, or that are not understood.
    pub n_skipped: u64,
    /// Blocks refused because the index had no room for them.
    pub n_refused: u64,
    /// Times that it was left alone because it sent too much that is wrong.
    pub n_quarantines: u64,
    /// Panics of its code.
    pub n_panics: u64,
    /// Snapshots that it went on from.
    pub n_restored: u64,
    /// Time since the last batch was applied; none before the first.
    pub last_batch_age: Option<Duration>,
    /// Time from the engine's clock in the last live batch to the index, the difference of two clocks included; none
    /// before the first.
    pub last_lag: Option<Duration>,
}

/// The counters behind [`SourceStatus`]. Each is written by the source's thread alone; none guards other memory, so all
/// accesses are relaxed.
#[derive(Debug, Default)]
pub(super) struct SourceStats {
    state: AtomicU8,
    proved: AtomicU64,
    disproved: AtomicU64,
    /// One value, so that number and digest are of the same moment: locked for as long as it takes to copy.
    content: Mutex<Content>,
    n_blocks: AtomicU64,
    /// When the last batch was applied; locked for as long as it takes to copy.
    last_batch: Mutex<Option<Instant>>,
    /// Lag of the last live batch; locked for as long as it takes to copy.
    last_lag: Mutex<Option<Duration>>,
    pub(super) n_generations: Counter,
    pub(super) n_batches: Counter,
    pub(super) n_stored: Counter,
    pub(super) n_removed: Counter,
    pub(super) n_cleared: Counter,
    pub(super) n_gaps: Counter,
    pub(super) n_replays: Counter,
    decode_failures: [Counter; DECODE_FAILURES.len()],
    pub(super) n_skipped: Counter,
    pub(super) n_refused: Counter,
    pub(super) n_quarantines: Counter,
    pub(super) n_panics: Counter,
    pub(super) n_restored: Counter,
    /// Blocks parked because their chain is not known back to its root.
    pub(super) n_orphans: Counter,
    /// Those of them that found no room: they are not credited in the keyspace Own.
    pub(super) n_orphans_dropped: Counter,
}

/// What a source holds after which batch.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Content {
    /// The last batch applied.
    pub(super) seq: Option<SeqNo>,
    pub(super) digest: ContentDigest,
}

/// What can be wrong with a message: its frames, or its payload ([`WireError::kind`]).
pub const DECODE_FAILURES: [&str; 8] =
    ["frames", "truncated", "length", "depth", "unexpected", "missing", "items", "trailing"];

/// A count that only grows.
#[derive(Debug, Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn add(&self, n: impl Into<u64>) {
        self.0.fetch_add(n.into(), Ordering::Relaxed);
    }

    pub(super) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl SourceStats {
    /// Counts a message whose frames are not those of a batch.
    pub(super) fn count_malformed(&self) {
        self.decode_failures[0].add(1_u64);
    }

    /// Counts a payload that is no batch.
    pub(super) fn count_unreadable(&self, error: &WireError) {
        let idx = DECODE_FAILURES.iter().position(|kind| *kind == error.kind());
        self.decode_failures[idx.expect("every kind of error has its place")].add(1_u64);
    }

    pub(super) fn decode_failures(&self) -> [u64; DECODE_FAILURES.len()] {
        self.decode_failures.each_ref().map(Counter::get)
    }

    pub(super) fn set_state(&self, state: SourceState) {
        self.state.store(state as u8, Ordering::Relaxed);
    }

    /// Shows a source whose code panicked: nothing of it is credited any more.
    pub(super) fn fail(&self) {
        self.n_panics.add(1_u64);
        self.set_state(SourceState::Failed);
        self.set_kinds(KeyKinds::NONE, KeyKinds::NONE);
        self.set_n_blocks(0);
        self.set_content(Content::default());
    }

    pub(super) fn state(&self) -> SourceState {
        SourceState::ALL[usize::from(self.state.load(Ordering::Relaxed))]
    }

    pub(super) fn set_kinds(&self, proved: KeyKinds, disproved: KeyKinds) {
        self.proved.store(proved.bits(), Ordering::Relaxed);
        self.disproved.store(disproved.bits(), Ordering::Relaxed);
    }

    pub(super) fn proved(&self) -> KeyKinds {
        KeyKinds::from_bits(self.proved.load(Ordering::Relaxed))
    }

    pub(super) fn disproved(&self) -> KeyKinds {
        KeyKinds::from_bits(self.disproved.load(Ordering::Relaxed))
    }

    pub(super) fn set_content(&self, content: Content) {
        *self.content.lock().unwrap_or_else(PoisonError::into_inner) = content;
    }

    pub(super) fn content(&self) -> Content {
        *self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A batch has been applied.
    pub(super) fn applied_batch(&self) {
        self.n_batches.add(1_u64);
        *self.last_batch.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    pub(super) fn last_batch_age(&self) -> Option<Duration> {
        self.last_batch.lock().unwrap_or_else(PoisonError::into_inner).map(|at| at.elapsed())
    }

    /// A live batch has been applied that was on its way for as long.
    pub(super) fn set_lag(&self, lag: Duration) {
        *self.last_lag.lock().unwrap_or_else(PoisonError::into_inner) = Some(lag);
    }

    pub(super) fn last_lag(&self) -> Option<Duration> {
        *self.last_lag.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_n_blocks(&self, n_blocks: usize) {
        self.n_blocks.store(n_blocks as u64, Ordering::Relaxed);
    }

    pub(super) fn n_blocks(&self) -> u64 {
        self.n_blocks.load(Ordering::Relaxed)
    }
}
