//! Each fault of the proxy, seen by libzmq's own sockets.

use std::time::{Duration, Instant};

use e2e::proxy::{Faults, Proxy, Side, Which};

const DEADLINE: Duration = Duration::from_secs(20);
/// Silence that is long enough to mean that nothing comes.
const SILENCE_MS: i32 = 1000;

/// A PUB socket, a proxy in front of it and a SUB socket behind that, connected.
struct Line {
    publisher: zmq::Socket,
    proxy: Proxy,
    subscriber: zmq::Socket,
    context: zmq::Context,
}

impl Line {
    fn connect() -> Self {
        let context = zmq::Context::new();
        let publisher = context.socket(zmq::PUB).unwrap();
        publisher.set_linger(0).unwrap();
        publisher.bind("tcp://127.0.0.1:0").unwrap();
        let proxy = Proxy::start(address(&publisher), 7).unwrap();
        let subscriber = context.socket(zmq::SUB).unwrap();
        subscriber.set_linger(0).unwrap();
        subscriber.set_reconnect_ivl(20).unwrap();
        subscriber.set_subscribe(b"").unwrap();
        subscriber.connect(&proxy.endpoint()).unwrap();
        let line = Self { publisher, proxy, subscriber, context };
        line.wait_connected();
        line
    }

    fn send(&self, text: &str) {
        self.publisher.send_multipart([b"kv", text.as_bytes()], 0).unwrap();
    }

    fn receive(&self, timeout_ms: i32) -> Option<Vec<u8>> {
        self.subscriber.set_rcvtimeo(timeout_ms).unwrap();
        self.subscriber.recv_multipart(0).ok().and_then(|mut frames| frames.pop())
    }

    fn received(&self, timeout_ms: i32) -> Vec<String> {
        let texts = std::iter::from_fn(|| self.receive(timeout_ms));
        texts.map(|text| String::from_utf8_lossy(&text).into_owned()).collect()
    }

    /// A subscription takes a moment to reach the publisher: sends until something arrives, then takes what is under
    /// way.
    fn wait_connected(&self) {
        let started = Instant::now();
        loop {
            self.send("probe");
            if self.receive(20).is_some() {
                break;
            }
            assert!(started.elapsed() < DEADLINE, "no connection: {}", self.proxy.counts());
        }
        self.received(SILENCE_MS);
    }

    fn send_and_receive(&self, texts: &[&str]) -> Vec<String> {
        texts.iter().for_each(|text| self.send(text));
        self.received(SILENCE_MS)
    }
}

fn address(socket: &zmq::Socket) -> std::net::SocketAddr {
    socket.get_last_endpoint().unwrap().unwrap().strip_prefix("tcp://").unwrap().parse().unwrap()
}

fn faults(set: impl FnOnce(&mut Faults)) -> Faults {
    let mut faults = Faults::default();
    set(&mut faults);
    faults
}

#[test]
fn without_faults_everything_passes_unchanged() {
    let line = Line::connect();
    let large = "x".repeat(1 << 20);
    assert_eq!(line.send_and_receive(&["a", "", &large, "b"]), ["a", "", &large, "b"]);
}

#[test]
fn dropped_and_duplicated_messages_are_whole_ones() {
    let line = Line::connect();
    line.proxy.set(faults(|faults| (faults.drop, faults.duplicate) = (Which::Nth(1), Which::Every(3))));
    assert_eq!(line.send_and_receive(&["a", "b", "c", "d", "e", "f"]), ["a", "c", "c", "d", "e", "f", "f"]);
    let counts = line.proxy.counts();
    assert_eq!((counts.dropped, counts.duplicated, counts.connections), (1, 2, 1));
}

#[test]
fn corrupted_messages_keep_their_frames_and_the_connection() {
    let line = Line::connect();
    line.proxy.set(faults(|faults| faults.corrupt = Which::Nth(0)));
    line.send("spoiled");
    line.send("sound");
    let spoiled = line.receive(SILENCE_MS).unwrap();
    assert_eq!((spoiled.len(), spoiled[0]), ("spoiled".len(), 0xc1));
    assert_eq!(line.received(SILENCE_MS), ["sound"]);
    assert_eq!(line.proxy.counts().connections, 1);
}

#[test]
fn truncated_message_ends_the_connection_and_is_never_seen() {
    let line = Line::connect();
    line.proxy.set(faults(|faults| faults.truncate = Which::Nth(1)));
    assert_eq!(line.send_and_receive(&["whole", "cut in two"]), ["whole"]);
    line.wait_connected();
    assert_eq!(line.send_and_receive(&["after"]), ["after"]);
    assert_eq!(line.proxy.counts().truncated, 1);
}

#[test]
fn delay_holds_everything_back_and_keeps_the_order() {
    let line = Line::connect();
    line.proxy
        .set(faults(|faults| (faults.delay, faults.jitter) = (Duration::from_millis(200), Duration::from_millis(50))));
    let started = Instant::now();
    (0..100).for_each(|number| line.send(&number.to_string()));
    let first = line.receive(5000).unwrap();
    assert!(started.elapsed() >= Duration::from_millis(200), "{:?}", started.elapsed());
    assert_eq!(first, b"0");
    assert_eq!(line.received(SILENCE_MS), (1..100).map(|number| number.to_string()).collect::<Vec<_>>());
}

#[test]
fn bandwidth_is_not_exceeded() {
    let line = Line::connect();
    line.proxy.set(faults(|faults| faults.bandwidth = Some(100_000)));
    let started = Instant::now();
    line.send(&"x".repeat(50_000));
    assert_eq!(line.receive(10_000).unwrap().len(), 50_000);
    assert!(started.elapsed() >= Duration::from_millis(450), "{:?}", started.elapsed());
}

#[test]
fn black_hole_holds_back_both_data_and_farewells() {
    let line = Line::connect();
    line.proxy.set(faults(|faults| faults.blackhole = true));
    assert!(line.send_and_receive(&["late"]).is_empty());
    assert_eq!(line.proxy.counts().open, 1);
    line.proxy.set(Faults::default());
    assert_eq!(line.received(SILENCE_MS), ["late"], "nothing is lost, as after a black hole of packets");

    // A new subscriber is accepted and gets nowhere.
    line.proxy.set(faults(|faults| faults.blackhole = true));
    let newcomer = line.context.socket(zmq::SUB).unwrap();
    newcomer.set_linger(0).unwrap();
    newcomer.set_subscribe(b"").unwrap();
    newcomer.connect(&line.proxy.endpoint()).unwrap();
    newcomer.set_rcvtimeo(SILENCE_MS).unwrap();
    line.send("nobody hears this");
    assert!(newcomer.recv_multipart(0).is_err());
    assert_eq!(line.proxy.counts().open, 2);
}

#[test]
fn heartbeats_do_not_pass_a_black_hole() {
    let line = Line::connect();
    let subscriber = line.context.socket(zmq::SUB).unwrap();
    subscriber.set_linger(0).unwrap();
    subscriber.set_heartbeat_ivl(500).unwrap();
    subscriber.set_heartbeat_timeout(3000).unwrap();
    subscriber.set_subscribe(b"").unwrap();
    subscriber.monitor("inproc://black-hole", zmq::SocketEvent::DISCONNECTED as i32).unwrap();
    let monitor = line.context.socket(zmq::PAIR).unwrap();
    monitor.set_linger(0).unwrap();
    monitor.connect("inproc://black-hole").unwrap();
    subscriber.connect(&line.proxy.endpoint()).unwrap();
    assert_eq!(monitor.poll(zmq::POLLIN, 2000).unwrap(), 0, "heartbeats pass without a black hole");
    line.proxy.set(faults(|faults| faults.blackhole = true));
    assert_eq!(monitor.poll(zmq::POLLIN, 20_000).unwrap(), 1);
}

#[test]
fn half_closed_subscriber_is_deaf_and_does_not_know_it() {
    let line = Line::connect();
    line.proxy.half_close(Side::Publisher);
    std::thread::sleep(Duration::from_millis(100));
    assert!(line.send_and_receive(&["lost"]).is_empty());
    let counts = line.proxy.counts();
    assert_eq!((counts.connections, counts.open), (1, 1), "the subscriber has not tried again");
    line.proxy.kill();
    line.wait_connected();
    assert_eq!(line.send_and_receive(&["heard"]), ["heard"]);
}

#[test]
fn half_closed_towards_the_subscriber_makes_it_connect_again() {
    let line = Line::connect();
    line.proxy.half_close(Side::Subscriber);
    line.wait_connected();
    assert_eq!(line.proxy.counts().connections, 2);
}

#[test]
fn killed_connections_come_back_to_where_the_proxy_leads_now() {
    let line = Line::connect();
    let other = line.context.socket(zmq::PUB).unwrap();
    other.set_linger(0).unwrap();
    other.bind("tcp://127.0.0.1:0").unwrap();
    line.proxy.redirect(address(&other));
    assert_eq!(line.send_and_receive(&["standing connections stay"]).len(), 1);
    line.proxy.kill();
    let started = Instant::now();
    while line.receive(20).is_none() {
        other.send_multipart([&b"kv"[..], b"other"], 0).unwrap();
        assert!(started.elapsed() < DEADLINE, "{}", line.proxy.counts());
    }
    assert!(line.send_and_receive(&["nobody listens any more"]).iter().all(|text| text == "other"));
}
