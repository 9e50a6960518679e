//! What is known of one life of a publisher, and where its blocks go.
//!
//! A block is in one place: in the slots of the Engine keyspace under the engine's hash, or in those of the keyspace
//! Own under ours. An event that continues a chain follows its parent. One that begins a prompt goes to Engine when all
//! kinds of keys in it are proved, else to Own. Where the parent is not known, the blocks go to Engine, which is
//! harmless since a hash is credited only if a request computes it, and are parked as well, in case that they turn out
//! to be of a chain in Own.

use crate::events::wire::{BlockRemoved, BlockStored};
use crate::routing::hash::own::{BlockContent, OwnHasher};
use crate::routing::hash::{BlockHash, BlockSize};
use crate::routing::index::{ContentDigest, KeyKinds, Keyspace, KeyspaceKind, Tier};

use super::chain::{Chain, continued_kinds};
use super::own::{OwnBlocks, contents};
use super::parked::Parked;
use super::proof::Proof;
use super::slots::TierSlots;
use super::{Shared, When, report};

/// Tokens per block beyond which a publisher is not believed.
const MAX_BLOCK_SIZE: u32 = 1 << 14;

/// Bytes of parked blocks: a source should cost little besides its blocks in the index.
pub(super) const PARKED_LIMIT: usize = 32 << 10;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Generation {
    /// That of the first usable event.
    pub(super) block_size: Option<BlockSize>,
    /// Number of the full-attention group that is indexed.
    pub(super) group: Option<u32>,
    pub(super) proof: Proof,
    /// Whether the publisher is a vLLM from 0.17 on. Others hide salts.
    pub(super) shows_extra_keys: bool,
    pub(super) engine: Option<TierSlots>,
    pub(super) own: Option<OwnBlocks>,
    pub(super) parked: Parked,
    /// Whether the index had no room for something.
    pub(super) is_full: bool,
    pub(super) warned_of_block_size: bool,
}

/// Where the blocks of an event go.
enum Place {
    Engine,
    /// Behind the block with this key of ours.
    Own(BlockHash),
    /// Behind a block that nothing is known of.
    Unknown(BlockHash),
}

/// The blocks of an event.
struct Blocks<'a> {
    tier: Tier,
    hashes: &'a [BlockHash],
    /// None: they cannot be computed from the event.
    contents: Option<Vec<BlockContent>>,
    /// Blocks that are known are announced once more, and have no further copy.
    is_announced_again: bool,
}

impl Generation {
    /// Takes an event in; says whether it was of use. `is_continued`: an event behind it in the batch continues its
    /// chain.
    pub(super) fn store(&mut self, stored: &BlockStored<'_>, is_continued: bool, shared: &mut Shared) -> bool {
        let hashes: Vec<BlockHash> = stored.block_hashes.iter().map(|hash| hash.low64()).collect();
        let Some(tier) = tier_of(stored.medium).filter(|_| self.indexes(stored)) else { return false };
        if stored.block_size == 0 {
            return self.store_placeholders(tier, &hashes, shared);
        }
        if !self.has_block_size(stored.block_size, shared) {
            return false;
        }
        let place = {
            let chain = Chain::of(stored, &shared.settings);
            self.learn(stored, chain.as_ref(), shared);
            self.place_of(stored, chain.as_ref(), &hashes, shared)
        };
        let contents = match (&place, self.block_size) {
            (Place::Own(_) | Place::Unknown(_), Some(block_size)) => {
                contents(stored, block_size, &mut shared.own_hasher)
            }
            _ => None,
        };
        let is_announced_again = stored.parent.is_none() && (shared.settings.reports || is_continued);
        let blocks = Blocks { tier, hashes: &hashes, contents, is_announced_again };
        match place {
            Place::Unknown(parent) => self.store_orphans(parent, blocks, stored, shared),
            Place::Own(parent) if blocks.contents.is_some() => {
                self.store_own(parent, &blocks, shared);
                true
            }
            // Without its tokens, a block can only be known by its hash.
            Place::Own(_) | Place::Engine => self.store_rooted(&blocks, shared),
        }
    }

    /// Takes copies away; says whether the event was one for us.
    pub(super) fn remove(&mut self, removed: &BlockRemoved<'_>) -> bool {
        let is_ours = removed.group_idx.is_none_or(|group| self.group == Some(group));
        let Some(tier) = tier_of(removed.medium).filter(|_| is_ours) else { return false };
        if self.engine.is_none() && self.own.is_none() && self.parked.is_empty() {
            return false;
        }
        for hash in &removed.block_hashes {
            let hash = hash.low64();
            if self.own.as_mut().is_some_and(|own| own.remove(tier, hash)) {
                continue;
            }
            if let Some(slot) = self.engine.as_mut().and_then(|engine| engine.get_mut(tier)) {
                slot.remove(hash);
            }
            if !self.parked.is_empty() {
                self.parked.remove(tier, hash);
            }
        }
        true
    }

    /// Drops all blocks of a tier.
    pub(super) fn clear(&mut self, tier: Tier) {
        if let Some(engine) = &mut self.engine {
            engine.clear(tier);
        }
        if let Some(own) = &mut self.own {
            own.clear(tier);
        }
        self.parked.clear(tier);
    }

    pub(super) fn digest(&self) -> ContentDigest {
        let engine = self.engine.as_ref().map(TierSlots::digest).unwrap_or_default();
        engine.and(self.own.as_ref().map(OwnBlocks::digest).unwrap_or_default())
    }

    pub(super) fn n_blocks(&self) -> usize {
        let engine = self.engine.as_ref().map_or(0, TierSlots::n_blocks);
        engine + self.own.as_ref().map_or(0, OwnBlocks::n_blocks)
    }

    /// The slots of the Engine keyspace; none where the engine's root or the block size is not known.
    pub(super) fn engine(&mut self, shared: &Shared) -> Option<&mut TierSlots> {
        if self.engine.is_none() {
            let hasher = shared.hasher.as_ref()?;
            let kind = KeyspaceKind::Engine { algorithm: hasher.algorithm(), root: hasher.root() };
            let keyspace = Keyspace { model: shared.settings.model.clone(), block_size: self.block_size?, kind };
            self.engine = Some(TierSlots::new(keyspace, shared.name, self.proof.proved));
        }
        self.engine.as_mut()
    }

    /// The blocks in the keyspace Own; none where the block size is not known.
    pub(super) fn own(&mut self, shared: &Shared) -> Option<&mut OwnBlocks> {
        if self.own.is_none() {
            let (model, block_size) = (shared.settings.model.clone(), self.block_size?);
            let keyspace = Keyspace { model, block_size, kind: KeyspaceKind::Own };
            self.own = Some(OwnBlocks::new(TierSlots::new(keyspace, shared.name, self.own_kinds())));
        }
        self.own.as_mut()
    }

    /// Whether the event's blocks belong into the index; learns which group does.
    fn indexes(&mut self, stored: &BlockStored<'_>) -> bool {
        // Before vLLM 0.14 an adapter is a number that says nothing outside of the engine.
        let hides_adapter = stored.lora_name.is_none() && stored.lora_id.is_some_and(|id| id > 0);
        if stored.block_hashes.is_empty() || hides_adapter || !is_full_attention(stored.spec_kind) {
            return false;
        }
        stored.group_idx.is_none_or(|group| *self.group.get_or_insert(group) == group)
    }

    fn has_block_size(&mut self, n_tokens: u32, shared: &Shared) -> bool {
        let Some(block_size) = BlockSize::new(n_tokens).filter(|_| is_block_size(n_tokens)) else { return false };
        let is_ours = *self.block_size.get_or_insert(block_size) == block_size;
        if !is_ours && !self.warned_of_block_size {
            self.warned_of_block_size = true;
            shared.warn_of_block_size(block_size);
        }
        is_ours
    }

    /// Learns what the event says about the publisher.
    fn learn(&mut self, stored: &BlockStored<'_>, chain: Option<&Chain<'_>>, shared: &Shared) {
        self.shows_extra_keys |= stored.extra_keys.is_some();
        if let (Some(hasher), Some(chain)) = (&shared.hasher, chain) {
            let findings = self.proof.examine(chain, hasher);
            findings.iter().for_each(|finding| report(&shared.name, finding));
        }
        if let Some(engine) = &mut self.engine {
            engine.set_proved(self.proof.proved);
        }
        let own_kinds = self.own_kinds();
        if let Some(own) = &mut self.own {
            own.set_proved(own_kinds);
        }
    }

    /// What may be credited in Own: a publisher that hides extra keys has salted blocks among the others, and those of
    /// different images under the same placeholder tokens.
    pub(super) fn own_kinds(&self) -> KeyKinds {
        let shown = if self.shows_extra_keys { KeyKinds::SALT | KeyKinds::MM } else { KeyKinds::NONE };
        KeyKinds::PLAIN | KeyKinds::ADAPTERS | shown
    }

    fn place_of(
        &self,
        stored: &BlockStored<'_>,
        chain: Option<&Chain<'_>>,
        hashes: &[BlockHash],
        shared: &Shared,
    ) -> Place {
        let own_key = |hash| self.own.as_ref().and_then(|own| own.key_of(hash));
        let Some(parent) = stored.parent.map(|parent| parent.low64()) else {
            let is_proved = chain.is_some_and(|chain| self.proof.proved.contains(chain.required()));
            // A chain stays together, also when it is proved later.
            let is_in_own = hashes.first().is_some_and(|hash| own_key(*hash).is_some());
            return if is_proved && !is_in_own { Place::Engine } else { Place::Own(shared.own_hasher.root()) };
        };
        if let Some(key) = own_key(parent) {
            return Place::Own(key);
        }
        let is_in_engine = self.engine.as_ref().is_some_and(|engine| engine.holds(parent));
        let is_anchored = is_in_engine && (self.parked.is_empty() || !self.parked.holds(parent));
        if is_anchored { Place::Engine } else { Place::Unknown(parent) }
    }

    /// Blocks of offload tiers that are announced by their hashes alone: something must be known of them.
    fn store_placeholders(&mut self, tier: Tier, hashes: &[BlockHash], shared: &Shared) -> bool {
        let blocks = Blocks { tier, hashes, contents: None, is_announced_again: false };
        self.store_engine(&blocks, shared)
    }

    /// Stores blocks of a chain that is in Engine back to its root.
    fn store_rooted(&mut self, blocks: &Blocks<'_>, shared: &Shared) -> bool {
        let was_stored = self.store_engine(blocks, shared);
        if !self.parked.is_empty() {
            // What waited behind them is in Engine already.
            blocks.hashes.iter().for_each(|hash| self.parked.forget_behind(*hash));
        }
        was_stored
    }

    /// Stores blocks by their hashes; those that are in Own stay there. False: the event is of no use.
    fn store_engine(&mut self, blocks: &Blocks<'_>, shared: &Shared) -> bool {
        let is_in_own = |own: &OwnBlocks| blocks.hashes.iter().any(|hash| own.key_of(*hash).is_some());
        if self.own.as_ref().is_some_and(is_in_own) {
            return self.store_each(blocks, shared);
        }
        let Blocks { tier, hashes, is_announced_again, .. } = *blocks;
        let Some(engine) = self.engine(shared) else { return false };
        let n_refused = match engine.ensure(tier, &shared.index) {
            Some(slot) if is_announced_again => {
                if !shared.settings.reports && shared.when == When::Now {
                    // Nobody asks for reports, so blocks that only seem to be announced again were computed again.
                    slot.note_stored(hashes);
                }
                slot.store_missing(hashes).n_refused
            }
            Some(slot) if shared.when == When::Now => slot.store(hashes).n_refused,
            Some(slot) => slot.add(hashes).n_refused,
            None => hashes.len() as u32,
        };
        self.refuse(n_refused, shared);
        true
    }

    /// Stores blocks by their hashes, of which some are in Own.
    fn store_each(&mut self, blocks: &Blocks<'_>, shared: &Shared) -> bool {
        let Blocks { tier, hashes, is_announced_again, .. } = *blocks;
        for (block_idx, hash) in hashes.iter().enumerate() {
            let Some((own, key)) = self.own.as_mut().and_then(|own| own.key_of(*hash).map(|key| (own, key))) else {
                let hashes = &hashes[block_idx..=block_idx];
                self.store_engine(&Blocks { tier, hashes, contents: None, is_announced_again }, shared);
                continue;
            };
            let is_known = is_announced_again && own.holds(tier, *hash);
            if is_known && !shared.settings.reports {
                own.note_stored(tier, *hash, shared);
            }
            let was_refused = !is_known && !own.store(tier, (*hash, key), shared);
            self.refuse(u32::from(was_refused), shared);
        }
        true
    }

    /// Stores a chain behind the block with key `parent`, and what has waited for it.
    fn store_own(&mut self, parent: BlockHash, blocks: &Blocks<'_>, shared: &Shared) {
        let contents = blocks.contents.as_deref().unwrap_or_default();
        let mut key = parent;
        for (hash, content) in blocks.hashes.iter().zip(contents) {
            key = OwnHasher::link(key, *content);
            self.move_to_own(*hash, key, [0; 3], shared);
            let is_held = self.own.as_ref().is_some_and(|own| own.holds(blocks.tier, *hash));
            if !(is_held && blocks.is_announced_again) {
                self.store_in_own(blocks.tier, (*hash, key), shared);
            } else if let Some(own) = self.own.as_mut().filter(|_| !shared.settings.reports) {
                own.note_stored(blocks.tier, *hash, shared);
            }
            self.resolve(*hash, key, shared);
        }
    }

    /// Stores what waited behind a block whose key is known now.
    fn resolve(&mut self, hash: BlockHash, key: BlockHash, shared: &Shared) {
        let mut known = vec![(hash, key)];
        while let Some((hash, key)) = known.pop().filter(|_| !self.parked.is_empty()) {
            for (child, waiting) in self.parked.take_children(hash) {
                let child_key = OwnHasher::link(key, waiting.content);
                self.move_to_own(child, child_key, waiting.copies, shared);
                known.push((child, child_key));
            }
        }
    }

    /// Moves a block from Engine to Own, with at least as many copies.
    fn move_to_own(&mut self, hash: BlockHash, key: BlockHash, at_least: [u16; 3], shared: &Shared) {
        for tier in Tier::ALL {
            let slot = self.engine.as_mut().and_then(|engine| engine.get_mut(tier));
            let n_copies = slot.map_or(0, |slot| slot.take(hash)).max(u32::from(at_least[tier as usize]));
            if n_copies > 0 {
                // It was stored before, and only its name is new.
                let n_copies = u16::try_from(n_copies).unwrap_or(u16::MAX);
                let own = self.own(shared);
                let has_room = own.is_some_and(|own| own.add(tier, (hash, key), n_copies, &shared.index));
                self.refuse(u32::from(!has_room), shared);
            }
        }
    }

    fn store_in_own(&mut self, tier: Tier, block: (BlockHash, BlockHash), shared: &Shared) {
        let was_stored = self.own(shared).is_some_and(|own| own.store(tier, block, shared));
        self.refuse(u32::from(!was_stored), shared);
    }

    /// Stores blocks whose place is not known. False: the event is of no use.
    fn store_orphans(
        &mut self,
        parent: BlockHash,
        mut blocks: Blocks<'_>,
        stored: &BlockStored<'_>,
        shared: &Shared,
    ) -> bool {
        // From a block on that is in Own, the chain's place is known.
        let own_key = |hash: &BlockHash| self.own.as_ref().and_then(|own| own.key_of(*hash));
        let known = blocks.hashes.iter().enumerate().find_map(|(idx, hash)| Some((idx, own_key(hash)?)));
        let n_orphans = known.map_or(blocks.hashes.len(), |(block_idx, _)| block_idx);
        let (tier, contents) = (blocks.tier, blocks.contents.take());
        let (orphans, rest) = blocks.hashes.split_at(n_orphans);
        if let Some((_, key)) = known {
            self.store_in_own(tier, (rest[0], key), shared);
            let contents = contents.as_ref().map(|contents| contents[n_orphans + 1..].to_vec());
            self.store_own(key, &Blocks { tier, hashes: &rest[1..], contents, is_announced_again: false }, shared);
        }

        let kinds = continued_kinds(stored, &shared.settings);
        let may_be_ours = kinds.is_some_and(|kinds| !self.proof.disproved.intersects(kinds));
        let was_stored = may_be_ours
            && self.store_engine(&Blocks { tier, hashes: orphans, contents: None, is_announced_again: false }, shared);
        // A salt is in the first block alone, so any chain may be salted. Any may have an item in earlier blocks, too,
        // but unlike a salt one keeps a chain out of Engine only once the form of items is disproved.
        let is_surely_ours = kinds.is_some_and(|kinds| self.proof.proved.contains(kinds | KeyKinds::SALT))
            && !self.proof.disproved.intersects(KeyKinds::MM);
        let was_parked = !is_surely_ours && self.park(parent, tier, orphans, contents.as_deref(), shared);
        was_stored || was_parked || known.is_some()
    }

    fn park(
        &mut self,
        parent: BlockHash,
        tier: Tier,
        hashes: &[BlockHash],
        contents: Option<&[BlockContent]>,
        shared: &Shared,
    ) -> bool {
        let Some(contents) = contents else { return false };
        let chain = hashes.iter().copied().zip(contents.iter().copied());
        let n_dropped = self.parked.park(parent, tier, chain, PARKED_LIMIT);
        shared.stats.n_orphans.add(hashes.len() as u64);
        shared.stats.n_orphans_dropped.add(n_dropped as u64);
        true
    }

    fn refuse(&mut self, n_blocks: u32, shared: &Shared) {
        if n_blocks > 0 && !self.is_full {
            self.is_full = true;
            shared.warn_of_full_index();
        }
        shared.stats.n_refused.add(n_blocks);
    }
}

pub(super) fn is_block_size(n_tokens: u32) -> bool {
    (1..=MAX_BLOCK_SIZE).contains(&n_tokens)
}

/// The tier that a medium is, by the names of vLLM (0.32, `v1/kv_offload`) and SGLang
/// (`srt/disaggregation/kv_events.py`).
pub(super) fn tier_of(medium: Option<&str>) -> Option<Tier> {
    match medium {
        None | Some("GPU") => Some(Tier::Gpu),
        Some("CPU" | "CPU_PINNED") => Some(Tier::Cpu),
        Some("STORAGE" | "DISK") => Some(Tier::Storage),
        Some(_) => None,
    }
}

/// The kinds that vLLM (0.32, `v1/kv_cache_interface.py`) manages by whole prefixes; none: a publisher before 0.22.
fn is_full_attention(spec_kind: Option<&str>) -> bool {
    matches!(spec_kind, None | Some("full_attention" | "mla_attention" | "sink_full_attention"))
}
