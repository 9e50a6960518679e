//! `models[].discovery`: the endpoints of a model.

mod kubernetes;
mod labels;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use kubernetes::read_kubernetes;
pub use kubernetes::{Kubernetes, Preset};

use super::each;
use super::reader::{Node, Source};
use super::values::{Human, ZmqEndpoint};
use crate::discovery::dns::Records;
use crate::discovery::event_sources::RankSource;
use crate::discovery::listed::{DEFAULT_PORT, EventPorts, Listed, MOST_RANKS};

/// Ports of vLLM's KV events (0.32.0, `config/kv_events.py`), and the replay port of its docs.
const EVENTS_PORT: u16 = 5557;
const REPLAY_PORT: u16 = 5558;

/// `models[].discovery`: exactly one of these.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Discovery {
    /// The endpoints themselves.
    Static(Vec<StaticEndpoint>),
    /// Pods, or the EndpointSlices of a Service.
    Kubernetes(Kubernetes),
    /// What a DNS name stands for.
    Dns(Dns),
    /// A file with a list as `static` has it, which is read again and again.
    File(EndpointFile),
}

/// `models[].discovery.static[]`
#[derive(Clone, Debug, Serialize)]
pub struct StaticEndpoint {
    /// IP literal and port, as in Envoy's cluster.
    pub address: SocketAddr,
    /// Where the engine's first rank publishes KV events; unset, only the engine itself can say it (`events.discover`),
    /// and an endpoint of which nobody does is picked by load only. `tcp://*:port` is a port of ours that the engine
    /// dials: its topic has to be `kv@`, the address, `@` and the model's name.
    pub events: Option<ZmqEndpoint>,
    /// Where the first rank replays them; unset, every reconnect starts from nothing.
    pub replay: Option<ZmqEndpoint>,
    /// Data-parallel ranks (`--data-parallel-size`), default 1: rank r publishes and replays on the ports above plus r.
    pub ranks: u32,
}

/// `models[].discovery.dns`
#[derive(Clone, Debug, Serialize)]
pub struct Dns {
    /// The name; one that ends with a dot is not looked for in search domains.
    pub name: String,
    /// `a` (A and AAAA records, default) or `srv`.
    pub kind: DnsKind,
    /// Port of the engines; null: that of the SRV records, or 8000.
    pub port: Option<u16>,
    /// Longest time between two questions, default 10s; records that expire earlier are asked for earlier.
    pub interval: Human,
    /// Port on which rank 0 of each engine publishes KV events, default 5557; rank r is r further.
    pub events_port: u16,
    /// Port of the replay, default 5558.
    pub replay_port: u16,
    /// Data-parallel ranks, default 1.
    pub ranks: u32,
}

/// `models[].discovery.dns.kind`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DnsKind {
    /// A and AAAA records.
    A,
    /// SRV records.
    Srv,
}

/// `models[].discovery.file`
#[derive(Clone, Debug, Serialize)]
pub struct EndpointFile {
    /// The file: YAML or JSON.
    pub path: PathBuf,
    /// Time between two looks, default 2s.
    pub interval: Human,
}

impl StaticEndpoint {
    /// As discovery lists it.
    pub fn listed(&self) -> Listed {
        let source = |rank| {
            let of_rank = |base: &ZmqEndpoint| Some(base.of_rank(rank)?.as_str().to_owned());
            let events = of_rank(self.events.as_ref()?)?;
            Some(RankSource { rank, events, replay: self.replay.as_ref().and_then(of_rank) })
        };
        // The reader has seen that each rank has a port.
        Listed::at(self.address, (0..self.ranks).filter_map(source).collect())
    }
}

impl Dns {
    /// What is asked for.
    pub fn records(&self) -> Records {
        match self.kind {
            DnsKind::A => Records::Addresses { port: self.port.unwrap_or(DEFAULT_PORT) },
            DnsKind::Srv => Records::Services,
        }
    }

    /// Where the engines publish.
    pub fn event_ports(&self) -> EventPorts {
        EventPorts { events: self.events_port, replay: self.replay_port, ranks: self.ranks }
    }
}

impl FromStr for DnsKind {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "a" => Ok(Self::A),
            "srv" => Ok(Self::Srv),
            _ => Err(()),
        }
    }
}

/// Reads a file of endpoints, as `discovery.file` names it.
///
/// # Errors
/// What is wrong with it, in one line.
pub fn parse_endpoints(text: &str) -> Result<Vec<Listed>, String> {
    let document: Value = serde_saphyr::from_str(text).map_err(|error| error.to_string())?;
    if !document.is_array() {
        // A file without anything in it is one that is being written, and no list without endpoints: that is `[]`.
        return Err("found no list, expected one of endpoints, or []".to_owned());
    }
    let source = Source::new([]);
    let endpoints = read_endpoints(&Node::root(&source, &document));
    let (faults, _) = source.into_faults();
    match endpoints {
        Some(endpoints) if faults.is_empty() => Ok(endpoints.iter().map(StaticEndpoint::listed).collect()),
        _ => Err(faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")),
    }
}

/// `model` is the name of the model, for the labels that contain it.
pub(super) fn read_discovery(node: &Node<'_>, model: Option<&str>) -> Option<Discovery> {
    const KINDS: [&str; 4] = ["static", "kubernetes", "dns", "file"];
    let nodes = node.fields(KINDS);
    let given: Vec<&str> =
        KINDS.into_iter().zip(&nodes).filter(|(_, node)| node.is_given()).map(|(kind, _)| kind).collect();
    let found = match given.len() {
        1 => None,
        0 => Some("none of them".to_owned()),
        _ => Some(given.join(" and ")),
    };
    if let Some(found) = found {
        node.fault(found, "exactly one of static, kubernetes, dns and file");
        return None;
    }
    let [fixed, kubernetes, dns, file] = nodes;
    match given[0] {
        "static" => read_static(&fixed).map(Discovery::Static),
        "kubernetes" => read_kubernetes(&kubernetes, model).map(Discovery::Kubernetes),
        "dns" => read_dns(&dns).map(Discovery::Dns),
        _ => read_file(&file).map(Discovery::File),
    }
}

fn read_static(node: &Node<'_>) -> Option<Vec<StaticEndpoint>> {
    if node.items().is_empty() {
        node.fault("nothing", "a list of at least one endpoint");
    }
    read_endpoints(node)
}

fn read_endpoints(node: &Node<'_>) -> Option<Vec<StaticEndpoint>> {
    let endpoints = each(&node.items(), read_endpoint)?;
    let mut seen = BTreeSet::new();
    for (endpoint, node) in endpoints.iter().zip(node.items()) {
        if !seen.insert(endpoint.address) {
            node.fault(endpoint.address, "an address that is not in the list twice");
        }
    }
    Some(endpoints)
}

fn read_endpoint(node: &Node<'_>) -> Option<StaticEndpoint> {
    const ADDRESS: &str = "an IP address with port, such as 127.0.0.1:8000";
    const EVENTS: &str = "a ZMQ endpoint such as tcp://127.0.0.1:5557";
    let [address, events, replay, ranks] = node.fields(["address", "events", "replay", "ranks"]);
    let (publisher, replayer) = (events.optional(EVENTS), replay.optional(EVENTS));
    if replayer.as_ref().is_some_and(ZmqEndpoint::is_bound) {
        replay.fault("a wildcard", "an address to dial: vLLM binds its replay endpoint");
    }
    if replayer.is_some() && publisher.is_none() {
        replay.fault("a replay endpoint without events", "events as well");
    }
    let n_ranks = read_ranks(&ranks);
    let has_no_room = |base: &&ZmqEndpoint| base.of_rank(n_ranks - 1).is_none();
    if let Some(base) = [&publisher, &replayer].into_iter().flatten().find(has_no_room) {
        ranks
            .fault(format!("{n_ranks} ranks from {} on", base.as_str()), "tcp endpoints with as many ports after them");
    }
    let parsed: SocketAddr = address.required(ADDRESS)?;
    if parsed.ip().is_unspecified() || parsed.port() == 0 {
        address.fault(parsed, ADDRESS);
    }
    Some(StaticEndpoint { address: parsed, events: publisher, replay: replayer, ranks: n_ranks })
}

fn read_dns(node: &Node<'_>) -> Option<Dns> {
    let [name, kind, port, interval, events_port, replay_port, ranks] =
        node.fields(["name", "kind", "port", "interval", "events_port", "replay_port", "ranks"]);
    let parsed = name.name("a DNS name such as engines.models.svc.cluster.local.");
    let is_possible = |parsed: &String| labels::is_domain(parsed.strip_suffix('.').unwrap_or(parsed));
    if let Some(wrong) = parsed.as_ref().filter(|parsed| !is_possible(parsed)) {
        name.fault(format!("{wrong:?}"), "a DNS name such as engines.models.svc.cluster.local.");
    }
    let kind = kind.or(DnsKind::A, "a or srv");
    let engine_port = read_optional_port(&port);
    if kind == DnsKind::Srv && port.is_given() {
        port.fault("a port beside kind: srv", "none: SRV records have the ports");
    }
    let event_ports = read_event_ports(&events_port, &replay_port, &ranks);
    Some(Dns {
        name: parsed?,
        kind,
        port: engine_port,
        interval: read_interval(&interval, Duration::from_secs(10), Duration::from_secs(1)),
        events_port: event_ports.events,
        replay_port: event_ports.replay,
        ranks: event_ports.ranks,
    })
}

fn read_file(node: &Node<'_>) -> Option<EndpointFile> {
    let [path, interval] = node.fields(["path", "interval"]);
    let path = path.name("the path of a file with endpoints");
    let interval = read_interval(&interval, Duration::from_secs(2), Duration::from_millis(100));
    Some(EndpointFile { path: path?.into(), interval })
}

fn read_interval(node: &Node<'_>, default: Duration, least: Duration) -> Human {
    let expected = format!("a duration from {} to 1h, such as {}", Human(least), Human(default));
    let interval = node.or(Human(default), &expected);
    if !(least..=Duration::from_secs(3600)).contains(&interval.0) {
        node.fault(interval, expected);
    }
    interval
}

fn read_port(node: &Node<'_>, default: u16) -> u16 {
    read_optional_port(node).unwrap_or(default)
}

fn read_optional_port(node: &Node<'_>) -> Option<u16> {
    const PORT: &str = "a port from 1 to 65535";
    let port = node.optional(PORT)?;
    if port == 0 {
        node.fault(port, PORT);
    }
    Some(port)
}

fn read_event_ports(events: &Node<'_>, replay: &Node<'_>, ranks: &Node<'_>) -> EventPorts {
    let ports = EventPorts {
        events: read_port(events, EVENTS_PORT),
        replay: read_port(replay, REPLAY_PORT),
        ranks: read_ranks(ranks),
    };
    let last_rank = u16::try_from(ports.ranks - 1).expect("there are at most 256 ranks");
    // vLLM adds the rank to both ports, so that two ranks on 5557 and 5558 would want the same one.
    if ports.events.abs_diff(ports.replay) <= last_rank {
        let found = format!("events_port {} and replay_port {} for {} ranks", ports.events, ports.replay, ports.ranks);
        replay.fault(found, "ports that are at least as many apart as there are ranks");
    }
    if ports.events.max(ports.replay).checked_add(last_rank).is_none() {
        ranks.fault(format!("{} ranks", ports.ranks), "events_port and replay_port with as many ports after them");
    }
    ports
}

fn read_ranks(node: &Node<'_>) -> u32 {
    let expected = format!("a number from 1 to {MOST_RANKS}");
    let n_ranks = node.or(1, &expected);
    if !(1..=MOST_RANKS).contains(&n_ranks) {
        node.fault(n_ranks, expected);
        return 1;
    }
    n_ranks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configured_ranks_are_on_ports_after_the_first() {
        let endpoint = |tcp: &str| Some(tcp.parse().expect("a ZMQ endpoint"));
        let address = ([127, 0, 0, 1], 8000).into();
        let endpoint =
            StaticEndpoint { address, events: endpoint("tcp://h:1"), replay: endpoint("tcp://h:5"), ranks: 2 };
        let source = |rank, events: &str, replay: &str| RankSource {
            rank,
            events: events.to_owned(),
            replay: Some(replay.to_owned()),
        };
        let expected = [source(0, "tcp://h:1", "tcp://h:5"), source(1, "tcp://h:2", "tcp://h:6")];
        assert_eq!(endpoint.listed(), Listed::at(address, expected.into()));
        let silent = StaticEndpoint { address, events: None, replay: None, ranks: 1 };
        assert_eq!(silent.listed().sources, []);
    }

    #[test]
    fn a_file_of_endpoints_is_yaml_or_json() {
        let yaml = "- address: 10.0.0.1:8000\n  events: tcp://10.0.0.1:5557\n- {address: '[fd00::1]:8000'}\n";
        let json = r#"[{"address": "10.0.0.1:8000", "events": "tcp://10.0.0.1:5557"}, {"address": "[fd00::1]:8000"}]"#;
        let listed = parse_endpoints(yaml).expect("valid");
        assert_eq!((listed.len(), listed[0].sources.len(), listed[1].sources.len()), (2, 1, 0));
        assert_eq!(parse_endpoints(json), Ok(listed));
        assert_eq!(parse_endpoints("[]"), Ok(Vec::new()));
    }

    #[test]
    fn what_is_wrong_with_a_file_is_said_at_once() {
        for (text, expected) in [
            ("", "found no list"),
            ("\n# nothing yet\n", "found no list"),
            ("endpoints: []", "found no list"),
            ("[", ""),
            ("- {address: h:1}\n- {adress: 1.1.1.1:1}", "[0].address: found \"h:1\""),
            ("- {address: h:1}\n- {adress: 1.1.1.1:1}", "[1].adress: found an unknown setting"),
            ("- {address: 1.1.1.1:1}\n- {address: 1.1.1.1:1}", "[1]: found 1.1.1.1:1"),
        ] {
            let fault = parse_endpoints(text).expect_err(text);
            assert!(fault.contains(expected), "{text}: {fault}");
        }
    }
}
