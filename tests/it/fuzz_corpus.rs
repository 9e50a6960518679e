//! The fuzz targets' corpora, as plain tests: what was found once stays found.

use std::fs;
use std::path::Path;

#[path = "../../fuzz/bodies/continuity.rs"]
mod continuity;
#[path = "../../fuzz/bodies/decode.rs"]
mod decode;

/// Runs a target's body on every file of its corpus; a panic names the file.
fn run_corpus(target: &str, body: fn(&[u8])) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut paths: Vec<_> = fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert!(paths.len() > 10, "{} has {} files", directory.display(), paths.len());
    for path in paths {
        let bytes = fs::read(&path).unwrap();
        let outcome = std::panic::catch_unwind(|| body(&bytes));
        assert!(outcome.is_ok(), "{} fails", path.display());
    }
}

#[test]
fn decoder_agrees_with_a_reader_of_trees_on_its_corpus() {
    run_corpus("decode", decode::run);
}

#[test]
fn continuity_keeps_its_promises_on_its_corpus() {
    run_corpus("continuity", continuity::run);
}
