//! Types of single settings.

use std::fmt::{self, Display};
use std::str::FromStr;
use std::time::Duration;

use serde::{Serialize, Serializer};

/// A duration that is written as `100ms`, `25s` or `1m 30s`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Human(pub Duration);

impl FromStr for Human {
    type Err = humantime::DurationError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        humantime::parse_duration(text).map(Self)
    }
}

impl Display for Human {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        humantime::format_duration(self.0).fmt(f)
    }
}

impl Serialize for Human {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A ZMQ endpoint: `tcp://host:port` or `ipc://path`; the host `*` is a port of ours.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct ZmqEndpoint(String);

impl ZmqEndpoint {
    /// Whether it is a port of ours, which others dial.
    pub fn is_bound(&self) -> bool {
        self.0.starts_with("tcp://*:")
    }

    /// As libzmq takes it.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Where the engine's data-parallel rank `rank` is, if this is where rank 0 is: vLLM adds the rank to the port
    /// (0.32.0, `distributed/kv_events.py`). None where there is no such port, as with `ipc` beyond rank 0.
    pub fn of_rank(&self, rank: u32) -> Option<Self> {
        if rank == 0 {
            return Some(self.clone());
        }
        let (host, port) = self.0.strip_prefix("tcp://")?.rsplit_once(':')?;
        let port = port.parse::<u16>().ok()?.checked_add(u16::try_from(rank).ok()?)?;
        Some(Self(format!("tcp://{host}:{port}")))
    }
}

impl FromStr for ZmqEndpoint {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let is_tcp = text
            .strip_prefix("tcp://")
            .and_then(|rest| rest.rsplit_once(':'))
            .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0));
        let is_ipc = text.strip_prefix("ipc://").is_some_and(|path| !path.is_empty());
        if is_tcp || is_ipc { Ok(Self(text.to_owned())) } else { Err(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rank_is_found_on_the_port_that_many_after_the_first() {
        let of_rank = |text: &str, rank| {
            let base: ZmqEndpoint = text.parse().expect("an endpoint");
            base.of_rank(rank).map(|endpoint| endpoint.as_str().to_owned())
        };
        assert_eq!(of_rank("tcp://[::1]:5557", 3).as_deref(), Some("tcp://[::1]:5560"));
        assert_eq!(of_rank("ipc:///run/kv", 0).as_deref(), Some("ipc:///run/kv"));
        assert_eq!(of_rank("ipc:///run/kv", 1), None);
        assert_eq!(of_rank("tcp://h:65535", 1), None);
        assert_eq!(of_rank("tcp://h:1", 70_000), None);
    }

    #[test]
    fn only_endpoints_of_zmq_are_taken() {
        for good in
            ["tcp://*:5557", "tcp://127.0.0.1:5557", "tcp://[::1]:5557", "tcp://engine-0.engines:5557", "ipc:///run/kv"]
        {
            assert!(good.parse::<ZmqEndpoint>().is_ok(), "{good}");
        }
        for bad in ["tcp://host", "tcp://host:0", "tcp://:1", "host:1", "ipc://", "udp://h:1", ""] {
            assert!(bad.parse::<ZmqEndpoint>().is_err(), "{bad}");
        }
    }
}
