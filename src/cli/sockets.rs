//! The ZMQ sockets of the subcommands that look at an engine's events: made here, owned and polled by them.

/// Batches that may wait unread while the output is blocked; a gap shows those that are dropped beyond.
const LIVE_QUEUE: i32 = 100_000;
/// A larger frame ends the connection, as it does in the router.
const MAX_FRAME_BYTES: i64 = 16 << 20;

/// Sequence number of the END marker of a replay.
pub(super) const END: u64 = u64::MAX;

/// What a monitor tells of its socket's connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LinkEvent {
    /// Both ends have agreed to speak.
    Up,
    /// The connection is gone.
    Down,
    /// Somebody answered who speaks another protocol, or is a socket of another kind.
    Refused,
    /// Anything else.
    Other,
}

/// A SUB socket that is connecting, and the monitor that tells of its connection.
pub(super) fn subscribe(
    context: &zmq::Context,
    endpoint: &str,
    topic: &str,
) -> zmq::Result<(zmq::Socket, zmq::Socket)> {
    let live = socket(context, zmq::SUB, endpoint)?;
    live.set_tcp_keepalive(1)?;
    // A node that is gone says nothing: without this, neither would we.
    live.set_heartbeat_ivl(5_000)?;
    live.set_heartbeat_timeout(15_000)?;
    live.set_subscribe(topic.as_bytes())?;
    let monitor = monitored(context, &live, "inproc://live")?;
    live.connect(endpoint)?;
    Ok((live, monitor))
}

/// A DEALER that has asked for the batches from a number on.
pub(super) fn request(context: &zmq::Context, endpoint: &str, from: u64) -> zmq::Result<zmq::Socket> {
    let dealer = socket(context, zmq::DEALER, endpoint)?;
    dealer.connect(endpoint)?;
    ask(&dealer, from)?;
    Ok(dealer)
}

/// A DEALER that is connecting, and the monitor that tells of its connection.
pub(super) fn dealer(context: &zmq::Context, endpoint: &str) -> zmq::Result<(zmq::Socket, zmq::Socket)> {
    let dealer = socket(context, zmq::DEALER, endpoint)?;
    let monitor = monitored(context, &dealer, "inproc://replay")?;
    dealer.connect(endpoint)?;
    Ok((dealer, monitor))
}

/// Asks for the batches from a number on.
pub(super) fn ask(dealer: &zmq::Socket, from: u64) -> zmq::Result<()> {
    dealer.send_multipart([&b""[..], &from.to_be_bytes()], zmq::DONTWAIT)
}

/// The next message, if one waits.
pub(super) fn receive(socket: &zmq::Socket) -> Option<Vec<Vec<u8>>> {
    socket.recv_multipart(zmq::DONTWAIT).ok()
}

/// Sequence number and payload of a message. They are read from the end, since the frames before differ between releases.
pub(super) fn split(frames: &[Vec<u8>]) -> Option<(u64, &[u8])> {
    let [.., seq, payload] = frames else { return None };
    Some((u64::from_be_bytes(seq.as_slice().try_into().ok()?), payload))
}

/// The next event of a connection, if one waits.
pub(super) fn next_event(monitor: &zmq::Socket) -> Option<LinkEvent> {
    use zmq::SocketEvent::{
        DISCONNECTED, HANDSHAKE_FAILED_AUTH, HANDSHAKE_FAILED_NO_DETAIL, HANDSHAKE_FAILED_PROTOCOL, HANDSHAKE_SUCCEEDED,
    };
    let frames = receive(monitor)?;
    // Frame 1 is the event as a native u16, then a u32; libzmq, zmq_socket_monitor(3).
    let event = frames.first().and_then(|frame| frame.first_chunk()).map(|event| u16::from_ne_bytes(*event));
    let is = |kind: zmq::SocketEvent| event == Some(kind as u16);
    Some(if is(HANDSHAKE_SUCCEEDED) {
        LinkEvent::Up
    } else if is(DISCONNECTED) {
        LinkEvent::Down
    } else if is(HANDSHAKE_FAILED_PROTOCOL) || is(HANDSHAKE_FAILED_NO_DETAIL) || is(HANDSHAKE_FAILED_AUTH) {
        LinkEvent::Refused
    } else {
        LinkEvent::Other
    })
}

fn socket(context: &zmq::Context, kind: zmq::SocketType, endpoint: &str) -> zmq::Result<zmq::Socket> {
    let socket = context.socket(kind)?;
    socket.set_linger(0)?;
    socket.set_rcvhwm(LIVE_QUEUE)?;
    socket.set_maxmsgsize(MAX_FRAME_BYTES)?;
    socket.set_ipv6(endpoint.contains('['))?;
    Ok(socket)
}

/// The monitor of a socket that is not connected yet; its name is the socket's own within the context.
fn monitored(context: &zmq::Context, socket: &zmq::Socket, name: &str) -> zmq::Result<zmq::Socket> {
    use zmq::SocketEvent as Event;
    let failures = Event::HANDSHAKE_FAILED_PROTOCOL as i32
        | Event::HANDSHAKE_FAILED_NO_DETAIL as i32
        | Event::HANDSHAKE_FAILED_AUTH as i32;
    socket.monitor(name, Event::HANDSHAKE_SUCCEEDED as i32 | Event::DISCONNECTED as i32 | failures)?;
    let monitor = context.socket(zmq::PAIR)?;
    monitor.set_linger(0)?;
    monitor.connect(name)?;
    Ok(monitor)
}
