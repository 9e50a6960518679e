//! What the endpoints of a pool hold of a prompt.
//!
//! Where engines announce their blocks, the index says; blocks that our own recent picks will have them compute count
//! as well, as long as they have not been announced (`promises`). Where nothing is announced, because the pool does not
//! follow events or none has come yet, the picks themselves are the index: in blocks of our own, for their own time.

use std::sync::Arc;

use super::Router;
use super::pools::{Pool, Target};
use super::timer::Timer;
use crate::routing::endpoint::{Endpoint, EndpointId};
use crate::routing::hash::own::OwnHasher;
use crate::routing::hash::{BlockHash, BlockSize, Scope};
use crate::routing::index::{Clock, Keyspace, KeyspaceIndex, KeyspaceKind, Overlaps, Prediction};
use crate::routing::index::{Promised, Promises, Watched};
use crate::routing::load::Millis;
use crate::routing::pick::Choice;
use crate::routing::score::TokenMatch;
use crate::telemetry::metrics::Stage;
use crate::tokenizer::{Space, Tokens};

/// Tokens per block of the learned index: vLLM's block size on GPUs.
pub(super) const LEARNED_BLOCK: u32 = 16;

/// A prompt's tokens and what is known of them.
#[derive(Debug)]
pub(super) struct Lookup {
    pub(super) prompt_tokens: u32,
    pub(super) matches: Vec<TokenMatch>,
    /// One for each keyspace that was looked into.
    pub(super) chains: Vec<Chain>,
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

/// The blocks of a prompt that an engine could reuse, in one keyspace.
#[derive(Debug)]
pub(super) struct Chain {
    pub(super) hashes: Vec<BlockHash>,
    pub(super) block_size: BlockSize,
    /// Who defines the hashes; none for the learned index.
    pub(super) kind: Option<KeyspaceKind>,
    /// The keyspace; none for the learned index.
    keyspace: Option<Arc<KeyspaceIndex>>,
    /// How many of the blocks endpoints are known to hold.
    held: Vec<(EndpointId, u32)>,
}

impl Lookup {
    /// How many blocks the longest chain has.
    pub(super) fn n_blocks(&self) -> u32 {
        self.longest().map_or(0, |chain| u32::try_from(chain.hashes.len()).unwrap_or(u32::MAX))
    }

    /// The chain with most blocks. Of several, always that of the same keyspace: blocks of two decisions can be compared
    /// only there.
    pub(super) fn longest(&self) -> Option<&Chain> {
        self.chains.iter().max_by_key(|chain| (chain.hashes.len(), chain.keyspace_order()))
    }

    /// Notes what the picked endpoint is going to hold: in the keyspace in which it holds something, since its source
    /// writes there; where that is not known, in each.
    pub(super) fn promise(&self, pool: &Pool, endpoint: &Arc<Endpoint>, now: Millis) -> Vec<Promised> {
        let promise =
            |chain: &Chain| chain.promises(pool).promise(&chain.hashes, chain.n_held(endpoint.id), endpoint, now);
        self.promise_by(endpoint, promise)
    }

    /// The same for an endpoint that nobody picked, and that serves the request by now.
    pub(super) fn promise_served(&self, pool: &Pool, endpoint: &Arc<Endpoint>, now: Millis) -> Vec<Promised> {
        let promise = |chain: &Chain| {
            chain.promises(pool).promise_served(&chain.hashes, chain.n_held(endpoint.id), endpoint, now)
        };
        self.promise_by(endpoint, promise)
    }

    fn promise_by(&self, endpoint: &Endpoint, promise: impl Fn(&Chain) -> Option<Promised>) -> Vec<Promised> {
        let most_held = self.chains.iter().max_by_key(|chain| chain.n_held(endpoint.id) * chain.block_size.get());
        match most_held.filter(|chain| chain.n_held(endpoint.id) > 0) {
            Some(chain) => promise(chain).into_iter().collect(),
            None => self.chains.iter().filter_map(promise).collect(),
        }
    }
}

impl Lookup {
    /// Watches whether the picked endpoint holds what it is said to hold: in the keyspace of its match or, where it
    /// holds nothing, in any. Not in a pool whose engines are asked for reports: a report announces what is held as if it
    /// were stored.
    pub(super) fn watch(&self, pool: &Pool, choice: &Choice, clock: &Clock, now: Millis) -> Option<Watched> {
        if pool.reports.is_some() {
            return None;
        }
        let (pick, standing) = (&choice.pick, choice.standings.first()?);
        let held_tokens = standing.matched_tokens - standing.promised_tokens;
        let has_match = |chain: &&Chain| chain.holds_tokens(pick.endpoint.id, held_tokens);
        let chain = self.chains.iter().find(|chain| held_tokens == 0 || has_match(chain))?;
        let block_size = chain.block_size.get();
        let prediction = Prediction {
            chain: &chain.hashes,
            n_held: held_tokens / block_size,
            n_matched: pick.matched_tokens / block_size,
            endpoint: &pick.endpoint,
            rank: pick.rank.filter(|_| held_tokens > 0),
        };
        chain.keyspace.as_ref()?.watches().watch(&prediction, &pool.predictions, clock, now)
    }
}

impl Chain {
    /// Orders the keyspaces of a model, those of the engines' own hashes last.
    fn keyspace_order(&self) -> (u32, Option<(&'static str, &[u8])>) {
        let of_engine = match &self.kind {
            Some(KeyspaceKind::Engine { algorithm, root }) => Some((algorithm.as_str(), root.as_bytes())),
            Some(KeyspaceKind::Own) | None => None,
        };
        (self.block_size.get(), of_engine)
    }

    fn holds_tokens(&self, endpoint: EndpointId, n_tokens: u32) -> bool {
        let block_size = self.block_size.get();
        self.held.iter().any(|(holder, n_blocks)| *holder == endpoint && n_blocks * block_size == n_tokens)
    }

    /// Tokens in all of the blocks.
    pub(super) fn n_tokens(&self) -> u32 {
        u32::try_from(self.hashes.len()).unwrap_or(u32::MAX).saturating_mul(self.block_size.get())
    }

    fn n_held(&self, endpoint: EndpointId) -> u32 {
        self.held.iter().filter(|(holder, _)| *holder == endpoint).map(|(_, n_blocks)| *n_blocks).max().unwrap_or(0)
    }

    /// Where its blocks are promised. What is only promised is promised again: it is the picks that keep a learned block
    /// from being forgotten.
    fn promises<'a>(&'a self, pool: &'a Pool) -> &'a Promises {
        self.keyspace.as_ref().map_or(&pool.learned, |keyspace| keyspace.promises())
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
    pub(super) fn look_up(&self, question: &Question<'_>, timer: &mut Timer<'_>) -> Lookup {
        let pool = &question.target.pool;
        let keyspaces =
            if question.target.follows_events() { self.index.keyspaces_of(&pool.model) } else { Vec::new() };
        let (matches, chains, basis) = if keyspaces.is_empty() {
            let (matches, chain) = self.learned_matches(question, timer);
            (matches, vec![chain], Basis::Picks)
        } else {
            let (matches, chains) = self.announced_matches(question, keyspaces, timer);
            (matches, chains, Basis::Events)
        };
        let prompt_tokens = u32::try_from(question.tokens.ids.len()).unwrap_or(u32::MAX);
        Lookup { prompt_tokens, matches, chains, basis }
    }

    /// Matches in every keyspace in which some source has blocks; an endpoint that has blocks in several counts with
    /// its best.
    fn announced_matches(
        &self,
        question: &Question<'_>,
        keyspaces: Vec<(Keyspace, Arc<KeyspaceIndex>)>,
        timer: &mut Timer<'_>,
    ) -> (Vec<TokenMatch>, Vec<Chain>) {
        let Question { target, scope, .. } = question;
        let required = target.required_kinds(scope, question.reusable().len());
        let mut overlaps = Overlaps::default();
        let (mut matches, mut chains) = (Vec::new(), Vec::with_capacity(keyspaces.len()));
        for (keyspace, index) in keyspaces {
            let block_size = keyspace.block_size;
            let hashes = timer.timed(Stage::Hash, || target.pool.chain(&keyspace, question.reusable(), scope));
            let held = timer.timed(Stage::Lookup, || {
                index.overlaps(&hashes, required, &mut overlaps);
                matches.extend(overlaps.matches().map(|found| TokenMatch {
                    endpoint: found.endpoint,
                    rank: Some(found.rank),
                    tokens: found.n_blocks * block_size.get(),
                    offloaded_tokens: found.n_offloaded * block_size.get(),
                }));
                let held: Vec<_> = overlaps.matches().map(|found| (found.endpoint, found.n_blocks)).collect();
                matches.extend(promised(index.promises(), &hashes, held.iter().copied(), block_size, self.now()));
                held
            });
            chains.push(Chain { hashes, block_size, kind: Some(keyspace.kind), keyspace: Some(index), held });
        }
        (matches, chains)
    }

    fn learned_matches(&self, question: &Question<'_>, timer: &mut Timer<'_>) -> (Vec<TokenMatch>, Chain) {
        let pool = &question.target.pool;
        let block_size = BlockSize::new(LEARNED_BLOCK).expect("not 0");
        let hasher = match question.space {
            Space::Model => OwnHasher::new(&pool.model),
            // No model has this name, so ids of the two kinds never meet.
            Space::Text => OwnHasher::new(&format!("{}\0text", pool.model)),
        };
        let chain = || hasher.clone().scoped_chain(question.reusable(), block_size, question.scope);
        let hashes = timer.timed(Stage::Hash, chain);
        let look_up = || promised(&pool.learned, &hashes, std::iter::empty(), block_size, self.now());
        let matches = timer.timed(Stage::Lookup, look_up);
        (matches, Chain { hashes, block_size, kind: None, keyspace: None, held: Vec::new() })
    }
}

impl Question<'_> {
    /// The tokens that could be reused: the engine computes at least the last one of a prompt, so it never reuses the
    /// block that holds it.
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
