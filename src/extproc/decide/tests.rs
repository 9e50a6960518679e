use std::collections::VecDeque;

use serde_json::json;
use tokio::sync::watch;

use super::*;
use crate::extproc::journal::Picked;
use crate::extproc::message::Served;
use crate::extproc::report::Reports;
use crate::extproc::rollout::{Mode, Rollout, Switch};
use crate::request::ReadOptions;
use crate::routing::endpoint::{EndpointId, SourceKnowledge};
use crate::routing::hash::{BlockHash, BlockHasher, BlockSize, HashAlgorithm};
use crate::routing::index::{Holder, IndexLimits, KeyKinds, Keyspace, KeyspaceKind, SlotWriter, Tier};
use crate::routing::index::{PromiseLimits, Promises};
use crate::tokenizer::{Config, Source, Tokenizer};

const TOKENS: [u32; 9] = [1, 2, 3, 4, 5, 6, 7, 8, 9];

fn head() -> RequestHead {
    RequestHead { path: "/v1/completions".to_owned(), ..RequestHead::default() }
}

struct Fixture {
    router: Router,
    pool: Arc<Pool>,
    index: Arc<PrefixIndex>,
}

/// What a fixture's pool is like.
struct Setup {
    n_endpoints: u32,
    hasher: Option<BlockHasher>,
    sync: bool,
    reports: Option<Reports>,
}

impl Default for Setup {
    fn default() -> Self {
        Self { n_endpoints: 2, hasher: None, sync: true, reports: None }
    }
}

impl Fixture {
    fn new(hasher: Option<BlockHasher>) -> Self {
        Self::of(Setup { hasher, ..Setup::default() })
    }

    fn of(Setup { n_endpoints, hasher, sync, reports }: Setup) -> Self {
        let endpoint = |id| Arc::new(Endpoint::new(EndpointId(id), ([127, 0, 0, 1], 8000 + id as u16).into()));
        let set = EndpointSet { synced: true, endpoints: (0..n_endpoints).map(endpoint).collect() };
        let pool = Arc::new(Pool {
            model: "tiny".into(),
            adapters: vec![("lora-a".into(), "".into())],
            hasher,
            reading: ReadOptions::default(),
            tokenizer: Arc::new(Tokenizer::new("tiny".into(), Source::Text, &Config::default())),
            reports,
            endpoints: watch::channel(Arc::new(set)).1,
            sync,
            predictions: Arc::default(),
            learned: Promises::new(PromiseLimits::LEARNED),
            rollout: Switch::default(),
        });
        let index = Arc::new(PrefixIndex::new(IndexLimits::default()));
        let mut pools = Pools::default();
        pools.add(&pool, &[], true);
        let router = Router::new(pools, index.clone(), Arc::new(Metrics::new()));
        Self { router, pool, index }
    }

    fn endpoint(&self, id: usize) -> Arc<Endpoint> {
        self.pool.endpoints.borrow().endpoints[id].clone()
    }

    async fn routed(&self, body: &serde_json::Value) -> Box<Routed> {
        let path = if body.get("messages").is_some() { "/v1/chat/completions" } else { "/v1/completions" };
        let head = RequestHead { path: path.to_owned(), ..head() };
        match self.router.decide(&head, body.to_string().as_bytes()).await.verdict {
            Verdict::Route(routed) => routed,
            other => panic!("{other:?}"),
        }
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
        self.routed(&json!({ "model": model, "prompt": TOKENS })).await.decision
    }
}

#[tokio::test]
async fn engines_with_an_unknown_root_are_found_by_our_own_hashes() {
    let fixture = Fixture::new(None);
    assert_eq!(fixture.decision("tiny").await.outcome, Outcome::NoMatch);
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

/// A fixture whose first endpoint holds a block of something else, so that there is a keyspace.
fn synced() -> (Fixture, SlotWriter) {
    let fixture = Fixture::new(None);
    let keyspace =
        Keyspace { model: "tiny".into(), block_size: BlockSize::new(2).expect("not 0"), kind: KeyspaceKind::Own };
    let holder = Holder { endpoint: EndpointId(0), rank: 0, tier: Tier::Gpu };
    let mut slot = fixture.index.acquire(&keyspace, holder).expect("a slot is free");
    slot.store(&[BlockHash(1)]);
    slot.prove(KeyKinds::PLAIN);
    (fixture, slot)
}

/// Chains of the model and of its adapter, with and without a salt, on several ranks, in two keyspaces.
fn populate(fixture: &Fixture, hasher: &BlockHasher, prompts: &[Vec<u32>], rng: &mut fastrand::Rng) -> Vec<SlotWriter> {
    let engine = KeyspaceKind::Engine { algorithm: hasher.algorithm(), root: hasher.root() };
    let own = KeyspaceKind::Own;
    let kinds = [
        (engine.clone(), 0, 0),
        (engine.clone(), 1, 0),
        (engine.clone(), 1, 1),
        (engine, 2, 0),
        (own.clone(), 0, 1),
        (own, 2, 0),
    ];
    let fill = |(kind, endpoint, rank)| {
        let keyspace = Keyspace { model: "tiny".into(), block_size: BlockSize::new(2).expect("not 0"), kind };
        let holder = Holder { endpoint: EndpointId(endpoint), rank, tier: Tier::Gpu };
        let mut slot = fixture.index.acquire(&keyspace, holder).expect("a slot is free");
        for prompt in prompts {
            let adapter = rng.bool().then(|| fixture.pool.adapters[0].clone());
            let cache_salt = rng.bool().then(|| "salt".into());
            let hashes = fixture.pool.chain(&keyspace, prompt, &Scope { adapter, cache_salt, ..Scope::default() });
            slot.store(&hashes[..rng.usize(..=hashes.len())]);
        }
        slot.prove(KeyKinds::PLAIN | KeyKinds::SALT | KeyKinds::ADAPTERS);
        slot
    };
    kinds.into_iter().map(fill).collect()
}

/// A request: mostly token ids, else a text, or what is picked by load alone.
fn random_request(prompts: &[Vec<u32>], rng: &mut fastrand::Rng) -> (RequestHead, String) {
    let model = ["tiny", "lora-a"][rng.usize(..2)];
    let mut prompt = prompts[rng.usize(..prompts.len())].clone();
    prompt.extend((0..rng.usize(..4)).map(|_| rng.u32(..4)));
    let mut body = json!({ "model": model, "prompt": prompt });
    if rng.bool() {
        body["cache_salt"] = "salt".into();
    }
    let head = RequestHead { rank: (rng.u32(..10) == 0).then_some(1), ..head() };
    match rng.u32(..20) {
        0 => (head, body.to_string().split_off(1)),
        1 => {
            body["prompt_logprobs"] = 1.into();
            (head, body.to_string())
        }
        2 => {
            let picture = json!([{ "type": "image_url", "image_url": { "url": "http://x/" } }]);
            let body = json!({ "model": model, "messages": [{ "role": "user", "content": picture }] });
            (RequestHead { path: "/v1/chat/completions".to_owned(), ..head }, body.to_string())
        }
        3 => (head, json!({ "model": model, "prompt": "a text" }).to_string()),
        _ => (head, body.to_string()),
    }
}

/// Lets each endpoint be avoided, by chance, for longer than any test takes.
fn avoid_some(fixture: &Fixture, rng: &mut fastrand::Rng) {
    for endpoint in &fixture.pool.endpoints.borrow().endpoints {
        endpoint.load.served();
        if rng.u32(..4) == 0 {
            endpoint.load.failed(Millis(0), Millis(1 << 40));
        }
    }
}

/// All that a decision shows, without times.
fn shown(it: &Picked) -> impl PartialEq + std::fmt::Debug + use<> {
    let Picked { model, requested, policy, outcome, prompt_tokens, matched_tokens, endpoint, rank, .. } = it.clone();
    let of_pick = (model, requested, policy, outcome, prompt_tokens, matched_tokens, endpoint, rank);
    (of_pick, it.n_candidates, it.n_avoided, it.standings.clone())
}

#[tokio::test]
async fn a_dry_run_says_what_the_decision_does_for_1000_random_requests_and_changes_nothing() {
    let hasher = BlockHasher::new(HashAlgorithm::Sha256Cbor, None).expect("a known root");
    let fixture = Fixture::of(Setup { n_endpoints: 3, hasher: Some(hasher.clone()), ..Setup::default() });
    let mut rng = fastrand::Rng::with_seed(5);
    let prompts: Vec<Vec<u32>> = (0..40).map(|_| (0..rng.u32(2..40)).map(|_| rng.u32(..4)).collect()).collect();
    let _slots = populate(&fixture, &hasher, &prompts, &mut rng);
    fixture.endpoint(1).ranks.set([0, 1]);
    let (mut under_way, mut n_matched, mut n_avoiding, mut n_fallbacks) = (VecDeque::new(), 0, 0, 0);
    for seed in 0..1_000 {
        let (head, body) = random_request(&prompts, &mut rng);
        avoid_some(&fixture, &mut rng);
        let chance = || fastrand::Rng::with_seed(seed);
        let state = || {
            let load = |id| {
                let load = &fixture.endpoint(id).load;
                (load.in_flight(), load.is_avoided(Millis(1 << 39)))
            };
            (fixture.router.totals(), fixture.router.promise_rows()[0].n_blocks, [0, 1, 2].map(load))
        };
        let before = state();
        let dry = fixture.router.dry_run(&head, body.as_bytes(), &mut chance()).await;
        assert_eq!(state(), before, "a dry run changes nothing");
        let answer = fixture.router.decide_by(&head, body.as_bytes(), &mut chance()).await;
        let Verdict::Route(routed) = answer.verdict else { panic!("there are endpoints") };
        let real = Picked::of(&routed.decision);
        assert_eq!(shown(&dry.verdict.expect("there are endpoints")), shown(&real), "request {seed}: {body}");
        let considered = dry.endpoints.iter().find(|it| it.standing.endpoint == real.endpoint).expect("it is listed");
        assert_eq!(considered.matched_blocks, real.matched_tokens / 2, "request {seed}: {body}");
        n_matched += u32::from(real.matched_tokens > 0);
        n_avoiding += u32::from(real.n_avoided > 0);
        n_fallbacks += u32::from(matches!(real.outcome, Outcome::Fallback(_)));
        under_way.push_back(routed);
        if under_way.len() > 8 {
            under_way.pop_front().expect("there are some").end(fixture.router.now());
        }
    }
    assert!(n_matched > 200 && n_avoiding > 200 && n_fallbacks > 100, "{n_matched}, {n_avoiding}, {n_fallbacks}");
}

#[tokio::test]
async fn a_block_that_is_stored_again_is_seen_in_the_decision_and_in_the_sums() {
    let fixture = Fixture::new(None);
    let mut slot = fixture.warm(KeyspaceKind::Own, (1, 3, Tier::Gpu), 3);
    let mut routed = fixture.routed(&json!({ "model": "tiny", "prompt": TOKENS })).await;
    let seen = routed.watched.as_ref().expect("it is watched").seen().clone();
    assert_eq!((seen.n_predicted(), seen.n_stored_again()), (3, 0));
    let keyspace =
        Keyspace { model: "tiny".into(), block_size: BlockSize::new(2).expect("not 0"), kind: KeyspaceKind::Own };
    slot.store(&fixture.pool.chain(&keyspace, &TOKENS, &Scope::default())[1..]);
    assert_eq!(seen.n_stored_again(), 2);
    assert!(seen.first_new_after().is_some());
    routed.is_served = true;
    routed.end(fixture.router.now());
    let row = fixture.router.prediction_rows().remove(0);
    assert_eq!((row.n_predicted, row.n_stored_again, fixture.router.totals().stored_again_blocks), (3, 2, 2));
    assert!(seen.is_known());
}

#[tokio::test]
async fn a_request_that_is_given_up_before_its_response_is_no_prediction_that_came_true() {
    let fixture = Fixture::new(None);
    let _slot = fixture.warm(KeyspaceKind::Own, (1, 3, Tier::Gpu), 3);
    let routed = fixture.routed(&json!({ "model": "tiny", "prompt": TOKENS })).await;
    let seen = routed.watched.as_ref().expect("it is watched").seen().clone();
    routed.end(fixture.router.now());
    let row = fixture.router.prediction_rows().remove(0);
    assert_eq!((row.n_predicted, row.n_stored_again), (0, 0));
    assert!(!seen.is_known(), "whether it was computed");
}

#[tokio::test]
async fn only_requests_for_which_somebody_is_picked_are_in_the_time_of_a_decision() {
    let fixture = Fixture::new(None);
    let n_timed = async |model: &str, mode, beginning: bool| {
        fixture.pool.rollout.set(Rollout { mode, ..Rollout::default() });
        let body = json!({ "model": model, "prompt": TOKENS }).to_string();
        if beginning {
            drop(fixture.router.decide_by_beginning(&head(), body.as_bytes()));
        } else {
            drop(fixture.router.decide(&head(), body.as_bytes()).await);
        }
        let text = fixture.router.metrics().encode();
        let count = text.lines().find_map(|line| line.strip_prefix("warmroute_decision_duration_seconds_count "));
        count.expect("it is always there").parse::<u64>().expect("a count")
    };
    for (model, mode, expected) in [
        ("tiny", Mode::Off, 0),
        ("nobody's", Mode::Active, 0),
        ("tiny", Mode::Active, 2),
        ("tiny", Mode::Shadow, 4),
        ("tiny", Mode::Off, 4),
    ] {
        n_timed(model, mode, false).await;
        assert_eq!(n_timed(model, mode, true).await, expected, "{model} {mode:?}");
    }
}

#[tokio::test]
async fn what_is_promised_in_shadow_when_the_response_comes_counts_for_the_time_to_linger() {
    let (fixture, _slot) = synced();
    fixture.pool.rollout.set(Rollout { mode: Mode::Shadow, ..Rollout::default() });
    let body = json!({ "model": "tiny", "prompt": TOKENS }).to_string();
    let Verdict::Shadow(mut shadowed) = fixture.router.decide(&head(), body.as_bytes()).await.verdict else {
        panic!("it is in shadow")
    };
    let server = fixture.endpoint(1);
    let served = Served { status: 200, address: Some(server.address), n_attempts: Some(1) };
    let at = Millis(1_000);
    shadowed.served(&served, at, fixture.router.metrics());
    let (keyspace, index) = fixture.index.keyspaces_of("tiny").remove(0);
    let chain = fixture.pool.chain(&keyspace, &TOKENS, &Scope::default());
    let counts = |now: u64| {
        let mut found = Vec::new();
        index.promises().extend(&chain, std::iter::empty(), Millis(now), &mut found);
        !found.is_empty()
    };
    let linger = PromiseLimits::SPECULATIVE.linger.0;
    assert!(counts(at.0 + linger - 1));
    assert!(!counts(at.0 + linger), "its events have mostly come before, and will not come again");
}

#[tokio::test]
async fn a_late_failure_in_shadow_keeps_nobody_away_for_longer() {
    let fixture = Fixture::new(None);
    fixture.pool.rollout.set(Rollout { mode: Mode::Shadow, ..Rollout::default() });
    let body = json!({ "model": "tiny", "prompt": TOKENS }).to_string();
    let Verdict::Shadow(mut shadowed) = fixture.router.decide(&head(), body.as_bytes()).await.verdict else {
        panic!("it is in shadow")
    };
    let server = fixture.endpoint(1);
    server.load.failed(Millis(5_000), Millis(5_000));
    let served = Served { status: 503, address: Some(server.address), n_attempts: Some(1) };
    shadowed.served(&served, Millis(5_900), fixture.router.metrics());
    assert_eq!(server.load.avoided_for(Millis(5_900)), Some(Millis(100)));
    assert_eq!(server.load.in_flight(), 1);
}

#[tokio::test]
async fn a_pool_whose_engines_make_reports_is_not_watched() {
    for (reports, is_watched) in [(None, true), (Some(Reports::new(1 << 20)), false)] {
        let fixture = Fixture::of(Setup { reports, ..Setup::default() });
        let _slot = fixture.warm(KeyspaceKind::Own, (1, 3, Tier::Gpu), 3);
        let routed = fixture.routed(&json!({ "model": "tiny", "prompt": TOKENS })).await;
        assert_eq!(routed.watched.is_some(), is_watched);
    }
}

#[tokio::test]
async fn aibrix_is_told_what_index_the_pool_has_and_of_no_shadow() {
    for (sync, told) in [(true, "true"), (false, "false")] {
        let fixture = Fixture::of(Setup { sync, ..Setup::default() });
        let mut pools = Pools::default();
        pools.add(&fixture.pool, &[], true);
        let router = Router::new(pools, fixture.index.clone(), Arc::new(Metrics::with_aibrix_names()));
        let fixture = Fixture { router, ..fixture };
        let prompt = json!({ "model": "tiny", "prompt": TOKENS });
        let first = fixture.routed(&prompt).await;
        first.end(fixture.router.now());
        let series = format!(
            r#"aibrix_prefix_cache_routing_selection_total{{model="tiny",selection="least_request_fallback",using_kv_sync="{told}"}} 1"#
        );
        assert!(fixture.router.metrics().encode().lines().any(|line| line == series), "no {series}");
        fixture.pool.rollout.set(Rollout { mode: Mode::Shadow, ..Rollout::default() });
        let head = RequestHead { path: "/v1/completions".to_owned(), ..head() };
        let answer = fixture.router.decide(&head, prompt.to_string().as_bytes()).await;
        assert!(matches!(answer.verdict, Verdict::Shadow(_)));
        let text = fixture.router.metrics().encode();
        let selections = text.lines().filter(|line| line.starts_with("aibrix_prefix_cache_routing_selection_total"));
        let n_selections: u64 =
            selections.map(|line| line.rsplit_once(' ').expect("a sample").1.parse::<u64>().expect("a count")).sum();
        assert_eq!(n_selections, 1);
    }
}

#[tokio::test]
async fn a_burst_with_one_prefix_does_not_scatter() {
    let (fixture, _slot) = synced();
    let prompt = json!({ "model": "tiny", "prompt": TOKENS });
    let first = fixture.routed(&prompt).await;
    assert_eq!(first.decision.outcome, Outcome::NoMatch);
    let mut burst = Vec::new();
    for _ in 0..8 {
        burst.push(fixture.routed(&prompt).await);
    }
    for routed in &burst {
        assert_eq!(routed.decision.outcome, Outcome::PrefixMatch);
        assert_eq!(routed.decision.pick.endpoint.id, first.decision.pick.endpoint.id);
        assert_eq!((routed.decision.pick.matched_tokens, routed.decision.pick.rank), (8, None));
    }
}

#[tokio::test]
async fn what_was_promised_goes_with_the_endpoint_that_served_and_with_its_cache() {
    let (fixture, _slot) = synced();
    let prompt = json!({ "model": "tiny", "prompt": TOKENS });
    let mut first = fixture.routed(&prompt).await;
    let other = fixture.endpoint(1 - first.decision.pick.endpoint.id.0 as usize);
    first.served_by(other.clone(), fixture.router.now());
    assert_eq!(fixture.decision("tiny").await.pick.endpoint.id, other.id);
    SourceKnowledge::new(other.knowledge.clone()).start_generation();
    assert_eq!(fixture.decision("tiny").await.outcome, Outcome::NoMatch, "its cache is gone");
}

#[tokio::test]
async fn a_request_that_nobody_served_promises_nothing() {
    let (fixture, _slot) = synced();
    let mut first = fixture.routed(&json!({ "model": "tiny", "prompt": TOKENS })).await;
    first.void();
    assert_eq!(fixture.decision("tiny").await.outcome, Outcome::NoMatch);
}

#[tokio::test]
async fn without_events_the_picks_are_the_index() {
    let fixture = Fixture::of(Setup { sync: false, ..Setup::default() });
    let ids: Vec<u32> = (0..100).collect();
    for prompt in [json!({ "prompt": ids }), json!({ "prompt": "a text of more than one block. ".repeat(9) })] {
        let first = fixture.routed(&prompt).await.decision;
        assert_eq!(first.outcome, Outcome::NoMatch);
        let second = fixture.routed(&prompt).await.decision;
        assert_eq!(second.outcome, Outcome::LearnedMatch);
        assert_eq!(second.pick.endpoint.id, first.pick.endpoint.id);
        assert!(second.pick.matched_tokens >= 64 && second.pick.matched_tokens.is_multiple_of(16));
    }
}

#[tokio::test]
async fn a_clients_rank_takes_nothing_from_promises_where_there_are_several() {
    let (fixture, _slot) = synced();
    let prompt = json!({ "model": "tiny", "prompt": TOKENS });
    let first = fixture.routed(&prompt).await;
    let endpoint = &first.decision.pick.endpoint;
    let head = RequestHead { path: "/v1/completions".to_owned(), rank: Some(0), ..RequestHead::default() };
    let outcome = async || match fixture.router.decide(&head, prompt.to_string().as_bytes()).await.verdict {
        Verdict::Route(routed) => routed.decision.outcome,
        other => panic!("{other:?}"),
    };
    assert_eq!(outcome().await, Outcome::PrefixMatch);
    endpoint.ranks.set([0, 1]);
    assert_eq!(outcome().await, Outcome::NoMatch);
}

/// Which of `n` requests for a model went to which of the two endpoints.
async fn served(fixture: &Fixture, model: &str) -> [usize; 2] {
    let mut counts = [0; 2];
    for _ in 0..32 {
        counts[fixture.decision(model).await.pick.endpoint.id.0 as usize] += 1;
    }
    counts
}

#[tokio::test]
async fn adapter_is_served_where_it_is_listed() {
    for adapter in ["lora-a", "lora-b"] {
        let fixture = Fixture::new(None);
        fixture.endpoint(1).adapters.set([adapter.to_owned()].into());
        assert_eq!(served(&fixture, adapter).await, [0, 32], "the other one has not said yet");
        fixture.endpoint(0).adapters.set(["other".to_owned()].into());
        assert_eq!(served(&fixture, adapter).await, [0, 32], "the other one does not have it");
        let Decision { pick, .. } = fixture.decision(adapter).await;
        assert!(pick.alternate.is_none(), "a retry may not go where the adapter is not");
        assert!(served(&fixture, "tiny").await.iter().all(|n| *n > 0), "everyone serves the model itself");
    }
}

#[tokio::test]
async fn configured_adapter_that_nobody_lists_goes_to_whoever_has_not_said_else_anywhere() {
    let fixture = Fixture::new(None);
    assert!(served(&fixture, "lora-a").await.iter().all(|n| *n > 0), "nobody has said anything yet");
    fixture.endpoint(0).adapters.set([].into());
    assert_eq!(served(&fixture, "lora-a").await, [0, 32]);
    fixture.endpoint(1).adapters.set([].into());
    assert!(served(&fixture, "lora-a").await.iter().all(|n| *n > 0), "it is for the engine to refuse it");
}

#[tokio::test]
async fn adapter_that_only_endpoints_list_is_followed_by_picks_and_apart_from_the_model() {
    let fixture = Fixture::new(None);
    let body = json!({ "model": "lora-b", "prompt": (0..64).collect::<Vec<u32>>() });
    let answer = fixture.router.decide(&head(), body.to_string().as_bytes()).await;
    assert!(matches!(answer.verdict, Verdict::Leave(Leave::UnknownModel)));
    (0..2).for_each(|id| fixture.endpoint(id).adapters.set(["lora-b".to_owned()].into()));
    let _announced = fixture.warm(KeyspaceKind::Own, (0, 0, Tier::Gpu), 4);
    let first = fixture.routed(&body).await;
    assert_eq!(first.decision.outcome, Outcome::NoMatch);
    let again = fixture.routed(&body).await;
    assert_eq!(again.decision.outcome, Outcome::LearnedMatch);
    assert_eq!(again.decision.pick.endpoint.id, first.decision.pick.endpoint.id);
    let base = json!({ "model": "tiny", "prompt": (0..64).collect::<Vec<u32>>() });
    assert_eq!(fixture.routed(&base).await.decision.outcome, Outcome::NoMatch);
}
