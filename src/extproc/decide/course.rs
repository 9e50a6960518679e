//! Whether Envoy is told a pick, and what is written down of it.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use super::Router;
use crate::extproc::rollout::{Mode, Rollout};
use crate::record::Recorder;

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
}
