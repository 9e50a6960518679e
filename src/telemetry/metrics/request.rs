//! Instruments of the request path: decisions, what they rested on and how long they took.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};

use super::catalog::Catalog;
use super::labels::{FALLBACK_REASON, LEAVE_REASON, MODEL, OUTCOME, POLICY, REFUSAL_REASON, STAGE};
use super::{Metrics, ModelLabels, ReasonLabels};
use crate::routing::pick::{Outcome, Policy};

/// Shortest duration that a histogram tells apart: below it, a decision is as fast as it needs to be.
const SHORTEST_BUCKET_SECONDS: f64 = 20e-6;
/// Doublings from 20 µs up to 2.6 s, which is beyond every budget that a request has.
const N_BUCKETS: u16 = 18;

/// Registered with the others, in [`Metrics`].
#[derive(Debug)]
pub(super) struct Instruments {
    decisions: Family<DecisionLabels, Counter>,
    fallbacks: Family<ReasonLabels, Counter>,
    decision_duration: Histogram,
    stage_duration: Family<StageLabels, Histogram>,
    matched_tokens: Family<ModelLabels, Counter>,
    prompt_tokens: Family<ModelLabels, Counter>,
    left_to_envoy: Family<ReasonLabels, Counter>,
    immediate_responses: Family<ReasonLabels, Counter>,
    full_reports_requested: Family<ModelLabels, Counter>,
}

/// A step of the request path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Reading the request body.
    Parse,
    /// Getting the prompt's token ids.
    Tokenize,
    /// Hashing the token ids into block hashes.
    Hash,
    /// Asking the index.
    Lookup,
    /// Scoring the endpoints and picking one.
    Pick,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DecisionLabels {
    model: Arc<str>,
    outcome: &'static str,
    policy: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StageLabels {
    stage: Stage,
}

impl Instruments {
    pub(super) fn register(catalog: &mut Catalog) -> Self {
        let c = catalog;
        Self {
            decisions: c.add(
                "decisions",
                "Picks, by what they rested on and by what ordered the candidates",
                &[MODEL, OUTCOME, POLICY],
            ),
            fallbacks: c.add("fallbacks", "Picks by load alone, by what kept the index out", &[FALLBACK_REASON]),
            decision_duration: c.add_seconds(
                "decision_duration",
                "Time from the complete request body to the pick, tokenization included, of requests for which somebody was picked",
                &[],
                histogram(),
            ),
            stage_duration: c.add_seconds(
                "stage_duration",
                "Time that one step of a pick took, in all keyspaces together",
                &[STAGE],
                Family::new_with_constructor(histogram as fn() -> Histogram),
            ),
            matched_tokens: c.add("matched_tokens", "Prompt tokens held by the picked endpoint", &[MODEL]),
            prompt_tokens: c.add("prompt_tokens", "Prompt tokens of picks that knew them", &[MODEL]),
            left_to_envoy: c.add("left_to_envoy", "Requests passed on for Envoy's policy to pick", &[LEAVE_REASON]),
            immediate_responses: c.add("immediate_responses", "Requests answered with an error", &[REFUSAL_REASON]),
            full_reports_requested: c.add(
                "full_reports_requested",
                "Requests that had their engine announce the blocks that it reused",
                &[MODEL],
            ),
        }
    }
}

impl Metrics {
    /// Makes the series of a pool that has had no request yet exist.
    pub(super) fn add_requests(&self, model: &Arc<str>) {
        for outcome in Outcome::NAMES {
            for policy in Policy::NAMES {
                let labels = DecisionLabels { model: Arc::clone(model), outcome, policy };
                drop(self.requests.decisions.get_or_create(&labels));
            }
        }
        let labels = ModelLabels { model: Arc::clone(model) };
        drop(self.requests.matched_tokens.get_or_create(&labels));
        drop(self.requests.prompt_tokens.get_or_create(&labels));
        drop(self.requests.full_reports_requested.get_or_create(&labels));
    }

    /// Counts a pick in `decisions_total`.
    pub fn count_decision(&self, model: &Arc<str>, outcome: &Outcome, policy: Policy) {
        let (outcome, policy) = (outcome.as_str(), policy.as_str());
        let labels = DecisionLabels { model: Arc::clone(model), outcome, policy };
        self.requests.decisions.get_or_create(&labels).inc();
    }

    /// Counts a pick by load alone in `fallbacks_total`; `reason` is the fallback's name.
    pub fn count_fallback(&self, reason: &'static str) {
        self.requests.fallbacks.get_or_create(&ReasonLabels { reason }).inc();
    }

    /// Records how long a pick took in all.
    pub fn observe_decision(&self, duration: Duration) {
        self.requests.decision_duration.observe(duration.as_secs_f64());
    }

    /// Records how long one step of a pick took.
    pub fn observe_stage(&self, stage: Stage, duration: Duration) {
        self.requests.stage_duration.get_or_create(&StageLabels { stage }).observe(duration.as_secs_f64());
    }

    /// Counts the tokens of a prompt, and those of them that the picked endpoint held.
    pub fn count_tokens(&self, model: &Arc<str>, n_prompt: u64, n_matched: u64) {
        let labels = ModelLabels { model: Arc::clone(model) };
        self.requests.prompt_tokens.get_or_create(&labels).inc_by(n_prompt);
        self.requests.matched_tokens.get_or_create(&labels).inc_by(n_matched);
    }

    /// Counts a request that was passed on without a pick.
    pub fn count_left_to_envoy(&self, reason: &'static str) {
        self.requests.left_to_envoy.get_or_create(&ReasonLabels { reason }).inc();
    }

    /// Counts a request that was answered with an error of ours.
    pub fn count_immediate_response(&self, reason: &'static str) {
        self.requests.immediate_responses.get_or_create(&ReasonLabels { reason }).inc();
    }

    /// Counts a request whose engine was asked to announce the blocks that it reuses.
    pub fn count_full_report(&self, model: &Arc<str>) {
        self.requests.full_reports_requested.get_or_create(&ModelLabels { model: Arc::clone(model) }).inc();
    }
}

impl Stage {
    /// The label's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Parse => "parse",
            Self::Tokenize => "tokenize",
            Self::Hash => "hash",
            Self::Lookup => "lookup",
            Self::Pick => "pick",
        }
    }
}

impl EncodeLabelValue for Stage {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        self.as_str().encode(encoder)
    }
}

fn histogram() -> Histogram {
    Histogram::new(exponential_buckets(SHORTEST_BUCKET_SECONDS, 2.0, N_BUCKETS))
}
