//! How much memory the index may take, counted where blocks enter and leave.
//!
//! What a block costs depends on when its tables grew last, and a growing table exists twice for a moment. The
//! constants are those of the worst moment, so that the process never takes more than was counted; most of the time it
//! takes less. `tests/memory.rs` holds a stream of blocks that never ends against the cap.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes of one block of one slot at the worst moment.
///
/// The shared map: an entry of 24 bytes in a chunk of 32, and 9 bytes of table per place, of which 3/8 may be in use
/// after the table has doubled, while the half as large one is still there (24 + 12). The writer's set: 9 bytes per
/// place, 7/16 of them in use after doubling, and the old table beside it (21 + 10). A further holder of the same block
/// costs less.
pub const BLOCK_BYTES: usize = 104;

/// Bytes for remembering that a block has more than one copy: 17 per place of a table, counted like [`BLOCK_BYTES`].
pub const COPY_BYTES: usize = 60;

/// What a writer takes from the common account at a time, so that it is asked for once in many blocks.
const CHUNK: usize = 1 << 14;

/// The account that all slots share.
#[derive(Clone, Debug)]
pub(super) struct Account {
    /// Relaxed: it guards no memory, and only sums are of interest.
    taken: Arc<AtomicUsize>,
    limit: usize,
}

impl Account {
    pub(super) fn new(limit: usize) -> Self {
        Self { taken: Arc::default(), limit }
    }

    pub(super) fn taken(&self) -> usize {
        self.taken.load(Ordering::Relaxed)
    }

    fn take(&self, n_bytes: usize) -> bool {
        let add = |taken: usize| taken.checked_add(n_bytes).filter(|sum| *sum <= self.limit);
        self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add).is_ok()
    }

    fn give(&self, n_bytes: usize) {
        self.taken.fetch_sub(n_bytes, Ordering::Relaxed);
    }
}

/// One slot's share of an [`Account`]; given back when it is dropped.
#[derive(Debug)]
pub(super) struct Share {
    account: Account,
    limit: usize,
    /// Taken from the account.
    taken: usize,
    used: usize,
}

impl Share {
    pub(super) fn new(account: Account, limit: usize) -> Self {
        Self { account, limit, taken: 0, used: 0 }
    }

    /// Counts `n_bytes` as used; false, and nothing changes, when the slot's limit or the common one forbids it.
    pub(super) fn charge(&mut self, n_bytes: usize) -> bool {
        let Some(used) = self.used.checked_add(n_bytes).filter(|used| *used <= self.limit) else { return false };
        if used > self.taken {
            let missing = used - self.taken;
            // Near the common limit a whole chunk may be too much while the bytes themselves still fit.
            let granted = [missing.max(CHUNK), missing].into_iter().find(|n_bytes| self.account.take(*n_bytes));
            let Some(granted) = granted else { return false };
            self.taken += granted;
        }
        self.used = used;
        true
    }

    /// Counts `n_bytes` as free again.
    pub(super) fn release(&mut self, n_bytes: usize) {
        self.used -= n_bytes;
        let spare = self.taken - self.used;
        if spare > 2 * CHUNK {
            self.account.give(spare - CHUNK);
            self.taken -= spare - CHUNK;
        }
    }

    /// Counts everything as free again.
    pub(super) fn release_all(&mut self) {
        self.account.give(self.taken);
        self.taken = 0;
        self.used = 0;
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.release_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_end_at_their_own_limit_and_at_the_common_one() {
        let account = Account::new(100);
        let (mut first, mut second) = (Share::new(account.clone(), 70), Share::new(account.clone(), 70));
        assert!(first.charge(70));
        assert!(!first.charge(1), "its own limit");
        assert!(second.charge(30));
        assert!(!second.charge(1), "the common limit");
        first.release(70);
        drop(second);
        assert!(first.charge(70), "what was released can be used again");
        drop(first);
        assert_eq!(account.taken(), 0);
    }

    #[test]
    fn released_chunks_go_back_to_the_account() {
        let account = Account::new(100 * CHUNK);
        let mut share = Share::new(account.clone(), usize::MAX);
        assert!(share.charge(10 * CHUNK));
        share.release(10 * CHUNK);
        assert_eq!(account.taken(), CHUNK, "one is kept for the next blocks");
    }
}
