//! Token ids of a prompt, exactly as the engine will see them.
//!
//! [`remote`] asks an engine. Whatever goes wrong, the caller gets an [`Error`] within the budget and picks by load.

pub mod local;
pub mod remote;

use crate::engine;

/// The tokens of a prompt.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tokens {
    /// Token ids, as the engine sees them.
    pub ids: Vec<u32>,
}

/// Why a prompt's tokens are not known. None of them is the client's fault or concern.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No endpoint could be asked.
    #[error("no endpoint can be asked for tokens")]
    NoEndpoint,
    /// The budget was used up.
    #[error("no tokens within the budget of {0:?}")]
    Budget(std::time::Duration),
    /// The endpoint did not answer, or not with 200, or with more than any list of tokens could be.
    #[error("/tokenize could not be asked")]
    Engine(#[from] engine::Error),
    /// The answer is not what `/tokenize` answers.
    #[error("the answer to /tokenize is not a list of as many token ids as it counts")]
    Nonsense,
}

impl Error {
    /// Name in metrics, spans and logs.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::NoEndpoint => "tokenizer_no_endpoint",
            Self::Budget(_) => "tokenizer_budget",
            Self::Engine(engine::Error::Unreachable(_)) => "tokenizer_unreachable",
            Self::Engine(engine::Error::Status(_)) => "tokenizer_status",
            Self::Engine(engine::Error::TooLarge(_)) => "tokenizer_too_large",
            Self::Nonsense => "tokenizer_nonsense",
        }
    }
}
