//! How many replays run at the same time.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Replays of one router at the same time. Each keeps a publisher's only thread from publishing for up to a quarter of a second,
/// and brings up to its whole buffer.
pub(super) const MAX_REPLAYS: usize = 8;

/// Permits for replays, shared by all sources.
#[derive(Clone, Debug, Default)]
pub(super) struct ReplayPermits(Arc<AtomicUsize>);

/// One of [`MAX_REPLAYS`]; dropping it gives it back.
#[derive(Debug)]
pub(super) struct ReplayPermit(Arc<AtomicUsize>);

impl ReplayPermits {
    pub(super) fn try_take(&self) -> Option<ReplayPermit> {
        let take = |n_taken| (n_taken < MAX_REPLAYS).then_some(n_taken + 1);
        let taken = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take);
        taken.is_ok().then(|| ReplayPermit(Arc::clone(&self.0)))
    }

    pub(super) fn n_taken(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

impl Drop for ReplayPermit {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permits_run_out_and_come_back() {
        let permits = ReplayPermits::default();
        let mut taken: Vec<_> = (0..MAX_REPLAYS).map(|_| permits.try_take().unwrap()).collect();
        assert!(permits.try_take().is_none());
        taken.pop();
        assert_eq!(permits.n_taken(), MAX_REPLAYS - 1);
        assert!(permits.try_take().is_some());
    }
}
