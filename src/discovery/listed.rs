//! What a source of endpoints says of one of them.

use std::net::{IpAddr, SocketAddr};

use super::event_sources::RankSource;

/// More data-parallel ranks than any machine has devices.
pub const MOST_RANKS: u32 = 256;

/// Port of vLLM's API server unless something says otherwise.
pub const DEFAULT_PORT: u16 = 8000;

/// One endpoint of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// What makes it this one and no other: something else at the same address is another endpoint, of whose cache
    /// nothing is known.
    pub identity: String,
    /// IP literal and port, as in Envoy's cluster.
    pub address: SocketAddr,
    /// Since when it exists, as text that sorts by time (RFC 3339 in UTC); empty where nobody says it.
    pub created: String,
    /// Where its ranks publish KV events; empty: nowhere that its source knows of.
    pub sources: Vec<RankSource>,
}

impl Listed {
    /// An endpoint that is known by its address alone.
    pub fn at(address: SocketAddr, sources: Vec<RankSource>) -> Self {
        Self { identity: address.to_string(), address, created: String::new(), sources }
    }
}

/// The ports on which an engine publishes its KV events and replays them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventPorts {
    /// Of rank 0; rank r is that many ports further (vLLM 0.32.0, `distributed/kv_events.py`).
    pub events: u16,
    /// The same for the replay.
    pub replay: u16,
    /// How many ranks there are.
    pub ranks: u32,
}

impl EventPorts {
    /// Where the ranks of the engine at `ip` publish that begin with `first_rank`. A rank beyond the last port has no
    /// source, and one without room for a replay port has no replay.
    pub fn sources(&self, ip: IpAddr, first_rank: u32) -> Vec<RankSource> {
        let on = |base: u16, rank: u32| {
            let port = base.checked_add(u16::try_from(rank).ok()?)?;
            Some(format!("tcp://{}", SocketAddr::new(ip, port)))
        };
        let source = |rank| Some(RankSource { rank, events: on(self.events, rank)?, replay: on(self.replay, rank) });
        (first_rank..first_rank + self.ranks).filter_map(source).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_on_the_ports_after_the_first() {
        let ports = EventPorts { events: 5557, replay: 6557, ranks: 2 };
        let source = |rank, events: &str, replay: &str| RankSource {
            rank,
            events: events.to_owned(),
            replay: Some(replay.to_owned()),
        };
        assert_eq!(
            ports.sources("fd00::1".parse().expect("an address"), 3),
            [
                source(3, "tcp://[fd00::1]:5560", "tcp://[fd00::1]:6560"),
                source(4, "tcp://[fd00::1]:5561", "tcp://[fd00::1]:6561"),
            ]
        );
    }

    #[test]
    fn there_are_no_ranks_beyond_the_last_port() {
        let ports = EventPorts { events: 65_535, replay: 1, ranks: 3 };
        assert_eq!(ports.sources([10, 0, 0, 1].into(), 0).len(), 1);
        let ports = EventPorts { events: 1, replay: 65_535, ranks: 2 };
        let replays: Vec<bool> =
            ports.sources([10, 0, 0, 1].into(), 0).iter().map(|source| source.replay.is_some()).collect();
        assert_eq!(replays, [true, false]);
    }
}
