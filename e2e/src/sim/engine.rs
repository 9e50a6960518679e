//! The scheduler: continuous batching over the block pool, one step at a time.
//!
//! Follows `vllm/v1/core/sched/scheduler.py` of vLLM 0.32.0 in what the cache can see: running requests
//! go first, then waiting ones while tokens, sequences and blocks last; blocks are stored (and announced)
//! when the step that fills them is *scheduled*; a request is preempted, last come first, when blocks run
//! out. Time is not known here: the caller decides how long a [`Step`] takes.

use std::collections::VecDeque;

use warmroute::routing::hash::{BlockHasher, Digest, HashAlgorithm, HashError};

use super::event::KvEvent;
use super::pool::{BlockId, BlockPool};
use super::sequence::{NewRequest, RequestId, Sequence};

/// Sizes and hash settings of an engine, named after vLLM's flags.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// `--num-gpu-blocks-override`; one block of these is never used.
    pub n_blocks: usize,
    /// `--block-size`, tokens.
    pub block_size: u32,
    /// `--max-model-len`, tokens of prompt and answer together.
    pub max_model_len: usize,
    /// `--max-num-seqs`.
    pub max_num_seqs: usize,
    /// `--max-num-batched-tokens`: longer prompts are prefilled in chunks.
    pub max_num_batched_tokens: usize,
    /// `--prefix-caching-hash-algo`.
    pub algorithm: HashAlgorithm,
    /// `PYTHONHASHSEED`; none when unset.
    pub seed: Option<String>,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            n_blocks: 4096,
            block_size: 16,
            max_model_len: 32_768,
            max_num_seqs: 64,
            max_num_batched_tokens: 8192,
            algorithm: HashAlgorithm::Sha256,
            seed: None,
        }
    }
}

/// One engine's scheduler and cache.
#[derive(Debug)]
pub struct Engine {
    options: EngineOptions,
    hasher: BlockHasher,
    pool: BlockPool,
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>,
    counters: Counters,
    next_id: u64,
}

/// Monotonic totals, as vLLM's metrics have them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Tokens that were looked up in the prefix cache.
    pub prefix_cache_queries: u64,
    /// Tokens that were found there.
    pub prefix_cache_hits: u64,
    /// Prompt tokens of all scheduled requests.
    pub prompt_tokens: u64,
    /// Sampled tokens.
    pub generation_tokens: u64,
    /// Requests that lost their blocks while running.
    pub preemptions: u64,
    /// Requests that ended normally.
    pub finished: u64,
}

/// What one step computes, and what it did to the cache.
#[derive(Debug, Default)]
pub struct Step {
    /// Tokens of prompts (or of preempted requests' earlier tokens) that this step computes.
    pub n_prefill_tokens: usize,
    /// Requests of which this step computes only the last sampled token.
    pub n_decodes: usize,
    /// Changes of the cache, in cause order.
    pub events: Vec<KvEvent>,
}

/// A token that a step sampled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sampled {
    /// Whose token it is.
    pub id: RequestId,
    /// The token.
    pub token: u32,
    /// Prompt tokens that were reused from the cache.
    pub n_cached: usize,
    /// Whether it is the request's last one.
    pub last: bool,
}

impl Step {
    /// Tokens that the step computes.
    fn n_tokens(&self) -> usize {
        self.n_prefill_tokens + self.n_decodes
    }

    /// Adds the next `n_new` tokens of `sequence`.
    fn add(&mut self, sequence: &mut Sequence, n_new: usize) {
        sequence.n_scheduled = n_new;
        if n_new == 1 && sequence.tokens.len() > sequence.n_prompt {
            self.n_decodes += 1;
        } else {
            self.n_prefill_tokens += n_new;
        }
    }
}

impl Engine {
    /// An idle engine with an empty cache.
    ///
    /// # Errors
    /// When the root of the hashes is unknown: `xxhash*` without a seed, where vLLM takes a random one.
    pub fn new(options: EngineOptions) -> Result<Self, HashError> {
        Ok(Self {
            hasher: BlockHasher::new(options.algorithm, options.seed.as_deref())?,
            pool: BlockPool::new(options.n_blocks),
            options,
            waiting: VecDeque::new(),
            running: Vec::new(),
            counters: Counters::default(),
            next_id: 0,
        })
    }

    /// Queues a request.
    pub fn submit(&mut self, request: NewRequest) -> RequestId {
        let id = RequestId(self.next_id);
        self.next_id += 1;
        self.waiting.push_back(Sequence::new(id, request, &self.hasher, self.options.block_size));
        id
    }

    /// Drops a request whose client has gone; its full blocks stay cached.
    pub fn abort(&mut self, id: RequestId) {
        self.waiting.retain(|sequence| sequence.id != id);
        if let Some(at) = self.running.iter().position(|sequence| sequence.id == id) {
            self.running.remove(at).release(&mut self.pool);
        }
    }

    /// Drops the cache; refused while requests run. The event waits for the next step.
    pub fn reset_prefix_cache(&mut self) -> bool {
        self.pool.reset()
    }

    /// Plans the next step and stores the blocks that it fills; none when there is nothing to compute.
    pub fn schedule(&mut self) -> Option<Step> {
        let mut step = Step::default();
        let n_preempted = self.counters.preemptions;
        self.schedule_running(&mut step);
        if self.counters.preemptions == n_preempted {
            self.schedule_waiting(&mut step);
        }
        if step.n_tokens() == 0 {
            return None;
        }
        step.events = self.pool.take_events();
        Some(step)
    }

    /// Ends the step that was scheduled last: samples, and frees what has finished.
    pub fn complete(&mut self) -> Vec<Sampled> {
        let mut sampled = Vec::new();
        for mut sequence in std::mem::take(&mut self.running) {
            sequence.n_computed += std::mem::take(&mut sequence.n_scheduled);
            if sequence.n_computed < sequence.tokens.len() {
                self.running.push(sequence);
                continue;
            }
            let (token, last) = sequence.sample(&self.hasher);
            self.counters.generation_tokens += 1;
            let n_cached = sequence.n_cached.expect("a running sequence has been looked up");
            sampled.push(Sampled { id: sequence.id, token, n_cached, last });
            if last {
                self.counters.finished += 1;
                sequence.release(&mut self.pool);
            } else {
                self.running.push(sequence);
            }
        }
        sampled
    }

    /// Requests that hold blocks.
    pub fn n_running(&self) -> usize {
        self.running.len()
    }

    /// Requests in the queue.
    pub fn n_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Fraction of the cache that running requests hold, 0 to 1.
    pub fn usage(&self) -> f64 {
        self.pool.usage()
    }

    /// Totals since the start.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Distinct hashes in the cache, in no particular order.
    pub fn cached_hashes(&self) -> impl Iterator<Item = &Digest> {
        self.pool.cached_hashes()
    }

    /// How many of `sequence`'s tokens still fit into `step`.
    fn n_fitting(&self, sequence: &Sequence, step: &Step) -> usize {
        let budget = self.options.max_num_batched_tokens - step.n_tokens();
        (sequence.tokens.len() - sequence.n_computed).min(budget)
    }

    fn schedule_running(&mut self, step: &mut Step) {
        let mut at = 0;
        while at < self.running.len() {
            let n_new = self.n_fitting(&self.running[at], step);
            if n_new == 0 {
                return;
            }
            let n_missing = self.running[at].n_missing_blocks(self.running[at].n_computed + n_new);
            let Some(blocks) = self.pool.take(n_missing) else {
                self.preempt_last();
                continue;
            };
            let sequence = &mut self.running[at];
            sequence.blocks.extend(blocks);
            step.add(sequence, n_new);
            sequence.store_full_blocks(&mut self.pool);
            at += 1;
        }
    }

    fn preempt_last(&mut self) {
        let mut sequence = self.running.pop().expect("only called with a running sequence");
        sequence.release(&mut self.pool);
        self.waiting.push_front(sequence);
        self.counters.preemptions += 1;
    }

    fn schedule_waiting(&mut self, step: &mut Step) {
        while self.running.len() < self.options.max_num_seqs && step.n_tokens() < self.options.max_num_batched_tokens {
            let Some(mut sequence) = self.waiting.pop_front() else {
                return;
            };
            let hits = self.pool.lookup(sequence.lookup_hashes());
            if !self.fits(&sequence, &hits) {
                self.waiting.push_front(sequence);
                return;
            }
            self.admit(&mut sequence, hits);
            let n_new = self.n_fitting(&sequence, step);
            let n_missing = sequence.n_missing_blocks(sequence.n_computed + n_new);
            let blocks = self.pool.take(n_missing);
            sequence.blocks.extend(blocks.expect("room for the whole prompt was checked"));
            step.add(&mut sequence, n_new);
            sequence.store_full_blocks(&mut self.pool);
            self.running.push(sequence);
        }
    }

    /// Whether all tokens fit, even if this step computes only some: a prompt prefilled in chunks must not
    /// starve half-way. Hits that are free now leave the queue as well.
    fn fits(&self, sequence: &Sequence, hits: &[BlockId]) -> bool {
        let n_new = sequence.n_missing_blocks(sequence.tokens.len()) - hits.len();
        n_new + self.pool.n_free_among(hits) <= self.pool.n_free()
    }

    /// Lets `sequence` start behind the blocks that its lookup found.
    fn admit(&mut self, sequence: &mut Sequence, hits: Vec<BlockId>) {
        let first_time = sequence.n_cached.is_none();
        if let Some(event) = sequence.reuse_event(hits.len()) {
            self.pool.record(event);
        }
        self.pool.touch(&hits);
        sequence.adopt(hits);
        if first_time {
            self.counters.prompt_tokens += sequence.n_prompt as u64;
            self.counters.prefix_cache_queries += sequence.n_prompt as u64;
            self.counters.prefix_cache_hits += sequence.n_computed as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn engine(n_blocks: usize, max_num_batched_tokens: usize) -> Engine {
        let options = EngineOptions { n_blocks, block_size: 4, max_num_batched_tokens, ..EngineOptions::default() };
        Engine::new(options).unwrap()
    }

    fn request(prompt: std::ops::Range<u32>, n_output: usize) -> NewRequest {
        NewRequest { prompt: prompt.collect(), output: vec![99; n_output], ..NewRequest::default() }
    }

    #[test]
    fn long_prompt_is_prefilled_in_chunks_with_one_event_each() {
        let mut engine = engine(16, 8);
        engine.submit(request(0..20, 1));
        let mut chunks = Vec::new();
        while let Some(step) = engine.schedule() {
            chunks.push((step.n_prefill_tokens, step.events.len()));
            engine.complete();
        }
        assert_eq!(chunks, [(8, 1), (8, 1), (4, 1)]);
    }

    #[test]
    fn request_waits_until_its_whole_prompt_fits() {
        let mut engine = engine(1 + 6, 64);
        engine.submit(request(0..16, 3));
        engine.submit(request(100..116, 1));
        engine.schedule().unwrap();
        assert_eq!((engine.n_running(), engine.n_waiting()), (1, 1));
        while engine.schedule().is_some() {
            engine.complete();
        }
        assert_eq!(engine.counters().finished, 2);
    }

    #[test]
    fn youngest_request_is_preempted_and_finishes_later() {
        let mut engine = engine(1 + 5, 64);
        engine.submit(request(0..8, 8));
        engine.submit(request(100..108, 8));
        let mut n_tokens = 0;
        while engine.schedule().is_some() {
            n_tokens += engine.complete().len();
        }
        assert!(engine.counters().preemptions > 0);
        assert_eq!((n_tokens, engine.counters().finished), (16, 2));
    }

    #[test]
    fn aborted_request_leaves_its_full_blocks_in_the_cache() {
        let mut engine = engine(16, 64);
        let id = engine.submit(request(0..9, 5));
        engine.schedule().unwrap();
        engine.complete();
        engine.abort(id);
        assert_eq!((engine.n_running(), engine.usage(), engine.cached_hashes().count()), (0, 0.0, 2));
    }
}
