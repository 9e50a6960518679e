//! The ZMQ sockets of one source.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::events::continuity::SeqNo;

/// A larger frame ends the connection. vLLM's batches are a few kilobytes, those of a full re-announcement some
/// megabytes.
const MAX_FRAME_BYTES: i64 = 16 << 20;
/// Batches that may wait unread on the live stream: minutes of a busy engine. What is dropped beyond is a gap, which a
/// replay fills.
pub(super) const LIVE_QUEUE: i32 = 10_000;
/// Replies that may wait unread: vLLM's replay buffer by default.
const REPLAY_QUEUE: i32 = 10_000;
/// A dead peer is noticed after interval + timeout; shorter ones turn mere stalls into lost batches.
const HEARTBEAT_INTERVAL_MS: i32 = 5_000;
const HEARTBEAT_TIMEOUT_MS: i32 = 15_000;
/// libzmq does not connect again by itself: it would do so with a socket whose messages may be of the former
/// connection.
const NO_RECONNECT: i32 = -1;
/// Sequence number of the END marker.
const END: u64 = u64::MAX;

/// What a monitor calls the end of an attempt or of a connection.
const ENDS: [zmq::SocketEvent; 5] = [
    zmq::SocketEvent::CLOSED,
    zmq::SocketEvent::DISCONNECTED,
    zmq::SocketEvent::HANDSHAKE_FAILED_NO_DETAIL,
    zmq::SocketEvent::HANDSHAKE_FAILED_PROTOCOL,
    zmq::SocketEvent::HANDSHAKE_FAILED_AUTH,
];

/// A SUB socket and the monitor that tells of its connection.
///
/// It lives for one connection: messages of a former connection that wait in a socket cannot be told from those of
/// the next, so whoever learns of a disconnection drops the link and opens another.
pub(super) struct Link {
    subscriber: zmq::Socket,
    monitor: zmq::Socket,
}

/// What a monitor tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ConnectionEvent {
    Connected,
    /// An attempt failed, or the connection is gone.
    Disconnected,
}

/// A message of the live stream or of a replay, read from its end: the frames before differ between releases.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Message {
    Batch { seq: SeqNo, payload: Vec<u8> },
    ReplayEnd,
    Malformed,
}

impl Link {
    pub(super) fn open(context: &zmq::Context, publisher: &str) -> Result<Self, zmq::Error> {
        let (subscriber, monitor) = subscriber(context, publisher, zmq::SocketEvent::HANDSHAKE_SUCCEEDED)?;
        subscriber.set_reconnect_ivl(NO_RECONNECT)?;
        subscriber.connect(publisher)?;
        Ok(Self { subscriber, monitor })
    }

    /// The next thing that happened to the connection. A message of a connection is never readable before this told of
    /// the connection, nor one of the next connection before this told of the disconnection.
    pub(super) fn connection_event(&self) -> Option<ConnectionEvent> {
        while let Some((event, _)) = monitored(&self.monitor) {
            if event == zmq::SocketEvent::HANDSHAKE_SUCCEEDED as i32 {
                return Some(ConnectionEvent::Connected);
            }
            if is_end(event) {
                return Some(ConnectionEvent::Disconnected);
            }
        }
        None
    }

    pub(super) fn message(&self) -> Option<Message> {
        receive(&self.subscriber).map(Message::of)
    }

    pub(super) fn sockets(&self) -> [&zmq::Socket; 2] {
        [&self.subscriber, &self.monitor]
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        end_monitoring(&self.subscriber);
    }
}

/// One replay request and its replies. A new request takes a new socket, so that replies to the former cannot mix in.
pub(super) struct Replay {
    dealer: zmq::Socket,
}

impl Replay {
    pub(super) fn request(context: &zmq::Context, replayer: &str, from: SeqNo) -> Result<Self, zmq::Error> {
        let dealer = socket(context, zmq::DEALER, replayer)?;
        dealer.set_rcvhwm(REPLAY_QUEUE)?;
        dealer.connect(replayer)?;
        dealer.send_multipart([&b""[..], &from.0.to_be_bytes()], zmq::DONTWAIT)?;
        Ok(Self { dealer })
    }

    pub(super) fn message(&self) -> Option<Message> {
        receive(&self.dealer).map(Message::of)
    }

    pub(super) fn socket(&self) -> &zmq::Socket {
        &self.dealer
    }
}

impl Message {
    pub(super) fn of(mut frames: Vec<Vec<u8>>) -> Self {
        let (Some(payload), Some(seq)) = (frames.pop(), frames.pop()) else { return Self::Malformed };
        match <[u8; 8]>::try_from(seq).map(u64::from_be_bytes) {
            Ok(END) => Self::ReplayEnd,
            Ok(seq) => Self::Batch { seq: SeqNo(seq), payload },
            Err(_) => Self::Malformed,
        }
    }
}

/// A SUB socket for everything, neither connected nor bound yet, and the monitor that tells of `begin` and of all ends.
pub(super) fn subscriber(
    context: &zmq::Context,
    endpoint: &str,
    begin: zmq::SocketEvent,
) -> Result<(zmq::Socket, zmq::Socket), zmq::Error> {
    let subscriber = socket(context, zmq::SUB, endpoint)?;
    subscriber.set_rcvhwm(LIVE_QUEUE)?;
    subscriber.set_heartbeat_ivl(HEARTBEAT_INTERVAL_MS)?;
    subscriber.set_heartbeat_timeout(HEARTBEAT_TIMEOUT_MS)?;
    subscriber.set_tcp_keepalive(1)?;
    subscriber.set_subscribe(b"")?;
    let name = monitor_name();
    let ends = ENDS.into_iter().fold(0, |events, event| events | event as i32);
    subscriber.monitor(&name, begin as i32 | ends)?;
    let monitor = context.socket(zmq::PAIR)?;
    monitor.set_linger(0)?;
    monitor.connect(&name)?;
    Ok((subscriber, monitor))
}

/// Has a subscriber tell nothing any more, before it and its monitor are closed.
///
/// libzmq's own thread writes the events, and waits for ever when the monitor has been closed and there is one more to
/// write, such as the end of an attempt to connect: then no source of the context hears anything any more. There is no
/// call of the `zmq` crate that ends a monitor, but another one takes its place, and that one is told nothing.
pub(super) fn end_monitoring(subscriber: &zmq::Socket) {
    // It fails only when the context has ended, and the thread with it.
    let _ = subscriber.monitor(&monitor_name(), 0);
}

/// Monitors need names that are unique within the process's contexts.
fn monitor_name() -> String {
    static N_MONITORS: AtomicU64 = AtomicU64::new(0);
    format!("inproc://kv-events-{}", N_MONITORS.fetch_add(1, Ordering::Relaxed))
}

/// The next thing that a monitor tells: event and value, as in libzmq, zmq_socket_monitor(3).
pub(super) fn monitored(monitor: &zmq::Socket) -> Option<(i32, i32)> {
    loop {
        let frames = receive(monitor)?;
        let (event, value) = frames.first()?.split_first_chunk::<2>()?;
        if let Some(value) = value.first_chunk() {
            return Some((i32::from(u16::from_ne_bytes(*event)), i32::from_ne_bytes(*value)));
        }
    }
}

/// Whether a monitored event ends an attempt or a connection.
pub(super) fn is_end(event: i32) -> bool {
    ENDS.into_iter().any(|end| event == end as i32)
}

fn socket(context: &zmq::Context, kind: zmq::SocketType, endpoint: &str) -> Result<zmq::Socket, zmq::Error> {
    let socket = context.socket(kind)?;
    socket.set_linger(0)?;
    socket.set_maxmsgsize(MAX_FRAME_BYTES)?;
    socket.set_ipv6(endpoint.contains('['))?;
    Ok(socket)
}

/// The next message's frames, if one waits. An interrupted or ended context has none.
pub(super) fn receive(socket: &zmq::Socket) -> Option<Vec<Vec<u8>>> {
    socket.recv_multipart(zmq::DONTWAIT).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_read_from_the_end() {
        let seq = 7_u64.to_be_bytes().to_vec();
        let end = vec![0xff; 8];
        let batch = || Message::Batch { seq: SeqNo(7), payload: b"p".to_vec() };
        let cases = [
            (vec![b"topic".to_vec(), seq.clone(), b"p".to_vec()], batch()),
            (vec![vec![], seq.clone(), b"p".to_vec()], batch()),
            (vec![vec![], b"topic".to_vec(), seq.clone(), b"p".to_vec()], batch()),
            (vec![vec![], end.clone(), vec![]], Message::ReplayEnd),
            (vec![vec![], vec![], end, vec![]], Message::ReplayEnd),
            (vec![b"p".to_vec()], Message::Malformed),
            (vec![vec![], vec![1, 2, 3], b"p".to_vec()], Message::Malformed),
            (vec![], Message::Malformed),
        ];
        for (frames, message) in cases {
            assert_eq!(Message::of(frames.clone()), message, "{frames:?}");
        }
    }
}
