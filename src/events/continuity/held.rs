//! Live batches that wait for earlier ones.

use std::collections::VecDeque;

use super::input::SeqNo;

/// Live batches held at most while catching up. Beyond it they are dropped, and the replay has to bring them.
pub const MAX_HELD_BYTES: usize = 64 << 20;
/// What an empty batch costs to hold.
const BATCH_OVERHEAD: usize = size_of::<(SeqNo, Vec<u8>)>();

/// Live batches, ascending.
#[derive(Debug, Default)]
pub(super) struct Held {
    batches: VecDeque<(SeqNo, Vec<u8>)>,
    n_bytes: usize,
}

impl Held {
    pub(super) fn of(seq: SeqNo, payload: Vec<u8>) -> Self {
        let mut held = Self::default();
        held.push(seq, payload);
        held
    }

    pub(super) fn n_bytes(&self) -> usize {
        self.n_bytes
    }

    pub(super) fn is_empty(&self) -> bool {
        self.batches.is_empty()
    }

    pub(super) fn first(&self) -> Option<SeqNo> {
        self.batches.front().map(|(seq, _)| *seq)
    }

    pub(super) fn last(&self) -> Option<SeqNo> {
        self.batches.back().map(|(seq, _)| *seq)
    }

    /// Holds a batch; false: there was no room, and all are dropped.
    pub(super) fn push(&mut self, seq: SeqNo, payload: Vec<u8>) -> bool {
        self.n_bytes += payload.len() + BATCH_OVERHEAD;
        self.batches.push_back((seq, payload));
        let fits = self.n_bytes <= MAX_HELD_BYTES;
        if !fits {
            *self = Self::default();
        }
        fits
    }

    /// Takes the first batch if it is not behind `next`.
    pub(super) fn pop_up_to(&mut self, next: Option<SeqNo>) -> Option<(SeqNo, Vec<u8>)> {
        let first = self.first()?;
        if next.is_some_and(|next| first > next) {
            return None;
        }
        let (seq, payload) = self.batches.pop_front()?;
        self.n_bytes -= payload.len() + BATCH_OVERHEAD;
        Some((seq, payload))
    }
}
