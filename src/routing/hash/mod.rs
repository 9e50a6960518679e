//! vLLM's block hashes, exactly as the engine computes them.
//!
//! `h_i = H(ser((parent, (t_0, …, t_{B-1}), extra)))` for every full block of B tokens; the parent of the first block
//! is `NONE_HASH = H(ser(PYTHONHASHSEED))`, and `extra` is none or a tuple of tagged tuples (vLLM 0.32.0,
//! `v1/core/kv_cache_utils.py`). `ser` is pickle protocol 5 (`pickle`) or canonical CBOR (`cbor`), `H` is SHA-256 or
//! XXH3-128. Checked against the engine's own output for every algorithm, root and kind of extra key.
//!
//! One limit, dictated by CPython: pickle refers back to an object that it has written before, and whether two equal
//! strings are one object depends on the process. Equal strings within a block are taken as one object, as vLLM's
//! request processing makes them where they come from one request field. The same image twice within a block is
//! therefore hashed as some engines do and others do not; what does not match is no hit.
//!
//! Cost: about one compression of the hash per 64 bytes of serialized block; in a chain a plain block allocates
//! nothing.

mod cbor;
pub mod own;
mod pickle;

use std::borrow::Cow;
use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Serialize, Serializer};
use sha2::Digest as _;

/// `PYTHONHASHSEED` that vLLM (0.29 and later) assumes for `sha256*` when the variable is not set.
const DEFAULT_SEED: &str = "vllm-none-hash";

/// `--prefix-caching-hash-algo` of the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HashAlgorithm {
    /// Pickle, SHA-256 (vLLM's default).
    Sha256,
    /// Canonical CBOR, SHA-256.
    Sha256Cbor,
    /// Pickle, XXH3-128.
    Xxhash,
    /// Canonical CBOR, XXH3-128.
    XxhashCbor,
}

impl HashAlgorithm {
    /// Every algorithm.
    pub const ALL: [Self; 4] = [Self::Sha256, Self::Sha256Cbor, Self::Xxhash, Self::XxhashCbor];

    /// vLLM's name for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Sha256Cbor => "sha256_cbor",
            Self::Xxhash => "xxhash",
            Self::XxhashCbor => "xxhash_cbor",
        }
    }

    fn serialization(self) -> Serialization {
        match self {
            Self::Sha256 | Self::Xxhash => Serialization::Pickle,
            Self::Sha256Cbor | Self::XxhashCbor => Serialization::Cbor,
        }
    }

    fn digest(self, bytes: &[u8]) -> Digest {
        match self {
            Self::Sha256 | Self::Sha256Cbor => Digest { bytes: sha2::Sha256::digest(bytes).into(), len: 32 },
            Self::Xxhash | Self::XxhashCbor => {
                let mut padded = [0; 32];
                padded[..16].copy_from_slice(&xxhash_rust::xxh3::xxh3_128(bytes).to_be_bytes());
                Digest { bytes: padded, len: 16 }
            }
        }
    }
}

impl fmt::Display for HashAlgorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for HashAlgorithm {
    type Err = HashError;

    fn from_str(text: &str) -> Result<Self, HashError> {
        let found = || HashError::UnknownAlgorithm(text.to_owned());
        Self::ALL.into_iter().find(|algorithm| algorithm.as_str() == text).ok_or_else(found)
    }
}

impl Serialize for HashAlgorithm {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

/// Why hashes cannot be computed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HashError {
    /// No such algorithm.
    #[error("unknown hash algorithm {0:?}, expected sha256, sha256_cbor, xxhash or xxhash_cbor")]
    UnknownAlgorithm(String),
    /// The engine draws a random root at start and never publishes it.
    #[error("{0} without PYTHONHASHSEED has a random root, expected the engine's PYTHONHASHSEED")]
    UnknownRoot(HashAlgorithm),
}

/// Tokens per hashed block, at least 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockSize(NonZeroU32);

impl BlockSize {
    /// None for 0, which offload placeholders carry.
    pub fn new(n_tokens: u32) -> Option<Self> {
        NonZeroU32::new(n_tokens).map(Self)
    }

    /// Tokens per block.
    pub fn get(self) -> u32 {
        self.0.get()
    }
}

/// Low 64 bits of a block's digest: the form that travels on the wire and keys the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockHash(pub u64);

/// A whole block digest: 32 bytes (SHA-256) or 16 (XXH3-128).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Digest {
    /// The digest, then zeros.
    bytes: [u8; 32],
    len: u8,
}

impl Digest {
    /// A digest that came from elsewhere; none unless it has 16 or 32 bytes.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let len = matches!(bytes.len(), 16 | 32).then_some(bytes.len() as u8)?;
        let mut padded = [0; 32];
        padded[..bytes.len()].copy_from_slice(bytes);
        Some(Self { bytes: padded, len })
    }

    /// The digest's bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }

    /// The last 8 bytes, big-endian: vLLM's integer form of a block hash.
    pub fn low64(&self) -> BlockHash {
        let low = self.as_bytes().last_chunk().expect("a digest has at least 16 bytes");
        BlockHash(u64::from_be_bytes(*low))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.as_bytes()))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A Python value that may be part of a block's extra keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Key {
    /// `None`
    None,
    /// `int`
    Int(i64),
    /// `str`
    Str(Arc<str>),
    /// `bytes`
    Bytes(Arc<[u8]>),
    /// `tuple`
    Tuple(Vec<Key>),
}

impl Key {
    /// `("lora", name, path)`: on every block of a request to an adapter (vLLM 0.31 and later).
    pub fn lora(name: &Arc<str>, path: &Arc<str>) -> Self {
        Self::Tuple(vec![Self::Str("lora".into()), Self::Str(name.clone()), Self::Str(path.clone())])
    }

    /// `("mm", identifier, offset)`: on every block that a multimodal item overlaps; the offset is relative to the
    /// block's start and may be negative (vLLM 0.31 and later).
    pub fn mm(identifier: &str, offset: i64) -> Self {
        Self::Tuple(vec![Self::Str("mm".into()), Self::Str(identifier.into()), Self::Int(offset)])
    }

    /// `("cache_salt", salt)`: on the first block only (vLLM 0.31 and later).
    pub fn cache_salt(salt: &Arc<str>) -> Self {
        Self::Tuple(vec![Self::Str("cache_salt".into()), Self::Str(salt.clone())])
    }

    /// `("prompt_embeds", digest)`: on every block of a prompt of embeddings (vLLM 0.31 and later).
    pub fn prompt_embeds(digest: &[u8]) -> Self {
        Self::Tuple(vec![Self::Str("prompt_embeds".into()), Self::Bytes(digest.into())])
    }
}

/// An image, a piece of audio or a video in a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MmItem {
    /// What the engine knows it by: a hash, or the client's own `uuid`.
    pub identifier: Arc<str>,
    /// The first of its tokens in the prompt.
    pub offset: u32,
    /// Number of its tokens, at least 1.
    pub n_tokens: u32,
}

impl MmItem {
    /// The token after its last one.
    pub fn end(&self) -> u64 {
        u64::from(self.offset) + u64::from(self.n_tokens)
    }
}

/// What a request adds to the hashes of its blocks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scope {
    /// Name and path of the LoRA adapter.
    pub adapter: Option<(Arc<str>, Arc<str>)>,
    /// `cache_salt` of the request.
    pub cache_salt: Option<Arc<str>>,
    /// Multimodal items, in the order of the prompt and apart from each other.
    pub mm: Vec<MmItem>,
}

impl Scope {
    /// Extra keys of a block, in vLLM's order.
    pub fn keys(&self, block_idx: usize, block_size: BlockSize) -> Vec<Key> {
        let adapter = self.adapter.as_ref().map(|(name, path)| Key::lora(name, path));
        let mm = self.mm_in(block_idx, block_size).map(|(identifier, offset)| Key::mm(identifier, offset));
        let salt = self.cache_salt.as_ref().filter(|_| block_idx == 0).map(Key::cache_salt);
        adapter.into_iter().chain(mm).chain(salt).collect()
    }

    /// The multimodal items that overlap a block, with their offsets relative to its start.
    pub fn mm_in(&self, block_idx: usize, block_size: BlockSize) -> impl Iterator<Item = (&Arc<str>, i64)> {
        let start = block_idx as u64 * u64::from(block_size.get());
        let end = start + u64::from(block_size.get());
        let n_passed = self.mm.partition_point(|item| item.end() <= start);
        let overlapping = self.mm[n_passed..].iter().take_while(move |item| u64::from(item.offset) < end);
        overlapping.map(move |item| (&item.identifier, i64::from(item.offset) - start as i64))
    }

    /// Whether a multimodal item is in the first `n_tokens` of the prompt: the hashes of the blocks that they fill then
    /// depend on how the engine hashes such items.
    pub fn has_mm_in_first(&self, n_tokens: usize) -> bool {
        self.mm.first().is_some_and(|item| (item.offset as usize) < n_tokens)
    }
}

#[derive(Clone, Copy, Debug)]
enum Serialization {
    Pickle,
    Cbor,
}

impl Serialization {
    fn seed(self, seed: &str, out: &mut Vec<u8>) {
        match self {
            Self::Pickle => pickle::seed(seed, out),
            Self::Cbor => cbor::text(seed, out),
        }
    }

    fn block(self, parent: &Digest, tokens: &[u32], extra: &[Key], out: &mut Vec<u8>) {
        match self {
            Self::Pickle => pickle::block(parent.as_bytes(), tokens, extra, out),
            Self::Cbor => cbor::block(parent.as_bytes(), tokens, extra, out),
        }
    }
}

/// Hashes blocks under one algorithm and root.
#[derive(Clone, Debug)]
pub struct BlockHasher {
    algorithm: HashAlgorithm,
    root: Digest,
}

impl BlockHasher {
    /// A hasher for engines that run with `pythonhashseed` (none = not set).
    ///
    /// # Errors
    /// [`HashError::UnknownRoot`] for `xxhash*` without a seed.
    pub fn new(algorithm: HashAlgorithm, pythonhashseed: Option<&str>) -> Result<Self, HashError> {
        let is_random = matches!(algorithm, HashAlgorithm::Xxhash | HashAlgorithm::XxhashCbor);
        let seed = match pythonhashseed {
            Some(seed) => seed,
            None if is_random => return Err(HashError::UnknownRoot(algorithm)),
            None => DEFAULT_SEED,
        };
        let mut bytes = Vec::new();
        algorithm.serialization().seed(seed, &mut bytes);
        Ok(Self { algorithm, root: algorithm.digest(&bytes) })
    }

    /// The algorithm.
    pub fn algorithm(&self) -> HashAlgorithm {
        self.algorithm
    }

    /// `NONE_HASH`, the parent of every first block.
    pub fn root(&self) -> Digest {
        self.root
    }

    /// The bytes that the hash of a block is taken of.
    pub fn serialize(&self, parent: &Digest, tokens: &[u32], extra: &[Key]) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.algorithm.serialization().block(parent, tokens, extra, &mut bytes);
        bytes
    }

    /// Digest of one block.
    pub fn block(&self, parent: &Digest, tokens: &[u32], extra: &[Key]) -> Digest {
        self.algorithm.digest(&self.serialize(parent, tokens, extra))
    }

    /// Digests of the full blocks of `tokens` after `parent`; `extra` tells a block's extra keys.
    pub fn chain<K: AsRef<[Key]>>(
        &self,
        parent: Digest,
        tokens: &[u32],
        block_size: BlockSize,
        mut extra: impl FnMut(usize) -> K,
    ) -> Vec<Digest> {
        let blocks = tokens.chunks_exact(block_size.get() as usize);
        let mut digests = Vec::with_capacity(blocks.len());
        let mut bytes = Vec::new();
        let mut parent = parent;
        for (block_idx, block) in blocks.enumerate() {
            bytes.clear();
            self.algorithm.serialization().block(&parent, block, extra(block_idx).as_ref(), &mut bytes);
            parent = self.algorithm.digest(&bytes);
            digests.push(parent);
        }
        digests
    }

    /// Hashes of the full blocks of a request's prompt, in the index's form.
    pub fn scoped_chain(&self, tokens: &[u32], block_size: BlockSize, scope: &Scope) -> Vec<BlockHash> {
        let text = Scope { adapter: scope.adapter.clone(), cache_salt: scope.cache_salt.clone(), mm: Vec::new() };
        let (first, later) = (text.keys(0, block_size), text.keys(1, block_size));
        let keys = |block_idx| {
            if scope.mm_in(block_idx, block_size).next().is_some() {
                return Cow::Owned(scope.keys(block_idx, block_size));
            }
            Cow::Borrowed(if block_idx == 0 { first.as_slice() } else { later.as_slice() })
        };
        let digests = self.chain(self.root, tokens, block_size, keys);
        digests.iter().map(Digest::low64).collect()
    }
}
