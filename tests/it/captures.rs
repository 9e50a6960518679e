//! Recordings of real engines: the trimmed ones in `tests/data`, and the whole ones where they are at hand.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use serde_json::Value;

/// One recording: what the engine was started with, then requests and the event batches that they caused.
pub(crate) struct Capture {
    pub(crate) path: PathBuf,
    pub(crate) meta: Value,
    pub(crate) scenarios: Vec<Value>,
}

impl Capture {
    fn read(path: &Path) -> Self {
        let text = fs::read_to_string(path).unwrap();
        let mut lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
        Self { path: path.to_owned(), meta: lines.next().unwrap(), scenarios: lines.collect() }
    }

    /// The file's name.
    pub(crate) fn name(&self) -> &str {
        self.path.file_name().and_then(|name| name.to_str()).unwrap()
    }

    /// `PYTHONHASHSEED` of the engine; none: not set.
    pub(crate) fn seed(&self) -> Option<&str> {
        self.meta["pythonhashseed"].as_str().filter(|seed| *seed != "unset")
    }

    /// Major and minor version of the engine.
    pub(crate) fn version(&self) -> (u32, u32) {
        let version = self.meta["vllm_version"]["version"].as_str().unwrap();
        let mut parts = version.split('.').map(|part| part.parse().unwrap());
        (parts.next().unwrap(), parts.next().unwrap())
    }
}

/// The frames of a scenario: its payload, and what msgspec decoded it to, if recorded.
pub(crate) fn frames(scenario: &Value) -> Vec<(Vec<u8>, &Value)> {
    let frames = scenario["frames"].as_array().map_or(&[][..], Vec::as_slice);
    frames
        .iter()
        .map(|frame| (hex::decode(frame["payload_hex"].as_str().unwrap()).unwrap(), &frame["decoded"]))
        .collect()
}

/// All recordings.
pub(crate) fn captures() -> Vec<Capture> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut paths = jsonl_files(&root.join("tests/data"));
    assert!(!paths.is_empty(), "tests/data has no recording");
    let whole = root.join("../shared/vllm/captures");
    if whole.is_dir() {
        paths.extend(jsonl_files(&whole));
    } else {
        // Not by `eprintln!`, whose output the test harness keeps to itself.
        let _ = writeln!(std::io::stderr(), "SKIPPED the whole recordings: {} is absent", whole.display());
    }
    paths.iter().map(|path| Capture::read(path)).collect()
}

fn jsonl_files(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let mut paths: Vec<_> =
        entries.filter(|path| path.extension().is_some_and(|extension| extension == "jsonl")).collect();
    paths.sort();
    paths
}
