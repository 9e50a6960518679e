//! One decision: parse → pool → tokens → hash → lookup → score → pick.
//!
//! Whatever fails on the way becomes a [`Fallback`] inside the decision and a pick by load; nothing here returns an
//! error. The only waiting is for the tokenizer, and that has a budget.

mod beginning;
mod lookup;
mod pools;

use std::sync::Arc;
use std::time::Instant;

use tracing::debug;

use self::lookup::{Basis, Lookup, Question};
use self::pools::Target;
pub use self::pools::{Pool, Pools};
use super::message::RequestHead;
use super::report::{Found, body_to_send};
use crate::request::{self, Api, LlmRequest, Opened, Prompt};
use crate::routing::endpoint::{Endpoint, EndpointSet};
use crate::routing::hash::Scope;
use crate::routing::index::{PrefixIndex, Promised, Promises};
use crate::routing::load::{InFlight, Millis};
use crate::routing::pick::{Decision, Fallback, Outcome, Pick, pick};
use crate::routing::score::candidates;
use crate::telemetry::metrics::{Metrics, PromiseRow, Stage};
use crate::tokenizer::remote::{RemoteTokenizer, Targets};
use crate::tokenizer::{Asked, Late, Space, Tokens};

/// What becomes of a request.
pub struct Answer {
    /// Where it goes.
    pub verdict: Verdict,
    /// Its body, if that is not the client's.
    pub body: Option<Vec<u8>>,
    /// What may still be learned for later requests while this one is on its way.
    pub late: Option<Late>,
}

/// The answer to "where does this request go?".
#[derive(Debug)]
pub enum Verdict {
    /// To an endpoint of ours.
    Route(Box<Routed>),
    /// Wherever Envoy's own policy sends it.
    Leave(Leave),
    /// Nowhere: there is no endpoint.
    Refuse(Refusal),
}

/// A request on its way.
#[derive(Debug)]
pub struct Routed {
    /// The decision.
    pub decision: Decision,
    /// Counts the request for its endpoint, from the moment of the pick.
    pub in_flight: InFlight,
    /// The blocks that the endpoint is going to hold, by keyspace; none where it holds them, or where they are not
    /// known.
    pub promised: Vec<Promised>,
    /// The pool it was picked from.
    pub pool: Arc<Pool>,
    /// The data-parallel rank that the engine is told to use.
    pub steered_rank: Option<u32>,
}

impl Routed {
    /// Another endpoint served the request.
    pub fn served_by(&mut self, server: Arc<Endpoint>, now: Millis) {
        self.promised.iter_mut().for_each(|promised| promised.move_to(&server, now));
        self.in_flight.move_to(server);
    }

    /// Nobody computes anything for the request.
    pub fn void(&mut self) {
        self.promised.drain(..).for_each(Promised::void);
    }

    /// The request has ended.
    pub fn end(self, now: Millis) {
        self.promised.into_iter().for_each(|promised| promised.end(now));
    }
}

/// Why a request is left to Envoy's own policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leave {
    /// The request names no model and there is no default pool.
    NoModel,
    /// The request names a model that is not configured.
    UnknownModel,
    /// Discovery has not listed the pool yet.
    NotSynced,
    /// The body is too large to be read, there are several models, and the name does not stand in the beginning.
    ModelBeyondLimit,
}

impl Leave {
    /// Name in metrics, spans and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoModel => "no_model",
            Self::UnknownModel => "unknown_model",
            Self::NotSynced => "not_synced",
            Self::ModelBeyondLimit => "model_beyond_limit",
        }
    }
}

/// Why a request cannot be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The pool is known and empty.
    NoEndpoint,
    /// The gateway allows only endpoints that the pool does not have.
    EmptySubset,
    /// We pick nobody, and Envoy has nobody to fall back to.
    NoPick(Leave),
}

impl Refusal {
    /// Name in metrics, spans, logs and the answer's `code`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoEndpoint => "no_endpoint",
            Self::EmptySubset => "empty_subset",
            Self::NoPick(leave) => leave.as_str(),
        }
    }

    /// Sentence for the client.
    pub fn message(self) -> &'static str {
        match self {
            Self::NoEndpoint => "no endpoint serves this model at the moment",
            Self::EmptySubset => "none of the endpoints that the gateway allows serves this model",
            Self::NoPick(Leave::NoModel) => "the request names no model, and none is the default",
            Self::NoPick(Leave::UnknownModel) => "the request names a model that nobody here serves",
            Self::NoPick(Leave::NotSynced) => "the endpoints of this model are not known yet",
            Self::NoPick(Leave::ModelBeyondLimit) => "the request is too large for its model's name to be found",
        }
    }
}

/// Decides; shared by all streams.
#[derive(Debug)]
pub struct Router {
    pools: Pools,
    index: Arc<PrefixIndex>,
    metrics: Arc<Metrics>,
    started: Instant,
    /// Whether Envoy serves a request for which it is told no endpoint.
    has_fallback: bool,
}

/// The tokens of a prompt, and what may still come of asking for them.
type AskedFor = (Result<(Arc<Tokens>, Space), Fallback>, Option<Late>);

impl Router {
    /// A router over `pools`.
    pub fn new(pools: Pools, index: Arc<PrefixIndex>, metrics: Arc<Metrics>) -> Self {
        Self { pools, index, metrics, started: Instant::now(), has_fallback: true }
    }

    /// Refuses what would otherwise be left to Envoy.
    pub fn without_fallback(self) -> Self {
        Self { has_fallback: false, ..self }
    }

    /// Time since the router started.
    pub fn now(&self) -> Millis {
        Millis(
            u64::try_from(self.started.elapsed().as_millis()).expect("a process runs for less than 584 million years"),
        )
    }

    /// The instruments.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Frees the memory of what was promised and is over. What counts is the same before and after.
    pub fn sweep(&self) {
        for pool in self.pools.iter() {
            pool.learned.sweep(self.now());
            let keyspaces = self.index.keyspaces_of(&pool.model);
            keyspaces.iter().for_each(|(_, keyspace)| keyspace.promises().sweep(self.now()));
        }
    }

    /// What is promised in each pool.
    pub fn promise_rows(&self) -> Vec<PromiseRow> {
        let row = |pool: &Pool| {
            let keyspaces = self.index.keyspaces_of(&pool.model);
            let tables = || keyspaces.iter().map(|(_, keyspace)| keyspace.promises()).chain([&pool.learned]);
            PromiseRow {
                model: pool.model.clone(),
                n_blocks: tables().map(|promises| promises.n_blocks() as u64).sum(),
                n_evicted: tables().map(Promises::n_evicted).sum(),
            }
        };
        self.pools.iter().map(row).collect()
    }

    /// Decides where a request goes and counts it.
    pub async fn decide(&self, head: &RequestHead, body: &[u8]) -> Answer {
        let started = Instant::now();
        let answer = self.answer(head, body).await;
        self.concluded(answer, started)
    }

    fn concluded(&self, mut answer: Answer, started: Instant) -> Answer {
        if let Verdict::Leave(leave) = answer.verdict
            && !self.has_fallback
        {
            answer.verdict = Verdict::Refuse(Refusal::NoPick(leave));
        }
        self.metrics.observe_decision(started.elapsed());
        self.count(&answer.verdict);
        answer
    }

    async fn answer(&self, head: &RequestHead, body: &[u8]) -> Answer {
        let leave = |leave| Answer { verdict: Verdict::Leave(leave), body: body_to_send(body, None), late: None };
        let (target, request) = match self.timed(Stage::Parse, || self.read(head, body)) {
            Ok(read) => read,
            Err(reason) => return leave(reason),
        };
        let endpoints = target.pool.endpoints.borrow().clone();
        if !endpoints.synced {
            return leave(Leave::NotSynced);
        }
        let (mut lookup, late) = match request {
            Some(request) => self.look_into(&target, &endpoints, head, request).await,
            None => (Err(Fallback::UnreadableBody), None),
        };
        // The set may have changed while the tokens were under way, and who has left must not be picked.
        let endpoints = target.pool.endpoints.borrow().clone();
        if let (Ok(lookup), Some(rank)) = (&mut lookup, head.rank) {
            // The engine does as the client says, so what its other ranks hold is of no use. Of what is promised nobody
            // knows on which rank it will be.
            let has_ranks =
                |id| endpoints.endpoints.iter().any(|endpoint| endpoint.id == id && endpoint.ranks.count() > 1);
            lookup.matches.retain(|found| found.rank.map_or_else(|| !has_ranks(found.endpoint), |found| found == rank));
        }
        let verdict = self.route(&target, &endpoints, head, &lookup);
        let extended = if target.follows_events() { self.extend(&verdict, &lookup, body) } else { None };
        Answer { verdict, body: body_to_send(body, extended), late }
    }

    /// Whose request it is, and the request, if it can be read.
    fn read(&self, head: &RequestHead, body: &[u8]) -> Result<(Target, Option<LlmRequest>), Leave> {
        let opened = request::open(Api::of_path(&head.path), body).ok();
        let target = self.pools.find(opened.as_ref().and_then(Opened::model))?;
        let request = opened.map(|opened| opened.read(&target.pool.reading));
        Ok((target, request))
    }

    /// The body with a request for a full report, if the endpoint should make one.
    fn extend(&self, verdict: &Verdict, lookup: &Result<Lookup, Fallback>, body: &[u8]) -> Option<Vec<u8>> {
        let (Verdict::Route(routed), Ok(lookup)) = (verdict, lookup) else { return None };
        let reports = routed.pool.reports.as_ref()?;
        let pick = &routed.decision.pick;
        let found = match lookup.basis {
            Basis::Events => {
                let longest = lookup.longest()?;
                Found::Blocks { chain: &longest.hashes, is_credited: pick.matched_tokens >= longest.n_tokens() }
            }
            Basis::Picks => Found::NoIndex,
        };
        let extended = reports.extend(body, &pick.endpoint, found, self.now())?;
        self.metrics.count_full_report(&routed.pool.model);
        Some(extended)
    }

    /// What the pool's endpoints hold of the prompt.
    async fn look_into(
        &self,
        target: &Target,
        endpoints: &EndpointSet,
        head: &RequestHead,
        request: LlmRequest,
    ) -> (Result<Lookup, Fallback>, Option<Late>) {
        let (asked, late) = self.ask(target, endpoints, head, request.prompt).await;
        let lookup = asked.map(|(mut tokens, space)| {
            if let (Some(truncation), Space::Model) = (request.truncation, space) {
                truncation.apply(&mut Arc::make_mut(&mut tokens).ids);
            }
            let scope = scope(target, request.cache_salt, &tokens);
            self.look_up(&Question { target, tokens: &tokens, space, scope: &scope })
        });
        (lookup, late)
    }

    /// The prompt's tokens.
    async fn ask(&self, target: &Target, endpoints: &EndpointSet, head: &RequestHead, prompt: Prompt) -> AskedFor {
        let question = match prompt {
            Prompt::Text(question) => question,
            Prompt::Tokens(ids) => return (Ok((Arc::new(Tokens { ids, ..Tokens::default() }), Space::Model)), None),
            Prompt::Opaque(opaque) => return (Err(Fallback::Opaque(opaque.as_str())), None),
        };
        let started = Instant::now();
        let targets = |remote: &RemoteTokenizer| self.whom_to_ask(target, endpoints, head, remote);
        let Asked { tokens, late } = target.pool.tokenizer.tokens(question, targets).await;
        self.metrics.observe_stage(Stage::Tokenize, started.elapsed());
        let tokens = tokens.map_err(|error| {
            debug!(model = %target.pool.model, %error, "no tokens, picking by load");
            Fallback::Tokenizer(error.as_str())
        });
        (tokens, late)
    }

    /// The two least loaded endpoints that are not avoided and that answer for tokens.
    fn whom_to_ask(
        &self,
        target: &Target,
        endpoints: &EndpointSet,
        head: &RequestHead,
        remote: &RemoteTokenizer,
    ) -> Targets {
        if remote.has_own_endpoint() {
            return Targets::default();
        }
        let is_allowed = |endpoint: &Endpoint| head.allows(&endpoint.address) && remote.may_ask(endpoint.address);
        let may_be_asked = candidates(endpoints, &[], target.servers(endpoints, is_allowed), self.now());
        let picked = pick(&may_be_asked, &mut fastrand::Rng::new());
        Targets {
            first: picked.as_ref().map(|pick| pick.endpoint.address),
            hedge: picked.and_then(|pick| pick.alternate).map(|endpoint| endpoint.address),
        }
    }

    fn route(
        &self,
        target: &Target,
        endpoints: &EndpointSet,
        head: &RequestHead,
        lookup: &Result<Lookup, Fallback>,
    ) -> Verdict {
        let started = Instant::now();
        let matches = lookup.as_ref().map_or(&[][..], |lookup| &lookup.matches);
        let is_allowed = target.servers(endpoints, |endpoint| head.allows(&endpoint.address));
        let now = self.now();
        let Some(pick) = pick(&candidates(endpoints, matches, is_allowed, now), &mut fastrand::Rng::new()) else {
            let is_empty = endpoints.endpoints.is_empty();
            return Verdict::Refuse(if is_empty { Refusal::NoEndpoint } else { Refusal::EmptySubset });
        };
        let in_flight = InFlight::new(pick.endpoint.clone(), now);
        let promise = |lookup: &Lookup| lookup.promise(&target.pool, &pick.endpoint, now);
        let promised = lookup.as_ref().map(promise).unwrap_or_default();
        self.metrics.observe_stage(Stage::Pick, started.elapsed());
        let steered_rank = if head.rank.is_none() { steered_rank(&pick) } else { None };
        let decision = decision(&target.pool.model, pick, lookup);
        Verdict::Route(Box::new(Routed { decision, in_flight, promised, pool: target.pool.clone(), steered_rank }))
    }

    fn timed<T>(&self, stage: Stage, step: impl FnOnce() -> T) -> T {
        let started = Instant::now();
        let value = step();
        self.metrics.observe_stage(stage, started.elapsed());
        value
    }

    fn count(&self, verdict: &Verdict) {
        match verdict {
            Verdict::Route(routed) => {
                let Decision { model, pick, outcome, prompt_tokens } = &routed.decision;
                self.metrics.count_decision(model, outcome);
                self.metrics.count_tokens(model, u64::from(*prompt_tokens), u64::from(pick.matched_tokens));
                if let Outcome::Fallback(fallback) = outcome {
                    self.metrics.count_fallback(fallback.as_str());
                }
            }
            Verdict::Leave(leave) => self.metrics.count_left_to_envoy(leave.as_str()),
            Verdict::Refuse(refusal) => self.metrics.count_immediate_response(refusal.as_str()),
        }
    }
}

/// The rank whose match was credited, where there is more than one to choose from. Without a match vLLM balances its
/// ranks by itself, and better, for it sees all their queues. The header is the same for every attempt: a runner-up
/// without that rank would refuse the request.
fn steered_rank(pick: &Pick) -> Option<u32> {
    let rank = pick.rank.filter(|_| pick.endpoint.ranks.count() > 1)?;
    pick.alternate.as_ref().is_none_or(|alternate| alternate.ranks.contains(rank)).then_some(rank)
}

/// What the request adds to the hashes of its blocks. An answer that was rendered has the engine's own reading of the
/// salt.
fn scope(target: &Target, cache_salt: Option<String>, tokens: &Tokens) -> Scope {
    let cache_salt = tokens.cache_salt.clone().or(cache_salt);
    Scope {
        adapter: target.adapter(),
        // vLLM takes an empty salt for none.
        cache_salt: cache_salt.filter(|salt| !salt.is_empty()).map(Arc::from),
        mm: tokens.mm.clone(),
    }
}

fn decision(model: &Arc<str>, pick: Pick, lookup: &Result<Lookup, Fallback>) -> Decision {
    let (outcome, prompt_tokens) = match lookup {
        Err(fallback) => (Outcome::Fallback(*fallback), 0),
        Ok(lookup) if pick.matched_tokens == 0 => (Outcome::NoMatch, lookup.prompt_tokens),
        Ok(lookup) => match lookup.basis {
            Basis::Events => (Outcome::PrefixMatch, lookup.prompt_tokens),
            Basis::Picks => (Outcome::LearnedMatch, lookup.prompt_tokens),
        },
    };
    Decision { model: model.clone(), pick, outcome, prompt_tokens }
}

#[cfg(test)]
mod tests;
