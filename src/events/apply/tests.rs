use serde_json::{Value, json};

use super::proof::Suspect;
use super::*;
use crate::routing::hash::{BlockHash, BlockSize, Digest, Key, MmItem, Scope};
use crate::routing::index::{IndexLimits, KeyKinds, KeyspaceKind, Match, Overlaps};
use proof::Proof;

const ENDPOINT: EndpointId = EndpointId(1);
const BLOCK: u32 = 4;

fn settings() -> ModelSettings {
    ModelSettings {
        model: "tiny".into(),
        algorithm: HashAlgorithm::Sha256Cbor,
        pythonhashseed: None,
        adapters: vec![("lora-a".into(), "path/a".into()), ("lora-b".into(), "path/b".into())],
        reports: false,
    }
}

struct Fixture {
    applier: Applier,
    index: Arc<PrefixIndex>,
    stats: Arc<SourceStats>,
}

impl Fixture {
    fn new(settings: ModelSettings) -> Self {
        Self::with_limits(settings, IndexLimits::default())
    }

    fn with_limits(settings: ModelSettings, limits: IndexLimits) -> Self {
        let index = Arc::new(PrefixIndex::new(limits));
        let stats = Arc::<SourceStats>::default();
        let name = SourceName { endpoint: ENDPOINT, address: "127.0.0.1:8000".parse().unwrap(), rank: 0 };
        let mut applier = Applier::new(name, Arc::new(settings), index.clone(), stats.clone());
        applier.start_generation();
        Self { applier, index, stats }
    }

    fn apply(&mut self, events: &[Value]) {
        self.apply_of(When::Now, events);
    }

    fn apply_of(&mut self, when: When, events: &[Value]) {
        let payload = rmp_serde::to_vec(&json!([0.5, events, 0])).unwrap();
        self.applier.apply(&EventBatch::decode(&payload).unwrap(), when);
    }

    /// Blocks on the GPU that a request for the chain is credited with.
    fn matched(&self, chain: &Chain, required: KeyKinds) -> u32 {
        self.found(chain, required).map_or(0, |found| found.n_blocks)
    }

    fn found(&self, chain: &Chain, required: KeyKinds) -> Option<Match> {
        let mut overlaps = Overlaps::default();
        let keyspaces = self.index.keyspaces_of("tiny").into_iter().filter_map(|(keyspace, index)| {
            let hashes = match keyspace.kind {
                KeyspaceKind::Engine { .. } => chain.digests.iter().map(Digest::low64).collect(),
                KeyspaceKind::Own => chain.own.clone(),
            };
            index.overlaps(&hashes, required, &mut overlaps);
            overlaps.matches().next()
        });
        keyspaces.max_by_key(|found| (found.n_blocks, found.n_offloaded))
    }

    /// Blocks in the keyspaces of a kind.
    fn n_blocks_in(&self, is_own: bool) -> usize {
        let keyspaces = self.index.keyspaces_of("tiny").into_iter();
        let of_kind = keyspaces.filter(|(keyspace, _)| (keyspace.kind == KeyspaceKind::Own) == is_own);
        of_kind.map(|(_, index)| index.n_blocks()).sum()
    }
}

/// A prompt's blocks as some engine hashes and announces them.
#[derive(Clone)]
struct Chain {
    digests: Vec<Digest>,
    own: Vec<BlockHash>,
    event: Value,
}

/// How an engine is unlike what is configured.
#[derive(Clone)]
struct Engine {
    algorithm: HashAlgorithm,
    seed: Option<&'static str>,
    tagged: bool,
    path: &'static str,
}

impl Default for Engine {
    fn default() -> Self {
        Self { algorithm: HashAlgorithm::Sha256Cbor, seed: None, tagged: true, path: "path/a" }
    }
}

impl Engine {
    fn chain(&self, first_token: u32, n_blocks: u32, lora: Option<&str>, salt: Option<&str>) -> Chain {
        self.with_items(first_token, n_blocks, (lora, salt), &[])
    }

    /// Items are identifier, offset and number of tokens.
    fn with_items(
        &self,
        first_token: u32,
        n_blocks: u32,
        (lora, salt): (Option<&str>, Option<&str>),
        items: &[(&str, u32, u32)],
    ) -> Chain {
        let hasher = BlockHasher::new(self.algorithm, self.seed).unwrap();
        let tokens: Vec<u32> = (first_token..first_token + n_blocks * BLOCK).collect();
        let block_size = BlockSize::new(BLOCK).unwrap();
        let item = |(identifier, offset, n_tokens): &(&str, u32, u32)| MmItem {
            identifier: (*identifier).into(),
            offset: *offset,
            n_tokens: *n_tokens,
        };
        let scope = Scope {
            adapter: lora.map(|name| (name.into(), self.path.into())),
            cache_salt: salt.map(Into::into),
            mm: items.iter().map(item).collect(),
        };
        let shown = |block_idx: usize| {
            let items = scope.mm_in(block_idx, block_size).map(|(identifier, offset)| json!([identifier, offset]));
            let salt = salt.filter(|_| block_idx == 0).map(Value::from);
            lora.map(Value::from).into_iter().chain(items).chain(salt).collect::<Vec<Value>>()
        };
        let untagged = |item: &Value| match item {
            Value::String(text) => Key::Str(text.as_str().into()),
            pair => Key::Tuple(vec![Key::Str(pair[0].as_str().unwrap().into()), Key::Int(pair[1].as_i64().unwrap())]),
        };
        let keys = |block_idx: usize| {
            let untagged = || shown(block_idx).iter().map(untagged).collect();
            if self.tagged { scope.keys(block_idx, block_size) } else { untagged() }
        };
        let digests = hasher.chain(hasher.root(), &tokens, block_size, keys);
        let extra_keys: Vec<_> = (0..n_blocks as usize).map(shown).collect();
        let event = json!({
            "type": "BlockStored", "block_hashes": low64(&digests), "parent_block_hash": null, "token_ids": tokens,
            "block_size": BLOCK, "lora_id": null, "medium": "GPU", "lora_name": lora, "extra_keys": extra_keys,
            "group_idx": 0, "kv_cache_spec_kind": "full_attention",
        });
        let own = OwnHasher::new("tiny").scoped_chain(&tokens, block_size, &scope);
        Chain { digests, own, event }
    }

    fn plain(&self, first_token: u32, n_blocks: u32) -> Chain {
        self.chain(first_token, n_blocks, None, None)
    }
}

impl Chain {
    fn with(&self, field: &str, value: Value) -> Value {
        let mut event = self.event.clone();
        event[field] = value;
        event
    }

    /// The event of the blocks from `block_idx` on, which continues the others.
    fn tail(&self, block_idx: usize) -> Value {
        let mut event = self.with("block_hashes", json!(low64(&self.digests[block_idx..])));
        event["parent_block_hash"] = json!(self.digests[block_idx - 1].low64().0);
        event["token_ids"] = json!(self.event["token_ids"].as_array().unwrap()[block_idx * BLOCK as usize..]);
        if let Some(keys) = self.event["extra_keys"].as_array() {
            event["extra_keys"] = json!(keys[block_idx..]);
        }
        event
    }

    /// The event of the blocks before `block_idx`.
    fn head(&self, block_idx: usize) -> Value {
        let mut event = self.with("block_hashes", json!(low64(&self.digests[..block_idx])));
        let n_tokens = block_idx * BLOCK as usize;
        event["token_ids"] = json!(self.event["token_ids"].as_array().unwrap()[..n_tokens]);
        event["extra_keys"] = json!(self.event["extra_keys"].as_array().unwrap()[..block_idx]);
        event
    }
}

fn low64(digests: &[Digest]) -> Vec<u64> {
    digests.iter().map(|digest| digest.low64().0).collect()
}

fn removed(digest: &Digest, group: Option<u32>, medium: &str) -> Value {
    json!({"type": "BlockRemoved", "block_hashes": [digest.low64().0], "medium": medium, "group_idx": group})
}

const LORA_A: Option<&str> = Some("lora-a");
const SALT: Option<&str> = Some("salt");

#[test]
fn each_chain_proves_the_kinds_that_it_shows() {
    let adapter = KeyKinds::adapter(0).unwrap();
    let engine = Engine::default();
    let cases = [
        (engine.plain(0, 2), KeyKinds::PLAIN),
        (engine.chain(0, 1, None, SALT), KeyKinds::SALT),
        (engine.chain(0, 2, None, SALT), KeyKinds::SALT | KeyKinds::PLAIN),
        (engine.chain(0, 2, LORA_A, None), adapter),
        (engine.chain(0, 2, LORA_A, SALT), adapter | KeyKinds::SALT),
        (engine.chain(0, 2, Some("unconfigured"), None), KeyKinds::NONE),
    ];
    for (chain, proved) in cases {
        let mut fixture = Fixture::new(settings());
        fixture.apply(std::slice::from_ref(&chain.event));
        assert_eq!((fixture.stats.proved(), fixture.stats.disproved()), (proved, KeyKinds::NONE), "{}", chain.event);
        let required = if proved.is_empty() { KeyKinds::PLAIN } else { proved };
        assert_eq!(fixture.matched(&chain, required), chain.digests.len() as u32);
    }
}

#[test]
fn chains_that_cannot_be_computed_prove_nothing() {
    let chain = Engine::default().plain(0, 2);
    let no_evidence = [
        ("parent_block_hash", json!(5)),
        ("extra_keys", json!([[5], []])),
        ("extra_keys", json!([["salt", "another"], []])),
        ("lora_name", json!("lora-a")),
        ("token_ids", json!([1, 2, 3])),
    ];
    for (field, value) in no_evidence {
        let mut fixture = Fixture::new(settings());
        fixture.apply(&[chain.with(field, value)]);
        assert_eq!((fixture.stats.proved(), fixture.stats.disproved()), (KeyKinds::NONE, KeyKinds::NONE), "{field}");
        assert_eq!(fixture.stats.n_blocks(), 2, "indexed all the same");
    }
    let mut fixture = Fixture::new(settings());
    fixture.apply(&[chain.with("extra_keys", json!([[], [5]]))]);
    assert_eq!(fixture.stats.proved(), KeyKinds::PLAIN, "the part before what is not known is evidence");
}

#[test]
fn mismatch_disproves_the_kind_and_names_the_setting() {
    let plain = |engine: Engine| (engine.plain(0, 2), KeyKinds::PLAIN);
    let sha256 = Engine { algorithm: HashAlgorithm::Sha256, ..Engine::default() };
    let untagged = Engine { tagged: false, ..Engine::default() };
    let other_path = Engine { path: "elsewhere", ..Engine::default() };
    let adapter = KeyKinds::adapter(0).unwrap();
    let cases = [
        (plain(sha256.clone()), Suspect::Algorithm(HashAlgorithm::Sha256)),
        (plain(Engine { seed: Some("0"), ..Engine::default() }), Suspect::Seed(Some("0"))),
        (plain(Engine { seed: Some("42"), ..sha256 }), Suspect::AlgorithmAndSeed(HashAlgorithm::Sha256, Some("42"))),
        (plain(Engine { seed: Some("secret"), ..Engine::default() }), Suspect::Unknown),
        ((untagged.chain(0, 2, None, SALT), KeyKinds::SALT), Suspect::UntaggedKeys),
        ((untagged.chain(0, 2, LORA_A, None), adapter), Suspect::UntaggedKeys),
        ((other_path.chain(0, 2, LORA_A, None), adapter), Suspect::AdapterPath),
    ];
    for ((chain, kinds), suspect) in cases {
        let payload = rmp_serde::to_vec(&json!([0.5, [chain.event], 0])).unwrap();
        let batch = EventBatch::decode(&payload).unwrap();
        let [Event::BlockStored(stored)] = &batch.events[..] else { panic!("{}", chain.event) };
        let hasher = BlockHasher::new(HashAlgorithm::Sha256Cbor, None).unwrap();
        let mut proof = Proof::default();
        let settings = settings();
        let shown = chain::Chain::of(stored, &settings).unwrap();
        assert_eq!(proof.examine(&shown, &hasher), [Finding::Disproved(kinds, suspect)]);
        assert_eq!(proof.examine(&shown, &hasher), [], "said once");
        assert_eq!((proof.proved, proof.disproved), (KeyKinds::NONE, kinds));
    }
}

#[test]
fn disproved_kind_leaves_the_others_their_credit() {
    let mut fixture = Fixture::new(settings());
    let (plain, salted) = (Engine::default().plain(0, 2), Engine { tagged: false, ..Engine::default() });
    let salted = salted.chain(100, 2, None, SALT);
    fixture.apply(&[plain.event.clone(), salted.event.clone()]);
    assert_eq!((fixture.n_blocks_in(false), fixture.n_blocks_in(true)), (2, 2));
    assert_eq!(fixture.matched(&plain, KeyKinds::PLAIN), 2);
    assert_eq!(fixture.matched(&salted, KeyKinds::PLAIN | KeyKinds::SALT), 2, "by our own hashes");
    fixture.apply(&[Engine::default().chain(200, 2, None, SALT).event]);
    assert_eq!(fixture.stats.disproved(), KeyKinds::SALT, "until the generation ends");
    fixture.applier.start_generation();
    assert_eq!(fixture.stats.disproved(), KeyKinds::NONE);
}

#[test]
fn proved_kind_is_sampled_and_loses_its_credit_on_a_mismatch() {
    let mut fixture = Fixture::new(settings());
    let chain = Engine::default().plain(0, 1);
    fixture.apply(std::slice::from_ref(&chain.event));
    let wrong = Engine { seed: Some("0"), ..Engine::default() }.plain(100, 1);
    for _ in 0..999 {
        fixture.apply(std::slice::from_ref(&wrong.event));
    }
    assert_eq!(fixture.matched(&chain, KeyKinds::PLAIN), 1);
    fixture.apply(std::slice::from_ref(&wrong.event));
    assert_eq!(fixture.matched(&chain, KeyKinds::PLAIN), 0);
    assert_eq!(fixture.stats.disproved(), KeyKinds::PLAIN);
}

#[test]
fn hidden_extra_keys_make_a_mismatch_inconclusive() {
    let mut fixture = Fixture::new(settings());
    let hidden = Engine { tagged: false, ..Engine::default() }.chain(0, 2, None, SALT).with("extra_keys", Value::Null);
    fixture.apply(std::slice::from_ref(&hidden));
    assert_eq!((fixture.stats.proved(), fixture.stats.disproved()), (KeyKinds::NONE, KeyKinds::NONE));
    fixture.apply(&[Engine::default().plain(50, 2).with("extra_keys", Value::Null)]);
    assert_eq!(fixture.stats.proved(), KeyKinds::PLAIN);

    let mut fixture = Fixture::new(settings());
    (0..16).for_each(|_| fixture.apply(std::slice::from_ref(&hidden)));
    assert_eq!(fixture.stats.disproved(), KeyKinds::PLAIN, "nothing ever matched");
}

#[test]
fn events_of_no_use_are_skipped_and_counted() {
    let chain = Engine::default().plain(0, 2);
    let unusable = [
        ("medium", json!("EXTERNAL")),
        ("block_size", json!(0)),
        ("block_size", json!(1 << 20)),
        ("block_hashes", json!([])),
        ("kv_cache_spec_kind", json!("sliding_window")),
    ];
    for (field, value) in unusable {
        let mut fixture = Fixture::new(settings());
        fixture.apply(&[chain.with(field, value)]);
        assert_eq!((fixture.stats.n_blocks(), fixture.stats.n_skipped.get()), (0, 1), "{field}");
    }
}

#[test]
fn other_groups_and_tiers_do_not_touch_the_full_attention_group() {
    let mut fixture = Fixture::new(settings());
    let chain = Engine::default().plain(0, 2);
    let mut second_group = chain.with("group_idx", json!(2));
    second_group["token_ids"] = json!([]);
    fixture.apply(&[chain.event.clone(), second_group]);
    fixture.apply(&[
        removed(&chain.digests[1], Some(1), "GPU"),
        removed(&chain.digests[1], Some(2), "GPU"),
        removed(&chain.digests[1], Some(0), "CPU"),
    ]);
    assert_eq!((fixture.matched(&chain, KeyKinds::PLAIN), fixture.stats.n_skipped.get()), (2, 3));
    fixture.apply(&[removed(&chain.digests[1], None, "GPU")]);
    assert_eq!(fixture.matched(&chain, KeyKinds::PLAIN), 1);
    fixture.apply(&[removed(&chain.digests[0], Some(0), "GPU")]);
    assert_eq!(fixture.matched(&chain, KeyKinds::PLAIN), 0);
}

#[test]
fn blocks_of_a_second_size_are_skipped() {
    let mut fixture = Fixture::new(settings());
    let chain = Engine::default().plain(0, 2);
    fixture.apply(&[chain.event.clone(), chain.with("block_size", json!(8))]);
    assert_eq!((fixture.stats.n_blocks(), fixture.stats.n_skipped.get()), (2, 1));
    assert_eq!(fixture.stats.disproved(), KeyKinds::NONE);
}

#[test]
fn announcing_a_reused_prefix_again_adds_no_copy() {
    let mut fixture = Fixture::new(settings());
    let chain = Engine::default().plain(0, 4);
    fixture.apply(&[chain.head(2)]);
    fixture.apply(&[chain.head(2), chain.tail(2)]);
    chain.digests.iter().for_each(|digest| fixture.apply(&[removed(digest, Some(0), "GPU")]));
    assert_eq!(fixture.stats.n_blocks(), 0);

    fixture.apply(&[chain.head(2)]);
    fixture.apply(&[chain.head(2)]);
    fixture.apply(&[removed(&chain.digests[0], Some(0), "GPU")]);
    assert_eq!(fixture.stats.n_blocks(), 2, "a second copy that nothing continues is one");
}

#[test]
fn index_without_room_leaves_the_source_uncredited_until_there_is_some() {
    let index = Arc::new(PrefixIndex::new(IndexLimits { slots: 1, ..IndexLimits::default() }));
    let stats = [(); 2].map(|()| Arc::<SourceStats>::default());
    let name = SourceName { endpoint: ENDPOINT, address: "127.0.0.1:8000".parse().unwrap(), rank: 0 };
    let applier = |stats: &Arc<SourceStats>| {
        let mut applier = Applier::new(name, Arc::new(settings()), index.clone(), stats.clone());
        applier.start_generation();
        applier
    };
    let payload = rmp_serde::to_vec(&json!([0.5, [Engine::default().plain(0, 2).event], 0])).unwrap();
    let batch = EventBatch::decode(&payload).unwrap();
    let (mut first, mut second) = (applier(&stats[0]), applier(&stats[1]));
    first.apply(&batch, When::Now);
    second.apply(&batch, When::Now);
    assert_eq!((stats[1].n_refused.get(), stats[1].n_blocks()), (2, 0));
    first.end_generation();
    second.apply(&batch, When::Now);
    assert_eq!(stats[1].n_blocks(), 2);
}

mod captures;
mod items;
mod restored;
mod unproved;
