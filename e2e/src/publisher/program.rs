//! An endless program of cache events that follows from a seed, with the cache that it describes.
//!
//! Whoever knows the options knows what the publisher holds after each batch: the harness computes the same program and
//! needs no report from the process that it kills.

use std::collections::{HashMap, HashSet, VecDeque};

use serde::{Deserialize, Serialize};
use warmroute::routing::hash::{BlockHash, BlockHasher, BlockSize, Digest, HashAlgorithm, Key};

use crate::sim::event::{BlockStored, KvEvent, WireHash, encode_batch};

/// The cheapest of vLLM's algorithms: here hashes are told apart, not studied.
pub const ALGORITHM: HashAlgorithm = HashAlgorithm::XxhashCbor;
const N_TOKENS: u32 = 128_256;
/// Removed blocks that are remembered, to be asked for.
const MAX_GONE: usize = 4096;

/// What a program follows from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgramOptions {
    /// Everything random.
    pub seed: u64,
    /// Events of each batch.
    pub events_per_batch: usize,
    /// Blocks of the cache.
    pub cache_blocks: usize,
    /// Tokens per block.
    pub block_size: u32,
    /// Most blocks of one event.
    pub max_stored: usize,
    /// One event in so many clears the cache; 0: none does.
    pub clear_every: u32,
    /// `PYTHONHASHSEED` of the engine, hence the root of its hashes.
    pub pythonhashseed: String,
}

impl Default for ProgramOptions {
    fn default() -> Self {
        Self {
            seed: 1,
            events_per_batch: 4,
            cache_blocks: 2000,
            block_size: 16,
            max_stored: 4,
            clear_every: 20_000,
            pythonhashseed: "0".to_owned(),
        }
    }
}

/// What a cache holds after a number of batches.
#[derive(Clone, Debug, Default)]
pub struct Truth {
    /// Blocks with at least one copy.
    pub held: HashSet<BlockHash>,
    /// Some of the blocks that are gone.
    pub gone: Vec<BlockHash>,
    /// Events that led here.
    pub n_events: u64,
}

/// A cache at work: chains of blocks that grow, are evicted from their ends, and now and then get a second copy of
/// their last block.
#[derive(Debug)]
pub struct Program {
    options: ProgramOptions,
    rng: fastrand::Rng,
    hasher: BlockHasher,
    block_size: BlockSize,
    chains: VecDeque<Chain>,
    copies: HashMap<BlockHash, u32>,
    gone: VecDeque<BlockHash>,
    n_batches: u64,
    n_events: u64,
}

/// Blocks that follow each other, the first one at the beginning of a prompt.
#[derive(Debug, Default)]
struct Chain {
    blocks: Vec<Digest>,
    /// Tokens of the last block, until an eviction makes another one the last.
    tail: Option<Vec<u32>>,
}

impl Program {
    /// The program at its beginning.
    pub fn new(options: ProgramOptions) -> Self {
        let hasher = BlockHasher::new(ALGORITHM, Some(&options.pythonhashseed)).expect("a seed is given");
        Self {
            rng: fastrand::Rng::with_seed(options.seed),
            hasher,
            block_size: BlockSize::new(options.block_size).expect("the command line refuses 0"),
            options,
            chains: VecDeque::new(),
            copies: HashMap::new(),
            gone: VecDeque::new(),
            n_batches: 0,
            n_events: 0,
        }
    }

    /// Batches so far, which is the number of the next one.
    pub fn n_batches(&self) -> u64 {
        self.n_batches
    }

    /// The next batch on the wire, stamped `ts` (unix seconds).
    pub fn encoded_batch(&mut self, ts: f64) -> Vec<u8> {
        encode_batch(ts, &self.batch(), 0, WireHash::Int)
    }

    /// What the cache holds now.
    pub fn truth(&self) -> Truth {
        Truth {
            held: self.copies.keys().copied().collect(),
            gone: self.gone.iter().copied().collect(),
            n_events: self.n_events,
        }
    }

    /// What the cache of `options` holds after its first `n_batches` batches.
    pub fn truth_after(options: &ProgramOptions, n_batches: u64) -> Truth {
        let mut program = Self::new(options.clone());
        (0..n_batches).for_each(|_| drop(program.batch()));
        program.truth()
    }

    fn batch(&mut self) -> Vec<KvEvent> {
        self.n_batches += 1;
        (0..self.options.events_per_batch).map(|_| self.event()).collect()
    }

    fn event(&mut self) -> KvEvent {
        self.n_events += 1;
        let clear_every = self.options.clear_every;
        if clear_every > 0 && self.rng.u32(..clear_every) == 0 {
            return self.clear();
        }
        if self.copies.len() + self.options.max_stored > self.options.cache_blocks {
            return self.remove();
        }
        match self.rng.u32(..100) {
            0..5 => self.remove(),
            5..8 => self.copy(),
            8..60 => self.extend(),
            _ => self.begin(),
        }
    }

    fn clear(&mut self) -> KvEvent {
        self.chains.clear();
        let cleared: Vec<BlockHash> = self.copies.drain().map(|(hash, _)| hash).collect();
        cleared.into_iter().for_each(|hash| self.forget(hash));
        KvEvent::AllBlocksCleared
    }

    /// Evicts the end of the chain that was not touched for longest.
    fn remove(&mut self) -> KvEvent {
        let Some(mut chain) = self.chains.pop_front() else { return self.begin() };
        let block_hash = *chain.blocks.last().expect("a chain without blocks is not kept");
        let hash = block_hash.low64();
        let copies = self.copies.get_mut(&hash).expect("each block of a chain is held");
        *copies -= 1;
        if *copies == 0 {
            self.copies.remove(&hash);
            self.forget(hash);
            chain.blocks.pop();
            chain.tail = None;
        }
        if !chain.blocks.is_empty() {
            self.chains.push_front(chain);
        }
        KvEvent::BlockRemoved { block_hash }
    }

    fn begin(&mut self) -> KvEvent {
        self.store(Chain::default())
    }

    fn extend(&mut self) -> KvEvent {
        let chain = self.some_chain();
        self.store(chain)
    }

    fn some_chain(&mut self) -> Chain {
        let n_chains = self.chains.len();
        if n_chains == 0 {
            Chain::default()
        } else {
            self.chains.remove(self.rng.usize(..n_chains)).unwrap_or_default()
        }
    }

    /// Computes new blocks behind `chain`.
    fn store(&mut self, mut chain: Chain) -> KvEvent {
        let block_size = self.block_size.get() as usize;
        let n_blocks = self.rng.usize(1..=self.options.max_stored);
        let token_ids: Vec<u32> = (0..n_blocks * block_size).map(|_| self.rng.u32(..N_TOKENS)).collect();
        let parent = chain.blocks.last().copied();
        let root = self.hasher.root();
        let blocks = self.hasher.chain(parent.unwrap_or(root), &token_ids, self.block_size, |_| [] as [Key; 0]);
        blocks.iter().for_each(|block| *self.copies.entry(block.low64()).or_default() += 1);
        chain.blocks.extend(&blocks);
        chain.tail = Some(token_ids[token_ids.len() - block_size..].to_vec());
        self.chains.push_back(chain);
        self.stored(blocks, parent, token_ids)
    }

    /// Announces the last block of a chain again, as vLLM does for prompts of whole blocks: a second copy.
    fn copy(&mut self) -> KvEvent {
        let copyable = |chain: &Chain| Some((chain.blocks.last_chunk::<2>().copied()?, chain.tail.clone()?));
        let Some(([parent, last], token_ids)) = self.chains.iter().find_map(copyable) else { return self.begin() };
        *self.copies.entry(last.low64()).or_default() += 1;
        self.stored(vec![last], Some(parent), token_ids)
    }

    fn stored(&self, block_hashes: Vec<Digest>, parent: Option<Digest>, token_ids: Vec<u32>) -> KvEvent {
        KvEvent::BlockStored(BlockStored {
            extra_keys: vec![Vec::new(); block_hashes.len()],
            block_hashes,
            parent,
            token_ids,
            block_size: self.block_size.get(),
            lora_id: None,
            lora_name: None,
            session_id: None,
        })
    }

    fn forget(&mut self, hash: BlockHash) {
        self.gone.push_back(hash);
        if self.gone.len() > MAX_GONE {
            self.gone.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn same_options_make_the_same_bytes_and_other_seeds_share_no_block() {
        let options = ProgramOptions::default();
        let bytes = |options: &ProgramOptions| {
            let mut program = Program::new(options.clone());
            (0..50).flat_map(|_| program.encoded_batch(1.0)).collect::<Vec<u8>>()
        };
        assert_eq!(bytes(&options), bytes(&options));
        let truth = Program::truth_after(&options, 50);
        let others = [
            ProgramOptions { seed: 2, ..options.clone() },
            ProgramOptions { pythonhashseed: "1".to_owned(), ..options },
        ];
        for other in others {
            assert!(Program::truth_after(&other, 50).held.is_disjoint(&truth.held), "{other:?}");
        }
    }

    #[test]
    fn truth_is_what_the_events_say() {
        let options = ProgramOptions { cache_blocks: 100, ..ProgramOptions::default() };
        let mut program = Program::new(options);
        let mut copies = HashMap::<BlockHash, i32>::new();
        for _ in 0..20_000 {
            for event in program.batch() {
                match event {
                    KvEvent::AllBlocksCleared => copies.clear(),
                    KvEvent::BlockRemoved { block_hash } => *copies.entry(block_hash.low64()).or_default() -= 1,
                    KvEvent::BlockStored(stored) => {
                        stored.block_hashes.iter().for_each(|hash| *copies.entry(hash.low64()).or_default() += 1);
                    }
                }
            }
            copies.retain(|_, n_copies| *n_copies != 0);
        }
        let truth = program.truth();
        assert!(copies.values().all(|n_copies| *n_copies > 0), "nothing is removed that is not held");
        assert_eq!(truth.held, copies.into_keys().collect());
        assert!(truth.held.len() <= 100 && truth.gone.iter().all(|hash| !truth.held.contains(hash)));
        assert_eq!(truth.n_events, 80_000);
    }
}
