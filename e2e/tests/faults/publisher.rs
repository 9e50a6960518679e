//! The publisher process keeps to vLLM's wire and to its own model.

use std::collections::HashSet;
use std::path::Path;
use std::time::{Duration, Instant};

use e2e::publisher::PublisherArgs;
use e2e::publisher::process::PublisherProcess;
use e2e::publisher::swarm::{SwarmArgs, SwarmProcess};
use warmroute::events::wire::{Event, EventBatch};
use warmroute::routing::hash::BlockHash;

/// Longest wait for what takes a moment.
const DEADLINE: Duration = Duration::from_secs(20);

pub(crate) fn binary() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_e2e"))
}

/// All replies of one replay, without END.
fn replay(endpoint: &str, from: u64) -> Vec<(u64, Vec<u8>)> {
    let context = zmq::Context::new();
    let dealer = context.socket(zmq::DEALER).unwrap();
    dealer.set_linger(0).unwrap();
    dealer.set_rcvtimeo(10_000).unwrap();
    dealer.connect(endpoint).unwrap();
    dealer.send_multipart([&b""[..], &from.to_be_bytes()], 0).unwrap();
    let replies = std::iter::from_fn(|| {
        let mut frames = dealer.recv_multipart(0).unwrap();
        let (payload, seq) = (frames.pop().unwrap(), frames.pop().unwrap());
        let seq = u64::from_be_bytes(seq.try_into().unwrap());
        (seq != u64::MAX).then_some((seq, payload))
    });
    replies.collect()
}

#[test]
fn replayed_batches_are_the_model() {
    let args = PublisherArgs { start_batches: 150, buffer_steps: 200, ..PublisherArgs::default() };
    let mut publisher = PublisherProcess::start(binary(), &args).unwrap();
    assert_eq!(replay(publisher.replay(), 148).len(), 2);
    let mut held = HashSet::<BlockHash>::new();
    let replies = replay(publisher.replay(), 0);
    assert_eq!(replies.iter().map(|(seq, _)| *seq).collect::<Vec<_>>(), (0..150).collect::<Vec<_>>());
    for (_, payload) in &replies {
        for event in EventBatch::decode(payload).unwrap().events {
            if let Event::BlockStored(stored) = event {
                held.extend(stored.block_hashes.iter().map(|hash| hash.low64()));
            }
        }
    }
    let truth = publisher.truth(150);
    assert!(truth.held.is_subset(&held));
    assert_eq!(held.len(), truth.held.len() + truth.gone.len());

    publisher.publish(300).unwrap();
    let seqs: Vec<u64> = replay(publisher.replay(), 0).into_iter().map(|(seq, _)| seq).collect();
    assert_eq!(seqs, (100..300).collect::<Vec<_>>(), "the buffer holds the last batches");
}

#[test]
fn restarted_publisher_counts_from_0_on_the_same_ports() {
    let args = PublisherArgs { start_batches: 10, ..PublisherArgs::default() };
    let publisher = PublisherProcess::start(binary(), &args).unwrap();
    let endpoints = publisher.addresses().unwrap();
    let args = PublisherArgs { start_batches: 3, seed: 2, ..args };
    let publisher = publisher.restart(binary(), &args).unwrap();
    assert_eq!(publisher.addresses().unwrap(), endpoints);
    assert_eq!(replay(publisher.replay(), 0).len(), 3);
    assert!(
        publisher
            .truth(3)
            .held
            .is_disjoint(&e2e::publisher::program::Program::truth_after(&PublisherArgs::default().program(), 10).held)
    );
}

#[test]
fn swarm_keeps_its_ports_and_buffers_when_connections_are_severed_and_replaces_publishers_when_it_flaps() {
    let args = SwarmArgs { publishers: 3, cache_blocks: 64, replay_ms: 0 };
    let (mut swarm, _) = SwarmProcess::start(binary(), &args).unwrap();
    let before = swarm.tell("publish 7").unwrap();
    let after = swarm.tell("sever").unwrap();
    assert_eq!(format!("{:?}", after.publishers), format!("{:?}", before.publishers));
    assert!(after.publishers.iter().all(|member| replay(&member.replay, 0).len() == 7));

    swarm.tell("flap 1").unwrap();
    let started = Instant::now();
    while swarm.tell("report").unwrap().n_replaced < 3 {
        assert!(started.elapsed() < DEADLINE, "each publisher is replaced in its turn");
        std::thread::sleep(Duration::from_millis(20));
    }
    let flapped = swarm.tell("flap 0").unwrap();
    for (member, old) in flapped.publishers.iter().zip(&after.publishers) {
        assert_eq!((&member.events, &member.replay), (&old.events, &old.replay));
        assert_ne!(member.program.seed, old.program.seed);
        assert_eq!(replay(&member.replay, 0).len() as u64, member.n_batches);
    }
}
