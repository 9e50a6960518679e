//! Snapshots there and back, and everything else that may be in their place.

use proptest::prelude::*;

use super::*;

/// An image with these bytes for blocks, whatever they mean: only a source that restores it looks.
pub(crate) fn image(blocks: &[u8]) -> Image {
    let none: [&[u8]; 3] = [&[], &[], &[]];
    let text = serde_json::json!({
        "settings": u64::MAX, "block_size": 16, "group": null, "shows_extra_keys": true, "is_full": false, "proved": 1,
        "disproved": 2, "n_passed": 3, "n_unexplained": 4, "single": [blocks, [], blocks], "copied": none,
        "own": blocks, "parked": [],
    });
    serde_json::from_value(text).expect("the fields of an image")
}

fn snapshot() -> Snapshot {
    Snapshot {
        key: SourceKey { model: "Qwen/Qwen3-8B".into(), address: ([10, 0, 0, 1], 8000).into(), rank: 1 },
        overlap: Overlap { seq: SeqNo(7), digest: PayloadDigest::of(b"payload") },
        complete: true,
        image: image(&[1, 2, 0xff]),
    }
}

fn any_address() -> impl Strategy<Value = SocketAddr> {
    prop_oneof![any::<([u8; 4], u16)>().prop_map(SocketAddr::from), any::<([u8; 16], u16)>().prop_map(SocketAddr::from)]
}

prop_compose! {
    fn any_snapshot()(
        model in ".{0,40}", address in any_address(), rank: u32, seq: u64, digest: u128, complete: bool,
        blocks in prop::collection::vec(any::<u8>(), 0..50),
    ) -> Snapshot {
        Snapshot {
            key: SourceKey { model: model.into(), address, rank },
            overlap: Overlap { seq: SeqNo(seq), digest: PayloadDigest(digest) },
            complete,
            image: image(&blocks),
        }
    }
}

proptest! {
    #[test]
    fn what_is_encoded_is_decoded(snapshot in any_snapshot()) {
        let encoded = snapshot.encode();
        prop_assert_eq!(Snapshot::decode(&encoded).expect("our own snapshot"), snapshot);
    }

    #[test]
    fn a_changed_bit_is_an_error(snapshot in any_snapshot(), at: prop::sample::Index, bit in 0..8_u32) {
        let mut encoded = snapshot.encode();
        let at = at.index(encoded.len());
        encoded[at] ^= 1 << bit;
        prop_assert!(Snapshot::decode(&encoded).is_err());
    }

    #[test]
    fn a_body_of_anything_under_a_good_header_is_no_panic(body in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = Snapshot::decode(&with_header(&body));
    }
}

/// Bytes whose header is right about whatever follows.
fn with_header(body: &[u8]) -> Vec<u8> {
    let length = (body.len() as u64).to_le_bytes();
    [&MAGIC[..], &VERSION.to_le_bytes(), &length, &xxh3_128(body).to_le_bytes(), body].concat()
}

#[test]
fn every_truncation_and_every_addition_is_an_error() {
    let encoded = snapshot().encode();
    for n_bytes in 0..encoded.len() {
        assert!(Snapshot::decode(&encoded[..n_bytes]).is_err(), "{n_bytes} bytes of {}", encoded.len());
    }
    assert!(Snapshot::decode(&[&encoded[..], b"x"].concat()).is_err());
}

/// Another release decodes by position what this one wrote. Whoever changes the form raises [`VERSION`] as well.
#[test]
fn this_version_has_this_form() {
    assert_eq!((VERSION, xxh3_128(&snapshot().encode())), (1, 0xb56dee0baabb8d2246f004c0f669ba4a));
}

#[test]
fn lengths_that_a_body_only_claims_cost_no_memory() {
    // An array and a string that announce 2^32 - 1 items.
    for body in [&[0xdd, 0xff, 0xff, 0xff, 0xff][..], &[0x97, 0xdb, 0xff, 0xff, 0xff, 0xff]] {
        assert!(matches!(Snapshot::decode(&with_header(body)), Err(SnapshotError::Body(_))));
    }
}

#[test]
fn errors_name_what_was_found_and_what_was_expected() {
    let mut newer = snapshot().encode();
    newer[VERSION_AT] = 9;
    let mut damaged = snapshot().encode();
    *damaged.last_mut().expect("a body") ^= 1;
    let too_large = vec![0; MAX_ENCODED_BYTES + 1];
    for (encoded, text) in [
        (newer, "found a snapshot of version 9, expected 1"),
        (b"<html>".to_vec(), "found 6 bytes that are no snapshot, expected"),
        (damaged, "found a body with checksum "),
        (too_large, "found a snapshot of 268435457 bytes, expected at most 268435456"),
    ] {
        let error = Snapshot::decode(&encoded).expect_err(text).to_string();
        assert!(error.starts_with(text), "{error}");
    }
}

#[test]
fn a_snapshot_of_another_source_is_refused_with_both_names() {
    let snapshot = snapshot();
    let wanted = SourceKey { rank: 0, ..snapshot.key.clone() };
    let error = Snapshot::decode_of(&wanted, &snapshot.encode()).expect_err("another rank").to_string();
    assert_eq!(
        error,
        "found a snapshot of Qwen/Qwen3-8B 10.0.0.1:8000 rank 1, expected one of Qwen/Qwen3-8B 10.0.0.1:8000 rank 0"
    );
    assert_eq!(Snapshot::decode_of(&snapshot.key, &snapshot.encode()).expect("its own"), snapshot);
}
