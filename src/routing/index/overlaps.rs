//! The lookup, and its reused result.

use super::slots::{Owner, SlotId};
use super::{KeyKinds, KeyspaceIndex, Tier};
use crate::routing::endpoint::EndpointId;
use crate::routing::hash::BlockHash;

/// What one rank of an endpoint holds of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Match {
    /// The endpoint.
    pub endpoint: EndpointId,
    /// Its data-parallel rank.
    pub rank: u32,
    /// Blocks on the GPU, from the first one on, without a hole.
    pub n_blocks: u32,
    /// Further blocks, without a hole, on whichever tier.
    pub n_offloaded: u32,
}

/// Result of a lookup: how many blocks of a chain each rank of each endpoint holds. Reuse it: its buffers stay
/// allocated.
#[derive(Debug, Default)]
pub struct Overlaps {
    /// Owner of each slot when the lookup began, [`Owner::DEAD`] where there is no credit.
    owners: Vec<Owner>,
    /// By slot, the position of its source in [`Self::sources`], as far as the walk has met the slot.
    source_of: Vec<SourceIdx>,
    /// The live slots that the walk has met.
    met: Vec<SlotId>,
    /// Those that hold the first block, by endpoint and rank.
    sources: Vec<SourceRun>,
    /// Holders of the block before, as the index has them.
    last_holders: Vec<SlotId>,
}

/// Position of a slot's source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct SourceIdx(u32);

impl SourceIdx {
    /// The walk has not met the slot.
    const UNMET: Self = Self(u32::MAX);
    /// The slot is not credited, or its source does not hold the first block.
    const NONE: Self = Self(u32::MAX - 1);
}

/// The run of one source. Its counts are final once it is closed.
#[derive(Debug)]
struct SourceRun {
    endpoint: EndpointId,
    rank: u32,
    gpu: Run,
    /// On any tier; never shorter than `gpu`.
    any: Run,
}

#[derive(Clone, Copy, Debug, Default)]
struct Run {
    n_blocks: u32,
    is_closed: bool,
    /// Whether the block that is looked at is held.
    holds: bool,
}

impl Run {
    fn close_unless_held(&mut self, n_before: u32) {
        if !self.is_closed && !self.holds {
            *self = Self { n_blocks: n_before, is_closed: true, holds: false };
        }
        self.holds = false;
    }

    fn end(&mut self, n_blocks: u32) {
        if !self.is_closed {
            *self = Self { n_blocks, is_closed: true, holds: false };
        }
    }
}

impl Overlaps {
    /// What each rank holds that holds at least the first block, each once, by endpoint and rank.
    pub fn matches(&self) -> impl Iterator<Item = Match> + '_ {
        self.sources.iter().filter(|source| source.any.n_blocks > 0).map(|source| Match {
            endpoint: source.endpoint,
            rank: source.rank,
            n_blocks: source.gpu.n_blocks,
            n_offloaded: source.any.n_blocks - source.gpu.n_blocks,
        })
    }

    /// The longest run on the GPU of any rank of `endpoint`.
    pub fn matched(&self, endpoint: EndpointId) -> u32 {
        self.matches().filter(|found| found.endpoint == endpoint).map(|found| found.n_blocks).max().unwrap_or(0)
    }

    pub(super) fn fill(&mut self, index: &KeyspaceIndex, hashes: &[BlockHash], required: KeyKinds) {
        // Before the walk: a set read under an earlier owner can then never be credited to a later one.
        index.slots.snapshot(required, &mut self.owners);
        self.source_of.clear();
        self.source_of.resize(self.owners.len(), SourceIdx::UNMET);
        self.met.clear();
        self.sources.clear();
        self.last_holders.clear();
        self.walk(index, hashes);
        self.revoke(index, required);
    }

    fn walk(&mut self, index: &KeyspaceIndex, hashes: &[BlockHash]) {
        let guard = index.blocks.guard();
        for (hash, n_before) in hashes.iter().zip(0..) {
            let holders = index.blocks.get(*hash, &guard).map_or(&[][..], |holders| holders.slots());
            // Blocks of one chain mostly have the same holders: then every run goes on as it is.
            if n_before > 0 && self.last_holders == holders {
                continue;
            }
            if n_before == 0 {
                self.start(index, holders);
            }
            if !self.advance(index, holders, n_before) {
                return;
            }
            self.last_holders.clear();
            self.last_holders.extend_from_slice(holders);
        }
        let n_blocks = u32::try_from(hashes.len()).unwrap_or(u32::MAX);
        for source in &mut self.sources {
            source.gpu.end(n_blocks);
            source.any.end(n_blocks);
        }
    }

    /// Finds the sources of the first block: no other can have a run.
    fn start(&mut self, index: &KeyspaceIndex, holders: &[SlotId]) {
        for slot in holders {
            let owner = self.owners.get(usize::from(slot.0)).copied().unwrap_or(Owner::DEAD);
            if owner != Owner::DEAD {
                let rank = index.slots.place(*slot).rank();
                let (gpu, any) = (Run::default(), Run::default());
                self.sources.push(SourceRun { endpoint: owner.endpoint(), rank, gpu, any });
            }
        }
        self.sources.sort_unstable_by_key(|source| (source.endpoint, source.rank));
        self.sources.dedup_by_key(|source| (source.endpoint, source.rank));
    }

    /// Ends the runs, of length `n_before`, that `holders` do not continue; says whether some run goes on.
    fn advance(&mut self, index: &KeyspaceIndex, holders: &[SlotId], n_before: u32) -> bool {
        for slot in holders {
            let SourceIdx(source_idx) = self.source_of(index, *slot);
            let Some(source) = self.sources.get_mut(source_idx as usize) else { continue };
            source.any.holds = true;
            source.gpu.holds |= index.slots.place(*slot).tier() == Tier::Gpu;
        }
        let mut goes_on = false;
        for source in &mut self.sources {
            source.gpu.close_unless_held(n_before);
            source.any.close_unless_held(n_before);
            goes_on |= !source.any.is_closed;
        }
        goes_on
    }

    /// The source of a slot; a slot that came into use after the lookup began has none.
    fn source_of(&mut self, index: &KeyspaceIndex, slot: SlotId) -> SourceIdx {
        let slot_idx = usize::from(slot.0);
        let found = self.source_of.get(slot_idx).copied().unwrap_or(SourceIdx::NONE);
        if found != SourceIdx::UNMET {
            return found;
        }
        let owner = self.owners[slot_idx];
        let key = (owner.endpoint(), index.slots.place(slot).rank());
        let position = self.sources.binary_search_by_key(&key, |source| (source.endpoint, source.rank));
        let source = match position {
            Ok(source_idx) if owner != Owner::DEAD => {
                self.met.push(slot);
                SourceIdx(u32::try_from(source_idx).expect("there are fewer sources than slots"))
            }
            _ => SourceIdx::NONE,
        };
        self.source_of[slot_idx] = source;
        source
    }

    /// Takes back what came from slots that are no longer what they were when the lookup began.
    fn revoke(&mut self, index: &KeyspaceIndex, required: KeyKinds) {
        for slot in &self.met {
            let slot_idx = usize::from(slot.0);
            if index.slots.creditable(*slot, required) == self.owners[slot_idx] {
                continue;
            }
            let SourceIdx(source_idx) = self.source_of[slot_idx];
            // Which of the source's slots it was cannot be asked any more: the slot may have another place by now.
            let source = &mut self.sources[source_idx as usize];
            source.gpu.n_blocks = 0;
            source.any.n_blocks = 0;
        }
    }
}
