//! The lookup, and its reused result.

use super::slots::{Owner, SlotId};
use super::{KeyKinds, KeyspaceIndex};
use crate::routing::endpoint::EndpointId;
use crate::routing::hash::BlockHash;

/// Result of a lookup: how many blocks of a chain each endpoint holds. Reuse it: its buffers stay allocated.
#[derive(Debug, Default)]
pub struct Overlaps {
    /// Owner of each slot when the lookup began, [`Owner::DEAD`] where there is no credit.
    owners: Vec<Owner>,
    /// Slots that hold every block so far, ascending.
    active: Vec<SlotId>,
    /// Slots whose run has ended, with its length.
    runs: Vec<(SlotId, u32)>,
    /// The longest run of each endpoint, by endpoint.
    endpoints: Vec<(EndpointId, u32)>,
}

impl Overlaps {
    /// The endpoints that hold at least the first block, each once, with the number of blocks that they hold without a
    /// hole. Of several slots of an endpoint (its data-parallel ranks) the longest run counts.
    pub fn by_endpoint(&self) -> impl Iterator<Item = (EndpointId, u32)> + '_ {
        self.endpoints.iter().copied()
    }

    /// The number of blocks that `endpoint` holds.
    pub fn matched(&self, endpoint: EndpointId) -> u32 {
        self.endpoints
            .binary_search_by_key(&endpoint, |(endpoint, _)| *endpoint)
            .map_or(0, |position| self.endpoints[position].1)
    }

    pub(super) fn fill(&mut self, index: &KeyspaceIndex, hashes: &[BlockHash], required: KeyKinds) {
        self.active.clear();
        self.runs.clear();
        self.endpoints.clear();
        // Before the walk: a set read under an earlier owner can then never be credited to a later one.
        index.slots.snapshot(required, &mut self.owners);
        self.walk(index, hashes);
        self.credit(index, required);
    }

    fn walk(&mut self, index: &KeyspaceIndex, hashes: &[BlockHash]) {
        let blocks = index.blocks.pin();
        for (hash, n_before) in hashes.iter().zip(0..) {
            let holders = blocks.get(hash).map_or(&[][..], |holders| holders.slots());
            if n_before == 0 {
                self.start(holders);
            } else {
                self.advance(holders, n_before);
            }
            if self.active.is_empty() {
                return;
            }
        }
        let n_blocks = u32::try_from(hashes.len()).unwrap_or(u32::MAX);
        self.runs.extend(self.active.iter().map(|slot| (*slot, n_blocks)));
    }

    fn start(&mut self, holders: &[SlotId]) {
        let owners = &self.owners;
        let is_live = |slot: &SlotId| owners.get(usize::from(slot.0)).is_some_and(|owner| *owner != Owner::DEAD);
        self.active.extend(holders.iter().copied().filter(is_live));
    }

    /// Ends the runs, of length `n_before`, of the slots that are not among `holders`.
    fn advance(&mut self, holders: &[SlotId], n_before: u32) {
        // Blocks of one chain mostly have the same holders.
        if self.active == holders {
            return;
        }
        let mut rest = holders.iter().peekable();
        let runs = &mut self.runs;
        self.active.retain(|slot| {
            while rest.next_if(|holder| *holder < slot).is_some() {}
            let holds = rest.peek() == Some(&slot);
            if !holds {
                runs.push((*slot, n_before));
            }
            holds
        });
    }

    /// Keeps the runs of slots that still are what they were when the lookup began.
    fn credit(&mut self, index: &KeyspaceIndex, required: KeyKinds) {
        for (slot, n_blocks) in &self.runs {
            let owner = self.owners[usize::from(slot.0)];
            if index.slots.creditable(*slot, required) == owner {
                self.endpoints.push((owner.endpoint(), *n_blocks));
            }
        }
        // Longest first within an endpoint, so that the first is the one to keep.
        self.endpoints.sort_unstable_by_key(|(endpoint, n_blocks)| (*endpoint, u32::MAX - n_blocks));
        self.endpoints.dedup_by_key(|(endpoint, _)| *endpoint);
    }
}
