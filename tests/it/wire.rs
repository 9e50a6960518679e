//! Event batches as real engines, and the struct definitions of every release, encode them.

use serde_json::{Value, json};
use warmroute::events::wire::{BlockKeys, BlockRemoved, BlockStored, EngineHash, Event, EventBatch, ExtraItem};

use crate::captures::{captures, frames};

/// Fields of the array forms, and the ones that are compared.
const STORED: [&str; 11] = [
    "type",
    "block_hashes",
    "parent_block_hash",
    "token_ids",
    "block_size",
    "lora_id",
    "medium",
    "lora_name",
    "extra_keys",
    "group_idx",
    "kv_cache_spec_kind",
];
const REMOVED: [&str; 4] = ["type", "block_hashes", "medium", "group_idx"];

#[test]
fn every_recorded_batch_decodes_to_what_the_engine_meant() {
    let mut n_batches = 0;
    for capture in captures() {
        for scenario in &capture.scenarios {
            for (payload, decoded) in frames(scenario) {
                let batch = EventBatch::decode(&payload).unwrap();
                assert_eq!(batch.n_skipped, 0, "{:?} {}", capture.path, scenario["name"]);
                if !decoded.is_null() {
                    // serde_json may read a float one unit in the last place off.
                    assert!((batch.ts - decoded[0].as_f64().unwrap()).abs() < 1e-6);
                    assert_eq!(shown(&batch), normalized(decoded), "{:?} {}", capture.path, scenario["name"]);
                }
                n_batches += 1;
            }
        }
    }
    assert!(n_batches > 70, "only {n_batches} batches");
}

#[test]
fn every_release_since_0_9_2_decodes() {
    for release in legacy() {
        let payload = hex::decode(release["int_hashes_hex"].as_str().unwrap()).unwrap();
        let batch = EventBatch::decode(&payload).unwrap();
        assert_eq!(batch.n_skipped, 0, "{}", release["version"]);
        assert_eq!(shown(&batch), normalized(&release["decoded_int"]), "{}", release["version"]);
    }
}

#[test]
fn every_release_since_0_9_2_decodes_with_hashes_as_bytes() {
    let digest: Vec<u8> = (0..32).collect();
    let reversed: Vec<u8> = (0..32).rev().collect();
    let hash = |bytes: &[u8]| json!({ "hex": hex::encode(bytes) });
    for release in legacy() {
        let payload = hex::decode(release["bytes_hashes_hex"].as_str().unwrap()).unwrap();
        let batch = EventBatch::decode(&payload).unwrap();
        assert_eq!(batch.n_skipped, 0, "{}", release["version"]);

        let mut expected = normalized(&release["decoded_int"]);
        expected["events"][0]["block_hashes"] = json!([hash(&digest), hash(&reversed)]);
        expected["events"][0]["parent_block_hash"] = Value::Null;
        expected["events"][1]["block_hashes"] = json!([hash(&digest)]);
        assert_eq!(shown(&batch), expected, "{}", release["version"]);
    }
}

fn legacy() -> Vec<Value> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/legacy_wire-vllm-0.9.2-to-0.32.0.json");
    let releases: Vec<Value> = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    assert_eq!(releases.len(), 24);
    releases
}

/// What msgspec decoded, without the time, with the array forms turned into maps and fields that are absent into nulls.
fn normalized(decoded: &Value) -> Value {
    let events: Vec<Value> = decoded[1].as_array().unwrap().iter().map(normalized_event).collect();
    json!({ "rank": decoded[2], "events": events })
}

/// An event as a map, with the fields that are absent as nulls.
pub(crate) fn normalized_event(event: &Value) -> Value {
    let tag = event.get("type").unwrap_or(&event[0]);
    let names: &[&str] = match tag.as_str().unwrap() {
        "BlockStored" => &STORED,
        "BlockRemoved" => &REMOVED,
        _ => &["type"],
    };
    let value = |(idx, name): (usize, &&str)| {
        let value = if event.is_array() { event.get(idx) } else { event.get(*name) };
        ((*name).to_owned(), value.cloned().unwrap_or_default())
    };
    Value::Object(names.iter().enumerate().map(value).collect())
}

fn shown(batch: &EventBatch<'_>) -> Value {
    let events: Vec<Value> = batch.events.iter().map(shown_event).collect();
    json!({ "rank": batch.rank, "events": events })
}

fn shown_event(event: &Event<'_>) -> Value {
    match event {
        Event::BlockStored(stored) => shown_stored(stored),
        Event::BlockRemoved(BlockRemoved { block_hashes, medium, group_idx }) => json!({
            "type": "BlockRemoved",
            "block_hashes": block_hashes.iter().map(shown_hash).collect::<Vec<_>>(),
            "medium": medium,
            "group_idx": group_idx,
        }),
        Event::AllBlocksCleared => json!({ "type": "AllBlocksCleared" }),
        Event::TierBlocksCleared { medium } => json!({ "type": "TierBlocksCleared", "medium": medium }),
    }
}

fn shown_stored(stored: &BlockStored<'_>) -> Value {
    let block_keys = |keys: BlockKeys<'_>| match keys.is_empty() {
        true => Value::Null,
        false => keys.iter().map(shown_item).collect(),
    };
    json!({
        "type": "BlockStored",
        "block_hashes": stored.block_hashes.iter().map(shown_hash).collect::<Vec<_>>(),
        "parent_block_hash": stored.parent.as_ref().map(shown_hash),
        "token_ids": stored.token_ids.to_vec(),
        "block_size": stored.block_size,
        "lora_id": stored.lora_id,
        "medium": stored.medium,
        "lora_name": stored.lora_name,
        "extra_keys": stored.extra_keys.map(|keys| keys.iter().map(block_keys).collect::<Vec<_>>()),
        "group_idx": stored.group_idx,
        "kv_cache_spec_kind": stored.spec_kind,
    })
}

fn shown_hash(hash: &EngineHash<'_>) -> Value {
    match hash {
        EngineHash::Int(hash) => json!(hash),
        EngineHash::Bytes(digest) => json!({ "hex": hex::encode(digest) }),
    }
}

fn shown_item(item: ExtraItem<'_>) -> Value {
    match item {
        ExtraItem::Str(text) => json!(text),
        ExtraItem::Mm(identifier, offset) => json!([identifier, offset]),
        ExtraItem::Bytes(digest) => json!({ "hex": hex::encode(digest) }),
        ExtraItem::Other(raw) => json!({ "msgpack_hex": hex::encode(raw) }),
    }
}
