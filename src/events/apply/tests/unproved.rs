//! Chains whose hashes cannot be computed, tiers, and copies.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// An engine whose root nobody knows.
fn secretive() -> Engine {
    Engine { seed: Some("secret"), ..Engine::default() }
}

fn with_reports() -> ModelSettings {
    ModelSettings { reports: true, ..settings() }
}

#[test]
fn engine_with_an_unknown_root_is_credited() {
    let settings = ModelSettings { algorithm: HashAlgorithm::XxhashCbor, ..settings() };
    let mut fixture = Fixture::new(settings);
    let chain = secretive().plain(0, 4);
    fixture.apply(&[chain.head(2), chain.tail(2)]);
    assert_eq!((fixture.matched(&chain, KeyKinds::PLAIN), fixture.n_blocks_in(false)), (4, 0));
    fixture.apply(&[removed(&chain.digests[2], Some(0), "GPU")]);
    assert_eq!(fixture.matched(&chain, KeyKinds::PLAIN), 2);
    fixture.apply(&[json!({"type": "AllBlocksCleared"})]);
    assert_eq!((fixture.matched(&chain, KeyKinds::PLAIN), fixture.stats.n_blocks()), (0, 0));
}

#[test]
fn adapter_without_a_path_is_credited_while_plain_blocks_stay_with_the_engines_hashes() {
    let adapters = vec![("lora-a".into(), "".into())];
    let mut fixture = Fixture::new(ModelSettings { adapters, ..settings() });
    let (plain, adapted) = (Engine::default().plain(0, 3), Engine::default().chain(50, 3, LORA_A, None));
    fixture.apply(&[plain.event.clone(), adapted.head(1), adapted.tail(1)]);
    assert_eq!((fixture.n_blocks_in(false), fixture.n_blocks_in(true)), (3, 3));
    assert_eq!(fixture.matched(&plain, KeyKinds::PLAIN), 3);
    assert_eq!(fixture.matched(&adapted, KeyKinds::adapter(0).unwrap()), 3);
    assert_eq!(fixture.stats.disproved(), KeyKinds::NONE, "nothing was configured that could be wrong");
}

#[test]
fn salted_chains_under_our_own_hashes_need_their_salt() {
    let mut fixture = Fixture::new(settings());
    let salted = secretive().chain(0, 2, None, SALT);
    fixture.apply(&[salted.head(1), salted.tail(1)]);
    assert_eq!(fixture.matched(&salted, KeyKinds::PLAIN | KeyKinds::SALT), 2);
    let unsalted = secretive().plain(0, 2);
    assert_eq!(fixture.matched(&unsalted, KeyKinds::PLAIN), 0);
}

#[test]
fn publisher_that_hides_salts_is_credited_for_unsalted_requests_only() {
    let mut fixture = Fixture::new(settings());
    let adapted = secretive().chain(50, 2, LORA_A, None);
    let plain = secretive().plain(0, 2);
    fixture.apply(&[plain.with("extra_keys", Value::Null), adapted.with("extra_keys", Value::Null)]);
    assert_eq!(fixture.matched(&plain, KeyKinds::PLAIN), 2);
    assert_eq!(fixture.matched(&adapted, KeyKinds::adapter(0).unwrap()), 2);
    assert_eq!(fixture.matched(&plain, KeyKinds::PLAIN | KeyKinds::SALT), 0);
    fixture.apply(&[secretive().plain(90, 1).event]);
    assert_eq!(fixture.matched(&plain, KeyKinds::PLAIN | KeyKinds::SALT), 2, "it shows them after all");
}

#[test]
fn adapter_without_a_name_is_skipped() {
    let mut fixture = Fixture::new(settings());
    let mut event = secretive().plain(0, 2).with("extra_keys", Value::Null);
    event["lora_id"] = json!(1);
    fixture.apply(&[event]);
    assert_eq!((fixture.stats.n_blocks(), fixture.stats.n_skipped.get()), (0, 1));
}

#[test]
fn orphans_are_credited_when_their_chain_is_complete() {
    let mut fixture = Fixture::new(settings());
    let chain = secretive().plain(0, 8);
    let middle = |from: usize, to: usize| {
        let mut event = chain.tail(from);
        for field in ["block_hashes", "extra_keys"] {
            event[field] = json!(event[field].as_array().unwrap()[..to - from]);
        }
        event["token_ids"] = json!(event["token_ids"].as_array().unwrap()[..(to - from) * BLOCK as usize]);
        event
    };
    fixture.apply(&[chain.tail(6), middle(4, 6), middle(2, 4)]);
    assert_eq!((fixture.matched(&chain, KeyKinds::PLAIN), fixture.stats.n_orphans.get()), (0, 6));
    fixture.apply(&[removed(&chain.digests[5], Some(0), "GPU")]);
    fixture.apply(&[chain.head(2)]);
    assert_eq!(fixture.matched(&chain, KeyKinds::PLAIN), 5, "removals reach blocks that wait");
    assert_eq!(fixture.n_blocks_in(false), 0, "what was unproved has left the other keyspace");
    fixture.apply(&[middle(5, 6)]);
    assert_eq!(fixture.matched(&chain, KeyKinds::PLAIN), 8);
    assert_eq!(fixture.applier.digest().n_blocks, 8);
}

#[test]
fn orphans_of_a_proved_engine_need_no_parent() {
    let mut fixture = Fixture::new(settings());
    let (chain, salted) = (Engine::default().plain(0, 4), Engine::default().chain(90, 2, None, SALT));
    fixture.apply(&[chain.tail(2), salted.event]);
    assert_eq!(fixture.matched(&chain, KeyKinds::PLAIN), 0);
    fixture.apply(&[chain.head(2)]);
    assert_eq!((fixture.matched(&chain, KeyKinds::PLAIN), fixture.n_blocks_in(true)), (4, 0));
    let n_orphans = fixture.stats.n_orphans.get();
    fixture.apply(&[Engine::default().plain(200, 4).tail(2)]);
    assert_eq!(fixture.stats.n_orphans.get(), n_orphans, "no kind that it could be of is in doubt");
}

#[test]
fn orphans_beyond_the_bound_are_dropped_and_counted() {
    let mut fixture = Fixture::new(settings());
    let chain = secretive().plain(0, 4000);
    fixture.apply(&[chain.tail(1)]);
    let n_kept = (generation::PARKED_LIMIT / parked::PARKED_BYTES) as u64;
    assert_eq!(fixture.stats.n_orphans_dropped.get(), 3999 - n_kept);
    fixture.apply(&[chain.head(1)]);
    assert_eq!(u64::from(fixture.matched(&chain, KeyKinds::PLAIN)), 1 + n_kept, "no more than what is known");
    fixture.apply(&[secretive().plain(90_000, 4000).tail(1), Engine::default().plain(0, 1).event]);
    assert_eq!(fixture.applier.generation.as_ref().unwrap().parked.n_blocks() as u64, n_kept, "it stays disproved");
}

#[test]
fn chain_that_began_before_the_proof_stays_where_it_is() {
    let mut fixture = Fixture::new(settings());
    let chain = Engine::default().plain(0, 4);
    let mut unproved = chain.head(2);
    unproved["extra_keys"] = json!([[5], []]);
    fixture.apply(&[unproved]);
    assert_eq!((fixture.n_blocks_in(false), fixture.n_blocks_in(true)), (0, 2));
    fixture.apply(std::slice::from_ref(&chain.event));
    assert_eq!((fixture.n_blocks_in(false), fixture.n_blocks_in(true)), (0, 4));
    chain.digests.iter().for_each(|digest| fixture.apply(&[removed(digest, Some(0), "GPU")]));
    chain.digests.iter().for_each(|digest| fixture.apply(&[removed(digest, Some(0), "GPU")]));
    assert_eq!((fixture.stats.n_blocks(), fixture.applier.digest()), (0, ContentDigest::default()));
}

#[test]
fn tiers_are_kept_apart() {
    for engine in [Engine::default(), secretive()] {
        let mut fixture = Fixture::new(settings());
        let chain = engine.plain(0, 4);
        let found = |fixture: &Fixture| {
            fixture.found(&chain, KeyKinds::PLAIN).map_or((0, 0), |found| (found.n_blocks, found.n_offloaded))
        };
        fixture.apply(&[chain.event.clone(), chain.with("medium", json!("CPU"))]);
        assert_eq!(found(&fixture), (4, 0));
        fixture.apply(&[removed(&chain.digests[1], Some(0), "GPU"), removed(&chain.digests[3], None, "CPU")]);
        assert_eq!(found(&fixture), (1, 3));
        fixture.apply(&[removed(&chain.digests[3], None, "STORAGE"), removed(&chain.digests[3], None, "GPU")]);
        assert_eq!(found(&fixture), (1, 2));
        let cleared = |medium| json!({"type": "TierBlocksCleared", "medium": medium});
        fixture.apply(&[cleared("CPU"), cleared("elsewhere")]);
        assert_eq!((found(&fixture), fixture.stats.n_skipped.get()), ((1, 0), 1));
        fixture.apply(&[chain.with("medium", json!("STORAGE")), cleared("GPU")]);
        assert_eq!(found(&fixture), (0, 4));
        fixture.apply(&[json!({"type": "AllBlocksCleared"})]);
        assert_eq!((found(&fixture), fixture.stats.n_blocks()), ((0, 0), 0));
    }
}

#[test]
fn placeholders_are_taken_for_blocks_that_something_is_known_of() {
    for engine in [Engine::default(), secretive()] {
        let chain = engine.plain(0, 2);
        let mut placeholder = chain.with("block_size", json!(0));
        placeholder["medium"] = json!("CPU");
        placeholder["token_ids"] = json!([]);
        placeholder["extra_keys"] = Value::Null;
        let mut fixture = Fixture::new(settings());
        fixture.apply(&[placeholder.clone()]);
        assert_eq!((fixture.stats.n_blocks(), fixture.stats.n_skipped.get()), (0, 1), "nothing is known yet");
        fixture.apply(&[chain.event.clone(), placeholder, removed(&chain.digests[1], Some(0), "GPU")]);
        let found = fixture.found(&chain, KeyKinds::PLAIN).unwrap();
        assert_eq!((found.n_blocks, found.n_offloaded), (1, 1));
    }
}

#[test]
fn known_blocks_get_no_copy_from_a_prefix_that_is_announced_again() {
    for engine in [Engine::default(), secretive()] {
        // Some of the first blocks are known, and the batch continues them.
        let mut fixture = Fixture::new(settings());
        let chain = engine.plain(0, 4);
        fixture.apply(&[chain.head(1)]);
        fixture.apply(&[chain.head(2), chain.tail(2)]);
        chain.digests.iter().for_each(|digest| fixture.apply(&[removed(digest, Some(0), "GPU")]));
        assert_eq!(fixture.stats.n_blocks(), 0);

        // Where we ask for reports, they need not be continued.
        let mut fixture = Fixture::new(with_reports());
        fixture.apply(&[chain.head(2)]);
        fixture.apply(&[chain.head(3)]);
        chain.digests[..3].iter().for_each(|digest| fixture.apply(&[removed(digest, Some(0), "GPU")]));
        assert_eq!(fixture.stats.n_blocks(), 0);

        // A block that continues a chain is another copy, whatever we ask for.
        fixture.apply(std::slice::from_ref(&chain.event));
        fixture.apply(&[chain.tail(3)]);
        fixture.apply(&[removed(&chain.digests[3], Some(0), "GPU")]);
        assert_eq!(fixture.matched(&chain, KeyKinds::PLAIN), 4);
    }
}

#[test]
fn source_in_the_engine_keyspace_costs_little_besides_its_blocks() {
    let mut fixture = Fixture::new(settings());
    fixture.apply(&[Engine::default().plain(0, 1).event]);
    fixture.apply(&[Engine::default().plain(1_000_000, 4000).tail(1)]);
    let generation = fixture.applier.generation.as_ref().unwrap();
    assert!(generation.own.is_none());
    let parked = generation.parked.n_blocks() * parked::PARKED_BYTES;
    assert!(parked > 0, "the bound is met");
    let total = size_of::<Applier>() + size_of::<SourceStats>() + parked;
    assert!(total <= 40 << 10, "{total} bytes, with the sockets' state at most 64 KiB");
}

/// A tree of blocks of an engine: each has a parent and tokens of its own. The first is the root's child.
const PARENTS: [Option<usize>; 10] =
    [None, Some(0), Some(1), Some(1), None, Some(4), Some(5), Some(2), Some(3), Some(7)];

#[derive(Clone, Debug)]
enum Op {
    Store { block: usize, tier: usize },
    Remove { block: usize, tier: usize },
    Clear,
}

fn op() -> impl Strategy<Value = Op> {
    let (block, tier) = (0..PARENTS.len(), prop_oneof![4 => Just(0), 1 => Just(1_usize)]);
    prop_oneof![
        6 => (block.clone(), tier.clone()).prop_map(|(block, tier)| Op::Store { block, tier }),
        4 => (block, tier).prop_map(|(block, tier)| Op::Remove { block, tier }),
        1 => Just(Op::Clear),
    ]
}

const MEDIA: [&str; 2] = ["GPU", "CPU"];

fn tokens_of(block: usize) -> Vec<u32> {
    (0..BLOCK).map(|position| block as u32 * 100 + position).collect()
}

/// The blocks from the root to this one.
fn path_to(block: usize) -> Vec<usize> {
    let mut path: Vec<usize> = std::iter::successors(Some(block), |block| PARENTS[*block]).collect();
    path.reverse();
    path
}

fn event_of(op: &Op) -> Value {
    let hash = |block: usize| 1000 + block;
    match *op {
        Op::Store { block, tier } => json!({
            "type": "BlockStored", "block_hashes": [hash(block)], "parent_block_hash": PARENTS[block].map(hash),
            "token_ids": tokens_of(block), "block_size": BLOCK, "medium": MEDIA[tier], "extra_keys": [null],
        }),
        Op::Remove { block, tier } => {
            json!({"type": "BlockRemoved", "block_hashes": [hash(block)], "medium": MEDIA[tier]})
        }
        Op::Clear => json!({"type": "AllBlocksCleared"}),
    }
}

/// What a naive engine holds: copies of each block on each tier.
type Model = BTreeMap<(usize, usize), u32>;

fn naive_apply(model: &mut Model, op: &Op) {
    match *op {
        Op::Store { block, tier } => *model.entry((block, tier)).or_default() += 1,
        Op::Remove { block, tier } => {
            if let Some(copies) = model.get_mut(&(block, tier)) {
                *copies -= 1;
            }
            model.retain(|_, copies| *copies > 0);
        }
        Op::Clear => model.clear(),
    }
}

fn credit(fixture: &Fixture, path: &[usize]) -> (u32, u32) {
    let tokens: Vec<u32> = path.iter().flat_map(|block| tokens_of(*block)).collect();
    let own = OwnHasher::new("tiny").scoped_chain(&tokens, BlockSize::new(BLOCK).unwrap(), &Scope::default());
    let chain = Chain { digests: Vec::new(), own, event: Value::Null };
    fixture.found(&chain, KeyKinds::PLAIN).map_or((0, 0), |found| (found.n_blocks, found.n_offloaded))
}

proptest! {
    /// Whatever an engine announces, in whatever order: never more is credited than it holds, and all of it once every
    /// block has been announced behind its parent.
    #[test]
    fn credit_is_never_above_a_naive_engines_and_equal_where_chains_are_whole(
        ops in prop::collection::vec(op(), 0..60),
        knows_root in any::<bool>(),
    ) {
        let algorithm = if knows_root { HashAlgorithm::Sha256Cbor } else { HashAlgorithm::XxhashCbor };
        let mut fixture = Fixture::new(ModelSettings { algorithm, ..settings() });
        let mut model = Model::new();
        for op in &ops {
            fixture.apply(&[event_of(op)]);
            naive_apply(&mut model, op);
            for block in 0..PARENTS.len() {
                let path = path_to(block);
                let run = |tiers: usize| path.iter().take_while(|block| {
                    (0..tiers).any(|tier| model.contains_key(&(**block, tier)))
                }).count() as u32;
                let (gpu, offloaded) = credit(&fixture, &path);
                prop_assert!(gpu <= run(1) && gpu + offloaded <= run(2), "{:?} of {:?} after {:?}", (gpu, offloaded), path, op);
            }
        }
        // Announced in order, everything is credited.
        let announced: Vec<Op> = (0..PARENTS.len()).map(|block| Op::Store { block, tier: 0 }).collect();
        announced.iter().for_each(|op| fixture.apply(&[event_of(op)]));
        for block in 0..PARENTS.len() {
            let path = path_to(block);
            prop_assert_eq!(credit(&fixture, &path).0, path.len() as u32);
        }
        // And every copy leaves: as many removals as the naive engine has copies, and one for those just announced.
        announced.iter().for_each(|op| naive_apply(&mut model, op));
        for ((block, tier), copies) in model {
            (0..copies).for_each(|_| fixture.apply(&[event_of(&Op::Remove { block, tier })]));
        }
        prop_assert_eq!((fixture.stats.n_blocks(), fixture.applier.digest()), (0, ContentDigest::default()));
        prop_assert_eq!(fixture.index.n_blocks(), 0);
    }
}
