//! Blocks whose chain is not known back to its root: kept until the missing block is announced.
//!
//! Of each block its content is kept, not its tokens. A block that leaves the engine while others wait behind it stays
//! as a link without copies, so that those are not lost. What finds no room is dropped and counted: such blocks are not
//! credited until they are announced again.
//!
//! Cost: [`PARKED_BYTES`] per block, two walks down small trees; nothing at all while nothing is parked.

use std::collections::BTreeMap;

use crate::routing::hash::BlockHash;
use crate::routing::hash::own::BlockContent;
use crate::routing::index::Tier;

/// Bytes of one block: 32 and 16 in B-trees whose nodes are at least 5/11 full.
pub(super) const PARKED_BYTES: usize = 112;

/// How many copies of a block each tier holds.
pub(super) type Copies = [u16; Tier::ALL.len()];

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Parked {
    /// (parent, block) → the block. The blocks behind one parent are neighbours.
    blocks: BTreeMap<(BlockHash, BlockHash), Waiting>,
    /// Block → its parent.
    parents: BTreeMap<BlockHash, BlockHash>,
}

/// A block that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Waiting {
    pub(super) content: BlockContent,
    pub(super) copies: Copies,
}

impl Parked {
    pub(super) fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    #[cfg(test)]
    pub(super) fn n_blocks(&self) -> usize {
        self.blocks.len()
    }

    pub(super) fn holds(&self, hash: BlockHash) -> bool {
        self.parents.contains_key(&hash)
    }

    /// Adds a copy of each block of a chain behind `parent`, until `limit` bytes are in use; says how many found no
    /// room.
    pub(super) fn park(
        &mut self,
        parent: BlockHash,
        tier: Tier,
        chain: impl ExactSizeIterator<Item = (BlockHash, BlockContent)>,
        limit: usize,
    ) -> usize {
        let mut parent = parent;
        let mut n_left = chain.len();
        for (hash, content) in chain {
            match self.parents.get(&hash) {
                Some(known) if *known != parent => return n_left,
                None if (self.blocks.len() + 1) * PARKED_BYTES > limit => return n_left,
                _ => {}
            }
            let copies = Copies::default();
            let waiting = self.blocks.entry((parent, hash)).or_insert(Waiting { content, copies });
            waiting.copies[tier as usize] = waiting.copies[tier as usize].saturating_add(1);
            self.parents.insert(hash, parent);
            parent = hash;
            n_left -= 1;
        }
        0
    }

    /// Puts one block back as it was.
    pub(super) fn restore(&mut self, parent: BlockHash, hash: BlockHash, waiting: Waiting) {
        self.blocks.insert((parent, hash), waiting);
        self.parents.insert(hash, parent);
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (BlockHash, BlockHash, Waiting)> + '_ {
        self.blocks.iter().map(|((parent, hash), waiting)| (*parent, *hash, *waiting))
    }

    /// Takes one copy away; says whether there was one.
    pub(super) fn remove(&mut self, tier: Tier, hash: BlockHash) -> bool {
        let Some(parent) = self.parents.get(&hash).copied() else { return false };
        let Some(waiting) = self.blocks.get_mut(&(parent, hash)) else { return false };
        let copies = &mut waiting.copies[tier as usize];
        let was_held = *copies > 0;
        *copies = copies.saturating_sub(1);
        self.prune(hash);
        was_held
    }

    /// Takes the blocks right behind `parent` out.
    pub(super) fn take_children(&mut self, parent: BlockHash) -> Vec<(BlockHash, Waiting)> {
        let children: Vec<_> = self.children(parent).map(|(hash, waiting)| (hash, *waiting)).collect();
        for (hash, _) in &children {
            self.blocks.remove(&(parent, *hash));
            self.parents.remove(hash);
        }
        children
    }

    /// Drops everything behind `parent`.
    pub(super) fn forget_behind(&mut self, parent: BlockHash) {
        let mut dropped = vec![parent];
        while let Some(parent) = dropped.pop() {
            dropped.extend(self.take_children(parent).into_iter().map(|(hash, _)| hash));
        }
    }

    /// Drops the copies of one tier.
    pub(super) fn clear(&mut self, tier: Tier) {
        self.blocks.values_mut().for_each(|waiting| waiting.copies[tier as usize] = 0);
        let hashes: Vec<BlockHash> = self.parents.keys().copied().collect();
        hashes.into_iter().for_each(|hash| self.prune(hash));
    }

    fn children(&self, parent: BlockHash) -> impl Iterator<Item = (BlockHash, &Waiting)> {
        let all = (parent, BlockHash(0))..=(parent, BlockHash(u64::MAX));
        self.blocks.range(all).map(|((_, hash), waiting)| (*hash, waiting))
    }

    /// Drops a block that has no copy and no block behind it, and then perhaps those before it.
    fn prune(&mut self, hash: BlockHash) {
        let mut hash = hash;
        while let Some(parent) = self.parents.get(&hash).copied() {
            let is_held = self.blocks.get(&(parent, hash)).is_some_and(|waiting| waiting.copies != Copies::default());
            if is_held || self.children(hash).next().is_some() {
                return;
            }
            self.blocks.remove(&(parent, hash));
            self.parents.remove(&hash);
            hash = parent;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(hashes: &[u64]) -> impl ExactSizeIterator<Item = (BlockHash, BlockContent)> + '_ {
        hashes.iter().map(|hash| (BlockHash(*hash), BlockContent(100 + hash)))
    }

    #[test]
    fn blocks_wait_behind_their_parents_and_leave_with_their_last_copy() {
        let mut parked = Parked::default();
        assert_eq!(parked.park(BlockHash(1), Tier::Gpu, chain(&[2, 3, 4]), 1 << 20), 0);
        assert_eq!(parked.park(BlockHash(1), Tier::Cpu, chain(&[2]), 1 << 20), 0);
        assert!(parked.remove(Tier::Gpu, BlockHash(3)), "stays as a link");
        assert!(!parked.remove(Tier::Gpu, BlockHash(9)));
        let children = parked.take_children(BlockHash(1));
        assert_eq!(children, [(BlockHash(2), Waiting { content: BlockContent(102), copies: [1, 1, 0] })]);
        assert!(parked.holds(BlockHash(3)) && parked.holds(BlockHash(4)));
        assert!(parked.remove(Tier::Gpu, BlockHash(4)), "and with it the link before it");
        assert!(parked.is_empty());
    }

    #[test]
    fn what_finds_no_room_is_counted() {
        let mut parked = Parked::default();
        assert_eq!(parked.park(BlockHash(1), Tier::Gpu, chain(&[2, 3, 4]), 2 * PARKED_BYTES), 1);
        assert_eq!(parked.park(BlockHash(1), Tier::Gpu, chain(&[2, 3]), 2 * PARKED_BYTES), 0, "copies take no room");
        assert_eq!(parked.park(BlockHash(7), Tier::Gpu, chain(&[2]), 1 << 20), 1, "a second parent is a lie");
        parked.forget_behind(BlockHash(1));
        assert!(parked.is_empty());
    }

    #[test]
    fn cycle_of_parents_ends() {
        let mut parked = Parked::default();
        parked.park(BlockHash(1), Tier::Gpu, chain(&[2]), 1 << 20);
        parked.park(BlockHash(2), Tier::Gpu, chain(&[1]), 1 << 20);
        parked.park(BlockHash(3), Tier::Gpu, chain(&[3]), 1 << 20);
        parked.forget_behind(BlockHash(1));
        parked.clear(Tier::Gpu);
        assert!(parked.n_blocks() <= 1);
        assert!(parked.remove(Tier::Gpu, BlockHash(3)) || parked.n_blocks() <= 1);
    }
}
