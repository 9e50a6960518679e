//! The block pool: which physical blocks exist, who uses them, which hashes they hold.
//!
//! Follows `vllm/v1/core/block_pool.py` of vLLM 0.32.0. Free blocks wait in one queue: its front is
//! reused first. A freed block that holds a hash goes to the back, so the queue is an LRU list of the
//! cache; a freed block without one (the partial tail of a request) goes to the front, since it can
//! never serve a hit. A hash may have several physical copies; each is stored and removed on its own.

use std::collections::HashMap;

use warmroute::routing::hash::Digest;

use super::event::KvEvent;

/// Index of a physical block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockId(usize);

/// The pool of one engine's cache.
#[derive(Debug)]
pub struct BlockPool {
    blocks: Vec<Block>,
    free: FreeQueue,
    /// Copies per hash, oldest first: a hit uses the oldest, as in vLLM.
    cached: HashMap<Digest, Vec<BlockId>>,
    events: Vec<KvEvent>,
}

#[derive(Clone, Debug, Default)]
struct Block {
    n_users: u32,
    hash: Option<Digest>,
}

impl BlockPool {
    /// A pool of `n_blocks` blocks, of which one is never used (vLLM's null block).
    pub fn new(n_blocks: usize) -> Self {
        Self {
            blocks: vec![Block::default(); n_blocks],
            free: FreeQueue::new(n_blocks),
            cached: HashMap::new(),
            events: Vec::new(),
        }
    }

    /// Blocks that can be handed out, cached ones included.
    pub fn n_free(&self) -> usize {
        self.free.len
    }

    /// Fraction of the usable blocks that requests hold, 0 to 1 (`vllm:kv_cache_usage_perc`).
    pub fn usage(&self) -> f64 {
        let n_usable = self.blocks.len() - 1;
        (n_usable - self.n_free()) as f64 / n_usable as f64
    }

    /// Distinct hashes that a lookup can hit.
    pub fn cached_hashes(&self) -> impl Iterator<Item = &Digest> {
        self.cached.keys()
    }

    /// The longest run of `hashes`, from the first one, that is cached.
    pub fn lookup(&self, hashes: &[Digest]) -> Vec<BlockId> {
        hashes.iter().map_while(|hash| self.cached.get(hash)?.first().copied()).collect()
    }

    /// Of `blocks`, how many are free now and would leave the queue if they were used.
    pub fn n_free_among(&self, blocks: &[BlockId]) -> usize {
        blocks.iter().filter(|id| self.blocks[id.0].n_users == 0).count()
    }

    /// One more user for each of `blocks`.
    pub fn touch(&mut self, blocks: &[BlockId]) {
        for id in blocks {
            if self.blocks[id.0].n_users == 0 {
                self.free.remove(*id);
            }
            self.blocks[id.0].n_users += 1;
        }
    }

    /// Takes `n_blocks` from the front of the free queue, evicting what they hold; none when there are
    /// not enough.
    pub fn take(&mut self, n_blocks: usize) -> Option<Vec<BlockId>> {
        if n_blocks > self.n_free() {
            return None;
        }
        let taken: Vec<BlockId> =
            (0..n_blocks).map(|_| self.free.pop_front().expect("n_free was checked above")).collect();
        for id in &taken {
            self.evict(*id);
            self.blocks[id.0].n_users = 1;
        }
        Some(taken)
    }

    /// Gives a full block its hash. The event is the caller's, since one event spans several blocks.
    pub fn insert(&mut self, id: BlockId, hash: Digest) {
        self.blocks[id.0].hash = Some(hash);
        self.cached.entry(hash).or_default().push(id);
    }

    /// Adds an event to those of the current step.
    pub fn record(&mut self, event: KvEvent) {
        self.events.push(event);
    }

    /// One user fewer for each of `blocks`, which are given in their order of eviction (a request's
    /// tail first).
    pub fn release(&mut self, blocks: impl IntoIterator<Item = BlockId>) {
        let mut hashless = Vec::new();
        let mut hashed = Vec::new();
        for id in blocks {
            let block = &mut self.blocks[id.0];
            block.n_users -= 1;
            if block.n_users > 0 {
                continue;
            }
            if block.hash.is_some() {
                hashed.push(id);
            } else {
                hashless.push(id);
            }
        }
        for id in hashless.into_iter().rev() {
            self.free.push_front(id);
        }
        for id in hashed {
            self.free.push_back(id);
        }
    }

    /// Drops the whole cache; refused, as in vLLM, while a request holds a block.
    pub fn reset(&mut self) -> bool {
        if self.n_free() + 1 < self.blocks.len() {
            return false;
        }
        self.cached.clear();
        for block in &mut self.blocks {
            block.hash = None;
        }
        self.events.push(KvEvent::AllBlocksCleared);
        true
    }

    /// The events since the last call.
    pub fn take_events(&mut self) -> Vec<KvEvent> {
        std::mem::take(&mut self.events)
    }

    fn evict(&mut self, id: BlockId) {
        let Some(block_hash) = self.blocks[id.0].hash.take() else {
            return;
        };
        let copies = self.cached.get_mut(&block_hash).expect("every block with a hash is in the map");
        copies.retain(|copy| *copy != id);
        if copies.is_empty() {
            self.cached.remove(&block_hash);
        }
        self.events.push(KvEvent::BlockRemoved { block_hash });
    }
}

/// Doubly linked list over block indices, so that a hit takes a block out of the middle in O(1).
///
/// Slot 0 is the list's end marker, which at the same time keeps vLLM's null block out of circulation.
#[derive(Debug)]
struct FreeQueue {
    next: Vec<usize>,
    prev: Vec<usize>,
    len: usize,
}

impl FreeQueue {
    fn new(n_blocks: usize) -> Self {
        let next = (0..n_blocks).map(|i| (i + 1) % n_blocks).collect();
        let prev = (0..n_blocks).map(|i| (i + n_blocks - 1) % n_blocks).collect();
        Self { next, prev, len: n_blocks - 1 }
    }

    fn pop_front(&mut self) -> Option<BlockId> {
        let front = BlockId(self.next[0]);
        if front.0 == 0 {
            return None;
        }
        self.remove(front);
        Some(front)
    }

    fn push_front(&mut self, id: BlockId) {
        self.link(0, id.0, self.next[0]);
    }

    fn push_back(&mut self, id: BlockId) {
        self.link(self.prev[0], id.0, 0);
    }

    fn remove(&mut self, id: BlockId) {
        let (prev, next) = (self.prev[id.0], self.next[id.0]);
        self.next[prev] = next;
        self.prev[next] = prev;
        self.len -= 1;
    }

    fn link(&mut self, prev: usize, id: usize, next: usize) {
        self.next[prev] = id;
        self.prev[id] = prev;
        self.next[id] = next;
        self.prev[next] = id;
        self.len += 1;
    }
}

#[cfg(test)]
mod tests {
    use warmroute::routing::hash::{BlockHasher, HashAlgorithm};

    use super::*;

    fn hashes<const N: usize>() -> [Digest; N] {
        let hasher = BlockHasher::new(HashAlgorithm::Sha256, None).unwrap();
        std::array::from_fn(|token| hasher.block(&hasher.root(), &[token as u32], &[]))
    }

    /// Takes one block per hash.
    fn store(pool: &mut BlockPool, hashes: &[Digest]) -> Vec<BlockId> {
        let blocks = pool.take(hashes.len()).unwrap();
        for (id, hash) in blocks.iter().zip(hashes) {
            pool.insert(*id, *hash);
        }
        blocks
    }

    fn removed(pool: &mut BlockPool) -> Vec<Digest> {
        let events = pool.take_events().into_iter();
        let removed = events.map(|event| match event {
            KvEvent::BlockRemoved { block_hash } => block_hash,
            other => panic!("expected a removal, found {other:?}"),
        });
        removed.collect()
    }

    #[test]
    fn tail_of_oldest_request_is_evicted_first() {
        let [a, b, c] = hashes();
        let mut pool = BlockPool::new(4);
        let old = store(&mut pool, &[a, b]);
        let new = store(&mut pool, &[c]);
        pool.release(old.into_iter().rev());
        pool.release(new);
        pool.take(3).unwrap();
        assert_eq!(removed(&mut pool), [b, a, c]);
    }

    #[test]
    fn hit_moves_a_block_behind_the_others() {
        let [a, b] = hashes();
        let mut pool = BlockPool::new(3);
        for hash in [a, b] {
            let blocks = store(&mut pool, &[hash]);
            pool.release(blocks);
        }
        let hit = pool.lookup(&[a]);
        pool.touch(&hit);
        pool.release(hit);
        pool.take(2).unwrap();
        assert_eq!(removed(&mut pool), [b, a]);
    }

    #[test]
    fn blocks_without_hash_are_reused_before_any_cached_one() {
        let [a] = hashes();
        let mut pool = BlockPool::new(3);
        let cached = store(&mut pool, &[a]);
        let partial = pool.take(1).unwrap();
        pool.release(cached);
        pool.release(partial);
        pool.take(1).unwrap();
        assert!(removed(&mut pool).is_empty());
    }

    #[test]
    fn copies_are_removed_one_by_one_and_serve_hits_until_the_last() {
        let [a] = hashes();
        let mut pool = BlockPool::new(3);
        let copies = [store(&mut pool, &[a]), store(&mut pool, &[a])];
        copies.into_iter().for_each(|copy| pool.release(copy));
        pool.take(1).unwrap();
        assert_eq!((removed(&mut pool), pool.lookup(&[a]).len()), (vec![a], 1));
        pool.take(1).unwrap();
        assert_eq!((removed(&mut pool), pool.lookup(&[a]).len()), (vec![a], 0));
    }

    #[test]
    fn reset_is_refused_while_blocks_are_held() {
        let [a] = hashes();
        let mut pool = BlockPool::new(3);
        let held = store(&mut pool, &[a]);
        assert!(!pool.reset());
        pool.release(held);
        assert!(pool.reset());
        assert_eq!(pool.take_events(), [KvEvent::AllBlocksCleared]);
        assert!(pool.lookup(&[a]).is_empty());
    }
}
