//! Whether the local tokenizer may speak for the engines.
//!
//! It is distrusted until it has agreed with them on [`NEEDED`] prompts in a row, whatever their kind, and from then on a sample of one in
//! [`AUDIT_INTERVAL`] is still compared. One difference, and it begins anew: an engine with another revision of the model,
//! or another chat template, differs on some prompts only.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

/// Comparisons without a difference after which the local tokenizer is trusted.
pub(super) const NEEDED: u32 = 64;
/// One in so many prompts of a trusted tokenizer is also given to the engines.
const AUDIT_INTERVAL: u64 = 100;

/// See the module. The counters guard no other memory, and a moment's delay costs one comparison more: all accesses are
/// relaxed.
#[derive(Debug, Default)]
pub(super) struct Trust {
    /// Comparisons without a difference in a row, at most [`NEEDED`].
    n_agreed: AtomicU32,
    n_asked: AtomicU64,
    n_compared: AtomicU64,
    n_differences: AtomicU64,
}

/// What a comparison changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    Nothing,
    /// It is trusted from now on.
    Gained,
    /// It was trusted until now.
    Lost,
}

impl Trust {
    pub(super) fn is_trusted(&self) -> bool {
        self.n_agreed.load(Relaxed) >= NEEDED
    }

    /// Whether this prompt is one of the sample.
    pub(super) fn is_audited(&self) -> bool {
        self.n_asked.fetch_add(1, Relaxed).is_multiple_of(AUDIT_INTERVAL)
    }

    /// Takes note of a comparison.
    pub(super) fn compared(&self, is_equal: bool) -> Change {
        self.n_compared.fetch_add(1, Relaxed);
        if !is_equal {
            self.n_differences.fetch_add(1, Relaxed);
            let was_trusted = self.n_agreed.swap(0, Relaxed) >= NEEDED;
            return if was_trusted { Change::Lost } else { Change::Nothing };
        }
        let count = |n_agreed| (n_agreed < NEEDED).then_some(n_agreed + 1);
        match self.n_agreed.fetch_update(Relaxed, Relaxed, count) {
            Ok(before) if before + 1 == NEEDED => Change::Gained,
            Ok(_) | Err(_) => Change::Nothing,
        }
    }

    /// Comparisons, and those with a difference.
    pub(super) fn counts(&self) -> (u64, u64) {
        (self.n_compared.load(Relaxed), self.n_differences.load(Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trust_is_earned_lost_at_once_and_earned_anew() {
        let trust = Trust::default();
        for _ in 0..2 {
            for n in 1..=NEEDED {
                assert!(!trust.is_trusted());
                let expected = if n == NEEDED { Change::Gained } else { Change::Nothing };
                assert_eq!(trust.compared(true), expected);
            }
            assert!(trust.is_trusted());
            assert_eq!(trust.compared(true), Change::Nothing);
            assert_eq!(trust.compared(false), Change::Lost);
        }
        assert_eq!(trust.compared(false), Change::Nothing, "there was nothing to lose");
        assert_eq!(trust.counts(), (u64::from(2 * NEEDED + 5), 3));
    }

    #[test]
    fn a_sample_goes_on_being_compared() {
        let trust = Trust::default();
        let n_audited = (0..10 * AUDIT_INTERVAL).filter(|_| trust.is_audited()).count();
        assert_eq!(n_audited, 10);
    }
}
