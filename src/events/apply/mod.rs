//! Turns the batches of one source into writes of the index.
//!
//! Each generation of a source has slots of its own: one per tier in the keyspace of the engine's hashes, and one per
//! tier in the keyspace Own, as far as they are needed (`generation` says what goes where). The block size is that of
//! the first usable `BlockStored`. What is of no use is skipped and counted:
//!
//! - unknown media, events without hashes, placeholders of blocks that nothing is known of;
//! - groups other than the first one with full attention: a block is reusable only if its full-attention group has it,
//!   and the other groups announce sparse subsets of the same hashes. Removals name only the group's number, so kinds
//!   are learned from `BlockStored`. Events without a group are taken;
//! - blocks of another size than the generation's first, and those of adapters that have no name (before vLLM 0.14).
//!
//! In the Engine keyspace a block is credited only for hashes that are proved (`proof`). There nothing is kept per
//! block outside of the index, and token ids are looked at only for the proof. In Own everything is computed from the
//! event (`own`).
//!
//! Copies: an engine announces each physical copy, and a reused prefix once more if a request asks for it
//! (`kv_cache_report_mode: full`). Blocks that are known get no further copy where a store that begins a prompt is
//! continued in its batch, or begins a prompt at all while we ask for such reports. Two real copies that look like this
//! count too low.
//!
//! Token ids and salts are never logged.

mod chain;
mod generation;
pub mod image;
mod own;
mod parked;
mod proof;
mod slots;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;

use tracing::{info, warn};

use super::stats::{Content, SourceStats};
use super::wire::{BlockStored, Event, EventBatch};
use crate::routing::endpoint::EndpointId;
use crate::routing::hash::own::OwnHasher;
use crate::routing::hash::{BlockHash, BlockHasher, BlockSize, HashAlgorithm};
use crate::routing::index::{ContentDigest, PrefixIndex, Tier};
use generation::{Generation, tier_of};
pub use image::Image;
use proof::Finding;

/// What the engines of a model have in common.
#[derive(Clone, Debug)]
pub struct ModelSettings {
    /// Name of the model's pool.
    pub model: Arc<str>,
    /// `--prefix-caching-hash-algo`.
    pub algorithm: HashAlgorithm,
    /// `PYTHONHASHSEED` of the engine process; none: unset.
    pub pythonhashseed: Option<String>,
    /// Name and path of each adapter, at most [`crate::routing::index::KeyKinds::MAX_ADAPTERS`]. An empty path is one
    /// that is not known: blocks of the adapter are then found by our own hashes.
    pub adapters: Vec<(Arc<str>, Arc<str>)>,
    /// Whether we ask engines for full reports, so that any store that begins a prompt may repeat blocks that are
    /// there.
    pub reports: bool,
}

/// Which rank of which endpoint a source is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SourceName {
    pub(super) endpoint: EndpointId,
    pub(super) address: SocketAddr,
    pub(super) rank: u32,
}

/// When what a batch tells has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum When {
    /// A moment ago.
    Now,
    /// Some time before: it was missed and asked for, or has waited for what was missed. Whoever watches what engines
    /// compute for requests that run is not told, since it may have been computed for others that ran before.
    Before,
}

/// Writes the blocks of one source.
#[derive(Debug)]
pub(super) struct Applier {
    shared: Shared,
    generation: Option<Generation>,
}

/// What the generations of a source have in common.
#[derive(Debug)]
struct Shared {
    name: SourceName,
    settings: Arc<ModelSettings>,
    /// None: the engine's root cannot be known.
    hasher: Option<BlockHasher>,
    own_hasher: OwnHasher,
    index: Arc<PrefixIndex>,
    stats: Arc<SourceStats>,
    /// Of the batch that is being applied.
    when: When,
}

impl Applier {
    pub(super) fn new(
        name: SourceName,
        settings: Arc<ModelSettings>,
        index: Arc<PrefixIndex>,
        stats: Arc<SourceStats>,
    ) -> Self {
        let hasher = BlockHasher::new(settings.algorithm, settings.pythonhashseed.as_deref())
            .inspect_err(|error| {
                info!(endpoint = %name.address, rank = name.rank, %error, "KV events of this source are indexed by our own hashes");
            })
            .ok();
        let own_hasher = OwnHasher::new(&settings.model);
        let shared = Shared { name, settings, hasher, own_hasher, index, stats, when: When::Now };
        Self { shared, generation: None }
    }

    /// Retires what is known and starts anew.
    pub(super) fn start_generation(&mut self) {
        self.end_generation();
        self.begin(Generation::default());
    }

    /// Retires what is known.
    pub(super) fn end_generation(&mut self) {
        self.generation = None;
        self.shared.stats.set_content(Content::default());
        self.show();
    }

    pub(super) fn apply(&mut self, batch: &EventBatch<'_>, when: When) {
        self.shared.when = when;
        let continued = Continued::by(&batch.events);
        for (event_idx, event) in batch.events.iter().enumerate() {
            match event {
                Event::BlockStored(stored) => self.store(stored, &continued, event_idx),
                Event::BlockRemoved(removed) => {
                    let is_of_use = self.generation.as_mut().is_some_and(|generation| generation.remove(removed));
                    let stats = &self.shared.stats;
                    (if is_of_use { &stats.n_removed } else { &stats.n_skipped }).add(1_u64);
                }
                Event::AllBlocksCleared => self.clear_all(),
                Event::TierBlocksCleared { medium } => self.clear_tier(*medium),
            }
        }
        self.shared.stats.applied_batch();
        self.shared.stats.n_skipped.add(batch.n_skipped);
        self.show();
    }

    /// Drops all blocks, as `AllBlocksCleared` does.
    pub(super) fn clear(&mut self) {
        self.clear_all();
        self.show();
    }

    /// What the running generation holds, by the engine's hashes; equal for routers that have applied the same batches.
    pub(super) fn digest(&self) -> ContentDigest {
        self.generation.as_ref().map(Generation::digest).unwrap_or_default()
    }

    /// Whether blocks were refused since the generation started.
    pub(super) fn is_full(&self) -> bool {
        self.generation.as_ref().is_some_and(|generation| generation.is_full)
    }

    /// What the running generation knows.
    pub(super) fn image(&self) -> Option<Image> {
        self.generation.as_ref().map(|generation| Image::of(generation, &self.shared))
    }

    /// Whether [`Self::restore`] would take the image.
    pub(super) fn fits(&self, image: &Image) -> bool {
        image.fits(&self.shared)
    }

    /// Starts a generation that knows what `image` says; false, and no generation runs, when the image was made under
    /// other settings or is not well-formed.
    pub(super) fn restore(&mut self, image: &Image) -> bool {
        self.end_generation();
        let restored = image.restore(&self.shared);
        let was_restored = restored.is_some();
        if let Some(generation) = restored {
            self.begin(generation);
        }
        was_restored
    }

    fn begin(&mut self, generation: Generation) {
        self.shared.stats.n_generations.add(1_u64);
        self.generation = Some(generation);
        self.show();
    }

    fn store(&mut self, stored: &BlockStored<'_>, continued: &Continued, event_idx: usize) {
        let is_continued = continued.is_after(stored, event_idx);
        let shared = &mut self.shared;
        let is_of_use =
            self.generation.as_mut().is_some_and(|generation| generation.store(stored, is_continued, shared));
        (if is_of_use { &shared.stats.n_stored } else { &shared.stats.n_skipped }).add(1_u64);
    }

    fn clear_all(&mut self) {
        self.shared.stats.n_cleared.add(1_u64);
        if let Some(generation) = &mut self.generation {
            Tier::ALL.into_iter().for_each(|tier| generation.clear(tier));
            generation.is_full = false;
        }
    }

    fn clear_tier(&mut self, medium: Option<&str>) {
        let Some(tier) = tier_of(medium) else { return self.shared.stats.n_skipped.add(1_u64) };
        self.shared.stats.n_cleared.add(1_u64);
        if let Some(generation) = &mut self.generation {
            generation.clear(tier);
        }
    }

    fn show(&self) {
        let stats = &self.shared.stats;
        stats.set_n_blocks(self.generation.as_ref().map_or(0, Generation::n_blocks));
        let proof = self.generation.as_ref().map(|generation| &generation.proof);
        stats.set_kinds(
            proof.map(|proof| proof.proved).unwrap_or_default(),
            proof.map(|proof| proof.disproved).unwrap_or_default(),
        );
    }
}

impl Shared {
    fn warn_of_block_size(&self, block_size: BlockSize) {
        warn!(
            endpoint = %self.name.address, rank = self.name.rank, block_size = block_size.get(),
            "KV events with a second block size are skipped"
        );
    }

    fn warn_of_full_index(&self) {
        warn!(
            endpoint = %self.name.address, rank = self.name.rank,
            "no room in the index for all KV events of this source"
        );
    }
}

fn report(name: &SourceName, finding: &Finding) {
    match finding {
        Finding::Proved(kinds) => {
            info!(endpoint = %name.address, rank = name.rank, %kinds, "KV event hashes are proved");
        }
        Finding::Disproved(kinds, suspect) => {
            warn!(
                endpoint = %name.address, rank = name.rank, %kinds, %suspect,
                "KV event hashes are not the configured ones, these blocks are indexed by our own hashes"
            );
        }
    }
}

/// Which blocks are continued by later events of a batch: parent → the last event that has it.
struct Continued(HashMap<BlockHash, usize>);

impl Continued {
    fn by(events: &[Event<'_>]) -> Self {
        let parents = events.iter().enumerate().filter_map(|(event_idx, event)| match event {
            Event::BlockStored(stored) => stored.parent.map(|parent| (parent.low64(), event_idx)),
            Event::BlockRemoved(_) | Event::AllBlocksCleared | Event::TierBlocksCleared { .. } => None,
        });
        // A batch of one event, the usual one, needs no map.
        Self(if events.len() > 1 { parents.collect() } else { HashMap::new() })
    }

    /// Whether an event after `event_idx`, which is `stored`, continues its chain.
    fn is_after(&self, stored: &BlockStored<'_>, event_idx: usize) -> bool {
        let last = stored.block_hashes.last().map(|last| last.low64());
        last.and_then(|last| self.0.get(&last)).is_some_and(|later_idx| *later_idx > event_idx)
    }
}

#[cfg(test)]
mod tests;
