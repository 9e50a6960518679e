//! Holds the tables of `docs/migrating-from-aibrix.md` against the program.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use warmroute::config::Config;

const MODEL: &str = "models: [{name: m, discovery: {static: [{address: 1.1.1.1:1}]}}]";
/// What the variables that are taken may be set to: a flag, a kind, an engine, a URL.
const VALUES: [&str; 4] = ["true", "remote", "vllm", "http://tokenizer:8000"];
const TAKEN: &str = "These are taken";
const NOT_READ: &str = "These are not read";
const END: &str = "\n## Labels";

fn read(path: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

/// The rows below `heading`, up to `end`: names on the left, and all that is said on the right.
fn rows(doc: &str, heading: &str, end: &str) -> Vec<(Vec<String>, String)> {
    let (_, section) = doc.split_once(heading).unwrap_or_else(|| panic!("{heading:?} is not in the document"));
    let (section, _) = section.split_once(end).unwrap_or_else(|| panic!("{end:?} is not in the document"));
    let rows = section.lines().filter_map(|line| line.strip_prefix("| `")?.split_once(" | "));
    rows.map(|(left, right)| (names(left, "AIBRIX_"), right.to_owned())).collect()
}

/// The words of `text` that begin with `prefix`.
fn names(text: &str, prefix: &str) -> Vec<String> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let words = text.split(|c| !is_part(c)).filter(|word| word.len() > prefix.len() && word.starts_with(prefix));
    words.filter(|word| !word.ends_with('_')).map(str::to_owned).collect()
}

fn parse(name: &str, value: &str) -> Option<Config> {
    Config::parse(MODEL, [(name.to_owned(), value.to_owned())]).ok()
}

#[test]
fn variables_that_the_table_has_as_taken_are_taken_as_it_says() {
    let doc = read("docs/migrating-from-aibrix.md");
    let mut listed = BTreeSet::new();
    for (names, right) in rows(&doc, TAKEN, NOT_READ) {
        for name in names {
            let config = VALUES.iter().find_map(|value| parse(&name, value));
            let config = config.unwrap_or_else(|| panic!("{name} takes none of {VALUES:?}"));
            let alias = config.aliases.first().unwrap_or_else(|| panic!("{name} is not taken"));
            assert_eq!(alias.name, name);
            assert!(right.replace('`', "").contains(alias.setting), "{name}: {right}, expected {}", alias.setting);
            listed.insert(name);
        }
    }
    let source = read("src/config/aliases.rs");
    let (code, _) = source.split_once("#[cfg(test)]").unwrap();
    let known: BTreeSet<String> = names(code, "AIBRIX_").into_iter().collect();
    assert_eq!(listed, known, "the table and src/config/aliases.rs differ");
}

#[test]
fn variables_that_the_table_has_as_not_read_change_nothing() {
    let doc = read("docs/migrating-from-aibrix.md");
    let names: Vec<String> = rows(&doc, NOT_READ, END).into_iter().flat_map(|(names, _)| names).collect();
    assert!(names.len() > 15, "{names:?}");
    let plain = parse("OTHER", "1").unwrap().to_yaml();
    for name in names {
        let config = parse(&name, "1").unwrap_or_else(|| panic!("{name} is refused"));
        assert!(config.aliases.is_empty(), "{name} is taken");
        assert_eq!(config.to_yaml(), plain, "{name}");
    }
}

#[test]
fn annotations_that_the_document_names_are_those_that_the_script_writes() {
    let in_words = |text: &str| -> BTreeSet<String> {
        let is_part = |c: char| c.is_ascii_alphanumeric() || "./-".contains(c);
        let words = text.split(|c| !is_part(c)).filter(|word| word.starts_with("warmroute.io/"));
        words.filter(|word| !word.ends_with("-undo")).map(str::to_owned).collect()
    };
    let documented = in_words(&read("docs/migrating-from-aibrix.md"));
    assert_eq!(documented.len(), 4, "{documented:?}");
    assert_eq!(documented, in_words(&read("envoy/vllm/enable-kv-events.sh")));
}

#[test]
fn metrics_that_the_document_names_are_ours() {
    let doc = read("docs/migrating-from-aibrix.md");
    let mut source = String::new();
    read_sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src/telemetry"), &mut source);
    let metrics = names(&doc, "warmroute_");
    assert!(metrics.len() > 10, "{metrics:?}");
    for metric in metrics {
        let name = metric.strip_prefix("warmroute_").unwrap();
        let name = name.strip_suffix("_total").or_else(|| name.strip_suffix("_seconds")).unwrap_or(name);
        assert!(source.contains(&format!("\"{name}\"")), "{metric} is not registered in src/telemetry");
    }
}

fn read_sources(dir: &Path, text: &mut String) {
    let mut paths: Vec<PathBuf> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    for path in paths {
        if path.is_dir() {
            read_sources(&path, text);
        } else {
            text.push_str(&std::fs::read_to_string(&path).unwrap());
        }
    }
}
