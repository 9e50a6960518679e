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

impl Considered {
    /// Why nobody could be picked, where Envoy picks anyway.
    pub(super) fn leave_in_shadow(&self) -> Leave {
        match self.refusal() {
            Refusal::EmptySubset => Leave::EmptySubset,
            Refusal::NoEndpoint | Refusal::NoPick(_) => Leave::NoEndpoint,
        }
    }
}

/// What is done with every request of a pool; none where a share of them is in shadow.
fn common_mode(rollout: Rollout) -> Option<Mode> {
    match (rollout.mode, rollout.percent.get()) {
        (Mode::Active, 100) => Some(Mode::Active),
        (Mode::Active, 0) => Some(Mode::Shadow),
        (Mode::Active, _) => None,
        (mode, _) => Some(mode),
    }
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

    /// What is done with every request of every pool; none where that is not the same.
    pub fn common_mode(&self) -> Option<Mode> {
        let mut modes = self.pools.iter().map(|pool| common_mode(pool.rollout.get()));
        let first = modes.next().unwrap_or(Some(Mode::Active))?;
        modes.all(|mode| mode == Some(first)).then_some(first)
    }

    /// What is done with a request whose pool is known.
    pub(super) fn mode_for(&self, head: &RequestHead, considered: &Considered, random: &mut fastrand::Rng) -> Mode {
        considered.target.pool.rollout.get().mode_for(head.request_id.as_deref(), random)
    }

    /// Picks and leaves the request to Envoy. That there is nobody to be picked is Envoy's to find out, too.
    pub(super) fn shadow(&self, head: &RequestHead, considered: Considered, random: &mut fastrand::Rng) -> Verdict {
        let Some(choice) = self.choose(head, &considered, random) else {
            return Verdict::Leave(considered.leave_in_shadow());
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_neither_active_nor_in_shadow() {
        for (mode, percent, expected) in [
            (Mode::Active, "100", Some(Mode::Active)),
            (Mode::Active, "99", None),
            (Mode::Active, "1", None),
            (Mode::Active, "0", Some(Mode::Shadow)),
            (Mode::Shadow, "50", Some(Mode::Shadow)),
            (Mode::Off, "50", Some(Mode::Off)),
        ] {
            let percent = percent.parse().expect("a share");
            assert_eq!(common_mode(Rollout { mode, percent }), expected, "{mode:?} {percent:?}");
        }
    }
}
