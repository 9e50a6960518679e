//! What a generation knows, taken over by another.

use super::*;
use crate::routing::endpoint::Endpoint;
use crate::routing::index::{Clock, KeyspaceKind, Prediction};
use crate::routing::load::Millis;

/// A generation with something of everything.
fn full_generation() -> Fixture {
    let mut fixture = Fixture::new(settings());
    let (plain, salted) = (Engine::default().plain(0, 3), Engine { tagged: false, ..Engine::default() });
    let (salted, orphan) = (salted.chain(50, 3, None, SALT), Engine::default().plain(90, 4));
    fixture.apply(&[plain.event.clone(), plain.tail(2), plain.with("medium", json!("CPU"))]);
    fixture.apply(&[salted.event.clone(), salted.tail(1), orphan.tail(2)]);
    fixture
}

fn decoded(image: &Image) -> [Image; 2] {
    let packed = rmp_serde::to_vec_named(image).unwrap();
    let text = serde_json::to_string(image).unwrap();
    [rmp_serde::from_slice(&packed).unwrap(), serde_json::from_str(&text).unwrap()]
}

#[test]
fn restored_generation_goes_on_as_the_first_one_would() {
    let mut first = full_generation();
    let image = first.applier.image().unwrap();
    for image in decoded(&image) {
        let mut second = Fixture::new(settings());
        assert!(second.applier.restore(&image));
        assert_eq!(second.applier.digest(), first.applier.digest());
        assert_eq!(second.stats.n_blocks(), first.stats.n_blocks());
        assert_eq!((second.stats.proved(), second.stats.disproved()), (first.stats.proved(), first.stats.disproved()));
        let parked = |fixture: &Fixture| fixture.applier.generation.as_ref().unwrap().parked.iter().collect::<Vec<_>>();
        assert_eq!(parked(&second), parked(&first));
        assert!(!parked(&first).is_empty());
        assert_eq!(second.matched(&Engine::default().plain(0, 3), KeyKinds::PLAIN), 3);
    }
    // Copies and the chains of what waits are there too.
    let mut second = Fixture::new(settings());
    assert!(second.applier.restore(&image));
    let last = Engine::default().plain(0, 3).digests[2];
    let head = Engine::default().plain(90, 4).head(2);
    for events in [vec![removed(&last, None, "GPU")], vec![removed(&last, None, "GPU"), head]] {
        [&mut first, &mut second].into_iter().for_each(|fixture| fixture.apply(&events));
        assert_eq!(second.applier.digest(), first.applier.digest());
        assert_eq!(second.stats.n_blocks(), first.stats.n_blocks());
    }
    let salted = Engine { tagged: false, ..Engine::default() }.chain(50, 3, None, SALT);
    assert_eq!(second.matched(&salted, KeyKinds::PLAIN | KeyKinds::SALT), 3);
}

#[test]
fn what_is_restored_is_not_told_to_those_who_watch() {
    let mut first = Fixture::new(settings());
    let salted = Engine { tagged: false, ..Engine::default() }.chain(50, 3, None, SALT);
    first.apply(std::slice::from_ref(&salted.event));
    let image = first.applier.image().unwrap();
    let mut second = Fixture::new(settings());
    let (keyspace, key) = {
        let own = first.applier.generation.as_ref().unwrap().own.as_ref().expect("it is salted");
        let (_, key, _) = own.iter().next().unwrap();
        let keyspaces = first.index.keyspaces_of(&settings().model);
        (keyspaces.into_iter().find(|(keyspace, _)| keyspace.kind == KeyspaceKind::Own).unwrap().0, key)
    };
    let endpoint = Endpoint::new(second.applier.shared.name.endpoint, ([127, 0, 0, 1], 1).into());
    let rank = Some(second.applier.shared.name.rank);
    let prediction = Prediction { chain: &[key], n_held: 1, n_matched: 1, endpoint: &endpoint, rank };
    let index = second.index.keyspace(&keyspace);
    let clock = Clock::new(|| Millis(0));
    let watched = index.watches().watch(&prediction, &Arc::default(), &clock, Millis(0)).expect("there is room");
    assert!(second.applier.restore(&image));
    assert_eq!(watched.seen().n_stored_again(), 0);
    second.apply(std::slice::from_ref(&salted.event));
    assert_eq!(watched.seen().n_stored_again(), 1, "the engine stores it again");
}

#[test]
fn what_has_happened_before_is_not_told_to_those_who_watch() {
    // By the engine's hashes; by ours, since nothing proves the salt; and announced again within a batch.
    let plain = Engine::default().plain(0, 3);
    let salted = Engine { tagged: false, ..Engine::default() }.chain(50, 3, None, SALT);
    for events in [vec![plain.event.clone()], vec![salted.event.clone()], vec![plain.head(2), plain.tail(2)]] {
        let mut fixture = Fixture::new(settings());
        fixture.apply(&events);
        let endpoint = Endpoint::new(fixture.applier.shared.name.endpoint, ([127, 0, 0, 1], 1).into());
        let (generation, rank) = (fixture.applier.generation.as_ref().unwrap(), Some(fixture.applier.shared.name.rank));
        let own = generation.own.as_ref().and_then(|own| own.iter().next()).map(|(_, key, _)| key);
        let (is_own, block) = (own.is_some(), own.unwrap_or_else(|| plain.digests[0].low64()));
        let keyspaces = fixture.index.keyspaces_of(&settings().model);
        let (_, index) = keyspaces.iter().find(|(it, _)| (it.kind == KeyspaceKind::Own) == is_own).unwrap();
        let prediction = Prediction { chain: &[block], n_held: 1, n_matched: 1, endpoint: &endpoint, rank };
        let clock = Clock::new(|| Millis(0));
        let watched = index.watches().watch(&prediction, &Arc::default(), &clock, Millis(0)).expect("there is room");
        fixture.apply_of(When::Before, &events);
        assert_eq!(watched.seen().n_stored_again(), 0, "{events:?}");
        fixture.apply_of(When::Now, &events);
        assert_eq!(watched.seen().n_stored_again(), 1, "{events:?}");
    }
}

#[test]
fn digests_are_equal_for_equal_contents_only() {
    let (chain, other) = (Engine::default().plain(0, 3), Engine::default().plain(50, 3));
    let after = |batches: &[Vec<Value>]| {
        let mut fixture = Fixture::new(settings());
        batches.iter().for_each(|events| fixture.apply(events));
        fixture.applier.digest()
    };
    let whole = after(&[vec![chain.event.clone(), other.event.clone()]]);
    assert_eq!(whole.n_blocks, 6);
    assert_eq!(after(&[vec![other.event.clone()], vec![chain.head(1)], vec![chain.tail(1)]]), whole);
    assert_ne!(after(&[vec![chain.event.clone()]]), whole);
    assert_ne!(after(&[vec![chain.with("medium", json!("CPU")), other.event.clone()]]), whole);
}

#[test]
fn image_of_other_settings_is_refused() {
    let image = full_generation().applier.image().unwrap();
    let others = [
        ModelSettings { model: "other".into(), ..settings() },
        ModelSettings { algorithm: HashAlgorithm::Sha256, ..settings() },
        ModelSettings { pythonhashseed: Some("0".into()), ..settings() },
        ModelSettings { adapters: settings().adapters.into_iter().rev().collect(), ..settings() },
    ];
    for other in others {
        let mut fixture = Fixture::new(other);
        assert!(!fixture.applier.restore(&image));
        assert_eq!((fixture.applier.image(), fixture.stats.n_blocks()), (None, 0));
    }
}

#[test]
fn image_that_is_not_well_formed_is_refused() {
    let good = serde_json::to_value(full_generation().applier.image().unwrap()).unwrap();
    let faults: [(&str, Value); 7] = [
        ("own", json!([1, 2, 3])),
        ("parked", json!([1])),
        ("parked", json!(vec![7; 30 * 4000])),
        ("single", json!([[1], [], []])),
        ("copied", json!([[], [1], []])),
        ("block_size", json!(1 << 20)),
        ("block_size", Value::Null),
    ];
    for (field, value) in faults {
        let mut image = good.clone();
        image[field] = value;
        let image: Image = serde_json::from_value(image).unwrap();
        assert!(!Fixture::new(settings()).applier.restore(&image), "{field}");
    }
    assert!(Fixture::new(settings()).applier.restore(&serde_json::from_value(good).unwrap()));
}

#[test]
fn image_beyond_the_index_is_full() {
    let image = full_generation().applier.image().unwrap();
    let mut fixture = Fixture::with_limits(settings(), IndexLimits { bytes: 300, ..IndexLimits::default() });
    assert!(fixture.applier.restore(&image));
    assert!(fixture.applier.is_full());
    assert!(fixture.index.n_bytes() <= 300);
}

#[test]
fn image_of_many_blocks_takes_little_more_than_their_hashes() {
    let mut fixture = Fixture::new(settings());
    fixture.apply(&[Engine::default().plain(0, 10_000).event]);
    let image = fixture.applier.image().unwrap();
    assert_eq!(image.n_blocks(), 10_000);
    assert!(rmp_serde::to_vec(&image).unwrap().len() < 81_000);
}
