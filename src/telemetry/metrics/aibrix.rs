//! AIBrix's names for what its prefix-cache router counts, so that dashboards and alerts made for it go on working.
//!
//! Names, labels, values and buckets are as in AIBrix's gateway plugin,
//! `pkg/plugins/gateway/algorithms/prefix_cache.go` (`createPrefixCacheMetrics`). They are kept only with
//! `metrics.aibrix_names`, and count the picks that Envoy is told: those of a shadow are not AIBrix's counterpart. What has no counterpart here is not imitated: `prefix_cache_load_imbalance_total` counts a
//! rule that this router does not have, and so do the selection `prefix_match_skipped` and the other error reasons.

use std::sync::Arc;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};

use super::Metrics;
use super::catalog::Catalog;
use super::labels::{AIBRIX_INDEXER, AIBRIX_PERCENT, AIBRIX_REASON, AIBRIX_SELECTION, AIBRIX_SYNC, MODEL};
use crate::routing::decision::{Decision, Outcome};

/// Which kind of index a pool has, as AIBrix calls them: it has one for all models, by its configuration, whatever a
/// single decision rests on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AibrixIndexer {
    /// The engines' events feed it.
    Sync,
    /// The router's own picks do.
    Local,
}

impl AibrixIndexer {
    fn using_kv_sync(self) -> &'static str {
        match self {
            Self::Sync => "true",
            Self::Local => "false",
        }
    }
}

/// Registered only on demand.
#[derive(Debug)]
pub(super) struct Instruments {
    decisions: Family<DecisionLabels, Counter>,
    selections: Family<SelectionLabels, Counter>,
    errors: Family<ErrorLabels, Counter>,
    latency: Family<LatencyLabels, Histogram>,
    indexer_status: Family<IndexerLabels, Gauge>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DecisionLabels {
    model: Arc<str>,
    match_percent_bucket: &'static str,
    using_kv_sync: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SelectionLabels {
    model: Arc<str>,
    selection: &'static str,
    using_kv_sync: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ErrorLabels {
    model: Arc<str>,
    reason: &'static str,
    using_kv_sync: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LatencyLabels {
    model: Arc<str>,
    using_kv_sync: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct IndexerLabels {
    model: Arc<str>,
    indexer_type: &'static str,
}

impl Instruments {
    pub(super) fn register(catalog: &mut Catalog) -> Self {
        let c = catalog;
        Self {
            decisions: c.add_foreign(
                "aibrix_prefix_cache_routing_decisions",
                "Decisions by the matched share of the prompt, under AIBrix's name",
                &[MODEL, AIBRIX_PERCENT, AIBRIX_SYNC],
                Family::default(),
            ),
            selections: c.add_foreign(
                "aibrix_prefix_cache_routing_selection",
                "Decisions by what the pick rested on, under AIBrix's name",
                &[MODEL, AIBRIX_SELECTION, AIBRIX_SYNC],
                Family::default(),
            ),
            errors: c.add_foreign(
                "aibrix_prefix_cache_routing_errors",
                "Decisions without the prompt's tokens, under AIBrix's name",
                &[MODEL, AIBRIX_REASON, AIBRIX_SYNC],
                Family::default(),
            ),
            latency: c.add_foreign(
                "aibrix_prefix_cache_routing_latency_seconds",
                "Time of a decision, tokenization included, under AIBrix's name",
                &[MODEL, AIBRIX_SYNC],
                Family::new_with_constructor(histogram as fn() -> Histogram),
            ),
            indexer_status: c.add_foreign(
                "aibrix_prefix_cache_indexer_status",
                "Which kind of index the model has, under AIBrix's name",
                &[MODEL, AIBRIX_INDEXER],
                Family::default(),
            ),
        }
    }

    fn count(&self, decision: &Decision, indexer: AibrixIndexer) {
        let model = &decision.model;
        let using_kv_sync = indexer.using_kv_sync();
        let match_percent_bucket = percent_bucket(decision.pick.matched_tokens, decision.prompt_tokens);
        let labels = DecisionLabels { model: model.clone(), match_percent_bucket, using_kv_sync };
        self.decisions.get_or_create(&labels).inc();
        let is_match = matches!(decision.outcome, Outcome::PrefixMatch | Outcome::LearnedMatch);
        let selection = if is_match { "prefix_match" } else { "least_request_fallback" };
        self.selections.get_or_create(&SelectionLabels { model: model.clone(), selection, using_kv_sync }).inc();
        if matches!(decision.outcome, Outcome::Fallback(_)) {
            let labels = ErrorLabels { model: model.clone(), reason: "tokenize_failed", using_kv_sync };
            self.errors.get_or_create(&labels).inc();
        }
        let labels = LatencyLabels { model: model.clone(), using_kv_sync };
        self.latency.get_or_create(&labels).observe(decision.timings.total.as_secs_f64());
        for (indexer_type, kind) in [("sync", AibrixIndexer::Sync), ("local", AibrixIndexer::Local)] {
            let labels = IndexerLabels { model: model.clone(), indexer_type };
            self.indexer_status.get_or_create(&labels).set(i64::from(kind == indexer));
        }
    }
}

impl Metrics {
    /// Counts a decision of a pool with such an index under AIBrix's names, if that is wanted.
    pub fn count_for_aibrix(&self, decision: &Decision, indexer: AibrixIndexer) {
        if let Some(aibrix) = &self.aibrix {
            aibrix.count(decision, indexer);
        }
    }
}

/// AIBrix's class of the matched share, in percent rounded down.
fn percent_bucket(n_matched: u32, n_prompt: u32) -> &'static str {
    match u64::from(n_matched) * 100 / u64::from(n_prompt.max(1)) {
        0 => "0",
        1..=25 => "1-25",
        26..=50 => "26-50",
        51..=75 => "51-75",
        _ => "76-100",
    }
}

/// From 10 µs to 160 ms.
fn histogram() -> Histogram {
    Histogram::new(exponential_buckets(0.00001, 2.0, 15))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_fall_into_the_classes_of_aibrix() {
        let cases = [(0, 0, "0"), (0, 100, "0"), (1, 1000, "0"), (1, 100, "1-25"), (25, 100, "1-25")];
        let more =
            [(26, 100, "26-50"), (50, 100, "26-50"), (51, 100, "51-75"), (76, 100, "76-100"), (99, 100, "76-100")];
        for (n_matched, n_prompt, expected) in cases.into_iter().chain(more) {
            assert_eq!(percent_bucket(n_matched, n_prompt), expected, "{n_matched} of {n_prompt}");
        }
    }
}
