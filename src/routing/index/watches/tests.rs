use super::*;
use crate::routing::endpoint::SourceKnowledge;
use crate::routing::hash::BlockSize;
use crate::routing::index::{IndexLimits, Keyspace, KeyspaceKind, PrefixIndex, SlotWriter};

const ENDPOINT: EndpointId = EndpointId(1);
const RANK: u32 = 3;

/// An index in which one rank of an endpoint stores blocks, and the time.
struct Fixture {
    index: PrefixIndex,
    keyspace: Keyspace,
    slot: SlotWriter,
    endpoint: Endpoint,
    now: Arc<AtomicU64>,
    sums: Arc<PredictionSums>,
}

fn chain(n_blocks: u64) -> Vec<BlockHash> {
    (1..=n_blocks).map(|n| BlockHash(n.wrapping_mul(0x9e37_79b9_7f4a_7c15))).collect()
}

impl Fixture {
    fn new() -> Self {
        let keyspace =
            Keyspace { model: "m".into(), block_size: BlockSize::new(16).expect("not 0"), kind: KeyspaceKind::Own };
        let index = PrefixIndex::new(IndexLimits::default());
        let slot = index.acquire(&keyspace, holder(RANK, Tier::Gpu)).expect("a slot is free");
        Self {
            index,
            keyspace,
            slot,
            endpoint: Endpoint::new(ENDPOINT, ([127, 0, 0, 1], 1).into()),
            now: Arc::default(),
            sums: Arc::default(),
        }
    }

    fn watch(&self, chain: &[BlockHash], n_held: u32) -> Watched {
        self.try_watch(chain, n_held).expect("there is room")
    }

    fn try_watch(&self, chain: &[BlockHash], n_held: u32) -> Option<Watched> {
        let rank = (n_held > 0).then_some(RANK);
        let prediction = Prediction { chain, n_held, n_matched: n_held, endpoint: &self.endpoint, rank };
        let now = self.now.clone();
        let clock = Clock::new(move || Millis(now.load(Relaxed)));
        let index = self.index.keyspace(&self.keyspace);
        index.watches().watch(&prediction, &self.sums, &clock, Millis(self.now.load(Relaxed)))
    }

    fn n_positions(&self) -> usize {
        self.index.keyspace(&self.keyspace).watches().n_positions()
    }
}

fn holder(rank: u32, tier: Tier) -> Holder {
    Holder { endpoint: ENDPOINT, rank, tier }
}

#[test]
fn one_announcement_tells_exactly_how_many_blocks_were_stored_again() {
    let chain = chain(100);
    for n_held in [1, 2, 3, 7, 64, 99, 100] {
        for first in 0..=n_held {
            let mut fixture = Fixture::new();
            fixture.slot.store(&chain[..n_held as usize]);
            let watched = fixture.watch(&chain, n_held);
            fixture.slot.store(&chain[first as usize..]);
            assert_eq!(watched.seen().n_stored_again(), n_held - first, "{first} of {n_held}");
            watched.end(Millis(0));
            assert_eq!(fixture.sums.n_stored_again(), u64::from(n_held - first));
        }
    }
}

#[test]
fn blocks_that_are_announced_one_by_one_are_counted_to_at_least_a_half() {
    let chain = chain(100);
    for first in 0..100_u32 {
        let mut fixture = Fixture::new();
        let watched = fixture.watch(&chain, 100);
        for block in chain[first as usize..].chunks(1) {
            fixture.slot.store(block);
        }
        let seen = watched.seen().clone();
        watched.end(Millis(0));
        let (found, really) = (seen.n_stored_again(), 100 - first);
        assert!(found <= really && 2 * found >= really, "found {found} of {really}");
        assert_eq!(fixture.sums.n_stored_again(), u64::from(found), "nothing counts twice");
    }
}

#[test]
fn only_the_rank_that_was_picked_and_its_gpu_count() {
    let chain = chain(8);
    let fixture = Fixture::new();
    let watched = fixture.watch(&chain, 8);
    let other = Holder { endpoint: EndpointId(2), ..holder(RANK, Tier::Gpu) };
    for holder in [other, holder(RANK + 1, Tier::Gpu), holder(RANK, Tier::Cpu)] {
        let mut slot = fixture.index.acquire(&fixture.keyspace, holder).expect("a slot is free");
        slot.store(&chain);
        assert_eq!(watched.seen().n_stored_again(), 0, "{holder:?}");
    }
}

#[test]
fn the_first_block_that_was_not_predicted_tells_when_computing_began() {
    let chain = chain(8);
    let mut fixture = Fixture::new();
    fixture.now.store(1_000, Relaxed);
    let (warm, cold) = (fixture.watch(&chain, 5), fixture.watch(&chain, 0));
    fixture.now.store(1_250, Relaxed);
    fixture.slot.store(&chain[..2]);
    assert_eq!((warm.seen().first_new_after(), cold.seen().first_new_after()), (None, Some(Millis(250))));
    fixture.now.store(1_400, Relaxed);
    fixture.slot.store(&chain[5..]);
    fixture.now.store(1_500, Relaxed);
    fixture.slot.store(&chain[5..]);
    assert_eq!(warm.seen().first_new_after(), Some(Millis(400)));
    assert_eq!(warm.seen().n_stored_again(), 5, "what was stored first was predicted");
    assert_eq!(fixture.watch(&chain, 8).seen().first_new_after(), None, "nothing new is expected");
}

#[test]
fn a_request_is_watched_for_a_while_after_its_end() {
    let chain = chain(8);
    let mut fixture = Fixture::new();
    let in_time = fixture.watch(&chain, 8);
    let seen = in_time.seen().clone();
    fixture.slot.store(&chain[7..]);
    assert_eq!((fixture.sums.n_predicted(), fixture.sums.n_stored_again()), (0, 0), "both are counted at the end");
    in_time.end(Millis(100));
    assert_eq!((fixture.sums.n_predicted(), fixture.sums.n_stored_again()), (8, 1));
    fixture.slot.store(&chain[6..]);
    assert_eq!(seen.n_stored_again(), 2);
    assert_eq!((fixture.sums.n_predicted(), fixture.sums.n_stored_again()), (8, 2));

    let index = fixture.index.keyspace(&fixture.keyspace);
    index.watches().sweep(Millis(100 + LINGER.0 - 1));
    assert!(fixture.n_positions() > 0);
    index.watches().sweep(Millis(100 + LINGER.0));
    assert_eq!(fixture.n_positions(), 0);
    fixture.slot.store(&chain);
    assert_eq!(seen.n_stored_again(), 2, "what comes later belongs to others");
}

#[test]
fn a_request_that_was_not_computed_there_counts_in_no_sum() {
    let chain = chain(8);
    let mut fixture = Fixture::new();
    let elsewhere = fixture.watch(&chain, 8);
    fixture.slot.store(&chain[4..]);
    assert_eq!(elsewhere.seen().n_stored_again(), 4);
    let seen = elsewhere.seen().clone();
    assert!(seen.is_known());
    drop(elsewhere);
    assert!(!seen.is_known());
    fixture.slot.store(&chain);
    assert_eq!((fixture.n_positions(), fixture.sums.n_predicted(), fixture.sums.n_stored_again()), (0, 0, 0));
}

#[test]
fn requests_that_watch_the_same_blocks_do_not_disturb_each_other() {
    let chain = chain(8);
    let mut fixture = Fixture::new();
    let (first, second) = (fixture.watch(&chain, 8), fixture.watch(&chain, 4));
    drop(fixture.watch(&chain, 8));
    fixture.slot.store(&chain[2..]);
    assert_eq!((first.seen().n_stored_again(), second.seen().n_stored_again()), (6, 2));
}

#[test]
fn table_is_bounded_and_a_request_without_room_is_not_watched() {
    let fixture = Fixture::new();
    let chain = chain(1 << 12);
    let mut watched = Vec::new();
    while let Some(more) = fixture.try_watch(&chain, 1 << 12) {
        watched.push(more);
    }
    assert!(fixture.n_positions() <= MOST_POSITIONS && fixture.n_positions() > MOST_POSITIONS - 14);
    watched.pop();
    assert!(fixture.try_watch(&chain, 1 << 12).is_some());
    drop(watched);
    assert_eq!(fixture.n_positions(), 0);
}

#[test]
fn what_a_source_is_told_once_more_after_it_has_forgotten_is_not_stored_again() {
    let chain = chain(8);
    let mut fixture = Fixture::new();
    let (running, ended) = (fixture.watch(&chain, 8), fixture.watch(&chain, 8));
    let seen = [running.seen().clone(), ended.seen().clone()];
    ended.end(Millis(0));
    drop(SourceKnowledge::new(fixture.endpoint.knowledge.clone()));
    fixture.slot.store(&chain);
    assert_eq!(seen.each_ref().map(|seen| seen.n_stored_again()), [0, 0]);
    assert_eq!(seen.map(|seen| seen.is_known()), [false, true], "what has ended before was watched as long as it ran");
    assert_eq!((fixture.sums.n_predicted(), fixture.sums.n_stored_again()), (8, 0));
    running.end(Millis(0));
    assert_eq!(fixture.sums.n_predicted(), 8, "nobody can tell what became of it");

    let next = fixture.watch(&chain, 8);
    fixture.slot.store(&chain);
    assert_eq!(next.seen().n_stored_again(), 8, "the new generation tells of those that were picked in it");
}
