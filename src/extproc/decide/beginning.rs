//! The decision on a body that is larger than what is read.
//!
//! Its prompt cannot be known, and the request must not suffer for our limit: it is picked by load among the endpoints
//! of its model, if the model's name stands early enough or there is but one model. Otherwise it is left to Envoy.

use super::timer::Timer;
use super::{Answer, Considered, Leave, Router, Verdict};
use crate::extproc::message::RequestHead;
use crate::extproc::rollout::Mode;
use crate::request::model_in_beginning;
use crate::routing::pick::Fallback;
use crate::telemetry::metrics::Stage;

impl Router {
    /// Decides where a request goes of whose body only the `beginning` is read, and counts it.
    pub fn decide_by_beginning(&self, head: &RequestHead, beginning: &[u8]) -> Answer {
        let mut timer = Timer::counting(&self.metrics);
        let mut random = fastrand::Rng::new();
        let verdict = match timer.timed(Stage::Parse, || self.consider_beginning(beginning)) {
            Ok(considered) => match self.mode_for(head, &considered, &mut random) {
                Mode::Active => timer.timed(Stage::Pick, || self.route(head, &considered, &mut random)),
                Mode::Shadow => timer.timed(Stage::Pick, || self.shadow(head, considered, &mut random)),
                Mode::Off => Verdict::Leave(Leave::SwitchedOff),
            },
            Err(leave) => Verdict::Leave(leave),
        };
        self.concluded(Answer { verdict, body: None, late: None }, timer)
    }

    /// What can be known without the whole body.
    pub(super) fn consider_beginning(&self, beginning: &[u8]) -> Result<Considered, Leave> {
        if self.is_off() {
            return Err(Leave::SwitchedOff);
        }
        let target = match model_in_beginning(beginning) {
            Some(model) => self.pools.find(Some(&model))?,
            // It may stand further on: the default pool is for requests that name none.
            None => self.pools.only().ok_or(Leave::ModelBeyondLimit)?,
        };
        if target.pool.rollout.get().mode == Mode::Off {
            return Err(Leave::SwitchedOff);
        }
        let endpoints = target.pool.endpoints.borrow().clone();
        if !endpoints.synced {
            return Err(Leave::NotSynced);
        }
        Ok(Considered { target, endpoints, lookup: Err(Fallback::OversizedBody), late: None })
    }
}
