//! Recorded engines: what is indexed is what they stored and did not remove.

use std::collections::BTreeMap;
use std::path::Path;

use super::super::slots::tiered;
use super::*;

/// The payloads of a recording, in order, with what its engine was started with.
fn recorded(path: &Path) -> (ModelSettings, Vec<Vec<u8>>) {
    let text = std::fs::read_to_string(path).unwrap();
    let mut lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let meta = lines.next().unwrap();
    let settings = ModelSettings {
        algorithm: meta["algo"].as_str().unwrap().parse().unwrap(),
        pythonhashseed: meta["pythonhashseed"].as_str().filter(|seed| *seed != "unset").map(str::to_owned),
        ..settings()
    };
    let frames: Vec<Value> = lines.flat_map(|line| line["frames"].as_array().cloned().unwrap_or_default()).collect();
    (settings, frames.iter().map(|frame| hex::decode(frame["payload_hex"].as_str().unwrap()).unwrap()).collect())
}

/// Copies of each block that a naive engine has after the batches, of the group with full attention.
fn naive_copies(payloads: &[Vec<u8>]) -> BTreeMap<u64, u32> {
    let (mut copies, mut group) = (BTreeMap::new(), None);
    for payload in payloads {
        for event in EventBatch::decode(payload).unwrap().events {
            match event {
                Event::BlockStored(stored) if matches!(stored.spec_kind, None | Some("full_attention")) => {
                    group = group.or(stored.group_idx);
                    stored.block_hashes.iter().for_each(|hash| *copies.entry(hash.low64().0).or_default() += 1);
                }
                Event::BlockRemoved(removed) if removed.group_idx == group => {
                    for hash in &removed.block_hashes {
                        if let Some(n_copies) = copies.get_mut(&hash.low64().0) {
                            *n_copies -= 1;
                        }
                    }
                    copies.retain(|_, n_copies| *n_copies > 0);
                }
                Event::AllBlocksCleared => copies.clear(),
                _ => {}
            }
        }
    }
    copies
}

fn digest_of(hashes: impl Iterator<Item = u64>) -> ContentDigest {
    let mut digest = ContentDigest::default();
    hashes.for_each(|hash| digest.add(BlockHash(hash)));
    tiered(digest, Tier::Gpu)
}

#[test]
fn contents_are_those_of_the_recorded_engine() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let files = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let captures: Vec<_> = files.filter(|path| path.extension().is_some_and(|kind| kind == "jsonl")).collect();
    assert!(captures.len() >= 4, "{captures:?}");
    for path in captures {
        let (known, payloads) = recorded(&path);
        // The same engine with its own settings, and as one whose root is not known.
        let unknown = ModelSettings { algorithm: HashAlgorithm::Xxhash, pythonhashseed: None, ..known.clone() };
        for settings in [known, unknown] {
            let mut fixture = Fixture::new(settings);
            for (idx, payload) in payloads.iter().enumerate() {
                fixture.applier.apply(&EventBatch::decode(payload).unwrap(), When::Now);
                let naive = naive_copies(&payloads[..=idx]);
                assert_eq!(fixture.applier.digest(), digest_of(naive.keys().copied()), "{path:?}, batch {idx}");
            }
            assert!(!fixture.applier.is_full());
        }
    }
}
