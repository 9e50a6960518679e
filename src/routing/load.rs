//! What this router knows of an endpoint's load: requests in flight, and recent failures to serve.
//!
//! In flight is counted by a value ([`InFlight`]) that the request's stream owns, so that it cannot leak. Failures put
//! an endpoint aside with exponential backoff; when the time is over one request may try it (half-open) while the
//! others still avoid it, and one success forgets everything. All of it is a few atomics: reading takes no lock.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use super::endpoint::Endpoint;

/// How long an endpoint is avoided after its first failure; doubles with each further one. Long enough for a
/// connection storm to pass, short enough that a restarted pod is back before its users notice.
const FIRST_BACKOFF_MS: u64 = 1_000;
/// Longest time that an endpoint is avoided before the next trial.
const LONGEST_BACKOFF_MS: u64 = 30_000;

/// A point in time: milliseconds since any fixed moment of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Millis(pub u64);

/// Load and recent failures of one endpoint.
#[derive(Debug, Default)]
pub struct Load {
    in_flight: AtomicU32,
    /// Failures in a row (low 8 bits) and the time until which the endpoint is avoided (the rest): one word, so that
    /// a reader never sees one without the other.
    avoidance: AtomicU64,
}

impl Load {
    /// Requests of this router that the endpoint is working on.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Relaxed)
    }

    /// Whether requests should go elsewhere.
    pub fn is_avoided(&self, now: Millis) -> bool {
        Avoidance::unpack(self.avoidance.load(Relaxed)).until > now
    }

    /// How long it is still avoided; none if it is not.
    pub fn avoided_for(&self, now: Millis) -> Option<Millis> {
        let until = Avoidance::unpack(self.avoidance.load(Relaxed)).until;
        until.0.checked_sub(now.0).filter(|rest| *rest > 0).map(Millis)
    }

    /// A request that was picked for this endpoint at `picked_at` was not served by it. Says whether that begins a time
    /// of avoidance: requests that were under way when the last one began fail with it and tell nothing new.
    pub fn failed(&self, picked_at: Millis, now: Millis) -> bool {
        self.change(|avoidance| {
            if avoidance.n_failures > 0 && picked_at < avoidance.began() {
                return None;
            }
            let n_failures = avoidance.n_failures.saturating_add(1);
            Some(Avoidance { n_failures, until: Millis(now.0 + backoff_ms(n_failures)) })
        })
    }

    /// The endpoint served a request.
    pub fn served(&self) {
        // Almost always 0 already: do not write to a cache line that every request reads.
        if self.avoidance.load(Relaxed) != 0 {
            self.avoidance.store(0, Relaxed);
        }
    }

    /// The endpoint was picked although it failed before: until this trial is decided, others keep away.
    fn begin_trial(&self, now: Millis) {
        if self.avoidance.load(Relaxed) != 0 {
            let trial = |avoidance: Avoidance| Avoidance {
                until: Millis(now.0 + backoff_ms(avoidance.n_failures)),
                ..avoidance
            };
            self.change(|avoidance| Some(trial(avoidance)).filter(|_| avoidance.n_failures > 0));
        }
    }

    /// Says whether there was a change.
    fn change(&self, next: impl Fn(Avoidance) -> Option<Avoidance>) -> bool {
        let step = |packed| next(Avoidance::unpack(packed)).map(Avoidance::pack);
        self.avoidance.fetch_update(Relaxed, Relaxed, step).is_ok()
    }
}

#[derive(Clone, Copy)]
struct Avoidance {
    n_failures: u8,
    until: Millis,
}

impl Avoidance {
    fn unpack(packed: u64) -> Self {
        Self { n_failures: packed as u8, until: Millis(packed >> 8) }
    }

    /// When it was set: at the failure, or at the pick of the trial.
    fn began(self) -> Millis {
        Millis(self.until.0.saturating_sub(backoff_ms(self.n_failures)))
    }

    fn pack(self) -> u64 {
        (self.until.0 << 8) | u64::from(self.n_failures)
    }
}

fn backoff_ms(n_failures: u8) -> u64 {
    let doublings = u32::from(n_failures.saturating_sub(1)).min(10);
    (FIRST_BACKOFF_MS << doublings).min(LONGEST_BACKOFF_MS)
}

/// One request on its way to an endpoint; counts as in flight for as long as this value lives.
#[derive(Debug)]
pub struct InFlight {
    endpoint: Arc<Endpoint>,
    picked_at: Millis,
}

impl InFlight {
    /// Counts a request that was just picked for `endpoint`.
    pub fn new(endpoint: Arc<Endpoint>, now: Millis) -> Self {
        endpoint.load.begin_trial(now);
        Self::serving(endpoint, now)
    }

    /// Counts a request that `endpoint` already serves. Nobody chose it as a trial, and what came of it is known: that
    /// others keep away for another time would rest on nothing.
    pub fn serving(endpoint: Arc<Endpoint>, now: Millis) -> Self {
        endpoint.load.in_flight.fetch_add(1, Relaxed);
        Self { endpoint, picked_at: now }
    }

    /// When the request was picked.
    pub fn picked_at(&self) -> Millis {
        self.picked_at
    }

    /// Moves the count to the endpoint that really serves the request.
    pub fn move_to(&mut self, endpoint: Arc<Endpoint>) {
        endpoint.load.in_flight.fetch_add(1, Relaxed);
        let previous = std::mem::replace(&mut self.endpoint, endpoint);
        previous.load.in_flight.fetch_sub(1, Relaxed);
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.endpoint.load.in_flight.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::endpoint::EndpointId;

    fn endpoint(id: u32) -> Arc<Endpoint> {
        Arc::new(Endpoint::new(EndpointId(id), ([127, 0, 0, 1], 8000).into()))
    }

    #[test]
    fn in_flight_follows_the_guard() {
        let (a, b) = (endpoint(1), endpoint(2));
        let mut guard = InFlight::new(a.clone(), Millis(0));
        assert_eq!((a.load.in_flight(), b.load.in_flight()), (1, 0));
        guard.move_to(b.clone());
        assert_eq!((a.load.in_flight(), b.load.in_flight()), (0, 1));
        drop(guard);
        assert_eq!((a.load.in_flight(), b.load.in_flight()), (0, 0));
    }

    #[test]
    fn failures_back_off_and_one_success_forgets() {
        let load = Load::default();
        let fails_at = |ms| load.failed(Millis(ms), Millis(ms));
        fails_at(10);
        assert!(load.is_avoided(Millis(1_009)) && !load.is_avoided(Millis(1_010)));
        assert_eq!((load.avoided_for(Millis(1_009)), load.avoided_for(Millis(1_010))), (Some(Millis(1)), None));
        fails_at(2_000);
        assert!(load.is_avoided(Millis(3_999)) && !load.is_avoided(Millis(4_000)));
        (3..300).for_each(|n| assert!(fails_at(n * 1_000)));
        assert!(load.is_avoided(Millis(328_999)) && !load.is_avoided(Millis(329_000)), "the backoff is bounded");
        load.served();
        assert!(!load.is_avoided(Millis(299_001)));
    }

    #[test]
    fn a_burst_of_failures_is_one() {
        let load = Load::default();
        assert!(load.failed(Millis(90), Millis(100)));
        for picked_at in [10, 50, 99] {
            assert!(!load.failed(Millis(picked_at), Millis(120)));
        }
        assert!(!load.is_avoided(Millis(1_100)), "the backoff is that of the first failure");
    }

    #[test]
    fn a_trial_keeps_the_others_away() {
        let endpoint = endpoint(1);
        endpoint.load.failed(Millis(0), Millis(0));
        assert!(!endpoint.load.is_avoided(Millis(1_500)));
        let _trial = InFlight::new(endpoint.clone(), Millis(1_500));
        assert!(endpoint.load.is_avoided(Millis(2_499)) && !endpoint.load.is_avoided(Millis(2_500)));
        assert!(endpoint.load.failed(Millis(1_500), Millis(1_600)), "the trial's own failure counts");
        assert!(endpoint.load.is_avoided(Millis(3_599)) && !endpoint.load.is_avoided(Millis(3_600)));
    }

    #[test]
    fn a_request_that_is_served_already_is_no_trial() {
        let endpoint = endpoint(1);
        endpoint.load.failed(Millis(0), Millis(100));
        assert!(!endpoint.load.failed(Millis(50), Millis(900)), "it was under way");
        let serving = InFlight::serving(endpoint.clone(), Millis(900));
        assert_eq!(endpoint.load.avoided_for(Millis(900)), Some(Millis(200)), "as long as after the failure");
        assert_eq!(endpoint.load.in_flight(), 1);
        drop(serving);
        assert_eq!(endpoint.load.in_flight(), 0);
    }
}
