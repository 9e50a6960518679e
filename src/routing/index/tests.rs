//! The index against a naive model, and under concurrent readers.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;

use super::*;
use crate::routing::endpoint::EndpointId;

fn index(limits: IndexLimits) -> Arc<KeyspaceIndex> {
    Arc::new(KeyspaceIndex::new(limits, Account::new(limits.bytes)))
}

fn holder(endpoint: u32, rank: u32, tier: Tier) -> Holder {
    Holder { endpoint: EndpointId(endpoint), rank, tier }
}

fn held_by(index: &Arc<KeyspaceIndex>, holder: Holder) -> SlotWriter {
    let mut writer = index.acquire(holder).unwrap();
    writer.prove(KeyKinds::PLAIN);
    writer
}

fn proved(index: &Arc<KeyspaceIndex>, endpoint: u32) -> SlotWriter {
    held_by(index, holder(endpoint, 0, Tier::Gpu))
}

fn chain(hashes: impl IntoIterator<Item = u64>) -> Vec<BlockHash> {
    hashes.into_iter().map(BlockHash).collect()
}

fn lookup(index: &KeyspaceIndex, hashes: &[BlockHash]) -> Vec<(u32, u32)> {
    let mut overlaps = Overlaps::default();
    index.overlaps(hashes, KeyKinds::PLAIN, &mut overlaps);
    overlaps.matches().map(|found| (found.endpoint.0, found.n_blocks)).collect()
}

/// Endpoint, rank, blocks on the GPU, further blocks.
fn lookup_all(index: &KeyspaceIndex, hashes: &[BlockHash]) -> Vec<(u32, u32, u32, u32)> {
    let mut overlaps = Overlaps::default();
    index.overlaps(hashes, KeyKinds::PLAIN, &mut overlaps);
    overlaps.matches().map(|found| (found.endpoint.0, found.rank, found.n_blocks, found.n_offloaded)).collect()
}

#[test]
fn run_stops_at_the_first_hole() {
    let index = index(IndexLimits::default());
    let (mut first, mut second) = (proved(&index, 1), proved(&index, 2));
    first.store(&chain(0..10));
    second.store(&chain(0..10));
    second.remove(BlockHash(4));
    assert_eq!(lookup(&index, &chain(0..10)), [(1, 10), (2, 4)]);
    assert_eq!(lookup(&index, &chain(4..10)), [(1, 6)]);
}

#[test]
fn block_without_its_parent_counts_once_the_parent_comes() {
    let index = index(IndexLimits::default());
    let mut writer = proved(&index, 1);
    writer.store(&chain(1..5));
    assert_eq!(lookup(&index, &chain(0..5)), []);
    writer.store(&chain([0]));
    assert_eq!(lookup(&index, &chain(0..5)), [(1, 5)]);
}

#[test]
fn each_rank_of_an_endpoint_has_its_own_run() {
    let index = index(IndexLimits::default());
    let (mut rank_0, mut rank_1) = (held_by(&index, holder(7, 0, Tier::Gpu)), held_by(&index, holder(7, 1, Tier::Gpu)));
    rank_0.store(&chain(0..3));
    rank_1.store(&chain(0..5));
    assert_eq!(lookup(&index, &chain(0..9)), [(7, 3), (7, 5)]);
    let mut overlaps = Overlaps::default();
    index.overlaps(&chain(0..9), KeyKinds::PLAIN, &mut overlaps);
    assert_eq!(overlaps.matched(EndpointId(7)), 5);
}

#[test]
fn other_tiers_continue_the_run_of_the_gpu() {
    let index = index(IndexLimits::default());
    let mut tiers = Tier::ALL.map(|tier| held_by(&index, holder(1, 0, tier)));
    tiers[0].store(&chain([0, 1, 4, 7]));
    tiers[1].store(&chain([1, 2, 3]));
    tiers[2].store(&chain([5, 9]));
    let mut elsewhere = held_by(&index, holder(1, 1, Tier::Cpu));
    elsewhere.store(&chain([0, 6]));
    assert_eq!(lookup_all(&index, &chain(0..9)), [(1, 0, 2, 4), (1, 1, 0, 1)]);
    drop(tiers);
    assert_eq!(lookup_all(&index, &chain(0..9)), [(1, 1, 0, 1)]);
}

#[test]
fn block_stored_twice_and_removed_once_stays() {
    let index = index(IndexLimits::default());
    let mut writer = proved(&index, 1);
    writer.store(&chain(0..2));
    assert_eq!(writer.store(&chain(0..2)), StoreOutcome { n_copies: 2, ..StoreOutcome::default() });
    assert!(writer.remove(BlockHash(1)));
    assert_eq!(lookup(&index, &chain(0..2)), [(1, 2)]);
    assert!(writer.remove(BlockHash(1)));
    assert_eq!(lookup(&index, &chain(0..2)), [(1, 1)]);
    assert!(!writer.remove(BlockHash(1)));
}

#[test]
fn copy_beyond_the_bound_is_refused_and_counts_too_low() {
    let index = index(IndexLimits { copied_blocks_per_slot: 1, ..IndexLimits::default() });
    let mut writer = proved(&index, 1);
    writer.store(&chain(0..2));
    assert_eq!(writer.store(&chain(0..2)), StoreOutcome { n_copies: 1, n_refused: 1, ..StoreOutcome::default() });
    writer.remove(BlockHash(1));
    assert_eq!(lookup(&index, &chain(0..2)), [(1, 1)]);
}

#[test]
fn full_slot_refuses_new_blocks() {
    let index = index(IndexLimits { bytes_per_slot: 3 * BLOCK_BYTES, ..IndexLimits::default() });
    let mut writer = proved(&index, 1);
    assert_eq!(writer.store(&chain(0..5)), StoreOutcome { n_new: 3, n_refused: 2, ..StoreOutcome::default() });
    assert_eq!(lookup(&index, &chain(0..5)), [(1, 3)]);
    writer.remove(BlockHash(0));
    assert_eq!(writer.store(&chain([0])).n_new, 1, "what leaves makes room");
}

#[test]
fn all_slots_together_have_one_limit() {
    let index = index(IndexLimits { bytes: 3 * BLOCK_BYTES, ..IndexLimits::default() });
    let (mut first, mut second) = (proved(&index, 1), proved(&index, 2));
    assert_eq!(first.store(&chain(0..2)).n_refused, 0);
    assert_eq!(second.store(&chain(0..2)), StoreOutcome { n_new: 1, n_refused: 1, ..StoreOutcome::default() });
    first.retire();
    assert_eq!(second.store(&chain(1..3)).n_new, 2);
}

#[test]
fn blocks_that_are_known_get_no_copy_where_only_missing_ones_are_stored() {
    let index = index(IndexLimits::default());
    let mut writer = proved(&index, 1);
    writer.store(&chain(0..2));
    assert_eq!(writer.store_missing(&chain(0..3)), StoreOutcome { n_new: 1, ..StoreOutcome::default() });
    assert!(writer.store_copies(BlockHash(9), 3));
    assert_eq!([0, 2, 9, 5].map(|hash| writer.n_copies(BlockHash(hash))), [1, 1, 3, 0]);
    assert_eq!((writer.take(BlockHash(9)), writer.take(BlockHash(9))), (3, 0));
    assert!(!writer.holds(BlockHash(9)));
}

#[test]
fn digest_is_that_of_the_set_whatever_its_history() {
    let index = index(IndexLimits::default());
    let (mut first, mut second) = (proved(&index, 1), proved(&index, 2));
    first.store(&chain([1, 2, 3, 2]));
    second.store(&chain([9, 3]));
    second.clear();
    second.store(&chain([5, 3, 2, 1]));
    assert_ne!(first.digest(), second.digest());
    second.remove(BlockHash(5));
    assert_eq!(first.digest(), second.digest());
    assert_eq!(first.digest().n_blocks, 3);
    assert_ne!(first.digest(), ContentDigest::default());
}

#[test]
fn keyspace_that_nobody_uses_is_dropped_when_another_is_made() {
    let index = PrefixIndex::new(IndexLimits::default());
    let keyspace = |n_tokens| Keyspace {
        model: "m".into(),
        block_size: BlockSize::new(n_tokens).unwrap(),
        kind: KeyspaceKind::Own,
    };
    let used = index.acquire(&keyspace(1), holder(1, 0, Tier::Gpu)).unwrap();
    for n_tokens in 2..100 {
        drop(index.acquire(&keyspace(n_tokens), holder(2, 0, Tier::Gpu)).unwrap());
    }
    assert!(index.n_keyspaces() <= 3, "{}", index.n_keyspaces());
    assert_eq!(index.keyspaces_of("m").len(), 1);
    assert!(index.acquire(&keyspace(2), holder(2, 0, Tier::Gpu)).is_some(), "and made again");
    drop(used);
}

#[test]
fn slots_are_capped_and_reused_after_retirement_without_their_past() {
    let index = index(IndexLimits { slots: 1, ..IndexLimits::default() });
    let mut writer = proved(&index, 1);
    writer.store(&chain(0..5));
    assert!(index.acquire(holder(2, 0, Tier::Gpu)).is_none());
    writer.retire();
    assert_eq!((lookup(&index, &chain(0..5)), index.n_blocks()), (vec![], 0));
    let mut next = index.acquire(holder(2, 0, Tier::Gpu)).unwrap();
    next.store(&chain(0..2));
    assert_eq!(lookup(&index, &chain(0..5)), [], "nothing is proved of the new owner");
    next.prove(KeyKinds::PLAIN);
    assert_eq!(lookup(&index, &chain(0..5)), [(2, 2)]);
}

#[test]
fn slot_is_credited_only_for_kinds_that_are_all_proved() {
    let index = index(IndexLimits::default());
    let adapter = KeyKinds::adapter(59).unwrap();
    let mut writer = index.acquire(holder(1, 0, Tier::Gpu)).unwrap();
    writer.store(&chain(0..2));
    writer.prove(KeyKinds::SALT | adapter);
    let matched = |required| {
        let mut overlaps = Overlaps::default();
        index.overlaps(&chain(0..2), required, &mut overlaps);
        overlaps.matched(EndpointId(1))
    };
    assert_eq!(matched(KeyKinds::SALT | adapter), 2);
    assert_eq!(matched(KeyKinds::PLAIN), 0);
    writer.disprove(adapter);
    assert_eq!((matched(KeyKinds::SALT), matched(KeyKinds::SALT | adapter)), (2, 0));
    assert_eq!(KeyKinds::adapter(60), None);
}

#[test]
fn unwinding_writer_leaves_nothing_behind() {
    let index = index(IndexLimits::default());
    let panicking = Arc::clone(&index);
    let result = std::panic::catch_unwind(move || {
        let mut writer = proved(&panicking, 1);
        writer.store(&chain(0..5));
        std::panic::resume_unwind(Box::new("a source's panic"));
    });
    assert!(result.is_err());
    assert_eq!((lookup(&index, &chain(0..5)), index.n_blocks()), (vec![], 0));
}

#[derive(Clone, Debug)]
enum Op {
    Acquire { source: usize },
    Retire { source: usize },
    Store { source: usize, first: u64, n_blocks: u64 },
    Remove { source: usize, hash: u64 },
    Clear { source: usize },
}

const N_SOURCES: usize = 6;
const N_HASHES: u64 = 12;

fn op() -> impl Strategy<Value = Op> {
    let source = 0..N_SOURCES;
    prop_oneof![
        1 => source.clone().prop_map(|source| Op::Acquire { source }),
        1 => source.clone().prop_map(|source| Op::Retire { source }),
        8 => (source.clone(), 0..N_HASHES, 1..8_u64)
            .prop_map(|(source, first, n_blocks)| Op::Store { source, first, n_blocks }),
        8 => (source.clone(), 0..N_HASHES).prop_map(|(source, hash)| Op::Remove { source, hash }),
        1 => source.prop_map(|source| Op::Clear { source }),
    ]
}

/// Sources 0 and 1 are ranks of one endpoint, 2 to 4 the tiers of another.
fn holder_of(source: usize) -> Holder {
    let (endpoint, rank, tier) = [
        (10, 0, Tier::Gpu),
        (10, 1, Tier::Gpu),
        (11, 0, Tier::Gpu),
        (11, 0, Tier::Cpu),
        (11, 0, Tier::Storage),
        (12, 0, Tier::Cpu),
    ][source];
    holder(endpoint, rank, tier)
}

fn stored(first: u64, n_blocks: u64) -> Vec<u64> {
    (first..(first + n_blocks).min(N_HASHES)).collect()
}

fn naive_lookup(model: &[Option<HashMap<u64, u32>>], hashes: &[u64]) -> Vec<(u32, u32, u32, u32)> {
    let ranks = [(10, 0), (10, 1), (11, 0), (12, 0)];
    let runs = ranks.into_iter().map(|(endpoint, rank)| {
        let run = |is_counted: &dyn Fn(Tier) -> bool| {
            let holds = |source: usize, hash: &u64| {
                let place = holder_of(source);
                let is_its = (place.endpoint.0, place.rank) == (endpoint, rank) && is_counted(place.tier);
                is_its && model[source].as_ref().is_some_and(|blocks| blocks.contains_key(hash))
            };
            hashes.iter().take_while(|hash| (0..N_SOURCES).any(|source| holds(source, hash))).count() as u32
        };
        let (gpu, any) = (run(&|tier| tier == Tier::Gpu), run(&|_| true));
        (endpoint, rank, gpu, any - gpu)
    });
    runs.filter(|(_, _, gpu, offloaded)| gpu + offloaded > 0).collect()
}

fn naive_apply(model: &mut [Option<HashMap<u64, u32>>], op: &Op) {
    match *op {
        Op::Acquire { source } => model[source] = Some(HashMap::new()),
        Op::Retire { source } => model[source] = None,
        Op::Store { source, first, n_blocks } => {
            let Some(blocks) = &mut model[source] else {
                return;
            };
            stored(first, n_blocks).into_iter().for_each(|hash| *blocks.entry(hash).or_default() += 1);
        }
        Op::Remove { source, hash } => {
            let Some(blocks) = &mut model[source] else {
                return;
            };
            if let Some(copies) = blocks.get_mut(&hash) {
                *copies -= 1;
            }
            blocks.retain(|_, copies| *copies > 0);
        }
        Op::Clear { source } => model[source] = model[source].as_ref().map(|_| HashMap::new()),
    }
}

fn apply(index: &Arc<KeyspaceIndex>, writers: &mut [Option<SlotWriter>], op: &Op) {
    match *op {
        Op::Acquire { source } => writers[source] = Some(held_by(index, holder_of(source))),
        Op::Retire { source } => writers[source] = None,
        Op::Store { source, first, n_blocks } => {
            writers[source].as_mut().map(|writer| writer.store(&chain(stored(first, n_blocks))));
        }
        Op::Remove { source, hash } => {
            writers[source].as_mut().map(|writer| writer.remove(BlockHash(hash)));
        }
        Op::Clear { source } => {
            writers[source].as_mut().map(SlotWriter::clear);
        }
    }
}

proptest! {
    #[test]
    fn agrees_with_a_naive_model(
        ops in prop::collection::vec(op(), 0..80),
        query in (0..N_HASHES, 1..N_HASHES),
    ) {
        let index = index(IndexLimits { slots: 2 * N_SOURCES as u16, ..IndexLimits::default() });
        let mut writers = [const { None }; N_SOURCES];
        let mut model = vec![None; N_SOURCES];
        let hashes = stored(query.0, query.1);
        for op in &ops {
            apply(&index, &mut writers, op);
            naive_apply(&mut model, op);
            prop_assert_eq!(
                lookup_all(&index, &chain(hashes.iter().copied())),
                naive_lookup(&model, &hashes),
                "after {:?}", op
            );
        }
        for (writer, blocks) in writers.iter().zip(&model) {
            prop_assert_eq!(writer.as_ref().map(SlotWriter::n_blocks), blocks.as_ref().map(HashMap::len));
        }
        drop(writers);
        prop_assert_eq!(index.n_blocks(), 0);
    }
}

/// Two writers share one slot in turn, for different endpoints with different chains; readers must never see one
/// endpoint credited with the other's chain, and of the right chain only lengths that it had.
#[test]
fn readers_never_credit_a_slots_former_owner() {
    const N_BLOCKS: u64 = 64;
    let index = index(IndexLimits { slots: 1, ..IndexLimits::default() });
    let done = AtomicBool::new(false);
    let chain_of = |endpoint: u32| chain(u64::from(endpoint) * 1000..u64::from(endpoint) * 1000 + N_BLOCKS);
    std::thread::scope(|scope| {
        for reader in 0..2_u32 {
            let (index, done, chain_of) = (&index, &done, &chain_of);
            scope.spawn(move || {
                let mut overlaps = Overlaps::default();
                while !done.load(Ordering::Relaxed) {
                    index.overlaps(&chain_of(1 + reader), KeyKinds::PLAIN, &mut overlaps);
                    for found in overlaps.matches() {
                        assert_eq!(found.endpoint, EndpointId(1 + reader));
                        assert!(u64::from(found.n_blocks) <= N_BLOCKS);
                    }
                }
            });
        }
        for round in 0..1000_u32 {
            let mut writer = proved(&index, 1 + round % 2);
            let hashes = chain_of(1 + round % 2);
            writer.store(&hashes);
            if round % 3 == 0 {
                writer.clear();
                writer.store(&hashes[..10]);
            }
            hashes.iter().rev().take(5).for_each(|hash| {
                writer.remove(*hash);
            });
        }
        done.store(true, Ordering::Relaxed);
    });
    assert_eq!(index.n_blocks(), 0);
}

/// Writers of several slots add and remove the same blocks at once: no holder is lost, none is left.
#[test]
fn concurrent_writers_keep_each_others_holders() {
    let index = index(IndexLimits::default());
    let hashes = chain(0..200);
    std::thread::scope(|scope| {
        for endpoint in 1..4_u32 {
            let (index, hashes) = (&index, &hashes);
            scope.spawn(move || {
                for _ in 0..100 {
                    let mut writer = proved(index, endpoint);
                    writer.store(hashes);
                    let mut overlaps = Overlaps::default();
                    index.overlaps(hashes, KeyKinds::PLAIN, &mut overlaps);
                    assert_eq!(overlaps.matched(EndpointId(endpoint)), 200);
                }
            });
        }
    });
    assert_eq!(index.n_blocks(), 0);
}
