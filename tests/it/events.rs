//! KV events from sockets to credit.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use warmroute::events::socket::{EventPlane, ModelSettings, Source, SourceState, SourceStatus};
use warmroute::routing::endpoint::{Endpoint, EndpointId, Knowledge};
use warmroute::routing::hash::own::OwnHasher;
use warmroute::routing::hash::{BlockHash, BlockHasher, BlockSize, HashAlgorithm, Scope};
use warmroute::routing::index::{
    Clock, IndexLimits, KeyKinds, KeyspaceKind, Overlaps, Prediction, PrefixIndex, Watched,
};
use warmroute::routing::load::Millis;

use crate::captures::{Capture, captures};
use crate::fake_publisher::{Behaviour, FakePublisher, ReplyForm, batch, removed, stored};

const DEADLINE: Duration = Duration::from_secs(30);
const MODEL: &str = "tiny";
const ENDPOINT: EndpointId = EndpointId(3);
pub(crate) const ADDRESS: &str = "127.0.0.1:8000";
const BLOCK: u32 = 4;

/// The event plane with one source.
pub(crate) struct Router {
    index: Arc<PrefixIndex>,
    pub(crate) plane: Arc<EventPlane>,
    hasher: Option<BlockHasher>,
    /// As the request path sees the endpoint.
    knowledge: Arc<Knowledge>,
}

impl Router {
    fn following(publisher: &FakePublisher, settings: ModelSettings) -> Self {
        Self::with_source(publisher, settings, Some(publisher.replay.clone()))
    }

    fn with_source(publisher: &FakePublisher, settings: ModelSettings, replay: Option<String>) -> Self {
        let index = Arc::new(PrefixIndex::new(IndexLimits::default()));
        let plane = Arc::new(EventPlane::start(&index));
        let hasher = BlockHasher::new(settings.algorithm, settings.pythonhashseed.as_deref()).ok();
        let source = source_of(publisher, settings, replay);
        let knowledge = source.endpoint_knowledge.clone();
        plane.add(source);
        Self { index, plane, hasher, knowledge }
    }

    /// A plane that follows [`source`] already, or will.
    pub(crate) fn over(index: Arc<PrefixIndex>, plane: Arc<EventPlane>) -> Self {
        Self { index, plane, hasher: Some(engine()), knowledge: Arc::default() }
    }

    /// Blocks of the prompt that are credited.
    fn matched(&self, tokens: &[u32], scope: &Scope, required: KeyKinds) -> u32 {
        let mut overlaps = Overlaps::default();
        let keyspaces = self.index.keyspaces_of(MODEL);
        let matched = keyspaces.iter().map(|(keyspace, index)| {
            let hashes = match (&keyspace.kind, &self.hasher) {
                (KeyspaceKind::Own, _) => OwnHasher::new(MODEL).scoped_chain(tokens, keyspace.block_size, scope),
                (_, Some(hasher)) => hasher.scoped_chain(tokens, keyspace.block_size, scope),
                (_, None) => Vec::new(),
            };
            index.overlaps(&hashes, required, &mut overlaps);
            overlaps.matched(ENDPOINT)
        });
        matched.max().unwrap_or(0)
    }

    pub(crate) fn plain(&self, tokens: &[u32]) -> u32 {
        self.matched(tokens, &Scope::default(), KeyKinds::PLAIN)
    }

    pub(crate) fn status(&self) -> SourceStatus {
        self.plane.status().remove(0)
    }

    fn wait_for(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let started = Instant::now();
        while !condition(self) {
            assert!(started.elapsed() < DEADLINE, "waiting for {what}: {:?}", self.status());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn wait_for_batches(&self, n_batches: u64) {
        self.wait_for("batches", |router| router.status().n_batches + router.status().n_decode_failures >= n_batches);
    }
}

/// The only source of a publisher with the usual settings.
pub(crate) fn source(publisher: &FakePublisher, replay: Option<String>) -> Source {
    source_of(publisher, usual(), replay)
}

fn source_of(publisher: &FakePublisher, settings: ModelSettings, replay: Option<String>) -> Source {
    Source {
        endpoint: ENDPOINT,
        address: ADDRESS.parse().unwrap(),
        events: publisher.events.clone(),
        replay,
        rank: 0,
        model: Arc::new(settings),
        endpoint_knowledge: Arc::default(),
    }
}

fn settings(algorithm: HashAlgorithm) -> ModelSettings {
    ModelSettings { model: MODEL.into(), algorithm, pythonhashseed: None, adapters: Vec::new(), reports: false }
}

fn usual() -> ModelSettings {
    settings(HashAlgorithm::Sha256Cbor)
}

fn engine() -> BlockHasher {
    BlockHasher::new(HashAlgorithm::Sha256Cbor, None).unwrap()
}

fn block_size() -> BlockSize {
    BlockSize::new(BLOCK).unwrap()
}

/// Tokens of a prompt of its own for each number.
pub(crate) fn prompt(number: u32, n_blocks: u32) -> Vec<u32> {
    (0..n_blocks * BLOCK).map(|position| number * 1000 + position).collect()
}

pub(crate) fn stored_prompt(number: u32, n_blocks: u32) -> Vec<u8> {
    batch(&[stored(&engine(), &prompt(number, n_blocks), block_size())])
}

fn hashes(tokens: &[u32]) -> Vec<BlockHash> {
    engine().scoped_chain(tokens, block_size(), &Scope::default())
}

/// Watches whether the blocks of a prompt are stored again by the source.
fn watch(router: &Router, tokens: &[u32]) -> Watched {
    let mut endpoint = Endpoint::new(ENDPOINT, ADDRESS.parse().unwrap());
    endpoint.knowledge = router.knowledge.clone();
    let chain = hashes(tokens);
    let n_held = chain.len() as u32;
    let prediction = Prediction { chain: &chain, n_held, n_matched: n_held, endpoint: &endpoint, rank: Some(0) };
    let keyspaces = router.index.keyspaces_of(MODEL);
    let (_, index) = keyspaces.iter().find(|(keyspace, _)| keyspace.kind != KeyspaceKind::Own).unwrap();
    let clock = Clock::new(|| Millis(0));
    index.watches().watch(&prediction, &Arc::default(), &clock, Millis(0)).expect("there is room")
}

#[test]
fn what_was_missed_is_not_stored_again_by_those_whose_requests_run_now() {
    let publisher = FakePublisher::start(Behaviour::default());
    let router = Router::following(&publisher, usual());
    router.wait_for("the connection", |router| router.status().state == SourceState::Live);
    publisher.publish(stored_prompt(0, 3));
    router.wait_for_batches(1);
    let watched = watch(&router, &prompt(0, 3));
    publisher.lose(stored_prompt(0, 3));
    publisher.publish(stored_prompt(0, 3));
    router.wait_for_batches(3);
    let status = router.status();
    assert_eq!((status.n_gaps, status.n_generations), (1, 1), "{status:?}");
    assert!(status.last_lag.is_some(), "the last one was live");
    assert!(watched.seen().is_known());
    assert_eq!(watched.seen().n_stored_again(), 0, "one came by a replay, and one has waited for that");
    publisher.publish(stored_prompt(0, 3));
    router.wait_for_batches(4);
    assert_eq!(watched.seen().n_stored_again(), 3);
}

#[test]
fn late_subscriber_learns_everything_through_replay() {
    for form in [ReplyForm::WithoutTopic, ReplyForm::WithTopic] {
        let publisher = FakePublisher::start(Behaviour { form, ..Behaviour::default() });
        (0..200).for_each(|number| publisher.publish(stored_prompt(number, 3)));
        let router = Router::following(&publisher, usual());
        router.wait_for("the last prompt", |router| router.plain(&prompt(199, 3)) == 3);
        assert!((0..200).all(|number| router.plain(&prompt(number, 5)) == 3));
        router.wait_for("the live state", |router| router.status().state == SourceState::Live);
        assert_eq!(router.status().n_batches, 200);
    }
}

/// An engine has one topic, and who it is follows from where it was dialled: no topic, and no change of it, may cost an
/// event, whoever it names.
#[test]
fn engine_that_is_dialled_is_followed_whatever_its_topic() {
    let topics = ["", "kv", "kv@127.0.0.9:8000@another-model", "events of the cache, \u{e4}\u{f6}\u{fc}"];
    let publish = |publisher: &FakePublisher, first| {
        (first..first + 5).for_each(|number| publisher.publish(stored_prompt(number, 2)));
    };
    let start = |topic| Behaviour { topic, ..Behaviour::default() };
    let mut publisher = FakePublisher::start(start(topics[0]));
    publish(&publisher, 0);
    let router = Router::following(&publisher, usual());
    for (life, topic) in topics.into_iter().enumerate() {
        let first = life as u32 * 10;
        router.wait_for("the replayed batches", |router| router.plain(&prompt(first + 4, 2)) == 2);
        publish(&publisher, first + 5);
        router.wait_for("the live ones", |router| router.plain(&prompt(first + 9, 2)) == 2);
        let status = router.status();
        assert_eq!((status.n_gaps, status.n_generations), (0, life as u64 + 1), "topic {topic:?}: {status:?}");
        if let Some(next) = topics.get(life + 1) {
            publisher = publisher.restart(start(next));
            publish(&publisher, first + 10);
        }
    }
}

#[test]
fn live_batches_are_applied_and_a_gap_is_healed_from_the_first_missing() {
    let publisher = FakePublisher::start(Behaviour::default());
    publisher.publish(stored_prompt(0, 3));
    let router = Router::following(&publisher, usual());
    router.wait_for("the live state", |router| router.status().state == SourceState::Live);
    publisher.publish(stored_prompt(1, 3));
    router.wait_for("a live batch", |router| router.plain(&prompt(1, 3)) == 3);
    let n_replays = router.status().n_replays;

    publisher.lose(batch(&[removed(hashes(&prompt(0, 3))[1].0)]));
    publisher.lose(stored_prompt(2, 3));
    publisher.publish(stored_prompt(3, 3));
    router.wait_for("the batch after the gap", |router| router.plain(&prompt(3, 3)) == 3);
    assert_eq!([0, 1, 2].map(|number| router.plain(&prompt(number, 3))), [1, 3, 3]);
    let status = router.status();
    assert_eq!((status.n_gaps, status.n_generations, status.n_batches), (1, 1, 5));
    assert_eq!(status.n_replays, n_replays + 1);
}

#[test]
fn lossy_replay_converges() {
    let publisher = FakePublisher::start(Behaviour { reply_loss: 0.05, ..Behaviour::default() });
    (0..300).for_each(|number| publisher.publish(stored_prompt(number, 2)));
    let router = Router::following(&publisher, usual());
    router.wait_for("the last prompt", |router| router.plain(&prompt(299, 2)) == 2);
    router.wait_for("the end of the replay", |router| router.status().state != SourceState::CatchingUp);
    let first = (0..300).find(|number| router.plain(&prompt(*number, 2)) == 2).unwrap();
    assert!((first..300).all(|number| router.plain(&prompt(number, 2)) == 2), "a hole behind {first}");
    assert!(router.status().n_replays > 2);
}

#[test]
fn bounded_buffer_makes_the_source_incomplete_but_useful() {
    let publisher = FakePublisher::start(Behaviour { buffer: 10, ..Behaviour::default() });
    (0..30).for_each(|number| publisher.publish(stored_prompt(number, 2)));
    let router = Router::following(&publisher, usual());
    router.wait_for("the incomplete state", |router| router.status().state == SourceState::Incomplete);
    router.wait_for("requests to know of it", |router| router.knowledge.is_incomplete());
    let credited: Vec<u32> = (0..30).filter(|number| router.plain(&prompt(*number, 2)) == 2).collect();
    assert_eq!(credited, (20..30).collect::<Vec<_>>());
}

#[test]
fn restarted_publisher_is_credited_with_its_new_blocks_alone() {
    for with_replay in [true, false] {
        let publisher = FakePublisher::start(Behaviour::default());
        let replay = with_replay.then(|| publisher.replay.clone());
        let router = Router::with_source(&publisher, usual(), replay);
        router.wait_for("the connection", |router| {
            matches!(router.status().state, SourceState::Live | SourceState::Incomplete)
        });
        router.wait_for("a live batch", |router| {
            publisher.publish(stored_prompt(0, 3));
            router.plain(&prompt(0, 3)) == 3
        });

        let publisher = publisher.restart(Behaviour::default());
        router.wait_for("a batch of the second life", |router| {
            publisher.publish(stored_prompt(1, 3));
            router.plain(&prompt(1, 3)) == 3
        });
        assert_eq!(router.plain(&prompt(0, 3)), 0);
        assert!(router.status().n_generations >= 2);
    }
}

#[test]
fn cleared_cache_is_not_credited() {
    let publisher = FakePublisher::start(Behaviour::default());
    publisher.publish(stored_prompt(0, 3));
    let cleared = json!({"type": "AllBlocksCleared"});
    publisher.publish(batch(&[cleared, stored(&engine(), &prompt(1, 2), block_size())]));
    let router = Router::following(&publisher, usual());
    router.wait_for("the second prompt", |router| router.plain(&prompt(1, 2)) == 2);
    assert_eq!(router.plain(&prompt(0, 3)), 0);
    assert_eq!((router.status().n_cleared, router.status().n_blocks), (1, 2));
}

#[test]
fn promises_end_with_the_cache_and_with_the_source() {
    const NOW: Millis = Millis(0);
    let publisher = FakePublisher::start(Behaviour::default());
    publisher.publish(stored_prompt(0, 3));
    let router = Router::following(&publisher, usual());
    router.wait_for("the first prompt", |router| router.plain(&prompt(0, 3)) == 3);
    let knowledge = router.knowledge.clone();
    let endpoint = Arc::new(Endpoint { knowledge, ..Endpoint::new(ENDPOINT, ADDRESS.parse().unwrap()) });
    let (_, index) = router.index.keyspaces_of(MODEL).remove(0);
    let lacking = hashes(&prompt(1, 3));
    let promised = || {
        let mut promised = Vec::new();
        index.promises().extend(&lacking, std::iter::empty(), NOW, &mut promised);
        promised
    };

    let _first = index.promises().promise(&lacking, 0, &endpoint, NOW).unwrap();
    assert_eq!(promised(), [(ENDPOINT, 3)]);
    publisher.publish(batch(&[json!({"type": "AllBlocksCleared"})]));
    router.wait_for("the end of what was promised of the cleared cache", |_| promised().is_empty());

    let _second = index.promises().promise(&lacking, 0, &endpoint, NOW).unwrap();
    assert_eq!(promised(), [(ENDPOINT, 3)]);
    router.plane.remove(ENDPOINT);
    let started = Instant::now();
    while !promised().is_empty() {
        assert!(started.elapsed() < DEADLINE, "the source is gone");
        std::thread::yield_now();
    }
    router.plane.stop();
}

#[test]
fn hashes_of_another_algorithm_are_shown_as_disproved_and_credited_by_our_own() {
    let publisher = FakePublisher::start(Behaviour::default());
    publisher.publish(stored_prompt(0, 3));
    let router = Router::following(&publisher, settings(HashAlgorithm::Sha256));
    router.wait_for_batches(1);
    let status = router.status();
    assert_eq!((status.proved, status.disproved), (KeyKinds::NONE, KeyKinds::PLAIN));
    let matched = router.index.keyspaces_of(MODEL).iter().any(|(_, index)| {
        let mut overlaps = Overlaps::default();
        index.overlaps(&hashes(&prompt(0, 3)), KeyKinds::PLAIN, &mut overlaps);
        overlaps.matched(ENDPOINT) > 0
    });
    assert!(!matched, "the engine's own hashes are not");
    assert_eq!(router.plain(&prompt(0, 3)), 3);
}

#[test]
fn engine_with_an_unknown_root_is_credited_by_our_own_hashes() {
    let publisher = FakePublisher::start(Behaviour::default());
    publisher.publish(stored_prompt(0, 3));
    let router = Router::following(&publisher, settings(HashAlgorithm::XxhashCbor));
    router.wait_for_batches(1);
    assert_eq!((router.status().n_skipped, router.status().n_blocks), (0, 3));
    assert_eq!(router.plain(&prompt(0, 3)), 3);
}

#[test]
fn garbage_costs_what_was_known_before_it_and_no_more() {
    let publisher = FakePublisher::start(Behaviour::default());
    publisher.publish(stored_prompt(0, 3));
    publisher.publish(vec![0xc1, 0xff, 0x00]);
    publisher.publish(Vec::new());
    publisher.publish(stored_prompt(1, 3));
    let router = Router::following(&publisher, usual());
    router.wait_for("the last prompt", |router| router.plain(&prompt(1, 3)) == 3);
    assert_eq!(router.plain(&prompt(0, 3)), 0, "what nobody can read may have been removals");
    let status = router.status();
    assert!(status.n_decode_failures >= 2 && status.state != SourceState::Quarantined, "{status:?}");
}

#[test]
fn removed_endpoint_is_not_credited_and_stop_is_quick() {
    let publisher = FakePublisher::start(Behaviour::default());
    publisher.publish(stored_prompt(0, 3));
    let router = Router::following(&publisher, usual());
    router.wait_for("the prompt", |router| router.plain(&prompt(0, 3)) == 3);
    router.plane.remove(ENDPOINT);
    assert!(router.plane.status().is_empty());
    let started = Instant::now();
    while router.plain(&prompt(0, 3)) > 0 || router.index.n_blocks() > 0 {
        assert!(started.elapsed() < DEADLINE);
        std::thread::yield_now();
    }
    let started = Instant::now();
    router.plane.stop();
    router.plane.stop();
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
}

/// Pods come and go faster than a connection stands.
#[test]
fn sources_that_leave_while_they_connect_hold_up_nobody() {
    let publisher = FakePublisher::start(Behaviour::default());
    publisher.publish(stored_prompt(0, 3));
    let router = Router::following(&publisher, usual());
    for id in 100..300 {
        let passing = Source { endpoint: EndpointId(id), ..source(&publisher, Some(publisher.replay.clone())) };
        router.plane.add(passing);
        std::thread::sleep(Duration::from_micros(fastrand::u64(..40_000)));
        router.plane.remove(EndpointId(id));
    }
    router.plane.remove(ENDPOINT);
    router.plane.add(source(&publisher, Some(publisher.replay.clone())));
    router.wait_for("the prompt", |router| router.plain(&prompt(0, 3)) == 3);
}

/// What a recorded engine said of its own cache is what we say of it before each request.
#[test]
fn recorded_engines_reuse_what_they_are_credited_with() {
    let usable =
        |capture: &Capture| capture.meta["data_parallel_size"].is_null() && !capture.name().contains("restart");
    let captures = captures();
    let replayed = captures.iter().filter(|capture| usable(capture)).map(|capture| {
        let algorithm: HashAlgorithm = capture.meta["algo"].as_str().unwrap().parse().unwrap();
        let adapters = ADAPTERS.map(|name| (name.into(), "model/lora-a".into())).to_vec();
        let known =
            ModelSettings { pythonhashseed: capture.seed().map(str::to_owned), adapters, ..settings(algorithm) };
        // And as if nothing were known of it, not even the paths of its adapters.
        let adapters = ADAPTERS.map(|name| (name.into(), "".into())).to_vec();
        let unknown = ModelSettings { adapters, ..settings(HashAlgorithm::Xxhash) };
        replay_capture(capture, known) + replay_capture(capture, unknown)
    });
    let n_checked: u32 = replayed.sum();
    assert!(n_checked > 20, "only {n_checked} recorded prompts had cached blocks");
}

/// The recorded engines' adapters, both loaded from one path.
const ADAPTERS: [&str; 2] = ["lora-a", "lora-b"];

fn replay_capture(capture: &Capture, settings: ModelSettings) -> u32 {
    let knows_root = BlockHasher::new(settings.algorithm, settings.pythonhashseed.as_deref()).is_ok();
    let publisher = FakePublisher::start(Behaviour::default());
    let router = Router::following(&publisher, settings);
    router.wait_for("the connection", |router| router.status().state == SourceState::Live);
    let (mut n_published, mut n_checked) = (0, 0);
    for record in &capture.scenarios {
        router.wait_for_batches(n_published);
        if let Some((tokens, scope, n_cached)) = expectation(record) {
            let reusable = &tokens[..tokens.len() - 1];
            let adapter_idx =
                scope.adapter.as_ref().and_then(|(name, _)| ADAPTERS.iter().position(|known| **known == **name));
            let adapter = adapter_idx.map_or(KeyKinds::PLAIN, |adapter_idx| KeyKinds::adapter(adapter_idx).unwrap());
            let salt = if scope.cache_salt.is_some() { KeyKinds::SALT } else { KeyKinds::NONE };
            let n_credited = router.matched(reusable, &scope, adapter | salt) * 32;
            assert_eq!(n_credited, n_cached, "{} {}: {:?}", capture.name(), record["name"], router.status());
            n_checked += u32::from(n_cached > 0);
        }
        for frame in record["frames"].as_array().into_iter().flatten() {
            publisher.publish(hex::decode(frame["payload_hex"].as_str().unwrap()).unwrap());
            n_published += 1;
        }
    }
    router.wait_for_batches(n_published);
    let status = router.status();
    assert_eq!(status.n_decode_failures, 0, "{}", capture.name());
    if knows_root && capture.scenarios.iter().any(|record| record["name"] == "lora") {
        let adapters = KeyKinds::adapter(0).unwrap() | KeyKinds::adapter(1).unwrap();
        // Before 0.31 only plain blocks are hashed as they are now.
        let is_tagged = capture.version() >= (0, 31);
        let kinds = if is_tagged {
            (KeyKinds::PLAIN | KeyKinds::SALT | adapters, KeyKinds::NONE)
        } else {
            (KeyKinds::PLAIN, KeyKinds::SALT | adapters)
        };
        assert_eq!((status.proved, status.disproved), kinds, "{}", capture.name());
    }
    n_checked
}

/// A request's only prompt and its cached tokens, where the engine looked the whole prompt up.
fn expectation(record: &Value) -> Option<(Vec<u32>, Scope, u32)> {
    let [tokens] = &record["prompt_token_ids"].as_array()?[..] else { return None };
    let tokens: Vec<u32> = serde_json::from_value(tokens.clone()).ok()?;
    let (body, usage) = (&record["request"]["body"], &record["response"]["usage"]);
    // The clearing is announced with the first batch after it.
    let is_after_reset = record["name"] == "after_reset";
    let model = body["model"].as_str()?;
    let adapter = ADAPTERS.contains(&model).then(|| (model.into(), "model/lora-a".into()));
    let is_asked = (model == MODEL || adapter.is_some())
        && body["prompt_logprobs"].is_null()
        && body["truncate_prompt_tokens"].is_null();
    if is_after_reset || !is_asked || usage.is_null() || tokens.is_empty() || body["n"] == 2 {
        return None;
    }
    let n_cached = usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or(0);
    let cache_salt = body["cache_salt"].as_str().map(Into::into);
    Some((tokens, Scope { adapter, cache_salt, mm: Vec::new() }, u32::try_from(n_cached).unwrap()))
}
