//! Instruments of the snapshots of event sources, on disk and between siblings.

use std::fmt;

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;

use super::Metrics;
use super::catalog::Catalog;
use super::labels::SNAPSHOT_STEP;

/// Registered with the others, in [`Metrics`].
#[derive(Debug)]
pub(super) struct Instruments {
    snapshots: Family<SnapshotLabels, Counter>,
    failures: Family<SnapshotLabels, Counter>,
    bytes: Family<SnapshotLabels, Counter>,
}

/// What happens to snapshots of event sources.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SnapshotStep {
    /// Written to disk.
    Write,
    /// Loaded from disk, and offered to its source.
    Load,
    /// Fetched from a sibling, and offered to its source.
    Fetch,
    /// Given to a sibling.
    Serve,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SnapshotLabels {
    step: SnapshotStep,
}

impl Instruments {
    pub(super) fn register(catalog: &mut Catalog) -> Self {
        Self {
            snapshots: catalog.add(
                "snapshots",
                "Snapshots of event sources written, served, or loaded or fetched and offered",
                &[SNAPSHOT_STEP],
            ),
            failures: catalog.add(
                "snapshot_failures",
                "Snapshots of event sources that could not be used, by step",
                &[SNAPSHOT_STEP],
            ),
            bytes: catalog.add("snapshot_bytes", "Bytes of the snapshots of event sources, by step", &[SNAPSHOT_STEP]),
        }
    }
}

impl Metrics {
    /// Counts a step that a snapshot took, and its bytes.
    pub fn count_snapshot(&self, step: SnapshotStep, n_bytes: u64) {
        self.snapshots.snapshots.get_or_create(&SnapshotLabels { step }).inc();
        self.snapshots.bytes.get_or_create(&SnapshotLabels { step }).inc_by(n_bytes);
    }

    /// Counts a step that failed.
    pub fn count_snapshot_failure(&self, step: SnapshotStep) {
        self.snapshots.failures.get_or_create(&SnapshotLabels { step }).inc();
    }
}

impl SnapshotStep {
    /// The label's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Write => "write",
            Self::Load => "load",
            Self::Fetch => "fetch",
            Self::Serve => "serve",
        }
    }
}

impl EncodeLabelValue for SnapshotStep {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        self.as_str().encode(encoder)
    }
}
