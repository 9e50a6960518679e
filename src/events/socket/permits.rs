//! How many replays run at the same time, and whose turn it is.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Replays of one router at the same time. Each keeps a publisher's only thread from publishing for up to a quarter of
/// a second, and brings up to its whole buffer.
pub(super) const MAX_REPLAYS: usize = 8;

/// Permits for replays, shared by all sources and given in the order in which they queued.
#[derive(Clone, Debug, Default)]
pub(super) struct ReplayPermits(Arc<Mutex<Queue>>);

#[derive(Debug, Default)]
struct Queue {
    n_taken: usize,
    last_number: u64,
    waiting: BTreeSet<u64>,
}

/// A place in the queue; dropping it leaves the queue.
#[derive(Debug)]
pub(super) struct Ticket {
    permits: ReplayPermits,
    number: u64,
}

/// One of [`MAX_REPLAYS`]; dropping it gives it back.
#[derive(Debug)]
pub(super) struct ReplayPermit(ReplayPermits);

impl ReplayPermits {
    /// Joins the end of the queue.
    pub(super) fn queue(&self) -> Ticket {
        let mut queue = self.lock();
        queue.last_number += 1;
        let number = queue.last_number;
        queue.waiting.insert(number);
        Ticket { permits: self.clone(), number }
    }

    pub(super) fn n_taken(&self) -> usize {
        self.lock().n_taken
    }

    /// Held for a few instructions.
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ticket {
    /// A permit, if there is one for this place in the queue.
    pub(super) fn try_take(&self) -> Option<ReplayPermit> {
        let mut queue = self.permits.lock();
        let n_free = MAX_REPLAYS.saturating_sub(queue.n_taken);
        let is_due = queue.waiting.iter().take(n_free).any(|number| *number == self.number);
        is_due.then(|| {
            queue.waiting.remove(&self.number);
            queue.n_taken += 1;
            ReplayPermit(self.permits.clone())
        })
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.permits.lock().waiting.remove(&self.number);
    }
}

impl Drop for ReplayPermit {
    fn drop(&mut self) {
        self.0.lock().n_taken -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permits_run_out_and_go_to_whoever_waits_longest() {
        let permits = ReplayPermits::default();
        let mut taken: Vec<_> = (0..MAX_REPLAYS).map(|_| permits.queue().try_take().unwrap()).collect();
        let (first, second, third) = (permits.queue(), permits.queue(), permits.queue());
        assert!(first.try_take().is_none());
        taken.pop();
        assert!(second.try_take().is_none() && third.try_take().is_none(), "not their turn");
        drop(first);
        assert!(third.try_take().is_none());
        let _second = second.try_take().unwrap();
        assert_eq!(permits.n_taken(), MAX_REPLAYS);
        taken.clear();
        assert!(third.try_take().is_some());
        assert_eq!(permits.n_taken(), 1);
    }
}
