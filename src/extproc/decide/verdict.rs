//! What may become of a request.

use std::sync::Arc;

use super::{Pool, Shadowed};
use crate::extproc::rollout::Mode;
use crate::routing::endpoint::Endpoint;
use crate::routing::index::{Promised, Watched};
use crate::routing::load::{InFlight, Millis};
use crate::routing::pick::Decision;
use crate::tokenizer::Late;

/// What becomes of a request.
pub struct Answer {
    /// Where it goes.
    pub verdict: Verdict,
    /// Its body, if that is not the client's.
    pub body: Option<Vec<u8>>,
    /// What may still be learned for later requests while this one is on its way.
    pub late: Option<Late>,
}

/// The answer to "where does this request go?".
#[derive(Debug)]
pub enum Verdict {
    /// To an endpoint of ours.
    Route(Box<Routed>),
    /// Wherever Envoy's own policy sends it, and what we would have said is compared with that.
    Shadow(Box<Shadowed>),
    /// Wherever Envoy's own policy sends it.
    Leave(Leave),
    /// Nowhere: there is no endpoint.
    Refuse(Refusal),
}

impl Verdict {
    /// How far the request was followed; none where nobody asked, for its pool is not known or not listed.
    pub fn mode(&self) -> Option<Mode> {
        match self {
            Self::Route(_) | Self::Refuse(Refusal::NoEndpoint | Refusal::EmptySubset) => Some(Mode::Active),
            Self::Shadow(_) => Some(Mode::Shadow),
            Self::Leave(leave) | Self::Refuse(Refusal::NoPick(leave)) => leave.mode(),
        }
    }
}

/// A request on its way.
#[derive(Debug)]
pub struct Routed {
    /// The decision.
    pub decision: Decision,
    /// Counts the request for its endpoint, from the moment of the pick.
    pub in_flight: InFlight,
    /// The blocks that the endpoint is going to hold, by keyspace; none where it holds them, or where they are not
    /// known.
    pub promised: Vec<Promised>,
    /// Tells whether the endpoint holds what it was said to hold; none where no events tell.
    pub watched: Option<Watched>,
    /// Whether the response has come.
    pub is_served: bool,
    /// The pool it was picked from.
    pub pool: Arc<Pool>,
    /// The data-parallel rank that the engine is told to use.
    pub steered_rank: Option<u32>,
}

impl Routed {
    /// Another endpoint served the request.
    pub fn served_by(&mut self, server: Arc<Endpoint>, now: Millis) {
        self.promised.iter_mut().for_each(|promised| promised.move_to(&server, now));
        // Nothing was predicted of that endpoint.
        self.watched = None;
        self.in_flight.move_to(server);
    }

    /// Nobody computes anything for the request.
    pub fn void(&mut self) {
        self.promised.drain(..).for_each(Promised::void);
        self.watched = None;
    }

    /// The request has ended.
    pub fn end(self, now: Millis) {
        self.promised.into_iter().for_each(|promised| promised.end(now));
        // One that was given up before its response may never have reached the engine: that nothing was stored again is
        // no sign of a prediction that came true. (Of a streamed answer the headers come before anything is computed, so
        // one that is given up later still in the engine's queue does count.)
        if let Some(watched) = self.watched.filter(|_| self.is_served) {
            watched.end(now);
        }
    }
}

/// Why a request is left to Envoy's own policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leave {
    /// The request names no model and there is no default pool.
    NoModel,
    /// The request names a model that is not configured.
    UnknownModel,
    /// Discovery has not listed the pool yet.
    NotSynced,
    /// The body is too large to be read, there are several models, and the name does not stand in the beginning.
    ModelBeyondLimit,
    /// The router, or the model, is switched off.
    SwitchedOff,
    /// In shadow: the pool is known and empty.
    NoEndpoint,
    /// In shadow: the gateway allows only endpoints that the pool does not have.
    EmptySubset,
}

impl Leave {
    fn mode(self) -> Option<Mode> {
        match self {
            Self::SwitchedOff => Some(Mode::Off),
            Self::NoEndpoint | Self::EmptySubset => Some(Mode::Shadow),
            Self::NoModel | Self::UnknownModel | Self::NotSynced | Self::ModelBeyondLimit => None,
        }
    }

    /// Name in metrics, spans and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoModel => "no_model",
            Self::UnknownModel => "unknown_model",
            Self::NotSynced => "not_synced",
            Self::ModelBeyondLimit => "model_beyond_limit",
            Self::SwitchedOff => "switched_off",
            Self::NoEndpoint => "no_endpoint",
            Self::EmptySubset => "empty_subset",
        }
    }
}

/// Why a request cannot be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The pool is known and empty.
    NoEndpoint,
    /// The gateway allows only endpoints that the pool does not have.
    EmptySubset,
    /// We pick nobody, and Envoy has nobody to fall back to.
    NoPick(Leave),
}

impl Refusal {
    /// Name in metrics, spans, logs and the answer's `code`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoEndpoint => "no_endpoint",
            Self::EmptySubset => "empty_subset",
            Self::NoPick(leave) => leave.as_str(),
        }
    }

    /// Sentence for the client.
    pub fn message(self) -> &'static str {
        match self {
            Self::NoEndpoint | Self::NoPick(Leave::NoEndpoint) => "no endpoint serves this model at the moment",
            Self::NoPick(Leave::SwitchedOff) => "routing to this model is switched off",
            Self::EmptySubset | Self::NoPick(Leave::EmptySubset) => {
                "none of the endpoints that the gateway allows serves this model"
            }
            Self::NoPick(Leave::NoModel) => "the request names no model, and none is the default",
            Self::NoPick(Leave::UnknownModel) => "the request names a model that nobody here serves",
            Self::NoPick(Leave::NotSynced) => "the endpoints of this model are not known yet",
            Self::NoPick(Leave::ModelBeyondLimit) => "the request is too large for its model's name to be found",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_is_picked_for_has_the_mode_that_it_was_left_under() {
        for (leave, expected) in [
            (Leave::SwitchedOff, Some(Mode::Off)),
            (Leave::NoEndpoint, Some(Mode::Shadow)),
            (Leave::EmptySubset, Some(Mode::Shadow)),
            (Leave::UnknownModel, None),
            (Leave::NotSynced, None),
        ] {
            assert_eq!(Verdict::Leave(leave).mode(), expected, "{leave:?}");
            assert_eq!(Verdict::Refuse(Refusal::NoPick(leave)).mode(), expected, "{leave:?}");
        }
        assert_eq!(Verdict::Refuse(Refusal::NoEndpoint).mode(), Some(Mode::Active));
    }
}
