//! `models[].discovery`: the endpoints of a model.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use serde::Serialize;

use super::each;
use super::reader::Node;
use super::values::ZmqEndpoint;

/// Data-parallel ranks of one endpoint: more than any machine has devices.
const MOST_RANKS: u32 = 256;

/// `models[].discovery`
#[derive(Clone, Debug, Serialize)]
pub struct Discovery {
    /// `static`: the endpoints themselves.
    #[serde(rename = "static")]
    pub fixed: Vec<StaticEndpoint>,
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

pub(super) fn read_discovery(node: &Node<'_>) -> Option<Discovery> {
    let [fixed] = node.fields(["static"]);
    if fixed.items().is_empty() {
        fixed.fault("nothing", "a list of at least one endpoint");
    }
    let endpoints = each(&fixed.items(), read_endpoint)?;
    let mut seen = BTreeSet::new();
    for (endpoint, node) in endpoints.iter().zip(fixed.items()) {
        if !seen.insert(endpoint.address) {
            node.fault(endpoint.address, "an address that is not in the list twice");
        }
    }
    Some(Discovery { fixed: endpoints })
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
    let n_ranks = read_ranks(&ranks, &[&publisher, &replayer]);
    let parsed: SocketAddr = address.required(ADDRESS)?;
    if parsed.ip().is_unspecified() || parsed.port() == 0 {
        address.fault(parsed, ADDRESS);
    }
    Some(StaticEndpoint { address: parsed, events: publisher, replay: replayer, ranks: n_ranks })
}

fn read_ranks(node: &Node<'_>, bases: &[&Option<ZmqEndpoint>]) -> u32 {
    let expected = format!("a number from 1 to {MOST_RANKS}");
    let n_ranks = node.or(1, &expected);
    if !(1..=MOST_RANKS).contains(&n_ranks) {
        node.fault(n_ranks, expected);
        return 1;
    }
    let has_no_room = |base: &&ZmqEndpoint| base.of_rank(n_ranks - 1).is_none();
    if let Some(base) = bases.iter().filter_map(|base| base.as_ref()).find(has_no_room) {
        node.fault(format!("{n_ranks} ranks from {} on", base.as_str()), "tcp endpoints with as many ports after them");
    }
    n_ranks
}
