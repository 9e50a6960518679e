//! Whether the event sources have caught up: requests shall not come to a router that knows nothing yet while another
//! one knows everything.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::admin::health::{Condition, Readiness};
use crate::events::socket::EventPlane;
use crate::events::stats::SourceState;

/// Time between two looks.
const INTERVAL: Duration = Duration::from_millis(100);

/// Sets [`Condition::Warm`], once and for all: sources that are lost later are no reason to send requests elsewhere.
pub(super) struct Warmth {
    /// Where it is set.
    pub(super) readiness: Readiness,
    /// How long the sources are waited for once discovery has synced: an engine that is dead keeps nobody waiting.
    pub(super) deadline: Duration,
}

/// Reads the states of all sources.
pub(super) fn states(events: &Arc<EventPlane>) -> impl Fn() -> Vec<SourceState> + Send + 'static {
    let events = events.clone();
    move || events.status().iter().map(|source| source.state).collect()
}

impl Warmth {
    pub(super) async fn run(
        self,
        states: impl Fn() -> Vec<SourceState> + Send + 'static,
        shutdown: CancellationToken,
    ) -> Result<(), Infallible> {
        if shutdown.run_until_cancelled(self.wait(states)).await.is_some() {
            self.readiness.set(Condition::Warm, true);
            shutdown.cancelled().await;
        }
        Ok(())
    }

    async fn wait(&self, states: impl Fn() -> Vec<SourceState>) {
        while !self.readiness.holds(Condition::DiscoverySynced) {
            tokio::time::sleep(INTERVAL).await;
        }
        let synced = Instant::now();
        loop {
            let states = states();
            if let Some(n_behind) = enough(&states, synced.elapsed(), self.deadline) {
                info!(n_sources = states.len(), n_behind, "KV event sources are no longer waited for");
                return;
            }
            tokio::time::sleep(INTERVAL).await;
        }
    }
}

/// How many sources are left behind if no more is to be waited for.
fn enough(states: &[SourceState], waited: Duration, deadline: Duration) -> Option<usize> {
    let n_behind = states.iter().filter(|state| is_behind(**state)).count();
    (n_behind == 0 || waited >= deadline).then_some(n_behind)
}

/// Whether a source may soon know more than it does.
fn is_behind(state: SourceState) -> bool {
    matches!(state, SourceState::Connecting | SourceState::CatchingUp)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_waited_for_until_they_have_caught_up_or_the_deadline() {
        let deadline = Duration::from_secs(10);
        let enough = |state, waited| enough(&[SourceState::Live, state], Duration::from_secs(waited), deadline);
        for behind in [SourceState::Connecting, SourceState::CatchingUp] {
            assert_eq!((enough(behind, 0), enough(behind, 9), enough(behind, 10)), (None, None, Some(1)), "{behind:?}");
        }
        for settled in [
            SourceState::Live,
            SourceState::Incomplete,
            SourceState::Stale,
            SourceState::Quarantined,
            SourceState::Failed,
        ] {
            assert_eq!(enough(settled, 0), Some(0), "{settled:?}");
        }
        assert_eq!(super::enough(&[], Duration::ZERO, deadline), Some(0), "nobody publishes anything");
    }

    #[tokio::test]
    async fn nothing_is_warm_before_discovery_has_synced() {
        let readiness = Readiness::default();
        let shutdown = CancellationToken::new();
        let warmth = Warmth { readiness: readiness.clone(), deadline: Duration::ZERO };
        let task = tokio::spawn(warmth.run(Vec::new, shutdown.clone()));
        tokio::time::sleep(3 * INTERVAL).await;
        assert!(!readiness.holds(Condition::Warm));
        readiness.set(Condition::DiscoverySynced, true);
        while !readiness.holds(Condition::Warm) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        shutdown.cancel();
        task.await.expect("no panic").expect("infallible");
    }
}
