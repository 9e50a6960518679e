//! What a source's generation knows, as a value.

use serde::{Deserialize, Serialize};

/// What a source's generation knows, as a value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Blocks.
    pub hashes: Vec<u64>,
}
