//! The table of promised blocks: block → the newest promise of each endpoint.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::BuildHasher;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::PromiseLimits;
use super::order::{Order, Record};
use super::promisers::{LastChange, Promise, Promisers};
use crate::routing::endpoint::{Endpoint, EndpointId};
use crate::routing::hash::BlockHash;
use crate::routing::index::SeededFold;
use crate::routing::load::Millis;

/// Bits of a block's place that choose its shard.
const SHARD_BITS: u32 = 6;
const N_SHARDS: usize = 1 << SHARD_BITS;

/// Records that are looked at in one go while others wait.
const SWEEP_STEP: usize = 64;
/// Blocks that a sweep removes: some 10 ms.
const SWEPT_AT_ONCE: usize = 1 << 15;

type Blocks = HashMap<BlockHash, Promisers, SeededFold>;

/// On cache lines of its own: threads that work on neighbouring shards would slow each other.
#[derive(Debug)]
#[repr(align(128))]
struct Shard(Mutex<Blocks>);

impl Shard {
    fn lock(&self) -> MutexGuard<'_, Blocks> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What became of a block that was to be promised.
enum Inserted {
    /// It counts by this promise.
    Written,
    /// Another promise has long enough to go.
    Relied,
    /// There is no room, and nothing older to make some.
    Refused,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Table {
    /// Locks, not the lock-free map of the index: here every pick writes as many blocks as it reads, most of them for
    /// seconds only, and entries must be counted exactly. A lock is held for one access.
    shards: Box<[Shard]>,
    /// Not that of the shards: there, equal high bits would make all keys of a shard collide.
    choice: SeededFold,
    /// Locked for a few accesses per pick, and never together with a shard.
    order: Mutex<Order>,
    limits: PromiseLimits,
    /// Entries: pairs of block and endpoint. Raised before an entry is made and lowered after it is gone.
    n_blocks: AtomicUsize,
    n_promises: AtomicUsize,
    n_refused: AtomicU64,
    n_evicted: AtomicU64,
    /// Blocks that were written since the table was made.
    n_written: AtomicU64,
    /// The latest time that was given by anyone.
    seen: AtomicU64,
}

impl Table {
    pub(super) fn new(limits: PromiseLimits) -> Self {
        let shard = |_| Shard(Mutex::new(HashMap::with_hasher(SeededFold::random())));
        Self {
            shards: (0..N_SHARDS).map(shard).collect(),
            choice: SeededFold::random(),
            order: Mutex::default(),
            limits,
            n_blocks: AtomicUsize::new(0),
            n_promises: AtomicUsize::new(0),
            n_refused: AtomicU64::new(0),
            n_evicted: AtomicU64::new(0),
            n_written: AtomicU64::new(0),
            seen: AtomicU64::new(0),
        }
    }

    pub(super) fn limits(&self) -> PromiseLimits {
        self.limits
    }

    pub(super) fn n_blocks(&self) -> usize {
        self.n_blocks.load(Relaxed)
    }

    pub(super) fn n_promises(&self) -> usize {
        self.n_promises.load(Relaxed)
    }

    pub(super) fn count_promise(&self) {
        self.n_promises.fetch_add(1, Relaxed);
    }

    pub(super) fn uncount_promise(&self) {
        self.n_promises.fetch_sub(1, Relaxed);
    }

    pub(super) fn n_refused(&self) -> u64 {
        self.n_refused.load(Relaxed)
    }

    pub(super) fn n_evicted(&self) -> u64 {
        self.n_evicted.load(Relaxed)
    }

    /// Notes the time.
    pub(super) fn see(&self, now: Millis) {
        // Mostly known already: do not write to a cache line that every request reads.
        if self.seen.load(Relaxed) < now.0 {
            self.seen.fetch_max(now.0, Relaxed);
        }
    }

    pub(super) fn seen(&self) -> Millis {
        Millis(self.seen.load(Relaxed))
    }

    /// A promise of no block yet, which counts for `life` from now at most.
    pub(super) fn new_promise(&self, endpoint: &Endpoint, now: Millis, life: Millis) -> Arc<Promise> {
        Promise::new(endpoint, Millis(now.0.saturating_add(life.0)), self.n_written.load(Relaxed))
    }

    /// Promises `hashes` up to the first one for which there is no room, and says how many that is. Blocks of the
    /// oldest promises make room.
    pub(super) fn insert(&self, hashes: &[BlockHash], promise: &Arc<Promise>, now: Millis) -> usize {
        self.see(now);
        self.pay(hashes.len(), now);
        let (mut n_promised, mut last) = (0, LastChange::default());
        let mut written = Vec::new();
        for hash in hashes {
            match self.insert_one(*hash, promise, now, &mut last) {
                Inserted::Written => written.push(*hash),
                Inserted::Relied => {}
                Inserted::Refused => break,
            }
            n_promised += 1;
        }
        self.n_refused.fetch_add((hashes.len() - n_promised) as u64, Relaxed);
        self.record(written, promise, now);
        n_promised
    }

    fn insert_one(&self, hash: BlockHash, promise: &Arc<Promise>, now: Millis, last: &mut LastChange) -> Inserted {
        loop {
            let mut shard = self.shard(hash).lock();
            match shard.entry(hash) {
                Entry::Vacant(entry) => {
                    if self.reserve() {
                        entry.insert(Promisers::One(Arc::clone(promise)));
                        return Inserted::Written;
                    }
                }
                Entry::Occupied(mut entry) => {
                    let known = entry.get().of(promise.endpoint());
                    if known.is_some_and(|known| self.may_rely_on(known, promise, now)) {
                        return Inserted::Relied;
                    }
                    if known.is_some() || self.reserve() {
                        let changed = last.apply(entry.get(), |promisers| Some(promisers.with(promise)));
                        entry.insert(changed.expect("the promise is in it"));
                        return Inserted::Written;
                    }
                }
            }
            // The oldest may have blocks in this shard.
            drop(shard);
            if !self.evict_oldest(now) {
                return Inserted::Refused;
            }
        }
    }

    /// Whether a block need not be renewed: its promise has more than half of its life to go, and is not in the half
    /// that is going to make room.
    fn may_rely_on(&self, known: &Promise, promise: &Promise, now: Millis) -> bool {
        let remaining = known.remaining(now);
        let is_long = remaining > self.limits.cap.0 / 2 || remaining >= promise.remaining(now);
        let n_behind = self.n_written.load(Relaxed).saturating_sub(known.born());
        remaining > 0 && is_long && n_behind <= self.limits.n_blocks as u64 / 2
    }

    fn reserve(&self) -> bool {
        let add = |n_blocks: usize| (n_blocks < self.limits.n_blocks).then_some(n_blocks + 1);
        self.n_blocks.fetch_update(Relaxed, Relaxed, add).is_ok()
    }

    /// Notes what was written for a promise. What is noted is bounded as well: blocks that are confirmed or renewed
    /// over and over stay noted until their promises are over.
    fn record(&self, written: Vec<BlockHash>, promise: &Arc<Promise>, now: Millis) {
        if written.is_empty() {
            return;
        }
        self.n_written.fetch_add(written.len() as u64, Relaxed);
        let record = Record { promise: Arc::clone(promise), blocks: written.into_boxed_slice() };
        self.order().push(record);
        while self.n_recorded() > 2 * self.limits.n_blocks && self.evict_oldest(now) {}
    }

    /// Blocks that are noted in the order of promises.
    pub(super) fn n_recorded(&self) -> usize {
        self.order().n_blocks()
    }

    /// Ends the oldest promise, whose blocks make room; false: there is none.
    fn evict_oldest(&self, now: Millis) -> bool {
        let Some(record) = self.order().pop_oldest() else { return false };
        let was_alive = record.promise.is_alive(now);
        record.promise.void();
        let n_removed = self.remove_record(&record);
        if was_alive {
            self.n_evicted.fetch_add(n_removed as u64, Relaxed);
        }
        true
    }

    /// Removes the promises of `hashes` for the endpoint, whosesoever they are.
    pub(super) fn remove(&self, hashes: &[BlockHash], endpoint: EndpointId) {
        self.remove_if(hashes, endpoint, |_| true);
    }

    fn remove_record(&self, record: &Record) -> usize {
        let is_its = |promise: &Arc<Promise>| Arc::ptr_eq(promise, &record.promise);
        self.remove_if(&record.blocks, record.promise.endpoint(), is_its)
    }

    /// Removes the promises of `hashes` for the endpoint that are to go, and says how many they were. Those that are
    /// over go with them.
    fn remove_if(&self, hashes: &[BlockHash], endpoint: EndpointId, is_to_go: impl Fn(&Arc<Promise>) -> bool) -> usize {
        let (now, mut last) = (self.seen(), LastChange::default());
        let (mut n_gone, mut n_removed) = (0, 0);
        for hash in hashes {
            if let Entry::Occupied(mut entry) = self.shard(*hash).lock().entry(*hash)
                && entry.get().of(endpoint).is_some_and(&is_to_go)
            {
                let left = last.apply(entry.get(), |promisers| promisers.without(endpoint, now));
                n_removed += entry.get().all().len() - left.as_ref().map_or(0, |left| left.all().len());
                match left {
                    Some(left) => drop(entry.insert(left)),
                    None => drop(entry.remove()),
                }
                n_gone += 1;
            }
        }
        self.n_blocks.fetch_sub(n_removed, Relaxed);
        n_gone
    }

    /// The promises of the block, some of which may be over.
    pub(super) fn promisers(&self, hash: BlockHash) -> Option<Promisers> {
        self.shard(hash).lock().get(&hash).cloned()
    }

    /// Looks at every promise, a few at a time, unless there is too much to remove, and at the memory of every shard.
    pub(super) fn sweep(&self, now: Millis) {
        self.see(now);
        let n_records = self.order().n_records();
        self.sweep_some(n_records, SWEPT_AT_ONCE, now);
        self.order().shrink();
        for shard in &self.shards {
            let mut blocks = shard.lock();
            if blocks.capacity() > 4 * blocks.len().max(64) {
                let n_kept = 2 * blocks.len();
                blocks.shrink_to(n_kept);
            }
        }
    }

    /// Sweeps in proportion to the blocks that are to be promised: more blocks than these, and more than one promise,
    /// so that a pass over all promises ends. The work of each call is bounded, and what is over takes no more room
    /// than what is to come.
    fn pay(&self, n_blocks: usize, now: Millis) {
        self.sweep_some(4, 2 * n_blocks, now);
    }

    /// Looks at up to `n_records` promises, and stops once `n_blocks` blocks of those that are over were removed.
    fn sweep_some(&self, mut n_records: usize, mut n_blocks: usize, now: Millis) {
        while n_records > 0 && n_blocks > 0 {
            let (n_checked, dead) = self.order().pop_dead(n_records.min(SWEEP_STEP), now);
            n_records -= n_checked;
            if let Some(record) = dead {
                n_blocks = n_blocks.saturating_sub(record.blocks.len());
                self.remove_record(&record);
            }
        }
    }

    fn order(&self) -> MutexGuard<'_, Order> {
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn shard(&self, hash: BlockHash) -> &Shard {
        let place = self.choice.hash_one(hash.0) >> (u64::BITS - SHARD_BITS);
        &self.shards[place as usize]
    }
}
