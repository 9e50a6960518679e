//! Where an endpoint's data-parallel ranks publish their KV events, as the engine itself says it.
//!
//! `GET /kv_event_sources` (vLLM 0.32.0, `entrypoints/serve/instrumentator/basic.py`) answers
//! `{"0": {"endpoint": "tcp://*:5557", "replay_endpoint": "tcp://*:5558", …}, "1": …}`: the publisher's settings of
//! each rank with the ports it got, but with the hosts as they were bound. Identity is what we dial, so a host that
//! binds all addresses stands for the endpoint's own, and any other host than that is refused.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use serde::Deserialize;

/// More ranks than any machine has devices.
const MOST_RANKS: usize = 256;

/// Where one rank of an endpoint publishes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankSource {
    /// Data-parallel rank.
    pub rank: u32,
    /// ZMQ endpoint of its publisher.
    pub events: String,
    /// ZMQ endpoint of its replay.
    pub replay: Option<String>,
}

/// An endpoint's answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// The ranks, in order.
    pub sources: Vec<RankSource>,
    /// What cannot be dialled as a part of this endpoint; a refused replay leaves its source without one.
    pub refused: Vec<Refused>,
}

/// An address that is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// The rank it is said of.
    pub rank: u32,
    /// The address.
    pub address: String,
}

/// An answer that cannot be used at all.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Nonsense {
    /// It is not JSON, or not of this shape.
    #[error("the answer is not a mapping from ranks to publishers")]
    Shape,
    /// A key is not a rank.
    #[error("the answer names the rank {0:?}, expected a number")]
    Rank(String),
    /// It is far too long.
    #[error("the answer names {0} ranks, expected at most {MOST_RANKS}")]
    TooManyRanks(usize),
}

#[derive(Deserialize)]
struct Publisher {
    endpoint: String,
    replay_endpoint: Option<String>,
}

impl Answer {
    /// Reads the answer of the endpoint at `ip`.
    ///
    /// # Errors
    /// [`Nonsense`] when it is no such answer.
    pub fn parse(body: &[u8], ip: IpAddr) -> Result<Self, Nonsense> {
        let publishers: BTreeMap<String, Publisher> = serde_json::from_slice(body).map_err(|_| Nonsense::Shape)?;
        if publishers.len() > MOST_RANKS {
            return Err(Nonsense::TooManyRanks(publishers.len()));
        }
        let mut by_rank = BTreeMap::new();
        for (key, publisher) in publishers {
            let rank: u32 = key.parse().map_err(|_| Nonsense::Rank(shortened(&key)))?;
            by_rank.insert(rank, publisher);
        }
        let mut answer = Self::default();
        by_rank.into_iter().for_each(|(rank, publisher)| answer.take(rank, publisher, ip));
        Ok(answer)
    }

    fn take(&mut self, rank: u32, publisher: Publisher, ip: IpAddr) {
        let events = self.dialled(rank, &publisher.endpoint, ip);
        let replay = publisher.replay_endpoint.and_then(|replay| self.dialled(rank, &replay, ip));
        if let Some(events) = events {
            self.sources.push(RankSource { rank, events, replay });
        }
    }

    fn dialled(&mut self, rank: u32, address: &str, ip: IpAddr) -> Option<String> {
        let dialled = dialled(address, ip);
        if dialled.is_none() {
            self.refused.push(Refused { rank, address: shortened(address) });
        }
        dialled.map(|address| format!("tcp://{address}"))
    }
}

/// How to dial what an engine at `ip` has bound; none when that is not at `ip`.
fn dialled(address: &str, ip: IpAddr) -> Option<SocketAddr> {
    let (host, port) = address.strip_prefix("tcp://")?.rsplit_once(':')?;
    let port = port.parse().ok().filter(|port| *port > 0)?;
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let is_ours = host == "*"
        || host.parse::<IpAddr>().is_ok_and(|host| host.is_unspecified() || host.to_canonical() == ip.to_canonical());
    is_ours.then(|| SocketAddr::new(ip, port))
}

/// Enough of a text of unknown size for a log.
fn shortened(text: &str) -> String {
    text.chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(body: &str, ip: &str) -> Result<Answer, Nonsense> {
        Answer::parse(body.as_bytes(), ip.parse().expect("an address"))
    }

    #[test]
    fn the_answer_of_two_ranks_names_where_to_dial() {
        // vLLM 0.32.0 with --data-parallel-size 2.
        let body = r#"{"1":{"enable_kv_cache_events":true,"publisher":"zmq","endpoint":"tcp://*:25558",
            "replay_endpoint":"tcp://127.0.0.1:26558","buffer_steps":10000,"hwm":100000,"max_queue_size":100000,
            "topic":""},"0":{"endpoint":"tcp://*:25557","replay_endpoint":null}}"#;
        let answer = parse(body, "127.0.0.1").expect("an answer");
        let rank_0 = RankSource { rank: 0, events: "tcp://127.0.0.1:25557".to_owned(), replay: None };
        let rank_1 = RankSource {
            rank: 1,
            events: "tcp://127.0.0.1:25558".to_owned(),
            replay: Some("tcp://127.0.0.1:26558".to_owned()),
        };
        assert_eq!(answer, Answer { sources: vec![rank_0, rank_1], refused: Vec::new() });
    }

    #[test]
    fn only_the_endpoint_itself_is_dialled() {
        for (address, ip, dialled) in [
            ("tcp://*:1", "10.0.0.1", Some("tcp://10.0.0.1:1")),
            ("tcp://0.0.0.0:1", "10.0.0.1", Some("tcp://10.0.0.1:1")),
            ("tcp://[::]:1", "10.0.0.1", Some("tcp://10.0.0.1:1")),
            ("tcp://:::1", "fd00::1", Some("tcp://[fd00::1]:1")),
            ("tcp://[fd00::1]:1", "fd00::1", Some("tcp://[fd00::1]:1")),
            ("tcp://[::ffff:10.0.0.1]:1", "10.0.0.1", Some("tcp://10.0.0.1:1")),
            ("tcp://10.0.0.2:1", "10.0.0.1", None),
            ("tcp://127.0.0.1:1", "10.0.0.1", None),
            ("tcp://router:1", "10.0.0.1", None),
            ("tcp://*:0", "10.0.0.1", None),
            ("tcp://*:70000", "10.0.0.1", None),
            ("ipc:///run/kv", "10.0.0.1", None),
            ("inproc://kv", "10.0.0.1", None),
            ("", "10.0.0.1", None),
        ] {
            let answer = parse(&format!(r#"{{"0":{{"endpoint":{address:?}}}}}"#), ip).expect("an answer");
            assert_eq!(answer.sources.first().map(|source| source.events.as_str()), dialled, "{address}");
            assert_eq!(answer.refused.len(), usize::from(dialled.is_none()), "{address}");
        }
    }

    #[test]
    fn a_refused_replay_does_not_cost_the_events() {
        let answer = parse(r#"{"3":{"endpoint":"tcp://*:1","replay_endpoint":"tcp://10.9.9.9:2"}}"#, "10.0.0.1");
        let answer = answer.expect("an answer");
        let source = RankSource { rank: 3, events: "tcp://10.0.0.1:1".to_owned(), replay: None };
        assert_eq!(answer.sources, [source]);
        assert_eq!(answer.refused, [Refused { rank: 3, address: "tcp://10.9.9.9:2".to_owned() }]);
    }

    #[test]
    fn nonsense_is_named() {
        for (body, expected) in [
            ("", Nonsense::Shape),
            ("[]", Nonsense::Shape),
            (r#"{"0":{}}"#, Nonsense::Shape),
            (r#"{"0":{"endpoint":7}}"#, Nonsense::Shape),
            (r#"{"detail":{"endpoint":"tcp://*:1"}}"#, Nonsense::Rank("detail".to_owned())),
            (r#"{"-1":{"endpoint":"tcp://*:1"}}"#, Nonsense::Rank("-1".to_owned())),
        ] {
            assert_eq!(parse(body, "10.0.0.1"), Err(expected), "{body}");
        }
        assert_eq!(parse("{}", "10.0.0.1"), Ok(Answer::default()));
        let many: Vec<String> = (0..257).map(|rank| format!(r#""{rank}":{{"endpoint":"tcp://*:1"}}"#)).collect();
        assert_eq!(parse(&format!("{{{}}}", many.join(",")), "10.0.0.1"), Err(Nonsense::TooManyRanks(257)));
    }
}
