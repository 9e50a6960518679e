//! Chains with multimodal items.

use proptest::prelude::*;

use super::*;

const IMAGE: &str = "9f2b";
const OTHER: &str = "aa11";

fn findings(chain: &Chain, proof: &mut Proof, settings: &ModelSettings) -> Vec<Finding> {
    let payload = rmp_serde::to_vec(&json!([0.5, [chain.event], 0])).unwrap();
    let batch = EventBatch::decode(&payload).unwrap();
    let [Event::BlockStored(stored)] = &batch.events[..] else { panic!("{}", chain.event) };
    let hasher = BlockHasher::new(settings.algorithm, settings.pythonhashseed.as_deref()).unwrap();
    chain::Chain::of(stored, settings).map_or_else(Vec::new, |chain| proof.examine(&chain, &hasher))
}

#[test]
fn chain_with_an_item_proves_the_form_of_items_besides_what_else_it_shows() {
    let (engine, adapter) = (Engine::default(), KeyKinds::adapter(0).unwrap());
    let (text_first, only_items) = ([(IMAGE, 5, 4), (OTHER, 9, 1)], [(IMAGE, 0, 8)]);
    for (chain, proved) in [
        (engine.with_items(0, 3, (None, None), &text_first), KeyKinds::MM | KeyKinds::PLAIN),
        (engine.with_items(0, 3, (None, SALT), &text_first), KeyKinds::MM | KeyKinds::SALT),
        (engine.with_items(0, 2, (None, None), &only_items), KeyKinds::MM),
        (engine.with_items(0, 2, (None, SALT), &only_items), KeyKinds::MM | KeyKinds::SALT),
        (engine.with_items(0, 3, (None, SALT), &only_items), KeyKinds::MM | KeyKinds::SALT | KeyKinds::PLAIN),
        (engine.with_items(0, 3, (LORA_A, SALT), &text_first), KeyKinds::MM | KeyKinds::SALT | adapter),
    ] {
        let mut fixture = Fixture::new(settings());
        fixture.apply(std::slice::from_ref(&chain.event));
        assert_eq!((fixture.stats.proved(), fixture.stats.disproved()), (proved, KeyKinds::NONE), "{}", chain.event);
        assert_eq!(fixture.matched(&chain, proved), chain.digests.len() as u32);
    }
}

#[test]
fn text_alone_proves_nothing_of_items() {
    let mut fixture = Fixture::new(settings());
    let chain = Engine::default().plain(0, 2);
    fixture.apply(std::slice::from_ref(&chain.event));
    assert_eq!(fixture.matched(&chain, KeyKinds::PLAIN), 2);
    assert_eq!(fixture.matched(&chain, KeyKinds::PLAIN | KeyKinds::MM), 0);
}

#[test]
fn engine_that_hashes_items_otherwise_is_credited_by_our_own_hashes() {
    let engine = Engine { tagged: false, ..Engine::default() };
    let chain = engine.with_items(0, 3, (None, None), &[(IMAGE, 5, 4)]);
    let mut fixture = Fixture::new(settings());
    fixture.apply(std::slice::from_ref(&chain.event));
    assert_eq!((fixture.stats.proved(), fixture.stats.disproved()), (KeyKinds::PLAIN, KeyKinds::MM));
    assert_eq!((fixture.n_blocks_in(false), fixture.n_blocks_in(true)), (0, 3));
    assert_eq!(fixture.matched(&chain, KeyKinds::PLAIN | KeyKinds::MM), 3);
    let text = engine.plain(100, 2);
    fixture.apply(std::slice::from_ref(&text.event));
    assert_eq!((fixture.matched(&text, KeyKinds::PLAIN), fixture.n_blocks_in(false)), (2, 2));
}

#[test]
fn mismatch_behind_text_that_matches_is_the_items_alone() {
    let untagged = Engine { tagged: false, ..Engine::default() };
    let text_first = [(IMAGE, 5, 4)];
    let (proved, mm) = (Finding::Proved(KeyKinds::PLAIN), KeyKinds::MM);
    let chain = untagged.with_items(0, 3, (None, None), &text_first);
    let mut proof = Proof::default();
    let found = findings(&chain, &mut proof, &settings());
    assert_eq!(found, [proved, Finding::Disproved(mm, Suspect::UntaggedKeys)]);
    assert_eq!(findings(&chain, &mut proof, &settings()), [], "said once");

    let mut chain = Engine::default().with_items(0, 3, (None, None), &text_first);
    chain.event["extra_keys"][1][0][0] = json!(OTHER);
    let found = findings(&chain, &mut Proof::default(), &settings());
    assert_eq!(found, [Finding::Proved(KeyKinds::PLAIN), Finding::Disproved(mm, Suspect::ItemKeys)]);

    let seeded = Engine { seed: Some("0"), ..Engine::default() };
    let suspect = Suspect::Seed(Some("0"));
    let chain = seeded.with_items(0, 3, (None, None), &text_first);
    let mut proof = Proof::default();
    let found = findings(&chain, &mut proof, &settings());
    assert_eq!(found, [Finding::Disproved(KeyKinds::PLAIN, suspect.clone())], "the text is wrong already");
    assert_eq!(findings(&chain, &mut proof, &settings()), [], "said once");
    let chain = seeded.with_items(0, 2, (None, None), &[(IMAGE, 0, 8)]);
    assert_eq!(findings(&chain, &mut Proof::default(), &settings()), [Finding::Disproved(mm, suspect)]);
}

#[test]
fn one_item_twice_in_a_block_is_no_evidence_where_objects_are_told_apart() {
    let twice = [(IMAGE, 4, 2), (IMAGE, 6, 1)];
    for algorithm in HashAlgorithm::ALL {
        let engine = Engine { algorithm, seed: Some("0"), ..Engine::default() };
        let settings = ModelSettings { algorithm, pythonhashseed: Some("0".into()), ..settings() };
        let chain = engine.with_items(0, 2, (None, None), &twice);
        let is_pickled = matches!(algorithm, HashAlgorithm::Sha256 | HashAlgorithm::Xxhash);
        let shown = if is_pickled { KeyKinds::PLAIN } else { KeyKinds::PLAIN | KeyKinds::MM };
        assert_eq!(findings(&chain, &mut Proof::default(), &settings), [Finding::Proved(shown)], "{algorithm}");
    }
}

#[test]
fn publisher_that_hides_items_is_not_credited_for_them() {
    let mut fixture = Fixture::new(settings());
    let chain = Engine { seed: Some("secret"), ..Engine::default() }.with_items(0, 2, (None, None), &[(IMAGE, 4, 4)]);
    fixture.apply(&[chain.with("extra_keys", Value::Null)]);
    assert_eq!(fixture.n_blocks_in(true), 2);
    let looks_alike = Chain { own: Engine::default().plain(0, 2).own, ..chain };
    assert_eq!(fixture.matched(&looks_alike, KeyKinds::PLAIN | KeyKinds::MM), 0);
}

#[test]
fn what_is_known_of_items_survives_an_image() {
    let mut fixture = Fixture::new(settings());
    let chain = Engine::default().with_items(0, 3, (None, None), &[(IMAGE, 5, 4)]);
    fixture.apply(std::slice::from_ref(&chain.event));
    let image = fixture.applier.image().unwrap();
    let mut restored = Fixture::new(settings());
    assert!(restored.applier.restore(&image));
    assert_eq!(restored.matched(&chain, KeyKinds::PLAIN | KeyKinds::MM), 3);
}

proptest! {
    /// Wherever items lie, a request with the same ones is credited with all blocks and one with others with those
    /// before the first difference, by the engine's hashes and by ours.
    #[test]
    fn items_are_credited_where_they_are_and_nowhere_else(
        lengths in prop::collection::vec((0_u32..6, 1_u32..9), 1..5),
        changed in 0_usize..5,
        knows_root in any::<bool>(),
        is_salted in any::<bool>(),
    ) {
        let names: Vec<String> = (0..lengths.len()).map(|item_idx| format!("item-{item_idx}")).collect();
        let mut offset = 0;
        let items: Vec<(&str, u32, u32)> = names.iter().zip(&lengths).map(|(name, (gap, length))| {
            let item = (name.as_str(), offset + gap, *length);
            offset += gap + length;
            item
        }).collect();
        let changed = changed % items.len();
        let mut others = items.clone();
        others[changed].0 = "another";
        let engine = Engine { seed: if knows_root { None } else { Some("secret") }, ..Engine::default() };
        let (n_blocks, salt) = (offset.div_ceil(BLOCK) + 1, SALT.filter(|_| is_salted));
        let chain = engine.with_items(0, n_blocks, (None, salt), &items);
        let other = engine.with_items(0, n_blocks, (None, salt), &others);
        let mut fixture = Fixture::new(settings());
        fixture.apply(std::slice::from_ref(&chain.event));
        prop_assert_eq!(fixture.n_blocks_in(knows_root), 0);
        let required = KeyKinds::PLAIN | KeyKinds::MM | if is_salted { KeyKinds::SALT } else { KeyKinds::NONE };
        prop_assert_eq!(fixture.matched(&chain, required), n_blocks);
        prop_assert_eq!(fixture.matched(&other, required), items[changed].1 / BLOCK);
    }
}
