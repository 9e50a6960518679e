//! Whether the process should be sent requests.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::watch;

/// Conditions that must hold together for the process to be ready; cloned freely, all clones are one.
#[derive(Clone, Debug)]
pub struct Readiness {
    /// One flag per condition, set by the module that it is about and read by probes. Each is independent, so
    /// no order between them is needed.
    holds: Arc<[AtomicBool; Condition::ALL.len()]>,
    /// Whether they all hold, for those who wait for a change.
    ready: watch::Sender<bool>,
}

/// What must hold to be ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// The ext_proc port accepts streams.
    Serving,
    /// Every pool has been listed at least once.
    DiscoverySynced,
    /// The event sources have caught up, or have been waited for long enough.
    Warm,
    /// The process has not been asked to stop. Holds from the start.
    NotDraining,
}

impl Readiness {
    /// Sets whether `condition` holds.
    pub fn set(&self, condition: Condition, holds: bool) {
        self.holds[condition as usize].store(holds, Ordering::Relaxed);
        // Judged under the channel's lock: of two that set at once, the later one sees what both have set.
        self.ready.send_if_modified(|ready| std::mem::replace(ready, self.is_ready()) != *ready);
    }

    /// Whether every condition holds, and each change of that.
    pub fn watch(&self) -> watch::Receiver<bool> {
        self.ready.subscribe()
    }

    /// Whether every condition holds.
    pub fn is_ready(&self) -> bool {
        self.missing().next().is_none()
    }

    /// Whether `condition` holds.
    pub fn holds(&self, condition: Condition) -> bool {
        self.holds[condition as usize].load(Ordering::Relaxed)
    }

    /// The conditions that do not hold.
    pub fn missing(&self) -> impl Iterator<Item = Condition> + '_ {
        Condition::ALL.into_iter().filter(|condition| !self.holds(*condition))
    }
}

impl Default for Readiness {
    fn default() -> Self {
        let holds = Condition::ALL.map(|condition| condition == Condition::NotDraining);
        Self { holds: Arc::new(holds.map(AtomicBool::new)), ready: watch::Sender::new(false) }
    }
}

impl Condition {
    const ALL: [Self; 4] = [Self::Serving, Self::DiscoverySynced, Self::Warm, Self::NotDraining];

    /// What `/readyz` says while the condition does not hold.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Serving => "serving: not started",
            Self::DiscoverySynced => "discovery: not synced",
            Self::Warm => "warm: event sources are catching up",
            Self::NotDraining => "draining",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clones_share_their_conditions() {
        let readiness = Readiness::default();
        let clone = readiness.clone();
        assert!(!readiness.is_ready());

        clone.set(Condition::Serving, true);
        clone.set(Condition::DiscoverySynced, true);
        assert_eq!(readiness.missing().collect::<Vec<_>>(), [Condition::Warm]);
        clone.set(Condition::Warm, true);

        assert!(readiness.is_ready());
    }

    #[test]
    fn watchers_are_told_each_change_and_nothing_else() {
        let readiness = Readiness::default();
        let mut watch = readiness.watch();
        for (condition, holds, expected) in [
            (Condition::Serving, true, None),
            (Condition::Warm, true, None),
            (Condition::DiscoverySynced, true, Some(true)),
            (Condition::DiscoverySynced, true, None),
            (Condition::NotDraining, false, Some(false)),
            (Condition::Serving, false, None),
        ] {
            readiness.set(condition, holds);
            let has_changed = watch.has_changed().expect("the sender is there");
            assert_eq!(has_changed.then(|| *watch.borrow_and_update()), expected, "{condition:?} {holds}");
        }
    }
}
