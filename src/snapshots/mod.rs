//! Snapshots of event sources: on disk for our next life, and between the replicas of one router.
//!
//! A publisher replays its last batches only, and a prefix that stays warm is never announced again. Whoever comes
//! later than that knows of such blocks from those alone who saw them announced: itself before a restart, or a sibling.
//!
//! - `disk`: one file per source, written in turn and once more at exit, offered at the next start.
//! - `serve`: `/snapshots` on the admin port.
//! - `siblings`: asks that of the others when a source of ours is new or incomplete.
//!
//! All of it ends in [`EventPlane::offer`], where a snapshot counts only once the publisher itself has confirmed it.
//! So neither a stale file nor a mistaken sibling is believed; but a sibling that lies about blocks under a true
//! overlap is. The admin port must be reachable inside the cluster alone.

mod disk;
mod needs;
mod serve;
mod siblings;
mod writer;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tracing::warn;

use crate::engine::ApiKey;
use crate::events::snapshot::{Snapshot, SourceKey};
use crate::events::socket::{EventPlane, SourceStatus};
use crate::telemetry::metrics::Metrics;
use disk::SnapshotDir;
pub use siblings::{Sibling, Siblings};
pub use writer::Writer;

/// Longest that the start waits for files: a file system that hangs must not keep the router from serving.
const LOAD_TIMEOUT: Duration = Duration::from_secs(10);

/// What to do with snapshots.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where the files lie; none: nothing is written, and nothing read.
    pub dir: Option<PathBuf>,
    /// Time in which every source is written once.
    pub interval: Duration,
    /// The other replicas; none: nobody is asked.
    pub siblings: Vec<Sibling>,
    /// The token that their admin ports ask for, which is the one that ours does.
    pub token: Option<Arc<ApiKey>>,
}

/// The snapshots cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The HTTP client for the siblings cannot be built.
    #[error("cannot build the HTTP client for the siblings")]
    Client(#[source] reqwest::Error),
}

/// Names a process among the replicas, so that it knows itself behind a name that resolves to all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct InstanceId(u64);

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// What is done with snapshots, before it is running; see the module.
#[derive(Debug)]
pub struct Snapshots {
    config: Config,
    plane: Arc<EventPlane>,
    metrics: Arc<Metrics>,
    instance: InstanceId,
    /// Sources for which the disk had an offer.
    from_disk: Vec<SourceKey>,
}

impl Snapshots {
    /// Offers what lies on disk. Wanted before the sources are added, so that nobody is asked for what we have.
    pub async fn load(config: Config, plane: Arc<EventPlane>, metrics: Arc<Metrics>) -> Self {
        let instance = InstanceId(fastrand::u64(..));
        let mut snapshots = Self { config, plane, metrics, instance, from_disk: Vec::new() };
        if let Some(dir) = snapshots.dir() {
            let (plane, metrics) = (snapshots.plane.clone(), snapshots.metrics.clone());
            let load = move || disk::load(&dir, &metrics, |found| plane.offer(found));
            snapshots.from_disk = within(LOAD_TIMEOUT, load).await.unwrap_or_else(|| {
                warn!(
                    "reading the KV event snapshots takes longer than {LOAD_TIMEOUT:?}; the start goes on without them"
                );
                Vec::new()
            });
        }
        snapshots
    }

    /// Routes of the admin port.
    pub fn routes(&self) -> axum::Router {
        serve::routes(self.plane.clone(), self.metrics.clone(), self.instance)
    }

    /// Writes files; none without a directory.
    pub fn writer(&self) -> Option<Writer> {
        Some(Writer::new(self.dir()?, self.config.interval, self.plane.clone(), self.metrics.clone()))
    }

    /// Asks siblings; none without any.
    ///
    /// # Errors
    /// The HTTP client cannot be built.
    pub fn siblings(&self) -> Result<Option<Siblings>, Error> {
        if self.config.siblings.is_empty() {
            return Ok(None);
        }
        let (plane, metrics) = (self.plane.clone(), self.metrics.clone());
        let siblings = (self.config.siblings.clone(), self.config.token.clone());
        Siblings::new(siblings, self.instance, &self.from_disk, plane, metrics).map(Some)
    }

    fn dir(&self) -> Option<SnapshotDir> {
        self.config.dir.clone().map(|path| SnapshotDir::new(path, self.instance))
    }
}

/// What `work` gives, on a thread that may wait; none when that takes longer than `limit`. The work then goes on by
/// itself.
async fn within<T: Send + 'static>(limit: Duration, work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let working = tokio::time::timeout(limit, tokio::task::spawn_blocking(work)).await.ok()?;
    Some(working.expect("files, whatever is in them, are no panic"))
}

fn key_of(status: &SourceStatus) -> SourceKey {
    SourceKey { model: status.model.clone(), address: status.address, rank: status.rank }
}

/// Takes a snapshot and encodes it, on a thread that may wait. None: nothing is known of the source.
async fn encoded(plane: &Arc<EventPlane>, key: SourceKey) -> Option<Vec<u8>> {
    let plane = plane.clone();
    let taken = tokio::task::spawn_blocking(move || plane.snapshot(&key).as_ref().map(Snapshot::encode));
    taken.await.expect("taking a snapshot is no panic")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn files_that_hang_are_not_waited_for() {
        let (release, hang) = std::sync::mpsc::channel::<()>();
        assert_eq!(within(Duration::from_millis(10), move || hang.recv().is_ok()).await, None);
        drop(release);
        assert_eq!(within(Duration::from_secs(60), || 7).await, Some(7));
    }
}
