//! The [`Decision`]: one value with everything that led to a pick.

use std::sync::Arc;
use std::time::Duration;

use super::pick::Pick;
use super::standing::{Policy, Standing};

/// One routing decision with everything that led to it: metrics, spans, logs and explanations are views of this value.
#[derive(Clone, Debug)]
pub struct Decision {
    /// Name of the pool's model.
    pub model: Arc<str>,
    /// The name that the client used, which is the model's, one of its aliases' or one of its adapters'; the model's where
    /// the client named none.
    pub requested: Arc<str>,
    /// What ordered the candidates.
    pub policy: Policy,
    /// Where the request goes.
    pub pick: Pick,
    /// What came of the lookup.
    pub outcome: Outcome,
    /// Tokens of the prompt; 0 when it was not tokenized.
    pub prompt_tokens: u32,
    /// Full blocks of the prompt that were looked up, in the keyspace with most of them.
    pub prompt_blocks: u32,
    /// Endpoints that were compared.
    pub n_candidates: u32,
    /// Endpoints that were avoided: left out, unless there was nobody else.
    pub n_avoided: u32,
    /// The best candidates, best first: the pick, the runner-up and so on, at most [`super::pick::MOST_STANDINGS`].
    pub standings: Vec<Standing>,
    /// How long each step took.
    pub timings: Timings,
}

impl Decision {
    /// How the runner-up stood, if there was another candidate.
    pub fn runner_up(&self) -> Option<&Standing> {
        self.standings.get(1)
    }
}

/// How long the steps of a decision took; 0 where a step was not taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timings {
    /// Reading the body.
    pub parse: Duration,
    /// Getting the prompt's tokens.
    pub tokenize: Duration,
    /// Hashing them, in all keyspaces.
    pub hash: Duration,
    /// Looking the hashes up, in all keyspaces.
    pub lookup: Duration,
    /// Comparing the endpoints and noting the pick.
    pub pick: Duration,
    /// From the complete body to the decision.
    pub total: Duration,
}

/// Why a request was picked by load although its prefix might be cached somewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fallback {
    /// The prompt's tokens are not asked for; the reason is that of the request.
    Opaque(&'static str),
    /// The body is not a request we can read.
    UnreadableBody,
    /// The body is larger than what is read.
    OversizedBody,
    /// The prompt's tokens are not known; the reason is that of the tokenizer.
    Tokenizer(&'static str),
}

impl Fallback {
    /// Name in metrics, spans and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Opaque(reason) | Self::Tokenizer(reason) => reason,
            Self::UnreadableBody => "unreadable_body",
            Self::OversizedBody => "oversized_body",
        }
    }
}

/// What came of the prefix lookup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The picked endpoint holds a prefix of the prompt, by its events, or is about to.
    PrefixMatch,
    /// The picked endpoint was given a prefix of the prompt before; whether it still holds it nobody says.
    LearnedMatch,
    /// The prompt was looked up and the picked endpoint holds nothing of it.
    NoMatch,
    /// The prompt was not looked up.
    Fallback(Fallback),
}

impl Outcome {
    /// All values of [`Outcome::as_str`].
    pub const NAMES: [&'static str; 4] = ["prefix_match", "learned_match", "no_match", "fallback"];

    /// Name in metrics, spans and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::PrefixMatch => "prefix_match",
            Self::LearnedMatch => "learned_match",
            Self::NoMatch => "no_match",
            Self::Fallback(_) => "fallback",
        }
    }
}
