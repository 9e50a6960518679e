//! `warmroute hash`: vLLM's block hashes of token ids.
//!
//! Reads `{"algo", "pythonhashseed": str|null, "block_size", "token_ids": [...], "cache_salt": str|null,
//! "lora": [name, path]|null, "mm": [[identifier, offset, n_tokens]…], "extra_keys":
//! null|[per block: null|[tagged tuples]]}`. In `extra_keys` a list is a tuple and `{"hex":
//! "…"}` a byte string; when given, it replaces `cache_salt`, `lora` and `mm`. Writes `{"block_hashes": ["hex"...],
//! "low64": [u64...]}`, one entry per full block.

use std::io::{self, BufRead, Write};
use std::process::ExitCode;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Value, json};

use super::lines;
use crate::routing::hash::{BlockHasher, BlockSize, Digest, HashAlgorithm, Key, MmItem, Scope};

/// Deepest nesting of a tuple in `extra_keys`; vLLM's own have two levels.
const MAX_DEPTH: usize = 16;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Question {
    algo: String,
    pythonhashseed: Option<String>,
    block_size: u32,
    token_ids: Vec<u32>,
    cache_salt: Option<Arc<str>>,
    lora: Option<(Arc<str>, Arc<str>)>,
    #[serde(default)]
    mm: Vec<(Arc<str>, u32, u32)>,
    extra_keys: Option<Vec<Option<Vec<Value>>>>,
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
    let algorithm: HashAlgorithm = question.algo.parse().map_err(describe)?;
    let hasher = BlockHasher::new(algorithm, question.pythonhashseed.as_deref()).map_err(describe)?;
    let block_size = BlockSize::new(question.block_size).ok_or("block_size is 0, expected at least 1")?;
    let chain = |extra: &dyn Fn(usize) -> Vec<Key>| hasher.chain(hasher.root(), &question.token_ids, block_size, extra);
    let digests = match &question.extra_keys {
        Some(given) => {
            let keys = extra_keys(given, question.token_ids.len() / block_size.get() as usize)?;
            chain(&|block_idx| keys[block_idx].clone())
        }
        None => {
            let mm = mm_items(question.mm)?;
            let scope = Scope { adapter: question.lora.clone(), cache_salt: question.cache_salt.clone(), mm };
            chain(&|block_idx| scope.keys(block_idx, block_size))
        }
    };
    let hex: Vec<String> = digests.iter().map(ToString::to_string).collect();
    let low64: Vec<u64> = digests.iter().map(Digest::low64).map(|hash| hash.0).collect();
    Ok(json!({ "block_hashes": hex, "low64": low64 }))
}

fn mm_items(given: Vec<(Arc<str>, u32, u32)>) -> Result<Vec<MmItem>, String> {
    let item = |(identifier, offset, n_tokens)| MmItem { identifier, offset, n_tokens };
    let items: Vec<MmItem> = given.into_iter().map(item).collect();
    let is_apart = |pair: &[MmItem]| pair[0].end() <= u64::from(pair[1].offset);
    if !items.iter().all(|item| item.n_tokens > 0) || !items.windows(2).all(is_apart) {
        return Err(
            "mm has items that are empty, overlap or are out of order, expected them as they lie in the prompt".into(),
        );
    }
    Ok(items)
}

fn extra_keys(given: &[Option<Vec<Value>>], n_blocks: usize) -> Result<Vec<Vec<Key>>, String> {
    if given.len() < n_blocks {
        return Err(format!("extra_keys has {} entries, expected one for each of {n_blocks} full blocks", given.len()));
    }
    let block = |items: &Option<Vec<Value>>| items.iter().flatten().map(|item| key(item, MAX_DEPTH)).collect();
    given.iter().map(block).collect()
}

fn key(value: &Value, depth: usize) -> Result<Key, String> {
    let depth = depth.checked_sub(1).ok_or_else(|| format!("extra_keys are nested deeper than {MAX_DEPTH}"))?;
    Ok(match value {
        Value::Null => Key::None,
        Value::String(text) => Key::Str(text.as_str().into()),
        Value::Number(number) => Key::Int(number.as_i64().ok_or_else(|| unexpected(value))?),
        Value::Array(items) => Key::Tuple(items.iter().map(|item| key(item, depth)).collect::<Result<_, _>>()?),
        Value::Object(_) => Key::Bytes(bytes(value)?.into()),
        Value::Bool(_) => return Err(unexpected(value)),
    })
}

fn bytes(value: &Value) -> Result<Vec<u8>, String> {
    let hex = value["hex"].as_str().ok_or_else(|| unexpected(value))?;
    hex::decode(hex).map_err(|error| format!("{hex:?} in extra_keys is not hex: {error}"))
}

fn unexpected(value: &Value) -> String {
    format!("{value} in extra_keys, expected null, a string, a 64-bit integer, a list or {{\"hex\": …}}")
}

fn describe(error: impl std::fmt::Display) -> String {
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(line: &str) -> String {
        answer(line).expect_err("a fault")
    }

    #[test]
    fn extra_keys_replace_salt_and_adapter() {
        let with = |rest: &str| answer(&format!(r#"{{"algo":"sha256","block_size":2,"token_ids":[1,2,3,4],{rest}}}"#));
        let salted = with(r#""cache_salt":"s","lora":["a","p"]"#).expect("an answer");
        let keys = r#"[[["lora","a","p"],["cache_salt","s"]],[["lora","a","p"]]]"#;
        let tagged = with(&format!(r#""cache_salt":"other","extra_keys":{keys}"#)).expect("an answer");
        assert_eq!(salted, tagged);
        assert_ne!(with(r#""extra_keys":[null,null]"#).expect("an answer"), tagged);
        let keys = r#"[[["mm","i",1],["cache_salt","s"]],[["mm","i",-1]]]"#;
        let tagged = with(&format!(r#""extra_keys":{keys}"#)).expect("an answer");
        assert_eq!(with(r#""cache_salt":"s","mm":[["i",1,2]]"#).expect("an answer"), tagged);
        assert_eq!(with(r#""extra_keys":[null,null]"#), with(r#""lora":null"#));
    }

    #[test]
    fn faults_say_what_was_found_and_expected() {
        let line = |rest: &str| format!(r#"{{"algo":"sha256","token_ids":[1,2],{rest}}}"#);
        assert!(fault(&line(r#""block_size":0"#)).contains("expected at least 1"));
        assert!(fault(&line(r#""block_size":1,"mm":[["a",0,2],["b",1,1]]"#)).contains("overlap"));
        assert!(fault(&line(r#""block_size":1,"extra_keys":[null]"#)).contains("expected one for each of 2"));
        assert!(fault(&line(r#""block_size":1,"extra_keys":[[true],null]"#)).contains("expected null, a string"));
        assert!(fault(&line(r#""block_size":1,"extra_keys":[[{"hex":"0"}],null]"#)).contains("is not hex"));
        assert!(fault(r#"{"algo":"md5","token_ids":[],"block_size":1}"#).contains("expected sha256"));
        assert!(fault(r#"{"algo":"xxhash","token_ids":[],"block_size":1}"#).contains("random root"));
        assert!(fault(r#"{"algo":"sha256","token_ids":[4294967296],"block_size":1}"#).contains("4294967296"));
        let deep = format!("[[{}1{}],null]", "[".repeat(40), "]".repeat(40));
        assert!(fault(&line(&format!(r#""block_size":1,"extra_keys":{deep}"#))).contains("nested deeper"));
    }
}
