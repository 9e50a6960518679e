use proptest::prelude::*;
use serde::{Serialize, Serializer};

use super::msgpack::{MAX_DEPTH, MAX_ITEMS};
use super::*;

/// rmp-serde is the reference encoder: it shares no code with the decoder.
#[derive(Clone, Debug)]
enum Hash {
    Int(u64),
    Bytes(Vec<u8>),
}

impl Serialize for Hash {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Int(hash) => serializer.serialize_u64(*hash),
            Self::Bytes(digest) => serializer.serialize_bytes(digest),
        }
    }
}

impl Hash {
    fn as_engine_hash(&self) -> EngineHash<'_> {
        match self {
            Self::Int(hash) => EngineHash::Int(*hash),
            Self::Bytes(digest) => EngineHash::Bytes(digest),
        }
    }
}

#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
enum Item {
    Str(String),
    Mm(String, i64),
    Digest(#[serde(serialize_with = "serialize_bytes")] Vec<u8>),
}

fn serialize_bytes<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_bytes(bytes)
}

impl Item {
    fn as_extra_item(&self) -> ExtraItem<'_> {
        match self {
            Self::Str(text) => ExtraItem::Str(text),
            Self::Mm(identifier, offset) => ExtraItem::Mm(identifier, *offset),
            Self::Digest(digest) => ExtraItem::Bytes(digest),
        }
    }
}

#[derive(Clone, Debug, Serialize)]
struct Stored {
    #[serde(rename = "type")]
    tag: &'static str,
    block_hashes: Vec<Hash>,
    parent_block_hash: Option<Hash>,
    token_ids: Vec<u32>,
    block_size: u32,
    lora_id: Option<u64>,
    medium: Option<String>,
    lora_name: Option<String>,
    extra_keys: Option<Vec<Option<Vec<Item>>>>,
    group_idx: Option<u32>,
    kv_cache_spec_kind: Option<String>,
    kv_cache_spec_sliding_window: Option<u32>,
    field_of_tomorrow: Vec<Vec<Option<bool>>>,
}

#[derive(Clone, Debug, Serialize)]
struct Batch {
    ts: f64,
    events: Vec<Stored>,
    data_parallel_rank: Option<u32>,
}

fn hash() -> impl Strategy<Value = Hash> {
    prop_oneof![any::<u64>().prop_map(Hash::Int), prop::collection::vec(any::<u8>(), 32).prop_map(Hash::Bytes)]
}

fn item() -> impl Strategy<Value = Item> {
    prop_oneof![
        ".{0,40}".prop_map(Item::Str),
        (".{0,40}", any::<i64>()).prop_map(|(identifier, offset)| Item::Mm(identifier, offset)),
        prop::collection::vec(any::<u8>(), 0..300).prop_map(Item::Digest),
    ]
}

fn token_id() -> impl Strategy<Value = u32> {
    prop_oneof![0..200_u32, 0..70_000_u32, any::<u32>()]
}

prop_compose! {
    fn stored()(
        block_hashes in prop::collection::vec(hash(), 0..20),
        parent_block_hash in prop::option::of(hash()),
        token_ids in prop::collection::vec(token_id(), 0..300),
        (block_size, group_idx, lora_id) in (any::<u32>(), any::<Option<u32>>(), any::<Option<u64>>()),
        medium in prop::option::of("GPU|CPU|STORAGE"),
        lora_name in prop::option::of(".{0,40}"),
        extra_keys in prop::option::of(prop::collection::vec(prop::option::of(prop::collection::vec(item(), 1..4)), 0..4)),
        kv_cache_spec_kind in prop::option::of("[a-z_]{0,20}"),
        kv_cache_spec_sliding_window in any::<Option<u32>>(),
        field_of_tomorrow in prop::collection::vec(prop::collection::vec(any::<Option<bool>>(), 0..3), 0..3),
    ) -> Stored {
        Stored {
            tag: "BlockStored", block_hashes, parent_block_hash, token_ids, block_size, lora_id, medium, lora_name,
            extra_keys, group_idx, kv_cache_spec_kind, kv_cache_spec_sliding_window, field_of_tomorrow,
        }
    }
}

prop_compose! {
    fn batch()(
        ts in 0.0..4e9_f64,
        events in prop::collection::vec(stored(), 0..4),
        data_parallel_rank in any::<Option<u32>>(),
    ) -> Batch {
        Batch { ts, events, data_parallel_rank }
    }
}

fn items(block: &Option<Vec<Item>>) -> Vec<ExtraItem<'_>> {
    block.iter().flatten().map(Item::as_extra_item).collect()
}

fn assert_stored(event: &Event<'_>, expected: &Stored) {
    let Event::BlockStored(stored) = event else { panic!("{event:?}") };
    let hashes: Vec<_> = expected.block_hashes.iter().map(Hash::as_engine_hash).collect();
    assert_eq!(stored.block_hashes, hashes);
    assert_eq!(stored.parent, expected.parent_block_hash.as_ref().map(Hash::as_engine_hash));
    assert_eq!(stored.token_ids.to_vec(), expected.token_ids);
    assert_eq!(stored.token_ids.len(), expected.token_ids.len());
    assert_eq!((stored.block_size, stored.group_idx), (expected.block_size, expected.group_idx));
    assert_eq!((stored.lora_id, stored.lora_name), (expected.lora_id, expected.lora_name.as_deref()));
    assert_eq!(stored.medium, expected.medium.as_deref());
    assert_eq!(stored.spec_kind, expected.kv_cache_spec_kind.as_deref());
    let keys = expected.extra_keys.as_ref().map(|keys| keys.iter().map(items).collect::<Vec<_>>());
    assert_eq!(stored.extra_keys.map(shown_keys), keys);
}

fn shown_keys(keys: ExtraKeys<'_>) -> Vec<Vec<ExtraItem<'_>>> {
    keys.iter().map(|block| block.iter().collect()).collect()
}

proptest! {
    #[test]
    fn whatever_the_reference_encodes_is_decoded(batch in batch()) {
        // Arrays in an array, maps in a map: msgspec's and one main-branch commit's choices.
        for payload in [rmp_serde::to_vec(&batch).unwrap(), rmp_serde::to_vec_named(&batch).unwrap()] {
            let decoded = EventBatch::decode(&payload).unwrap();
            prop_assert_eq!((decoded.ts, decoded.rank, decoded.n_skipped), (batch.ts, batch.data_parallel_rank, 0));
            prop_assert_eq!(decoded.events.len(), batch.events.len());
            decoded.events.iter().zip(&batch.events).for_each(|(event, expected)| assert_stored(event, expected));
        }
    }

    #[test]
    fn every_proper_prefix_is_an_error(batch in batch()) {
        let payload = rmp_serde::to_vec_named(&batch).unwrap();
        for len in 0..payload.len() {
            prop_assert!(EventBatch::decode(&payload[..len]).is_err(), "of {} bytes", len);
        }
    }

    #[test]
    fn damaged_bytes_never_panic(batch in batch(), flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
        let mut payload = rmp_serde::to_vec_named(&batch).unwrap();
        for (position, byte) in flips {
            let position = position.index(payload.len());
            payload[position] = byte;
        }
        if let Ok(batch) = EventBatch::decode(&payload) {
            prop_assert!(read_all(&batch) <= payload.len());
        }
    }

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let as_batch = [&[0x92, 0xca, 0, 0, 0, 0, 0x94], bytes.as_slice()].concat();
        for payload in [bytes, as_batch] {
            if let Ok(batch) = EventBatch::decode(&payload) {
                prop_assert!(read_all(&batch) <= payload.len());
            }
        }
    }
}

/// Number of hashes and token ids, each of them read.
fn read_all(batch: &EventBatch<'_>) -> usize {
    let read = |event: &Event<'_>| match event {
        Event::BlockStored(stored) => {
            let n_items = stored.extra_keys.into_iter().flat_map(shown_keys).map(|items| items.len()).sum::<usize>();
            stored.block_hashes.len() + stored.token_ids.to_vec().len() + n_items
        }
        Event::BlockRemoved(removed) => removed.block_hashes.iter().map(EngineHash::low64).count(),
        Event::AllBlocksCleared | Event::TierBlocksCleared { .. } => 0,
    };
    batch.events.iter().map(read).sum()
}

/// `[1.5, [event…], 0]`
fn payload(events: &[&[u8]]) -> Vec<u8> {
    let mut payload = vec![0x93, 0xca, 0x3f, 0xc0, 0, 0, 0x90 | events.len() as u8];
    payload.extend(events.concat());
    payload.push(0);
    payload
}

fn encode(value: impl Serialize) -> Vec<u8> {
    rmp_serde::to_vec_named(&value).unwrap()
}

fn removed() -> Vec<u8> {
    encode(("BlockRemoved", [7]))
}

/// A value inside `n_arrays` arrays.
fn nested(n_arrays: usize) -> Vec<u8> {
    [vec![0x91; n_arrays], vec![0xc0]].concat()
}

#[test]
fn event_that_is_not_as_the_format_says_costs_only_itself() {
    let stored = |hashes: Vec<u8>, parent: Vec<u8>, tokens: Vec<u8>, block_size: Vec<u8>| {
        [vec![0x95], encode("BlockStored"), hashes, parent, tokens, block_size].concat()
    };
    let (hashes, nil, tokens, size) = (encode([1]), encode(()), encode([1, 2]), encode(2));
    assert_eq!(
        EventBatch::decode(&payload(&[&stored(hashes.clone(), nil.clone(), tokens.clone(), size.clone())]))
            .unwrap()
            .n_skipped,
        0
    );

    let unfit: Vec<(&str, Vec<u8>)> = vec![
        ("unknown tag", encode(("BlockMoved", [7], "GPU"))),
        ("no tag", encode(Vec::<u8>::new())),
        ("tag of another type", encode((1, 2))),
        ("map without a tag", vec![0x81, 0xa1, b'x', 1]),
        ("neither array nor map", encode("BlockRemoved")),
        ("nil", nil.clone()),
        ("extension", vec![0xd6, 1, 0, 0, 0, 0]),
        ("required field missing", encode(("BlockStored", [1], (), [1, 2]))),
        ("hashes missing", encode(("BlockRemoved",))),
        ("hashes nil", stored(nil.clone(), nil.clone(), tokens.clone(), size.clone())),
        ("hash a string", stored(encode(["x"]), nil.clone(), tokens.clone(), size.clone())),
        (
            "hash of 7 bytes",
            stored(vec![0x91, 0xc4, 7, 0, 0, 0, 0, 0, 0, 0], nil.clone(), tokens.clone(), size.clone()),
        ),
        ("parent a list", stored(hashes.clone(), encode([1]), tokens.clone(), size.clone())),
        ("token id negative", stored(hashes.clone(), nil.clone(), encode([-1]), size.clone())),
        ("token id above 32 bits", stored(hashes.clone(), nil.clone(), encode([1_u64 << 32]), size.clone())),
        ("token ids a map", stored(hashes.clone(), nil.clone(), vec![0x81, 1, 2], size.clone())),
        ("block size nil", stored(hashes.clone(), nil.clone(), tokens.clone(), nil.clone())),
        ("medium a number", encode(("BlockRemoved", [1], 3))),
        ("medium not UTF-8", [vec![0x93], encode("BlockRemoved"), encode([1]), vec![0xa1, 0xff]].concat()),
    ];
    for (what, event) in unfit {
        let payload = payload(&[&removed(), &event, &removed()]);
        let batch = EventBatch::decode(&payload).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!((batch.events.len(), batch.n_skipped, batch.rank), (2, 1, Some(0)), "{what}");
    }
}

/// As msgspec writes SGLang's structs.
#[test]
fn batches_of_sglang_decode() {
    let stored = encode(("BlockStored", [-5_i64, 7, i64::MIN], -6_i64, [1, 2, 3, 4, 5, 6], 2, ()));
    let stored_on_cpu = encode(("BlockStored", [8], (), [1, 2], 2, (), "CPU_PINNED"));
    let removed = encode(("BlockRemoved", [-5_i64]));
    let payload = payload(&[&stored, &stored_on_cpu, &removed, &encode(("AllBlocksCleared",))]);
    let batch = EventBatch::decode(&payload).unwrap();
    assert_eq!(batch.n_skipped, 0);
    let [Event::BlockStored(stored), Event::BlockStored(on_cpu), Event::BlockRemoved(removed), Event::AllBlocksCleared] =
        batch.events.as_slice()
    else {
        panic!("{batch:?}")
    };
    assert_eq!(stored.block_hashes, [u64::MAX - 4, 7, 1 << 63].map(EngineHash::Int));
    assert_eq!(stored.parent, Some(EngineHash::Int(u64::MAX - 5)));
    assert_eq!(on_cpu.medium, Some("CPU_PINNED"));
    assert_eq!(removed.block_hashes, [EngineHash::Int(u64::MAX - 4)]);
}

/// `{"type": "TierBlocksCleared", "medium": "GPU"}`, as vLLM's own test pins it.
#[test]
fn clearing_of_one_tier_decodes() {
    let event = [vec![0x82], encode("type"), encode("TierBlocksCleared"), encode("medium"), encode("GPU")].concat();
    let payload = payload(&[&event]);
    let batch = EventBatch::decode(&payload).unwrap();
    assert!(matches!(batch.events[..], [Event::TierBlocksCleared { medium: Some("GPU") }]), "{batch:?}");
}

#[test]
fn extra_keys_of_unknown_form_are_kept_as_they_are() {
    let keys = (("a", 5, ("mm", "image", 3)), (), [("image", -2)]);
    let event = encode(("BlockStored", [1, 2, 3], (), [1, 2, 3], 1, (), "GPU", (), keys));
    let payload = payload(&[&event]);
    let batch = EventBatch::decode(&payload).unwrap();
    let [Event::BlockStored(stored)] = batch.events.as_slice() else { panic!("{batch:?}") };
    let tagged = encode(("mm", "image", 3));
    let expected = vec![
        vec![ExtraItem::Str("a"), ExtraItem::Other(&[5]), ExtraItem::Other(&tagged)],
        vec![],
        vec![ExtraItem::Mm("image", -2)],
    ];
    assert_eq!(stored.extra_keys.map(shown_keys), Some(expected));
}

#[test]
fn batch_of_more_parts_than_an_engine_makes_is_an_error() {
    let hashes = |n| encode(("BlockRemoved", vec![1; n]));
    let error = |events: &[&[u8]]| EventBatch::decode(&payload(events)).expect_err("too many parts");
    let (most, half) = (MAX_ITEMS, MAX_ITEMS / 2);
    assert_eq!(EventBatch::decode(&payload(&[&hashes(half), &hashes(half)])).unwrap().n_skipped, 0);
    assert!(matches!(
        error(&[&hashes(half), &hashes(half + 1)]),
        WireError::Items { what: "hashes and extra keys", .. }
    ));
    let keys = encode(("BlockStored", [1], (), [1], 1, (), "GPU", (), vec![(); most]));
    assert!(matches!(error(&[&keys]), WireError::Items { .. }));
    // What an event that is skipped has made us read counts as well.
    let unfit = encode(("BlockRemoved", vec![1; half + 1], 5));
    assert!(matches!(error(&[&unfit, &unfit]), WireError::Items { .. }));

    let mut many = vec![0x92, 1, 0xdd];
    many.extend((MAX_EVENTS as u32 + 1).to_be_bytes());
    many.extend(std::iter::repeat_n([0x91, 0xa0], MAX_EVENTS + 1).flatten());
    assert_eq!(
        EventBatch::decode(&many).expect_err("too many events").to_string(),
        "event batch has more than 65536 events at byte 2"
    );
}

#[test]
fn map_without_a_parent_is_not_a_root() {
    #[derive(Serialize)]
    struct Orphan {
        r#type: &'static str,
        block_hashes: [u64; 1],
        token_ids: [u32; 2],
        block_size: u32,
    }
    let event = encode(Orphan { r#type: "BlockStored", block_hashes: [1], token_ids: [1, 2], block_size: 2 });
    assert_eq!(EventBatch::decode(&payload(&[&event])).unwrap().n_skipped, 1);
}

#[test]
fn fields_may_come_in_any_order_and_under_unknown_names() {
    #[derive(Serialize)]
    struct Shuffled {
        later: [[u8; 2]; 2],
        block_hashes: [u64; 1],
        r#type: &'static str,
    }
    let event = encode(Shuffled { later: [[1, 2], [3, 4]], block_hashes: [u64::MAX], r#type: "BlockRemoved" });
    let payload = payload(&[&event]);
    let batch = EventBatch::decode(&payload).unwrap();
    let [Event::BlockRemoved(removed)] = batch.events.as_slice() else { panic!("{batch:?}") };
    assert_eq!(removed.block_hashes, [EngineHash::Int(u64::MAX)]);

    // {1: 2, "type": "AllBlocksCleared"}
    let cleared = [vec![0x82, 1, 2], encode("type"), encode("AllBlocksCleared")].concat();
    let batch = [vec![0x92, 1, 0x91], cleared].concat();
    let batch = EventBatch::decode(&batch).unwrap();
    assert!(matches!(batch.events[..], [Event::AllBlocksCleared]), "{batch:?}");
}

#[test]
fn rank_may_be_absent_nil_signed_or_nonsense() {
    let with_rank = |rank: &[u8]| [&[0x93, 1, 0x90], rank].concat();
    assert_eq!(EventBatch::decode(&[0x92, 1, 0x90]).unwrap().rank, None);
    assert_eq!(EventBatch::decode(&with_rank(&[0xc0])).unwrap().rank, None);
    assert_eq!(EventBatch::decode(&with_rank(&[0xd2, 0, 0, 0, 9])).unwrap().rank, Some(9));
    assert_eq!(EventBatch::decode(&with_rank(&[0xff])).unwrap().rank, None);
    assert_eq!(EventBatch::decode(&with_rank(&encode(["x"]))).unwrap().rank, None);
    assert_eq!(EventBatch::decode(&[0x94, 1, 0x90, 3, 0xc3]).unwrap().rank, Some(3), "later fields are ignored");
}

#[test]
fn what_is_no_batch_is_an_error_that_says_where() {
    let error = |payload: &[u8]| EventBatch::decode(payload).expect_err("no batch");
    let unexpected = |offset, found, expected| WireError::Unexpected { offset, found, expected };
    assert_eq!(error(&[]), WireError::Truncated { offset: 0, expected: "a value" });
    assert_eq!(error(&[0xc0]), unexpected(0, "nil", "an array or a map"));
    assert_eq!(error(&[0x90]), WireError::Missing { n_fields: 0, expected: "ts" });
    assert_eq!(error(&[0x91, 1]), WireError::Missing { n_fields: 1, expected: "events" });
    assert_eq!(error(&[0x92, 0xa1, b'x', 0x90]), unexpected(1, "a string", "a float"));
    assert_eq!(error(&[0x92, 1, 0x80]), unexpected(2, "a map", "an array of events"));
    assert_eq!(error(&[0x92, 1, 0x91, 0xc1]), unexpected(3, "the unused marker", "a value"));
    assert_eq!(error(&[0x92, 1, 0x90, 0xc0, 0xc0]), WireError::Trailing { offset: 3, n_bytes: 2 });
    let message = "byte string of length 9 at byte 3 of an event batch, expected at most 1 more bytes";
    assert_eq!(error(&[0x92, 1, 0x91, 0xc4, 9, 0]).to_string(), message);
}

#[test]
fn declared_lengths_are_held_against_the_bytes_that_are_left() {
    let huge: [(&str, &[u8]); 6] = [
        ("array", &[0xdd, 0xff, 0xff, 0xff, 0xff]),
        ("map", &[0xdf, 0xff, 0xff, 0xff, 0xff]),
        ("string", &[0xdb, 0xff, 0xff, 0xff, 0xff]),
        ("byte string", &[0xc6, 0xff, 0xff, 0xff, 0xff]),
        ("extension", &[0xc9, 0xff, 0xff, 0xff, 0xff, 0]),
        ("array", &[0xdc, 0xff, 0xff]),
    ];
    for (name, value) in huge {
        let stored = [&[0x95], encode("BlockStored").as_slice(), value].concat();
        let places =
            [value.to_vec(), [&[0x92, 1], value].concat(), [&[0x92, 1, 0x91], value].concat(), payload(&[&stored])];
        for payload in places {
            let error = EventBatch::decode(&payload).expect_err("a length beyond the payload");
            assert!(matches!(error, WireError::Length { what, found: 65_535.., .. } if what == name), "{error}");
        }
    }
}

#[test]
fn nesting_beyond_the_limit_is_an_error_and_up_to_it_is_skipped() {
    let depth_of_event = EVENT_DEPTH as usize;
    let deepest = MAX_DEPTH as usize - depth_of_event;
    assert_eq!(EventBatch::decode(&payload(&[&nested(deepest)])).unwrap().n_skipped, 1);
    let error = EventBatch::decode(&payload(&[&nested(deepest + 1)])).expect_err("too deep");
    assert_eq!(error, WireError::Depth { offset: 7 + deepest + 1 });
    // A million levels must not touch the stack.
    assert!(EventBatch::decode(&payload(&[&nested(1_000_000)])).is_err());
    let later_field = [vec![0x95], encode("BlockRemoved"), encode([7]), vec![0xc0, 0xc0], nested(deepest - 1)].concat();
    assert_eq!(EventBatch::decode(&payload(&[&later_field])).unwrap().events.len(), 1);
}

#[test]
fn low64_is_the_last_eight_bytes() {
    assert_eq!(EngineHash::Int(u64::MAX).low64(), BlockHash(u64::MAX));
    let digest: Vec<u8> = (0..32).collect();
    assert_eq!(EngineHash::Bytes(&digest).low64(), BlockHash(0x1819_1a1b_1c1d_1e1f));
    assert_eq!(EngineHash::Bytes(&digest[..16]).low64(), BlockHash(0x0809_0a0b_0c0d_0e0f));
    assert_eq!(EngineHash::Bytes(&[1, 2]).low64(), BlockHash(0x0102));
}
