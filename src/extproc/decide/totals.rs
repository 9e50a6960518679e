//! What has been decided so far, for those who look at one router without a Prometheus.
//!
//! The instruments count the same by model; these are sums that can be read.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use super::{Router, Verdict};
use crate::routing::pick::{Decision, Outcome};

/// Sums over all decisions. Independent counters, so all accesses are relaxed.
#[derive(Debug, Default)]
pub struct Totals {
    by_outcome: [AtomicU64; Outcome::NAMES.len()],
    /// By reason; written by those decisions only that could not look anything up.
    fallbacks: Mutex<BTreeMap<&'static str, u64>>,
    prompt_tokens: AtomicU64,
    matched_tokens: AtomicU64,
    left_to_envoy: AtomicU64,
    refused: AtomicU64,
}

/// The sums at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct TotalsSeen {
    /// Picks.
    pub decisions: u64,
    /// Picks by what came of the lookup.
    pub by_outcome: BTreeMap<&'static str, u64>,
    /// Picks by load alone, by reason.
    pub fallbacks: BTreeMap<&'static str, u64>,
    /// Tokens of all prompts.
    pub prompt_tokens: u64,
    /// Tokens that the picked endpoints were said to hold.
    pub matched_tokens: u64,
    /// Requests that were left to Envoy's own policy.
    pub left_to_envoy: u64,
    /// Requests that were refused.
    pub refused: u64,
    /// Blocks that picked endpoints were said to hold, and have stored again.
    pub stored_again_blocks: u64,
}

impl Totals {
    /// Counts what was decided, for its endpoint too.
    pub(super) fn count(&self, verdict: &Verdict) {
        match verdict {
            Verdict::Route(routed) => self.count_pick(&routed.decision),
            Verdict::Shadow(shadowed) => self.count_shadowed(&shadowed.decision),
            Verdict::Leave(_) => drop(self.left_to_envoy.fetch_add(1, Relaxed)),
            Verdict::Refuse(_) => drop(self.refused.fetch_add(1, Relaxed)),
        }
    }

    fn count_pick(&self, decision: &Decision) {
        decision.pick.endpoint.given.count(decision.pick.matched_tokens, decision.prompt_tokens);
        self.count_shadowed(decision);
    }

    /// The endpoint is given nothing by a pick that is not followed.
    fn count_shadowed(&self, decision: &Decision) {
        let Decision { pick, outcome, prompt_tokens, .. } = decision;
        let position = Outcome::NAMES.iter().position(|name| *name == outcome.as_str());
        self.by_outcome[position.expect("every outcome has its name in the list")].fetch_add(1, Relaxed);
        self.prompt_tokens.fetch_add(u64::from(*prompt_tokens), Relaxed);
        self.matched_tokens.fetch_add(u64::from(pick.matched_tokens), Relaxed);
        if let Outcome::Fallback(fallback) = outcome {
            let mut fallbacks = self.fallbacks.lock().unwrap_or_else(PoisonError::into_inner);
            *fallbacks.entry(fallback.as_str()).or_default() += 1;
        }
    }
}

impl Router {
    /// What has been decided so far.
    pub fn totals(&self) -> TotalsSeen {
        let Totals { by_outcome, fallbacks, prompt_tokens, matched_tokens, left_to_envoy, refused } = &self.totals;
        let by_outcome: BTreeMap<_, _> =
            Outcome::NAMES.into_iter().zip(by_outcome).map(|(name, n)| (name, n.load(Relaxed))).collect();
        TotalsSeen {
            decisions: by_outcome.values().sum(),
            by_outcome,
            fallbacks: fallbacks.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            prompt_tokens: prompt_tokens.load(Relaxed),
            matched_tokens: matched_tokens.load(Relaxed),
            left_to_envoy: left_to_envoy.load(Relaxed),
            refused: refused.load(Relaxed),
            stored_again_blocks: self.pools.iter().map(|pool| pool.predictions.n_stored_again()).sum(),
        }
    }
}
