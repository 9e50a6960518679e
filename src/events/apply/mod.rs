//! Turns the batches of one source into writes of the index.
//!
//! Each generation of a source has a slot of its own in the keyspace of its model, its block size and its hash settings; the
//! block size is that of the first usable `BlockStored`. What does not belong into the slot is skipped and counted:
//!
//! - other tiers than the GPU, placeholders without a block size, events without hashes;
//! - groups other than the first one with full attention: a block is reusable only if its full-attention group has it, and
//!   the other groups announce sparse subsets of the same hashes. Removals name only the group's number, so kinds
//!   are learned from `BlockStored`. Events without a group are taken;
//! - blocks of another size than the generation's first.
//!
//! A block is credited only for hashes that are proved; blocks are indexed before that, so that a proof credits them
//! at once. A batch that cannot be decoded is counted and left out: if it held removals, those blocks are credited
//! until the generation ends.
//!
//! Token ids and salts are never logged.

mod proof;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;

use tracing::{info, warn};

use super::stats::SourceStats;
use super::wire::{BlockRemoved, BlockStored, Event, EventBatch};
use crate::routing::endpoint::EndpointId;
use crate::routing::hash::{BlockHash, BlockHasher, BlockSize, HashAlgorithm};
use crate::routing::index::{Holder, Keyspace, KeyspaceKind, PrefixIndex, SlotWriter, Tier};
use proof::{Finding, Proof};

/// Tokens per block beyond which a publisher is not believed: each block size costs a keyspace.
const MAX_BLOCK_SIZE: u32 = 1 << 14;

/// What the engines of a model have in common.
#[derive(Clone, Debug)]
pub struct ModelSettings {
    /// Name of the model's pool.
    pub model: Arc<str>,
    /// `--prefix-caching-hash-algo`.
    pub algorithm: HashAlgorithm,
    /// `PYTHONHASHSEED` of the engine process; none: unset.
    pub pythonhashseed: Option<String>,
    /// Name and path of each adapter, at most [`crate::routing::index::KeyKinds::MAX_ADAPTERS`].
    pub adapters: Vec<(Arc<str>, Arc<str>)>,
}

/// Which rank of which endpoint a source is.
#[derive(Clone, Copy, Debug)]
pub(super) struct SourceName {
    pub(super) endpoint: EndpointId,
    pub(super) address: SocketAddr,
    pub(super) rank: u32,
}

/// Writes the blocks of one source.
#[derive(Debug)]
pub(super) struct Applier {
    name: SourceName,
    settings: Arc<ModelSettings>,
    /// None: the engine's root cannot be known.
    hasher: Option<BlockHasher>,
    index: Arc<PrefixIndex>,
    stats: Arc<SourceStats>,
    generation: Option<Generation>,
}

/// What is known of one life of the publisher.
#[derive(Debug, Default)]
struct Generation {
    slot: Option<(BlockSize, SlotWriter)>,
    /// Number of the full-attention group that is indexed.
    group: Option<u32>,
    proof: Proof,
    warned_of_block_size: bool,
    warned_of_full_index: bool,
}

impl Applier {
    pub(super) fn new(
        name: SourceName,
        settings: Arc<ModelSettings>,
        index: Arc<PrefixIndex>,
        stats: Arc<SourceStats>,
    ) -> Self {
        let hasher = BlockHasher::new(settings.algorithm, settings.pythonhashseed.as_deref());
        if let Err(error) = &hasher {
            warn!(endpoint = %name.address, rank = name.rank, %error, "KV events of this source get no credit");
        }
        Self { name, settings, hasher: hasher.ok(), index, stats, generation: None }
    }

    /// Retires what is known and starts anew.
    pub(super) fn start_generation(&mut self) {
        self.end_generation();
        self.stats.n_generations.add(1_u64);
        self.generation = Some(Generation::default());
    }

    /// Retires what is known.
    pub(super) fn end_generation(&mut self) {
        self.generation = None;
        self.stats.set_last_seq(None);
        self.show();
    }

    pub(super) fn apply(&mut self, batch: &EventBatch<'_>) {
        let continued = Continued::by(&batch.events);
        for (event_idx, event) in batch.events.iter().enumerate() {
            match event {
                Event::BlockStored(stored) => self.store(stored, &continued, event_idx),
                Event::BlockRemoved(removed) => self.remove(removed),
                Event::AllBlocksCleared => self.clear(),
            }
        }
        self.stats.n_batches.add(1_u64);
        self.stats.n_skipped.add(batch.n_skipped);
        self.show();
    }

    fn store(&mut self, stored: &BlockStored<'_>, continued: &Continued, event_idx: usize) {
        let (Some(generation), Some(hasher)) = (&mut self.generation, &self.hasher) else {
            return self.stats.n_skipped.add(1_u64);
        };
        let block_size = BlockSize::new(stored.block_size).filter(|block_size| block_size.get() <= MAX_BLOCK_SIZE);
        let (Some(block_size), true) = (block_size, generation.indexes(stored)) else {
            return self.stats.n_skipped.add(1_u64);
        };
        if !generation.ensure_slot(block_size, hasher, &self.name, &self.settings, &self.index) {
            self.stats.n_refused.add(stored.block_hashes.len() as u64);
            return;
        }
        let Some((slot_block_size, slot)) = &mut generation.slot else { return };
        if *slot_block_size != block_size {
            generation.warned_of_block_size |=
                warn_of_block_size(&self.name, generation.warned_of_block_size, block_size);
            return self.stats.n_skipped.add(1_u64);
        }
        report(&self.name, &generation.proof.examine(stored, hasher, &self.settings), slot);
        self.stats.n_stored.add(1_u64);
        let hashes: Vec<BlockHash> = stored.block_hashes.iter().map(|hash| hash.low64()).collect();
        if !is_announced_again(stored, &hashes, continued.is_after(&hashes, event_idx), slot) {
            self.stats.n_refused.add(slot.store(&hashes).n_refused);
        }
    }

    fn remove(&mut self, removed: &BlockRemoved<'_>) {
        let generation = self.generation.as_mut().filter(|generation| generation.holds_group(removed));
        let Some(Generation { slot: Some((_, slot)), .. }) = generation else {
            return self.stats.n_skipped.add(1_u64);
        };
        self.stats.n_removed.add(1_u64);
        for hash in &removed.block_hashes {
            slot.remove(hash.low64());
        }
    }

    pub(super) fn clear(&mut self) {
        self.stats.n_cleared.add(1_u64);
        if let Some(Generation { slot: Some((_, slot)), .. }) = &mut self.generation {
            slot.clear();
        }
    }

    fn show(&self) {
        let slot = self.generation.as_ref().and_then(|generation| generation.slot.as_ref());
        self.stats.set_n_blocks(slot.map_or(0, |(_, slot)| slot.n_blocks()));
        let proof = self.generation.as_ref().map(|generation| &generation.proof);
        self.stats.set_kinds(
            proof.map(|proof| proof.proved).unwrap_or_default(),
            proof.map(|proof| proof.disproved).unwrap_or_default(),
        );
    }
}

impl Generation {
    /// Whether the event's blocks belong into the index; learns which group does.
    fn indexes(&mut self, stored: &BlockStored<'_>) -> bool {
        if !is_on_gpu(stored.medium) || stored.block_hashes.is_empty() || !is_full_attention(stored.spec_kind) {
            return false;
        }
        stored.group_idx.is_none_or(|group| *self.group.get_or_insert(group) == group)
    }

    fn holds_group(&self, removed: &BlockRemoved<'_>) -> bool {
        is_on_gpu(removed.medium) && removed.group_idx.is_none_or(|group| self.group == Some(group))
    }

    /// Makes sure that there is a slot; false: the index has no room for one.
    fn ensure_slot(
        &mut self,
        block_size: BlockSize,
        hasher: &BlockHasher,
        name: &SourceName,
        settings: &ModelSettings,
        index: &PrefixIndex,
    ) -> bool {
        if self.slot.is_some() {
            return true;
        }
        let kind = KeyspaceKind::Engine { algorithm: hasher.algorithm(), root: hasher.root() };
        let keyspace = Keyspace { model: settings.model.clone(), block_size, kind };
        let holder = Holder { endpoint: name.endpoint, rank: name.rank, tier: Tier::Gpu };
        self.slot = index.acquire(&keyspace, holder).map(|slot| (block_size, slot));
        if self.slot.is_none() && !self.warned_of_full_index {
            self.warned_of_full_index = true;
            warn!(endpoint = %name.address, rank = name.rank, "no room in the index for the KV events of this source");
        }
        self.slot.is_some()
    }
}

/// Says once per generation that blocks of another size are skipped.
fn warn_of_block_size(name: &SourceName, warned: bool, block_size: BlockSize) -> bool {
    if !warned {
        warn!(
            endpoint = %name.address, rank = name.rank, block_size = block_size.get(),
            "KV events with a second block size are skipped"
        );
    }
    true
}

fn report(name: &SourceName, finding: &Finding, slot: &mut SlotWriter) {
    match finding {
        Finding::Nothing => {}
        Finding::Proved(kinds) => {
            slot.prove(*kinds);
            info!(endpoint = %name.address, rank = name.rank, %kinds, "KV event hashes are proved");
        }
        Finding::Disproved(kinds, suspect) => {
            slot.disprove(*kinds);
            warn!(
                endpoint = %name.address, rank = name.rank, %kinds, %suspect,
                "KV event hashes are not the configured ones and get no credit"
            );
        }
    }
}

fn is_on_gpu(medium: Option<&str>) -> bool {
    matches!(medium, None | Some("GPU"))
}

/// The kinds that vLLM (0.32, `v1/kv_cache_interface.py`) manages by whole prefixes; none: a publisher before 0.22.
fn is_full_attention(spec_kind: Option<&str>) -> bool {
    matches!(spec_kind, None | Some("full_attention" | "mla_attention" | "sink_full_attention"))
}

/// Whether the event repeats a reused prefix (`kv_cache_report_mode: full`), which makes no new copy: it begins a prompt, every
/// block is known, and an event of the same batch continues it. Two real copies that look like this count too low.
fn is_announced_again(stored: &BlockStored<'_>, hashes: &[BlockHash], is_continued: bool, slot: &SlotWriter) -> bool {
    stored.parent.is_none() && is_continued && hashes.iter().all(|hash| slot.holds(*hash))
}

/// Which blocks are continued by later events of a batch: parent → the last event that has it.
struct Continued(HashMap<BlockHash, usize>);

impl Continued {
    fn by(events: &[Event<'_>]) -> Self {
        let parents = events.iter().enumerate().filter_map(|(event_idx, event)| match event {
            Event::BlockStored(stored) => stored.parent.map(|parent| (parent.low64(), event_idx)),
            Event::BlockRemoved(_) | Event::AllBlocksCleared => None,
        });
        // A batch of one event, the usual one, needs no map.
        Self(if events.len() > 1 { parents.collect() } else { HashMap::new() })
    }

    /// Whether an event after `event_idx` continues the chain that `hashes` ends.
    fn is_after(&self, hashes: &[BlockHash], event_idx: usize) -> bool {
        hashes.last().and_then(|last| self.0.get(last)).is_some_and(|later_idx| *later_idx > event_idx)
    }
}

#[cfg(test)]
mod tests;
