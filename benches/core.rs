//! What a block costs: hashed for a request, decoded from an event, stored in the index and found there.

#![allow(missing_docs, reason = "criterion's macros make public items without")]

use std::hint::black_box;
use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use serde::{Deserialize, Serialize};
use warmroute::events::wire::EventBatch;
use warmroute::routing::endpoint::{Endpoint, EndpointId};
use warmroute::routing::hash::{BlockHash, BlockHasher, BlockSize, HashAlgorithm, Scope};
use warmroute::routing::index::{
    Holder, KeyKinds, Keyspace, KeyspaceIndex, KeyspaceKind, Overlaps, PrefixIndex, PromiseLimits, Promises, Tier,
};
use warmroute::routing::load::Millis;

const BLOCK_SIZE: u32 = 16;
/// A prompt of 32,768 tokens.
const N_PROMPT_BLOCKS: u32 = 2048;
/// Blocks of one batch: a prefill step of 8,192 tokens.
const N_EVENT_BLOCKS: u32 = 512;

/// Token ids spread over a vocabulary of 128,256, as of Llama 3.
fn token_ids(n_blocks: u32) -> Vec<u32> {
    (0..n_blocks * BLOCK_SIZE).map(|idx| idx.wrapping_mul(2_654_435_761) % 128_256).collect()
}

fn hash(criterion: &mut Criterion) {
    let tokens = token_ids(N_PROMPT_BLOCKS);
    let block_size = BlockSize::new(BLOCK_SIZE).expect("16 is a block size");
    let plain = Scope::default();
    let adapter = Scope { adapter: Some((Arc::from("lora-a"), Arc::from("/adapters/lora-a"))), ..Scope::default() };
    let mut group = criterion.benchmark_group("hash, per block of 16");
    group.throughput(Throughput::Elements(u64::from(N_PROMPT_BLOCKS)));
    for (kind, scope) in [("plain", plain), ("adapter", adapter)] {
        for algorithm in HashAlgorithm::ALL {
            let hasher = BlockHasher::new(algorithm, Some("0")).expect("the seed is given");
            group.bench_function(format!("{algorithm}, {kind}"), |bencher| {
                bencher.iter(|| hasher.scoped_chain(black_box(&tokens), block_size, &scope));
            });
        }
    }
}

/// A batch as a decoder without borrowing has it.
#[derive(Serialize, Deserialize)]
struct OwnedBatch(f64, Vec<OwnedEvent>, Option<u32>);

#[derive(Serialize, Deserialize)]
struct OwnedEvent {
    r#type: String,
    block_hashes: Vec<u64>,
    parent_block_hash: Option<u64>,
    token_ids: Vec<u32>,
    block_size: u32,
    lora_id: Option<u64>,
    medium: Option<String>,
    lora_name: Option<String>,
    extra_keys: Option<Vec<Option<Vec<String>>>>,
    group_idx: Option<u32>,
    kv_cache_spec_kind: Option<String>,
}

/// The blocks of one batch in events of `n_blocks` each, as vLLM 0.32 encodes them.
fn payload(n_blocks: u32) -> Vec<u8> {
    let hash = |seed: u32| u64::from(seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1 << 63;
    let event = |event_idx: u32| OwnedEvent {
        r#type: "BlockStored".to_owned(),
        block_hashes: (1..=n_blocks).map(|block_idx| hash(event_idx * n_blocks + block_idx)).collect(),
        parent_block_hash: Some(hash(event_idx * n_blocks)),
        token_ids: token_ids(n_blocks),
        block_size: BLOCK_SIZE,
        lora_id: None,
        medium: Some("GPU".to_owned()),
        lora_name: None,
        extra_keys: Some(vec![None; n_blocks as usize]),
        group_idx: Some(0),
        kv_cache_spec_kind: Some("full_attention".to_owned()),
    };
    let batch = OwnedBatch(1.5, (0..N_EVENT_BLOCKS / n_blocks).map(event).collect(), Some(0));
    rmp_serde::to_vec_named(&batch).expect("the batch has no value that msgpack lacks")
}

fn decode(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("decode, per block of 16");
    group.throughput(Throughput::Elements(u64::from(N_EVENT_BLOCKS)));
    for n_blocks in [1, 8, N_EVENT_BLOCKS] {
        let payload = payload(n_blocks);
        group.bench_function(format!("borrowed, {n_blocks} blocks per event"), |bencher| {
            bencher.iter(|| EventBatch::decode(black_box(&payload)).expect("the batch is well-formed"));
        });
        group.bench_function(format!("rmp-serde, {n_blocks} blocks per event"), |bencher| {
            let decode = |payload| rmp_serde::from_slice::<OwnedBatch>(payload).expect("the batch is well-formed");
            bencher.iter(|| decode(black_box(&payload)));
        });
    }
}

/// Endpoints that hold the same chain.
const N_HOLDERS: u32 = 16;
/// Generations that come and go before the index counts as used.
const N_GENERATIONS: u32 = 1_000;

fn keyspace(index: &PrefixIndex) -> Arc<KeyspaceIndex> {
    let hasher = BlockHasher::new(HashAlgorithm::Sha256, None).expect("sha256 has a root");
    let kind = KeyspaceKind::Engine { algorithm: hasher.algorithm(), root: hasher.root() };
    let block_size = BlockSize::new(BLOCK_SIZE).expect("16 is a block size");
    index.keyspace(&Keyspace { model: Arc::from("model"), block_size, kind })
}

fn chain(n_blocks: u32) -> Vec<BlockHash> {
    (1..=u64::from(n_blocks)).map(|block_idx| BlockHash(block_idx.wrapping_mul(0x9e37_79b9_7f4a_7c15))).collect()
}

fn gpu_of(id: u32) -> Holder {
    Holder { endpoint: EndpointId(id), rank: 0, tier: Tier::Gpu }
}

/// A generation that stores a chain and ends.
fn live_and_die(keyspace: &Arc<KeyspaceIndex>, chain: &[BlockHash]) {
    let mut slot = keyspace.acquire(gpu_of(1)).expect("a slot is free");
    slot.store(chain);
    slot.retire();
}

fn index(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("index, per block");
    group.throughput(Throughput::Elements(u64::from(N_PROMPT_BLOCKS)));
    let held = chain(N_PROMPT_BLOCKS);
    let index = PrefixIndex::default();
    let shared = keyspace(&index);
    let mut slots: Vec<_> = (1..=N_HOLDERS).map(|id| shared.acquire(gpu_of(id)).expect("a slot is free")).collect();
    for slot in &mut slots {
        slot.store(&held);
        slot.prove(KeyKinds::PLAIN);
    }
    let mut overlaps = Overlaps::default();
    group.bench_function(format!("lookup, held by {N_HOLDERS} endpoints"), |bencher| {
        bencher.iter(|| shared.overlaps(black_box(&held), KeyKinds::PLAIN, &mut overlaps));
    });
    let fresh = PrefixIndex::default();
    group.bench_function("store and retire, fresh index", |bencher| {
        bencher.iter(|| live_and_die(&keyspace(&fresh), black_box(&held)));
    });
    // A map whose tables chain under churn (papaya's default mode does) would show here.
    let used = PrefixIndex::default();
    (0..N_GENERATIONS).for_each(|_| live_and_die(&keyspace(&used), &held));
    group.bench_function(format!("store and retire, after {N_GENERATIONS} generations"), |bencher| {
        bencher.iter(|| live_and_die(&keyspace(&used), black_box(&held)));
    });
}

fn endpoint(id: u32) -> Arc<Endpoint> {
    Arc::new(Endpoint::new(EndpointId(id), ([127, 0, 0, 1], 8000).into()))
}

fn promises(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("promises, per block");
    group.throughput(Throughput::Elements(u64::from(N_PROMPT_BLOCKS)));
    let (picked, other) = (chain(N_PROMPT_BLOCKS), chain(2 * N_PROMPT_BLOCKS).split_off(N_PROMPT_BLOCKS as usize));
    let now = Millis(0);
    group.bench_function("promise and void, swept by those to come", |bencher| {
        let (promises, endpoint) = (Promises::new(PromiseLimits::SPECULATIVE), endpoint(1));
        bencher.iter(|| promises.promise(black_box(&picked), 0, &endpoint, now).expect("there is room").void());
    });
    for n_endpoints in [1, N_HOLDERS] {
        let promises = Promises::new(PromiseLimits::SPECULATIVE);
        let promise = |id| promises.promise(&picked, 0, &endpoint(id), now).expect("there is room");
        let _guards: Vec<_> = (1..=n_endpoints).map(promise).collect();
        let mut out = Vec::new();
        group.bench_function(format!("extend, promised for {n_endpoints} endpoints"), |bencher| {
            bencher.iter(|| promises.extend(black_box(&picked), std::iter::empty(), now, &mut out));
        });
        group.bench_function(format!("promise, all relied on, promised for {n_endpoints} endpoints"), |bencher| {
            let endpoint = endpoint(1);
            bencher.iter(|| promises.promise(black_box(&picked), 0, &endpoint, now).expect("it is there").void());
        });
        group.bench_function(format!("extend, nothing promised of {n_endpoints} real runs"), |bencher| {
            let matched = (1..=n_endpoints).map(|id| (EndpointId(id), N_PROMPT_BLOCKS));
            bencher.iter(|| promises.extend(black_box(&other), matched.clone(), now, &mut out));
        });
    }
    for (kind, n_promised) in [("an empty table", 0), ("a table of other blocks", other.len())] {
        let index = PrefixIndex::default();
        let shared = keyspace(&index);
        let _guard = shared.promises().promise(&other[..n_promised], 0, &endpoint(1), now);
        let mut slot = shared.acquire(gpu_of(1)).expect("a slot is free");
        group.bench_function(format!("store and clear, beside {kind}"), |bencher| {
            bencher.iter(|| {
                slot.store(black_box(&picked));
                slot.clear();
            });
        });
    }
}

criterion_group!(benches, hash, decode, index, promises);
criterion_main!(benches);
