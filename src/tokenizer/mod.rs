//! Token ids of a prompt, exactly as the engine will see them.
//!
//! A [`Tokenizer`] answers from its cache, or through its [`Source`]: the engines themselves ([`remote`], read by
//! [`render`]), a tokenizer in this process ([`local`]) that may speak for them once it is trusted, or, for an index
//! that no engine feeds, the bytes of the text.
//!
//! Whatever goes wrong, the caller gets an [`Error`] within the budget and picks by load. What may still come of a
//! question after that is handed to the caller as well ([`Late`]): it lives as long as the request, and ends with it.

mod ask;
mod budget;
mod cache;
pub mod local;
pub mod remote;
pub mod render;
mod text;
mod trust;
mod workers;

use std::convert::Infallible;
use std::fmt;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::engine;
use crate::routing::hash::MmItem;
pub use budget::Budget;
use cache::TokenCache;
use local::{LocalStatus, LocalTokenizer};
use remote::{RemoteStatus, RemoteTokenizer};
use trust::Trust;
use workers::Workers;

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

impl Tokens {
    /// Memory in use.
    fn n_bytes(&self) -> usize {
        let salt = self.cache_salt.as_ref().map_or(0, String::len);
        let identifiers: usize = self.mm.iter().map(|item| item.identifier.len()).sum();
        size_of::<Self>() + size_of_val(&*self.ids) + salt + size_of_val(&*self.mm) + identifiers
    }
}

/// Why a prompt's tokens are not known. None of them is the client's fault or concern.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No endpoint could be asked.
    #[error("no endpoint can be asked for tokens")]
    NoEndpoint,
    /// The budget was used up.
    #[error("no tokens within the budget of {0:?}")]
    Budget(Duration),
    /// The endpoint did not answer, or not with 200, or with more than any list of tokens could be.
    #[error("the engine could not be asked for tokens")]
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
    /// The answer is not what the engine's API answers.
    #[error("the answer is not a list of as many token ids as it counts")]
    Nonsense,
    /// The prompt is longer than any that is asked for.
    #[error("the prompt is too long to ask for its tokens")]
    TooLong,
    /// The local tokenizer cannot say.
    #[error("the local tokenizer does not do what this prompt needs")]
    Unsupported(#[source] local::Unsupported),
    /// The local tokenizer's code panicked.
    #[error("the local tokenizer panicked")]
    Panicked,
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
            Self::TooLong => "tokenizer_too_long",
            Self::Unsupported(unsupported) => unsupported.as_str(),
            Self::Panicked => "tokenizer_panicked",
        }
    }
}

/// Where the tokens of a model's prompts come from.
#[derive(Debug)]
pub enum Source {
    /// The engines.
    Remote {
        /// Asks them.
        remote: Arc<RemoteTokenizer>,
        /// What stands in when they do not answer: only where no engine feeds the index, since nobody has compared it.
        stand_in: Option<StandIn>,
    },
    /// A tokenizer in this process, whatever the engines say.
    Local(Arc<LocalTokenizer>),
    /// The engines until the local tokenizer has agreed with them often enough, from then on that one.
    Auto {
        /// Asks the engines.
        remote: Arc<RemoteTokenizer>,
        /// Is compared with them.
        local: Arc<LocalTokenizer>,
        /// Whether it stands in for them before it is trusted: only where no engine feeds the index.
        stands_in: bool,
    },
    /// The bytes of the text.
    Text,
}

/// What stands in for engines that do not answer.
#[derive(Debug)]
pub enum StandIn {
    /// A tokenizer in this process.
    Local(Arc<LocalTokenizer>),
    /// The bytes of the text.
    Text,
}

/// What the ids of an answer are. Ids of one space say nothing about those of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Space {
    /// The model's tokens.
    Model,
    /// Bytes of text.
    Text,
}

/// What is still under way when a caller has its answer; for as long as it is polled. Dropping it ends the calls.
pub type Late = Pin<Box<dyn Future<Output = ()> + Send>>;

/// What came of a question.
pub struct Asked {
    /// The tokens and what they are, or why there are none.
    pub tokens: Result<(Arc<Tokens>, Space), Error>,
    /// What may still come of it, for later requests.
    pub late: Option<Late>,
}

/// Settings of a [`Tokenizer`].
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// Longest time for the tokens of a prompt.
    pub budget: Budget,
    /// Memory for the tokens of prompts that were seen before, in bytes.
    pub cache_bytes: usize,
}

/// Gives the token ids of one model's prompts.
pub struct Tokenizer {
    model: Arc<str>,
    budget: Budget,
    cache: TokenCache,
    ways: Ways,
    /// Questions that something answered in the engines' place.
    n_stood_in: AtomicU64,
}

/// A [`Source`] at work.
enum Ways {
    Remote { remote: Arc<RemoteTokenizer>, stand_in: Option<OwnStandIn> },
    Local(Workers),
    Auto(Auto),
    Text,
}

/// What [`Source::Auto`] names.
struct Auto {
    remote: Arc<RemoteTokenizer>,
    local: Workers,
    trust: Trust,
    stands_in: bool,
}

enum OwnStandIn {
    Workers(Workers),
    Text,
}

/// What stands in for the engines.
enum Local<'a> {
    Workers(&'a Workers),
    Text,
}

impl Ways {
    fn stand_in(&self) -> Option<Local<'_>> {
        match self {
            Self::Remote { stand_in: Some(OwnStandIn::Workers(local)), .. } => Some(Local::Workers(local)),
            Self::Remote { stand_in: Some(OwnStandIn::Text), .. } => Some(Local::Text),
            Self::Auto(Auto { local, stands_in: true, .. }) => Some(Local::Workers(local)),
            Self::Remote { stand_in: None, .. } | Self::Auto(_) | Self::Local(_) | Self::Text => None,
        }
    }

    fn remote(&self) -> Option<&Arc<RemoteTokenizer>> {
        match self {
            Self::Remote { remote, .. } | Self::Auto(Auto { remote, .. }) => Some(remote),
            Self::Local(_) | Self::Text => None,
        }
    }

    /// Changes when those who have answered before turn out to have been wrong.
    fn epoch(&self) -> u64 {
        let is_doubted = self.local().is_some_and(Workers::is_doubted);
        self.remote().map_or(0, |remote| remote.epoch()) * 2 + u64::from(is_doubted)
    }

    fn local(&self) -> Option<&Workers> {
        match self {
            Self::Remote { stand_in: Some(OwnStandIn::Workers(local)), .. }
            | Self::Local(local)
            | Self::Auto(Auto { local, .. }) => Some(local),
            Self::Remote { .. } | Self::Text => None,
        }
    }
}

/// A tokenizer at one moment; counts are since the start.
#[derive(Clone, Debug, Default)]
pub struct TokenizerStatus {
    /// Questions that the cache answered.
    pub n_cache_hits: u64,
    /// Questions that it did not answer.
    pub n_cache_misses: u64,
    /// Memory of the cache.
    pub cache_bytes: u64,
    /// Questions that something answered in the engines' place.
    pub n_stood_in: u64,
    /// Whether the local tokenizer speaks for the engines, for any kind of prompt; none where that is not a question.
    pub is_trusted: Option<bool>,
    /// Prompts of which the local tokenizer's ids were those of the engines.
    pub n_equal: u64,
    /// Prompts of which they were not.
    pub n_different: u64,
    /// Of the engines' clients.
    pub remote: Option<RemoteStatus>,
    /// Of the tokenizer in this process.
    pub local: Option<LocalStatus>,
}

impl Tokenizer {
    /// A tokenizer for the prompts of `model`.
    pub fn new(model: Arc<str>, source: Source, config: &Config) -> Self {
        let ways = match source {
            Source::Remote { remote, stand_in } => Ways::Remote {
                remote,
                stand_in: stand_in.map(|stand_in| match stand_in {
                    StandIn::Local(local) => OwnStandIn::Workers(Workers::new(local)),
                    StandIn::Text => OwnStandIn::Text,
                }),
            },
            Source::Local(local) => Ways::Local(Workers::new(local)),
            Source::Auto { remote, local, stands_in } => {
                Ways::Auto(Auto { remote, local: Workers::new(local), trust: Trust::default(), stands_in })
            }
            Source::Text => Ways::Text,
        };
        let cache = TokenCache::new(config.cache_bytes);
        Self { model, budget: config.budget, cache, ways, n_stood_in: AtomicU64::new(0) }
    }

    /// Watches over the engines that are asked, off the path of requests.
    ///
    /// # Errors
    /// None.
    pub async fn run(
        self: Arc<Self>,
        endpoints: impl Fn() -> Vec<SocketAddr> + Send + 'static,
        shutdown: CancellationToken,
    ) -> Result<(), Infallible> {
        if let Some(remote) = self.ways.remote() {
            return remote.clone().run(endpoints, shutdown).await;
        }
        shutdown.cancelled().await;
        Ok(())
    }

    /// What it has done so far, and how it stands.
    pub fn status(&self) -> TokenizerStatus {
        let (n_cache_hits, n_cache_misses) = self.cache.counts();
        let trust = if let Ways::Auto(Auto { trust, .. }) = &self.ways { Some(trust) } else { None };
        let (n_equal, n_different) = trust.map(Trust::counts).unwrap_or_default();
        TokenizerStatus {
            n_cache_hits,
            n_cache_misses,
            cache_bytes: self.cache.n_bytes(),
            n_stood_in: self.n_stood_in.load(Relaxed),
            is_trusted: trust.map(Trust::is_trusted_with_any),
            n_equal,
            n_different,
            remote: self.ways.remote().map(|remote| remote.status()),
            local: self.ways.local().map(Workers::status),
        }
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer").field("model", &self.model).field("status", &self.status()).finish_non_exhaustive()
    }
}
