//! How much of all streams' bodies is held while they come, in full duplex: each may take as long as its client likes.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes that all streams together hold, and how many they may.
#[derive(Clone, Debug)]
pub struct Room {
    /// Written by every stream. It guards no other memory: all accesses are relaxed.
    n_held: Arc<AtomicUsize>,
    most: usize,
}

impl Room {
    /// Room for `most` bytes.
    pub fn new(most: usize) -> Self {
        Self { n_held: Arc::default(), most }
    }

    /// A stream's share, of nothing yet.
    pub fn share(&self) -> Share {
        Share { room: self.clone(), n_bytes: 0 }
    }
}

/// What one stream holds; given back when it is dropped.
#[derive(Debug)]
pub struct Share {
    room: Room,
    n_bytes: usize,
}

impl Share {
    /// Takes more, and says whether there was room for it.
    pub fn take(&mut self, n_bytes: usize) -> bool {
        self.n_bytes += n_bytes;
        self.room.n_held.fetch_add(n_bytes, Ordering::Relaxed) + n_bytes <= self.room.most
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.room.n_held.fetch_sub(self.n_bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_all_shares_hold_counts_until_they_are_dropped() {
        let room = Room::new(10);
        let (mut first, mut second) = (room.share(), room.share());
        assert!(first.take(6) && second.take(4));
        assert!(!second.take(1));
        drop(second);
        assert!(first.take(4) && !first.take(1));
        drop(first);
        assert!(room.share().take(10));
    }
}
