//! One request inside the engine: its tokens, its block hashes and how far it has come.

use std::sync::Arc;

use warmroute::routing::hash::{BlockHasher, BlockSize, Digest, Scope};

use super::event::{BlockStored, KvEvent};
use super::pool::{BlockId, BlockPool};

/// Identity of a request inside one engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// A LoRA adapter as it was loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Adapter {
    /// Engine-local number, from 1 in the order of loading.
    pub id: u32,
    /// Name under which clients ask for it.
    pub name: String,
    /// Path string given at loading time; it is part of the block hashes.
    pub path: String,
}

/// What a request asks of the engine.
#[derive(Clone, Debug, Default)]
pub struct NewRequest {
    /// The prompt, at least one token.
    pub prompt: Vec<u32>,
    /// What the model will say, decided beforehand; at least one token.
    pub output: Vec<u32>,
    /// `cache_salt` of the body.
    pub cache_salt: Option<String>,
    /// Adapter that the request's model names.
    pub adapter: Option<Arc<Adapter>>,
    /// Whether the cache is read.
    pub cache_read: CacheRead,
    /// `vllm_xargs.kv_cache_report_mode`.
    pub report: ReportMode,
    /// Session that the client named.
    pub session_id: Option<String>,
}

/// Whether a request may reuse cached blocks; it stores its own in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheRead {
    /// The normal case.
    #[default]
    Lookup,
    /// Requests with `prompt_logprobs`, which need every position computed.
    Skip,
}

/// Which blocks of a request are announced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReportMode {
    /// Only newly stored ones.
    #[default]
    Incremental,
    /// Reused ones as well, as one event from the root.
    Full,
}

/// A request that waits or runs.
#[derive(Debug)]
pub(super) struct Sequence {
    pub(super) id: RequestId,
    pub(super) tokens: Vec<u32>,
    pub(super) n_prompt: usize,
    pub(super) blocks: Vec<BlockId>,
    /// Tokens whose KV entries exist or are being computed in this step.
    pub(super) n_computed: usize,
    /// Tokens of the current step; 0 between steps.
    pub(super) n_scheduled: usize,
    /// Prompt tokens that the first lookup found; none until the request was scheduled.
    pub(super) n_cached: Option<usize>,
    request: NewRequest,
    scope: Scope,
    hashes: Vec<Digest>,
    n_stored: usize,
    block_size: usize,
}

impl Sequence {
    pub(super) fn new(id: RequestId, mut request: NewRequest, hasher: &BlockHasher, block_size: u32) -> Self {
        let tokens = std::mem::take(&mut request.prompt);
        let mut sequence = Self {
            id,
            n_prompt: tokens.len(),
            tokens,
            blocks: Vec::new(),
            n_computed: 0,
            n_scheduled: 0,
            n_cached: None,
            scope: scope(&request),
            request,
            hashes: Vec::new(),
            n_stored: 0,
            block_size: block_size as usize,
        };
        sequence.extend_hashes(hasher);
        sequence
    }

    /// Hashes that a lookup may use: the last token is always computed, since its logits are needed.
    pub(super) fn lookup_hashes(&self) -> &[Digest] {
        match self.request.cache_read {
            CacheRead::Lookup => &self.hashes[..(self.tokens.len() - 1) / self.block_size],
            CacheRead::Skip => &[],
        }
    }

    /// Starts on `blocks`, which a lookup found and which hold the first tokens.
    pub(super) fn adopt(&mut self, blocks: Vec<BlockId>) {
        self.n_computed = blocks.len() * self.block_size;
        self.n_stored = blocks.len();
        self.n_cached.get_or_insert(self.n_computed);
        self.blocks = blocks;
    }

    /// Blocks that must be added to hold `n_tokens` tokens.
    pub(super) fn n_missing_blocks(&self, n_tokens: usize) -> usize {
        n_tokens.div_ceil(self.block_size).saturating_sub(self.blocks.len())
    }

    /// Gives the blocks that are full after this step their hashes, and announces them.
    pub(super) fn store_full_blocks(&mut self, pool: &mut BlockPool) {
        let n_full = (self.n_computed + self.n_scheduled) / self.block_size;
        if n_full <= self.n_stored {
            return;
        }
        for (id, hash) in self.blocks[self.n_stored..n_full].iter().zip(&self.hashes[self.n_stored..n_full]) {
            pool.insert(*id, *hash);
        }
        pool.record(self.stored_event(self.n_stored, n_full));
        self.n_stored = n_full;
    }

    /// With `kv_cache_report_mode=full`, the event that announces `n_reused` blocks again.
    pub(super) fn reuse_event(&self, n_reused: usize) -> Option<KvEvent> {
        let wanted = self.request.report == ReportMode::Full && n_reused > 0;
        wanted.then(|| self.stored_event(0, n_reused))
    }

    /// Samples the next token; true when it was the last one.
    pub(super) fn sample(&mut self, hasher: &BlockHasher) -> (u32, bool) {
        let n_sampled = self.tokens.len() - self.n_prompt;
        let token = self.request.output[n_sampled];
        self.tokens.push(token);
        self.extend_hashes(hasher);
        (token, n_sampled + 1 == self.request.output.len())
    }

    /// Gives all blocks back, tail first, and forgets what was computed.
    pub(super) fn release(&mut self, pool: &mut BlockPool) {
        pool.release(std::mem::take(&mut self.blocks).into_iter().rev());
        self.n_computed = 0;
        self.n_scheduled = 0;
        self.n_stored = 0;
    }

    fn extend_hashes(&mut self, hasher: &BlockHasher) {
        let n_full = self.tokens.len() / self.block_size;
        let block_size =
            u32::try_from(self.block_size).ok().and_then(BlockSize::new).expect("block size came from a u32");
        for block_idx in self.hashes.len()..n_full {
            let parent = self.hashes.last().copied().unwrap_or(hasher.root());
            let tokens = &self.tokens[block_idx * self.block_size..(block_idx + 1) * self.block_size];
            let hash = hasher.block(&parent, tokens, &self.scope.keys(block_idx, block_size));
            self.hashes.push(hash);
        }
    }

    /// The extra keys as they appear in events: without tags and without the adapter's path.
    fn event_keys(&self, block_idx: usize) -> Vec<String> {
        let lora = self.request.adapter.iter().map(|adapter| adapter.name.clone());
        let salt = self.request.cache_salt.iter().filter(|_| block_idx == 0).cloned();
        lora.chain(salt).collect()
    }

    fn stored_event(&self, first: usize, end: usize) -> KvEvent {
        let adapter = self.request.adapter.as_deref();
        KvEvent::BlockStored(BlockStored {
            block_hashes: self.hashes[first..end].to_vec(),
            parent: first.checked_sub(1).map(|parent| self.hashes[parent]),
            token_ids: self.tokens[first * self.block_size..end * self.block_size].to_vec(),
            block_size: u32::try_from(self.block_size).expect("block size came from a u32"),
            lora_id: adapter.map(|adapter| adapter.id),
            lora_name: adapter.map(|adapter| adapter.name.clone()),
            extra_keys: (first..end).map(|block_idx| self.event_keys(block_idx)).collect(),
            session_id: self.request.session_id.clone(),
        })
    }
}

fn scope(request: &NewRequest) -> Scope {
    let adapter = request.adapter.as_ref();
    Scope {
        adapter: adapter.map(|adapter| (adapter.name.as_str().into(), adapter.path.as_str().into())),
        cache_salt: request.cache_salt.as_deref().map(Into::into),
        mm: Vec::new(),
    }
}
