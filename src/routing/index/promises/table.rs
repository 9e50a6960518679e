//! The table of promised blocks: block → the newest promise of each endpoint.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::BuildHasher;
use std::slice;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::PromiseLimits;
use crate::routing::endpoint::{Endpoint, EndpointId, Knowledge};
use crate::routing::hash::BlockHash;
use crate::routing::index::SeededFold;
use crate::routing::load::Millis;

/// Bits of a block's place that choose its shard.
const SHARD_BITS: u32 = 6;
const N_SHARDS: usize = 1 << SHARD_BITS;

/// What all blocks of one pick have in common.
#[derive(Debug)]
pub(super) struct Promise {
    endpoint: EndpointId,
    knowledge: Arc<Knowledge>,
    /// The endpoint's [`Knowledge::n_generations`] at the pick: the promise is about the cache of that time.
    n_generations: u32,
    /// When it is over. Only ever lowered. Relaxed: it guards no other memory, and a reader may be a moment late.
    until: AtomicU64,
}

impl Promise {
    pub(super) fn new(endpoint: &Endpoint, now: Millis, limits: PromiseLimits) -> Arc<Self> {
        Arc::new(Self {
            endpoint: endpoint.id,
            knowledge: Arc::clone(&endpoint.knowledge),
            n_generations: endpoint.knowledge.n_generations(),
            until: AtomicU64::new(now.0.saturating_add(limits.cap.0)),
        })
    }

    pub(super) fn endpoint(&self) -> EndpointId {
        self.endpoint
    }

    /// The request has ended: the rest of its life is no longer than the time to linger.
    pub(super) fn end(&self, now: Millis, limits: PromiseLimits) {
        self.until.fetch_min(now.0.saturating_add(limits.linger.0), Relaxed);
    }

    pub(super) fn void(&self) {
        self.until.store(0, Relaxed);
    }

    fn is_alive(&self, now: Millis) -> bool {
        self.remaining(now) > 0
    }

    /// Milliseconds that it counts on, if nothing shortens it.
    fn remaining(&self, now: Millis) -> u64 {
        if self.knowledge.n_generations() != self.n_generations {
            return 0;
        }
        self.until.load(Relaxed).saturating_sub(now.0)
    }
}

/// The promises of one block, one per endpoint. Most blocks have one, which needs no allocation of its own.
#[derive(Debug)]
enum Promisers {
    One(Arc<Promise>),
    Many(Vec<Arc<Promise>>),
}

impl Promisers {
    fn all(&self) -> &[Arc<Promise>] {
        match self {
            Self::One(promise) => slice::from_ref(promise),
            Self::Many(promises) => promises,
        }
    }

    fn of(&mut self, endpoint: EndpointId) -> Option<&mut Arc<Promise>> {
        let promises = match self {
            Self::One(promise) => slice::from_mut(promise),
            Self::Many(promises) => promises,
        };
        promises.iter_mut().find(|promise| promise.endpoint == endpoint)
    }

    fn add(&mut self, promise: Arc<Promise>) {
        match self {
            Self::One(only) => *self = Self::Many(vec![Arc::clone(only), promise]),
            Self::Many(promises) => promises.push(promise),
        }
    }

    /// Removes those that are not to be kept, and says how many they were.
    fn retain(&mut self, keep: impl Fn(&Promise) -> bool) -> usize {
        match self {
            Self::One(only) if keep(only) => 0,
            Self::One(_) => {
                *self = Self::Many(Vec::new());
                1
            }
            Self::Many(promises) => {
                let n_before = promises.len();
                promises.retain(|promise| keep(promise));
                n_before - promises.len()
            }
        }
    }
}

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

/// See the module.
#[derive(Debug)]
pub(super) struct Table {
    /// Locks, not the lock-free map of the index: here every pick writes as many blocks as it reads, most of them for
    /// seconds only, and entries must be counted exactly. A lock is held for one access, or for the sweep of one shard.
    shards: Box<[Shard]>,
    /// Not that of the shards: there, equal high bits would make all keys of a shard collide.
    choice: SeededFold,
    limits: PromiseLimits,
    /// Entries: pairs of block and endpoint. Raised before an entry is made and lowered after it is gone.
    n_blocks: AtomicUsize,
    n_promises: AtomicUsize,
    n_refused: AtomicU64,
    /// The latest time that was given by anyone.
    seen: AtomicU64,
    /// Blocks that were to be promised and have not paid for sweeping yet.
    unpaid: AtomicUsize,
    /// The shard that is swept next, counted without end.
    next_swept: AtomicUsize,
}

impl Table {
    pub(super) fn new(limits: PromiseLimits) -> Self {
        let shard = |_| Shard(Mutex::new(HashMap::with_hasher(SeededFold::random())));
        Self {
            shards: (0..N_SHARDS).map(shard).collect(),
            choice: SeededFold::random(),
            limits,
            n_blocks: AtomicUsize::new(0),
            n_promises: AtomicUsize::new(0),
            n_refused: AtomicU64::new(0),
            seen: AtomicU64::new(0),
            unpaid: AtomicUsize::new(0),
            next_swept: AtomicUsize::new(0),
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

    /// Promises `hashes` up to the first one for which there is no room, and says how many that is.
    pub(super) fn insert(&self, hashes: &[BlockHash], promise: &Arc<Promise>, now: Millis) -> usize {
        self.see(now);
        self.pay(hashes.len(), now);
        let n_promised = hashes.iter().take_while(|hash| self.insert_one(**hash, promise, now)).count();
        if n_promised < hashes.len() {
            self.n_refused.fetch_add((hashes.len() - n_promised) as u64, Relaxed);
        }
        n_promised
    }

    /// Says whether the block counts now, by this promise or by one that has more than half of its life to go.
    fn insert_one(&self, hash: BlockHash, promise: &Arc<Promise>, now: Millis) -> bool {
        match self.shard(hash).lock().entry(hash) {
            Entry::Vacant(_) if !self.reserve() => return false,
            Entry::Vacant(entry) => {
                entry.insert(Promisers::One(Arc::clone(promise)));
            }
            Entry::Occupied(mut entry) => match entry.get_mut().of(promise.endpoint) {
                Some(known) if known.remaining(now) > self.limits.cap.0 / 2 => {}
                Some(known) => *known = Arc::clone(promise),
                None if !self.reserve() => return false,
                None => entry.get_mut().add(Arc::clone(promise)),
            },
        }
        true
    }

    fn reserve(&self) -> bool {
        let add = |n_blocks: usize| (n_blocks < self.limits.n_blocks).then_some(n_blocks + 1);
        self.n_blocks.fetch_update(Relaxed, Relaxed, add).is_ok()
    }

    /// Removes the promises of `hashes` for the endpoint, whosesoever they are.
    pub(super) fn remove(&self, hashes: &[BlockHash], endpoint: EndpointId) {
        for hash in hashes {
            let n_removed = match self.shard(*hash).lock().entry(*hash) {
                Entry::Vacant(_) => continue,
                Entry::Occupied(mut entry) => {
                    let n_removed = entry.get_mut().retain(|promise| promise.endpoint != endpoint);
                    if entry.get().all().is_empty() {
                        entry.remove();
                    }
                    n_removed
                }
            };
            self.n_blocks.fetch_sub(n_removed, Relaxed);
        }
    }

    /// Writes the endpoints for which the block is promised to `out`, whose former content is lost.
    pub(super) fn promised(&self, hash: BlockHash, now: Millis, out: &mut Vec<EndpointId>) {
        out.clear();
        let shard = self.shard(hash).lock();
        let promises = shard.get(&hash).map_or(&[][..], Promisers::all);
        out.extend(promises.iter().filter(|promise| promise.is_alive(now)).map(|promise| promise.endpoint));
    }

    /// Sweeps every shard.
    pub(super) fn sweep(&self, now: Millis) {
        self.see(now);
        self.shards.iter().for_each(|shard| self.sweep_shard(&mut shard.lock(), now));
    }

    /// Sweeps as many entries as blocks were to be promised since: a shard at a time, once that many have come
    /// together. So the work of each call is bounded, and what is over takes no more room than what is to come.
    fn pay(&self, n_blocks: usize, now: Millis) {
        let mut unpaid = self.unpaid.swap(0, Relaxed).saturating_add(n_blocks);
        for _ in 0..N_SHARDS {
            let mut shard = self.shards[self.next_swept.load(Relaxed) % N_SHARDS].lock();
            let Some(rest) = unpaid.checked_sub(shard.len()) else {
                self.unpaid.fetch_add(unpaid, Relaxed);
                return;
            };
            unpaid = rest;
            self.sweep_shard(&mut shard, now);
            self.next_swept.fetch_add(1, Relaxed);
        }
    }

    fn sweep_shard(&self, shard: &mut Blocks, now: Millis) {
        let mut n_removed = 0;
        shard.retain(|_, promisers| {
            n_removed += promisers.retain(|promise| promise.is_alive(now));
            !promisers.all().is_empty()
        });
        self.n_blocks.fetch_sub(n_removed, Relaxed);
        // After a burst the memory is of use to others.
        if shard.capacity() > 4 * shard.len().max(64) {
            shard.shrink_to(2 * shard.len());
        }
    }

    fn shard(&self, hash: BlockHash) -> &Shard {
        let place = self.choice.hash_one(hash.0) >> (u64::BITS - SHARD_BITS);
        &self.shards[place as usize]
    }
}
