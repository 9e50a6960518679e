//! The one writer of a slot.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use papaya::Operation;

use super::slots::SlotId;
use super::{Holders, KeyKinds, KeyspaceIndex, SeededFold};
use crate::routing::endpoint::EndpointId;
use crate::routing::hash::BlockHash;

/// What became of a call of [`SlotWriter::store`], in blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreOutcome {
    /// Blocks that the slot did not hold before.
    pub n_new: u32,
    /// Further copies of blocks that it held.
    pub n_copies: u32,
    /// Blocks refused because the slot is full, and copies not remembered because too many blocks have copies.
    pub n_refused: u32,
}

/// Writes one slot of a [`KeyspaceIndex`]: what one generation of one source holds.
///
/// An engine announces each physical copy of a block, so a block stored twice and removed once stays. The index knows the first copy;
/// the others are counted here, in a bounded map. When it is full, a further copy is not remembered and the block leaves
/// with its first removal: the count is too low, never too high.
///
/// Dropping the writer retires the slot, also while a panic unwinds.
#[derive(Debug)]
pub struct SlotWriter {
    index: Arc<KeyspaceIndex>,
    slot: SlotId,
    endpoint: EndpointId,
    /// Every block that names the slot in the index; makes the sweep as long as this set and not as the index.
    blocks: HashSet<BlockHash, SeededFold>,
    /// Copies beyond the first, at least 1 each.
    extra_copies: HashMap<BlockHash, u32, SeededFold>,
    proved: KeyKinds,
}

impl SlotWriter {
    pub(super) fn new(index: Arc<KeyspaceIndex>, slot: SlotId, endpoint: EndpointId) -> Self {
        let hasher = SeededFold::random();
        Self {
            index,
            slot,
            endpoint,
            blocks: HashSet::with_hasher(hasher),
            extra_copies: HashMap::with_hasher(hasher),
            proved: KeyKinds::NONE,
        }
    }

    /// Adds one copy of each block.
    pub fn store(&mut self, hashes: &[BlockHash]) -> StoreOutcome {
        let mut outcome = StoreOutcome::default();
        let index = Arc::clone(&self.index);
        let blocks = index.blocks.pin();
        for &hash in hashes {
            if self.blocks.contains(&hash) {
                let remembered = self.add_copy(hash);
                *(if remembered { &mut outcome.n_copies } else { &mut outcome.n_refused }) += 1;
            } else if self.blocks.len() >= index.limits.blocks_per_slot {
                outcome.n_refused += 1;
            } else {
                // First into the own set: whatever happens in between, the sweep finds every block that names the slot.
                self.blocks.insert(hash);
                blocks.compute(hash, |entry| add_holder(entry.map(|(_, holders)| holders), self.slot));
                outcome.n_new += 1;
            }
        }
        outcome
    }

    /// Takes one copy of the block away; one that is not held is ignored. Says whether it was held.
    pub fn remove(&mut self, hash: BlockHash) -> bool {
        if !self.blocks.contains(&hash) {
            return false;
        }
        if !self.take_copy(hash) {
            self.forget(hash);
            self.blocks.remove(&hash);
        }
        true
    }

    /// Whether the slot holds the block.
    pub fn holds(&self, hash: BlockHash) -> bool {
        self.blocks.contains(&hash)
    }

    /// Drops all blocks; for readers at once. What is proved stays proved.
    pub fn clear(&mut self) {
        self.index.slots.kill(self.slot);
        self.sweep();
        self.index.slots.revive(self.slot, self.endpoint);
    }

    /// Lets blocks whose hashes contain `kinds` be credited.
    pub fn prove(&mut self, kinds: KeyKinds) {
        self.proved = self.proved | kinds;
        self.index.slots.set_proved(self.slot, self.proved);
    }

    /// Takes the credit from blocks whose hashes contain any of `kinds`.
    pub fn disprove(&mut self, kinds: KeyKinds) {
        self.proved = self.proved.without(kinds);
        self.index.slots.set_proved(self.slot, self.proved);
    }

    /// The kinds that are proved.
    pub fn proved(&self) -> KeyKinds {
        self.proved
    }

    /// Number of distinct blocks that the slot holds.
    pub fn n_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Ends the generation: no credit from now on, then the sweep, then the slot is free again.
    pub fn retire(self) {
        drop(self);
    }

    fn add_copy(&mut self, hash: BlockHash) -> bool {
        let full = self.extra_copies.len() >= self.index.limits.copied_blocks_per_slot;
        match self.extra_copies.get_mut(&hash) {
            Some(copies) => *copies = copies.saturating_add(1),
            None if full => return false,
            None => {
                self.extra_copies.insert(hash, 1);
            }
        }
        true
    }

    /// Takes one copy beyond the first away, if there is one.
    fn take_copy(&mut self, hash: BlockHash) -> bool {
        let Some(copies) = self.extra_copies.get_mut(&hash) else {
            return false;
        };
        *copies -= 1;
        if *copies == 0 {
            self.extra_copies.remove(&hash);
        }
        true
    }

    fn forget(&self, hash: BlockHash) {
        self.index.blocks.pin().compute(hash, |entry| remove_holder(entry.map(|(_, holders)| holders), self.slot));
    }

    fn sweep(&mut self) {
        for &hash in &self.blocks {
            self.forget(hash);
        }
        // Not `clear`: a slot that was large once should not keep its memory.
        self.blocks = HashSet::with_hasher(*self.blocks.hasher());
        self.extra_copies = HashMap::with_hasher(*self.extra_copies.hasher());
    }
}

impl Drop for SlotWriter {
    fn drop(&mut self) {
        self.index.slots.kill(self.slot);
        self.sweep();
        self.index.slots.release(self.slot);
    }
}

fn add_holder(holders: Option<&Holders>, slot: SlotId) -> Operation<Holders, ()> {
    match holders {
        None => Operation::Insert(Holders::One(slot)),
        Some(holders) => holders.with(slot).map_or(Operation::Abort(()), Operation::Insert),
    }
}

fn remove_holder(holders: Option<&Holders>, slot: SlotId) -> Operation<Holders, ()> {
    match holders {
        None => Operation::Abort(()),
        Some(holders) => holders.without(slot).map_or(Operation::Remove, Operation::Insert),
    }
}
