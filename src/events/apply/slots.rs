//! The slots of one generation in one keyspace.

use crate::routing::hash::BlockHash;
use crate::routing::index::{ContentDigest, Holder, KeyKinds, Keyspace, PrefixIndex, SlotWriter, Tier};

use super::SourceName;

/// One slot for each tier that the source has used.
#[derive(Debug)]
pub(super) struct TierSlots {
    keyspace: Keyspace,
    name: SourceName,
    slots: [Option<SlotWriter>; Tier::ALL.len()],
    proved: KeyKinds,
}

impl TierSlots {
    pub(super) fn new(keyspace: Keyspace, name: SourceName, proved: KeyKinds) -> Self {
        Self { keyspace, name, slots: Default::default(), proved }
    }

    /// The tier's slot, acquired when there is none yet; none: the index has no room for one.
    pub(super) fn ensure(&mut self, tier: Tier, index: &PrefixIndex) -> Option<&mut SlotWriter> {
        let slot = &mut self.slots[tier as usize];
        if slot.is_none() {
            let holder = Holder { endpoint: self.name.endpoint, rank: self.name.rank, tier };
            *slot = index.acquire(&self.keyspace, holder);
            if let Some(slot) = slot {
                slot.prove(self.proved);
            }
        }
        slot.as_mut()
    }

    pub(super) fn get(&self, tier: Tier) -> Option<&SlotWriter> {
        self.slots[tier as usize].as_ref()
    }

    pub(super) fn get_mut(&mut self, tier: Tier) -> Option<&mut SlotWriter> {
        self.slots[tier as usize].as_mut()
    }

    /// Whether some tier holds the block.
    pub(super) fn holds(&self, hash: BlockHash) -> bool {
        self.slots.iter().flatten().any(|slot| slot.holds(hash))
    }

    /// Credits hashes that contain `kinds`, and no others.
    pub(super) fn set_proved(&mut self, kinds: KeyKinds) {
        if self.proved == kinds {
            return;
        }
        self.proved = kinds;
        for slot in self.slots.iter_mut().flatten() {
            slot.disprove(slot.proved().without(kinds));
            slot.prove(kinds);
        }
    }

    pub(super) fn clear(&mut self, tier: Tier) {
        if let Some(slot) = self.get_mut(tier) {
            slot.clear();
        }
    }

    pub(super) fn n_blocks(&self) -> usize {
        self.slots.iter().flatten().map(SlotWriter::n_blocks).sum()
    }

    pub(super) fn digest(&self) -> ContentDigest {
        let of_tier = |tier: Tier| self.get(tier).map(|slot| tiered(slot.digest(), tier)).unwrap_or_default();
        Tier::ALL.into_iter().map(of_tier).fold(ContentDigest::default(), ContentDigest::and)
    }
}

/// The digest of blocks on `tier`: the same blocks on another one are another content.
pub(super) fn tiered(digest: ContentDigest, tier: Tier) -> ContentDigest {
    ContentDigest { sum: digest.sum.wrapping_mul(2 * tier as u64 + 1), ..digest }
}
