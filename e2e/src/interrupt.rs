//! Being told to end: what runs then has to be dropped, so that it ends what it has started.

use anyhow::{Context, Result};
use tokio::signal::unix::{SignalKind, signal};

/// Waits for SIGINT or SIGTERM.
///
/// # Errors
/// When they cannot be handled.
pub async fn interrupted() -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;
    tokio::select! {
        result = tokio::signal::ctrl_c() => result.context("cannot handle SIGINT"),
        _ = terminate.recv() => Ok(()),
    }
}
