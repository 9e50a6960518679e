//! A decision that Envoy is not told, and what it would have been worth.
//!
//! Nothing that later decisions rest on may come of a pick that nobody follows: it is not in flight, promises nothing
//! and proves nothing about its endpoint. Who really serves is named by the response; from then on that request counts
//! there, and its blocks are promised there, as far as they were not known to be held when the decision was made. Events of
//! them have come by then, unless the answer is streamed, and confirm nothing any more, so they count for the time to
//! linger at most: a streamed answer's headers come before its prompt is computed, and its promises may end before that.

use std::sync::Arc;

use super::lookup::Lookup;
use super::{Pool, Verdict};
use crate::extproc::message::Served;
use crate::extproc::settle::cannot_serve;
use crate::routing::endpoint::Endpoint;
use crate::routing::index::Promised;
use crate::routing::load::{InFlight, Millis};
use crate::routing::pick::Decision;
use crate::routing::score::candidate;
use crate::telemetry::metrics::{Agreed, Metrics};

/// A request whose pick is not followed.
#[derive(Debug)]
pub struct Shadowed {
    /// The decision.
    pub decision: Decision,
    pool: Arc<Pool>,
    decided_at: Millis,
    /// What each endpoint holds of the prompt, until somebody serves it; none where that was not looked up.
    lookup: Option<Lookup>,
    serving: Serving,
}

/// What the response says.
#[derive(Debug)]
enum Serving {
    /// Nothing yet.
    Unknown,
    /// That an endpoint of ours serves the request.
    By {
        /// Counts it there.
        _in_flight: InFlight,
        promised: Vec<Promised>,
    },
    /// That nobody whom we know does.
    ByOthers,
}

impl Shadowed {
    pub(super) fn new(decision: Decision, pool: Arc<Pool>, lookup: Option<Lookup>, now: Millis) -> Self {
        Self { decision, pool, decided_at: now, lookup, serving: Serving::Unknown }
    }

    /// Notes and counts who serves the request.
    pub fn served(&mut self, served: &Served, now: Millis, metrics: &Metrics) {
        if !matches!(self.serving, Serving::Unknown) {
            return;
        }
        let model = self.decision.model.clone();
        let lookup = self.lookup.take();
        let Some(server) = served.address.and_then(|address| self.pool.endpoint_at(address)) else {
            self.serving = Serving::ByOthers;
            return metrics.count_shadow_decision(&model, Agreed::Unknown);
        };
        // It was Envoy that picked it, but that it cannot serve is as true as after a pick of ours.
        if cannot_serve(served.status) {
            if server.load.failed(self.decided_at, now) {
                metrics.count_endpoint_avoided(&model);
            }
        } else {
            server.load.served();
        }
        let pick = &self.decision.pick;
        let has_agreed = pick.endpoint.address == server.address;
        metrics.count_shadow_decision(&model, if has_agreed { Agreed::True } else { Agreed::False });
        let n_held = lookup.as_ref().map_or(0, |lookup| candidate(&server, &lookup.matches).matched_tokens);
        metrics.count_shadow_tokens(&model, u64::from(pick.matched_tokens), u64::from(n_held));
        self.serving = self.serving_by(server, served.status, lookup.as_ref(), now);
    }

    fn serving_by(&self, server: Arc<Endpoint>, status: u16, lookup: Option<&Lookup>, now: Millis) -> Serving {
        // It computes nothing for a request that it, or Envoy, has refused.
        let computing = lookup.filter(|_| status < 400);
        let promised = computing.map(|lookup| lookup.promise_served(&self.pool, &server, now)).unwrap_or_default();
        Serving::By { _in_flight: InFlight::serving(server, now), promised }
    }

    /// The request has ended.
    pub fn end(self, now: Millis, metrics: &Metrics) {
        match self.serving {
            Serving::Unknown => metrics.count_shadow_decision(&self.decision.model, Agreed::Unknown),
            Serving::By { promised, .. } => promised.into_iter().for_each(|promised| promised.end(now)),
            Serving::ByOthers => {}
        }
    }
}

impl Verdict {
    /// The decision, if there is one, whether it is followed or not.
    pub(super) fn decision_mut(&mut self) -> Option<&mut Decision> {
        match self {
            Self::Route(routed) => Some(&mut routed.decision),
            Self::Shadow(shadowed) => Some(&mut shadowed.decision),
            Self::Leave(_) | Self::Refuse(_) => None,
        }
    }
}
