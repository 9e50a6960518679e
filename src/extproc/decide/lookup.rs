//! What the endpoints of a pool hold of a prompt.
//!
//! Where engines announce their blocks, the index says; blocks that our own recent picks will have them compute count as well,
//! as long as they have not been announced (`promises`). Where nothing is announced, because the pool does not follow
//! events or none has come yet, the picks themselves are the index: in blocks of our own, for their own time.

use std::sync::Arc;
use std::time::Instant;

use super::Router;
use super::pools::{Pool, Target};
use crate::routing::endpoint::{Endpoint, EndpointId};
use crate::routing::hash::own::OwnHasher;
use crate::routing::hash::{BlockHash, BlockSize, Scope};
use crate::routing::index::{Keyspace, KeyspaceIndex, Overlaps};
use crate::routing::index::{Promised, Promises};
use crate::routing::load::Millis;
use crate::routing::pick::Pick;
use crate::routing::score::TokenMatch;
use crate::telemetry::metrics::Stage;
use crate::tokenizer::{Space, Tokens};

/// Tokens per block of the learned index: vLLM's block size on GPUs.
const LEARNED_BLOCK: u32 = 16;

/// A prompt's tokens and what is known of them.
pub(super) struct Lookup {
    pub(super) prompt_tokens: u32,
    pub(super) matches: Vec<TokenMatch>,
    pub(super) longest: Chain,
    pub(super) basis: Basis,
}

/// Where the matches come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Basis {
    /// The engines' events.
    Events,
    /// Our own picks.
    Picks,
}

/// The blocks of a prompt that an engine could reuse, in the keyspace that has most of them.
#[derive(Default)]
pub(super) struct Chain {
    pub(super) hashes: Vec<BlockHash>,
    pub(super) n_tokens: u32,
    /// The keyspace; none for the learned index.
    keyspace: Option<Arc<KeyspaceIndex>>,
}

impl Lookup {
    /// Notes what the picked endpoint is going to hold.
    pub(super) fn promise(&self, pool: &Pool, pick: &Pick, now: Millis) -> Option<Promised> {
        // What is only promised is promised again: it is the picks that keep a learned block from being forgotten.
        let held = self.matches.iter().filter(|found| found.rank.is_some() && found.endpoint == pick.endpoint.id);
        let held_tokens = held.map(|found| found.tokens).max().unwrap_or(0);
        self.longest.promise(pool, held_tokens / self.longest.block_size()?, &pick.endpoint, now)
    }
}

impl Chain {
    /// Tokens per block; none of an empty chain.
    fn block_size(&self) -> Option<u32> {
        self.n_tokens.checked_div(u32::try_from(self.hashes.len()).ok()?)
    }

    fn new(hashes: Vec<BlockHash>, block_size: BlockSize, keyspace: Option<Arc<KeyspaceIndex>>) -> Self {
        let n_blocks = u32::try_from(hashes.len()).unwrap_or(u32::MAX);
        Self { hashes, n_tokens: n_blocks.saturating_mul(block_size.get()), keyspace }
    }

    /// Notes that an endpoint which holds the first `n_held` of these blocks is going to hold them all.
    fn promise(&self, pool: &Pool, n_held: u32, endpoint: &Arc<Endpoint>, now: Millis) -> Option<Promised> {
        let promises = self.keyspace.as_ref().map_or(&pool.learned, |keyspace| keyspace.promises());
        promises.promise(&self.hashes, n_held, endpoint, now)
    }
}

/// What a prompt is looked up as.
pub(super) struct Question<'a> {
    pub(super) target: &'a Target,
    pub(super) tokens: &'a Tokens,
    pub(super) space: Space,
    pub(super) scope: &'a Scope,
}

impl Router {
    /// Looks the prompt up wherever some source has blocks, or else in what our picks have taught.
    pub(super) fn look_up(&self, question: &Question<'_>) -> Lookup {
        let pool = &question.target.pool;
        let keyspaces = if pool.sync { self.index.keyspaces_of(&pool.model) } else { Vec::new() };
        let (matches, longest, basis) = if keyspaces.is_empty() {
            let (matches, chain) = self.learned_matches(question);
            (matches, chain, Basis::Picks)
        } else {
            let (matches, chain) = self.announced_matches(question, keyspaces);
            (matches, chain, Basis::Events)
        };
        let prompt_tokens = u32::try_from(question.tokens.ids.len()).unwrap_or(u32::MAX);
        Lookup { prompt_tokens, matches, longest, basis }
    }

    /// Matches in every keyspace in which some source has blocks; an endpoint that has blocks in several counts with its
    /// best.
    fn announced_matches(
        &self,
        question: &Question<'_>,
        keyspaces: Vec<(Keyspace, Arc<KeyspaceIndex>)>,
    ) -> (Vec<TokenMatch>, Chain) {
        let Question { target, scope, .. } = question;
        let required = target.required_kinds(scope, question.reusable().len());
        let mut overlaps = Overlaps::default();
        let (mut matches, mut longest) = (Vec::new(), Chain::default());
        for (keyspace, index) in keyspaces {
            let block_size = keyspace.block_size;
            let hashes = self.timed(Stage::Hash, || target.pool.chain(&keyspace, question.reusable(), scope));
            let started = Instant::now();
            index.overlaps(&hashes, required, &mut overlaps);
            matches.extend(overlaps.matches().map(|found| TokenMatch {
                endpoint: found.endpoint,
                rank: Some(found.rank),
                tokens: found.n_blocks * block_size.get(),
                offloaded_tokens: found.n_offloaded * block_size.get(),
            }));
            let held = overlaps.matches().map(|found| (found.endpoint, found.n_blocks));
            matches.extend(promised(index.promises(), &hashes, held, block_size, self.now()));
            self.metrics.observe_stage(Stage::Lookup, started.elapsed());
            if hashes.len() > longest.hashes.len() {
                longest = Chain::new(hashes, block_size, Some(index));
            }
        }
        (matches, longest)
    }

    fn learned_matches(&self, question: &Question<'_>) -> (Vec<TokenMatch>, Chain) {
        let pool = &question.target.pool;
        let block_size = BlockSize::new(LEARNED_BLOCK).expect("not 0");
        let hasher = match question.space {
            Space::Model => OwnHasher::new(&pool.model),
            // No model has this name, so ids of the two kinds never meet.
            Space::Text => OwnHasher::new(&format!("{}\0text", pool.model)),
        };
        let chain = || hasher.clone().scoped_chain(question.reusable(), block_size, question.scope);
        let hashes = self.timed(Stage::Hash, chain);
        let look_up = || promised(&pool.learned, &hashes, std::iter::empty(), block_size, self.now());
        let matches = self.timed(Stage::Lookup, look_up);
        (matches, Chain::new(hashes, block_size, None))
    }
}

impl Question<'_> {
    /// The tokens that could be reused: the engine computes at least the last one of a prompt, so it never reuses the block
    /// that holds it.
    fn reusable(&self) -> &[u32] {
        let ids = &self.tokens.ids;
        &ids[..ids.len().saturating_sub(1)]
    }
}

/// What endpoints hold or were promised, where that is more than what they hold.
fn promised(
    promises: &Promises,
    hashes: &[BlockHash],
    held: impl Iterator<Item = (EndpointId, u32)>,
    block_size: BlockSize,
    now: Millis,
) -> Vec<TokenMatch> {
    let mut found = Vec::new();
    promises.extend(hashes, held, now, &mut found);
    let tokens = |n_blocks: u32| n_blocks * block_size.get();
    found
        .into_iter()
        .map(|(endpoint, n_blocks)| TokenMatch { endpoint, rank: None, tokens: tokens(n_blocks), offloaded_tokens: 0 })
        .collect()
}
