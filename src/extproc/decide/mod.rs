//! One decision: parse → pool → tokens → hash → lookup → score → pick.
//!
//! Whatever fails on the way becomes a [`Fallback`] inside the decision and a pick by load; nothing here returns an
//! error. The only waiting is for the tokenizer, and that has a budget.

mod beginning;
mod course;
mod dry_run;
mod lookup;
mod pools;
mod shadow;
mod timer;
mod totals;
mod verdict;

use std::sync::Arc;
use std::time::Instant;

use tracing::debug;

pub use self::dry_run::{Considering, DryRun, KeyspaceBlocks, KeyspaceRow};
use self::lookup::{Basis, Lookup, Question};
use self::pools::Target;
pub use self::pools::{Pool, Pools};
pub use self::shadow::Shadowed;
use self::timer::Timer;
pub use self::totals::{Totals, TotalsSeen};
pub use self::verdict::{Answer, Leave, Refusal, Routed, Verdict};
use super::journal::Journal;
use super::message::RequestHead;
use super::report::{Found, body_to_send};
use super::rollout::Mode;
use crate::request::{self, Api, LlmRequest, Opened, Prompt};
use crate::routing::endpoint::{Endpoint, EndpointSet};
use crate::routing::hash::Scope;
use crate::routing::index::{Clock, PrefixIndex, Promises};
use crate::routing::load::{InFlight, Millis};
use crate::routing::pick::{Choice, Decision, Fallback, Outcome, Pick, Timings, choose, pick};
use crate::routing::score::candidates;
use crate::telemetry::metrics::{AibrixIndexer, Metrics, PredictionRow, PromiseRow, Stage};
use crate::telemetry::trace::stage_failed;
use crate::tokenizer::remote::{RemoteTokenizer, Targets};
use crate::tokenizer::{Asked, Late, Space, Tokens};

/// Decides; shared by all streams.
#[derive(Debug)]
pub struct Router {
    pools: Pools,
    index: Arc<PrefixIndex>,
    metrics: Arc<Metrics>,
    started: Instant,
    clock: Clock,
    journal: Journal,
    totals: Totals,
    /// Whether Envoy serves a request for which it is told no endpoint.
    has_fallback: bool,
    rolled_out: course::RolledOut,
}

/// What a pick rests on.
struct Considered {
    target: Target,
    endpoints: Arc<EndpointSet>,
    lookup: Result<Lookup, Fallback>,
    late: Option<Late>,
}

impl Considered {
    /// Why nobody could be picked.
    fn refusal(&self) -> Refusal {
        if self.endpoints.endpoints.is_empty() { Refusal::NoEndpoint } else { Refusal::EmptySubset }
    }
}

/// The tokens of a prompt, and what may still come of asking for them.
type AskedFor = (Result<(Arc<Tokens>, Space), Fallback>, Option<Late>);

impl Router {
    /// A router over `pools`.
    pub fn new(pools: Pools, index: Arc<PrefixIndex>, metrics: Arc<Metrics>) -> Self {
        let started = Instant::now();
        Self {
            pools,
            index,
            metrics,
            started,
            clock: Clock::new(move || since(started)),
            journal: Journal::default(),
            totals: Totals::default(),
            has_fallback: true,
            rolled_out: course::RolledOut::default(),
        }
    }

    /// Refuses what would otherwise be left to Envoy.
    pub fn without_fallback(self) -> Self {
        Self { has_fallback: false, ..self }
    }

    /// Time since the router started.
    pub fn now(&self) -> Millis {
        since(self.started)
    }

    /// Keeps other decisions than the last [`super::journal::DEFAULT_DECISIONS`].
    #[must_use]
    pub fn with_journal(self, journal: Journal) -> Self {
        Self { journal, ..self }
    }

    /// The last decisions.
    pub fn journal(&self) -> &Journal {
        &self.journal
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
            for (_, keyspace) in keyspaces {
                keyspace.promises().sweep(self.now());
                keyspace.watches().sweep(self.now());
            }
        }
    }

    /// How far the predictions came true in each pool.
    pub fn prediction_rows(&self) -> Vec<PredictionRow> {
        let row = |pool: &Pool| PredictionRow {
            model: pool.model.clone(),
            n_predicted: pool.predictions.n_predicted(),
            n_stored_again: pool.predictions.n_stored_again(),
        };
        self.pools.iter().map(row).collect()
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
        self.decide_by(head, body, &mut fastrand::Rng::new()).await
    }

    /// The same with chance given: `random` breaks ties.
    async fn decide_by(&self, head: &RequestHead, body: &[u8], random: &mut fastrand::Rng) -> Answer {
        let mut timer = Timer::counting(&self.metrics);
        let answer = match self.consider(head, body, &mut timer).await {
            Ok(considered) => self.send(head, body, considered, random, &mut timer),
            Err(Leave::SwitchedOff) => Answer { verdict: Verdict::Leave(Leave::SwitchedOff), body: None, late: None },
            Err(reason) => Answer { verdict: Verdict::Leave(reason), body: body_to_send(body, None), late: None },
        };
        self.concluded(answer, timer)
    }

    fn concluded(&self, mut answer: Answer, timer: Timer<'_>) -> Answer {
        if let Verdict::Leave(leave) = answer.verdict {
            answer.verdict = self.left(leave);
        }
        if let Some(decision) = answer.verdict.decision_mut() {
            decision.timings = timer.picked();
        }
        self.count(&answer.verdict);
        self.totals.count(&answer.verdict);
        answer
    }

    /// What becomes of a request for which we pick nobody.
    fn left(&self, leave: Leave) -> Verdict {
        if self.has_fallback { Verdict::Leave(leave) } else { Verdict::Refuse(Refusal::NoPick(leave)) }
    }

    /// All that a pick rests on. Changes nothing of what later decisions rest on.
    async fn consider(&self, head: &RequestHead, body: &[u8], timer: &mut Timer<'_>) -> Result<Considered, Leave> {
        let (target, request) = timer.timed(Stage::Parse, || self.read(head, body))?;
        let endpoints = target.pool.endpoints.borrow().clone();
        if !endpoints.synced {
            return Err(Leave::NotSynced);
        }
        let (mut lookup, late) = match request {
            Some(request) => self.look_into(&target, &endpoints, head, request, timer).await,
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
        Ok(Considered { target, endpoints, lookup, late })
    }

    /// Picks, and changes the request if its engine should make a report.
    fn send(
        &self,
        head: &RequestHead,
        body: &[u8],
        mut considered: Considered,
        random: &mut fastrand::Rng,
        timer: &mut Timer<'_>,
    ) -> Answer {
        let late = considered.late.take();
        let (verdict, extended) = match self.mode_for(head, &considered, random) {
            Mode::Active => {
                let verdict = timer.timed(Stage::Pick, || self.route(head, &considered, random));
                let Considered { target, lookup, .. } = considered;
                let extended = if target.follows_events() { self.extend(&verdict, &lookup, body) } else { None };
                (verdict, extended)
            }
            // No engine is asked for anything on our behalf.
            Mode::Shadow => (timer.timed(Stage::Pick, || self.shadow(head, considered, random)), None),
            Mode::Off => (Verdict::Leave(Leave::SwitchedOff), None),
        };
        Answer { verdict, body: body_to_send(body, extended), late }
    }

    /// Whose request it is, and the request, if it can be read.
    fn read(&self, head: &RequestHead, body: &[u8]) -> Result<(Target, Option<LlmRequest>), Leave> {
        if self.is_off() {
            return Err(Leave::SwitchedOff);
        }
        let opened = request::open(Api::of_path(&head.path), body).ok();
        let target = self.pools.find(opened.as_ref().and_then(Opened::model))?;
        if target.pool.rollout.get().mode == Mode::Off {
            return Err(Leave::SwitchedOff);
        }
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
        timer: &mut Timer<'_>,
    ) -> (Result<Lookup, Fallback>, Option<Late>) {
        let (asked, late) = self.ask(target, endpoints, head, request.prompt, timer).await;
        let lookup = asked.map(|(mut tokens, space)| {
            if let (Some(truncation), Space::Model) = (request.truncation, space) {
                truncation.apply(&mut Arc::make_mut(&mut tokens).ids);
            }
            let scope = scope(target, request.cache_salt, &tokens);
            self.look_up(&Question { target, tokens: &tokens, space, scope: &scope }, timer)
        });
        (lookup, late)
    }

    /// The prompt's tokens.
    async fn ask(
        &self,
        target: &Target,
        endpoints: &EndpointSet,
        head: &RequestHead,
        prompt: Prompt,
        timer: &mut Timer<'_>,
    ) -> AskedFor {
        let question = match prompt {
            Prompt::Text(question) => question,
            Prompt::Tokens(ids) => return (Ok((Arc::new(Tokens { ids, ..Tokens::default() }), Space::Model)), None),
            Prompt::Opaque(opaque) => return (Err(Fallback::Opaque(opaque.as_str())), None),
        };
        let targets = |remote: &RemoteTokenizer| self.whom_to_ask(target, endpoints, head, remote);
        let asking = async {
            let asked = target.pool.tokenizer.tokens(question, targets).await;
            if let Err(error) = &asked.tokens {
                stage_failed(error.as_str());
            }
            asked
        };
        let Asked { tokens, late } = timer.timed_wait(Stage::Tokenize, asking).await;
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
        let picked = pick(&may_be_asked.all, &mut fastrand::Rng::new());
        Targets {
            first: picked.as_ref().map(|pick| pick.endpoint.address),
            hedge: picked.and_then(|pick| pick.alternate).map(|endpoint| endpoint.address),
        }
    }

    /// The best endpoint for the request; none where there is nobody. Changes nothing.
    fn choose(&self, head: &RequestHead, considered: &Considered, random: &mut fastrand::Rng) -> Option<Choice> {
        choose(&self.candidates(head, considered), random)
    }

    /// Picks, and from then on counts the request for its endpoint.
    fn route(&self, head: &RequestHead, considered: &Considered, random: &mut fastrand::Rng) -> Verdict {
        let Some(choice) = self.choose(head, considered, random) else {
            return Verdict::Refuse(considered.refusal());
        };
        let now = self.now();
        let Considered { target, lookup, .. } = considered;
        let in_flight = InFlight::new(choice.pick.endpoint.clone(), now);
        let promise = |lookup: &Lookup| lookup.promise(&target.pool, &choice.pick.endpoint, now);
        let promised = lookup.as_ref().map(promise).unwrap_or_default();
        let watch = |lookup: &Lookup| lookup.watch(&target.pool, &choice, &self.clock, now);
        let watched = lookup.as_ref().ok().and_then(watch);
        let steered_rank = if head.rank.is_none() { steered_rank(&choice.pick) } else { None };
        let decision = decision(target, choice, lookup);
        self.record(&decision, lookup, Mode::Active);
        let pool = target.pool.clone();
        Verdict::Route(Box::new(Routed {
            decision,
            in_flight,
            promised,
            watched,
            is_served: false,
            pool,
            steered_rank,
        }))
    }

    fn count(&self, verdict: &Verdict) {
        match verdict {
            Verdict::Route(routed) => {
                self.count_decision(&routed.decision);
                let indexer = if routed.pool.sync { AibrixIndexer::Sync } else { AibrixIndexer::Local };
                self.metrics.count_for_aibrix(&routed.decision, indexer);
            }
            Verdict::Shadow(shadowed) => self.count_decision(&shadowed.decision),
            Verdict::Leave(leave) => self.metrics.count_left_to_envoy(leave.as_str()),
            Verdict::Refuse(refusal) => self.metrics.count_immediate_response(refusal.as_str()),
        }
    }

    fn count_decision(&self, decision: &Decision) {
        let Decision { model, policy, pick, outcome, prompt_tokens, .. } = decision;
        self.metrics.count_decision(model, outcome, *policy);
        self.metrics.count_tokens(model, u64::from(*prompt_tokens), u64::from(pick.matched_tokens));
        if let Outcome::Fallback(fallback) = outcome {
            self.metrics.count_fallback(fallback.as_str());
        }
    }
}

fn since(started: Instant) -> Millis {
    Millis(u64::try_from(started.elapsed().as_millis()).expect("a process runs for less than 584 million years"))
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

fn decision(target: &Target, choice: Choice, lookup: &Result<Lookup, Fallback>) -> Decision {
    let Choice { pick, policy, standings, n_candidates, n_avoided } = choice;
    let outcome = match lookup {
        Err(fallback) => Outcome::Fallback(*fallback),
        Ok(_) if pick.matched_tokens == 0 => Outcome::NoMatch,
        Ok(lookup) => match lookup.basis {
            Basis::Events => Outcome::PrefixMatch,
            Basis::Picks => Outcome::LearnedMatch,
        },
    };
    Decision {
        model: target.pool.model.clone(),
        requested: target.requested.clone(),
        policy,
        pick,
        outcome,
        prompt_tokens: lookup.as_ref().map_or(0, |lookup| lookup.prompt_tokens),
        prompt_blocks: lookup.as_ref().map_or(0, Lookup::n_blocks),
        n_candidates,
        n_avoided,
        standings,
        timings: Timings::default(),
    }
}

#[cfg(test)]
mod tests;
