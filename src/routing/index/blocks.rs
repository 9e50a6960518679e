//! The inner level of the index: block hash → holders, in shards.
//!
//! papaya copies a table that has become too small, or that removals have filled with tombstones, at once: some ten
//! milliseconds for a million blocks, in which events wait. Shards make that a sixty-fourth, and share one collector,
//! so that a lookup over all of them takes one guard. Readers never wait for a copy.

use std::hash::BuildHasher;
use std::sync::Arc;

use papaya::{LocalGuard, Operation, ResizeMode};

use super::{Holders, SeededFold};
use crate::routing::hash::BlockHash;

/// Bits of a block's place that choose its shard.
const SHARD_BITS: u32 = 6;

type Shard = papaya::HashMap<BlockHash, Holders, SeededFold>;

/// See the module. Many writers, each of which only ever adds or removes its own slot.
#[derive(Debug)]
pub(super) struct Blocks {
    shards: Box<[Shard]>,
    /// Not that of the tables: there, equal high bits would make all keys of a shard collide.
    choice: SeededFold,
}

impl Blocks {
    pub(super) fn new() -> Self {
        let collector = Arc::new(seize::Collector::new());
        let shard = |_| {
            let builder = papaya::HashMap::builder().hasher(SeededFold::random()).resize_mode(ResizeMode::Blocking);
            builder.shared_collector(collector.clone()).build()
        };
        Self { shards: (0..1 << SHARD_BITS).map(shard).collect(), choice: SeededFold::random() }
    }

    /// What a row of calls needs: while it lives, nothing that they return is freed.
    pub(super) fn guard(&self) -> LocalGuard<'_> {
        self.shards[0].guard()
    }

    pub(super) fn get<'g>(&self, hash: BlockHash, guard: &'g LocalGuard<'_>) -> Option<&'g Holders> {
        self.shard(hash).get(&hash, guard)
    }

    /// Replaces the holders of a block by what `change` makes of them; it may be called more than once.
    pub(super) fn change(
        &self,
        hash: BlockHash,
        guard: &LocalGuard<'_>,
        mut change: impl FnMut(Option<&Holders>) -> Operation<Holders, ()>,
    ) {
        self.shard(hash).compute(hash, |entry| change(entry.map(|(_, holders)| holders)), guard);
    }

    /// Number of distinct blocks.
    pub(super) fn len(&self) -> usize {
        self.shards.iter().map(Shard::len).sum()
    }

    fn shard(&self, hash: BlockHash) -> &Shard {
        let place = self.choice.hash_one(hash.0) >> (u64::BITS - SHARD_BITS);
        &self.shards[place as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::super::slots::SlotId;
    use super::*;

    #[test]
    fn blocks_spread_over_all_shards_and_are_found_in_theirs() {
        let blocks = Blocks::new();
        let guard = blocks.guard();
        // As evenly distributed as engines' hashes: one multiplication does not spread neighbours under every seed.
        let mut random = fastrand::Rng::with_seed(0);
        let hashes: Vec<BlockHash> = std::iter::repeat_with(|| BlockHash(random.u64(..))).take(10_000).collect();
        for hash in &hashes {
            blocks.change(*hash, &guard, |_| Operation::Insert(Holders::One(SlotId(3))));
        }
        let n_of_shards: Vec<usize> = blocks.shards.iter().map(Shard::len).collect();
        assert!(n_of_shards.iter().all(|n| (80..250).contains(n)), "uneven: {n_of_shards:?}");
        assert!(hashes.iter().all(|hash| blocks.get(*hash, &guard).is_some()));
        assert_eq!(blocks.len(), 10_000);
        blocks.change(hashes[7], &guard, |_| Operation::Remove);
        assert!(blocks.get(hashes[7], &guard).is_none());
    }
}
