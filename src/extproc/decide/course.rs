//! Whether Envoy is told a pick, and what is written down of it.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use super::lookup::Lookup;
use super::shadow::Shadowed;
use super::{Considered, Leave, Refusal, Router, Verdict, decision};
use crate::extproc::message::RequestHead;
use crate::extproc::rollout::{Mode, Rollout};
use crate::record::{Line, Recorder};
use crate::routing::pick::{Decision, Fallback};

/// What the configuration says of all pools, and may say otherwise while requests come.
#[derive(Debug, Default)]
pub(super) struct RolledOut {
    /// Whether every pool is off: then a request need not be read to know what becomes of it. Guards no other memory.
    is_off: AtomicBool,
    recorder: Option<Recorder>,
}

impl Router {
    /// Writes down decisions.
    #[must_use]
    pub fn with_recorder(mut self, recorder: Recorder) -> Self {
        self.rolled_out.recorder = Some(recorder);
        self
    }

    /// Makes the pools' rollouts hold for requests that come from now on; where `of` has none for a model, its former
    /// one stays.
    pub fn roll_out(&self, of: impl Fn(&str) -> Option<Rollout>) {
        for pool in self.pools.iter() {
            if let Some(rollout) = of(&pool.model) {
                pool.rollout.set(rollout);
            }
        }
        let is_off = self.pools.iter().all(|pool| pool.rollout.get().mode == Mode::Off);
        self.rolled_out.is_off.store(is_off, Relaxed);
    }

    /// Whether requests are left to Envoy whatever they are.
    pub fn is_off(&self) -> bool {
        self.rolled_out.is_off.load(Relaxed)
    }

    /// What is done with the picks of the pool whose picks are followed most.
    pub fn rollout_mode(&self) -> Mode {
        self.pools.iter().map(|pool| pool.rollout.get().mode).min().unwrap_or_default()
    }

    /// What is done with a request whose pool is known.
    pub(super) fn mode_for(&self, head: &RequestHead, considered: &Considered, random: &mut fastrand::Rng) -> Mode {
        considered.target.pool.rollout.get().mode_for(head.request_id.as_deref(), random)
    }

    /// Picks and leaves the request to Envoy. That there is nobody to be picked is Envoy's to find out, too.
    pub(super) fn shadow(&self, head: &RequestHead, considered: Considered, random: &mut fastrand::Rng) -> Verdict {
        let Some(choice) = self.choose(head, &considered, random) else {
            return Verdict::Leave(match considered.refusal() {
                Refusal::EmptySubset => Leave::EmptySubset,
                Refusal::NoEndpoint | Refusal::NoPick(_) => Leave::NoEndpoint,
            });
        };
        let Considered { target, lookup, .. } = considered;
        let decision = decision(&target, choice, &lookup);
        self.record(&decision, &lookup, Mode::Shadow);
        Verdict::Shadow(Box::new(Shadowed::new(decision, target.pool, lookup.ok(), self.now())))
    }

    /// Writes the decision down, if its prompt is known and anything is written.
    pub(super) fn record(&self, decision: &Decision, lookup: &Result<Lookup, Fallback>, mode: Mode) {
        let (Some(recorder), Ok(lookup)) = (&self.rolled_out.recorder, lookup) else { return };
        let Some(chain) = lookup.longest() else { return };
        recorder.note(|| Line {
            at: self.now(),
            model: decision.model.clone(),
            prompt_tokens: decision.prompt_tokens,
            block_size: chain.block_size.get(),
            blocks: chain.hashes.clone(),
            matched_tokens: decision.pick.matched_tokens,
            endpoint: decision.pick.endpoint.address,
            mode: mode.as_str(),
        });
    }
}
