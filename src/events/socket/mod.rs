//! The event plane: few named threads that own the ZMQ sockets of many sources.
//!
//! A thread waits on all its sockets, at most `POLL_MS`; after that it takes commands and gives each source that has
//! something to read a turn, and all of them a tick. Between socket and index there is no queue of ours: what a thread
//! has no time for waits in the socket, and what does not fit there is a gap in the numbers, which the replay fills.
//!
//! A panic ends the source in whose turn it happened, and its credit, and no other; it is started again after a while.
//! Identity is what was dialled: neither topic nor rank of a message is trusted. Engines that dial us are the
//! exception, see `listener`.
//!
//! A connection has its own sockets, see `link`. Between connections a source waits, longer if they do not last, see
//! `backoff`. At most `permits::MAX_REPLAYS` replays run at the same time.

mod backoff;
mod link;
mod listener;
mod permits;
mod subscription;
mod worker;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::mpsc::{Sender, channel, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use tracing::{debug, error};

pub use super::apply::ModelSettings;
use super::apply::SourceName;
use super::snapshot::{Snapshot, SourceKey};
use super::stats::{Counter, SourceStats};
pub use super::stats::{SourceState, SourceStatus};
use crate::routing::endpoint::{EndpointId, Knowledge};
use crate::routing::index::PrefixIndex;
use permits::ReplayPermits;
use subscription::Shared;
use worker::{Command, Worker};

/// Threads. One decodes some hundred thousand batches per second, more than a large pool sends.
const N_THREADS: usize = 1;
/// Longest wait for a snapshot. A thread copies the largest source in some ten milliseconds, between two turns.
pub const SNAPSHOT_WAIT: Duration = Duration::from_secs(2);
/// Offers that wait for sources which are not followed yet: as many as a large pool has sources.
const MAX_OFFERS: usize = 4096;

/// Where one rank of one endpoint publishes.
#[derive(Clone, Debug)]
pub struct Source {
    /// The endpoint.
    pub endpoint: EndpointId,
    /// Its address, for logs and status.
    pub address: SocketAddr,
    /// ZMQ endpoint of the publisher, such as `tcp://10.0.0.1:5557`. One with a wildcard, such as `tcp://*:5557`, is
    /// bound instead: the publisher dials it, and its topic says `kv@`, [`Self::address`], `@` and the model.
    pub events: String,
    /// ZMQ endpoint of the replay; none: lost batches cost what is known.
    pub replay: Option<String>,
    /// Data-parallel rank.
    pub rank: u32,
    /// What the engine is known to run.
    pub model: Arc<ModelSettings>,
    /// Where the request path learns that this source does not know the beginning of its engine's cache.
    pub endpoint_knowledge: Arc<Knowledge>,
}

impl Source {
    /// Whether the engine dials us.
    fn dials_in(&self) -> bool {
        listener::is_bound(&self.events)
    }

    /// What other replicas call it.
    pub fn key(&self) -> SourceKey {
        SourceKey { model: self.model.model.clone(), address: self.address, rank: self.rank }
    }

    fn name(&self) -> SourceName {
        SourceName { endpoint: self.endpoint, address: self.address, rank: self.rank }
    }

    /// Whether `other` is the same in all that matters to whoever follows it.
    fn is_same(&self, other: &Self) -> bool {
        (self.endpoint, self.address, self.rank) == (other.endpoint, other.address, other.rank)
            && (&self.events, &self.replay) == (&other.events, &other.replay)
    }
}

/// Told of each live batch: time from the publisher's clock to the index, clocks of two machines included.
pub type LagObserver = Arc<dyn Fn(Duration) + Send + Sync>;

/// Follows the KV events of all sources; see the module.
#[derive(Debug)]
pub struct EventPlane {
    threads: Vec<EventThread>,
    /// What is followed, and what [`Self::status`] shows. Locked for as long as a list takes to copy.
    shown: Mutex<Vec<Shown>>,
    /// Snapshots of sources that are not followed yet; none once nobody waits for those any more.
    offers: Mutex<Option<HashMap<SourceKey, Box<Snapshot>>>>,
    permits: ReplayPermits,
    n_foreign: Arc<Counter>,
}

#[derive(Debug)]
struct EventThread {
    commands: Sender<Command>,
    handle: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shown {
    source: Source,
    stats: Arc<SourceStats>,
}

impl EventPlane {
    /// Starts the threads; they write what sources hold to `index`.
    pub fn start(index: &Arc<PrefixIndex>) -> Self {
        Self::start_observed(index, Arc::new(|_| {}))
    }

    /// As [`Self::start`]; `on_lag` runs on the threads and must be quick.
    pub fn start_observed(index: &Arc<PrefixIndex>, on_lag: LagObserver) -> Self {
        let permits = ReplayPermits::default();
        let n_foreign = Arc::<Counter>::default();
        let shared = Shared { index: index.clone(), permits: permits.clone(), on_lag, n_foreign: n_foreign.clone() };
        let threads = (0..N_THREADS).map(|thread_idx| EventThread::start(thread_idx, shared.clone())).collect();
        let offers = Mutex::new(Some(HashMap::new()));
        Self { threads, shown: Mutex::default(), offers, permits, n_foreign }
    }

    /// Follows one more source.
    pub fn add(&self, source: Source) {
        self.follow(&mut self.shown(), source);
    }

    /// Makes `sources` the sources of an endpoint: those that are followed already go on undisturbed.
    pub fn reconcile(&self, endpoint: EndpointId, sources: Vec<Source>) {
        let mut shown = self.shown();
        let is_wanted = |shown: &Shown| sources.iter().any(|source| source.is_same(&shown.source));
        let thread = self.thread_of(endpoint);
        shown.retain(|shown| {
            let stays = shown.source.endpoint != endpoint || is_wanted(shown);
            if !stays {
                thread.send(Command::Remove(endpoint, Some(shown.source.rank)));
            }
            stays
        });
        for source in sources {
            if !shown.iter().any(|shown| shown.source.is_same(&source)) {
                self.follow(&mut shown, source);
            }
        }
    }

    /// Stops following all sources of an endpoint, and takes their credit away.
    pub fn remove(&self, endpoint: EndpointId) {
        self.shown().retain(|shown| shown.source.endpoint != endpoint);
        self.thread_of(endpoint).send(Command::Remove(endpoint, None));
    }

    /// The engine is known to have dropped its cache, although it has not said so.
    pub fn cleared(&self, endpoint: EndpointId) {
        self.thread_of(endpoint).send(Command::Cleared(endpoint));
    }

    /// The engine may be another process now: its sources have to prove that they are not.
    pub fn suspect(&self, endpoint: EndpointId) {
        self.thread_of(endpoint).send(Command::Suspect(endpoint));
    }

    /// What is known of a source now; none when nothing is, or when its thread does not answer within
    /// [`SNAPSHOT_WAIT`].
    pub fn snapshot(&self, key: &SourceKey) -> Option<Snapshot> {
        let endpoint = self.endpoint_of(key)?;
        let (answer, snapshot) = sync_channel(1);
        self.thread_of(endpoint).send(Command::Snapshot(key.clone(), answer));
        snapshot.recv_timeout(SNAPSHOT_WAIT).ok().flatten().map(|snapshot| *snapshot)
    }

    /// Offers what was known of a source once: used if its publisher proves to be the same process. The latest offer
    /// for a source that is not followed yet waits for it.
    pub fn offer(&self, snapshot: Snapshot) {
        let snapshot = Box::new(snapshot);
        if let Some(endpoint) = self.endpoint_of(&snapshot.key) {
            return self.thread_of(endpoint).send(Command::Offer(snapshot));
        }
        let mut offers = self.offers();
        let Some(offers) = offers.as_mut() else { return };
        if offers.len() < MAX_OFFERS || offers.contains_key(&snapshot.key) {
            offers.insert(snapshot.key.clone(), snapshot);
        }
    }

    /// Gives up the offers for sources that are still not followed, and keeps no more of them from now on: those that
    /// come late are most likely gone, and what was known of them takes memory.
    pub fn drop_unclaimed_offers(&self) {
        let dropped = self.offers().take();
        debug!(
            n_offers = dropped.map_or(0, |offers| offers.len()),
            "KV event snapshots that no source has claimed are dropped"
        );
    }

    /// How each source does.
    pub fn status(&self) -> Vec<SourceStatus> {
        self.shown().iter().map(Shown::status).collect()
    }

    /// Messages of engines that dial in without being listed.
    pub fn n_foreign_messages(&self) -> u64 {
        self.n_foreign.get()
    }

    /// Replays that run now.
    pub fn n_replays(&self) -> usize {
        self.permits.n_taken()
    }

    /// Stops following, takes all credit away and joins the threads. A second call does nothing.
    pub fn stop(&self) {
        self.threads.iter().for_each(|thread| thread.send(Command::Stop));
        self.threads.iter().for_each(EventThread::join);
    }

    fn follow(&self, shown: &mut Vec<Shown>, source: Source) {
        let stats = Arc::<SourceStats>::default();
        shown.push(Shown { source: source.clone(), stats: stats.clone() });
        let offer = self.offers().as_mut().and_then(|offers| offers.remove(&source.key()));
        let thread = self.thread_of(source.endpoint);
        thread.send(Command::Add(Box::new(source), stats));
        if let Some(offer) = offer {
            thread.send(Command::Offer(offer));
        }
    }

    fn endpoint_of(&self, key: &SourceKey) -> Option<EndpointId> {
        let shown = self.shown();
        let found = shown.iter().find(|shown| shown.source.key() == *key)?;
        Some(found.source.endpoint)
    }

    fn offers(&self) -> MutexGuard<'_, Option<HashMap<SourceKey, Box<Snapshot>>>> {
        self.offers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn shown(&self) -> MutexGuard<'_, Vec<Shown>> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn thread_of(&self, endpoint: EndpointId) -> &EventThread {
        // With more than one thread, a port that engines dial would need a thread of its own.
        const { assert!(N_THREADS == 1) };
        &self.threads[endpoint.0 as usize % self.threads.len()]
    }
}

impl EventThread {
    fn start(thread_idx: usize, shared: Shared) -> Self {
        let (commands, receiver) = channel();
        let worker = Worker::new(shared, receiver);
        let handle = std::thread::Builder::new()
            .name(format!("warmroute-events-{thread_idx}"))
            .spawn(move || worker.run())
            .expect("a starting process can have a few threads");
        Self { commands, handle: Mutex::new(Some(handle)) }
    }

    fn send(&self, command: Command) {
        if self.commands.send(command).is_err() {
            // Only after `stop`: the thread ends in no other way.
            debug!("command for a stopped KV event thread");
        }
    }

    fn join(&self) {
        let handle = self.handle.lock().unwrap_or_else(PoisonError::into_inner).take();
        if handle.is_some_and(|handle| handle.join().is_err()) {
            error!("a KV event thread panicked");
        }
    }
}

impl Shown {
    fn status(&self) -> SourceStatus {
        let Self { source, stats } = self;
        let content = stats.content();
        SourceStatus {
            model: source.model.model.clone(),
            endpoint: source.endpoint,
            address: source.address,
            rank: source.rank,
            state: stats.state(),
            proved: stats.proved(),
            disproved: stats.disproved(),
            last_seq: content.seq,
            digest: content.digest,
            n_blocks: stats.n_blocks(),
            n_generations: stats.n_generations.get(),
            n_batches: stats.n_batches.get(),
            n_stored: stats.n_stored.get(),
            n_removed: stats.n_removed.get(),
            n_cleared: stats.n_cleared.get(),
            n_gaps: stats.n_gaps.get(),
            n_replays: stats.n_replays.get(),
            n_decode_failures: stats.decode_failures().iter().sum(),
            decode_failures: stats.decode_failures(),
            n_skipped: stats.n_skipped.get(),
            n_refused: stats.n_refused.get(),
            n_quarantines: stats.n_quarantines.get(),
            n_panics: stats.n_panics.get(),
            n_restored: stats.n_restored.get(),
            last_batch_age: stats.last_batch_age(),
            last_lag: stats.last_lag(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::continuity::{Overlap, PayloadDigest, SeqNo};
    use crate::events::snapshot::tests::image;
    use crate::routing::index::IndexLimits;

    #[test]
    fn offers_that_nobody_claims_are_not_kept_for_ever() {
        let plane = EventPlane::start(&Arc::new(PrefixIndex::new(IndexLimits::default())));
        let offer = |rank| {
            let key = SourceKey { model: "tiny".into(), address: ([127, 0, 0, 1], 1).into(), rank };
            let overlap = Overlap { seq: SeqNo(1), digest: PayloadDigest::of(b"x") };
            plane.offer(Snapshot { key, overlap, complete: true, image: image(b"blocks") });
        };
        offer(0);
        assert_eq!(plane.offers().as_ref().map(HashMap::len), Some(1));
        plane.drop_unclaimed_offers();
        offer(1);
        assert!(plane.offers().is_none());
        plane.stop();
    }
}
