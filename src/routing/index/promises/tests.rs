//! Every rule by itself, the table against a naive model, and under concurrent use.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;

use super::*;
use crate::routing::endpoint::SourceKnowledge;
use crate::routing::index::{Account, Holder, IndexLimits, KeyKinds, KeyspaceIndex, Overlaps, SlotWriter, Tier};

const START: Millis = Millis(5_000);

fn after(milliseconds: u64) -> Millis {
    Millis(START.0 + milliseconds)
}

fn endpoint(id: u32) -> Arc<Endpoint> {
    Arc::new(Endpoint::new(EndpointId(id), ([127, 0, 0, 1], 8000).into()))
}

fn chain(hashes: impl IntoIterator<Item = u64>) -> Vec<BlockHash> {
    hashes.into_iter().map(BlockHash).collect()
}

fn speculative() -> Promises {
    Promises::new(PromiseLimits::SPECULATIVE)
}

/// Endpoints with their runs, given those that are real.
fn extended(promises: &Promises, chain: &[BlockHash], matched: &[(u32, u32)], now: Millis) -> Vec<(u32, u32)> {
    let mut out = vec![(EndpointId(99), 99)];
    let matched = matched.iter().map(|(id, n_blocks)| (EndpointId(*id), *n_blocks));
    promises.extend(chain, matched, now, &mut out);
    let mut out: Vec<_> = out.into_iter().map(|(endpoint, n_blocks)| (endpoint.0, n_blocks)).collect();
    out.sort_unstable();
    out
}

fn promised(promises: &Promises, blocks: Range<u64>, now: Millis) -> Vec<(u32, u32)> {
    extended(promises, &chain(blocks), &[], now)
}

#[test]
fn second_request_of_a_burst_sees_the_promise_of_the_first() {
    let promises = speculative();
    assert_eq!(promised(&promises, 0..8, START), []);
    let _first = promises.promise(&chain(0..8), 0, &endpoint(1), START).unwrap();
    assert_eq!(promised(&promises, 0..8, START), [(1, 8)]);
    assert_eq!(promised(&promises, 0..20, START), [(1, 8)], "a longer prompt shares what it shares");
    assert_eq!(promised(&promises, 1..8, START), [(1, 7)]);
    assert_eq!(promised(&promises, 20..28, START), []);
    let forked = [chain(0..3), chain(50..60)].concat();
    assert_eq!(extended(&promises, &forked, &[], START), [(1, 3)]);
}

#[test]
fn promised_blocks_continue_real_runs() {
    let promises = speculative();
    let _tail = promises.promise(&chain(0..10), 4, &endpoint(1), START).unwrap();
    let _whole = promises.promise(&chain(0..6), 0, &endpoint(2), START).unwrap();
    let found = |matched: &[(u32, u32)]| extended(&promises, &chain(0..10), matched, START);
    assert_eq!(found(&[(1, 4)]), [(1, 10), (2, 6)]);
    assert_eq!(found(&[(1, 7), (2, 6)]), [(1, 10)], "some came true meanwhile, all did");
    assert_eq!(found(&[(1, 3), (2, 9)]), [], "a hole, and more than was promised");
    assert_eq!(found(&[(1, 2), (1, 5), (2, 0), (3, 5)]), [(1, 10), (2, 6)], "the best rank of an endpoint");
    assert_eq!(found(&[(1, 10), (3, 10)]), [(2, 6)]);
}

#[test]
fn runs_that_meet_behind_each_other_end_where_they_end() {
    let promises = speculative();
    let promise = |id, n_held, n_blocks| promises.promise(&chain(0..n_blocks), n_held, &endpoint(id), START).unwrap();
    let _guards = [promise(1, 0, 9), promise(2, 3, 6), promise(3, 8, 12), promise(4, 0, 2)];
    let found = extended(&promises, &chain(0..12), &[(2, 3), (3, 8), (5, 4)], START);
    assert_eq!(found, [(1, 9), (2, 6), (3, 12), (4, 2)]);
}

#[test]
fn promise_lingers_after_the_end_of_its_request() {
    let promises = speculative();
    let guard = promises.promise(&chain(0..8), 0, &endpoint(1), START).unwrap();
    assert_eq!(promises.n_promises(), 1);
    guard.end(after(3_000));
    assert_eq!(promises.n_promises(), 0);
    assert_eq!(promised(&promises, 0..8, after(4_999)), [(1, 8)]);
    assert_eq!(promised(&promises, 0..8, after(5_000)), []);
}

#[test]
fn promise_counts_for_a_minute_at_most() {
    let promises = speculative();
    let guard = promises.promise(&chain(0..8), 0, &endpoint(1), START).unwrap();
    assert_eq!(promised(&promises, 0..8, after(59_999)), [(1, 8)]);
    assert_eq!(promised(&promises, 0..8, after(60_000)), []);
    guard.end(after(70_000));
    assert_eq!(promised(&promises, 0..8, after(70_000)), [], "the end revives nothing");
}

#[test]
fn dropped_guard_ends_at_the_latest_time_that_was_seen() {
    let promises = speculative();
    let guard = promises.promise(&chain(0..8), 0, &endpoint(1), START).unwrap();
    assert_eq!(promised(&promises, 40..48, after(7_000)), []);
    drop(guard);
    assert_eq!(promises.n_promises(), 0);
    assert_eq!(promised(&promises, 0..8, after(8_999)), [(1, 8)]);
    assert_eq!(promised(&promises, 0..8, after(9_000)), []);
}

#[test]
fn promise_ends_with_the_generation_of_any_source() {
    let promises = speculative();
    let (restarted, other) = (endpoint(1), endpoint(2));
    let source = SourceKnowledge::new(restarted.knowledge.clone());
    let _first = promises.promise(&chain(0..8), 0, &restarted, START).unwrap();
    let _other = promises.promise(&chain(0..8), 0, &other, START).unwrap();
    source.start_generation();
    assert_eq!(promised(&promises, 0..8, START), [(2, 8)]);
    let _next = promises.promise(&chain(0..5), 0, &restarted, START).unwrap();
    assert_eq!(promised(&promises, 0..8, START), [(1, 5), (2, 8)], "it may be made anew at once");
}

#[test]
fn void_promise_counts_no_more() {
    let promises = speculative();
    promises.promise(&chain(0..8), 0, &endpoint(1), START).unwrap().void();
    assert_eq!((promised(&promises, 0..8, START), promises.n_promises()), (vec![], 0));
}

#[test]
fn request_that_was_served_elsewhere_is_promised_there() {
    let promises = speculative();
    let mut guard = promises.promise(&chain(0..8), 6, &endpoint(1), START).unwrap();
    guard.move_to(&endpoint(2), after(1_000));
    assert_eq!(extended(&promises, &chain(0..8), &[(1, 6)], after(1_000)), [(2, 8)], "the whole chain");
    guard.move_to(&endpoint(2), after(2_000));
    assert_eq!(promised(&promises, 0..8, after(2_999)), [(2, 8)], "it is there already");
    assert_eq!(promised(&promises, 0..8, after(3_000)), [], "nobody may ever confirm it");
    assert_eq!(promises.n_promises(), 1);
    guard.end(after(3_000));
    assert_eq!(promises.n_promises(), 0);
}

#[test]
fn request_that_was_served_elsewhere_shortens_no_promise_of_another() {
    let promises = speculative();
    let _other = promises.promise(&chain(0..4), 0, &endpoint(2), START).unwrap();
    let mut guard = promises.promise(&chain(0..8), 0, &endpoint(1), after(50_000)).unwrap();
    guard.move_to(&endpoint(2), after(50_000));
    assert_eq!(promised(&promises, 0..8, after(51_999)), [(2, 8)]);
    assert_eq!(promised(&promises, 0..8, after(59_999)), [(2, 4)]);
}

#[test]
fn nothing_to_promise_is_no_promise() {
    let promises = speculative();
    assert!(promises.promise(&chain(0..8), 8, &endpoint(1), START).is_none());
    assert!(promises.promise(&chain(0..8), 9, &endpoint(1), START).is_none());
    assert!(promises.promise(&[], 0, &endpoint(1), START).is_none());
    assert_eq!((promises.n_blocks(), promises.n_promises()), (0, 0));
}

#[test]
fn block_is_relied_on_in_the_first_half_of_its_life_and_renewed_in_the_second() {
    let promises = speculative();
    let first = promises.promise(&chain(0..4), 0, &endpoint(1), START).unwrap();
    let second = promises.promise(&chain(0..4), 0, &endpoint(1), after(29_999)).unwrap();
    second.void();
    assert_eq!(promised(&promises, 0..4, after(29_999)), [(1, 4)], "the first still counts");
    let third = promises.promise(&chain(0..4), 0, &endpoint(1), after(30_000)).unwrap();
    first.void();
    assert_eq!(promised(&promises, 0..4, after(89_999)), [(1, 4)], "the third counts instead");
    third.end(after(31_000));
    let _fourth = promises.promise(&chain(0..4), 0, &endpoint(1), after(32_000)).unwrap();
    assert_eq!(promised(&promises, 0..4, after(91_999)), [(1, 4)], "what lingers is renewed");
    assert_eq!(promises.n_blocks(), 4);
}

#[test]
fn learned_blocks_count_ten_minutes_after_the_last_pick_whatever_becomes_of_it() {
    const MINUTE: u64 = 60_000;
    let promises = Promises::new(PromiseLimits::LEARNED);
    let pick =
        |n_blocks, minute| promises.promise(&chain(0..n_blocks), 0, &endpoint(1), after(minute * MINUTE)).unwrap();
    pick(8, 0).end(after(100));
    pick(4, 9).end(after(9 * MINUTE));
    assert_eq!(promised(&promises, 0..8, after(20 * MINUTE - 1)), [(1, 8)]);
    assert_eq!(promised(&promises, 0..8, after(20 * MINUTE)), [], "the second pick came too soon to write anything");
    pick(8, 20).end(after(20 * MINUTE));
    pick(4, 30).end(after(31 * MINUTE));
    assert_eq!(promised(&promises, 0..8, after(40 * MINUTE - 1)), [(1, 8)]);
    assert_eq!(promised(&promises, 0..8, after(40 * MINUTE)), [(1, 4)], "the fourth renewed its blocks");
    assert_eq!(promised(&promises, 0..8, after(50 * MINUTE)), []);
}

#[test]
fn learned_request_that_adds_nothing_is_learned_where_it_was_served() {
    let promises = Promises::new(PromiseLimits::LEARNED);
    let (first, second) = (endpoint(1), endpoint(2));
    drop(promises.promise(&chain(0..8), 0, &first, START));
    let mut guard = promises.promise(&chain(0..8), 0, &first, START).unwrap();
    guard.move_to(&second, START);
    assert_eq!(promised(&promises, 0..8, START), [(1, 8), (2, 8)]);
}

fn small(n_blocks: usize) -> Promises {
    Promises::new(PromiseLimits { n_blocks, ..PromiseLimits::LEARNED })
}

#[test]
fn full_table_ends_the_oldest_promises_and_counts_their_blocks() {
    let promises = small(10);
    let first = promises.promise(&chain(0..4), 0, &endpoint(1), START).unwrap();
    let _second = promises.promise(&chain(0..4), 0, &endpoint(2), START).unwrap();
    let _third = promises.promise(&chain(20..24), 0, &endpoint(1), START).unwrap();
    assert_eq!(promised(&promises, 0..4, START), [(2, 4)], "the first is over as a whole");
    assert_eq!(promised(&promises, 20..24, START), [(1, 4)]);
    assert_eq!((promises.n_blocks(), promises.n_evicted(), promises.n_refused()), (8, 4, 0));
    first.end(START);
    let _fourth = promises.promise(&chain(30..42), 0, &endpoint(1), START).unwrap();
    assert_eq!(promised(&promises, 30..42, START), [(1, 10)], "what has room is promised from the front");
    assert_eq!((promises.n_blocks(), promises.n_evicted(), promises.n_refused()), (10, 12, 2));
    assert_eq!(promises.n_promises(), 3);
}

#[test]
fn learned_index_goes_on_learning_when_it_is_full() {
    let promises = small(1_000);
    for conversation in 0..1_000_u64 {
        let (blocks, now) = (conversation * 100..conversation * 100 + 50, after(conversation));
        drop(promises.promise(&chain(blocks.clone()), 0, &endpoint(1), now));
        assert_eq!(promised(&promises, blocks, now), [(1, 50)], "conversation {conversation}");
        assert!(promises.n_blocks() <= 1_000);
    }
    let is_known = |conversation: &u64| {
        promised(&promises, conversation * 100..conversation * 100 + 50, after(1_000)) == [(1, 50)]
    };
    assert_eq!((0..1_000).filter(is_known).collect::<Vec<_>>(), (980..1_000).collect::<Vec<_>>(), "the newest");
    assert_eq!((promises.n_evicted(), promises.n_refused()), (980 * 50, 0));
}

#[test]
fn blocks_in_use_outlive_those_that_make_room() {
    let promises = small(1_000);
    for conversation in 0..200_u64 {
        let blocks = [chain(0..20), chain((conversation + 1) * 100..(conversation + 1) * 100 + 30)].concat();
        assert_eq!(extended(&promises, &blocks, &[], START).is_empty(), conversation == 0, "{conversation}");
        drop(promises.promise(&blocks, 0, &endpoint(1), START));
    }
    assert!(promises.n_evicted() > 4_000);
}

#[test]
fn order_of_promises_is_bounded_where_blocks_are_confirmed_and_promised_again() {
    let promises = small(100);
    for round in 0..200 {
        let blocks = chain(round % 7 * 50..round % 7 * 50 + 30);
        let guard = promises.promise(&blocks, 0, &endpoint(1), START).unwrap();
        promises.confirm(&blocks, EndpointId(1));
        drop(guard);
        assert!(promises.table.n_recorded() <= 200, "round {round}");
    }
    assert_eq!((promises.n_blocks(), promises.n_evicted()), (0, 0), "what is confirmed is not evicted");
    promises.sweep(Millis(u64::MAX));
    assert_eq!(promises.table.n_recorded(), 0);
}

#[test]
fn blocks_that_are_promised_together_have_one_list() {
    const N_BLOCKS: u64 = 40;
    let promises = speculative();
    let list = |block: u64| promises.table.promisers(BlockHash(block)).unwrap();
    let is_one =
        |blocks: Range<u64>| blocks.clone().all(|block| std::ptr::eq(list(block).all(), list(blocks.start).all()));
    // In no order of endpoints, and with forks.
    let mut guards: Vec<_> = (0..50_u32)
        .map(|n| {
            let length = if n % 5 == 0 { 10 } else { N_BLOCKS };
            promises.promise(&chain(0..length), 0, &endpoint(n * 7 % 50), START).unwrap()
        })
        .collect();
    assert!(is_one(0..10) && is_one(10..N_BLOCKS));
    assert_eq!((list(0).all().len(), list(10).all().len()), (50, 40));
    promises.confirm(&chain(0..N_BLOCKS), EndpointId(3));
    assert!(is_one(0..10) && is_one(10..N_BLOCKS));
    guards.swap_remove(20).void();
    promises.sweep(START);
    assert!(is_one(0..10) && is_one(10..N_BLOCKS));
    assert!(list(0).all().is_sorted_by_key(|promise| promise.endpoint()));
    assert_eq!(promises.n_blocks(), list(0).all().len() * 10 + list(10).all().len() * 30);
    assert_eq!(promised(&promises, 0..N_BLOCKS, START).len(), 48);
}

#[test]
fn endpoint_with_several_ranks_is_promised_nothing() {
    let promises = speculative();
    let (ranked, other) = (endpoint(1), endpoint(2));
    ranked.ranks.set([0, 1]);
    assert!(promises.promise(&chain(0..8), 0, &ranked, START).is_none());
    let mut guard = promises.promise(&chain(0..8), 0, &other, START).unwrap();
    guard.move_to(&ranked, START);
    assert_eq!(promised(&promises, 0..8, START), [], "nor where it was to be served");
    guard.move_to(&other, START);
    assert_eq!(promised(&promises, 0..8, START), [(2, 8)]);
    ranked.ranks.set([1]);
    assert!(promises.promise(&chain(0..8), 0, &ranked, START).is_some());
}

#[test]
fn sweep_frees_what_is_over_and_nothing_else() {
    let promises = speculative();
    let _running = promises.promise(&chain(0..8), 0, &endpoint(1), START).unwrap();
    promises.promise(&chain(4..12), 0, &endpoint(2), START).unwrap().end(START);
    promises.sweep(after(1_999));
    assert_eq!(promises.n_blocks(), 16);
    promises.sweep(after(2_000));
    assert_eq!(promises.n_blocks(), 8);
    assert_eq!(promised(&promises, 0..8, after(2_000)), [(1, 8)]);
    promises.sweep(after(60_000));
    assert_eq!((promises.n_blocks(), promises.table.n_recorded()), (0, 0));
}

#[test]
fn sweep_removes_so_many_blocks_at_once_and_goes_on_there() {
    let promises = speculative();
    for round in 0..100 {
        promises.promise(&chain(round * 1_000..(round + 1) * 1_000), 0, &endpoint(1), START).unwrap().end(START);
    }
    let n_left: Vec<_> = (0..4)
        .map(|_| {
            promises.sweep(after(2_000));
            promises.n_blocks()
        })
        .collect();
    assert_eq!(n_left, [67_000, 34_000, 1_000, 0]);
}

#[test]
fn promises_to_come_sweep_those_that_are_over() {
    const N_BLOCKS: u64 = 100;
    let promises = Promises::new(PromiseLimits { n_blocks: 1_000, ..PromiseLimits::SPECULATIVE });
    let mut last = None;
    for round in 0..1_000 {
        let now = after(round * 4_000);
        let blocks = chain(round * N_BLOCKS..(round + 1) * N_BLOCKS);
        promises.promise(&blocks, 0, &endpoint(1), now).unwrap().end(now);
        last = Some(promises.n_blocks());
    }
    assert_eq!(promises.n_refused(), 0);
    assert!(last.unwrap() < 300, "{last:?} blocks, of which 100 count");
}

fn index() -> Arc<KeyspaceIndex> {
    let limits = IndexLimits::default();
    Arc::new(KeyspaceIndex::new(limits, Account::new(limits.bytes)))
}

fn slot(index: &Arc<KeyspaceIndex>, endpoint: u32, rank: u32) -> SlotWriter {
    let mut slot = index.acquire(Holder { endpoint: EndpointId(endpoint), rank, tier: Tier::Gpu }).unwrap();
    slot.prove(KeyKinds::PLAIN);
    slot
}

/// Endpoints with what they hold or will hold.
fn credited(index: &KeyspaceIndex, chain: &[BlockHash], now: Millis) -> Vec<(u32, u32)> {
    let mut overlaps = Overlaps::default();
    index.overlaps(chain, KeyKinds::PLAIN, &mut overlaps);
    let mut best: HashMap<u32, u32> = HashMap::new();
    for found in overlaps.matches() {
        let n_blocks = best.entry(found.endpoint.0).or_default();
        *n_blocks = (*n_blocks).max(found.n_blocks);
    }
    let matched: Vec<_> = overlaps.matches().map(|found| (found.endpoint.0, found.n_blocks)).collect();
    best.extend(extended(index.promises(), chain, &matched, now));
    let mut best: Vec<_> = best.into_iter().filter(|(_, n_blocks)| *n_blocks > 0).collect();
    best.sort_unstable();
    best
}

#[test]
fn stored_block_is_no_promise_any_more() {
    let index = index();
    let (mut first, mut second) = (slot(&index, 1, 0), slot(&index, 2, 0));
    let hashes = chain(0..8);
    let _first = index.promises().promise(&hashes, 0, &endpoint(1), START).unwrap();
    let _second = index.promises().promise(&hashes, 0, &endpoint(2), START).unwrap();
    first.store(&hashes[..5]);
    assert_eq!(credited(&index, &hashes, START), [(1, 8), (2, 8)], "real and promised blocks are one run");
    first.remove(hashes[2]);
    assert_eq!(credited(&index, &hashes, START), [(1, 2), (2, 8)]);
    second.store_missing(&hashes);
    assert_eq!(index.promises().n_blocks(), 3);
    hashes.iter().for_each(|hash| assert!(second.remove(*hash)));
    assert_eq!(credited(&index, &hashes, START), [(1, 2)], "nothing of the second is left");
}

#[test]
fn every_rank_of_an_endpoint_confirms() {
    let index = index();
    let mut ranks = [slot(&index, 1, 0), slot(&index, 1, 1)];
    let hashes = chain(0..4);
    let _guard = index.promises().promise(&hashes, 0, &endpoint(1), START).unwrap();
    ranks[1].store(&hashes);
    assert_eq!(index.promises().n_blocks(), 0);
    ranks[1].clear();
    assert_eq!(credited(&index, &hashes, START), []);
}

#[test]
fn block_that_the_index_refuses_is_no_promise_either() {
    let limits = IndexLimits { bytes_per_slot: 0, ..IndexLimits::default() };
    let index = Arc::new(KeyspaceIndex::new(limits, Account::new(limits.bytes)));
    let _guard = index.promises().promise(&chain(0..4), 0, &endpoint(1), START).unwrap();
    assert_eq!(slot(&index, 1, 0).store(&chain(0..4)).n_refused, 4);
    assert_eq!(credited(&index, &chain(0..4), START), []);
}

#[test]
fn keyspaces_have_promises_of_their_own() {
    let (engine, own) = (index(), index());
    let _guard = engine.promises().promise(&chain(0..4), 0, &endpoint(1), START).unwrap();
    slot(&own, 1, 0).store(&chain(0..4));
    assert_eq!(promised(own.promises(), 0..4, START), []);
    assert_eq!(promised(engine.promises(), 0..4, START), [(1, 4)]);
}

mod model {
    //! Against a model that keeps every promise ever made, and asks each.

    use super::*;

    const N_ENDPOINTS: usize = 3;
    const N_HASHES: u64 = 10;
    const N_GUARDS: usize = 4;

    #[derive(Clone, Debug)]
    enum Op {
        /// Rounds the held blocks down to what there is.
        Promise {
            guard: usize,
            endpoint: usize,
            n_blocks: u64,
            n_held: u32,
            fork: u64,
        },
        End {
            guard: usize,
        },
        Drop {
            guard: usize,
        },
        Void {
            guard: usize,
        },
        Move {
            guard: usize,
            endpoint: usize,
        },
        Store {
            endpoint: usize,
            first: u64,
            n_blocks: u64,
        },
        Remove {
            endpoint: usize,
            hash: u64,
        },
        Forget {
            endpoint: usize,
        },
        Wait {
            milliseconds: u64,
        },
        Sweep,
    }

    fn op() -> impl Strategy<Value = Op> {
        let guard = || 0..N_GUARDS;
        let endpoint = || 0..N_ENDPOINTS;
        prop_oneof![
            8 => (guard(), endpoint(), 1..=N_HASHES, 0..4_u32, 0..3_u64).prop_map(
                |(guard, endpoint, n_blocks, n_held, fork)| Op::Promise { guard, endpoint, n_blocks, n_held, fork }
            ),
            2 => guard().prop_map(|guard| Op::End { guard }),
            1 => guard().prop_map(|guard| Op::Drop { guard }),
            1 => guard().prop_map(|guard| Op::Void { guard }),
            1 => (guard(), endpoint()).prop_map(|(guard, endpoint)| Op::Move { guard, endpoint }),
            4 => (endpoint(), 0..N_HASHES, 1..6_u64)
                .prop_map(|(endpoint, first, n_blocks)| Op::Store { endpoint, first, n_blocks }),
            2 => (endpoint(), 0..N_HASHES).prop_map(|(endpoint, hash)| Op::Remove { endpoint, hash }),
            1 => endpoint().prop_map(|endpoint| Op::Forget { endpoint }),
            4 => prop_oneof![1..500_u64, 500..3_000_u64, 20_000..70_000_u64]
                .prop_map(|milliseconds| Op::Wait { milliseconds }),
            1 => Just(Op::Sweep),
        ]
    }

    /// Chains share their first blocks and part where they fork.
    fn hashes(n_blocks: u64, fork: u64) -> Vec<u64> {
        (0..n_blocks).map(|block| if block < 4 { block } else { block + fork * N_HASHES }).collect()
    }

    struct NaivePromise {
        endpoint: usize,
        chain: Vec<u64>,
        at: u64,
        life: u64,
        until: u64,
        generation: u32,
    }

    #[derive(Default)]
    struct Naive {
        now: u64,
        promises: Vec<NaivePromise>,
        /// By block and endpoint, the promise that counts.
        counts: HashMap<(u64, usize), usize>,
        guards: [Option<usize>; N_GUARDS],
        generations: [u32; N_ENDPOINTS],
        held: [HashMap<u64, u32>; N_ENDPOINTS],
    }

    impl Naive {
        fn remaining(&self, promise: usize) -> u64 {
            let NaivePromise { endpoint, until, generation, at, life, .. } = self.promises[promise];
            let end = until.min(at + life);
            if self.generations[endpoint] == generation { end.saturating_sub(self.now) } else { 0 }
        }

        fn promise(&mut self, endpoint: usize, life: u64, chain: Vec<u64>, lacking: &[u64]) -> usize {
            let promise = self.promises.len();
            let generation = self.generations[endpoint];
            self.promises.push(NaivePromise { endpoint, chain, at: self.now, life, until: u64::MAX, generation });
            for hash in lacking {
                let known = self.counts.get(&(*hash, endpoint)).copied();
                let remaining = known.map_or(0, |known| self.remaining(known));
                if remaining <= 30_000 && remaining < life {
                    self.counts.insert((*hash, endpoint), promise);
                }
            }
            promise
        }

        fn end(&mut self, guard: usize, until: u64) {
            if let Some(promise) = self.guards[guard].take() {
                self.promises[promise].until = until;
            }
        }

        fn apply(&mut self, op: &Op) {
            match *op {
                Op::Promise { guard, endpoint, n_blocks, n_held, fork } => {
                    let chain = hashes(n_blocks, fork);
                    let lacking = chain.iter().copied().skip(n_held as usize).collect::<Vec<_>>();
                    let made = (!lacking.is_empty()).then(|| self.promise(endpoint, 60_000, chain, &lacking));
                    self.end(guard, self.now + 2_000);
                    self.guards[guard] = made;
                }
                // The time is given with every op, so a drop is an end.
                Op::End { guard } | Op::Drop { guard } => self.end(guard, self.now + 2_000),
                Op::Void { guard } => self.end(guard, 0),
                Op::Move { guard, endpoint } => {
                    let Some(promise) = self.guards[guard].filter(|it| self.promises[*it].endpoint != endpoint) else {
                        return;
                    };
                    let chain = self.promises[promise].chain.clone();
                    self.end(guard, 0);
                    self.guards[guard] = Some(self.promise(endpoint, 2_000, chain.clone(), &chain));
                }
                Op::Store { endpoint, first, n_blocks } => {
                    for hash in first..(first + n_blocks).min(N_HASHES) {
                        *self.held[endpoint].entry(hash).or_default() += 1;
                        self.counts.remove(&(hash, endpoint));
                    }
                }
                Op::Remove { endpoint, hash } => {
                    if let Some(copies) = self.held[endpoint].get_mut(&hash) {
                        *copies -= 1;
                    }
                    self.held[endpoint].retain(|_, copies| *copies > 0);
                }
                Op::Forget { endpoint } => {
                    self.generations[endpoint] += 1;
                    self.held[endpoint].clear();
                }
                Op::Wait { milliseconds } => self.now += milliseconds,
                Op::Sweep => {}
            }
        }

        fn credited(&self, chain: &[u64]) -> Vec<(u32, u32)> {
            let run = |endpoint: usize| {
                let n_held = chain.iter().take_while(|hash| self.held[endpoint].contains_key(hash)).count();
                let counts = |hash: &&u64| {
                    let promise = self.counts.get(&(**hash, endpoint));
                    promise.is_some_and(|promise| self.remaining(*promise) > 0)
                };
                n_held + chain[n_held..].iter().take_while(counts).count()
            };
            (0..N_ENDPOINTS).map(|endpoint| (endpoint as u32, run(endpoint) as u32)).filter(|(_, n)| *n > 0).collect()
        }

        fn n_alive(&self) -> usize {
            self.counts.values().filter(|promise| self.remaining(**promise) > 0).count()
        }
    }

    struct Real {
        index: Arc<KeyspaceIndex>,
        endpoints: Vec<Arc<Endpoint>>,
        slots: Vec<SlotWriter>,
        guards: [Option<Promised>; N_GUARDS],
    }

    impl Real {
        fn new() -> Self {
            let index = index();
            let slots = (0..N_ENDPOINTS as u32).map(|id| slot(&index, id, 0)).collect();
            let endpoints = (0..N_ENDPOINTS as u32).map(endpoint).collect();
            Self { index, endpoints, slots, guards: [const { None }; N_GUARDS] }
        }

        fn apply(&mut self, op: &Op, now: Millis) {
            // Drops take the latest time that was seen.
            assert_eq!(promised(self.index.promises(), 1_000..1_001, now), []);
            match *op {
                Op::Promise { guard, endpoint, n_blocks, n_held, fork } => {
                    let chain = chain(hashes(n_blocks, fork));
                    let made = self.index.promises().promise(&chain, n_held, &self.endpoints[endpoint], now);
                    self.guards[guard] = made;
                }
                Op::End { guard } => self.guards[guard].take().into_iter().for_each(|guard| guard.end(now)),
                Op::Drop { guard } => drop(self.guards[guard].take()),
                Op::Void { guard } => self.guards[guard].take().into_iter().for_each(Promised::void),
                Op::Move { guard, endpoint } => {
                    let endpoint = &self.endpoints[endpoint];
                    self.guards[guard].iter_mut().for_each(|guard| guard.move_to(endpoint, now));
                }
                Op::Store { endpoint, first, n_blocks } => {
                    self.slots[endpoint].store(&chain(first..(first + n_blocks).min(N_HASHES)));
                }
                Op::Remove { endpoint, hash } => {
                    self.slots[endpoint].remove(BlockHash(hash));
                }
                Op::Forget { endpoint } => {
                    self.slots[endpoint].clear();
                    SourceKnowledge::new(self.endpoints[endpoint].knowledge.clone()).start_generation();
                }
                Op::Wait { .. } => {}
                Op::Sweep => self.index.promises().sweep(now),
            }
        }
    }

    proptest! {
        #[test]
        fn agrees_with_a_naive_model(ops in prop::collection::vec(op(), 0..60)) {
            let (mut real, mut naive) = (Real::new(), Naive::default());
            for op in &ops {
                real.apply(op, Millis(naive.now));
                naive.apply(op);
                for fork in 0..3 {
                    let hashes = hashes(N_HASHES, fork);
                    prop_assert_eq!(
                        credited(&real.index, &chain(hashes.iter().copied()), Millis(naive.now)),
                        naive.credited(&hashes),
                        "fork {} after {:?}", fork, op
                    );
                }
                let n_guards = real.guards.iter().flatten().count();
                prop_assert_eq!(real.index.promises().n_promises(), n_guards);
            }
            real.index.promises().sweep(Millis(naive.now));
            prop_assert_eq!(real.index.promises().n_blocks(), naive.n_alive());
        }
    }
}

/// Requests, sources and readers at once: no reader sees an endpoint with blocks that were neither stored there nor
/// promised, the bound holds, and nothing is left.
#[test]
fn concurrent_picks_events_and_lookups_leave_nothing_behind() {
    const N_BLOCKS: u64 = 64;
    const N_ROUNDS: u64 = 400;
    let index = index();
    let endpoints: Vec<_> = (0..4).map(endpoint).collect();
    let (clock, n_done) = (AtomicU64::new(0), AtomicU64::new(0));
    let now = || Millis(clock.load(Ordering::Relaxed));
    // Endpoint n only ever gets chains of conversation n, which share their first block with all others.
    let chain_of = |n: u64| [chain([7]), chain((n + 1) * 1_000..(n + 1) * 1_000 + N_BLOCKS - 1)].concat();
    std::thread::scope(|scope| {
        for (n, endpoint) in (0_u64..).zip(&endpoints) {
            let (index, clock, n_done) = (&index, &clock, &n_done);
            scope.spawn(move || {
                for round in 0..N_ROUNDS {
                    let n_held = if round % 5 == 0 { 3 } else { 0 };
                    let mut guard = index.promises().promise(&chain_of(n), n_held, endpoint, now()).unwrap();
                    clock.fetch_add(round % 7, Ordering::Relaxed);
                    match round % 4 {
                        0 => guard.void(),
                        1 => guard.end(now()),
                        2 => guard.move_to(endpoint, now()),
                        _ => SourceKnowledge::new(endpoint.knowledge.clone()).start_generation(),
                    }
                }
                n_done.fetch_add(1, Ordering::Relaxed);
            });
            scope.spawn(move || {
                let mut writer = slot(index, endpoint.id.0, 0);
                for _ in 0..N_ROUNDS / 4 {
                    writer.store(&chain_of(n));
                    chain_of(n).iter().for_each(|hash| assert!(writer.remove(*hash)));
                }
                n_done.fetch_add(1, Ordering::Relaxed);
            });
        }
        for n in 0_u64..2 {
            let (index, n_done) = (&index, &n_done);
            scope.spawn(move || {
                while n_done.load(Ordering::Relaxed) < 8 {
                    for (id, n_blocks) in credited(index, &chain_of(n), now()) {
                        let limit = if u64::from(id) == n { N_BLOCKS } else { 1 };
                        assert!(
                            u64::from(n_blocks) <= limit,
                            "endpoint {id} with {n_blocks} blocks of conversation {n}"
                        );
                    }
                    // What is removed is counted out once per chain, so each of the eight may be late by one.
                    assert!(index.promises().n_blocks() <= (4 + 8) * N_BLOCKS as usize);
                }
            });
        }
    });
    assert_eq!(index.promises().n_promises(), 0);
    index.promises().sweep(Millis(clock.load(Ordering::Relaxed) + 60_000));
    assert_eq!((index.promises().n_blocks(), index.n_blocks()), (0, 0));
    for n in 0..4 {
        assert_eq!(credited(&index, &chain_of(n), now()), []);
    }
}
