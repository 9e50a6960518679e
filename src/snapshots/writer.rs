//! Writes the sources to disk, one after the other, and all of them at exit.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::disk::{self, SnapshotDir};
use super::{encoded, key_of};
use crate::events::continuity::SeqNo;
use crate::events::snapshot::SourceKey;
use crate::events::socket::{EventPlane, SourceState, SourceStatus};
use crate::telemetry::metrics::{Metrics, SnapshotStep};

/// Longest that all writes at exit may take together.
const EXIT_GRACE: Duration = Duration::from_secs(2);
/// An unchanged source is written again after this time, so that its file does not look like that of one that is gone.
const REFRESH: Duration = Duration::from_secs(24 * 3600);
/// Most waits per interval while there is no source to write.
const IDLE_PARTS: u32 = 10;

/// See the module.
#[derive(Debug)]
pub struct Writer {
    dir: Arc<SnapshotDir>,
    interval: Duration,
    plane: Arc<EventPlane>,
    metrics: Arc<Metrics>,
    written: HashMap<SourceKey, Written>,
}

/// The last write of a source.
#[derive(Debug)]
struct Written {
    mark: Mark,
    at: Instant,
}

/// What changes whenever the content of a source does. A publisher's numbers alone start again with its next life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mark {
    n_generations: u64,
    last_seq: Option<SeqNo>,
    n_cleared: u64,
    state: SourceState,
}

impl Mark {
    fn of(status: &SourceStatus) -> Self {
        let SourceStatus { n_generations, last_seq, n_cleared, state, .. } = *status;
        Self { n_generations, last_seq, n_cleared, state }
    }
}

impl Writer {
    pub(super) fn new(dir: SnapshotDir, interval: Duration, plane: Arc<EventPlane>, metrics: Arc<Metrics>) -> Self {
        Self { dir: Arc::new(dir), interval, plane, metrics, written: HashMap::new() }
    }

    /// Writes until `shutdown`, and then what has changed since, for `EXIT_GRACE` at most.
    ///
    /// # Errors
    /// None: a file that cannot be written is logged and counted.
    pub async fn run(mut self, shutdown: CancellationToken) -> Result<(), Infallible> {
        while !shutdown.is_cancelled() {
            self.write_in_turn(&shutdown).await;
        }
        self.write_all().await;
        Ok(())
    }

    /// Spreads the writes over the interval: a snapshot costs the source's thread a moment, and the disk more than one.
    /// A write that has begun is waited for: two of one source at a time would write one file.
    async fn write_in_turn(&mut self, shutdown: &CancellationToken) {
        let changed = self.changed();
        if changed.is_empty() {
            shutdown.run_until_cancelled(tokio::time::sleep(self.interval / IDLE_PARTS)).await;
        }
        let n_parts = u32::try_from(changed.len()).unwrap_or(u32::MAX);
        for (key, mark) in changed {
            if shutdown.run_until_cancelled(tokio::time::sleep(self.interval / n_parts)).await.is_none() {
                return;
            }
            self.write(key, mark).await;
        }
    }

    async fn write_all(&mut self) {
        let deadline = tokio::time::Instant::now() + EXIT_GRACE;
        let changed = self.changed();
        let (n_changed, mut n_done) = (changed.len(), 0);
        for (key, mark) in changed {
            // A write that is under way then goes on; whether the process waits for its end is no matter of ours.
            if tokio::time::timeout_at(deadline, self.write(key, mark)).await.is_err() {
                break;
            }
            n_done += 1;
        }
        if n_done < n_changed {
            warn!(n_done, n_changed, "there was no time to write all KV event snapshots at exit");
        } else {
            info!(n_done, "KV event snapshots are written");
        }
    }

    fn changed(&mut self) -> Vec<(SourceKey, Mark)> {
        let sources: BTreeMap<SourceKey, Mark> =
            self.plane.status().iter().map(|status| (key_of(status), Mark::of(status))).collect();
        self.written.retain(|key, _| sources.contains_key(key));
        changed(sources, &self.written, Instant::now())
    }

    async fn write(&mut self, key: SourceKey, mark: Mark) {
        let Some(encoded) = encoded(&self.plane, key.clone()).await else { return };
        let (dir, n_bytes, name) = (self.dir.clone(), encoded.len() as u64, key.clone());
        let write = tokio::task::spawn_blocking(move || dir.write(&name, &encoded));
        match write.await.expect("writing a file is no panic") {
            Ok(()) => {
                self.metrics.count_snapshot(SnapshotStep::Write, n_bytes);
                self.written.insert(key, Written { mark, at: Instant::now() });
            }
            Err(error) => self.report(&key, &error),
        }
    }

    fn report(&self, source: &SourceKey, error: &disk::Error) {
        self.metrics.count_snapshot_failure(SnapshotStep::Write);
        let (dir, cause) = (self.dir.path().display(), std::error::Error::source(error).map(ToString::to_string));
        warn!(%source, %dir, %error, cause, "KV event snapshot cannot be written");
    }
}

/// Sources that are not on disk as they are now, those that are there longest first.
fn changed(
    sources: BTreeMap<SourceKey, Mark>,
    written: &HashMap<SourceKey, Written>,
    now: Instant,
) -> Vec<(SourceKey, Mark)> {
    let is_current = |key: &SourceKey, mark: &Mark| {
        let written = written.get(key).filter(|written| written.mark == *mark);
        written.is_some_and(|written| now.saturating_duration_since(written.at) < REFRESH)
    };
    let mut changed: Vec<(SourceKey, Mark)> =
        sources.into_iter().filter(|(key, mark)| mark.last_seq.is_some() && !is_current(key, mark)).collect();
    changed.sort_by_cached_key(|(key, _)| written.get(key).map(|written| written.at));
    changed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(rank: u32) -> SourceKey {
        SourceKey { model: "m".into(), address: ([10, 0, 0, 1], 8000).into(), rank }
    }

    fn mark(last_seq: Option<u64>) -> Mark {
        Mark { n_generations: 1, last_seq: last_seq.map(SeqNo), n_cleared: 0, state: SourceState::Live }
    }

    #[test]
    fn a_source_is_written_when_anything_of_it_has_changed_or_after_a_day() {
        let start = Instant::now();
        let before = mark(Some(7));
        let written = HashMap::from([(key(0), Written { mark: before, at: start })]);
        let is_written = |mark: Mark, after: Duration| {
            !changed(BTreeMap::from([(key(0), mark)]), &written, start + after).is_empty()
        };
        assert!(!is_written(before, Duration::from_secs(3600)));
        assert!(is_written(before, REFRESH));
        for changed in [
            mark(Some(8)),
            Mark { n_generations: 2, ..before },
            Mark { n_cleared: 1, ..before },
            Mark { state: SourceState::Incomplete, ..before },
        ] {
            assert!(is_written(changed, Duration::ZERO), "{changed:?}");
        }
        assert!(!is_written(mark(None), Duration::ZERO), "nothing is known of the source");
    }

    #[test]
    fn those_that_were_never_written_come_first_and_then_the_oldest() {
        let start = Instant::now();
        let at = |seconds| Written { mark: mark(Some(1)), at: start + Duration::from_secs(seconds) };
        let written = HashMap::from([(key(0), at(9)), (key(1), at(3))]);
        let sources = BTreeMap::from([0, 1, 2].map(|rank| (key(rank), mark(Some(2)))));
        let ranks: Vec<u32> = changed(sources, &written, start).into_iter().map(|(key, _)| key.rank).collect();
        assert_eq!(ranks, [2, 1, 0]);
    }
}
