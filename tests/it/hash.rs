//! Block hashes against the engine's own output.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use serde_json::Value;
use warmroute::events::wire::{BlockStored, EngineHash, Event, EventBatch, ExtraItem};
use warmroute::routing::hash::{BlockHash, BlockHasher, BlockSize, Digest, HashAlgorithm, Key, MmItem, Scope};

use crate::captures::{Capture, captures, frames};

/// Path from which the recorded engines loaded their adapters; it is hashed, but no event carries it.
const LORA_PATH: &str = "model/lora-a";

fn vectors() -> Value {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/hash_vectors-vllm-0.32.0.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn entries<'a>(vectors: &'a Value, name: &str) -> &'a Vec<Value> {
    let entries = vectors[name].as_array().unwrap();
    assert!(!entries.is_empty(), "{name}");
    entries
}

fn hasher(entry: &Value) -> BlockHasher {
    let algorithm: HashAlgorithm = entry["algo"].as_str().unwrap().parse().unwrap();
    // The resolved seed says what a random root was drawn as.
    let seed = entry["resolved_seed"].as_str().or(entry["pythonhashseed"].as_str());
    BlockHasher::new(algorithm, seed).unwrap()
}

fn tokens(list: &Value) -> Vec<u32> {
    serde_json::from_value(list.clone()).unwrap()
}

/// Tagged tuples: lists are tuples, `{"hex": …}` is a byte string.
fn key(value: &Value) -> Key {
    match value {
        Value::Null => Key::None,
        Value::Number(number) => Key::Int(number.as_i64().unwrap()),
        Value::String(text) => Key::Str(text.as_str().into()),
        Value::Array(items) => Key::Tuple(items.iter().map(key).collect()),
        Value::Object(bytes) => Key::Bytes(hex::decode(bytes["hex"].as_str().unwrap()).unwrap().into()),
        Value::Bool(_) => panic!("no vector has a boolean"),
    }
}

fn keys(value: &Value) -> Vec<Key> {
    value.as_array().map(|items| items.iter().map(key).collect()).unwrap_or_default()
}

fn mm_items(features: &Value) -> Vec<MmItem> {
    let item = |feature: &Value| MmItem {
        identifier: feature["identifier"].as_str().unwrap().into(),
        offset: feature["offset"].as_u64().unwrap() as u32,
        n_tokens: feature["length"].as_u64().unwrap() as u32,
    };
    features.as_array().into_iter().flatten().map(item).collect()
}

fn assert_digests(digests: &[Digest], entry: &Value) {
    let hex: Vec<String> = digests.iter().map(ToString::to_string).collect();
    let low64: Vec<u64> = digests.iter().map(|digest| digest.low64().0).collect();
    assert_eq!(serde_json::json!(hex), entry["block_hashes_hex"], "{} {}", entry["algo"], entry["name"]);
    assert_eq!(serde_json::json!(low64), entry["low64"]);
}

#[test]
fn roots_equal_the_engines() {
    for entry in entries(&vectors(), "none_hash") {
        assert_eq!(hasher(entry).root().to_string(), entry["none_hash_hex"].as_str().unwrap(), "{entry}");
        if entry["pythonhashseed"].is_null() {
            let algorithm: HashAlgorithm = entry["algo"].as_str().unwrap().parse().unwrap();
            let unset = BlockHasher::new(algorithm, None);
            assert_eq!(unset.is_err(), entry["algo"].as_str().unwrap().starts_with("xxhash"), "{entry}");
        }
    }
}

#[test]
fn serialized_blocks_equal_the_engines_to_the_byte() {
    for entry in entries(&vectors(), "first_block_serialization") {
        let hasher = BlockHasher::new(entry["algo"].as_str().unwrap().parse().unwrap(), Some("0")).unwrap();
        let parent = Digest::from_bytes(&hex::decode(entry["parent_hex"].as_str().unwrap()).unwrap()).unwrap();
        let (tokens, extra) = (tokens(&entry["tokens"]), keys(&entry["extra_keys"]));
        assert_eq!(hex::encode(hasher.serialize(&parent, &tokens, &extra)), entry["serialized_hex"].as_str().unwrap());
        assert_eq!(hasher.block(&parent, &tokens, &extra).to_string(), entry["hash_hex"].as_str().unwrap());
    }
}

#[test]
fn chains_equal_the_engines() {
    let vectors = vectors();
    for entry in entries(&vectors, "chains") {
        let hasher = hasher(entry);
        let tokens = tokens(&vectors["token_lists"][entry["tokens"].as_str().unwrap()]);
        let block_size = BlockSize::new(entry["block_size"].as_u64().unwrap() as u32).unwrap();
        assert_digests(&hasher.chain(hasher.root(), &tokens, block_size, |_| Vec::new()), entry);
    }
}

#[test]
fn requests_with_every_kind_of_extra_key_equal_the_engines() {
    for entry in entries(&vectors(), "requests") {
        let hasher = hasher(entry);
        let tokens = tokens(&entry["token_ids"]);
        let block_size = BlockSize::new(entry["block_size"].as_u64().unwrap() as u32).unwrap();
        let extra = |block_idx: usize| keys(&entry["hash_extra_keys"][block_idx]);
        assert_digests(&hasher.chain(hasher.root(), &tokens, block_size, extra), entry);
    }
}

#[test]
fn a_requests_scope_makes_the_engines_extra_keys() {
    let (mut n_text, mut n_mm) = (0, 0);
    for entry in entries(&vectors(), "requests") {
        let name = entry["name"].as_str().unwrap();
        if name.starts_with("prompt_embeds") {
            continue;
        }
        let text = |value: &Value| -> Arc<str> { value.as_str().unwrap().into() };
        let lora = &entry["lora"];
        let mm = mm_items(&entry["mm_features"]);
        *(if mm.is_empty() { &mut n_text } else { &mut n_mm }) += 1;
        let scope = Scope {
            adapter: lora.is_array().then(|| (text(&lora[0]), text(&lora[1]))),
            cache_salt: entry["cache_salt"].is_string().then(|| text(&entry["cache_salt"])),
            mm,
        };
        let block_size = BlockSize::new(entry["block_size"].as_u64().unwrap() as u32).unwrap();
        let tokens = tokens(&entry["token_ids"]);
        for block_idx in 0..tokens.len() / block_size.get() as usize {
            assert_eq!(scope.keys(block_idx, block_size), keys(&entry["hash_extra_keys"][block_idx]), "{name}");
        }
        let hashes = hasher(entry).scoped_chain(&tokens, block_size, &scope);
        let low64: Vec<u64> = hashes.iter().map(|hash| hash.0).collect();
        assert_eq!(serde_json::json!(low64), entry["low64"], "{} {name}", entry["algo"]);
    }
    assert!(n_text > 20, "only {n_text} requests are plain, salted or of an adapter");
    assert!(n_mm > 10, "only {n_mm} requests have multimodal items");
}

#[test]
fn every_recorded_block_is_derived_from_its_tokens() {
    let mut n_blocks = 0;
    for capture in captures() {
        let Some(hasher) = recorded_hasher(&capture) else { continue };
        let derived = derive(&capture, &hasher);
        n_blocks += derived.len();
        assert_prompts_announced(&capture, &hasher, &derived);
    }
    assert!(n_blocks > 150, "only {n_blocks} blocks");
}

/// None if the engine drew its root at random.
fn recorded_hasher(capture: &Capture) -> Option<BlockHasher> {
    let algorithm: HashAlgorithm = capture.meta["algo"].as_str().unwrap().parse().unwrap();
    let seed = capture.meta["pythonhashseed"].as_str().filter(|seed| *seed != "unset");
    let hasher = BlockHasher::new(algorithm, seed);
    assert_eq!(hasher.is_err(), capture.path.to_str().unwrap().contains("xxhash_cbor-noseed"), "{:?}", capture.path);
    hasher.ok()
}

/// Recomputes every announced block; the digests by their low 64 bits.
fn derive(capture: &Capture, hasher: &BlockHasher) -> HashMap<BlockHash, Digest> {
    let (mut derived, mut sparse) = (HashMap::new(), HashSet::new());
    for scenario in &capture.scenarios {
        for (payload, _) in frames(scenario) {
            for event in &EventBatch::decode(&payload).unwrap().events {
                let Event::BlockStored(stored) = event else { continue };
                if stored.token_ids.len() == stored.block_hashes.len() * stored.block_size as usize {
                    derive_event(capture, hasher, stored, &mut derived);
                } else {
                    sparse.extend(stored.block_hashes.iter().map(|hash| hash.low64()));
                }
            }
        }
    }
    // A sliding-window group tells a part of the blocks of its tokens; the other group tells all of them.
    assert!(sparse.iter().all(|hash| derived.contains_key(hash)), "{:?}", capture.path);
    assert_eq!(!sparse.is_empty(), capture.path.to_str().unwrap().contains("hybrid"), "{:?}", capture.path);
    derived
}

fn derive_event(
    capture: &Capture,
    hasher: &BlockHasher,
    stored: &BlockStored<'_>,
    derived: &mut HashMap<BlockHash, Digest>,
) {
    let mut parent = stored.parent.map_or(hasher.root(), |parent| derived[&parent.low64()]);
    let tokens = stored.token_ids.to_vec();
    for (block_idx, block) in tokens.chunks_exact(stored.block_size as usize).enumerate() {
        let items: Vec<_> = stored.extra_keys.unwrap().iter().nth(block_idx).unwrap().iter().collect();
        parent = hasher.block(&parent, block, &hashed_keys(&items, stored.lora_name, capture.version() >= (0, 31)));
        let announced = stored.block_hashes[block_idx];
        assert_eq!(announced.low64(), parent.low64(), "{:?}", capture.path);
        if let EngineHash::Bytes(digest) = announced {
            assert_eq!(digest, parent.as_bytes(), "{:?}", capture.path);
        }
        derived.insert(parent.low64(), parent);
    }
}

/// What was hashed for the untagged items of an event: the items themselves before vLLM 0.31, tagged tuples since.
fn hashed_keys(items: &[ExtraItem<'_>], lora_name: Option<&str>, is_tagged: bool) -> Vec<Key> {
    let hashed = |(item_idx, item): (usize, &ExtraItem<'_>)| match *item {
        ExtraItem::Str(text) if !is_tagged => Key::Str(text.into()),
        ExtraItem::Mm(identifier, offset) if !is_tagged => {
            Key::Tuple(vec![Key::Str(identifier.into()), Key::Int(offset)])
        }
        ExtraItem::Bytes(digest) if !is_tagged => Key::Bytes(digest.into()),
        ExtraItem::Str(name) if item_idx == 0 && lora_name.is_some() => Key::lora(&name.into(), &LORA_PATH.into()),
        ExtraItem::Str(salt) => Key::cache_salt(&salt.into()),
        ExtraItem::Mm(identifier, offset) => Key::mm(identifier, offset),
        ExtraItem::Bytes(digest) => Key::prompt_embeds(digest),
        ExtraItem::Other(raw) => panic!("no recording has {raw:?}"),
    };
    items.iter().enumerate().map(hashed).collect()
}

/// The router's view of the same prompts, from the request alone, is among the announced blocks.
fn assert_prompts_announced(capture: &Capture, hasher: &BlockHasher, derived: &HashMap<BlockHash, Digest>) {
    let block_size = BlockSize::new(capture.meta["block_size"].as_u64().unwrap() as u32).unwrap();
    for scenario in &capture.scenarios {
        let body = &scenario["request"]["body"];
        let salt = body["cache_salt"].as_str();
        // Before vLLM 0.31 a salt was hashed untagged.
        let is_ours = salt.is_none() || capture.version() >= (0, 31);
        if body["model"] != "tiny" || !body["prompt_embeds"].is_null() || !is_ours {
            continue;
        }
        let scope = Scope { cache_salt: salt.map(Arc::from), ..Scope::default() };
        for prompt in scenario["prompt_token_ids"].as_array().into_iter().flatten() {
            let hashes = hasher.scoped_chain(&tokens(prompt), block_size, &scope);
            assert!(hashes.iter().all(|hash| derived.contains_key(hash)), "{:?} {}", capture.path, scenario["name"]);
        }
    }
}
