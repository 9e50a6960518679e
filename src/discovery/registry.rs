//! Turns full listings of a pool into the endpoint sets that requests choose from.
//!
//! A listing always names all endpoints, so that one that was missed is put right by the next. Who is in two listings
//! under the same identity and address stays the same [`Endpoint`], with its load and all that is known of it; everybody
//! else gets a number that was never given before, so that late knowledge of whoever had the address cannot be credited
//! to them. The same listing always makes the same set, in the order of the addresses.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::event_sources::RankSource;
use super::listed::Listed;
use crate::routing::endpoint::{Endpoint, EndpointId, EndpointSet};

/// Gives out numbers for endpoints: one counter for all pools of a process.
#[derive(Debug, Default)]
pub struct EndpointIds(AtomicU32);

impl EndpointIds {
    fn next(&self) -> EndpointId {
        // Only uniqueness matters.
        EndpointId(self.0.fetch_add(1, Ordering::Relaxed) + 1)
    }
}

/// The endpoints of one pool, as they were last listed.
#[derive(Debug)]
pub struct Registry {
    ids: Arc<EndpointIds>,
    members: BTreeMap<SocketAddr, Member>,
    is_synced: bool,
}

#[derive(Debug)]
struct Member {
    identity: String,
    sources: Vec<RankSource>,
    endpoint: Arc<Endpoint>,
}

/// An endpoint, and where its source says that it publishes.
pub type Sourced = (Arc<Endpoint>, Vec<RankSource>);

/// What a listing has changed.
#[derive(Debug, Default)]
pub struct Change {
    /// The endpoints from now on.
    pub set: Arc<EndpointSet>,
    /// Who is new.
    pub added: Vec<Sourced>,
    /// Who is no longer there.
    pub left: Vec<Arc<Endpoint>>,
    /// Who is said to publish elsewhere now.
    pub moved: Vec<Sourced>,
    /// Whether this was the first listing.
    pub is_first: bool,
}

impl Change {
    /// Whether the set is another one than before.
    pub fn is_new_set(&self) -> bool {
        self.is_first || !self.added.is_empty() || !self.left.is_empty()
    }
}

impl Registry {
    /// A pool that has not been listed.
    pub fn new(ids: Arc<EndpointIds>) -> Self {
        Self { ids, members: BTreeMap::new(), is_synced: false }
    }

    /// Makes `listing` the pool. Of two that claim the same address the one that was created last has it: the older
    /// one's status is about a pod that is gone.
    pub fn apply(&mut self, listing: impl IntoIterator<Item = Listed>) -> Change {
        let mut change = Change { is_first: !self.is_synced, ..Change::default() };
        let mut before = std::mem::take(&mut self.members);
        for listed in newest_by_address(listing).into_values() {
            let stayed = before.remove(&listed.address);
            self.take(listed, stayed, &mut change);
        }
        change.left.extend(before.into_values().map(|member| member.endpoint));
        self.is_synced = true;
        let endpoints = self.members.values().map(|member| member.endpoint.clone()).collect();
        change.set = Arc::new(EndpointSet { synced: true, endpoints });
        change
    }

    fn take(&mut self, listed: Listed, before: Option<Member>, change: &mut Change) {
        let Listed { identity, address, sources, .. } = listed;
        let (same, other): (Option<Member>, Option<Member>) = match before {
            Some(member) if member.identity == identity => (Some(member), None),
            before => (None, before),
        };
        change.left.extend(other.map(|member| member.endpoint));
        let endpoint = match same {
            Some(member) => {
                if member.sources != sources {
                    change.moved.push((member.endpoint.clone(), sources.clone()));
                }
                member.endpoint
            }
            None => {
                let endpoint = Arc::new(Endpoint::new(self.ids.next(), address));
                change.added.push((endpoint.clone(), sources.clone()));
                endpoint
            }
        };
        self.members.insert(address, Member { identity, sources, endpoint });
    }
}

fn newest_by_address(listing: impl IntoIterator<Item = Listed>) -> BTreeMap<SocketAddr, Listed> {
    let mut newest: BTreeMap<SocketAddr, Listed> = BTreeMap::new();
    for listed in listing {
        // The identity decides between two of the same second, so that their order in the listing does not.
        let is_newer = |other: &Listed| (&listed.created, &listed.identity) > (&other.created, &other.identity);
        if newest.get(&listed.address).is_none_or(is_newer) {
            newest.insert(listed.address, listed);
        }
    }
    newest
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn registry() -> Registry {
        Registry::new(Arc::default())
    }

    fn listed(identity: &str, port: u16) -> Listed {
        Listed {
            identity: identity.to_owned(),
            address: ([10, 0, 0, 1], port).into(),
            created: String::new(),
            sources: Vec::new(),
        }
    }

    fn publishing(identity: &str, port: u16, events: &str) -> Listed {
        let source = RankSource { rank: 0, events: events.to_owned(), replay: None };
        Listed { sources: vec![source], ..listed(identity, port) }
    }

    fn ids<'a>(endpoints: impl IntoIterator<Item = &'a Arc<Endpoint>>) -> Vec<u32> {
        endpoints.into_iter().map(|endpoint| endpoint.id.0).collect()
    }

    #[test]
    fn who_stays_keeps_its_load_and_its_number() {
        let mut registry = registry();
        let first = registry.apply([listed("a", 2), listed("b", 1)]);
        assert!(first.is_first && first.set.synced);
        let ports: Vec<u16> = first.set.endpoints.iter().map(|endpoint| endpoint.address.port()).collect();
        assert_eq!(ports, [1, 2], "in the order of the addresses");
        let kept = first.set.endpoints[0].clone();
        let second = registry.apply([listed("c", 3), listed("b", 1)]);
        assert!(Arc::ptr_eq(&kept, &second.set.endpoints[0]));
        assert_eq!((ids(second.added.iter().map(|(endpoint, _)| endpoint)), ids(&second.left)), (vec![3], vec![2]));
        let third = registry.apply([listed("b", 1), listed("c", 3)]);
        assert!(!third.is_new_set() && third.moved.is_empty());
    }

    #[test]
    fn another_identity_at_the_same_address_and_the_same_one_at_another_are_new_endpoints() {
        let mut registry = registry();
        registry.apply([listed("uid/0", 1)]);
        let restarted = registry.apply([listed("uid/1", 1)]);
        assert_eq!((ids(&restarted.set.endpoints), ids(&restarted.left)), (vec![2], vec![1]));
        let moved = registry.apply([listed("uid/1", 2)]);
        assert_eq!((ids(&moved.set.endpoints), ids(&moved.left)), (vec![3], vec![2]));
    }

    #[test]
    fn who_comes_back_is_somebody_else() {
        let mut registry = registry();
        registry.apply([listed("a", 1)]);
        let empty = registry.apply([]);
        assert!(empty.set.synced && empty.set.endpoints.is_empty() && empty.is_new_set());
        assert_eq!(ids(&registry.apply([listed("a", 1)]).set.endpoints), [2]);
    }

    #[test]
    fn new_sources_of_an_endpoint_are_told_and_make_no_new_set() {
        let mut registry = registry();
        registry.apply([publishing("a", 1, "tcp://x:1")]);
        let moved = registry.apply([publishing("a", 1, "tcp://x:2")]);
        assert!(!moved.is_new_set());
        assert_eq!(moved.moved.len(), 1);
        assert_eq!(moved.moved[0].1[0].events, "tcp://x:2");
        let silent = registry.apply([listed("a", 1)]);
        assert_eq!(silent.moved[0].1, []);
    }

    #[test]
    fn the_newest_pod_has_the_address() {
        let pod = |identity: &str, created: &str| Listed { created: created.to_owned(), ..listed(identity, 1) };
        let (old, new) = (pod("z", "2026-11-21T21:06:17Z"), pod("a", "2026-11-21T21:06:18Z"));
        for listing in [[old.clone(), new.clone()], [new, old]] {
            let mut registry = registry();
            registry.apply(listing);
            assert_eq!(registry.members.values().next().expect("one").identity, "a");
        }
    }

    /// Listings of few identities at few addresses, with few ages and sources, so that they meet often.
    fn listings() -> impl Strategy<Value = Vec<Vec<Listed>>> {
        let one = (0..4_u8, 1..4_u16, 0..2_u8, 0..2_u8).prop_map(|(identity, port, created, events)| Listed {
            created: created.to_string(),
            ..publishing(&identity.to_string(), port, &format!("tcp://x:{}", events + 1))
        });
        prop::collection::vec(prop::collection::vec(one, 0..6), 1..12)
    }

    proptest! {
        #[test]
        fn sets_are_those_of_a_naive_model(listings in listings()) {
            let mut registry = registry();
            let mut numbers: HashMap<(String, SocketAddr), u32> = HashMap::new();
            let mut sources: HashMap<u32, Vec<RankSource>> = HashMap::new();
            let mut highest = 0;
            for listing in listings {
                let mut expected: HashMap<SocketAddr, Listed> = HashMap::new();
                let mut sorted = listing.clone();
                sorted.sort_by_key(|listed| (listed.created.clone(), listed.identity.clone()));
                // Of two that are equal in both, the first of the listing stays.
                sorted.dedup_by_key(|listed| (listed.created.clone(), listed.identity.clone(), listed.address));
                for listed in sorted {
                    let entry = expected.entry(listed.address);
                    let newer = |old: &Listed| (&listed.created, &listed.identity) > (&old.created, &old.identity);
                    match entry {
                        std::collections::hash_map::Entry::Occupied(mut old) if newer(old.get()) => { old.insert(listed); }
                        std::collections::hash_map::Entry::Occupied(_) => {}
                        std::collections::hash_map::Entry::Vacant(entry) => { entry.insert(listed); }
                    }
                }
                let change = registry.apply(listing);
                let found: HashMap<SocketAddr, u32> =
                    change.set.endpoints.iter().map(|endpoint| (endpoint.address, endpoint.id.0)).collect();
                prop_assert_eq!(found.len(), change.set.endpoints.len(), "an address once");
                prop_assert_eq!(found.len(), expected.len());
                let mut next = HashMap::new();
                for (address, listed) in &expected {
                    let number = found[address];
                    let key = (listed.identity.clone(), *address);
                    match numbers.get(&key) {
                        Some(before) => prop_assert_eq!(number, *before),
                        None => prop_assert!(number > highest, "never given before"),
                    }
                    next.insert(key, number);
                }
                let gone: Vec<u32> = numbers.values().filter(|n| !next.values().any(|m| m == *n)).copied().collect();
                prop_assert_eq!(sorted_ids(change.left.iter()), sorted_numbers(gone));
                let new: Vec<u32> = next.values().filter(|n| !numbers.values().any(|m| m == *n)).copied().collect();
                prop_assert_eq!(sorted_ids(change.added.iter().map(|(endpoint, _)| endpoint)), sorted_numbers(new));
                for (endpoint, now) in change.added.iter().chain(&change.moved) {
                    let before = sources.insert(endpoint.id.0, now.clone());
                    prop_assert_ne!(before.as_ref(), Some(now));
                }
                for (address, listed) in &expected {
                    prop_assert_eq!(&sources[&found[address]], &listed.sources);
                }
                highest = highest.max(found.values().copied().max().unwrap_or(0));
                numbers = next;
            }
        }
    }

    fn sorted_ids<'a>(endpoints: impl Iterator<Item = &'a Arc<Endpoint>>) -> Vec<u32> {
        sorted_numbers(endpoints.map(|endpoint| endpoint.id.0).collect())
    }

    fn sorted_numbers(mut numbers: Vec<u32>) -> Vec<u32> {
        numbers.sort_unstable();
        numbers
    }
}
