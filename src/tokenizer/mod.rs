//! Token ids of a prompt, exactly as the engine will see them.
//!
//! [`remote`] asks an engine. Whatever goes wrong, the caller gets an [`Error`] within the budget and picks by load.

pub mod remote;

/// Why a prompt's tokens are not known. None of them is the client's fault or concern.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No endpoint could be asked.
    #[error("no endpoint can be asked for tokens")]
    NoEndpoint,
    /// The budget was used up.
    #[error("no tokens within the budget of {0:?}")]
    Budget(std::time::Duration),
    /// The endpoint could not be reached, or broke off.
    #[error("the endpoint did not answer /tokenize")]
    Unreachable(#[source] reqwest::Error),
    /// The endpoint answered with another status than 200.
    #[error("the endpoint answered /tokenize with status {0}, expected 200")]
    Status(u16),
    /// The answer is larger than any list of tokens could be.
    #[error("the answer to /tokenize is larger than {0} bytes")]
    TooLarge(usize),
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
            Self::Unreachable(_) => "tokenizer_unreachable",
            Self::Status(_) => "tokenizer_status",
            Self::TooLarge(_) => "tokenizer_too_large",
            Self::Nonsense => "tokenizer_nonsense",
        }
    }
}
