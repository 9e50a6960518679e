//! Which requests ask their engine to announce what it reuses (`models[].events.report`).
//!
//! A source that began to follow its engine late does not know what was cached before, and a hot prefix is never
//! announced again: its blocks are reused, which emits nothing. So one request of each conversation that goes to such
//! an endpoint asks for a full report (vLLM 0.26 and later, see [`crate::request::report`]): from then on that
//! conversation is known.
//!
//! A conversation is recognized by one block near the end of the request that asked: the next turn's chain contains it,
//! another conversation's chain does not, even behind the same system prompt. What is remembered is a keyed hash of it
//! with the endpoint and its generations, at most `MAX_CONVERSATIONS` for at most `EXPIRY`; a report that got lost is
//! asked for again after that.

use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Mutex, PoisonError};

use crate::request::report::{MAX_ADDED_BYTES, with_full_report, without_report_mode};
use crate::routing::endpoint::Endpoint;
use crate::routing::hash::BlockHash;
use crate::routing::load::Millis;

/// Conversations remembered per model, 16 bytes each.
const MAX_CONVERSATIONS: usize = 4096;
/// After this a conversation may ask again. A report costs the engine one event of the whole prefix.
const EXPIRY: Millis = Millis(30 * 60 * 1000);
/// Blocks at the end of a request that the next turn may have otherwise: they hold the chat template's opening of the
/// answer.
const OPEN_BLOCKS: usize = 2;

/// What the lookup of a request tells about its endpoint.
#[derive(Clone, Copy, Debug)]
pub enum Found<'a> {
    /// The blocks that the engine could reuse, of which the endpoint is credited with some.
    Blocks {
        /// All of them.
        chain: &'a [BlockHash],
        /// Whether the endpoint holds them all.
        is_credited: bool,
    },
    /// Nothing has been announced by any engine of the model yet, so the prompt was not looked up.
    NoIndex,
}

/// Chooses the requests of one model that ask for a full report.
#[derive(Debug)]
pub struct Reports {
    max_body_bytes: usize,
    keys: RandomState,
    /// Locked for the length of a chain, and only by requests to an incomplete endpoint that lack some blocks there.
    asked: Mutex<Asked>,
}

/// Keyed hashes of the conversations that asked, in two halves, of which the older is forgotten as a whole.
#[derive(Debug)]
struct Asked {
    young: HashSet<u64>,
    old: HashSet<u64>,
    turned_at: Millis,
}

impl Reports {
    /// Bodies are extended up to `max_body_bytes`, which is where Envoy's buffer ends.
    pub fn new(max_body_bytes: usize) -> Self {
        let asked = Asked { young: HashSet::new(), old: HashSet::new(), turned_at: Millis(0) };
        Self { max_body_bytes, keys: RandomState::new(), asked: Mutex::new(asked) }
    }

    /// The body of a request to `endpoint` that is to ask for a full report; none when it need not, or cannot.
    pub fn extend(&self, body: &[u8], endpoint: &Endpoint, found: Found<'_>, now: Millis) -> Option<Vec<u8>> {
        let has_room = body.len().checked_add(MAX_ADDED_BYTES).is_some_and(|len| len <= self.max_body_bytes);
        if !has_room || !endpoint.knowledge.is_incomplete() {
            return None;
        }
        let is_wanted = match found {
            // The first report that finds anything ends this state, and the others cost nothing.
            Found::NoIndex => true,
            Found::Blocks { chain, is_credited } => !is_credited && self.ask(endpoint, chain, now),
        };
        if is_wanted { with_full_report(body) } else { None }
    }

    /// Whether the conversation had not asked yet; from now on it has.
    fn ask(&self, endpoint: &Endpoint, chain: &[BlockHash], now: Millis) -> bool {
        let Some(last_idx) = chain.len().checked_sub(1) else { return false };
        let holder = (endpoint.id, endpoint.knowledge.n_generations());
        let key = |block: &BlockHash| self.keys.hash_one((holder, block));
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        asked.forget_at(now);
        if chain.iter().any(|block| asked.contains(key(block))) {
            return false;
        }
        asked.insert(key(&chain[last_idx.saturating_sub(OPEN_BLOCKS)]), now);
        true
    }
}

impl Asked {
    fn forget_at(&mut self, now: Millis) {
        if now.0.saturating_sub(self.turned_at.0) >= EXPIRY.0 / 2 {
            self.turn(now);
        }
    }

    fn turn(&mut self, now: Millis) {
        self.old = std::mem::take(&mut self.young);
        self.turned_at = now;
    }

    fn contains(&self, conversation: u64) -> bool {
        self.young.contains(&conversation) || self.old.contains(&conversation)
    }

    fn insert(&mut self, conversation: u64, now: Millis) {
        if self.young.len() >= MAX_CONVERSATIONS / 2 {
            self.turn(now);
        }
        self.young.insert(conversation);
    }
}

/// The body to send instead of a client's, if it has to be another one: without its own report mode, or `extended`.
pub fn body_to_send(body: &[u8], extended: Option<Vec<u8>>) -> Option<Vec<u8>> {
    extended.or_else(|| without_report_mode(body))
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::*;
    use crate::routing::endpoint::{EndpointId, SourceKnowledge};

    const BODY: &[u8] = br#"{"prompt":"p"}"#;
    const NOW: Millis = Millis(0);

    fn endpoint(id: u32) -> (Endpoint, SourceKnowledge) {
        let endpoint = Endpoint::new(EndpointId(id), ([127, 0, 0, 1], 8000).into());
        let mut source = SourceKnowledge::new(endpoint.knowledge.clone());
        source.mark_incomplete(true);
        (endpoint, source)
    }

    fn chain(blocks: Range<u64>) -> Vec<BlockHash> {
        blocks.map(BlockHash).collect()
    }

    /// Whether a request with this chain asks for a report.
    fn asks(reports: &Reports, endpoint: &Endpoint, chain: &[BlockHash], now: Millis) -> bool {
        reports.extend(BODY, endpoint, Found::Blocks { chain, is_credited: false }, now).is_some()
    }

    #[test]
    fn conversation_asks_once_per_endpoint_and_generation() {
        let reports = Reports::new(1 << 20);
        let (first, source) = endpoint(1);
        let (second, _source) = endpoint(2);
        assert!(asks(&reports, &first, &chain(0..10), NOW));
        assert!(!asks(&reports, &first, &chain(0..10), NOW), "the same request again");
        assert!(!asks(&reports, &first, &chain(0..30), NOW), "the next turn");
        assert!(asks(&reports, &second, &chain(0..30), NOW), "another endpoint");
        source.start_generation();
        assert!(asks(&reports, &first, &chain(0..30), NOW), "the source forgot what was reported");
    }

    #[test]
    fn next_turn_may_end_the_former_prompt_otherwise() {
        let reports = Reports::new(1 << 20);
        let (endpoint, _source) = endpoint(1);
        assert!(asks(&reports, &endpoint, &chain(0..10), NOW));
        let next: Vec<_> = [chain(0..8), chain(100..120)].concat();
        assert!(!asks(&reports, &endpoint, &next, NOW));
    }

    #[test]
    fn conversations_behind_one_system_prompt_ask_each() {
        let reports = Reports::new(1 << 20);
        let (endpoint, _source) = endpoint(1);
        for number in 1..5 {
            let own = 100 * number..100 * number + 5;
            let conversation = [chain(0..50), chain(own)].concat();
            assert!(asks(&reports, &endpoint, &conversation, NOW), "conversation {number}");
        }
    }

    #[test]
    fn complete_endpoints_and_whole_credit_need_no_report() {
        let reports = Reports::new(1 << 20);
        let (endpoint, mut source) = endpoint(1);
        let whole = chain(0..5);
        let credited = Found::Blocks { chain: &whole, is_credited: true };
        assert_eq!(reports.extend(BODY, &endpoint, credited, NOW), None);
        assert!(!asks(&reports, &endpoint, &[], NOW), "no block can be reused");
        assert!(reports.extend(BODY, &endpoint, Found::NoIndex, NOW).is_some());
        source.mark_incomplete(false);
        assert!(!asks(&reports, &endpoint, &whole, NOW));
        assert_eq!(reports.extend(BODY, &endpoint, Found::NoIndex, NOW), None);
    }

    #[test]
    fn bodies_never_grow_beyond_the_limit() {
        let (endpoint, _source) = endpoint(1);
        let limit = BODY.len() + MAX_ADDED_BYTES;
        let extended = Reports::new(limit).extend(BODY, &endpoint, Found::NoIndex, NOW).expect("it fits");
        assert!(extended.len() <= limit);
        assert_eq!(Reports::new(limit - 1).extend(BODY, &endpoint, Found::NoIndex, NOW), None);
    }

    #[test]
    fn what_is_remembered_expires_and_is_bounded() {
        let reports = Reports::new(1 << 20);
        let (endpoint, _source) = endpoint(1);
        assert!(asks(&reports, &endpoint, &chain(0..10), NOW));
        assert!(!asks(&reports, &endpoint, &chain(0..10), Millis(EXPIRY.0 / 2)));
        assert!(asks(&reports, &endpoint, &chain(0..10), EXPIRY));

        for conversation in 1..20_000 {
            let block = chain(1000 * conversation..1000 * conversation + 1);
            assert!(asks(&reports, &endpoint, &block, EXPIRY));
            assert!(!asks(&reports, &endpoint, &block, EXPIRY), "the newest is always remembered");
        }
        let asked = reports.asked.lock().expect("no panic");
        assert!(asked.young.len() + asked.old.len() <= MAX_CONVERSATIONS);
    }
}
