//! A port that engines dial: their publishers connect, and one SUB socket hears them all.
//!
//! A message does not say which connection brought it, so identity is its topic, `kv@ip:port@model` (llm-d's form), and
//! only what names a source that is listed here counts. Everybody who reaches the port can claim to be a listed
//! endpoint: it must be open to the engines alone.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::RawFd;

use nix::sys::socket::{SockaddrStorage, getpeername};

use super::link::{Message, end_monitoring, monitored, receive, subscriber};

/// See the module.
pub(super) struct Listener {
    endpoint: String,
    subscriber: zmq::Socket,
    monitor: zmq::Socket,
    /// Who is connected, by file descriptor.
    peers: HashMap<RawFd, IpAddr>,
    /// The next disconnection is that of a stranger, who never spoke ZMTP: a health check, a port scan.
    is_strangers: bool,
}

/// What a topic says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Topic {
    /// The endpoint, as clients reach it.
    pub(super) address: SocketAddr,
    /// Name of the model.
    pub(super) model: String,
}

/// A connection that is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LostPeer {
    /// One from there.
    From(IpAddr),
    /// It is not known whose it was.
    Unknown,
}

/// Whether a ZMQ endpoint is one to bind: vLLM's publisher decides by the same sign (`kv_events.py`), from the other
/// side.
pub(super) fn is_bound(endpoint: &str) -> bool {
    endpoint.starts_with("tcp://*:")
}

impl Drop for Listener {
    fn drop(&mut self) {
        end_monitoring(&self.subscriber);
    }
}

impl Listener {
    pub(super) fn bind(context: &zmq::Context, endpoint: &str) -> Result<Self, zmq::Error> {
        let (subscriber, monitor) = subscriber(context, endpoint, zmq::SocketEvent::ACCEPTED)?;
        subscriber.bind(endpoint)?;
        Ok(Self { endpoint: endpoint.to_owned(), subscriber, monitor, peers: HashMap::new(), is_strangers: false })
    }

    pub(super) fn endpoint(&self) -> &str {
        &self.endpoint
    }

    pub(super) fn sockets(&self) -> [&zmq::Socket; 2] {
        [&self.subscriber, &self.monitor]
    }

    /// The next connection that is gone. One whose handshake failed never brought a message, and is none.
    ///
    /// libzmq tells of it twice in a row, first of the handshake, with an error number, then of the disconnection
    /// (4.3.4, `stream_engine_base.cpp`).
    pub(super) fn lost_peer(&mut self) -> Option<LostPeer> {
        while let Some((event, value)) = monitored(&self.monitor) {
            if event == zmq::SocketEvent::ACCEPTED as i32 {
                // Whoever is gone already stays unknown.
                self.peers.extend(peer(value).map(|peer| (value, peer)));
            } else if event == zmq::SocketEvent::DISCONNECTED as i32 {
                let lost = self.peers.remove(&value).map_or(LostPeer::Unknown, LostPeer::From);
                if !std::mem::take(&mut self.is_strangers) {
                    return Some(lost);
                }
            } else if event != zmq::SocketEvent::CLOSED as i32 {
                self.is_strangers = true;
            }
        }
        None
    }

    /// The next message, with its topic if that can be read.
    pub(super) fn message(&self) -> Option<(Option<Topic>, Message)> {
        let frames = receive(&self.subscriber)?;
        let topic = frames.first().and_then(|topic| Topic::parse(topic));
        Some((topic, Message::of(frames)))
    }
}

fn peer(socket: RawFd) -> Option<IpAddr> {
    let address = getpeername::<SockaddrStorage>(socket).ok()?;
    let v4 = address.as_sockaddr_in().map(|v4| IpAddr::from(v4.ip()));
    v4.or_else(|| address.as_sockaddr_in6().map(|v6| v6.ip().to_canonical()))
}

impl Topic {
    /// Reads `kv@ip:port@model`; the model's name may have an `@` of its own.
    fn parse(topic: &[u8]) -> Option<Self> {
        let (address, model) = std::str::from_utf8(topic).ok()?.strip_prefix("kv@")?.split_once('@')?;
        Some(Self { address: address.parse().ok()?, model: model.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topics_are_read() {
        let topic = |address: &str, model: &str| Some(Topic { address: address.parse().unwrap(), model: model.into() });
        let cases = [
            ("kv@10.0.0.1:8000@org/model", topic("10.0.0.1:8000", "org/model")),
            ("kv@[::1]:8000@a@b", topic("[::1]:8000", "a@b")),
            ("kv@10.0.0.1@model", None),
            ("kv@pod-7:8000@model", None),
            ("10.0.0.1:8000@model", None),
            ("", None),
        ];
        for (text, expected) in cases {
            assert_eq!(Topic::parse(text.as_bytes()), expected, "{text}");
        }
        assert_eq!(Topic::parse(b"kv@\xff"), None);
    }

    #[test]
    fn endpoints_to_bind_are_told_from_those_to_dial() {
        assert!(is_bound("tcp://*:5557"));
        assert!(!["tcp://10.0.0.1:5557", "tcp://pod.ns:5557", "tcp://[::1]:5557"].into_iter().any(is_bound));
    }
}
