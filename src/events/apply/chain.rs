//! What an event tells of the blocks at the beginning of a prompt, computed as an engine would hash them.

use std::sync::Arc;

use crate::events::wire::{BlockKeys, BlockStored, EngineHash, ExtraItem};
use crate::routing::hash::{BlockHasher, BlockSize, Digest, HashAlgorithm, Key};
use crate::routing::index::KeyKinds;

use super::ModelSettings;
use super::proof::Suspect;

/// Seeds that are tried to find out what an engine was started with.
const USUAL_SEEDS: [Option<&str>; 6] = [None, Some("0"), Some("1"), Some("42"), Some("random"), Some("")];

/// How an engine writes extra keys when it hashes them.
#[derive(Clone, Copy)]
pub(super) enum Form {
    /// As tagged tuples: vLLM 0.31 and later.
    Tagged,
    /// As they are shown: vLLM 0.12 to 0.30.
    Untagged,
}

/// An adapter that is configured with its path, and the kind that stands for it.
#[derive(Clone, Copy, Debug)]
struct Adapter<'a> {
    name: &'a Arc<str>,
    path: &'a Arc<str>,
    kind: KeyKinds,
}

impl<'a> Adapter<'a> {
    /// None: without its path, no hash can be computed.
    fn of(name: &str, settings: &'a ModelSettings) -> Option<Self> {
        let is_it = |(configured, path): &(Arc<str>, Arc<str>)| &**configured == name && !path.is_empty();
        let adapter_idx = settings.adapters.iter().position(is_it)?;
        let (name, path) = &settings.adapters[adapter_idx];
        Some(Self { name, path, kind: KeyKinds::adapter(adapter_idx)? })
    }
}

/// The blocks of a prompt, from the first one on, as far as there is nothing in them that no request of ours has.
#[derive(Debug)]
pub(super) struct Chain<'a> {
    stored: &'a BlockStored<'a>,
    settings: &'a ModelSettings,
    adapter: Option<Adapter<'a>>,
    /// At least one.
    blocks: Vec<ShownKeys<'a>>,
}

impl<'a> Chain<'a> {
    /// None: the event does not begin a prompt, or there is something in the first block that we cannot compute.
    pub(super) fn of(stored: &'a BlockStored<'a>, settings: &'a ModelSettings) -> Option<Self> {
        if stored.parent.is_some() {
            return None;
        }
        let adapter = match stored.lora_name {
            Some(name) => Some(Adapter::of(name, settings)?),
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

    /// Whether the event tells the tokens of all its blocks.
    pub(super) fn is_whole(&self) -> bool {
        let BlockStored { block_hashes, block_size, token_ids, .. } = self.stored;
        let n_tokens = block_hashes.len().checked_mul(*block_size as usize);
        *block_size > 0 && n_tokens == Some(token_ids.len())
    }

    /// Number of blocks that can be computed, at least one.
    pub(super) fn n_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Whether there may be more in the blocks than the publisher shows.
    pub(super) fn hides_extra_keys(&self) -> bool {
        self.stored.extra_keys.is_none()
    }

    /// The kinds that a request for the chain needs.
    pub(super) fn required(&self) -> KeyKinds {
        self.kinds(self.blocks.len()) | if self.adapter.is_some() { KeyKinds::NONE } else { KeyKinds::PLAIN }
    }

    /// The kinds that are at fault if the hashes of the first `n_blocks` differ.
    pub(super) fn kinds(&self, n_blocks: usize) -> KeyKinds {
        let blocks = &self.blocks[..n_blocks];
        let has_salt = blocks.iter().any(|keys| keys.salt.is_some());
        let has_mm = blocks.iter().any(|keys| !keys.mm.is_empty());
        let adapter = self.adapter.map(|adapter| adapter.kind).unwrap_or_default();
        let salt = if has_salt { KeyKinds::SALT } else { KeyKinds::NONE };
        let kinds = adapter | salt | if has_mm { KeyKinds::MM } else { KeyKinds::NONE };
        if kinds.is_empty() { KeyKinds::PLAIN } else { kinds }
    }

    /// What is proved if the hashes of the first `n_blocks` match.
    pub(super) fn shows(&self, n_blocks: usize) -> KeyKinds {
        let has_bare_block = self.adapter.is_none() && self.blocks[..n_blocks].iter().any(ShownKeys::is_empty);
        self.kinds(n_blocks) | if has_bare_block { KeyKinds::PLAIN } else { KeyKinds::NONE }
    }

    /// Number of blocks before the first one with a multimodal item.
    pub(super) fn n_text(&self) -> usize {
        self.blocks.iter().take_while(|keys| keys.mm.is_empty()).count()
    }

    /// How many of the first `n_blocks` have the hashes that we compute, up to the first that has not.
    pub(super) fn n_equal(&self, n_blocks: usize, hasher: &BlockHasher, form: Form) -> usize {
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
        let adapter = self.adapter.map(|Adapter { name, path, .. }| match form {
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
    pub(super) fn suspect(&self, n_blocks: usize, at_fault: KeyKinds, hasher: &BlockHasher) -> Suspect {
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

/// The kinds that the blocks of an event that continues a chain can be of, as far as they tell: a salt is in the first
/// block alone. None: an adapter whose hashes we cannot compute.
pub(super) fn continued_kinds(stored: &BlockStored<'_>, settings: &ModelSettings) -> Option<KeyKinds> {
    let is_item = |item: ExtraItem<'_>| matches!(item, ExtraItem::Mm(..));
    let has_mm = stored.extra_keys.is_some_and(|keys| keys.iter().any(|keys| keys.iter().any(is_item)));
    let mm = if has_mm { KeyKinds::MM } else { KeyKinds::NONE };
    match stored.lora_name {
        Some(name) => Some(Adapter::of(name, settings)?.kind | mm),
        None => Some(KeyKinds::PLAIN | mm),
    }
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
