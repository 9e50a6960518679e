//! What blocks are called in a file.

use std::collections::HashMap;
use std::sync::Arc;

use super::Line;
use super::key::Key;
use crate::routing::hash::BlockHash;

/// Blocks that are numbered in one file without a key: about 32 MB of memory.
const MOST_NUMBERED: u64 = 1 << 20;

/// The numbers of one file.
pub(super) enum Numbers {
    /// In order of appearance.
    Counted {
        /// By model: engines of two models may hash alike.
        known: HashMap<Arc<str>, HashMap<BlockHash, u64>>,
        /// How many there are.
        n_known: u64,
    },
    /// By a keyed hash.
    Keyed(Key),
}

impl Numbers {
    /// Those of a new file.
    pub(super) fn new(key: Option<&Key>) -> Self {
        match key {
            Some(key) => Self::Keyed(key.clone()),
            None => Self::Counted { known: HashMap::new(), n_known: 0 },
        }
    }

    /// Whether a new file is to be begun, because so many blocks have a number.
    pub(super) fn are_full(&self) -> bool {
        matches!(self, Self::Counted { n_known, .. } if *n_known >= MOST_NUMBERED)
    }

    /// The numbers of a line's blocks.
    pub(super) fn of(&mut self, line: &Line) -> Vec<u64> {
        match self {
            Self::Keyed(key) => key.numbers(&line.model, line.blocks.iter()).collect(),
            Self::Counted { known, n_known } => {
                let of_model = known.entry(line.model.clone()).or_default();
                let number = |block: &BlockHash| {
                    *of_model.entry(*block).or_insert_with(|| {
                        *n_known += 1;
                        *n_known - 1
                    })
                };
                line.blocks.iter().map(number).collect()
            }
        }
    }
}
