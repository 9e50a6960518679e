//! Proves that a source's block hashes are those that the configuration makes us compute.
//!
//! Evidence is a live `BlockStored` that begins a prompt (no parent): its token ids and extra keys are hashed again from
//! the root. What a match proves is said per [kind of extra key](KeyKinds):
//!
//! - `PLAIN`: blocks hashed without extra keys behind the root. A chain without extra keys shows it, and so does the second
//!   block of a chain that is only salted, since a salt is in block 0 alone.
//! - `SALT`: the form of the salt. A chain whose block 0 has a salt, with or without an adapter.
//! - an adapter's bit: the form, the name and the path of this adapter. A chain in which each block has it, with or
//!   without a salt: vLLM writes each extra key by itself, so the form of one does not depend on its neighbour.
//!
//! A request needs `PLAIN`, or its adapter's bit instead, and `SALT` if it is salted. Blocks from the first one with a
//! multimodal item or a prompt embedding on, and chains of adapters that are not configured, are no evidence.
//!
//! A mismatch disproves what the chain would have proved, for the rest of the generation. Exception: publishers
//! before vLLM 0.17 do not show extra keys, so a mismatch may only mean a salt that we cannot see.

use std::fmt;

use crate::events::wire::{BlockKeys, BlockStored, EngineHash, ExtraItem};
use crate::routing::hash::{BlockHasher, BlockSize, Digest, HashAlgorithm, Key, Scope};
use crate::routing::index::KeyKinds;

use super::ModelSettings;

/// Once the question is settled, one chain in so many is still checked.
const SAMPLE_EVERY: u64 = 1000;
/// Seeds that are tried to find out what an engine was started with.
const USUAL_SEEDS: [Option<&str>; 6] = [None, Some("0"), Some("1"), Some("42"), Some("random"), Some("")];
/// Mismatches without extra keys to explain them after which only samples are checked, and the operator is told.
const MANY_UNEXPLAINED: u64 = 16;

/// What is known of a generation's hashes.
#[derive(Debug, Default)]
pub(super) struct Proof {
    pub(super) proved: KeyKinds,
    pub(super) disproved: KeyKinds,
    /// Chains seen that could have been checked but need not.
    pub(super) n_passed: u64,
    pub(super) n_unexplained: u64,
}

/// What a chain showed.
#[derive(Debug, PartialEq)]
pub(super) enum Finding {
    /// Nothing, or nothing new.
    Nothing,
    /// These kinds are proved now.
    Proved(KeyKinds),
    /// These kinds are disproved now, and this may be why.
    Disproved(KeyKinds, Suspect),
}

/// Why hashes may differ from ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Suspect {
    Algorithm(HashAlgorithm),
    Seed(Option<&'static str>),
    AlgorithmAndSeed(HashAlgorithm, Option<&'static str>),
    UntaggedKeys,
    AdapterPath,
    HiddenKeys,
    Unknown,
}

impl fmt::Display for Suspect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Algorithm(algorithm) => write!(f, "block_hash.algorithm looks like {algorithm}"),
            Self::Seed(seed) => write!(f, "block_hash.pythonhashseed looks like {}", shown(*seed)),
            Self::AlgorithmAndSeed(algorithm, seed) => {
                write!(f, "block_hash looks like algorithm {algorithm} and pythonhashseed {}", shown(*seed))
            }
            Self::UntaggedKeys => f.write_str("the engine hashes extra keys untagged, as vLLM before 0.31 does"),
            Self::AdapterPath => f.write_str("adapters[].path is probably not the path that the engine loaded"),
            Self::HiddenKeys => {
                f.write_str("block_hash is wrong, or all prompts are salted and this vLLM does not show it")
            }
            Self::Unknown => f.write_str("block_hash.pythonhashseed is probably not what the engine was started with"),
        }
    }
}

fn shown(seed: Option<&str>) -> String {
    seed.map_or_else(|| "null".to_owned(), |seed| format!("{seed:?}"))
}

impl Proof {
    /// Looks at a chain and updates what is known.
    pub(super) fn examine(
        &mut self,
        stored: &BlockStored<'_>,
        hasher: &BlockHasher,
        settings: &ModelSettings,
    ) -> Finding {
        let Some(evidence) = Evidence::of(stored, settings).filter(|evidence| self.is_wanted(evidence)) else {
            return Finding::Nothing;
        };
        if evidence.matches(stored, hasher) {
            return self.prove(evidence.shows());
        }
        if stored.extra_keys.is_none() {
            return self.leave_unexplained(evidence.kinds);
        }
        // Of several kinds in one chain, the one that was proved by others is not at fault.
        let doubtful = evidence.kinds.without(self.proved);
        let kinds = if doubtful.is_empty() { evidence.kinds } else { doubtful };
        self.disprove(kinds, evidence.suspect(stored, hasher, settings))
    }

    fn is_wanted(&mut self, evidence: &Evidence) -> bool {
        if self.disproved.intersects(evidence.kinds) {
            return false;
        }
        if !self.proved.contains(evidence.kinds) && self.n_unexplained < MANY_UNEXPLAINED {
            return true;
        }
        self.n_passed += 1;
        self.n_passed.is_multiple_of(SAMPLE_EVERY)
    }

    fn prove(&mut self, kinds: KeyKinds) -> Finding {
        let new = kinds.without(self.proved).without(self.disproved);
        self.proved = self.proved | new;
        if new.is_empty() { Finding::Nothing } else { Finding::Proved(new) }
    }

    fn disprove(&mut self, kinds: KeyKinds, suspect: Suspect) -> Finding {
        self.disproved = self.disproved | kinds;
        self.proved = self.proved.without(kinds);
        Finding::Disproved(kinds, suspect)
    }

    fn leave_unexplained(&mut self, kinds: KeyKinds) -> Finding {
        self.n_unexplained += 1;
        let is_hopeless = self.n_unexplained == MANY_UNEXPLAINED && !self.proved.contains(kinds);
        if is_hopeless { self.disprove(kinds, Suspect::HiddenKeys) } else { Finding::Nothing }
    }
}

/// What is in the first block of a chain, where it is nothing that no request of ours has.
#[derive(Debug)]
pub(super) struct FirstBlock<'a> {
    adapter_idx: Option<usize>,
    salt: Option<&'a str>,
}

impl<'a> FirstBlock<'a> {
    /// None: there is something in it that we cannot compute.
    pub(super) fn of(stored: &BlockStored<'a>, settings: &ModelSettings) -> Option<Self> {
        let adapter_idx = match stored.lora_name {
            Some(name) => Some(adapter_idx(name, settings)?),
            None => None,
        };
        let salt = match stored.extra_keys.and_then(|keys| keys.iter().next()) {
            Some(items) => salt_of(items, stored.lora_name)?,
            None => None,
        };
        Some(Self { adapter_idx, salt })
    }

    /// The kinds that a request for the chain needs.
    pub(super) fn kinds(&self) -> KeyKinds {
        self.adapter().unwrap_or(KeyKinds::PLAIN) | self.salt_kind()
    }

    fn adapter(&self) -> Option<KeyKinds> {
        self.adapter_idx.and_then(KeyKinds::adapter)
    }

    fn salt_kind(&self) -> KeyKinds {
        if self.salt.is_some() { KeyKinds::SALT } else { KeyKinds::NONE }
    }
}

/// The kinds that the blocks of an event that continues a chain can be of, as far as they tell: a salt is in the first block
/// alone. None: an adapter whose hashes we cannot compute.
pub(super) fn continued_kinds(stored: &BlockStored<'_>, settings: &ModelSettings) -> Option<KeyKinds> {
    match stored.lora_name {
        Some(name) => KeyKinds::adapter(adapter_idx(name, settings)?),
        None => Some(KeyKinds::PLAIN),
    }
}

/// Position of an adapter whose path is known: without it, no hash can be computed.
fn adapter_idx(name: &str, settings: &ModelSettings) -> Option<usize> {
    settings.adapters.iter().position(|(configured, path)| &**configured == name && !path.is_empty())
}

/// The part of a chain, from the root on, whose extra keys we can compute.
#[derive(Debug)]
struct Evidence {
    block_size: BlockSize,
    n_blocks: usize,
    scope: Scope,
    /// The kinds that are at fault if the hashes differ.
    kinds: KeyKinds,
}

impl Evidence {
    fn of(stored: &BlockStored<'_>, settings: &ModelSettings) -> Option<Self> {
        let block_size = BlockSize::new(stored.block_size)?;
        let n_tokens = stored.block_hashes.len().checked_mul(block_size.get() as usize)?;
        if stored.parent.is_some() || stored.token_ids.len() != n_tokens {
            return None;
        }
        let first = FirstBlock::of(stored, settings)?;
        let scope = Scope {
            adapter: first.adapter_idx.map(|adapter_idx| settings.adapters[adapter_idx].clone()),
            cache_salt: first.salt.map(Into::into),
        };
        let n_blocks = 1 + stored.block_hashes.len().checked_sub(1)?.min(n_like_the_scope(stored));
        let kinds = first.adapter().unwrap_or_default() | first.salt_kind();
        Some(Self { block_size, n_blocks, scope, kinds: if kinds.is_empty() { KeyKinds::PLAIN } else { kinds } })
    }

    /// What a match proves.
    fn shows(&self) -> KeyKinds {
        if self.kinds == KeyKinds::SALT && self.n_blocks > 1 { self.kinds | KeyKinds::PLAIN } else { self.kinds }
    }

    fn tokens(&self, stored: &BlockStored<'_>, n_blocks: usize) -> Vec<u32> {
        let mut tokens = stored.token_ids.to_vec();
        tokens.truncate(n_blocks * self.block_size.get() as usize);
        tokens
    }

    fn matches(&self, stored: &BlockStored<'_>, hasher: &BlockHasher) -> bool {
        let tokens = self.tokens(stored, self.n_blocks);
        let digests = hasher.chain(hasher.root(), &tokens, self.block_size, |block_idx| self.scope.keys(block_idx));
        digests.len() == self.n_blocks
            && digests.iter().zip(&stored.block_hashes).all(|(ours, theirs)| is_same(ours, theirs))
    }

    /// Finds by trial on block 0 what would have given the engine's hash.
    fn suspect(&self, stored: &BlockStored<'_>, hasher: &BlockHasher, settings: &ModelSettings) -> Suspect {
        let tokens = self.tokens(stored, 1);
        let fits = |hasher: &BlockHasher, keys: &[Key]| {
            is_same(&hasher.block(&hasher.root(), &tokens, keys), &stored.block_hashes[0])
        };
        let tagged = self.scope.keys(0);
        let tried = |algorithm, seed| BlockHasher::new(algorithm, seed).is_ok_and(|hasher| fits(&hasher, &tagged));
        let configured = settings.pythonhashseed.as_deref();
        let other_algorithm = HashAlgorithm::ALL.into_iter().find(|algorithm| tried(*algorithm, configured));
        if let Some(algorithm) = other_algorithm {
            return if algorithm == settings.algorithm { Suspect::Unknown } else { Suspect::Algorithm(algorithm) };
        }
        if let Some(seed) = USUAL_SEEDS.into_iter().find(|seed| tried(settings.algorithm, *seed)) {
            return Suspect::Seed(seed);
        }
        for algorithm in HashAlgorithm::ALL {
            if let Some(seed) = USUAL_SEEDS.into_iter().find(|seed| tried(algorithm, *seed)) {
                return Suspect::AlgorithmAndSeed(algorithm, seed);
            }
        }
        if !tagged.is_empty() && fits(hasher, &self.untagged()) {
            return Suspect::UntaggedKeys;
        }
        if self.scope.adapter.is_some() { Suspect::AdapterPath } else { Suspect::Unknown }
    }

    /// The extra keys of block 0 as vLLM 0.12 to 0.30 hashes them: name and salt alone.
    fn untagged(&self) -> Vec<Key> {
        let name = self.scope.adapter.as_ref().map(|(name, _)| name);
        name.into_iter().chain(&self.scope.cache_salt).map(|text| Key::Str(text.clone())).collect()
    }
}

/// The salt among the untagged items of block 0; outer none: there is an item that we cannot compute.
#[expect(clippy::option_option, reason = "no evidence is not the same as no salt")]
fn salt_of<'a>(keys: BlockKeys<'a>, lora_name: Option<&str>) -> Option<Option<&'a str>> {
    let mut items = keys.iter();
    if let Some(name) = lora_name
        && items.next() != Some(ExtraItem::Str(name))
    {
        return None;
    }
    match (items.next(), items.next()) {
        (None, _) => Some(None),
        (Some(ExtraItem::Str(salt)), None) => Some(Some(salt)),
        _ => None,
    }
}

/// Number of blocks after block 0, without a break, that have the adapter and nothing else.
fn n_like_the_scope(stored: &BlockStored<'_>) -> usize {
    let Some(extra_keys) = stored.extra_keys else { return usize::MAX };
    let is_like = |keys: &BlockKeys<'_>| matches!(salt_of(*keys, stored.lora_name), Some(None));
    extra_keys.iter().skip(1).take_while(is_like).count()
}

fn is_same(ours: &Digest, theirs: &EngineHash<'_>) -> bool {
    match theirs {
        EngineHash::Int(low64) => ours.low64().0 == *low64,
        EngineHash::Bytes(bytes) => ours.as_bytes() == *bytes,
    }
}
