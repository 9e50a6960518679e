//! Which endpoints a pod is.
//!
//! A pod is in the pool for as long as its Ready condition holds and nobody has begun to delete it. Its endpoints are
//! known by its UID and the restarts of its containers: an engine that has been restarted has an empty cache, although
//! address and pod are the same.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use super::resources::Pod;
use crate::discovery::listed::{DEFAULT_PORT, EventPorts, Listed, MOST_RANKS};

const PORT: &str = "warmroute.io/port";
const EVENTS_PORT: &str = "warmroute.io/events-port";
const REPLAY_PORT: &str = "warmroute.io/replay-port";
const RANKS: &str = "warmroute.io/ranks";

/// How the pods of a pool are read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodRules {
    /// Port of the engines; none: the pool's own, or [`DEFAULT_PORT`](crate::discovery::listed::DEFAULT_PORT).
    pub port: Option<u16>,
    /// Label of a pod that names its port.
    pub port_label: Option<&'static str>,
    /// Which pods publish KV events.
    pub publishing: Publishing,
    /// Where they do.
    pub events: EventPorts,
}

/// Which pods publish KV events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Publishing {
    /// All of them.
    All,
    /// Those with this label.
    Labelled {
        /// Its key.
        key: String,
        /// Its value.
        value: String,
    },
}

/// Why a pod is no endpoint now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Absent {
    Terminating,
    Ended,
    NotReady,
    NoAddress,
}

/// A label or an annotation that cannot be what it should be.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Wrong {
    pub(super) pod: String,
    pub(super) key: &'static str,
    pub(super) value: String,
    pub(super) expected: &'static str,
}

/// The endpoints of a pod: one for each port of `pool_ports`, or one. What is wrong in its labels and annotations goes
/// to `wrong`, and the default takes its place.
pub(super) fn endpoints(
    pod: &Pod,
    rules: &PodRules,
    pool_ports: &[u16],
    wrong: &mut HashSet<Wrong>,
) -> Result<Vec<Listed>, Absent> {
    let ip = address(pod)?;
    let mut hints = Hints { pod, wrong };
    let ports = hints.ports(rules, pool_ports);
    let events = hints.publishes(&rules.publishing).then(|| hints.event_ports(rules.events));
    let n_restarts: u64 =
        pod.status.container_statuses.iter().map(|container| u64::from(container.restart_count)).sum();
    let identity = format!("{}/{n_restarts}", pod.metadata.uid);
    let endpoint = |(rank_group, port): (usize, &u16)| Listed {
        identity: identity.clone(),
        address: SocketAddr::new(ip, *port),
        created: pod.metadata.creation_timestamp.clone(),
        // A pool with several ports has a process for each, which is one rank (or group of ranks) of the engine.
        sources: events.map_or_else(Vec::new, |events| events.sources(ip, rank_group as u32 * events.ranks)),
    };
    Ok(ports.iter().enumerate().map(endpoint).collect())
}

fn address(pod: &Pod) -> Result<IpAddr, Absent> {
    if pod.metadata.deletion_timestamp.is_some() {
        return Err(Absent::Terminating);
    }
    if matches!(pod.status.phase.as_str(), "Failed" | "Succeeded") {
        return Err(Absent::Ended);
    }
    if !pod.status.conditions.iter().any(|condition| condition.kind == "Ready" && condition.status == "True") {
        return Err(Absent::NotReady);
    }
    let ip: Option<IpAddr> = pod.status.pod_ip.parse().ok();
    ip.filter(|ip| !ip.is_unspecified()).ok_or(Absent::NoAddress)
}

/// What a pod says of itself.
struct Hints<'a> {
    pod: &'a Pod,
    wrong: &'a mut HashSet<Wrong>,
}

impl Hints<'_> {
    fn ports(&mut self, rules: &PodRules, pool_ports: &[u16]) -> Vec<u16> {
        let annotated = self.annotation(PORT, "a port from 1 to 65535", |port: &u16| *port > 0);
        let labelled = |hints: &mut Self| {
            let key = rules.port_label?;
            let value = hints.pod.metadata.labels.get(key)?;
            hints.parsed(key, value, "a port from 1 to 65535", |port: &u16| *port > 0)
        };
        match annotated.or_else(|| labelled(self)).or(rules.port) {
            Some(port) => vec![port],
            None if pool_ports.is_empty() => vec![DEFAULT_PORT],
            None => pool_ports.to_vec(),
        }
    }

    fn publishes(&self, publishing: &Publishing) -> bool {
        match publishing {
            Publishing::All => true,
            Publishing::Labelled { key, value } => self.pod.metadata.labels.get(key) == Some(value),
        }
    }

    fn event_ports(&mut self, default: EventPorts) -> EventPorts {
        const BASE: &str = "a port from 1 to 65535";
        const COUNT: &str = "a number from 1 to 256";
        let events = self.annotation(EVENTS_PORT, BASE, |port: &u16| *port > 0);
        let replay = self.annotation(REPLAY_PORT, BASE, |port: &u16| *port > 0);
        let ranks = self.annotation(RANKS, COUNT, |ranks: &u32| (1..=MOST_RANKS).contains(ranks));
        let ports = EventPorts {
            events: events.unwrap_or(default.events),
            replay: replay.unwrap_or(default.replay),
            ranks: ranks.unwrap_or(default.ranks),
        };
        // The rank is added to both ports.
        if u32::from(ports.events.abs_diff(ports.replay)) >= ports.ranks {
            return ports;
        }
        let value = format!("{} for {} ranks from {} on", ports.replay, ports.ranks, ports.events);
        let expected = "a port that is at least as far from the events' as there are ranks";
        self.wrong.insert(Wrong { pod: self.pod.metadata.name.clone(), key: REPLAY_PORT, value, expected });
        default
    }

    fn annotation<T: FromStr>(
        &mut self,
        key: &'static str,
        expected: &'static str,
        is_possible: impl Fn(&T) -> bool,
    ) -> Option<T> {
        let value = self.pod.metadata.annotations.get(key)?;
        self.parsed(key, value, expected, is_possible)
    }

    fn parsed<T: FromStr>(
        &mut self,
        key: &'static str,
        value: &str,
        expected: &'static str,
        is_possible: impl Fn(&T) -> bool,
    ) -> Option<T> {
        let parsed = value.parse().ok().filter(is_possible);
        if parsed.is_none() {
            // Enough of a text of unknown size for a log.
            let value = value.chars().take(80).collect();
            self.wrong.insert(Wrong { pod: self.pod.metadata.name.clone(), key, value, expected });
        }
        parsed
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::discovery::event_sources::RankSource;

    fn rules() -> PodRules {
        PodRules {
            port: None,
            port_label: Some("model.aibrix.ai/port"),
            publishing: Publishing::Labelled { key: "kv".to_owned(), value: "true".to_owned() },
            events: EventPorts { events: 5557, replay: 5558, ranks: 1 },
        }
    }

    /// A ready pod with `changes` merged into it; null takes a field away.
    fn pod(changes: &Value) -> Pod {
        let mut pod = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": "engine-0", "uid": "u", "creationTimestamp": "2026-11-21T21:06:17Z",
                "labels": {"kv": "true"}, "annotations": {"other.io/x": "y"},
            },
            "spec": {"containers": [{"name": "vllm", "image": "vllm"}]},
            "status": {
                "phase": "Running", "podIP": "10.0.0.1",
                "conditions": [{"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": "True"}],
                "containerStatuses": [{"name": "vllm", "restartCount": 1}, {"name": "sidecar", "restartCount": 2}],
            },
        });
        merge(&mut pod, changes);
        serde_json::from_value(pod).expect("a pod")
    }

    fn merge(into: &mut Value, changes: &Value) {
        match (into, changes) {
            (Value::Object(into), Value::Object(changes)) => {
                for (key, change) in changes {
                    if change.is_null() {
                        into.remove(key);
                    } else {
                        merge(into.entry(key.clone()).or_insert(Value::Null), change);
                    }
                }
            }
            (into, changes) => *into = changes.clone(),
        }
    }

    fn read(changes: &Value, rules: &PodRules, pool_ports: &[u16]) -> (Result<Vec<Listed>, Absent>, Vec<Wrong>) {
        let mut wrong = HashSet::new();
        let endpoints = endpoints(&pod(changes), rules, pool_ports, &mut wrong);
        (endpoints, wrong.into_iter().collect())
    }

    fn source(rank: u32, events: &str, replay: &str) -> RankSource {
        RankSource { rank, events: events.to_owned(), replay: Some(replay.to_owned()) }
    }

    #[test]
    fn a_ready_pod_is_an_endpoint_that_publishes_if_its_label_says_so() {
        let (endpoints, wrong) = read(&json!({}), &rules(), &[]);
        let expected = Listed {
            identity: "u/3".to_owned(),
            address: ([10, 0, 0, 1], 8000).into(),
            created: "2026-11-21T21:06:17Z".to_owned(),
            sources: vec![source(0, "tcp://10.0.0.1:5557", "tcp://10.0.0.1:5558")],
        };
        assert_eq!((endpoints, wrong), (Ok(vec![expected]), vec![]));
        for labels in [json!({"kv": "false"}), json!({"kv": null})] {
            let (endpoints, _) = read(&json!({"metadata": {"labels": labels}}), &rules(), &[]);
            assert_eq!(endpoints.expect("an endpoint")[0].sources, [], "{labels}");
        }
        let all = PodRules { publishing: Publishing::All, ..rules() };
        let (endpoints, _) = read(&json!({"metadata": {"labels": {"kv": null}}}), &all, &[]);
        assert_eq!(endpoints.expect("an endpoint")[0].sources.len(), 1);
    }

    #[test]
    fn only_a_pod_that_serves_is_an_endpoint() {
        let not_ready = json!([{"type": "Ready", "status": "False"}]);
        for (changes, expected) in [
            (json!({"metadata": {"deletionTimestamp": "2026-11-21T21:06:17Z"}}), Absent::Terminating),
            (json!({"status": {"phase": "Failed"}}), Absent::Ended),
            (json!({"status": {"phase": "Succeeded"}}), Absent::Ended),
            (json!({"status": {"phase": "Pending", "conditions": not_ready}}), Absent::NotReady),
            (json!({"status": {"conditions": not_ready}}), Absent::NotReady),
            (json!({"status": {"conditions": [{"type": "Ready", "status": "Unknown"}]}}), Absent::NotReady),
            (json!({"status": {"conditions": [{"type": "ContainersReady", "status": "True"}]}}), Absent::NotReady),
            (json!({"status": {"conditions": null}}), Absent::NotReady),
            (json!({"status": {"podIP": null}}), Absent::NoAddress),
            (json!({"status": {"podIP": ""}}), Absent::NoAddress),
            (json!({"status": {"podIP": "engine-0"}}), Absent::NoAddress),
            (json!({"status": {"podIP": "0.0.0.0"}}), Absent::NoAddress),
            (json!({"status": null}), Absent::NotReady),
        ] {
            assert_eq!(read(&changes, &rules(), &[]), (Err(expected), vec![]), "{changes}");
        }
    }

    #[test]
    fn the_nearest_word_about_the_port_counts() {
        let labelled = json!({"metadata": {"labels": {"model.aibrix.ai/port": "8001"}}});
        let annotated = json!({"metadata": {
            "labels": {"model.aibrix.ai/port": "8001"}, "annotations": {"warmroute.io/port": "8002"}}});
        let configured = PodRules { port: Some(8003), ..rules() };
        let unlabelled = PodRules { port_label: None, ..configured.clone() };
        for (changes, rules, pool_ports, expected) in [
            (&json!({}), &rules(), &[][..], &[8000][..]),
            (&json!({}), &rules(), &[9000], &[9000]),
            (&json!({}), &rules(), &[9000, 9001], &[9000, 9001]),
            (&json!({}), &configured, &[9000, 9001], &[8003]),
            (&labelled, &configured, &[9000], &[8001]),
            (&labelled, &unlabelled, &[9000], &[8003]),
            (&annotated, &configured, &[9000], &[8002]),
        ] {
            let (endpoints, wrong) = read(changes, rules, pool_ports);
            let ports: Vec<u16> = endpoints.expect("ready").iter().map(|endpoint| endpoint.address.port()).collect();
            assert_eq!((&ports[..], wrong), (expected, vec![]), "{changes} {rules:?} {pool_ports:?}");
        }
    }

    #[test]
    fn annotations_say_where_the_ranks_publish() {
        let annotations = json!({"metadata": {"annotations": {
            "warmroute.io/events-port": "6000", "warmroute.io/replay-port": "7000", "warmroute.io/ranks": "2"}}});
        let (endpoints, wrong) = read(&annotations, &rules(), &[]);
        let sources = [
            source(0, "tcp://10.0.0.1:6000", "tcp://10.0.0.1:7000"),
            source(1, "tcp://10.0.0.1:6001", "tcp://10.0.0.1:7001"),
        ];
        assert_eq!((&endpoints.expect("an endpoint")[0].sources[..], wrong), (&sources[..], vec![]));
    }

    #[test]
    fn each_port_of_a_pool_is_a_rank() {
        let (endpoints, _) = read(&json!({}), &rules(), &[8000, 8001]);
        let endpoints = endpoints.expect("endpoints");
        assert_eq!(endpoints[0].sources, [source(0, "tcp://10.0.0.1:5557", "tcp://10.0.0.1:5558")]);
        assert_eq!(endpoints[1].sources, [source(1, "tcp://10.0.0.1:5558", "tcp://10.0.0.1:5559")]);
    }

    #[test]
    fn ranks_whose_ports_would_overlap_are_wrong() {
        let annotated = |annotations: Value| read(&json!({"metadata": {"annotations": annotations}}), &rules(), &[]);
        let (expected, _) = read(&json!({}), &rules(), &[]);
        let (endpoints, wrong) = annotated(json!({"warmroute.io/ranks": "2"}));
        assert_eq!(endpoints, expected);
        assert!(wrong.len() == 1 && wrong[0].key == "warmroute.io/replay-port", "{wrong:?}");
        let (_, wrong) = annotated(json!({"warmroute.io/ranks": "2", "warmroute.io/replay-port": "5559"}));
        assert_eq!(wrong, []);
    }

    #[test]
    fn a_wrong_annotation_is_told_and_the_default_is_taken() {
        let (expected, _) = read(&json!({}), &rules(), &[]);
        for (key, value) in [
            ("warmroute.io/port", "http"),
            ("warmroute.io/port", "0"),
            ("warmroute.io/events-port", "70000"),
            ("warmroute.io/replay-port", ""),
            ("warmroute.io/ranks", "0"),
            ("warmroute.io/ranks", "257"),
            ("warmroute.io/ranks", "-1"),
        ] {
            let (endpoints, wrong) = read(&json!({"metadata": {"annotations": {key: value}}}), &rules(), &[]);
            assert_eq!(endpoints, expected, "{key}={value}");
            assert!(wrong.len() == 1 && (wrong[0].key, &*wrong[0].value) == (key, value), "{wrong:?}");
        }
        let (endpoints, wrong) = read(&json!({"metadata": {"labels": {"model.aibrix.ai/port": "x"}}}), &rules(), &[]);
        assert_eq!((endpoints, wrong[0].key), (expected, "model.aibrix.ai/port"));
    }

    #[test]
    fn addresses_of_both_families_are_taken() {
        let (endpoints, _) = read(&json!({"status": {"podIP": "fd00::1"}}), &rules(), &[]);
        let endpoints = endpoints.expect("an endpoint");
        assert_eq!(endpoints[0].address.to_string(), "[fd00::1]:8000");
        assert_eq!(endpoints[0].sources, [source(0, "tcp://[fd00::1]:5557", "tcp://[fd00::1]:5558")]);
    }

    #[test]
    fn a_restarted_container_is_another_identity() {
        let restarted = json!({"status": {"containerStatuses": [{"name": "vllm", "restartCount": 2}]}});
        let (endpoints, _) = read(&restarted, &rules(), &[]);
        assert_eq!(endpoints.expect("an endpoint")[0].identity, "u/2");
    }
}
