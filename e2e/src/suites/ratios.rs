//! `cargo e2e ratios`: what the benchmarks that were run last say of two ways to do the same.
//!
//! A time depends on the machine and on what else runs on it; the ratio of two times of one run does so much less. The
//! times are those that criterion has left below the target directory.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

/// Pairs of benchmarks: a group, what the slower one's name has, and what the faster one's has there.
const PAIRS: [(&str, &str, &str); 7] = [
    ("hash, per block of 16", "sha256, ", "xxhash, "),
    ("decode, per block of 16", "rmp-serde, ", "borrowed, "),
    ("index, per block", "after 1000 generations", "fresh index"),
    ("turn", "whole/", "reused/"),
    ("decision", "local/", "prefix cached/"),
    ("decision", "local/", "tokens cached/"),
    ("decision", "remote/", "local/"),
];

/// Times of benchmarks in nanoseconds, by their names.
type Times = BTreeMap<String, f64>;

#[derive(Deserialize)]
struct Benchmark {
    full_id: String,
}

#[derive(Deserialize)]
struct Estimates {
    mean: Estimate,
}

#[derive(Deserialize)]
struct Estimate {
    point_estimate: f64,
}

/// Prints the ratios of all pairs that were measured.
///
/// # Errors
/// When no benchmark was run, or its figures cannot be read.
pub fn print() -> Result<()> {
    let binary = std::env::current_exe().context("path of this program")?;
    let target = binary.parent().and_then(Path::parent).context("this program lies in a target directory")?;
    let dir = target.join("criterion");
    let mut times = Times::new();
    read(&dir, &mut times)?;
    ensure!(!times.is_empty(), "no benchmark was run: found nothing in {}", dir.display());
    lines(&times).iter().for_each(|line| println!("{line}"));
    Ok(())
}

/// Takes all times below `dir`.
fn read(dir: &Path, times: &mut Times) -> Result<()> {
    let entries = fs::read_dir(dir).into_iter().flatten();
    let dirs: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()).collect();
    for dir in dirs {
        let benchmark = dir.join("benchmark.json");
        if dir.ends_with("new") && benchmark.exists() {
            let Benchmark { full_id } = json(&benchmark)?;
            let Estimates { mean } = json(&dir.join("estimates.json"))?;
            times.insert(full_id, mean.point_estimate);
        } else {
            read(&dir, times)?;
        }
    }
    Ok(())
}

fn json<T: for<'a> Deserialize<'a>>(file: &Path) -> Result<T> {
    let bytes = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    serde_json::from_slice(&bytes).with_context(|| format!("{} is not what criterion writes", file.display()))
}

fn lines(times: &Times) -> Vec<String> {
    let mut lines = Vec::new();
    for (group, slow, fast) in PAIRS {
        for (name, slow_time) in times.iter().filter(|(name, _)| name.starts_with(&format!("{group}/"))) {
            let in_group = &name[group.len()..];
            let Some(fast_time) = in_group
                .contains(slow)
                .then(|| in_group.replace(slow, fast))
                .and_then(|other| times.get(&format!("{group}{other}")))
            else {
                continue;
            };
            lines.push(format!("{:>8.2}  {name} : {}", slow_time / fast_time, fast.trim_end_matches([',', ' ', '/'])));
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_found_by_their_names() {
        let root = tempfile::tempdir().unwrap();
        let figures =
            [("turn/whole/8000", 400.0), ("turn/reused/8000", 20.0), ("turn/whole/99", 1.0), ("else/whole/1", 1.0)];
        for (number, (name, mean)) in figures.into_iter().enumerate() {
            let dir = root.path().join(number.to_string()).join("new");
            fs::create_dir_all(&dir).unwrap();
            fs::write(dir.join("benchmark.json"), format!(r#"{{"group_id":"x","full_id":{name:?}}}"#)).unwrap();
            let estimates = format!(r#"{{"mean":{{"point_estimate":{mean:?},"standard_error":1.0}}}}"#);
            fs::write(dir.join("estimates.json"), estimates).unwrap();
        }
        let mut times = Times::new();
        read(root.path(), &mut times).unwrap();
        assert_eq!(times.len(), figures.len());
        assert_eq!(lines(&times), ["   20.00  turn/whole/8000 : reused"]);
    }
}
