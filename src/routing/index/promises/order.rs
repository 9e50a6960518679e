//! The order in which promises were made: it says whose blocks make room when the table is full, and finds those that
//! are over.

use std::collections::VecDeque;
use std::sync::Arc;

use super::promisers::Promise;
use crate::routing::hash::BlockHash;
use crate::routing::load::Millis;

/// A promise with the blocks that were written for it. Some may have been renewed by others or confirmed since.
#[derive(Debug)]
pub(super) struct Record {
    pub(super) promise: Arc<Promise>,
    pub(super) blocks: Box<[BlockHash]>,
}

/// Records, oldest first. Those that a pass has looked at are in front of those that it has not, so that a pass stops
/// and goes on anywhere.
#[derive(Debug, Default)]
pub(super) struct Order {
    checked: VecDeque<Record>,
    unchecked: VecDeque<Record>,
    /// Blocks in all records.
    n_blocks: usize,
}

impl Order {
    pub(super) fn n_records(&self) -> usize {
        self.checked.len() + self.unchecked.len()
    }

    pub(super) fn n_blocks(&self) -> usize {
        self.n_blocks
    }

    pub(super) fn push(&mut self, record: Record) {
        self.n_blocks += record.blocks.len();
        self.unchecked.push_back(record);
    }

    pub(super) fn pop_oldest(&mut self) -> Option<Record> {
        let record = self.checked.pop_front().or_else(|| self.unchecked.pop_front())?;
        self.n_blocks -= record.blocks.len();
        Some(record)
    }

    /// Looks at up to `n_records`, on from where the last call stopped, and stops behind the first whose promise is
    /// over: that is taken out. With it says how many were looked at.
    pub(super) fn pop_dead(&mut self, n_records: usize, now: Millis) -> (usize, Option<Record>) {
        for n_checked in 1..=n_records {
            if self.unchecked.is_empty() {
                std::mem::swap(&mut self.checked, &mut self.unchecked);
            }
            match self.unchecked.pop_front() {
                Some(record) if record.promise.is_alive(now) => self.checked.push_back(record),
                Some(record) => {
                    self.n_blocks -= record.blocks.len();
                    return (n_checked, Some(record));
                }
                None => break,
            }
        }
        (n_records, None)
    }

    /// Gives memory back that a burst took.
    pub(super) fn shrink(&mut self) {
        for records in [&mut self.checked, &mut self.unchecked] {
            if records.capacity() > 4 * records.len().max(64) {
                records.shrink_to(2 * records.len());
            }
        }
    }
}
