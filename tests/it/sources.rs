//! What discovery does to the event plane: sources come, stay and go, caches are cleared, processes doubted.

use std::sync::Arc;
use std::time::{Duration, Instant};

use warmroute::events::socket::{EventPlane, ModelSettings, Source, SourceState, SourceStatus};
use warmroute::routing::endpoint::EndpointId;
use warmroute::routing::hash::{BlockHasher, BlockSize, HashAlgorithm};
use warmroute::routing::index::{IndexLimits, PrefixIndex};

use crate::fake_publisher::{Behaviour, FakePublisher, batch, stored};
use crate::fakes::DEADLINE;

const ENDPOINT: EndpointId = EndpointId(3);
const OTHER: EndpointId = EndpointId(4);

fn plane() -> EventPlane {
    EventPlane::start(&Arc::new(PrefixIndex::new(IndexLimits::default())))
}

/// A publisher that has announced two blocks.
fn publisher() -> FakePublisher {
    let publisher = FakePublisher::start(Behaviour::default());
    let hasher = BlockHasher::new(HashAlgorithm::Sha256Cbor, None).unwrap();
    publisher.publish(batch(&[stored(&hasher, &[1, 2, 3, 4, 5, 6, 7, 8], BlockSize::new(4).unwrap())]));
    publisher
}

fn source(endpoint: EndpointId, rank: u32, publisher: &FakePublisher) -> Source {
    let algorithm = HashAlgorithm::Sha256Cbor;
    let (pythonhashseed, adapters) = (None, Vec::new());
    Source {
        endpoint,
        address: "127.0.0.1:8000".parse().unwrap(),
        events: publisher.events.clone(),
        replay: Some(publisher.replay.clone()),
        rank,
        model: Arc::new(ModelSettings { model: "tiny".into(), algorithm, pythonhashseed, adapters, reports: false }),
        endpoint_knowledge: Arc::default(),
    }
}

fn status(plane: &EventPlane, endpoint: EndpointId, rank: u32) -> Option<SourceStatus> {
    plane.status().into_iter().find(|status| status.endpoint == endpoint && status.rank == rank)
}

fn wait_for(plane: &EventPlane, what: &str, condition: impl Fn(&EventPlane) -> bool) {
    let started = Instant::now();
    while !condition(plane) {
        assert!(started.elapsed() < DEADLINE, "waiting for {what}: {:?}", plane.status());
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn is_warm(plane: &EventPlane, endpoint: EndpointId, rank: u32) -> bool {
    status(plane, endpoint, rank).is_some_and(|status| status.state == SourceState::Live && status.n_blocks == 2)
}

#[test]
fn equal_sources_go_on_and_others_come_move_and_go() {
    let (plane, publishers) = (plane(), [publisher(), publisher(), publisher()]);
    plane.add(source(OTHER, 0, &publishers[0]));
    plane.reconcile(ENDPOINT, vec![source(ENDPOINT, 0, &publishers[0]), source(ENDPOINT, 1, &publishers[1])]);
    wait_for(&plane, "all ranks", |plane| {
        is_warm(plane, OTHER, 0) && is_warm(plane, ENDPOINT, 0) && is_warm(plane, ENDPOINT, 1)
    });

    let moved = source(ENDPOINT, 1, &publishers[2]);
    plane.reconcile(ENDPOINT, vec![source(ENDPOINT, 0, &publishers[0]), moved, source(ENDPOINT, 2, &publishers[1])]);
    assert!(is_warm(&plane, ENDPOINT, 0), "an equal source is not touched");
    assert!(!is_warm(&plane, ENDPOINT, 1), "one that moved is another");
    wait_for(&plane, "the new ranks", |plane| is_warm(plane, ENDPOINT, 1) && is_warm(plane, ENDPOINT, 2));
    let of_first = status(&plane, ENDPOINT, 0).unwrap();
    assert_eq!((of_first.n_generations, of_first.n_batches), (1, 1));

    plane.reconcile(ENDPOINT, Vec::new());
    assert_eq!(plane.status().len(), 1, "of the other endpoint");
    assert!(is_warm(&plane, OTHER, 0));
    plane.stop();
}

#[test]
fn a_cache_that_is_known_to_be_gone_is_credited_no_more() {
    let (plane, publisher) = (plane(), publisher());
    plane.reconcile(ENDPOINT, vec![source(ENDPOINT, 0, &publisher)]);
    plane.add(source(OTHER, 0, &publisher));
    wait_for(&plane, "both", |plane| is_warm(plane, ENDPOINT, 0) && is_warm(plane, OTHER, 0));
    plane.cleared(ENDPOINT);
    wait_for(&plane, "the clearing", |plane| status(plane, ENDPOINT, 0).is_some_and(|status| status.n_blocks == 0));
    assert!(is_warm(&plane, OTHER, 0));
    plane.stop();
}

#[test]
fn a_process_that_is_doubted_is_asked_to_prove_itself() {
    let (plane, publisher) = (plane(), publisher());
    plane.reconcile(ENDPOINT, vec![source(ENDPOINT, 0, &publisher)]);
    wait_for(&plane, "the blocks", |plane| is_warm(plane, ENDPOINT, 0));
    let n_replays = status(&plane, ENDPOINT, 0).unwrap().n_replays;
    plane.suspect(ENDPOINT);
    wait_for(&plane, "a proof", |plane| status(plane, ENDPOINT, 0).is_some_and(|status| status.n_replays > n_replays));
    wait_for(&plane, "the blocks again", |plane| is_warm(plane, ENDPOINT, 0));
    plane.stop();
}
