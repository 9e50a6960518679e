//! Learns from a response who really served a request.

use super::decide::Routed;
use super::message::Served;
use crate::routing::endpoint::{Endpoint, SourceKnowledge};
use crate::routing::load::Millis;

/// How a pick turned out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settled {
    /// The pick served at the first attempt.
    AsPicked,
    /// The pick answered that it cannot serve.
    CannotServe,
    /// Envoy needed more than one attempt.
    Retried,
    /// Envoy went elsewhere at once: its cluster and our endpoint set differ.
    Elsewhere,
    /// No endpoint answered: Envoy answered itself.
    NotServed,
}

impl Settled {
    /// Name in explanations and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::AsPicked => "as_picked",
            Self::CannotServe => "cannot_serve",
            Self::Retried => "retried",
            Self::Elsewhere => "elsewhere",
            Self::NotServed => "not_served",
        }
    }
}

/// Notes that the response came, moves the in-flight count to the endpoint that served, and avoids the one that did not. Says also whether that
/// begins a time of avoidance.
pub fn settle(routed: &mut Routed, served: &Served, now: Millis) -> (Settled, bool) {
    let picked = routed.decision.pick.endpoint.clone();
    let picked_at = routed.in_flight.picked_at();
    routed.is_served = true;
    let settled = judge(&picked, served);
    if settled == Settled::AsPicked {
        // Envoy's own answer, such as a 413, tells nothing of the endpoint.
        if served.address.is_some() || served.n_attempts.is_none() {
            picked.load.served();
        }
        if served.status >= 400 {
            // It computes nothing for a request that it, or Envoy, has refused.
            routed.void();
        }
        return (settled, false);
    }
    let is_newly_avoided = picked.load.failed(picked_at, now);
    let other = served.address.filter(|address| *address != picked.address);
    let server = other.and_then(|address| routed.pool.endpoint_at(address));
    let is_known = served.address == Some(picked.address) || server.is_some();
    if let Some(server) = server {
        if cannot_serve(served.status) {
            server.load.failed(picked_at, now);
        } else {
            server.load.served();
        }
        routed.served_by(server, now);
    }
    if served.status >= 400 || !is_known {
        routed.void();
    }
    if is_newly_avoided && !routed.pool.sync && settled != Settled::CannotServe {
        // No event will tell whether it comes back with an empty cache.
        SourceKnowledge::new(picked.knowledge.clone()).start_generation();
    }
    (settled, is_newly_avoided)
}

fn judge(picked: &Endpoint, served: &Served) -> Settled {
    match served.address {
        Some(address) if served.n_attempts.is_some_and(|n| n > 1) && address != picked.address => Settled::Retried,
        Some(address) if address != picked.address => Settled::Elsewhere,
        _ if cannot_serve(served.status) => {
            // Without attributes we cannot tell Envoy's own 503 from the endpoint's; both speak against the pick.
            if served.address.is_some() { Settled::CannotServe } else { Settled::NotServed }
        }
        Some(_) if served.n_attempts.is_some_and(|n| n > 1) => Settled::Retried,
        _ => Settled::AsPicked,
    }
}

/// Statuses by which a proxy or an engine says that it is not able to serve at the moment.
pub(super) fn cannot_serve(status: u16) -> bool {
    matches!(status, 502..=504)
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::sync::Arc;

    use tokio::sync::watch;

    use super::super::decide::Pool;
    use super::*;
    use crate::extproc::rollout::Switch;
    use crate::request::ReadOptions;
    use crate::routing::endpoint::{EndpointId, EndpointSet};
    use crate::routing::hash::BlockHash;
    use crate::routing::index::{PromiseLimits, Promises};
    use crate::routing::load::InFlight;
    use crate::routing::pick::{Decision, Outcome, Pick, Policy, Timings};
    use crate::tokenizer::{Config, Source, Tokenizer};

    fn address(port: u16) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], port))
    }

    /// A request picked for port 1 in a pool with ports 1 and 2.
    fn routed() -> (Routed, Vec<Arc<Endpoint>>) {
        let endpoint = |port| Arc::new(Endpoint::new(EndpointId(u32::from(port)), address(port)));
        let endpoints = vec![endpoint(1), endpoint(2)];
        let set = EndpointSet { synced: true, endpoints: endpoints.clone() };
        let pool = Pool {
            model: "m".into(),
            adapters: Vec::new(),
            hasher: None,
            reading: ReadOptions::default(),
            tokenizer: Arc::new(Tokenizer::new("m".into(), Source::Text, &Config::default())),
            endpoints: watch::channel(Arc::new(set)).1,
            reports: None,
            sync: false,
            predictions: Arc::default(),
            learned: Promises::new(PromiseLimits::LEARNED),
            rollout: Switch::default(),
        };
        let pick = Pick {
            endpoint: endpoints[0].clone(),
            matched_tokens: 0,
            offloaded_tokens: 0,
            rank: None,
            alternate: None,
        };
        let decision = Decision {
            model: "m".into(),
            requested: "m".into(),
            policy: Policy::LeastRequest,
            pick,
            outcome: Outcome::NoMatch,
            prompt_tokens: 0,
            prompt_blocks: 0,
            n_candidates: 2,
            n_avoided: 0,
            standings: Vec::new(),
            timings: Timings::default(),
        };
        let in_flight = InFlight::new(endpoints[0].clone(), Millis(0));
        let promised = pool.learned.promise(&[BlockHash(1)], 0, &endpoints[0], Millis(0)).into_iter().collect();
        let pool = Arc::new(pool);
        (Routed { decision, in_flight, promised, watched: None, is_served: false, pool, steered_rank: None }, endpoints)
    }

    #[test]
    fn every_way_a_pick_can_turn_out() {
        let cases = [
            (200, Some(1), Some(1), Settled::AsPicked, (false, false), (1, 0)),
            (200, Some(1), None, Settled::AsPicked, (false, false), (1, 0)),
            (429, Some(1), Some(1), Settled::AsPicked, (false, false), (1, 0)),
            (200, None, None, Settled::AsPicked, (false, false), (1, 0)),
            (503, Some(1), Some(1), Settled::CannotServe, (true, false), (1, 0)),
            (503, None, Some(1), Settled::NotServed, (true, false), (1, 0)),
            (200, Some(1), Some(2), Settled::Retried, (true, false), (1, 0)),
            (200, Some(2), Some(2), Settled::Retried, (true, false), (0, 1)),
            (504, Some(2), Some(2), Settled::Retried, (true, true), (0, 1)),
            (200, Some(2), Some(1), Settled::Elsewhere, (true, false), (0, 1)),
            (200, Some(9), Some(1), Settled::Elsewhere, (true, false), (1, 0)),
        ];
        for (status, port, n_attempts, expected, avoided, in_flight) in cases {
            let (mut routed, endpoints) = routed();
            let served = Served { status, address: port.map(address), n_attempts };
            let (settled, _) = settle(&mut routed, &served, Millis(0));
            let now_avoided = endpoints.iter().map(|e| e.load.is_avoided(Millis(1))).collect::<Vec<_>>();
            let now_in_flight = endpoints.iter().map(|e| e.load.in_flight()).collect::<Vec<_>>();
            assert_eq!(settled, expected, "{served:?}");
            let is_computed = status < 400 && port != Some(9);
            assert_eq!(!routed.promised.is_empty(), is_computed, "what is promised after {served:?}");
            assert_eq!(now_avoided, [avoided.0, avoided.1], "{served:?}");
            assert_eq!(now_in_flight, [in_flight.0, in_flight.1], "{served:?}");
        }
    }
}
