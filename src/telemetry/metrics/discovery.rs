//! Instruments of discovery, by model.

use std::sync::Arc;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;

use super::catalog::Catalog;
use super::labels::{DISCOVERY_CHANGE, DISCOVERY_REASON, MODEL};
use super::{Metrics, ModelLabels};

/// Registered with the others, in [`Metrics`].
#[derive(Debug)]
pub(super) struct Instruments {
    endpoints: Family<ModelLabels, Gauge>,
    synced: Family<ModelLabels, Gauge>,
    listings: Family<ModelLabels, Counter>,
    errors: Family<ErrorLabels, Counter>,
    changes: Family<ChangeLabels, Counter>,
    wrong_hints: Family<ModelLabels, Counter>,
    last_success: Family<ModelLabels, Gauge>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ErrorLabels {
    model: Arc<str>,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ChangeLabels {
    model: Arc<str>,
    change: &'static str,
}

/// How many endpoints a listing has changed, by name of the change.
pub type DiscoveryChanges = [(&'static str, usize); 3];

impl Instruments {
    pub(super) fn register(catalog: &mut Catalog) -> Self {
        let c = catalog;
        Self {
            endpoints: c.add("endpoints", "Endpoints that discovery currently lists", &[MODEL]),
            synced: c.add("discovery_synced", "Whether the pool has been listed at least once", &[MODEL]),
            listings: c.add(
                "discovery_listings",
                "Listings of the pool, and changes of them, that were taken",
                &[MODEL],
            ),
            errors: c.add(
                "discovery_errors",
                "Failures of discovery, which leave the endpoints as they were",
                &[MODEL, DISCOVERY_REASON],
            ),
            changes: c.add(
                "discovery_changes",
                "Endpoints that came, left, or publish elsewhere",
                &[MODEL, DISCOVERY_CHANGE],
            ),
            wrong_hints: c.add(
                "discovery_wrong_hints",
                "Labels and annotations of pods that cannot be, and in whose place a default was taken",
                &[MODEL],
            ),
            last_success: c.add(
                "discovery_last_success_timestamp_seconds",
                "When the endpoints were last known to be as their source says, in Unix time; absent for static ones",
                &[MODEL],
            ),
        }
    }
}

impl Metrics {
    /// Makes the series of a pool that is not listed yet exist.
    pub(super) fn add_discovery(&self, model: &Arc<str>) {
        let labels = ModelLabels { model: model.clone() };
        let Instruments { endpoints, synced, listings, wrong_hints, .. } = &self.discovery;
        drop((endpoints.get_or_create(&labels), synced.get_or_create(&labels)));
        drop((listings.get_or_create(&labels), wrong_hints.get_or_create(&labels)));
    }

    /// Counts a listing that was taken, and what it has changed; the pool is synced.
    pub fn count_listing(&self, model: &Arc<str>, n_endpoints: usize, changes: DiscoveryChanges) {
        let labels = ModelLabels { model: model.clone() };
        let n_endpoints = i64::try_from(n_endpoints).expect("a set of endpoints fits into memory");
        self.discovery.endpoints.get_or_create(&labels).set(n_endpoints);
        self.discovery.synced.get_or_create(&labels).set(1);
        self.discovery.listings.get_or_create(&labels).inc();
        for (change, n) in changes {
            self.discovery.changes.get_or_create(&ChangeLabels { model: model.clone(), change }).inc_by(n as u64);
        }
    }

    /// Counts a failure of discovery, by its name.
    pub fn count_discovery_error(&self, model: &Arc<str>, reason: &'static str) {
        self.discovery.errors.get_or_create(&ErrorLabels { model: model.clone(), reason }).inc();
    }

    /// Counts what pods say of themselves and cannot be.
    pub fn count_wrong_hints(&self, model: &Arc<str>, n_hints: u64) {
        self.discovery.wrong_hints.get_or_create(&ModelLabels { model: model.clone() }).inc_by(n_hints);
    }

    /// Notes that the endpoints are as their source says at `now`, the time since 1970.
    pub fn set_discovery_success(&self, model: &Arc<str>, now: Duration) {
        let labels = ModelLabels { model: model.clone() };
        self.discovery.last_success.get_or_create(&labels).set(now.as_secs().cast_signed());
    }
}
