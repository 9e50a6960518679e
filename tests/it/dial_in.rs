//! Engines whose publishers dial the router.

use std::sync::Arc;
use std::time::{Duration, Instant};

use warmroute::events::socket::{EventPlane, ModelSettings, Source, SourceState, SourceStatus};
use warmroute::routing::endpoint::EndpointId;
use warmroute::routing::hash::{BlockHasher, BlockSize, HashAlgorithm};
use warmroute::routing::index::{IndexLimits, PrefixIndex};

use crate::fake_publisher::{batch, stored};

const DEADLINE: Duration = Duration::from_secs(30);
const FIRST: &str = "127.0.0.1:8000";
const SECOND: &str = "127.0.0.2:8000";

/// A router with a port of its own and two listed engines.
struct Router {
    plane: EventPlane,
    endpoint: String,
}

impl Router {
    fn start() -> Self {
        let plane = EventPlane::start(&Arc::new(PrefixIndex::new(IndexLimits::default())));
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        for (number, address) in (0..).zip([FIRST, SECOND]) {
            plane.add(Source {
                endpoint: EndpointId(number),
                address: address.parse().unwrap(),
                events: format!("tcp://*:{port}"),
                replay: None,
                rank: 0,
                model: Arc::new(settings()),
                endpoint_knowledge: Arc::default(),
            });
        }
        Self { plane, endpoint: format!("tcp://127.0.0.1:{port}") }
    }

    fn status(&self, number: usize) -> SourceStatus {
        self.plane.status().remove(number)
    }

    fn wait_for(&self, what: &str, mut condition: impl FnMut(&Self) -> bool) {
        let started = Instant::now();
        while !condition(self) {
            assert!(started.elapsed() < DEADLINE, "waiting for {what}: {:?}", self.plane.status());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn settings() -> ModelSettings {
    ModelSettings {
        model: "tiny".into(),
        algorithm: HashAlgorithm::Sha256Cbor,
        pythonhashseed: None,
        adapters: Vec::new(),
        reports: false,
    }
}

/// An engine's publisher that dials.
struct Engine {
    _context: zmq::Context,
    publisher: zmq::Socket,
    topic: String,
    n_sent: u64,
}

impl Engine {
    fn dial(router: &Router, topic: &str) -> Self {
        let context = zmq::Context::new();
        let publisher = context.socket(zmq::PUB).unwrap();
        publisher.set_linger(0).unwrap();
        publisher.connect(&router.endpoint).unwrap();
        Self { _context: context, publisher, topic: topic.to_owned(), n_sent: 0 }
    }

    fn publish(&mut self) {
        let hasher = BlockHasher::new(HashAlgorithm::Sha256Cbor, None).unwrap();
        let tokens: Vec<u32> = (0..8).map(|token| self.n_sent as u32 * 100 + token).collect();
        let payload = batch(&[stored(&hasher, &tokens, BlockSize::new(4).unwrap())]);
        let seq = self.n_sent.to_be_bytes();
        self.publisher.send_multipart([self.topic.as_bytes(), &seq, &payload], 0).unwrap();
        self.n_sent += 1;
    }
}

#[test]
fn engines_that_dial_are_told_apart_by_their_topics() {
    let router = Router::start();
    let mut first = Engine::dial(&router, &format!("kv@{FIRST}@tiny"));
    let mut second = Engine::dial(&router, &format!("kv@{SECOND}@tiny"));
    router.wait_for("both", |router| {
        first.publish();
        second.publish();
        (0..2).all(|number| router.status(number).n_blocks > 0)
    });
    assert_eq!(router.plane.n_foreign_messages(), 0);
}

#[test]
fn engines_that_are_not_listed_do_not_count() {
    let router = Router::start();
    let topics = ["kv@127.0.0.1:8001@tiny", "kv@127.0.0.1:8000@other", "kv@pod@tiny", ""];
    let mut strangers: Vec<Engine> = topics.iter().map(|topic| Engine::dial(&router, topic)).collect();
    router.wait_for("messages", |router| {
        strangers.iter_mut().for_each(Engine::publish);
        router.plane.n_foreign_messages() > 20
    });
    assert!(router.plane.status().iter().all(|status| status.n_batches == 0));
}

#[test]
fn engine_that_dials_anew_begins_with_nothing() {
    let router = Router::start();
    let topic = format!("kv@{FIRST}@tiny");
    let mut engine = Engine::dial(&router, &topic);
    router.wait_for("the first life", |router| {
        engine.publish();
        router.status(0).n_blocks >= 10
    });
    drop(engine);
    router.wait_for("the end of it", |router| router.status(0).state == SourceState::Stale);
    let mut engine = Engine::dial(&router, &topic);
    router.wait_for("the second life", |router| {
        engine.publish();
        router.status(0).n_generations == 2
    });
    let n_sent = engine.n_sent;
    assert!(router.status(0).n_blocks <= n_sent * 2, "blocks of the first life: {:?}", router.status(0));
}

#[test]
fn stranger_that_connects_and_leaves_costs_nothing() {
    let router = Router::start();
    let mut engine = Engine::dial(&router, &format!("kv@{FIRST}@tiny"));
    router.wait_for("the engine", |router| {
        engine.publish();
        router.status(0).n_blocks >= 4
    });
    let address = router.endpoint.strip_prefix("tcp://").unwrap();
    for request in [&b""[..], b"GET / HTTP/1.1\r\n\r\n"] {
        let mut stranger = std::net::TcpStream::connect(address).unwrap();
        std::io::Write::write_all(&mut stranger, request).unwrap();
    }
    std::thread::sleep(Duration::from_millis(300));
    let n_batches = router.status(0).n_batches;
    router.wait_for("more batches", |router| {
        engine.publish();
        router.status(0).n_batches > n_batches + 3
    });
    assert_eq!(router.status(0).n_generations, 1, "{:?}", router.status(0));
}
