//! Applies what discovery lists: to the set that requests choose from, and to the sources of events that are followed.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::sync::watch;
use tracing::info;

use crate::admin::health::{Condition, Readiness};
use crate::discovery::event_sources::RankSource;
use crate::discovery::listed::Listed;
use crate::discovery::registry::{Change, EndpointIds, Registry};
use crate::discovery::{Finding, Update};
use crate::events::apply::ModelSettings;
use crate::events::socket::{EventPlane, Source};
use crate::routing::endpoint::{Endpoint, EndpointId, EndpointSet};
use crate::telemetry::metrics::Metrics;

/// Ready when all pools have been listed at least once.
pub(super) struct Syncing {
    readiness: Readiness,
    /// Pools that have not; each counts itself down once.
    n_missing: AtomicUsize,
}

impl Syncing {
    pub(super) fn new(readiness: Readiness, n_pools: usize) -> Arc<Self> {
        Arc::new(Self { readiness, n_missing: AtomicUsize::new(n_pools) })
    }

    fn one_more(&self) {
        if self.n_missing.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.readiness.set(Condition::DiscoverySynced, true);
        }
    }
}

/// The one who changes a pool's endpoints.
pub(super) struct Publisher {
    model: Arc<str>,
    registry: Registry,
    sets: watch::Sender<Arc<EndpointSet>>,
    /// None where no events are followed.
    follower: Option<Arc<Follower>>,
    metrics: Arc<Metrics>,
    syncing: Arc<Syncing>,
}

impl Publisher {
    /// Of a pool that has not been listed.
    pub(super) fn new(
        model: Arc<str>,
        ids: Arc<EndpointIds>,
        follower: Option<Arc<Follower>>,
        metrics: Arc<Metrics>,
        syncing: Arc<Syncing>,
    ) -> (Self, watch::Receiver<Arc<EndpointSet>>) {
        let (sets, receiver) = watch::channel(Arc::default());
        (Self { model, registry: Registry::new(ids), sets, follower, metrics, syncing }, receiver)
    }

    /// Takes what a source of endpoints that may fail has to say.
    pub(super) fn take(&mut self, update: Update) {
        match update {
            Update::Listed(listing) => {
                self.list(listing);
                self.confirm();
            }
            Update::Confirmed => self.confirm(),
            Update::Failed(reason) => self.metrics.count_discovery_error(&self.model, reason),
            Update::WrongHints(n) => self.metrics.count_wrong_hints(&self.model, n as u64),
        }
    }

    /// Makes `listing` the pool. Who is new is followed before requests can pick it, and who has left is forgotten after
    /// they cannot any more.
    pub(super) fn list(&mut self, listing: Vec<Listed>) {
        let change = self.registry.apply(listing);
        if let Some(follower) = &self.follower {
            follower.begin(&change);
        }
        if change.is_new_set() {
            self.log(&change);
            self.sets.send_replace(change.set.clone());
        }
        if let Some(follower) = &self.follower {
            follower.forget(&change.left);
        }
        let changes = [("added", change.added.len()), ("left", change.left.len()), ("moved", change.moved.len())];
        self.metrics.count_listing(&self.model, change.set.endpoints.len(), changes);
        if change.is_first {
            self.syncing.one_more();
        }
    }

    fn confirm(&self) {
        // A clock before 1970 has other worries.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.metrics.set_discovery_success(&self.model, now);
    }

    fn log(&self, change: &Change) {
        let addresses = |endpoints: &mut dyn Iterator<Item = &Arc<Endpoint>>| -> String {
            endpoints.map(|endpoint| endpoint.address.to_string()).collect::<Vec<_>>().join(" ")
        };
        info!(
            model = %self.model,
            added = addresses(&mut change.added.iter().map(|(endpoint, _)| endpoint)),
            left = addresses(&mut change.left.iter()),
            endpoints = change.set.endpoints.len(),
            "endpoints of a pool have changed"
        );
    }
}

/// Turns what is known of a model's endpoints into sources of events.
pub(super) struct Follower {
    settings: Arc<ModelSettings>,
    events: Arc<EventPlane>,
    metrics: Arc<Metrics>,
    /// Who is in the pool, and whether its engine itself has said where it publishes. Locked while the event plane is
    /// told, so that nobody who has left is followed again because of what he was still being asked.
    members: Mutex<HashMap<EndpointId, Said>>,
}

/// Whose word about an endpoint's sources counts.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Said {
    ByDiscovery,
    ByEngine,
}

impl Follower {
    pub(super) fn new(settings: Arc<ModelSettings>, events: Arc<EventPlane>, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self { settings, events, metrics, members: Mutex::default() })
    }

    /// Takes what an endpoint has told of itself.
    pub(super) fn take(&self, endpoint: &Endpoint, finding: Finding) {
        let mut members = self.members();
        let Some(said) = members.get_mut(&endpoint.id) else { return };
        match finding {
            Finding::Sources(sources) => {
                *said = Said::ByEngine;
                self.follow(endpoint, sources);
            }
            Finding::Refused(n) => self.metrics.count_event_sources_refused(&self.settings.model, n as u64),
            Finding::Cleared => self.events.cleared(endpoint.id),
            Finding::Restarted => self.events.suspect(endpoint.id),
        }
    }

    fn begin(&self, change: &Change) {
        let mut members = self.members();
        for (endpoint, sources) in &change.added {
            members.insert(endpoint.id, Said::ByDiscovery);
            self.follow(endpoint, sources.clone());
        }
        for (endpoint, sources) in &change.moved {
            if members.get(&endpoint.id) == Some(&Said::ByDiscovery) {
                self.follow(endpoint, sources.clone());
            }
        }
    }

    fn forget(&self, left: &[Arc<Endpoint>]) {
        let mut members = self.members();
        for endpoint in left {
            members.remove(&endpoint.id);
            self.events.remove(endpoint.id);
        }
    }

    fn follow(&self, endpoint: &Endpoint, sources: Vec<RankSource>) {
        endpoint.ranks.set(sources.iter().map(|source| source.rank));
        let source = |RankSource { rank, events, replay }| Source {
            endpoint: endpoint.id,
            address: endpoint.address,
            events,
            replay,
            rank,
            endpoint_knowledge: endpoint.knowledge.clone(),
            model: self.settings.clone(),
        };
        self.events.reconcile(endpoint.id, sources.into_iter().map(source).collect());
    }

    fn members(&self) -> MutexGuard<'_, HashMap<EndpointId, Said>> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::hash::HashAlgorithm;
    use crate::routing::index::{IndexLimits, PrefixIndex};

    struct Pool {
        publisher: Publisher,
        sets: watch::Receiver<Arc<EndpointSet>>,
        follower: Arc<Follower>,
        metrics: Arc<Metrics>,
        readiness: Readiness,
    }

    fn pool() -> Pool {
        let (metrics, readiness) = (Arc::new(Metrics::new()), Readiness::default());
        readiness.set(Condition::Serving, true);
        readiness.set(Condition::Warm, true);
        let settings = Arc::new(ModelSettings {
            model: "tiny".into(),
            algorithm: HashAlgorithm::Sha256,
            pythonhashseed: None,
            adapters: Vec::new(),
            reports: false,
        });
        let events = Arc::new(EventPlane::start(&Arc::new(PrefixIndex::new(IndexLimits::default()))));
        let follower = Follower::new(settings, events, metrics.clone());
        metrics.add_model(&"tiny".into());
        let syncing = Syncing::new(readiness.clone(), 1);
        let (publisher, sets) =
            Publisher::new("tiny".into(), Arc::default(), Some(follower.clone()), metrics.clone(), syncing);
        Pool { publisher, sets, follower, metrics, readiness }
    }

    impl Drop for Pool {
        fn drop(&mut self) {
            self.follower.events.stop();
        }
    }

    impl Pool {
        /// Address and publisher of each source that is followed.
        fn followed(&self) -> Vec<String> {
            let status = self.follower.events.status();
            let mut followed: Vec<String> =
                status.iter().map(|source| format!("{} {}", source.address, source.rank)).collect();
            followed.sort();
            followed
        }

        fn metric(&self, line: &str) -> bool {
            self.metrics.encode().lines().any(|found| found == line)
        }
    }

    fn listed(identity: &str, port: u16, ranks: &[u32]) -> Listed {
        let source =
            |rank: &u32| RankSource { rank: *rank, events: format!("tcp://127.0.0.1:{}", 1 + rank), replay: None };
        Listed {
            identity: identity.to_owned(),
            address: ([127, 0, 0, 1], port).into(),
            created: String::new(),
            sources: ranks.iter().map(source).collect(),
        }
    }

    #[test]
    fn a_pool_is_synced_by_its_first_listing_even_if_that_is_empty() {
        let mut pool = pool();
        assert!(!pool.sets.borrow().synced && !pool.readiness.is_ready());
        assert!(pool.metric("warmroute_discovery_synced{model=\"tiny\"} 0"));
        pool.publisher.take(Update::Failed("unreachable"));
        assert!(!pool.sets.borrow().synced && !pool.readiness.is_ready());
        pool.publisher.take(Update::Listed(Vec::new()));
        assert!(pool.sets.borrow().synced && pool.readiness.is_ready());
        assert!(pool.metric("warmroute_discovery_synced{model=\"tiny\"} 1"));
        assert!(pool.metric("warmroute_discovery_errors_total{model=\"tiny\",reason=\"unreachable\"} 1"));
    }

    #[test]
    fn who_comes_is_followed_and_who_leaves_is_not() {
        let mut pool = pool();
        pool.publisher.take(Update::Listed(vec![listed("a", 1, &[0, 1]), listed("b", 2, &[0])]));
        assert_eq!(pool.followed(), ["127.0.0.1:1 0", "127.0.0.1:1 1", "127.0.0.1:2 0"]);
        assert_eq!(pool.sets.borrow().endpoints[0].ranks.count(), 2);
        pool.publisher.take(Update::Listed(vec![listed("a", 1, &[1]), listed("c", 3, &[])]));
        assert_eq!(pool.followed(), ["127.0.0.1:1 1"]);
        assert!(pool.metric("warmroute_endpoints{model=\"tiny\"} 2"));
        for (change, n) in [("added", 3), ("left", 1), ("moved", 1)] {
            let line = format!("warmroute_discovery_changes_total{{model=\"tiny\",change=\"{change}\"}} {n}");
            assert!(pool.metric(&line), "{line}\nis missing in\n{}", pool.metrics.encode());
        }
        pool.publisher.take(Update::Listed(Vec::new()));
        assert!(pool.followed().is_empty() && pool.follower.members().is_empty());
    }

    #[test]
    fn the_engines_word_outlasts_that_of_discovery_but_not_the_endpoint() {
        let mut pool = pool();
        pool.publisher.take(Update::Listed(vec![listed("a", 1, &[0])]));
        let endpoint = pool.sets.borrow().endpoints[0].clone();
        let told = |ranks: &[u32]| Finding::Sources(listed("", 1, ranks).sources);
        pool.follower.take(&endpoint, told(&[0, 1, 2]));
        pool.publisher.take(Update::Listed(vec![listed("a", 1, &[5])]));
        assert_eq!(pool.followed(), ["127.0.0.1:1 0", "127.0.0.1:1 1", "127.0.0.1:1 2"]);
        pool.publisher.take(Update::Listed(vec![listed("restarted", 1, &[5])]));
        assert_eq!(pool.followed(), ["127.0.0.1:1 5"]);
        pool.follower.take(&endpoint, told(&[0]));
        assert_eq!(pool.followed(), ["127.0.0.1:1 5"], "the answer of one that has left comes too late");
    }

    #[test]
    fn the_same_listing_wakes_nobody() {
        let mut pool = pool();
        pool.publisher.take(Update::Listed(vec![listed("a", 1, &[0])]));
        pool.sets.borrow_and_update();
        pool.publisher.take(Update::Listed(vec![listed("a", 1, &[0])]));
        pool.publisher.take(Update::Confirmed);
        assert!(!pool.sets.has_changed().expect("the publisher is there"));
    }
}
