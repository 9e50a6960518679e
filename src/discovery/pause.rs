//! Pauses between attempts: exponential, with full jitter, so that of many who fail together no two come back together.

use std::time::Duration;

/// How long to wait after so many failures in a row: from nothing to `first`, which doubles with each failure up to
/// `greatest`. `random` is from 0 to 1.
pub(super) fn pause(n_failures: u32, first: Duration, greatest: Duration, random: f64) -> Duration {
    match n_failures {
        0 => Duration::ZERO,
        n => first.saturating_mul(2_u32.saturating_pow(n - 1)).min(greatest).mul_f64(random),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_the_greatest_and_use_the_whole_range() {
        let (first, greatest) = (Duration::from_millis(500), Duration::from_secs(10));
        assert_eq!(pause(0, first, greatest, 1.0), Duration::ZERO);
        for (n_failures, most) in [(1, 500), (2, 1_000), (3, 2_000), (5, 8_000), (6, 10_000), (u32::MAX, 10_000)] {
            assert_eq!(pause(n_failures, first, greatest, 1.0), Duration::from_millis(most), "{n_failures}");
            assert_eq!(pause(n_failures, first, greatest, 0.0), Duration::ZERO);
        }
    }
}
