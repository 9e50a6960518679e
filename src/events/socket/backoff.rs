//! Pauses between attempts: exponential, with full jitter.

use std::time::Duration;

/// Pauses from 0 up to a bound that doubles with each failure in a row. Full jitter: of many who fail at the same
/// moment, no two come back at the same moment.
///
/// At its upper bound it is the source's circuit breaker: a publisher that is gone costs one attempt per half a minute.
#[derive(Debug)]
pub(super) struct Backoff {
    n_failures: u32,
    bounds: Bounds,
}

/// The first and the greatest bound of a [`Backoff`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    pub(super) first: Duration,
    pub(super) greatest: Duration,
}

/// Between two connections to a publisher.
pub(super) const RECONNECT: Bounds = Bounds { first: Duration::from_millis(100), greatest: Duration::from_secs(30) };
/// Between a panic of a source's code and its next life.
pub(super) const REVIVE: Bounds = Bounds { first: Duration::from_secs(5), greatest: Duration::from_secs(300) };

impl Backoff {
    pub(super) fn new(bounds: Bounds) -> Self {
        Self { n_failures: 0, bounds }
    }

    /// Notes a success: the next pause is a short one.
    pub(super) fn reset(&mut self) {
        self.n_failures = 0;
    }

    /// Notes a failure; how long to wait before the next attempt.
    pub(super) fn pause(&mut self, random: &mut fastrand::Rng) -> Duration {
        let bound = self.bounds.first.saturating_mul(2_u32.saturating_pow(self.n_failures));
        self.n_failures = self.n_failures.saturating_add(1).min(31);
        bound.min(self.bounds.greatest).mul_f64(random.f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_the_greatest_and_use_the_whole_range() {
        let mut random = fastrand::Rng::with_seed(1);
        let mut backoff = Backoff::new(RECONNECT);
        for n_failures in 0..40 {
            let bound = Duration::from_millis(100 << n_failures.min(20)).min(Duration::from_secs(30));
            assert!(backoff.pause(&mut random) <= bound, "failure {n_failures}");
        }
        let pauses: Vec<Duration> = (0..100).map(|_| backoff.pause(&mut random)).collect();
        assert!(
            pauses.iter().min() < Some(&Duration::from_secs(5)) && pauses.iter().max() > Some(&Duration::from_secs(25))
        );
        backoff.reset();
        assert!(backoff.pause(&mut random) <= Duration::from_millis(100));
    }
}
