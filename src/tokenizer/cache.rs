//! The tokens of questions that were asked before.
//!
//! The key is a 128-bit hash of the whole question under a secret that this process has drawn: no prompt is kept, and
//! whoever can choose prompts cannot make two of them meet. Bounded in bytes; what is used again stays longer (S3-FIFO
//! of `quick_cache`). An entry is good for [`MAX_AGE`]: a chat template may contain the date, and engines may be
//! replaced by ones that tokenize otherwise.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use quick_cache::sync::{Cache, DefaultLifecycle};
use quick_cache::{OptionsBuilder, Weighter};
use xxhash_rust::xxh3::xxh3_128_with_secret;

use super::Tokens;
use crate::request::Question;

/// Longest that an answer is believed.
const MAX_AGE: Duration = Duration::from_secs(600);
/// Memory of an entry beside its ids: key, bookkeeping, the list's header.
const ENTRY_BYTES: usize = 128;
/// Bytes of a typical entry, from which the cache estimates how many it will have: 2,000 tokens.
const TYPICAL_BYTES: usize = 8 << 10;
/// Least memory of a part of the cache that has a lock of its own: room for the longest prompts.
const SHARD_BYTES: usize = 8 << 20;
/// XXH3 takes at least 136 bytes of secret.
const SECRET_BYTES: usize = 192;

/// See the module.
pub(super) struct TokenCache {
    entries: Cache<u128, Entry, ByBytes, RandomState>,
    secret: [u8; SECRET_BYTES],
    /// Part of every key: what was asked before it changed is not found any more, also when the answer comes after.
    epoch: AtomicU64,
    n_hits: AtomicU64,
    n_misses: AtomicU64,
}

/// Stands for a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CacheKey(u128);

#[derive(Clone)]
struct Entry {
    tokens: Arc<Tokens>,
    since: Instant,
}

#[derive(Clone)]
struct ByBytes;

impl Weighter<u128, Entry> for ByBytes {
    fn weight(&self, _: &u128, entry: &Entry) -> u64 {
        (ENTRY_BYTES + entry.tokens.n_bytes()) as u64
    }
}

impl TokenCache {
    /// A cache of at most `n_bytes`.
    pub(super) fn new(n_bytes: usize) -> Self {
        let options = OptionsBuilder::new()
            .estimated_items_capacity(n_bytes / TYPICAL_BYTES)
            .weight_capacity(n_bytes as u64)
            // A shard takes no entry that is larger than itself.
            .shards((n_bytes / SHARD_BYTES).max(1))
            .build()
            .expect("items and weight are given");
        let entries = Cache::with_options(options, ByBytes, RandomState::new(), DefaultLifecycle::default());
        let [epoch, n_hits, n_misses] = [const { AtomicU64::new(0) }; 3];
        Self { entries, secret: secret(), epoch, n_hits, n_misses }
    }

    /// The key of a question. Answers under another `epoch` are not found: those who gave them may have been wrong.
    pub(super) fn key(&self, question: &Question, epoch: u64) -> CacheKey {
        // The API is part of the question: the same body may have other tokens there.
        let api = xxh3_128_with_secret(question.api.path().as_bytes(), &self.secret);
        let epochs = [self.epoch.load(Relaxed).to_le_bytes(), epoch.to_le_bytes()].concat();
        let epoch = xxh3_128_with_secret(&epochs, &self.secret);
        CacheKey(xxh3_128_with_secret(&question.body, &self.secret) ^ api.rotate_left(1) ^ epoch.rotate_left(2))
    }

    pub(super) fn get(&self, key: CacheKey) -> Option<Arc<Tokens>> {
        let found = self.entries.get(&key.0).filter(|entry| entry.since.elapsed() < MAX_AGE);
        let counter = if found.is_some() { &self.n_hits } else { &self.n_misses };
        counter.fetch_add(1, Relaxed);
        found.map(|entry| entry.tokens)
    }

    pub(super) fn put(&self, key: CacheKey, tokens: Arc<Tokens>) {
        self.entries.insert(key.0, Entry { tokens, since: Instant::now() });
    }

    /// Forgets everything, and whatever is still being answered.
    pub(super) fn forget(&self) {
        self.epoch.fetch_add(1, Relaxed);
        self.entries.clear();
    }

    /// Questions that were answered from here, and those that were not.
    pub(super) fn counts(&self) -> (u64, u64) {
        (self.n_hits.load(Relaxed), self.n_misses.load(Relaxed))
    }

    /// Bytes in use.
    pub(super) fn n_bytes(&self) -> u64 {
        self.entries.weight()
    }
}

/// Random bytes, from the same source as the standard library's hash maps.
fn secret() -> [u8; SECRET_BYTES] {
    let random = RandomState::new();
    let mut secret = [0; SECRET_BYTES];
    for (word, place) in (0_u64..).zip(secret.chunks_exact_mut(8)) {
        place.copy_from_slice(&random.hash_one(word).to_le_bytes());
    }
    secret
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::TokensApi;

    fn question(body: &str) -> Question {
        Question { api: TokensApi::Tokenize, body: body.into() }
    }

    fn tokens(n: usize) -> Arc<Tokens> {
        Arc::new(Tokens { ids: vec![7; n], ..Tokens::default() })
    }

    #[test]
    fn what_was_put_is_found_and_nothing_else() {
        let cache = TokenCache::new(1 << 20);
        let key = cache.key(&question("a"), 0);
        assert_eq!(cache.get(key), None);
        cache.put(key, tokens(3));
        assert_eq!(cache.get(key), Some(tokens(3)));
        assert_eq!(cache.get(cache.key(&question("b"), 0)), None);
        assert_ne!(key, cache.key(&question("a"), 1), "answers of another epoch are not found");
        assert_eq!(cache.counts(), (1, 2));
        cache.forget();
        cache.put(key, tokens(3));
        assert_eq!(cache.get(cache.key(&question("a"), 0)), None, "an answer from before is not found either");
    }

    #[test]
    fn memory_is_bounded_and_a_cache_of_nothing_keeps_nothing() {
        let cache = TokenCache::new(1 << 20);
        for n in 0..1_000 {
            cache.put(cache.key(&question(&n.to_string()), 0), tokens(1_000));
        }
        assert!((1 << 19..=1 << 20).contains(&cache.n_bytes()), "{} bytes", cache.n_bytes());
        let none = TokenCache::new(0);
        none.put(none.key(&question("a"), 0), tokens(1));
        assert_eq!(none.get(none.key(&question("a"), 0)), None);
    }

    #[test]
    fn a_long_prompt_finds_room() {
        let cache = TokenCache::new(64 << 20);
        let key = cache.key(&question("a"), 0);
        cache.put(key, tokens(1 << 20));
        assert!(cache.get(key).is_some());
    }

    #[test]
    fn two_processes_have_other_keys_for_the_same_prompt() {
        let (one, other) = (TokenCache::new(0), TokenCache::new(0));
        assert_ne!(one.key(&question("a"), 0), other.key(&question("a"), 0));
    }
}
