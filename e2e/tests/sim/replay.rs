//! The event sockets of the simulator, over real ZMQ.

use std::time::{Duration, Instant};

use e2e::sim::publisher::{BUFFER_STEPS, Publisher, PublisherOptions};

const END: [u8; 8] = [0xff; 8];

fn subscribe(context: &zmq::Context, endpoint: &str) -> zmq::Socket {
    let socket = context.socket(zmq::SUB).unwrap();
    socket.set_subscribe(b"").unwrap();
    socket.set_rcvtimeo(5000).unwrap();
    socket.connect(endpoint).unwrap();
    socket
}

/// A dealer that has sent `request`.
fn ask(context: &zmq::Context, endpoint: &str, request: &[&[u8]]) -> zmq::Socket {
    let socket = context.socket(zmq::DEALER).unwrap();
    socket.set_rcvtimeo(2000).unwrap();
    socket.set_linger(0).unwrap();
    socket.connect(endpoint).unwrap();
    socket.send_multipart(request, 0).unwrap();
    socket
}

/// Sequence numbers up to the end marker; none if the marker got lost.
fn replayed(socket: &zmq::Socket, topic: &[u8]) -> Option<Vec<u64>> {
    let mut seqs = Vec::new();
    loop {
        let reply = socket.recv_multipart(0).ok()?;
        assert_eq!(reply.len(), 4, "empty, topic, seq, payload");
        if reply[2] == END {
            assert!(reply[1].is_empty() && reply[3].is_empty());
            return Some(seqs);
        }
        assert_eq!((reply[0].as_slice(), reply[1].as_slice()), (b"".as_slice(), topic));
        seqs.push(u64::from_be_bytes(reply[2].as_slice().try_into().unwrap()));
    }
}

fn start(topic: &str) -> Publisher {
    Publisher::start(PublisherOptions { topic: topic.to_owned(), ..PublisherOptions::default() }).unwrap()
}

#[test]
fn late_subscriber_gets_everything_by_replay() {
    let context = zmq::Context::new();
    let publisher = start("kv@pod@tiny");
    for payload in 0..5_u8 {
        publisher.publish(vec![payload]);
    }
    let from = |start: u64| {
        let dealer = ask(&context, publisher.replay_endpoint(), &[b"", &start.to_be_bytes()]);
        replayed(&dealer, b"kv@pod@tiny").unwrap()
    };
    // The last batch may still be in the publisher's queue when a replay is served.
    let deadline = Instant::now() + Duration::from_secs(5);
    while from(0).len() < 5 {
        assert!(Instant::now() < deadline);
    }
    assert_eq!(from(0), [0, 1, 2, 3, 4]);
    assert_eq!(from(3), [3, 4]);
    assert!(from(1_000_000).is_empty());
}

#[test]
fn sequence_starts_again_after_a_restart() {
    let context = zmq::Context::new();
    let first = start("");
    let (endpoint, replay_endpoint) = (first.endpoint().to_owned(), first.replay_endpoint().to_owned());
    let live = subscribe(&context, &endpoint);
    let seq = |frames: Vec<Vec<u8>>| u64::from_be_bytes(frames[1].as_slice().try_into().unwrap());
    // A subscriber joins late: publish until it hears something.
    live.set_rcvtimeo(50).unwrap();
    let heard = |publisher: &Publisher| {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            assert!(Instant::now() < deadline);
            publisher.publish(vec![0]);
            if let Ok(frames) = live.recv_multipart(0) {
                return seq(frames);
            }
        }
    };
    let before: Vec<u64> = (0..20).map(|_| heard(&first)).collect();
    assert!(before.windows(2).all(|pair| pair[0] < pair[1]), "{before:?}");
    drop(first);
    let again =
        Publisher::start(PublisherOptions { endpoint, replay_endpoint, ..PublisherOptions::default() }).unwrap();
    assert!(heard(&again) <= before[19], "the new process counts from 0");
    let dealer = ask(&context, again.replay_endpoint(), &[b"", b""]);
    assert_eq!(replayed(&dealer, b"").unwrap()[0], 0, "an empty start is 0");
}

#[test]
fn wrong_number_of_frames_is_never_answered() {
    let context = zmq::Context::new();
    let publisher = start("");
    publisher.publish(vec![1]);
    for request in [&[b"\0\0\0\0\0\0\0\0".as_slice()][..], &[b"", b"a", b"b"]] {
        let dealer = ask(&context, publisher.replay_endpoint(), request);
        dealer.set_rcvtimeo(400).unwrap();
        assert!(dealer.recv_multipart(0).is_err());
    }
}

#[test]
fn slow_reader_loses_replies_and_finds_them_again() {
    let context = zmq::Context::new();
    let publisher = start("");
    let n_batches = BUFFER_STEPS as u64 + 500;
    for _ in 0..n_batches {
        publisher.publish(vec![7; 2000]);
    }
    let (mut next, mut n_rounds) = (500, 0);
    while next < n_batches {
        n_rounds += 1;
        assert!(n_rounds < 100, "no progress beyond {next}");
        let dealer = ask(&context, publisher.replay_endpoint(), &[b"", &u64::to_be_bytes(next)]);
        dealer.set_rcvtimeo(300).unwrap();
        // Not reading for a while fills the ROUTER's queue: what follows is dropped.
        std::thread::sleep(Duration::from_millis(200));
        let mut seqs = Vec::new();
        while let Ok(reply) = dealer.recv_multipart(0) {
            if reply[2] == END {
                break;
            }
            seqs.push(u64::from_be_bytes(reply[2].as_slice().try_into().unwrap()));
        }
        next += seqs.iter().zip(next..).take_while(|(seq, expected)| **seq == *expected).count() as u64;
    }
    assert!(n_rounds > 1, "nothing was lost, so the server is not lossy");
}
