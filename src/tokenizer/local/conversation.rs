//! The conversation cache: a prompt that begins as an earlier one did is tokenized only from where it goes on.
//!
//! # Why a prompt may be cut
//!
//! The tokenizers library (0.23, `AddedVocabulary::extract_and_normalize`) first cuts a text at the added tokens that
//! are not normalized, by one scan from left to right which takes the leftmost match and of those the longest.
//! Normalizer, pre-tokenizer and model then see each piece between them by itself. So the tokens up to the end of such
//! a token are those of the text up to there, whatever follows, if the scan finds that token whatever follows. It does
//! when
//!
//! - no other added token goes on where this one ends: this one is no part of another one, but for its end;
//! - it keeps to itself: `lstrip` and `rstrip` would take spaces from a piece, `single_word` looks at what follows, and
//!   a token that begins or ends with space could lose it to a neighbour that strips;
//! - it is `special`, as the boundaries of messages are. Others are often plain words that happen to be added.
//!
//! The token that models give for unknown characters is left out too, so that a boundary's id in the tokens means that
//! boundary.
//!
//! What follows a boundary is tokenized *with* the boundary's token in front, whose id is then dropped. A pre-tokenizer
//! that treats the beginning of a text in its own way (`Metaspace` with `prepend_scheme: first`) so finds the same as
//! in the whole text. A post-processor only puts tokens around all of it, and these are told once when the tokenizer is
//! loaded.
//!
//! Since all of this rests on the library's ways, it is tried on samples when a tokenizer is loaded, and 1 reuse in
//! 1,000 is compared with the whole text's tokens. One difference switches the cache off for the model.
//!
//! # What is kept
//!
//! Keys are 128-bit hashes of the text up to a boundary, keyed at random for this process, and values are the tokens
//! since the boundary before: a conversation of n tokens costs n tokens, not n per turn. A prefix is reused as far as
//! all its parts are there. Boundaries that come too close together are skipped, always the same ones, since that
//! depends on the text before them alone. Finding boundaries and hashing are linear in the whole text, at a small part
//! of the cost of tokenizing it.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use aho_corasick::{AhoCorasick, MatchKind};
use quick_cache::sync::Cache;
use quick_cache::{OptionsBuilder, Weighter};
use tokenizers::{AddedToken, Tokenizer};
use xxhash_rust::xxh3::Xxh3Builder;

/// One reuse in so many is compared with the tokens of the whole text.
const AUDIT_EVERY: u64 = 1_000;
/// Bytes of tokens that are kept for one model: some 4 million tokens.
const CAPACITY: u64 = 32 << 20;
/// Parts of the cache with a lock each. A part takes no entry that is larger than it, and a first message may be long.
const SHARDS: usize = 4;
/// What an entry costs besides its tokens.
const ENTRY_OVERHEAD: u64 = 128;
/// Bytes of text between two entries, so that a short message does not cost more to keep than to tokenize again.
const MIN_PART: usize = 256;
/// Bytes of the secret of XXH3.
const SECRET: usize = 192;

type Key = u128;

#[derive(Clone)]
struct ByBytes;

impl Weighter<Key, Arc<[u32]>> for ByBytes {
    fn weight(&self, _: &Key, tokens: &Arc<[u32]>) -> u64 {
        ENTRY_OVERHEAD + 4 * tokens.len() as u64
    }
}

type Parts = Cache<Key, Arc<[u32]>, ByBytes, RandomState>;

fn parts(capacity: u64) -> Parts {
    let items = usize::try_from(capacity / 1024).unwrap_or(usize::MAX);
    let mut options = OptionsBuilder::new();
    options.estimated_items_capacity(items).weight_capacity(capacity).shards(SHARDS);
    match options.build() {
        Ok(options) => Cache::with_options(options, ByBytes, RandomState::new(), Default::default()),
        Err(_) => Cache::with(items, capacity, ByBytes, RandomState::new(), Default::default()),
    }
}

/// What the cache did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConversationStatus {
    /// Whether this tokenizer and its special tokens can be cut at all.
    pub is_possible: bool,
    /// An audit found a difference: nothing is reused any more.
    pub is_disabled: bool,
    /// Prompts of which a part was known.
    pub hits: u64,
    /// Prompts with boundaries of which no part was known.
    pub misses: u64,
    /// Tokens that were taken from the cache.
    pub reused_tokens: u64,
    /// Reuses that were compared with the tokens of the whole text.
    pub audits: u64,
    /// Bytes that are kept.
    pub bytes: u64,
}

/// Tokenizes texts and keeps their parts.
pub(super) struct Conversations {
    boundaries: Boundaries,
    parts: Parts,
    secret: [u8; SECRET],
    is_disabled: AtomicBool,
    hits: AtomicU64,
    misses: AtomicU64,
    reused_tokens: AtomicU64,
    audits: AtomicU64,
}

/// The tokens of a text without those of the post-processor.
pub(super) struct Tokenized {
    pub(super) ids: Vec<u32>,
    /// How many of them were known.
    pub(super) reused: usize,
}

impl Conversations {
    /// None where the tokenizer cannot be cut.
    pub(super) fn new(tokenizer: &Tokenizer) -> Option<Self> {
        let boundaries = Boundaries::of(tokenizer)?;
        boundaries.hold(tokenizer).then(|| Self {
            boundaries,
            parts: parts(CAPACITY),
            secret: secret(),
            is_disabled: AtomicBool::new(false),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
            reused_tokens: AtomicU64::new(0),
            audits: AtomicU64::new(0),
        })
    }

    pub(super) fn status(&self) -> ConversationStatus {
        ConversationStatus {
            is_possible: true,
            is_disabled: self.is_disabled(),
            hits: self.hits.load(Relaxed),
            misses: self.misses.load(Relaxed),
            reused_tokens: self.reused_tokens.load(Relaxed),
            audits: self.audits.load(Relaxed),
            bytes: self.parts.weight(),
        }
    }

    /// Whether an audit found a difference.
    pub(super) fn is_disabled(&self) -> bool {
        self.is_disabled.load(Relaxed)
    }

    /// The tokens of `text`.
    pub(super) fn tokenize(&self, tokenizer: &Tokenizer, text: &str) -> tokenizers::Result<Tokenized> {
        if self.is_disabled() {
            return Ok(Tokenized { ids: whole(tokenizer, text)?, reused: 0 });
        }
        let cuts = self.boundaries.cuts(text, &self.secret);
        let (n_known, mut ids) = self.known(&cuts);
        let Some(last) = n_known.checked_sub(1) else {
            let ids = whole(tokenizer, text)?;
            self.keep(&cuts, 0, &ids);
            self.misses.fetch_add(u64::from(!cuts.parts.is_empty()), Relaxed);
            return Ok(Tokenized { ids, reused: 0 });
        };
        let boundary = cuts.parts[last].boundary;
        let rest = whole(tokenizer, &text[boundary.start..])?;
        let reused = ids.len();
        ids.extend_from_slice(rest.get(1..).unwrap_or_default());
        let hit = self.hits.fetch_add(1, Relaxed);
        if rest.first() != Some(&boundary.id) || hit.is_multiple_of(AUDIT_EVERY) {
            let expected = whole(tokenizer, text)?;
            if !self.audit(&ids, &expected, reused) {
                return Ok(Tokenized { ids: expected, reused: 0 });
            }
        }
        self.keep(&cuts, n_known, &ids[reused..]);
        self.reused_tokens.fetch_add(reused as u64, Relaxed);
        Ok(Tokenized { ids, reused })
    }

    /// How many of the first parts are known, and their tokens.
    fn known(&self, cuts: &Cuts) -> (usize, Vec<u32>) {
        let mut ids = Vec::new();
        let mut n_known = 0;
        for part in &cuts.parts {
            let Some(tokens) = self.parts.get(&part.key) else { break };
            ids.extend_from_slice(&tokens);
            n_known += 1;
        }
        (n_known, ids)
    }

    /// Whether the tokens are those of the whole text; if not, nothing is reused from now on.
    fn audit(&self, ids: &[u32], expected: &[u32], reused: usize) -> bool {
        self.audits.fetch_add(1, Relaxed);
        if ids == expected {
            return true;
        }
        self.is_disabled.store(true, Relaxed);
        self.parts.clear();
        tracing::error!(
            tokens = expected.len(),
            reused,
            "a conversation's reused tokens are not those of the whole text, nothing is reused for this model any more"
        );
        false
    }

    /// Keeps the tokens of the parts from `n_known` on. Where each part ends is told by the tokens of the boundaries:
    /// all of them have to be there, in the order of the text, and no others. Where they are not, nothing is kept.
    fn keep(&self, cuts: &Cuts, n_known: usize, ids: &[u32]) {
        let parts = &cuts.parts[n_known..];
        let places: Vec<usize> = (0..ids.len()).filter(|at| self.boundaries.has_id(ids[*at])).collect();
        let n_boundaries = parts.iter().map(|part| part.n_boundaries).sum::<usize>() + cuts.n_after;
        if places.len() != n_boundaries {
            return;
        }
        let mut n_seen = 0;
        let ends: Vec<usize> = parts
            .iter()
            .map(|part| {
                n_seen += part.n_boundaries;
                places[n_seen - 1]
            })
            .collect();
        if parts.iter().zip(&ends).any(|(part, end)| ids[*end] != part.boundary.id) {
            return;
        }
        let mut from = 0;
        for (part, end) in parts.iter().zip(ends) {
            self.parts.insert(part.key, ids[from..=end].into());
            from = end + 1;
        }
    }
}

#[cfg(test)]
impl Conversations {
    /// Makes every kept part wrong.
    pub(super) fn spoil(&self) {
        let keys: Vec<Key> = self.parts.iter().map(|(key, _)| key).collect();
        for key in keys {
            self.parts.insert(key, [0].into());
        }
    }

    pub(super) fn set_capacity(&mut self, bytes: u64) {
        self.parts = parts(bytes);
    }
}

/// The texts of the tokens at which a text may be cut.
#[cfg(test)]
pub(super) fn boundary_texts(tokenizer: &Tokenizer) -> Vec<String> {
    Boundaries::of(tokenizer).map(|boundaries| boundaries.texts).unwrap_or_default()
}

/// All of a text's tokens, without those of the post-processor.
pub(super) fn whole(tokenizer: &Tokenizer, text: &str) -> tokenizers::Result<Vec<u32>> {
    Ok(tokenizer.encode_fast(text, false)?.get_ids().to_vec())
}

/// Random bytes from the keys that the standard library draws from the operating system.
fn secret() -> [u8; SECRET] {
    let mut secret = [0; SECRET];
    for chunk in secret.chunks_mut(8) {
        chunk.copy_from_slice(&RandomState::new().hash_one(chunk.len()).to_le_bytes()[..chunk.len()]);
    }
    secret
}

/// Where a text is cut.
struct Cuts {
    parts: Vec<Part>,
    /// Boundaries after the last part.
    n_after: usize,
}

/// A part of a text, up to a boundary.
struct Part {
    /// Of all the text up to the part's end.
    key: Key,
    /// The boundary that ends the part.
    boundary: Boundary,
    /// How many boundaries there are in the part, with that one.
    n_boundaries: usize,
}

/// A special token in a text.
#[derive(Clone, Copy)]
struct Boundary {
    start: usize,
    id: u32,
}

/// Finds the special tokens at which a text may be cut.
struct Boundaries {
    /// All added tokens that are not normalized, as the library scans for them.
    scan: AhoCorasick,
    /// For each of them, its id, where a text may be cut after it.
    ids: Vec<Option<u32>>,
    /// The same ids, sorted.
    sorted: Vec<u32>,
    /// The same tokens' texts, for the self-check.
    texts: Vec<String>,
}

impl Boundaries {
    /// None where no token is a boundary.
    fn of(tokenizer: &Tokenizer) -> Option<Self> {
        if tokenizer.get_encode_special_tokens() {
            return None;
        }
        let mut added: Vec<(u32, AddedToken)> = tokenizer.get_added_tokens_decoder().into_iter().collect();
        added.retain(|(_, token)| !token.normalized);
        added.sort_by_key(|(id, _)| *id);
        let unknown = whole(tokenizer, UNKNOWN).ok()?;
        let goes_on = going_on(&added)?;
        let is_boundary = |id: u32, token: &AddedToken| keeps_to_itself(token) && !unknown.contains(&id);
        let candidates = added.iter().zip(goes_on);
        let ids: Vec<Option<u32>> =
            candidates.map(|((id, token), goes_on)| (!goes_on && is_boundary(*id, token)).then_some(*id)).collect();
        let mut sorted: Vec<u32> = ids.iter().flatten().copied().collect();
        sorted.sort_unstable();
        let texts: Vec<String> = added
            .iter()
            .zip(&ids)
            .filter(|(_, id)| id.is_some())
            .map(|((_, token), _)| token.content.clone())
            .collect();
        let contents = added.iter().map(|(_, token)| token.content.as_bytes());
        let scan = AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(contents).ok()?;
        (!sorted.is_empty()).then_some(Self { scan, ids, sorted, texts })
    }

    fn has_id(&self, id: u32) -> bool {
        self.sorted.binary_search(&id).is_ok()
    }

    /// Where `text` is cut.
    fn cuts(&self, text: &str, secret: &[u8; SECRET]) -> Cuts {
        let mut hasher = Xxh3Builder::new().with_secret(*secret).build();
        let mut parts = Vec::new();
        let (mut hashed, mut n_boundaries) = (0, 0);
        for found in self.scan.find_iter(text) {
            let Some(id) = self.ids[found.pattern().as_usize()] else { continue };
            n_boundaries += 1;
            if found.end() - hashed < MIN_PART {
                continue;
            }
            hasher.update(&text.as_bytes()[hashed..found.end()]);
            hashed = found.end();
            parts.push(Part { key: hasher.digest128(), boundary: Boundary { start: found.start(), id }, n_boundaries });
            n_boundaries = 0;
        }
        Cuts { parts, n_after: n_boundaries }
    }

    /// Whether the tokens of samples are those of their parts.
    fn hold(&self, tokenizer: &Tokenizer) -> bool {
        let mut samples = SAMPLES.iter().cycle();
        let mut next = || *samples.next().unwrap_or(&"");
        self.texts.iter().take(MAX_CHECKED).all(|boundary| {
            (0..SAMPLES.len()).all(|_| {
                let (before, after) = (format!("{}{boundary}{}", next(), next()), next());
                holds(tokenizer, &before, boundary, after).unwrap_or(false)
            })
        })
    }
}

/// Characters that no vocabulary has: a private one, an unassigned one and the last one.
const UNKNOWN: &str = "\u{e000} \u{378} \u{10fffd}";

/// Special tokens that are tried when a tokenizer is loaded. Models with more have them as placeholders.
const MAX_CHECKED: usize = 64;

/// What stands around boundaries in the self-check. Their number is no multiple of three, so that
/// those three that are taken at a time are always others.
const SAMPLES: [&str; 11] = [
    "",
    "user\nHello, world! It's 12345 o'clock.",
    " leading and trailing ",
    "\n\n",
    "\t tab",
    "日本語のテキスト。你好吗？",
    "naïve café – “quotes” 🙂👩‍👩‍👧",
    "▁word▁ Ġword",
    "x",
    "  two  spaces  ",
    "{\"a\": [1, 2.5, null]}\r\n",
];

/// Whether a text's tokens are those up to a boundary and those from it on.
fn holds(tokenizer: &Tokenizer, before: &str, boundary: &str, after: &str) -> tokenizers::Result<bool> {
    let id = tokenizer.token_to_id(boundary);
    let mut joined = whole(tokenizer, &format!("{before}{boundary}"))?;
    let rest = whole(tokenizer, &format!("{boundary}{after}"))?;
    let is_cut = joined.last().copied() == id && rest.first().copied() == id;
    joined.extend_from_slice(rest.get(1..).unwrap_or_default());
    Ok(is_cut && joined == whole(tokenizer, &format!("{before}{boundary}{after}"))?)
}

fn keeps_to_itself(token: &AddedToken) -> bool {
    let has_outer_space = token.content.trim().len() != token.content.len();
    token.special
        && !token.lstrip
        && !token.rstrip
        && !token.single_word
        && !has_outer_space
        && !token.content.is_empty()
}

/// For each token, whether another one has it in it and goes on after it. One pass over all of them, since some models
/// have thousands.
fn going_on(added: &[(u32, AddedToken)]) -> Option<Vec<bool>> {
    let contents = added.iter().map(|(_, token)| token.content.as_bytes());
    let scan = AhoCorasick::builder().match_kind(MatchKind::Standard).build(contents).ok()?;
    let mut goes_on = vec![false; added.len()];
    for (_, other) in added {
        for found in scan.find_overlapping_iter(&other.content) {
            if found.end() < other.content.len() {
                goes_on[found.pattern().as_usize()] = true;
            }
        }
    }
    Some(goes_on)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_a_million_tokens_is_kept() {
        let parts = parts(CAPACITY);
        parts.insert(1, vec![0; 1_500_000].into());
        assert!(parts.get(&1).is_some() && parts.num_shards() <= SHARDS, "{}", parts.num_shards());
    }

    #[test]
    fn a_token_goes_on_where_another_one_has_it_before_its_end() {
        let added: Vec<(u32, AddedToken)> =
            (0..).zip(["<a>", "<a><b>", "<b>", "b", "<a"].map(|text| AddedToken::from(text, true))).collect();
        assert_eq!(going_on(&added), Some(vec![true, false, false, true, true]));
    }

    #[test]
    fn three_samples_in_a_row_are_always_others() {
        assert!(!SAMPLES.len().is_multiple_of(3));
    }
}
