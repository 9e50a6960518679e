//! Token ids of a prompt, exactly as the engine will see them.
//!
//! [`remote`] asks the engines, [`render`] reads what they answer. Whatever goes wrong, the caller gets an [`Error`] within
//! the budget and picks by load.

pub mod remote;
pub mod render;

use crate::engine;
use crate::routing::hash::MmItem;

/// The tokens of a prompt.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tokens {
    /// Token ids, as the engine sees them.
    pub ids: Vec<u32>,
    /// The request's `cache_salt`, where the answer tells it: render APIs do.
    pub cache_salt: Option<String>,
    /// Where images, audio and video lie in the prompt, in its order and apart from each other.
    pub mm: Vec<MmItem>,
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
    /// As many calls as may be are under way.
    #[error("too many calls for tokens are under way")]
    Busy,
    /// Those that could be asked have failed, and no check of them has succeeded since.
    #[error("whoever could be asked for tokens has failed lately")]
    Open,
    /// The endpoint makes other tokens of a fixed text than most of its pool.
    #[error("the endpoint answers for another model or tokenizer")]
    Differs,
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
            Self::Busy => "tokenizer_busy",
            Self::Open => "tokenizer_open",
            Self::Differs => "tokenizer_differs",
            Self::Nonsense => "tokenizer_nonsense",
        }
    }
}
