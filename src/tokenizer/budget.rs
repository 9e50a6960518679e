//! How long a request may wait for its tokens.

use std::time::Duration;

use crate::request::Question;

/// Added for each byte of a question. vLLM tokenizes a byte of English text in 0.3 to 0.5 µs (0.32.0 on one core: 27 ms
/// for 20,000 tokens, 0.1 s for 49,000), and an engine has other things to do.
const PER_BYTE: Duration = Duration::from_micros(1);

/// Longest wait for the tokens of a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// For a short prompt.
    pub base: Duration,
    /// For the longest one.
    pub max: Duration,
}

impl Budget {
    /// The budget of one question.
    pub fn of(self, question: &Question) -> Duration {
        self.base.saturating_add(of_bytes(question)).min(self.max)
    }

    /// Whether `question` is one that nobody need be able to answer within the longest budget: what its bytes alone may
    /// take is more than that. Who is late with it may be as well as ever. (With a longest budget that is not longer
    /// than the base the [budget](Self::of) of every question ends at it; that alone makes none too large.)
    pub fn is_capped(self, question: &Question) -> bool {
        of_bytes(question) > self.max
    }
}

fn of_bytes(question: &Question) -> Duration {
    PER_BYTE.saturating_mul(u32::try_from(question.body.len()).unwrap_or(u32::MAX))
}

impl Default for Budget {
    /// That of the configuration.
    fn default() -> Self {
        Self { base: Duration::from_millis(100), max: Duration::from_millis(500) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::TokensApi;

    fn question(n_bytes: usize) -> Question {
        Question { api: TokensApi::Tokenize, body: vec![b' '; n_bytes] }
    }

    #[test]
    fn only_what_takes_longer_than_the_longest_budget_is_too_large_for_it() {
        let is_capped = |budget: Budget, n_bytes| budget.is_capped(&question(n_bytes));
        assert_eq!(
            [0, 500_000, 500_001, 10_000_000].map(|n| is_capped(Budget::default(), n)),
            [false, false, true, true]
        );
        let flat = Budget { base: Duration::from_millis(100), max: Duration::from_millis(100) };
        assert_eq!([0, 16, 100_000, 100_001].map(|n| is_capped(flat, n)), [false, false, false, true]);
    }

    #[test]
    fn longer_prompts_may_take_longer_up_to_a_bound() {
        let of = |n_bytes| Budget::default().of(&question(n_bytes)).as_millis();
        assert_eq!([of(0), of(100_000), of(400_000), of(10_000_000)], [100, 200, 500, 500]);
    }
}
