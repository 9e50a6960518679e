//! One decision: parse → pool → tokens → hash → lookup → score → pick.
//!
//! Whatever fails on the way becomes a [`Fallback`] inside the decision and a pick by load; nothing here returns an
//! error. The only waiting is for the tokenizer, and that has a budget.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::watch;
use tracing::debug;

use super::message::RequestHead;
use super::report::{Found, Reports, body_to_send};
use crate::request::{self, Api, LlmRequest, Opened, Prompt, Question, ReadOptions};
use crate::routing::endpoint::EndpointSet;
use crate::routing::hash::own::OwnHasher;
use crate::routing::hash::{BlockHash, BlockHasher, Scope};
use crate::routing::index::{KeyKinds, Keyspace, KeyspaceIndex, KeyspaceKind, Overlaps, PrefixIndex};
use crate::routing::load::{InFlight, Millis};
use crate::routing::pick::{Decision, Fallback, Outcome, Pick, pick};
use crate::routing::score::{TokenMatch, candidates};
use crate::telemetry::metrics::{Metrics, Stage};
use crate::tokenizer::remote::{RemoteTokenizer, Targets};

/// One model and the endpoints that serve it.
#[derive(Debug)]
pub struct Pool {
    /// The model's name, as configured.
    pub model: Arc<str>,
    /// Adapters of the model with the paths they were loaded from.
    pub adapters: Vec<(Arc<str>, Arc<str>)>,
    /// Hashes as the engines do; none when their root cannot be known: then only our own hashes are looked up.
    pub hasher: Option<BlockHasher>,
    /// Asks the engines for tokens.
    pub tokenizer: Arc<RemoteTokenizer>,
    /// The newest endpoint set: written by discovery, read by every request.
    pub endpoints: watch::Receiver<Arc<EndpointSet>>,
    /// Chooses the requests that have their engine announce what it reuses; none where the model is not set to.
    pub reports: Option<Reports>,
}

impl Pool {
    /// Hashes of a prompt's full blocks in a keyspace of the model; none where they cannot be computed.
    fn chain(&self, keyspace: &Keyspace, tokens: &[u32], scope: &Scope) -> Vec<BlockHash> {
        match (&keyspace.kind, &self.hasher) {
            (KeyspaceKind::Own, _) => OwnHasher::new(&self.model).scoped_chain(tokens, keyspace.block_size, scope),
            (KeyspaceKind::Engine { algorithm, root }, Some(hasher))
                if hasher.algorithm() == *algorithm && hasher.root() == *root =>
            {
                hasher.scoped_chain(tokens, keyspace.block_size, scope)
            }
            (KeyspaceKind::Engine { .. }, _) => Vec::new(),
        }
    }
}

/// What the client's model name stands for.
#[derive(Clone, Debug)]
struct Target {
    pool: Arc<Pool>,
    /// Position in [`Pool::adapters`].
    adapter_idx: Option<usize>,
}

/// Finds pools by the names that requests use.
#[derive(Debug, Default)]
pub struct Pools {
    by_name: HashMap<String, Target>,
    default: Option<Target>,
}

impl Pools {
    /// Adds a pool under its model's name, its aliases and its adapters' names.
    pub fn add(&mut self, pool: &Arc<Pool>, aliases: &[String], is_default: bool) {
        let target = |adapter_idx| Target { pool: pool.clone(), adapter_idx };
        for name in aliases.iter().map(String::as_str).chain([&*pool.model]) {
            self.by_name.insert(name.to_owned(), target(None));
        }
        for (adapter_idx, (name, _)) in pool.adapters.iter().enumerate() {
            self.by_name.insert(name.to_string(), target(Some(adapter_idx)));
        }
        if is_default {
            self.default = Some(target(None));
        }
    }

    fn find(&self, model: Option<&str>) -> Result<&Target, Leave> {
        match model {
            Some(name) => self.by_name.get(name).ok_or(Leave::UnknownModel),
            None => self.default.as_ref().ok_or(Leave::NoModel),
        }
    }
}

/// What becomes of a request.
#[derive(Debug)]
pub struct Answer {
    /// Where it goes.
    pub verdict: Verdict,
    /// Its body, if that is not the client's.
    pub body: Option<Vec<u8>>,
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
    /// The pool it was picked from.
    pub pool: Arc<Pool>,
    /// The data-parallel rank that the engine is told to use.
    pub steered_rank: Option<u32>,
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
}

impl Leave {
    /// Name in metrics, spans and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoModel => "no_model",
            Self::UnknownModel => "unknown_model",
            Self::NotSynced => "not_synced",
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
}

impl Refusal {
    /// Name in metrics, spans, logs and the answer's `code`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoEndpoint => "no_endpoint",
            Self::EmptySubset => "empty_subset",
        }
    }

    /// Sentence for the client.
    pub fn message(self) -> &'static str {
        match self {
            Self::NoEndpoint => "no endpoint serves this model at the moment",
            Self::EmptySubset => "none of the endpoints that the gateway allows serves this model",
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
}

/// A prompt's tokens and what the index knows of them.
struct Lookup {
    prompt_tokens: u32,
    matches: Vec<TokenMatch>,
    longest: Chain,
}

/// The blocks of a prompt that an engine could reuse, in the keyspace that has most of them.
#[derive(Default)]
struct Chain {
    hashes: Vec<BlockHash>,
    n_tokens: u32,
}

impl Router {
    /// A router over `pools`.
    pub fn new(pools: Pools, index: Arc<PrefixIndex>, metrics: Arc<Metrics>) -> Self {
        Self { pools, index, metrics, started: Instant::now() }
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

    /// Decides where a request goes and counts it.
    pub async fn decide(&self, head: &RequestHead, body: &[u8]) -> Answer {
        let started = Instant::now();
        let (verdict, extended) = self.verdict(head, body).await;
        let body = body_to_send(body, extended);
        self.metrics.observe_decision(started.elapsed());
        self.count(&verdict);
        Answer { verdict, body }
    }

    /// The verdict, and the request's body if it is to ask for a full report.
    async fn verdict(&self, head: &RequestHead, body: &[u8]) -> (Verdict, Option<Vec<u8>>) {
        let request = self.timed(Stage::Parse, || request::open(Api::of_path(&head.path), body));
        let model = request.as_ref().ok().and_then(Opened::model);
        let target = match self.pools.find(model) {
            Ok(target) => target,
            Err(leave) => return (Verdict::Leave(leave), None),
        };
        let endpoints = target.pool.endpoints.borrow().clone();
        if !endpoints.synced {
            return (Verdict::Leave(Leave::NotSynced), None);
        }
        let mut lookup = match request {
            Ok(opened) => self.look_up(target, &endpoints, opened.read(&ReadOptions::default())).await,
            Err(_) => Err(Fallback::UnreadableBody),
        };
        if let (Ok(lookup), Some(rank)) = (&mut lookup, head.rank) {
            // The engine does as the client says, so what its other ranks hold is of no use.
            lookup.matches.retain(|found| found.rank == rank);
        }
        let verdict = self.route(target, &endpoints, head, &lookup);
        let extended = self.extend(&verdict, &lookup, body);
        (verdict, extended)
    }

    /// The body with a request for a full report, if the endpoint should make one.
    fn extend(&self, verdict: &Verdict, lookup: &Result<Lookup, Fallback>, body: &[u8]) -> Option<Vec<u8>> {
        let Verdict::Route(routed) = verdict else { return None };
        let reports = routed.pool.reports.as_ref()?;
        let pick = &routed.decision.pick;
        let found = match lookup {
            Ok(Lookup { longest, .. }) => {
                Found::Blocks { chain: &longest.hashes, is_credited: pick.matched_tokens >= longest.n_tokens }
            }
            Err(Fallback::NoIndex) => Found::NoIndex,
            Err(_) => return None,
        };
        let extended = reports.extend(body, &pick.endpoint, found, self.now())?;
        self.metrics.count_full_report(&routed.pool.model);
        Some(extended)
    }

    /// What the pool's endpoints hold of the prompt.
    async fn look_up(&self, target: &Target, endpoints: &EndpointSet, request: LlmRequest) -> Result<Lookup, Fallback> {
        if let Prompt::Opaque(opaque) = request.prompt {
            return Err(Fallback::Opaque(opaque.as_str()));
        }
        let keyspaces = self.index.keyspaces_of(&target.pool.model);
        if keyspaces.is_empty() {
            return Err(Fallback::NoIndex);
        }
        let mut tokens = match request.prompt {
            Prompt::Text(question) => self.tokenize(target, endpoints, question).await?,
            Prompt::Tokens(tokens) => tokens,
            Prompt::Opaque(_) => unreachable!("opaque prompts have returned above"),
        };
        if let Some(truncation) = request.truncation {
            truncation.apply(&mut tokens);
        }
        let scope = scope(target, request.cache_salt);
        let (matches, longest) = self.matches(target, &keyspaces, &tokens, &scope);
        Ok(Lookup { prompt_tokens: u32::try_from(tokens.len()).unwrap_or(u32::MAX), matches, longest })
    }

    /// Asks the least loaded endpoints that are not avoided, within the budget.
    async fn tokenize(
        &self,
        target: &Target,
        endpoints: &EndpointSet,
        question: Question,
    ) -> Result<Vec<u32>, Fallback> {
        let started = Instant::now();
        let tokenizer = &target.pool.tokenizer;
        let candidates = candidates(endpoints, &[], |address| tokenizer.may_ask(*address), self.now());
        let (first, hedge) = match pick(&candidates, &mut fastrand::Rng::new()) {
            Some(pick) => (Some(pick.endpoint.address), pick.alternate.map(|alternate| alternate.address)),
            None => (None, None),
        };
        let budget = tokenizer.budget(&question);
        let mut call = tokenizer.ask(Arc::new(question), Targets { first, hedge });
        let tokens = match tokio::time::timeout(budget, &mut call).await {
            Ok(tokens) => tokens.map(|tokens| tokens.ids),
            Err(_) => {
                call.overdue();
                Err(crate::tokenizer::Error::Budget(budget))
            }
        };
        self.metrics.observe_stage(Stage::Tokenize, started.elapsed());
        tokens.map_err(|error| {
            debug!(model = %target.pool.model, ?first, ?hedge, %error, "no tokens, picking by load");
            Fallback::Tokenizer(error.as_str())
        })
    }

    /// Looks the prompt up in every keyspace in which some source has blocks; a rank that has blocks in several counts with
    /// its best.
    fn matches(
        &self,
        target: &Target,
        keyspaces: &[(Keyspace, Arc<KeyspaceIndex>)],
        tokens: &[u32],
        scope: &Scope,
    ) -> (Vec<TokenMatch>, Chain) {
        let required = required_kinds(target, scope);
        let mut overlaps = Overlaps::default();
        let (mut matches, mut longest) = (Vec::new(), Chain::default());
        for (keyspace, index) in keyspaces {
            let block_size = keyspace.block_size;
            // The engine computes at least the last token of a prompt, so it never reuses the block that holds it.
            let reusable = &tokens[..tokens.len().saturating_sub(1)];
            let hashes = self.timed(Stage::Hash, || target.pool.chain(keyspace, reusable, scope));
            self.timed(Stage::Lookup, || index.overlaps(&hashes, required, &mut overlaps));
            matches.extend(overlaps.matches().map(|found| TokenMatch {
                endpoint: found.endpoint,
                rank: found.rank,
                tokens: found.n_blocks * block_size.get(),
                offloaded_tokens: found.n_offloaded * block_size.get(),
            }));
            if hashes.len() > longest.hashes.len() {
                let n_blocks = u32::try_from(hashes.len()).unwrap_or(u32::MAX);
                longest = Chain { hashes, n_tokens: n_blocks.saturating_mul(block_size.get()) };
            }
        }
        (matches, longest)
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
        let is_allowed = |address: &SocketAddr| head.subset.as_ref().is_none_or(|subset| subset.contains(address));
        let now = self.now();
        let Some(pick) = pick(&candidates(endpoints, matches, is_allowed, now), &mut fastrand::Rng::new()) else {
            let is_empty = endpoints.endpoints.is_empty();
            return Verdict::Refuse(if is_empty { Refusal::NoEndpoint } else { Refusal::EmptySubset });
        };
        let in_flight = InFlight::new(pick.endpoint.clone(), now);
        self.metrics.observe_stage(Stage::Pick, started.elapsed());
        let steered_rank = if head.rank.is_none() { steered_rank(&pick) } else { None };
        let decision = decision(&target.pool.model, pick, lookup);
        Verdict::Route(Box::new(Routed { decision, in_flight, pool: target.pool.clone(), steered_rank }))
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

/// The rank whose match was credited, where there is more than one to choose from. Without a match vLLM balances its ranks
/// by itself, and better, for it sees all their queues. The header is the same for every attempt: a runner-up without that
/// rank would refuse the request.
fn steered_rank(pick: &Pick) -> Option<u32> {
    let rank = pick.rank.filter(|_| pick.endpoint.ranks.count() > 1)?;
    pick.alternate.as_ref().is_none_or(|alternate| alternate.ranks.contains(rank)).then_some(rank)
}

fn scope(target: &Target, cache_salt: Option<String>) -> Scope {
    Scope {
        adapter: target.adapter_idx.map(|adapter_idx| target.pool.adapters[adapter_idx].clone()),
        // vLLM takes an empty salt for none.
        cache_salt: cache_salt.filter(|salt| !salt.is_empty()).map(Arc::from),
        mm: Vec::new(),
    }
}

/// The kinds of extra keys that must be proved before a match may be believed.
fn required_kinds(target: &Target, scope: &Scope) -> KeyKinds {
    let adapter = match target.adapter_idx {
        Some(adapter_idx) => KeyKinds::adapter(adapter_idx).expect("the configuration bounds the adapters of a model"),
        None => KeyKinds::PLAIN,
    };
    if scope.cache_salt.is_some() { adapter | KeyKinds::SALT } else { adapter }
}

fn decision(model: &Arc<str>, pick: Pick, lookup: &Result<Lookup, Fallback>) -> Decision {
    let (outcome, prompt_tokens) = match lookup {
        Err(fallback) => (Outcome::Fallback(*fallback), 0),
        Ok(lookup) if pick.matched_tokens > 0 => (Outcome::PrefixMatch, lookup.prompt_tokens),
        Ok(lookup) => (Outcome::NoMatch, lookup.prompt_tokens),
    };
    Decision { model: model.clone(), pick, outcome, prompt_tokens }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::engine::{Access, EngineClient};
    use crate::routing::endpoint::{Endpoint, EndpointId};
    use crate::routing::hash::{BlockSize, HashAlgorithm};
    use crate::routing::index::{Holder, IndexLimits, SlotWriter, Tier};
    use crate::tokenizer::remote::RemoteConfig;

    const TOKENS: [u32; 9] = [1, 2, 3, 4, 5, 6, 7, 8, 9];

    struct Fixture {
        router: Router,
        pool: Arc<Pool>,
        index: Arc<PrefixIndex>,
    }

    impl Fixture {
        fn new(hasher: Option<BlockHasher>) -> Self {
            let endpoint = |id| Arc::new(Endpoint::new(EndpointId(id), ([127, 0, 0, 1], 8000 + id as u16).into()));
            let set = EndpointSet { synced: true, endpoints: (0..2).map(endpoint).collect() };
            let client = EngineClient::new(&Access::default()).expect("a client");
            let budget = Duration::from_secs(1);
            let remote = RemoteConfig { budget, budget_max: budget, endpoint: None };
            let pool = Arc::new(Pool {
                model: "tiny".into(),
                adapters: vec![("lora-a".into(), "".into())],
                hasher,
                tokenizer: Arc::new(RemoteTokenizer::new(client, remote)),
                reports: None,
                endpoints: watch::channel(Arc::new(set)).1,
            });
            let index = Arc::new(PrefixIndex::new(IndexLimits::default()));
            let mut pools = Pools::default();
            pools.add(&pool, &[], true);
            let router = Router::new(pools, index.clone(), Arc::new(Metrics::new()));
            Self { router, pool, index }
        }

        /// Lets a rank hold the first `n_blocks` blocks of [`TOKENS`] on a tier.
        fn warm(&self, kind: KeyspaceKind, (endpoint, rank, tier): (u32, u32, Tier), n_blocks: usize) -> SlotWriter {
            let keyspace = Keyspace { model: "tiny".into(), block_size: BlockSize::new(2).expect("not 0"), kind };
            let holder = Holder { endpoint: EndpointId(endpoint), rank, tier };
            let mut slot = self.index.acquire(&keyspace, holder).expect("a slot is free");
            let hashes = self.pool.chain(&keyspace, &TOKENS, &Scope::default());
            slot.store(&hashes[..n_blocks]);
            slot.prove(KeyKinds::PLAIN);
            slot
        }

        async fn decision(&self, model: &str) -> Decision {
            let head = RequestHead { path: "/v1/completions".to_owned(), ..RequestHead::default() };
            let body = serde_json::json!({ "model": model, "prompt": TOKENS }).to_string();
            match self.router.decide(&head, body.as_bytes()).await.verdict {
                Verdict::Route(routed) => routed.decision,
                other => panic!("{other:?}"),
            }
        }
    }

    #[tokio::test]
    async fn engines_with_an_unknown_root_are_found_by_our_own_hashes() {
        let fixture = Fixture::new(None);
        assert_eq!(fixture.decision("tiny").await.outcome, Outcome::Fallback(Fallback::NoIndex));
        let _slot = fixture.warm(KeyspaceKind::Own, (1, 3, Tier::Gpu), 2);
        let Decision { pick, outcome, .. } = fixture.decision("tiny").await;
        assert_eq!((outcome, pick.endpoint.id, pick.matched_tokens), (Outcome::PrefixMatch, EndpointId(1), 4));
        assert_eq!(pick.rank, Some(3));
        assert_eq!(fixture.decision("lora-a").await.outcome, Outcome::NoMatch, "an adapter's blocks are others");
    }

    #[tokio::test]
    async fn best_rank_over_all_keyspaces_and_tiers_decides() {
        let hasher = BlockHasher::new(HashAlgorithm::Sha256Cbor, None).expect("a known root");
        let engine = KeyspaceKind::Engine { algorithm: hasher.algorithm(), root: hasher.root() };
        let fixture = Fixture::new(Some(hasher));
        let _slots = [
            fixture.warm(engine.clone(), (0, 0, Tier::Gpu), 3),
            fixture.warm(KeyspaceKind::Own, (1, 0, Tier::Gpu), 1),
            fixture.warm(KeyspaceKind::Own, (1, 1, Tier::Gpu), 3),
            fixture.warm(KeyspaceKind::Own, (1, 1, Tier::Cpu), 4),
        ];
        let pick = fixture.decision("tiny").await.pick;
        assert_eq!((pick.endpoint.id, pick.rank), (EndpointId(1), Some(1)));
        assert_eq!((pick.matched_tokens, pick.offloaded_tokens), (6, 2));
        // Hashes of other settings than ours say nothing to us.
        let other = BlockHasher::new(HashAlgorithm::Sha256, None).expect("a known root");
        let other = Keyspace {
            model: "tiny".into(),
            block_size: BlockSize::new(2).expect("not 0"),
            kind: KeyspaceKind::Engine { algorithm: other.algorithm(), root: other.root() },
        };
        assert!(fixture.pool.chain(&other, &TOKENS, &Scope::default()).is_empty());
    }
}
