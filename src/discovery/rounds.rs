//! Visits each endpoint of a pool for as long as it is in the pool.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::error;

use crate::routing::endpoint::{Endpoint, EndpointId, EndpointSet};

/// Mean of the first pause after a failure, doubled; full jitter draws from nothing to twice the mean.
const FIRST_BACKOFF: Duration = Duration::from_secs(1);

/// Runs `visit` once for each endpoint that is or comes into the pool, and drops it when the endpoint leaves or at
/// `shutdown`. A visit is meant to go on forever; one that panics ends alone.
pub(super) async fn visit_all<F>(
    mut endpoints: watch::Receiver<Arc<EndpointSet>>,
    shutdown: CancellationToken,
    visit: impl Fn(Arc<Endpoint>) -> F,
) where
    F: Future<Output = ()> + Send + 'static,
{
    let mut visits = JoinSet::new();
    let mut by_endpoint: HashMap<EndpointId, AbortHandle> = HashMap::new();
    loop {
        let set = endpoints.borrow_and_update().clone();
        by_endpoint.retain(|id, visit| {
            let stays = set.endpoints.iter().any(|endpoint| endpoint.id == *id);
            if !stays {
                visit.abort();
            }
            stays
        });
        for endpoint in &set.endpoints {
            by_endpoint.entry(endpoint.id).or_insert_with(|| visits.spawn(visit(endpoint.clone())));
        }
        tokio::select! {
            () = shutdown.cancelled() => return,
            changed = endpoints.changed() => if changed.is_err() {
                // Nobody will change the set any more.
                return shutdown.cancelled().await;
            },
            Some(ended) = visits.join_next() => if let Err(error) = ended && error.is_panic() {
                // What it panicked with is not shown: it may quote an answer.
                error!("what asked an endpoint about itself panicked, it is asked no more");
            },
        }
    }
}

/// How long to wait with the next question after so many failures in a row: `interval` without, and at most that with
/// some.
pub(super) fn pause(n_failures: u32, interval: Duration) -> Duration {
    match n_failures {
        0 => with_jitter(interval),
        n => (FIRST_BACKOFF * 2_u32.pow(n.min(8))).min(interval).mul_f64(fastrand::f64()),
    }
}

/// `interval`, up to a tenth longer: endpoints that were met together shall not be asked together forever.
pub(super) fn with_jitter(interval: Duration) -> Duration {
    interval + interval.mul_f64(fastrand::f64() * 0.1)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    fn endpoint(id: u32) -> Arc<Endpoint> {
        Arc::new(Endpoint::new(EndpointId(id), ([127, 0, 0, 1], 8000).into()))
    }

    /// Notes the end of a visit.
    struct Ends(u32, Arc<Mutex<Vec<u32>>>);

    impl Drop for Ends {
        fn drop(&mut self) {
            self.1.lock().expect("no panic").push(self.0);
        }
    }

    #[tokio::test]
    async fn an_endpoint_is_visited_once_and_until_it_leaves() {
        let set = |ids: &[u32]| {
            Arc::new(EndpointSet { synced: true, endpoints: ids.iter().map(|id| endpoint(*id)).collect() })
        };
        let (sender, receiver) = watch::channel(set(&[1, 2]));
        let (begun, mut visited) = tokio::sync::mpsc::unbounded_channel();
        let ended = Arc::new(Mutex::new(Vec::new()));
        let shutdown = CancellationToken::new();
        let noted = ended.clone();
        let rounds = tokio::spawn(visit_all(receiver, shutdown.clone(), move |endpoint| {
            let (begun, ends) = (begun.clone(), Ends(endpoint.id.0, noted.clone()));
            async move {
                begun.send(endpoint.id.0).expect("the test listens");
                assert_ne!(endpoint.id.0, 4, "panics on purpose");
                let _ends = ends;
                std::future::pending::<()>().await;
            }
        }));
        let mut first = [visited.recv().await, visited.recv().await];
        first.sort_unstable();
        assert_eq!(first, [Some(1), Some(2)]);
        sender.send(set(&[2, 4])).expect("the rounds listen");
        assert_eq!(visited.recv().await, Some(4));
        sender.send(set(&[2, 3])).expect("the rounds listen");
        assert_eq!(visited.recv().await, Some(3), "a panic ends one visit only");
        shutdown.cancel();
        rounds.await.expect("no panic");
        let mut ended = ended.lock().expect("no panic").clone();
        ended.sort_unstable();
        assert_eq!(ended, [1, 2, 3, 4]);
    }

    #[test]
    fn pauses_grow_with_failures_up_to_the_interval_and_are_spread() {
        let interval = Duration::from_secs(30);
        let longest = |n_failures| (0..1_000).map(|_| pause(n_failures, interval)).max().expect("some");
        for (n_failures, most) in [(1, 2), (2, 4), (3, 8), (5, 30), (4_000_000_000, 30)] {
            let most = Duration::from_secs(most);
            let longest = longest(n_failures);
            assert!(longest <= most && longest > most.mul_f64(0.9), "{longest:?} after {n_failures} failures");
        }
        assert!((0..1_000).all(|_| pause(0, interval) >= interval));
    }
}
