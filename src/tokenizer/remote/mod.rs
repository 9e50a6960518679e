//! The engines' own answer to what tokens a prompt has, and never a request held up for it.
//!
//! A question says which API is asked: `/tokenize` (not under `/v1`, so vLLM's `--api-key` does not guard it) or one of
//! `/v1/…/render` (which it does guard).
//!
//! - Spread: the caller names the two least loaded endpoints. The second is asked when the first has failed, or has not
//!   answered after half the budget; the first good answer wins and the other call is dropped. A question that the
//!   first calls wrong (400, 413, 422) is not put to a second.
//! - Budget: see [`Budget`]. The caller does the waiting: when it has waited long
//!   enough it says so ([`Call::overdue`]), and may let the call go on, up to four budgets, for the cache's sake.
//!   A question that is too large for any budget ([`Budget::is_capped`]) is no reason to blame an endpoint for being
//!   late, or to ask a second one before the first has failed: one such client would close the tokenizer for all.
//! - Breaker: per endpoint. One that is overdue, outrun by the second, unreachable, or that answers nonsense or with a
//!   status that is no answer, is not asked again until a check off the request path succeeds. So a broken tokenizer
//!   costs the first few requests their budget, and the others nothing.
//! - Cap: 8 questions per endpoint and 128 in all are under way at most, late ones included; there is no queue. Beyond
//!   it the caller gets [`Error::Busy`] at once. An endpoint that has its 8 may not be asked, so that a burst spreads
//!   over the pool.
//! - Canary: what the endpoints of a pool make of a fixed text must be the same; see [`RemoteTokenizer::run`], without
//!   which an open breaker never closes. Those vote that answer; what one that differs has said before is to be
//!   forgotten ([`RemoteTokenizer::epoch`]).
//!
//! An endpoint of its own ([`RemoteConfig::endpoint`]) takes the pool's place: one breaker, no second to ask, and all
//! 128 questions. It gets the engines' key, as they do (`engine.api_key_file`), and never a client's `authorization`.

mod breaker;
mod call;
mod canary;
mod checks;
mod server;
mod status;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Acquire, Ordering::Relaxed};

use hyper::body::Bytes;
use tokio::sync::Semaphore;

use super::{Budget, Error, Tokens, render};
use crate::engine::{Base, EngineClient, Target};
use crate::request::{Question, TokensApi};
pub use call::Call;
use server::Server;
use status::Shared;
pub use status::{BreakerState, EndpointStatus, Failure, RemoteStatus};

/// Bytes of an answer per byte of the question: a token is at least a byte of text and at most a dozen digits and
/// separators. The chat template's own text comes on top ([`ANSWER_BASE`]).
const ANSWER_FACTOR: usize = 16;
/// Bytes that any answer may have, whatever was asked.
const ANSWER_BASE: usize = 1 << 20;
/// Bytes that no answer may exceed, whatever was asked: some eight million tokens.
const ANSWER_MOST: usize = 64 << 20;
/// Questions that one endpoint of the pool may have under way. Its API server is one process of Python, in which more
/// of them would only wait for each other.
const CALLS_PER_ENDPOINT: usize = 8;
/// Questions that may be under way in all; it bounds the memory that they and their answers hold.
const CALLS: usize = 128;

/// The settings of a [`RemoteTokenizer`].
#[derive(Clone, Debug, Default)]
pub struct RemoteConfig {
    /// How long a request may wait for its tokens.
    pub budget: Budget,
    /// Who is asked in the place of the pool's endpoints. The client must be one for its scheme
    /// ([`Access::of_base`](crate::engine::Access::of_base)).
    pub endpoint: Option<Base>,
}

/// The endpoints of the pool that a request's question may go to: those with the least load whose breakers are closed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Targets {
    /// Who is asked.
    pub first: Option<SocketAddr>,
    /// Who is asked when the first fails or is slow.
    pub hedge: Option<SocketAddr>,
}

/// Asks for the tokens of a model's prompts.
#[derive(Debug)]
pub struct RemoteTokenizer {
    client: EngineClient,
    config: RemoteConfig,
    permits: Arc<Semaphore>,
    /// The one that takes the pool's place.
    own: Option<Arc<Server>>,
    /// Those of the pool. Requests read it without a lock; it is written when an endpoint is met first, and when it is
    /// gone.
    endpoints: papaya::HashMap<SocketAddr, Arc<Server>>,
    /// Whether requests ask the render APIs: then the checks do.
    renders: AtomicBool,
    shared: Arc<Shared>,
}

impl RemoteTokenizer {
    /// Asks through `client`.
    pub fn new(client: EngineClient, config: RemoteConfig) -> Self {
        let shared = Arc::new(Shared::default());
        let own = config.endpoint.clone().map(|base| Server::new(base.into(), CALLS, shared.clone()));
        let permits = Arc::new(Semaphore::new(CALLS));
        let endpoints = papaya::HashMap::new();
        Self { client, config, permits, own, endpoints, renders: AtomicBool::new(false), shared }
    }

    /// Whether one server takes the place of the pool's endpoints. Then [`Targets`] are not looked at.
    pub fn has_own_endpoint(&self) -> bool {
        self.own.is_some()
    }

    /// Whether requests may ask an endpoint of the pool, which must not have an
    /// [endpoint in its place](Self::has_own_endpoint): its breaker lets them, and it has not as many calls as it may
    /// have. While all of them may and there are too few calls for any to have that many, that is a look at two
    /// numbers.
    pub fn may_ask(&self, endpoint: SocketAddr) -> bool {
        let n_under_way = CALLS - self.permits.available_permits();
        if self.shared.n_excluded.load(Relaxed) == 0 && n_under_way < CALLS_PER_ENDPOINT {
            return true;
        }
        self.endpoints.pin().get(&endpoint).is_none_or(|server| server.may_be_asked() && !server.is_full())
    }

    /// Changes whenever an endpoint is found to make other tokens than its pool. What was learned under another epoch
    /// may be its answers.
    pub fn epoch(&self) -> u64 {
        self.shared.epoch.load(Acquire)
    }

    /// Puts `question` to `targets`. Nothing waits for a permit: the call ends at once with [`Error::Busy`],
    /// [`Error::Open`] or [`Error::NoEndpoint`] when nobody can be asked.
    pub fn ask(self: &Arc<Self>, question: Arc<Question>, targets: Targets) -> Call {
        let renders = question.api != TokensApi::Tokenize;
        // A model asks always or never; do not write to what every request reads.
        if renders != self.renders.load(Relaxed) {
            self.renders.store(renders, Relaxed);
        }
        match &self.own {
            Some(own) => Call::start(self, question, [own.clone()]),
            None => {
                let endpoints = [targets.first, targets.hedge].into_iter().flatten();
                Call::start(self, question, endpoints.map(|endpoint| self.server(endpoint)))
            }
        }
    }

    /// Counters, and the state of those that are asked.
    pub fn status(&self) -> RemoteStatus {
        self.shared.status(self.servers().iter().map(|server| server.status()).collect())
    }

    /// All that are asked.
    fn servers(&self) -> Vec<Arc<Server>> {
        match &self.own {
            Some(own) => vec![own.clone()],
            None => self.endpoints.pin().values().cloned().collect(),
        }
    }

    fn server(&self, endpoint: SocketAddr) -> Arc<Server> {
        let new = || Server::new(endpoint.into(), CALLS_PER_ENDPOINT, self.shared.clone());
        self.endpoints.pin().get_or_insert_with(endpoint, new).clone()
    }

    /// Why there is nobody to ask when the caller has found nobody.
    fn nobody(&self) -> Error {
        if self.servers().iter().any(|server| server.may_be_asked() && server.is_full()) {
            self.shared.counters.busy.add();
            Error::Busy
        } else if self.shared.n_excluded.load(Relaxed) > 0 {
            Error::Open
        } else {
            Error::NoEndpoint
        }
    }

    /// Puts `question` to `target`, for as long as it takes.
    fn send(
        &self,
        target: Target,
        question: Arc<Question>,
    ) -> impl Future<Output = Result<Tokens, Error>> + Send + 'static + use<> {
        let client = self.client.clone();
        async move {
            let limit = (ANSWER_BASE + ANSWER_FACTOR * question.body.len()).min(ANSWER_MOST);
            let api = question.api;
            // Not copied: with a second endpoint there would be three of a body that may be large.
            let body = Bytes::from_owner(Body(question));
            render::parse(api, &client.post_json(&target, api.path(), body, limit).await?)
        }
    }
}

/// The body of a question, which calls share.
struct Body(Arc<Question>);

impl AsRef<[u8]> for Body {
    fn as_ref(&self) -> &[u8] {
        &self.0.body
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Access;

    #[tokio::test]
    async fn with_nobody_to_ask_the_call_ends_at_once() {
        let client = EngineClient::new(&Access::default()).expect("a client");
        let tokenizer = Arc::new(RemoteTokenizer::new(client, RemoteConfig::default()));
        let question = Arc::new(Question { api: TokensApi::Tokenize, body: Vec::new() });
        let nobody = tokenizer.ask(question, Targets::default()).await;
        assert!(matches!(nobody, Err(Error::NoEndpoint)), "{nobody:?}");
        assert_eq!(tokenizer.status().n_calls, 0);
    }
}
