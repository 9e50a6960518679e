//! Which endpoint holds which blocks: the prefix index.
//!
//! Outer level: [`Keyspace`] → [`KeyspaceIndex`], a map that is rarely written. Inner level: [`BlockHash`] → the
//! slots that hold the block, as a small immutable set. Neither is ever locked by a reader.
//!
//! A *slot* stands for one tier in one generation of one source, that is, in one life of one rank of one endpoint as
//! far as it is known. It has one writer ([`SlotWriter`]), and an entry that says whose it is. A reader notes all
//! entries before it walks a chain and compares them afterwards: a slot that was retired, cleared or given to somebody
//! else meanwhile gets no credit. Retiring is therefore one atomic store; the blocks are swept afterwards, and only a
//! swept slot is used again.
//!
//! Guarantees: a lookup gives for each rank of each endpoint the exact length of the run of the chain, from its first
//! block, that it holds on its GPU, and how far other tiers continue it, while nothing is written. While a chain is
//! being written the answer is one that was true of each block when it was read. What is in doubt is counted too low,
//! never too high.
//!
//! Cost: a lookup allocates nothing once its [`Overlaps`] is warm; it loads two words per slot in use, then makes one
//! map lookup per block until no run is left. Memory is bounded per slot and over all keyspaces ([`IndexLimits`]): at a
//! bound new blocks are refused and counted. A keyspace that no source uses is dropped when the next one is made.

mod blocks;
mod bytes;
mod holder;
mod overlaps;
mod promises;
mod slots;
mod watches;
mod writer;

use std::fmt;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::ops::BitOr;
use std::sync::Arc;

use super::hash::{BlockHash, BlockSize, Digest, HashAlgorithm};
use blocks::Blocks;
use bytes::Account;
pub use bytes::{BLOCK_BYTES, COPY_BYTES};
pub use holder::{Holder, Tier};
pub use overlaps::{Match, Overlaps};
pub use promises::{PromiseLimits, Promised, Promises};
use slots::{Acquired, SlotId, SlotTable};
pub use watches::{Clock, Prediction, PredictionSums, Seen, Watched, Watches};
pub use writer::{ContentDigest, SlotWriter, StoreOutcome};

/// One space of comparable block hashes: hashes of two keyspaces never mean the same block.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Keyspace {
    /// Name of the pool's model, as configured.
    pub model: Arc<str>,
    /// Tokens per hashed block.
    pub block_size: BlockSize,
    /// Who defines the hashes.
    pub kind: KeyspaceKind,
}

/// Who defines the hashes of a keyspace.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum KeyspaceKind {
    /// vLLM's own block hashes; keys are their low 64 bits.
    Engine {
        /// `--prefix-caching-hash-algo` of the engine.
        algorithm: HashAlgorithm,
        /// `NONE_HASH`: the parent of every first block.
        root: Digest,
    },
    /// Our own chain over tokens and extra keys ([`super::hash::own`]), for engines whose hashes cannot be computed.
    Own,
}

/// A set of the kinds of extra keys that block hashes can contain.
///
/// Hashes are proved kind by kind, see [`crate::events::apply`]; a request names the kinds that its own hashes need.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KeyKinds(u64);

impl KeyKinds {
    /// No kind.
    pub const NONE: Self = Self(0);
    /// Token ids alone.
    pub const PLAIN: Self = Self(1);
    /// A cache salt.
    pub const SALT: Self = Self(1 << 1);
    /// A multimodal item.
    pub const MM: Self = Self(1 << (2 + Self::MAX_ADAPTERS));
    /// Most adapters that one model can have.
    pub const MAX_ADAPTERS: usize = 60;

    /// Every adapter.
    pub const ADAPTERS: Self = Self(((1 << Self::MAX_ADAPTERS) - 1) << 2);

    /// The adapter at `adapter_idx` of the model's configured adapters; none from [`Self::MAX_ADAPTERS`] on.
    pub fn adapter(adapter_idx: usize) -> Option<Self> {
        (adapter_idx < Self::MAX_ADAPTERS).then(|| Self(1 << (2 + adapter_idx)))
    }

    /// Whether every kind of `other` is in this set.
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether some kind of `other` is in this set.
    pub fn intersects(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// This set without the kinds of `other`.
    #[must_use]
    pub fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Whether no kind is in this set.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Names of the kinds, for people: `plain`, `salt`, `multimodal`, and adapters by their position in the
    /// configuration.
    pub fn names(self) -> Vec<String> {
        let named = [(Self::PLAIN, "plain"), (Self::SALT, "salt"), (Self::MM, "multimodal")];
        let named = named.map(|(kind, name)| (kind, name.to_owned()));
        let adapters = (0..Self::MAX_ADAPTERS).filter_map(|idx| Some((Self::adapter(idx)?, format!("adapter {idx}"))));
        let kinds = named.into_iter().chain(adapters).filter(|(kind, _)| self.contains(*kind));
        kinds.map(|(_, name)| name).collect()
    }

    /// The set as bits: plain 0, salt 1, adapter i 2 + i, multimodal 62.
    pub fn bits(self) -> u64 {
        self.0
    }

    /// The set with these bits, see [`Self::bits`].
    pub fn from_bits(bits: u64) -> Self {
        Self(bits)
    }
}

impl fmt::Display for KeyKinds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.names().join(", "))
    }
}

impl BitOr for KeyKinds {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// How much the index may hold.
#[derive(Clone, Copy, Debug)]
pub struct IndexLimits {
    /// Slots per keyspace, 24 bytes each. Twice the number of sources and tiers lets all of them restart at once.
    pub slots: u16,
    /// Bytes per slot. More than the blocks of an engine take, so that only a broken or lying publisher meets it.
    pub bytes_per_slot: usize,
    /// Bytes over all keyspaces.
    pub bytes: usize,
    /// Blocks per slot of which more than one copy is remembered.
    pub copied_blocks_per_slot: usize,
}

impl Default for IndexLimits {
    fn default() -> Self {
        Self { slots: 1 << 13, bytes_per_slot: 128 << 20, bytes: 2 << 30, copied_blocks_per_slot: 1 << 14 }
    }
}

/// Which endpoint holds which blocks, over all models.
#[derive(Debug)]
pub struct PrefixIndex {
    /// Written when a model is first seen with a block size; read by every request.
    keyspaces: papaya::HashMap<Keyspace, Arc<KeyspaceIndex>>,
    limits: IndexLimits,
    account: Account,
}

impl Default for PrefixIndex {
    fn default() -> Self {
        Self::new(IndexLimits::default())
    }
}

impl PrefixIndex {
    /// An empty index.
    pub fn new(limits: IndexLimits) -> Self {
        Self { keyspaces: blocking_map(RandomState::new()), limits, account: Account::new(limits.bytes) }
    }

    /// The index of `keyspace`, created when it is new. One that nobody has a slot in may be dropped when another is
    /// made: to write, use [`Self::acquire`].
    pub fn keyspace(&self, keyspace: &Keyspace) -> Arc<KeyspaceIndex> {
        let keyspaces = self.keyspaces.pin();
        if let Some(index) = keyspaces.get(keyspace) {
            return Arc::clone(index);
        }
        // Here and not when a slot is released: sources come and go without their keyspaces doing so.
        keyspaces.retain(|_, index| !index.slots.close_if_unused());
        // What was removed would otherwise be kept until there are 32 such, and their tables may be large.
        papaya::Guard::flush(&self.keyspaces.guard());
        let create = || Arc::new(KeyspaceIndex::new(self.limits, self.account.clone()));
        Arc::clone(keyspaces.get_or_insert_with(keyspace.clone(), create))
    }

    /// A fresh slot of `keyspace` for a new generation of a source; none while all slots are taken.
    pub fn acquire(&self, keyspace: &Keyspace, holder: Holder) -> Option<SlotWriter> {
        loop {
            let index = self.keyspace(keyspace);
            match index.slots.acquire(holder) {
                Acquired::Slot(slot) => return Some(SlotWriter::new(index, slot, holder)),
                Acquired::Full => return None,
                // Dropped since it was looked up; whoever does it may not have come to taking it out of the map.
                Acquired::Closed => {
                    let _ = self.keyspaces.pin().remove_if(keyspace, |_, found| found.slots.is_closed());
                }
            }
        }
    }

    /// The keyspaces of `model` in which a request can be credited at all: those that some source uses now.
    pub fn keyspaces_of(&self, model: &str) -> Vec<(Keyspace, Arc<KeyspaceIndex>)> {
        self.keyspaces
            .pin()
            .iter()
            .filter(|(keyspace, index)| &*keyspace.model == model && index.slots.n_live() > 0)
            .map(|(keyspace, index)| (keyspace.clone(), Arc::clone(index)))
            .collect()
    }

    /// Bytes that are counted as taken, over all keyspaces.
    pub fn n_bytes(&self) -> usize {
        self.account.taken()
    }

    /// Most bytes that may be taken.
    pub fn limit_bytes(&self) -> usize {
        self.limits.bytes
    }

    /// Number of keyspaces.
    pub fn n_keyspaces(&self) -> usize {
        self.keyspaces.len()
    }

    /// Number of distinct blocks over all keyspaces.
    pub fn n_blocks(&self) -> usize {
        self.keyspaces.pin().values().map(|index| index.n_blocks()).sum()
    }
}

/// Which slots hold which blocks of one keyspace.
#[derive(Debug)]
pub struct KeyspaceIndex {
    blocks: Blocks,
    slots: SlotTable,
    /// What requests on their way will make endpoints hold; written at each pick and by the sources that store it.
    promises: Promises,
    /// The requests that tell whether the index is right; written at each pick, read by the sources.
    watches: Watches,
    limits: IndexLimits,
    account: Account,
}

impl KeyspaceIndex {
    fn new(limits: IndexLimits, account: Account) -> Self {
        let promises = Promises::new(PromiseLimits::SPECULATIVE);
        let (slots, watches) = (SlotTable::new(limits.slots), Watches::default());
        Self { blocks: Blocks::new(), slots, promises, watches, limits, account }
    }

    /// A fresh slot for a new generation of a source; none while all slots are taken, or when the keyspace was dropped
    /// because nobody used it ([`PrefixIndex::acquire`] sees to that).
    pub fn acquire(self: &Arc<Self>, holder: Holder) -> Option<SlotWriter> {
        match self.slots.acquire(holder) {
            Acquired::Slot(slot) => Some(SlotWriter::new(Arc::clone(self), slot, holder)),
            Acquired::Full | Acquired::Closed => None,
        }
    }

    /// Finds for each rank of each endpoint how many of `hashes`, from the first on, it holds without a hole.
    ///
    /// `hashes` is one chain. Slots whose hashes of the kinds `required` are not all proved get no credit.
    pub fn overlaps(&self, hashes: &[BlockHash], required: KeyKinds, out: &mut Overlaps) {
        out.fill(self, hashes, required);
    }

    /// What requests on their way will make endpoints hold; whatever a source stores is no promise any more.
    pub fn promises(&self) -> &Promises {
        &self.promises
    }

    /// Requests by which it is seen whether endpoints hold what they are said to hold.
    pub fn watches(&self) -> &Watches {
        &self.watches
    }

    /// Number of distinct blocks.
    pub fn n_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Slots in use: one for each tier of each source that has blocks here.
    pub fn n_slots(&self) -> usize {
        self.slots.n_live()
    }
}

/// A map whose writers copy a table that has become too small at once; readers never wait, and look into one table.
///
/// In its default mode papaya (0.2.5) leaves the copying to writers bit by bit, but `compute`, by which all our writes
/// go, takes no part: tables would chain without end.
fn blocking_map<K, V, S>(hasher: S) -> papaya::HashMap<K, V, S> {
    papaya::HashMap::builder().hasher(hasher).resize_mode(papaya::ResizeMode::Blocking).build()
}

/// The slots that hold one block, ascending. Most blocks have one holder, which needs no allocation of its own.
#[derive(Clone, Debug)]
enum Holders {
    One(SlotId),
    Many(Arc<[SlotId]>),
}

impl Holders {
    fn slots(&self) -> &[SlotId] {
        match self {
            Self::One(slot) => std::slice::from_ref(slot),
            Self::Many(slots) => slots,
        }
    }

    /// The set with `slot`; none when it is in there already.
    fn with(&self, slot: SlotId) -> Option<Self> {
        let slots = self.slots();
        let position = slots.binary_search(&slot).err()?;
        let (before, after) = slots.split_at(position);
        Some(Self::Many(before.iter().chain(std::iter::once(&slot)).chain(after).copied().collect()))
    }

    /// The set without `slot`; none when nothing is left.
    fn without(&self, slot: SlotId) -> Option<Self> {
        let mut rest = self.slots().iter().copied().filter(|holder| *holder != slot);
        match (rest.next(), rest.next()) {
            (None, _) => None,
            (Some(only), None) => Some(Self::One(only)),
            (Some(first), Some(second)) => Some(Self::Many([first, second].into_iter().chain(rest).collect())),
        }
    }
}

/// Hashes keys that already are hashes: one multiplication, seeded so that a publisher which chooses its block hashes
/// cannot choose where they land.
#[derive(Clone, Copy, Debug)]
struct SeededFold {
    seed: u64,
    factor: u64,
}

impl SeededFold {
    fn random() -> Self {
        let random = RandomState::new();
        Self { seed: random.hash_one(0_u64), factor: random.hash_one(1_u64) | 1 }
    }
}

impl BuildHasher for SeededFold {
    type Hasher = FoldHasher;

    fn build_hasher(&self) -> FoldHasher {
        FoldHasher { state: self.seed, factor: self.factor }
    }
}

/// See [`SeededFold`].
#[derive(Debug)]
struct FoldHasher {
    state: u64,
    factor: u64,
}

impl Hasher for FoldHasher {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u64(&mut self, word: u64) {
        let product = u128::from(self.state ^ word) * u128::from(self.factor);
        self.state = (product >> 64) as u64 ^ product as u64;
    }

    fn finish(&self) -> u64 {
        self.state
    }
}

#[cfg(test)]
mod tests;
