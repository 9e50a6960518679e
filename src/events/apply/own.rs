//! What a source holds in the keyspace of our own hashes: engine hash → our key, with the copies of each tier.
//!
//! Our key of a block needs that of the block before it, so the map is also what tells a continuing event's place.
//! Several engine hashes can have one key (before vLLM 0.17 a salt is not shown): the slot then holds the key as often.

use std::collections::HashMap;

use crate::events::wire::{BlockKeys, BlockStored, ExtraItem};
use crate::routing::hash::own::{BlockContent, OwnHasher, OwnKey};
use crate::routing::hash::{BlockHash, BlockSize};
use crate::routing::index::{ContentDigest, KeyKinds, PrefixIndex, Tier};

use super::parked::Copies;
use super::slots::{TierSlots, tiered};
use super::{Shared, When};

/// Bytes of one block in the map at the worst moment, beside those in the index: 25 per place, 7/16 in use after
/// doubling, and the old table beside it.
const ENTRY_BYTES: usize = 88;

/// Entries that the map may have room for while it holds few.
const SMALL: usize = 1024;

/// See the module.
#[derive(Debug)]
pub(super) struct OwnBlocks {
    slots: TierSlots,
    blocks: HashMap<BlockHash, OwnBlock>,
    digests: [ContentDigest; Tier::ALL.len()],
}

#[derive(Clone, Copy, Debug)]
struct OwnBlock {
    key: BlockHash,
    copies: Copies,
}

impl OwnBlocks {
    pub(super) fn new(slots: TierSlots) -> Self {
        Self { slots, blocks: HashMap::new(), digests: Default::default() }
    }

    /// Our key of a block that some tier holds.
    pub(super) fn key_of(&self, hash: BlockHash) -> Option<BlockHash> {
        self.blocks.get(&hash).map(|block| block.key)
    }

    pub(super) fn n_blocks(&self) -> usize {
        self.blocks.len()
    }

    pub(super) fn set_proved(&mut self, kinds: KeyKinds) {
        self.slots.set_proved(kinds);
    }

    pub(super) fn digest(&self) -> ContentDigest {
        let of_tier = |tier: Tier| tiered(self.digests[tier as usize], tier);
        Tier::ALL.into_iter().map(of_tier).fold(ContentDigest::default(), ContentDigest::and)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (BlockHash, BlockHash, Copies)> + '_ {
        self.blocks.iter().map(|(hash, block)| (*hash, block.key, block.copies))
    }

    /// Lets those who watch the block know that the engine stores it, if it does so now.
    pub(super) fn note_stored(&mut self, tier: Tier, hash: BlockHash, shared: &Shared) {
        if let Some(key) = self.key_of(hash) {
            self.note(tier, key, shared);
        }
    }

    fn note(&mut self, tier: Tier, key: BlockHash, shared: &Shared) {
        if shared.when == When::Now
            && let Some(slot) = self.slots.ensure(tier, &shared.index)
        {
            slot.note_stored(&[key]);
        }
    }

    /// Adds a copy of a block that the engine has stored to a tier, and lets those who watch the block know, if it was
    /// stored now; false: no room.
    pub(super) fn store(&mut self, tier: Tier, (hash, key): (BlockHash, BlockHash), shared: &Shared) -> bool {
        let key = self.key_of(hash).unwrap_or(key);
        self.note(tier, key, shared);
        self.add(tier, (hash, key), 1, &shared.index)
    }

    /// Adds `n_copies` of a block that are no news to a tier; false: no room.
    pub(super) fn add(
        &mut self,
        tier: Tier,
        (hash, key): (BlockHash, BlockHash),
        n_copies: u16,
        index: &PrefixIndex,
    ) -> bool {
        if let Some(block) = self.blocks.get_mut(&hash).filter(|block| block.copies[tier as usize] > 0) {
            let copies = &mut block.copies[tier as usize];
            *copies = copies.saturating_add(n_copies);
            return true;
        }
        // A key that the map has cannot change: the hash says what the block is.
        let key = self.key_of(hash).unwrap_or(key);
        let Some(slot) = self.slots.ensure(tier, index) else { return false };
        if !slot.charge(ENTRY_BYTES) {
            return false;
        }
        if slot.add(&[key]).n_refused > 0 {
            slot.release(ENTRY_BYTES);
            return false;
        }
        let block = self.blocks.entry(hash).or_insert(OwnBlock { key, copies: Copies::default() });
        block.copies[tier as usize] = n_copies;
        self.digests[tier as usize].add(hash);
        true
    }

    /// Whether the tier holds the block.
    pub(super) fn holds(&self, tier: Tier, hash: BlockHash) -> bool {
        self.blocks.get(&hash).is_some_and(|block| block.copies[tier as usize] > 0)
    }

    /// Takes one copy away; says whether there was one.
    pub(super) fn remove(&mut self, tier: Tier, hash: BlockHash) -> bool {
        let Some(block) = self.blocks.get_mut(&hash).filter(|block| block.copies[tier as usize] > 0) else {
            return false;
        };
        block.copies[tier as usize] -= 1;
        if block.copies[tier as usize] > 0 {
            return true;
        }
        let OwnBlock { key, copies } = *block;
        if let Some(slot) = self.slots.get_mut(tier) {
            slot.remove(key);
            slot.release(ENTRY_BYTES);
        }
        self.digests[tier as usize].remove(hash);
        if copies == Copies::default() {
            self.blocks.remove(&hash);
            self.shrink();
        }
        true
    }

    pub(super) fn clear(&mut self, tier: Tier) {
        self.slots.clear(tier);
        self.digests[tier as usize] = ContentDigest::default();
        self.blocks.retain(|_, block| {
            block.copies[tier as usize] = 0;
            block.copies != Copies::default()
        });
        self.shrink();
    }

    /// What is counted as free must be free, see `routing::index`.
    fn shrink(&mut self) {
        if self.blocks.capacity() > 4 * self.blocks.len().max(SMALL) {
            self.blocks.shrink_to(2 * self.blocks.len());
        }
    }
}

/// The contents of an event's blocks; none when its tokens and extra keys are not those of all its blocks.
pub(super) fn contents(
    stored: &BlockStored<'_>,
    block_size: BlockSize,
    hasher: &mut OwnHasher,
) -> Option<Vec<BlockContent>> {
    let (n_blocks, n_tokens) = (stored.block_hashes.len(), block_size.get() as usize);
    let is_dense = n_blocks.checked_mul(n_tokens) == Some(stored.token_ids.len());
    if !is_dense || stored.extra_keys.is_some_and(|keys| keys.n_blocks() != n_blocks) {
        return None;
    }
    let mut tokens = stored.token_ids.iter();
    let mut extra_keys = stored.extra_keys.map(|keys| keys.iter());
    let content = |_| {
        let keys = own_keys(stored.lora_name, extra_keys.as_mut().and_then(Iterator::next));
        hasher.content(tokens.by_ref().take(n_tokens), keys)
    };
    Some((0..n_blocks).map(content).collect())
}

/// The extra keys of a block: untagged on the wire, where the adapter comes first and a lone string is the salt.
fn own_keys<'a>(lora_name: Option<&'a str>, keys: Option<BlockKeys<'a>>) -> impl Iterator<Item = OwnKey<'a>> {
    let adapter = lora_name.map(OwnKey::Adapter);
    let items = keys.into_iter().flat_map(|keys| keys.iter()).enumerate();
    let rest = items.filter(move |(item_idx, item)| {
        let is_adapter = matches!(item, ExtraItem::Str(text) if Some(*text) == lora_name);
        !(*item_idx == 0 && is_adapter)
    });
    adapter.into_iter().chain(rest.map(|(_, item)| match item {
        ExtraItem::Str(salt) => OwnKey::Salt(salt),
        ExtraItem::Mm(identifier, offset) => OwnKey::Mm(identifier, offset),
        ExtraItem::Bytes(digest) => OwnKey::Embeds(digest),
        ExtraItem::Other(raw) => OwnKey::Other(raw),
    }))
}
