//! The decision on a body that is larger than what is read.
//!
//! Its prompt cannot be known, and the request must not suffer for our limit: it is picked by load among the endpoints
//! of its model, if the model's name stands early enough or there is but one model. Otherwise it is left to Envoy.

use std::time::Instant;

use super::{Answer, Leave, Router, Verdict};
use crate::extproc::message::RequestHead;
use crate::request::model_in_beginning;
use crate::routing::pick::Fallback;

impl Router {
    /// Decides where a request goes of whose body only the `beginning` is read, and counts it.
    pub fn decide_by_beginning(&self, head: &RequestHead, beginning: &[u8]) -> Answer {
        let started = Instant::now();
        let verdict = self.verdict_by_beginning(head, beginning);
        self.concluded(Answer { verdict, body: None, late: None }, started)
    }

    fn verdict_by_beginning(&self, head: &RequestHead, beginning: &[u8]) -> Verdict {
        let found = match model_in_beginning(beginning) {
            Some(model) => self.pools.find(Some(&model)),
            // It may stand further on: the default pool is for requests that name none.
            None => self.pools.only().ok_or(Leave::ModelBeyondLimit),
        };
        let target = match found {
            Ok(target) => target,
            Err(leave) => return Verdict::Leave(leave),
        };
        let endpoints = target.pool.endpoints.borrow().clone();
        if !endpoints.synced {
            return Verdict::Leave(Leave::NotSynced);
        }
        self.route(&target, &endpoints, head, &Err(Fallback::OversizedBody))
    }
}
