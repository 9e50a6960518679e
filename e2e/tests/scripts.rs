//! Our shell scripts, by shellcheck.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};
use e2e::cache::Cache;
use e2e::fetch;
use e2e::tool::run;

/// Every directory that holds scripts.
const DIRS: [&str; 3] = [".ci", "envoy/vllm", "envoy/kind"];

#[test]
fn scripts_have_nothing_that_shellcheck_warns_of() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut scripts = Vec::new();
    for dir in DIRS {
        scripts.extend(scripts_of(&root.join(dir))?);
    }
    ensure!(scripts.len() >= 5, "found {scripts:?}, expected every script of the project");
    run(Command::new(fetch::shellcheck(&Cache::from_env()?)?).args(["--severity", "style"]).args(scripts))?;
    Ok(())
}

/// The files of `dir` that begin as a shell script does.
fn scripts_of(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut scripts = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_file() && std::fs::read(&path)?.starts_with(b"#!/usr/bin/env bash\n") {
            scripts.push(path);
        }
    }
    Ok(scripts)
}
