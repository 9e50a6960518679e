//! The one writer of a slot.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use papaya::Operation;

use super::bytes::{BLOCK_BYTES, COPY_BYTES, Share};
use super::slots::SlotId;
use super::{Holder, Holders, KeyKinds, KeyspaceIndex, SeededFold};
use crate::routing::hash::BlockHash;

/// What became of a call of [`SlotWriter::store`], in blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreOutcome {
    /// Blocks that the slot did not hold before.
    pub n_new: u32,
    /// Further copies of blocks that it held.
    pub n_copies: u32,
    /// Blocks refused because the slot or the index is full, and copies not remembered for that reason or because too
    /// many blocks have copies.
    pub n_refused: u32,
}

/// Which blocks a source holds, in a form that two routers can compare: equal for equal sets, whatever the order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ContentDigest {
    /// Number of distinct blocks.
    pub n_blocks: u64,
    /// Wrapping sum of their hashes, each mixed.
    pub sum: u64,
}

impl ContentDigest {
    /// Counts a block in.
    pub fn add(&mut self, hash: BlockHash) {
        self.n_blocks += 1;
        self.sum = self.sum.wrapping_add(mixed(hash));
    }

    /// Counts a block out that was counted in.
    pub fn remove(&mut self, hash: BlockHash) {
        self.n_blocks -= 1;
        self.sum = self.sum.wrapping_sub(mixed(hash));
    }

    /// The digest of two sets that have no block in common.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self { n_blocks: self.n_blocks + other.n_blocks, sum: self.sum.wrapping_add(other.sum) }
    }
}

/// The finalizer of SplitMix64: without it, sums of chosen hashes could be made equal.
fn mixed(BlockHash(hash): BlockHash) -> u64 {
    let word = hash.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// Writes one slot of a [`KeyspaceIndex`]: what one generation of one source holds on one tier.
///
/// An engine announces each physical copy of a block, so a block stored twice and removed once stays. The index knows
/// the first copy; the others are counted here, in a bounded map. When it is full, a further copy is not remembered and
/// the block leaves with its first removal: the count is too low, never too high.
///
/// Dropping the writer retires the slot, also while a panic unwinds.
#[derive(Debug)]
pub struct SlotWriter {
    index: Arc<KeyspaceIndex>,
    slot: SlotId,
    holder: Holder,
    /// Every block that names the slot in the index; makes the sweep as long as this set and not as the index.
    blocks: HashSet<BlockHash, SeededFold>,
    /// Copies beyond the first, at least 1 each.
    extra_copies: HashMap<BlockHash, u32, SeededFold>,
    digest: ContentDigest,
    bytes: Share,
    proved: KeyKinds,
}

impl SlotWriter {
    pub(super) fn new(index: Arc<KeyspaceIndex>, slot: SlotId, holder: Holder) -> Self {
        let hasher = SeededFold::random();
        let bytes = Share::new(index.account.clone(), index.limits.bytes_per_slot);
        Self {
            index,
            slot,
            holder,
            blocks: HashSet::with_hasher(hasher),
            extra_copies: HashMap::with_hasher(hasher),
            digest: ContentDigest::default(),
            bytes,
            proved: KeyKinds::NONE,
        }
    }

    /// Adds one copy of each block; they are one chain.
    pub fn store(&mut self, hashes: &[BlockHash]) -> StoreOutcome {
        self.note_stored(hashes);
        self.add(hashes)
    }

    /// The same for blocks that the engine has held before: nobody who watches them is told.
    pub fn add(&mut self, hashes: &[BlockHash]) -> StoreOutcome {
        self.store_each(hashes, |slot, hash| if slot.add_copies(hash, 1) { Stored::Copy } else { Stored::Refused })
    }

    /// Lets those who watch the blocks know that the engine stores them, where the index itself does not change.
    pub fn note_stored(&self, hashes: &[BlockHash]) {
        self.index.watches.stored(hashes, self.holder);
    }

    /// Adds the blocks that are not held yet; the others get no further copy.
    pub fn store_missing(&mut self, hashes: &[BlockHash]) -> StoreOutcome {
        self.store_each(hashes, |_, _| Stored::Nothing)
    }

    /// Adds a block that is not held yet, with that many copies; says whether there was room for the block.
    pub fn store_copies(&mut self, hash: BlockHash, n_copies: u32) -> bool {
        let outcome = self.store_missing(&[hash]);
        if outcome.n_new > 0 && n_copies > 1 {
            // Copies that find no room make the block leave early.
            self.add_copies(hash, n_copies - 1);
        }
        outcome.n_refused == 0
    }

    /// Takes one copy of the block away; one that is not held is ignored. Says whether it was held.
    pub fn remove(&mut self, hash: BlockHash) -> bool {
        if !self.blocks.contains(&hash) {
            return false;
        }
        if !self.take_copy(hash) {
            self.drop_block(hash);
        }
        true
    }

    /// Takes all copies of the block away and says how many there were.
    pub fn take(&mut self, hash: BlockHash) -> u32 {
        let n_copies = self.n_copies(hash);
        if n_copies > 0 {
            if self.extra_copies.remove(&hash).is_some() {
                self.bytes.release(COPY_BYTES);
            }
            self.drop_block(hash);
        }
        n_copies
    }

    /// Whether the slot holds the block.
    pub fn holds(&self, hash: BlockHash) -> bool {
        self.blocks.contains(&hash)
    }

    /// How many copies of the block the slot holds.
    pub fn n_copies(&self, hash: BlockHash) -> u32 {
        if self.holds(hash) { 1 + self.extra_copies.get(&hash).copied().unwrap_or(0) } else { 0 }
    }

    /// The blocks with their copies, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (BlockHash, u32)> + '_ {
        self.blocks.iter().map(|hash| (*hash, self.n_copies(*hash)))
    }

    /// What the slot holds, in comparable form; copies do not count.
    pub fn digest(&self) -> ContentDigest {
        self.digest
    }

    /// Counts memory that a caller keeps beside the slot; false, and nothing changes, when there is no room for it.
    pub fn charge(&mut self, n_bytes: usize) -> bool {
        self.bytes.charge(n_bytes)
    }

    /// Takes back a [`Self::charge`].
    pub fn release(&mut self, n_bytes: usize) {
        self.bytes.release(n_bytes);
    }

    /// Drops all blocks; for readers at once. What is proved stays proved; what was charged beside the slot is
    /// released.
    pub fn clear(&mut self) {
        self.index.slots.kill(self.slot);
        self.sweep();
        self.index.slots.revive(self.slot, self.holder.endpoint);
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

    /// Adds each block that is new; `store_again` says what becomes of the others.
    fn store_each(
        &mut self,
        hashes: &[BlockHash],
        store_again: impl Fn(&mut Self, BlockHash) -> Stored,
    ) -> StoreOutcome {
        let mut outcome = StoreOutcome::default();
        let index = Arc::clone(&self.index);
        let guard = index.blocks.guard();
        for &hash in hashes {
            let stored = if self.blocks.contains(&hash) {
                store_again(self, hash)
            } else if self.bytes.charge(BLOCK_BYTES) {
                // First into the own set: whatever happens in between, the sweep finds every block that names the slot.
                self.blocks.insert(hash);
                self.digest.add(hash);
                index.blocks.change(hash, &guard, |holders| add_holder(holders, self.slot));
                Stored::New
            } else {
                Stored::Refused
            };
            outcome.count(stored);
        }
        // What is refused too: from here on it is the source that says what the endpoint holds.
        index.promises.confirm(hashes, self.holder.endpoint);
        outcome
    }

    fn add_copies(&mut self, hash: BlockHash, n_copies: u32) -> bool {
        if let Some(copies) = self.extra_copies.get_mut(&hash) {
            *copies = copies.saturating_add(n_copies);
            return true;
        }
        let has_room = self.extra_copies.len() < self.index.limits.copied_blocks_per_slot;
        let is_charged = has_room && self.bytes.charge(COPY_BYTES);
        if is_charged {
            self.extra_copies.insert(hash, n_copies);
        }
        is_charged
    }

    /// Takes one copy beyond the first away, if there is one.
    fn take_copy(&mut self, hash: BlockHash) -> bool {
        let Some(copies) = self.extra_copies.get_mut(&hash) else {
            return false;
        };
        *copies -= 1;
        if *copies == 0 {
            self.extra_copies.remove(&hash);
            self.bytes.release(COPY_BYTES);
        }
        true
    }

    fn drop_block(&mut self, hash: BlockHash) {
        self.forget(hash);
        self.blocks.remove(&hash);
        self.digest.remove(hash);
        self.bytes.release(BLOCK_BYTES);
        // What was released may be used by others, so a set that was large once must not keep its memory.
        if self.blocks.capacity() > 4 * self.blocks.len().max(1024) {
            self.blocks.shrink_to(2 * self.blocks.len());
        }
    }

    fn forget(&self, hash: BlockHash) {
        let blocks = &self.index.blocks;
        blocks.change(hash, &blocks.guard(), |holders| remove_holder(holders, self.slot));
    }

    fn sweep(&mut self) {
        for &hash in &self.blocks {
            self.forget(hash);
        }
        // Not `clear`: a slot that was large once should not keep its memory.
        self.blocks = HashSet::with_hasher(*self.blocks.hasher());
        self.extra_copies = HashMap::with_hasher(*self.extra_copies.hasher());
        self.digest = ContentDigest::default();
        self.bytes.release_all();
    }
}

impl Drop for SlotWriter {
    fn drop(&mut self) {
        self.index.slots.kill(self.slot);
        self.sweep();
        self.index.slots.release(self.slot);
    }
}

/// What became of one block.
#[derive(Clone, Copy)]
enum Stored {
    New,
    Copy,
    Nothing,
    Refused,
}

impl StoreOutcome {
    fn count(&mut self, stored: Stored) {
        match stored {
            Stored::New => self.n_new += 1,
            Stored::Copy => self.n_copies += 1,
            Stored::Nothing => {}
            Stored::Refused => self.n_refused += 1,
        }
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
