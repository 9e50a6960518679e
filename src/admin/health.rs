//! Whether the process should be sent requests.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Conditions that must hold together for the process to be ready; cloned freely, all clones are one.
#[derive(Clone, Debug)]
pub struct Readiness {
    /// One flag per condition, set by the module that it is about and read by probes. Each is independent, so
    /// no order between them is needed.
    holds: Arc<[AtomicBool; Condition::ALL.len()]>,
}

/// What must hold to be ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// The ext_proc port accepts streams.
    Serving,
    /// Every pool has been listed at least once.
    DiscoverySynced,
    /// The process has not been asked to stop. Holds from the start.
    NotDraining,
}

impl Readiness {
    /// Sets whether `condition` holds.
    pub fn set(&self, condition: Condition, holds: bool) {
        self.holds[condition as usize].store(holds, Ordering::Relaxed);
    }

    /// Whether every condition holds.
    pub fn is_ready(&self) -> bool {
        self.missing().next().is_none()
    }

    /// The conditions that do not hold.
    pub fn missing(&self) -> impl Iterator<Item = Condition> + '_ {
        let holds = |condition: &Condition| self.holds[*condition as usize].load(Ordering::Relaxed);
        Condition::ALL.into_iter().filter(move |condition| !holds(condition))
    }
}

impl Default for Readiness {
    fn default() -> Self {
        let holds = Condition::ALL.map(|condition| condition == Condition::NotDraining);
        Self { holds: Arc::new(holds.map(AtomicBool::new)) }
    }
}

impl Condition {
    const ALL: [Self; 3] = [Self::Serving, Self::DiscoverySynced, Self::NotDraining];

    /// What `/readyz` says while the condition does not hold.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Serving => "serving: not started",
            Self::DiscoverySynced => "discovery: not synced",
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

        assert!(readiness.is_ready());
    }
}
