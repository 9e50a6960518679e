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
        let n_bytes = u32::try_from(question.body.len()).unwrap_or(u32::MAX);
        self.base.saturating_add(PER_BYTE.saturating_mul(n_bytes)).min(self.max)
    }
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

    #[test]
    fn longer_prompts_may_take_longer_up_to_a_bound() {
        let of = |n_bytes| {
            let question = Question { api: TokensApi::Tokenize, body: vec![b' '; n_bytes] };
            Budget::default().of(&question).as_millis()
        };
        assert_eq!([of(0), of(100_000), of(400_000), of(10_000_000)], [100, 200, 500, 500]);
    }
}
