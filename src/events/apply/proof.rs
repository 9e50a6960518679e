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
//! - `MM`: the form of a multimodal item. A chain in which some block has one, with or without the others.
//!
//! A request needs `PLAIN`, or its adapter's bit instead, `SALT` if it is salted, and `MM` if it has multimodal items. Blocks
//! from the first one with a prompt embedding on, and chains of adapters that are not configured, are no evidence. Nor are
//! blocks with one item twice where the hash depends on whether the engine has its name once or twice (`routing::hash`).
//!
//! A mismatch disproves what the chain would have proved, for the rest of the generation; if the blocks before the first
//! multimodal item match, that is `MM` alone. Exception: publishers before vLLM 0.17 do not show extra keys, so a mismatch may
//! only mean a salt that we cannot see.

use std::fmt;
use std::sync::Arc;

use crate::events::wire::{BlockKeys, BlockStored, EngineHash, ExtraItem};
use crate::routing::hash::{BlockHasher, BlockSize, Digest, HashAlgorithm, Key};
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

/// Something new that a chain showed.
#[derive(Debug, PartialEq)]
pub(super) enum Finding {
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
    ItemKeys,
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
            Self::ItemKeys => f.write_str("the engine hashes multimodal items in a way that is not known"),
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
    ) -> Vec<Finding> {
        let Some(chain) = Chain::of(stored, settings).filter(|_| is_whole(stored)) else { return Vec::new() };
        let Some(n_blocks) = self.usable(&chain).filter(|n_blocks| self.is_wanted(chain.shows(*n_blocks))) else {
            return Vec::new();
        };
        let n_equal = chain.n_equal(n_blocks, hasher, Form::Tagged);
        if n_equal == n_blocks {
            return self.prove(chain.shows(n_blocks)).into_iter().collect();
        }
        let n_text = chain.n_text();
        if n_equal < n_text {
            return self.mismatch(&chain, n_text, chain.kinds(n_text), hasher).into_iter().collect();
        }
        // What comes before the first item is as it should be.
        let proved = if n_text > 0 { self.prove(chain.shows(n_text)) } else { None };
        let at_fault = if n_text > 0 { KeyKinds::MM } else { chain.kinds(n_blocks) };
        let disproved = self.mismatch(&chain, n_blocks, at_fault, hasher);
        proved.into_iter().chain(disproved).collect()
    }

    /// The part of a chain of which nothing is disproved yet; none: there is none.
    fn usable(&self, chain: &Chain<'_>) -> Option<usize> {
        let is_open = |n_blocks: usize| !self.disproved.intersects(chain.kinds(n_blocks));
        let (n_text, n_blocks) = (chain.n_text(), chain.blocks.len());
        match n_text {
            0 => is_open(n_blocks).then_some(n_blocks),
            _ if !is_open(n_text) => None,
            _ => Some(if is_open(n_blocks) { n_blocks } else { n_text }),
        }
    }

    fn is_wanted(&mut self, shows: KeyKinds) -> bool {
        if !self.proved.contains(shows.without(self.disproved)) && self.n_unexplained < MANY_UNEXPLAINED {
            return true;
        }
        self.n_passed += 1;
        self.n_passed.is_multiple_of(SAMPLE_EVERY)
    }

    fn prove(&mut self, kinds: KeyKinds) -> Option<Finding> {
        let new = kinds.without(self.proved).without(self.disproved);
        self.proved = self.proved | new;
        (!new.is_empty()).then_some(Finding::Proved(new))
    }

    /// The first `n_blocks` of a chain are not as they should be, and these kinds may be why.
    fn mismatch(
        &mut self,
        chain: &Chain<'_>,
        n_blocks: usize,
        kinds: KeyKinds,
        hasher: &BlockHasher,
    ) -> Option<Finding> {
        if chain.stored.extra_keys.is_none() {
            return self.leave_unexplained(kinds);
        }
        // Of several kinds in one chain, the one that was proved by others is not at fault.
        let doubtful = kinds.without(self.proved);
        let kinds = if doubtful.is_empty() { kinds } else { doubtful };
        Some(self.disprove(kinds, chain.suspect(n_blocks, kinds, hasher)))
    }

    fn disprove(&mut self, kinds: KeyKinds, suspect: Suspect) -> Finding {
        self.disproved = self.disproved | kinds;
        self.proved = self.proved.without(kinds);
        Finding::Disproved(kinds, suspect)
    }

    fn leave_unexplained(&mut self, kinds: KeyKinds) -> Option<Finding> {
        self.n_unexplained += 1;
        let is_hopeless = self.n_unexplained == MANY_UNEXPLAINED && !self.proved.contains(kinds);
        is_hopeless.then(|| self.disprove(kinds, Suspect::HiddenKeys))
    }
}

/// Whether an event begins a prompt and tells the tokens of all its blocks.
fn is_whole(stored: &BlockStored<'_>) -> bool {
    let n_tokens = stored.block_hashes.len().checked_mul(stored.block_size as usize);
    stored.parent.is_none() && stored.block_size > 0 && n_tokens == Some(stored.token_ids.len())
}

/// How an engine writes extra keys when it hashes them.
#[derive(Clone, Copy)]
enum Form {
    /// As tagged tuples: vLLM 0.31 and later.
    Tagged,
    /// As they are shown: vLLM 0.12 to 0.30.
    Untagged,
}

/// The blocks of a prompt, from the first one on, as far as there is nothing in them that no request of ours has.
#[derive(Debug)]
pub(super) struct Chain<'a> {
    stored: &'a BlockStored<'a>,
    settings: &'a ModelSettings,
    /// Name and path, and the kind that stands for it.
    adapter: Option<(&'a (Arc<str>, Arc<str>), KeyKinds)>,
    /// At least one.
    blocks: Vec<ShownKeys<'a>>,
}

impl<'a> Chain<'a> {
    /// None: there is something in the first block that we cannot compute.
    pub(super) fn of(stored: &'a BlockStored<'a>, settings: &'a ModelSettings) -> Option<Self> {
        let adapter = match stored.lora_name {
            Some(name) => {
                let adapter_idx = adapter_idx(name, settings)?;
                Some((&settings.adapters[adapter_idx], KeyKinds::adapter(adapter_idx)?))
            }
            None => None,
        };
        let blocks = match stored.extra_keys {
            Some(extra_keys) => {
                let shown = extra_keys.iter().take(stored.block_hashes.len()).enumerate();
                let known = |(block_idx, keys): (usize, BlockKeys<'a>)| {
                    let keys = ShownKeys::of(keys, stored.lora_name)?;
                    keys.may_be_ours(block_idx, settings.algorithm).then_some(keys)
                };
                shown.map_while(known).collect()
            }
            None => vec![ShownKeys::default(); stored.block_hashes.len()],
        };
        (!blocks.is_empty()).then_some(Self { stored, settings, adapter, blocks })
    }

    /// The kinds that a request for the chain needs.
    pub(super) fn required(&self) -> KeyKinds {
        self.kinds(self.blocks.len()) | if self.adapter.is_some() { KeyKinds::NONE } else { KeyKinds::PLAIN }
    }

    /// The kinds that are at fault if the hashes of the first `n_blocks` differ.
    fn kinds(&self, n_blocks: usize) -> KeyKinds {
        let blocks = &self.blocks[..n_blocks];
        let has_salt = blocks.iter().any(|keys| keys.salt.is_some());
        let has_mm = blocks.iter().any(|keys| !keys.mm.is_empty());
        let adapter = self.adapter.map(|(_, kind)| kind).unwrap_or_default();
        let salt = if has_salt { KeyKinds::SALT } else { KeyKinds::NONE };
        let kinds = adapter | salt | if has_mm { KeyKinds::MM } else { KeyKinds::NONE };
        if kinds.is_empty() { KeyKinds::PLAIN } else { kinds }
    }

    /// What is proved if the hashes of the first `n_blocks` match.
    fn shows(&self, n_blocks: usize) -> KeyKinds {
        let has_bare_block = self.adapter.is_none() && self.blocks[..n_blocks].iter().any(ShownKeys::is_empty);
        self.kinds(n_blocks) | if has_bare_block { KeyKinds::PLAIN } else { KeyKinds::NONE }
    }

    /// Number of blocks before the first one with a multimodal item.
    fn n_text(&self) -> usize {
        self.blocks.iter().take_while(|keys| keys.mm.is_empty()).count()
    }

    /// How many of the first `n_blocks` have the hashes that we compute, up to the first that has not.
    fn n_equal(&self, n_blocks: usize, hasher: &BlockHasher, form: Form) -> usize {
        let stored = self.stored;
        let Some(block_size) = BlockSize::new(stored.block_size) else { return 0 };
        let mut tokens = stored.token_ids.to_vec();
        tokens.truncate(n_blocks * block_size.get() as usize);
        let digests = hasher.chain(hasher.root(), &tokens, block_size, |block_idx| self.keys(block_idx, form));
        let is_equal = |(ours, theirs): &(&Digest, &EngineHash<'_>)| is_same(ours, theirs);
        digests.iter().zip(&stored.block_hashes).take_while(is_equal).count()
    }

    fn keys(&self, block_idx: usize, form: Form) -> Vec<Key> {
        let ShownKeys { mm, salt } = &self.blocks[block_idx];
        let adapter = self.adapter.map(|((name, path), _)| match form {
            Form::Tagged => Key::lora(name, path),
            Form::Untagged => Key::Str(name.clone()),
        });
        let mm = mm.iter().map(|(identifier, offset)| match form {
            Form::Tagged => Key::mm(identifier, *offset),
            Form::Untagged => Key::Tuple(vec![Key::Str((*identifier).into()), Key::Int(*offset)]),
        });
        let salt = salt.map(|salt| match form {
            Form::Tagged => Key::cache_salt(&salt.into()),
            Form::Untagged => Key::Str(salt.into()),
        });
        adapter.into_iter().chain(mm).chain(salt).collect()
    }

    /// Finds by trial what would have given the engine's hashes of the first `n_blocks`.
    fn suspect(&self, n_blocks: usize, at_fault: KeyKinds, hasher: &BlockHasher) -> Suspect {
        // With a part that matches, algorithm and seed are right.
        let is_anchored = n_blocks > self.n_text() && self.n_text() > 0;
        let tried = if is_anchored { None } else { self.other_settings() };
        if let Some(suspect) = tried {
            return suspect;
        }
        let has_keys = at_fault != KeyKinds::PLAIN;
        if has_keys && self.n_equal(n_blocks, hasher, Form::Untagged) == n_blocks {
            Suspect::UntaggedKeys
        } else if at_fault.contains(KeyKinds::MM) {
            Suspect::ItemKeys
        } else if self.adapter.is_some() {
            Suspect::AdapterPath
        } else {
            Suspect::Unknown
        }
    }

    /// The settings under which block 0 has the engine's hash.
    fn other_settings(&self) -> Option<Suspect> {
        let settings = self.settings;
        let tried = |algorithm, seed| {
            BlockHasher::new(algorithm, seed).is_ok_and(|hasher| self.n_equal(1, &hasher, Form::Tagged) == 1)
        };
        let configured = settings.pythonhashseed.as_deref();
        let other_algorithm = HashAlgorithm::ALL.into_iter().find(|algorithm| tried(*algorithm, configured));
        if let Some(algorithm) = other_algorithm {
            let is_configured = algorithm == settings.algorithm;
            return Some(if is_configured { Suspect::Unknown } else { Suspect::Algorithm(algorithm) });
        }
        if let Some(seed) = USUAL_SEEDS.into_iter().find(|seed| tried(settings.algorithm, *seed)) {
            return Some(Suspect::Seed(seed));
        }
        HashAlgorithm::ALL.into_iter().find_map(|algorithm| {
            let seed = USUAL_SEEDS.into_iter().find(|seed| tried(algorithm, *seed))?;
            Some(Suspect::AlgorithmAndSeed(algorithm, seed))
        })
    }
}

/// The kinds that the blocks of an event that continues a chain can be of, as far as they tell: a salt is in the first block
/// alone. None: an adapter whose hashes we cannot compute.
pub(super) fn continued_kinds(stored: &BlockStored<'_>, settings: &ModelSettings) -> Option<KeyKinds> {
    let is_item = |item: ExtraItem<'_>| matches!(item, ExtraItem::Mm(..));
    let has_mm = stored.extra_keys.is_some_and(|keys| keys.iter().any(|keys| keys.iter().any(is_item)));
    let mm = if has_mm { KeyKinds::MM } else { KeyKinds::NONE };
    match stored.lora_name {
        Some(name) => Some(KeyKinds::adapter(adapter_idx(name, settings)?)? | mm),
        None => Some(KeyKinds::PLAIN | mm),
    }
}

/// Position of an adapter whose path is known: without it, no hash can be computed.
fn adapter_idx(name: &str, settings: &ModelSettings) -> Option<usize> {
    settings.adapters.iter().position(|(configured, path)| &**configured == name && !path.is_empty())
}

/// The extra keys of a block besides the adapter, where they are of kinds that requests of ours have.
#[derive(Clone, Debug, Default)]
struct ShownKeys<'a> {
    mm: Vec<(&'a str, i64)>,
    salt: Option<&'a str>,
}

impl<'a> ShownKeys<'a> {
    /// None: there is an item that we cannot compute.
    fn of(keys: BlockKeys<'a>, lora_name: Option<&str>) -> Option<Self> {
        let mut items = keys.iter().peekable();
        if let Some(name) = lora_name
            && items.next() != Some(ExtraItem::Str(name))
        {
            return None;
        }
        let mut mm = Vec::new();
        while let Some(&ExtraItem::Mm(identifier, offset)) = items.peek() {
            mm.push((identifier, offset));
            items.next();
        }
        match (items.next(), items.next()) {
            (None, _) => Some(Self { mm, salt: None }),
            (Some(ExtraItem::Str(salt)), None) => Some(Self { mm, salt: Some(salt) }),
            _ => None,
        }
    }

    fn is_empty(&self) -> bool {
        self.mm.is_empty() && self.salt.is_none()
    }

    /// Whether a request of ours would have the same keys under the same hash.
    fn may_be_ours(&self, block_idx: usize, algorithm: HashAlgorithm) -> bool {
        let is_salt_in_place = block_idx == 0 || self.salt.is_none();
        let is_pickled = matches!(algorithm, HashAlgorithm::Sha256 | HashAlgorithm::Xxhash);
        let is_twin = |item_idx: usize| self.mm[..item_idx].iter().any(|(name, _)| *name == self.mm[item_idx].0);
        is_salt_in_place && !(is_pickled && (1..self.mm.len()).any(is_twin))
    }
}

fn is_same(ours: &Digest, theirs: &EngineHash<'_>) -> bool {
    match theirs {
        EngineHash::Int(low64) => ours.low64().0 == *low64,
        EngineHash::Bytes(bytes) => ours.as_bytes() == *bytes,
    }
}
