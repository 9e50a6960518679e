//! `warmroute decode`: the events in a KV event payload.
//!
//! Reads `{"payload_hex": "…"}`, one msgpack batch. Writes
//! `{"ts", "rank", "events":
//! [{"type", "block_hashes":
//! [u64 low64], "parent": u64|null, "n_tokens", "block_size", "medium", "lora_name", "group_idx",
//! "extra_keys"}], "skipped":
//! n}`; fields that an event does not have are absent. In `extra_keys` a byte string is `{"hex":
//! "…"}`, and an item of an unknown form `{"msgpack_hex": "…"}`.

use std::io::{self, BufRead, Write};
use std::process::ExitCode;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::lines;
use crate::events::wire::{BlockKeys, BlockRemoved, BlockStored, EngineHash, Event, EventBatch, ExtraItem, ExtraKeys};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Question {
    payload_hex: String,
}

/// Runs the command.
///
/// # Errors
/// `input` cannot be read or `output` not be written.
pub fn run(input: impl BufRead, output: impl Write) -> io::Result<ExitCode> {
    lines::run(input, output, answer)
}

fn answer(line: &str) -> Result<Value, String> {
    let question: Question = serde_json::from_str(line).map_err(|error| error.to_string())?;
    let payload = hex::decode(&question.payload_hex).map_err(|error| format!("payload_hex is not hex: {error}"))?;
    let batch = EventBatch::decode(&payload).map_err(|error| error.to_string())?;
    Ok(batch_json(&batch))
}

fn batch_json(batch: &EventBatch<'_>) -> Value {
    let events: Vec<Value> = batch.events.iter().map(event_json).collect();
    json!({ "ts": batch.ts, "rank": batch.rank, "events": events, "skipped": batch.n_skipped })
}

fn event_json(event: &Event<'_>) -> Value {
    match event {
        Event::BlockStored(stored) => stored_json(stored),
        Event::BlockRemoved(removed) => removed_json(removed),
        Event::AllBlocksCleared => json!({ "type": "AllBlocksCleared" }),
        Event::TierBlocksCleared { medium } => {
            let mut fields = Fields::new("TierBlocksCleared");
            fields.put_some("medium", *medium);
            fields.0.into()
        }
    }
}

fn stored_json(stored: &BlockStored<'_>) -> Value {
    let mut fields = Fields::new("BlockStored");
    fields.put("block_hashes", low64s(&stored.block_hashes));
    fields.put("parent", stored.parent.map(|parent| parent.low64().0));
    fields.put("n_tokens", stored.token_ids.len());
    fields.put("block_size", stored.block_size);
    fields.put_some("medium", stored.medium);
    fields.put_some("lora_name", stored.lora_name);
    fields.put_some("group_idx", stored.group_idx);
    fields.put_some("extra_keys", stored.extra_keys.map(extra_keys_json));
    fields.0.into()
}

fn removed_json(removed: &BlockRemoved<'_>) -> Value {
    let mut fields = Fields::new("BlockRemoved");
    fields.put("block_hashes", low64s(&removed.block_hashes));
    fields.put_some("medium", removed.medium);
    fields.put_some("group_idx", removed.group_idx);
    fields.0.into()
}

struct Fields(Map<String, Value>);

impl Fields {
    fn new(kind: &str) -> Self {
        Self(Map::from_iter([("type".to_owned(), kind.into())]))
    }

    fn put(&mut self, name: &str, value: impl Into<Value>) {
        self.0.insert(name.to_owned(), value.into());
    }

    fn put_some(&mut self, name: &str, value: Option<impl Into<Value>>) {
        if let Some(value) = value {
            self.put(name, value);
        }
    }
}

fn low64s(hashes: &[EngineHash<'_>]) -> Vec<u64> {
    hashes.iter().map(|hash| hash.low64().0).collect()
}

/// A block without extra keys is null, as on the wire.
fn extra_keys_json(keys: ExtraKeys<'_>) -> Value {
    let block = |keys: BlockKeys<'_>| match keys.is_empty() {
        true => Value::Null,
        false => keys.iter().map(item_json).collect(),
    };
    keys.iter().map(block).collect()
}

fn item_json(item: ExtraItem<'_>) -> Value {
    match item {
        ExtraItem::Str(text) => json!(text),
        ExtraItem::Mm(identifier, offset) => json!([identifier, offset]),
        ExtraItem::Bytes(bytes) => json!({ "hex": hex::encode(bytes) }),
        ExtraItem::Other(raw) => json!({ "msgpack_hex": hex::encode(raw) }),
    }
}
