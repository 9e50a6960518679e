//! Whether endpoints really held what decisions said that they hold.
//!
//! An engine that lacks blocks which a decision has predicted computes them and announces them as stored again. What is
//! lacking is always a suffix of the predicted prefix, since a block is of no use without those before it. So few
//! positions tell: those that are 1, 2, 4, 8, … blocks from the end, and the first. Where one of them is stored by the
//! rank that was picked while its request runs, or within [`LINGER`] after, everything behind it was stored again; what
//! the same announcement has in front of it, too. The number is exact where one announcement has all the blocks, and
//! otherwise at least half of it.
//!
//! A store says that only while its endpoint's sources know what they knew at the pick: a source that forgets is told all
//! that is cached once more, which nobody computes. A request that ends in another generation of its endpoint's knowledge
//! than it was picked in counts in neither sum.
//!
//! What a source missed and is told late is kept from watches by whoever writes the index: it may have been computed
//! for requests that ran before.
//!
//! Besides, the first block that nobody has predicted is watched: when it is stored, the request has begun to be
//! computed.
//!
//! Cost: a source that stores blocks makes one relaxed load while nothing is watched, and one per block while something
//! is; only a block that might be watched takes a lock. Memory: at most [`MOST_POSITIONS`] positions per keyspace; a
//! request that finds no room is not watched, and counts in neither sum.

#[cfg(test)]
mod tests;

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::{Holder, SeededFold, Tier};
use crate::routing::endpoint::{Endpoint, EndpointId, Knowledge};
use crate::routing::hash::BlockHash;
use crate::routing::load::Millis;

/// How long after a request's end its blocks are still on their way: the last events of a request have arrived by then,
/// or are lost.
const LINGER: Millis = Millis(2_000);
/// Most positions that are watched in one keyspace: some 1,400 requests of 30,000 tokens.
const MOST_POSITIONS: usize = 1 << 14;
/// Counters of the filter; at most every second one is used.
const N_BUCKETS: usize = 1 << 15;
/// No block was stored.
const NEVER: u64 = u64::MAX;

/// Tells the time to those who have none at hand: an event is taken in by whoever has it.
#[derive(Clone)]
pub struct Clock(Arc<dyn Fn() -> Millis + Send + Sync>);

impl Clock {
    /// Reads the time with `read`.
    pub fn new(read: impl Fn() -> Millis + Send + Sync + 'static) -> Self {
        Self(Arc::new(read))
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Clock")
    }
}

/// Sums over the requests that were watched, to which a request adds both of its numbers when it has ended where it was
/// sent. Independent counters, so all accesses are relaxed.
#[derive(Debug, Default)]
pub struct PredictionSums {
    n_predicted: AtomicU64,
    n_stored_again: AtomicU64,
}

impl PredictionSums {
    /// Blocks that were predicted to be cached, of requests that have ended where they were sent.
    pub fn n_predicted(&self) -> u64 {
        self.n_predicted.load(Relaxed)
    }

    /// Those of them that were stored again while the requests ran, or soon after.
    pub fn n_stored_again(&self) -> u64 {
        self.n_stored_again.load(Relaxed)
    }
}

/// What is predicted of a request.
#[derive(Clone, Debug)]
pub struct Prediction<'a> {
    /// The request's blocks.
    pub chain: &'a [BlockHash],
    /// How many of them, from the first on, the picked rank is known to hold.
    pub n_held: u32,
    /// How many of them, from the first on, somebody is expected to have stored: at least those held.
    pub n_matched: u32,
    /// The endpoint that was picked.
    pub endpoint: &'a Endpoint,
    /// Its rank that was credited; none where nothing is held.
    pub rank: Option<u32>,
}

/// What became of a prediction, as far as it is known.
#[derive(Debug)]
pub struct Seen {
    /// Of the endpoint that was picked.
    knowledge: Arc<Knowledge>,
    /// [`Knowledge::n_generations`] at the pick.
    n_generations: u32,
    /// Whether the request was watched until its end and so is part of the sums; changed under the table's lock.
    is_counted: AtomicBool,
    /// Whether it is no longer watched because nobody could have told anything by what is stored.
    is_given_up: AtomicBool,
    n_predicted: u32,
    /// Position of the first predicted block that was stored again; the number of predicted ones where none was.
    first_again: AtomicU32,
    picked_at: Millis,
    /// When the first block was stored that was not predicted.
    first_new_at: AtomicU64,
}

impl Seen {
    /// Blocks that were predicted to be cached.
    pub fn n_predicted(&self) -> u32 {
        self.n_predicted
    }

    /// Whether [`Self::n_stored_again`] says anything: not of a request that was not computed where it was sent, and not
    /// if another generation of what is known of the endpoint began before its end.
    pub fn is_known(&self) -> bool {
        self.is_counted.load(Relaxed) || (!self.is_given_up.load(Relaxed) && self.is_of_this_generation())
    }

    /// Whether the endpoint's sources know what they knew at the pick.
    fn is_of_this_generation(&self) -> bool {
        self.knowledge.n_generations() == self.n_generations
    }

    /// How many of them were stored again, where that [is known](Self::is_known).
    pub fn n_stored_again(&self) -> u32 {
        self.n_predicted - self.first_again.load(Relaxed)
    }

    /// Time from the pick until the first block was stored that was not predicted; none as long as there is none.
    pub fn first_new_after(&self) -> Option<Millis> {
        let at = self.first_new_at.load(Relaxed);
        (at != NEVER).then(|| Millis(at.saturating_sub(self.picked_at.0)))
    }
}

/// One request that is watched.
#[derive(Debug)]
struct Watch {
    endpoint: EndpointId,
    rank: Option<u32>,
    seen: Arc<Seen>,
    sums: Arc<PredictionSums>,
    clock: Clock,
    /// What is to be taken out of the table at the end.
    hashes: Vec<BlockHash>,
}

impl Watch {
    /// The block at `position` was stored, and `n_before` blocks before it in the same announcement.
    fn stored(&self, position: u32, n_before: u32) {
        let Seen { n_predicted, first_again, first_new_at, .. } = &*self.seen;
        if position >= *n_predicted {
            let _ = first_new_at.compare_exchange(NEVER, (self.clock.0)().0, Relaxed, Relaxed);
        }
        let first = position.saturating_sub(n_before).min(*n_predicted);
        let former = first_again.fetch_min(first, Relaxed);
        if self.seen.is_counted.load(Relaxed) {
            self.sums.n_stored_again.fetch_add(u64::from(former.saturating_sub(first)), Relaxed);
        }
    }

    /// Whether this holder's stores tell of the prediction.
    fn is_about(&self, holder: Holder) -> bool {
        self.endpoint == holder.endpoint
            && self.rank.is_none_or(|rank| rank == holder.rank)
            && self.seen.is_of_this_generation()
    }

    /// From now on it is part of the sums.
    fn count(&self) {
        self.seen.is_counted.store(true, Relaxed);
        self.sums.n_predicted.fetch_add(u64::from(self.seen.n_predicted), Relaxed);
        self.sums.n_stored_again.fetch_add(u64::from(self.seen.n_stored_again()), Relaxed);
    }
}

/// The requests that are watched in one keyspace. See the module.
#[derive(Debug)]
pub struct Watches {
    /// Shared with the guards, which may outlive the index of a keyspace.
    table: Arc<Table>,
}

#[derive(Debug)]
struct Table {
    /// Positions in the table; read before anything else.
    n_positions: AtomicUsize,
    /// How many positions each bucket of hashes has: tells most blocks that nobody watches without a lock. Made with the
    /// first one: it is large beside a keyspace of few blocks, and not every keyspace is watched.
    filter: OnceLock<Box<[AtomicU16]>>,
    choice: SeededFold,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// By the hash of a watched block: who watches it, and as which block of its chain.
    watched: HashMap<BlockHash, Vec<(u32, Arc<Watch>)>, SeededFold>,
    /// Requests that have ended, with the time until which they are still watched; in order, as all linger alike.
    ended: VecDeque<(Millis, Arc<Watch>)>,
}

impl Default for Watches {
    fn default() -> Self {
        let inner = Inner { watched: HashMap::with_hasher(SeededFold::random()), ended: VecDeque::new() };
        let choice = SeededFold::random();
        let n_positions = AtomicUsize::new(0);
        let table = Table { n_positions, filter: OnceLock::new(), choice, inner: Mutex::new(inner) };
        Self { table: Arc::new(table) }
    }
}

impl Watches {
    /// Watches a request that was picked at `now`, until its guard ends. None when there is no room.
    pub fn watch(
        &self,
        prediction: &Prediction<'_>,
        sums: &Arc<PredictionSums>,
        clock: &Clock,
        now: Millis,
    ) -> Option<Watched> {
        let positions = positions(prediction);
        let mut inner = self.table.lock();
        self.table.forget_ended(&mut inner, now);
        if self.table.n_positions.load(Relaxed) + positions.len() > MOST_POSITIONS {
            return None;
        }
        let hash_at = |position: &u32| prediction.chain[*position as usize];
        let watch = Arc::new(Watch {
            endpoint: prediction.endpoint.id,
            rank: prediction.rank,
            seen: Arc::new(Seen {
                knowledge: prediction.endpoint.knowledge.clone(),
                n_generations: prediction.endpoint.knowledge.n_generations(),
                is_counted: AtomicBool::new(false),
                is_given_up: AtomicBool::new(false),
                n_predicted: prediction.n_held,
                first_again: AtomicU32::new(prediction.n_held),
                picked_at: now,
                first_new_at: AtomicU64::new(NEVER),
            }),
            sums: sums.clone(),
            clock: clock.clone(),
            hashes: positions.iter().map(hash_at).collect(),
        });
        for (position, hash) in positions.iter().zip(&watch.hashes) {
            inner.watched.entry(*hash).or_default().push((*position, watch.clone()));
            self.table.bucket(*hash).fetch_add(1, Relaxed);
        }
        self.table.n_positions.fetch_add(positions.len(), Relaxed);
        Some(Watched { table: self.table.clone(), watch, is_over: false })
    }

    /// A source stores these blocks, which are one chain.
    pub(super) fn stored(&self, hashes: &[BlockHash], holder: Holder) {
        if self.table.n_positions.load(Relaxed) > 0 && holder.tier == Tier::Gpu {
            self.table.stored(hashes, holder);
        }
    }

    /// Frees what was watched and is over.
    pub fn sweep(&self, now: Millis) {
        self.table.forget_ended(&mut self.table.lock(), now);
    }

    /// Positions that are watched.
    #[cfg(test)]
    fn n_positions(&self) -> usize {
        self.table.n_positions.load(Relaxed)
    }
}

/// The positions that tell how much of the predicted prefix was stored again, and the first behind all that is expected.
fn positions(prediction: &Prediction<'_>) -> Vec<u32> {
    let n_held = prediction.n_held.min(u32::try_from(prediction.chain.len()).unwrap_or(u32::MAX));
    let steps = std::iter::successors(Some(1_u32), |step| step.checked_mul(2)).take_while(|step| *step < n_held);
    let mut positions: Vec<u32> = steps.map(|step| n_held - step).collect();
    positions.extend((n_held > 0).then_some(0));
    let first_new = prediction.n_matched.max(n_held);
    positions.extend(((first_new as usize) < prediction.chain.len()).then_some(first_new));
    positions
}

impl Table {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing in here panics between two changes that belong together.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn bucket(&self, hash: BlockHash) -> &AtomicU16 {
        use std::hash::BuildHasher as _;
        let filter = self.filter.get_or_init(|| (0..N_BUCKETS).map(|_| AtomicU16::new(0)).collect());
        &filter[self.choice.hash_one(hash.0) as usize % N_BUCKETS]
    }

    fn stored(&self, hashes: &[BlockHash], holder: Holder) {
        for (n_before, hash) in hashes.iter().enumerate() {
            if self.bucket(*hash).load(Relaxed) == 0 {
                continue;
            }
            for (position, watch) in self.lock().watched.get(hash).into_iter().flatten() {
                if watch.is_about(holder) {
                    watch.stored(*position, u32::try_from(n_before).unwrap_or(u32::MAX));
                }
            }
        }
    }

    fn forget_ended(&self, inner: &mut Inner, now: Millis) {
        while inner.ended.front().is_some_and(|(until, _)| *until <= now) {
            if let Some((_, watch)) = inner.ended.pop_front() {
                self.forget(inner, &watch);
            }
        }
    }

    fn forget(&self, inner: &mut Inner, watch: &Arc<Watch>) {
        for hash in &watch.hashes {
            if let Some(watches) = inner.watched.get_mut(hash) {
                watches.retain(|(_, other)| !Arc::ptr_eq(other, watch));
                if watches.is_empty() {
                    inner.watched.remove(hash);
                }
            }
            self.bucket(*hash).fetch_sub(1, Relaxed);
        }
        self.n_positions.fetch_sub(watch.hashes.len(), Relaxed);
    }
}

/// A request that is watched; lives beside its count in flight.
#[derive(Debug)]
pub struct Watched {
    table: Arc<Table>,
    watch: Arc<Watch>,
    is_over: bool,
}

impl Watched {
    /// What became of it so far, and will become.
    pub fn seen(&self) -> &Arc<Seen> {
        &self.watch.seen
    }

    /// The request has ended where it was sent. What it made its engine store may still be on its way.
    pub fn end(mut self, now: Millis) {
        if !self.watch.seen.is_of_this_generation() {
            // What it was told would not be all: it is dropped, and counts in neither sum.
            return;
        }
        self.is_over = true;
        let mut inner = self.table.lock();
        self.table.forget_ended(&mut inner, now);
        self.watch.count();
        inner.ended.push_back((Millis(now.0 + LINGER.0), self.watch.clone()));
    }
}

impl Drop for Watched {
    /// The request was not computed where it was sent, or nobody can tell what became of it: it is watched no longer.
    fn drop(&mut self) {
        if !self.is_over {
            self.watch.seen.is_given_up.store(true, Relaxed);
            self.table.forget(&mut self.table.lock(), &self.watch);
        }
    }
}
