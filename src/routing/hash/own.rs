//! Our own block hashes, for engines whose hashes we cannot compute.
//!
//! `k_i = X(k_{i-1}, X(t_0, …, t_{B-1}, extra))` with X = XXH3-64 under a fixed seed; the key before the first block is
//! X of the model's name. The same on every replica and in every version, so that what one has learned another can use.
//! The inner hash, the block's *content*, is all that must be kept of a block whose predecessors are not known yet.
//!
//! Extra keys are tagged by what they are, so that a salt never looks like an adapter's name. The events show the name
//! of an adapter and not its path: two adapters of one name would be taken for one, and an engine has only one of each
//! name.
//!
//! No secret is involved: who can choose prompts could make two of them collide, which costs a wrong guess where a
//! prompt is cached, and nothing else.

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::{BlockHash, BlockSize, Scope};

/// "warmrout": changing it, or anything else here, makes the snapshots of other versions useless.
const SEED: u64 = 0x7761_726d_726f_7574;

/// What an engine adds to the hash of a block besides its tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwnKey<'a> {
    /// Name of the adapter: on every block.
    Adapter(&'a str),
    /// Cache salt: on the first block.
    Salt(&'a str),
    /// Multimodal item: identifier and offset relative to the block's start.
    Mm(&'a str, i64),
    /// Digest of prompt embeddings.
    Embeds(&'a [u8]),
    /// Something that no release has had so far, as its bytes on the wire.
    Other(&'a [u8]),
}

impl OwnKey<'_> {
    fn write(&self, out: &mut Vec<u8>) {
        let (tag, bytes, number) = match *self {
            Self::Adapter(name) => (1, name.as_bytes(), 0),
            Self::Salt(salt) => (2, salt.as_bytes(), 0),
            Self::Mm(identifier, offset) => (3, identifier.as_bytes(), offset),
            Self::Embeds(digest) => (4, digest, 0),
            Self::Other(raw) => (5, raw, 0),
        };
        out.push(tag);
        out.extend_from_slice(&number.to_le_bytes());
        out.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
        out.extend_from_slice(bytes);
    }
}

/// Hash of a block's tokens and extra keys, without what precedes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockContent(pub u64);

/// Hashes the blocks of one model.
#[derive(Clone, Debug)]
pub struct OwnHasher {
    root: BlockHash,
    /// Bytes of the block that is being hashed.
    buffer: Vec<u8>,
}

impl OwnHasher {
    /// A hasher for the blocks of `model`.
    pub fn new(model: &str) -> Self {
        Self { root: BlockHash(xxh3_64_with_seed(model.as_bytes(), SEED)), buffer: Vec::new() }
    }

    /// The key before every first block.
    pub fn root(&self) -> BlockHash {
        self.root
    }

    /// Hashes a block's tokens and extra keys. All blocks of a keyspace have equally many tokens.
    pub fn content<'k>(
        &mut self,
        tokens: impl IntoIterator<Item = u32>,
        keys: impl IntoIterator<Item = OwnKey<'k>>,
    ) -> BlockContent {
        self.buffer.clear();
        tokens.into_iter().for_each(|token| self.buffer.extend_from_slice(&token.to_le_bytes()));
        keys.into_iter().for_each(|key| key.write(&mut self.buffer));
        BlockContent(xxh3_64_with_seed(&self.buffer, SEED))
    }

    /// The key of the block with `content` behind the one with key `parent`.
    pub fn link(parent: BlockHash, content: BlockContent) -> BlockHash {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&parent.0.to_le_bytes());
        bytes[8..].copy_from_slice(&content.0.to_le_bytes());
        BlockHash(xxh3_64_with_seed(&bytes, SEED))
    }

    /// Keys of the full blocks of a request's prompt.
    pub fn scoped_chain(&mut self, tokens: &[u32], block_size: BlockSize, scope: &Scope) -> Vec<BlockHash> {
        let adapter = scope.adapter.as_ref().map(|(name, _)| OwnKey::Adapter(name));
        let salt = scope.cache_salt.as_ref().map(|salt| OwnKey::Salt(salt));
        let blocks = tokens.chunks_exact(block_size.get() as usize);
        let mut keys = Vec::with_capacity(blocks.len());
        let mut parent = self.root;
        for (block_idx, block) in blocks.enumerate() {
            let mm = scope.mm_in(block_idx, block_size).map(|(identifier, offset)| OwnKey::Mm(identifier, offset));
            let salt = salt.filter(|_| block_idx == 0);
            let content = self.content(block.iter().copied(), adapter.into_iter().chain(mm).chain(salt));
            parent = Self::link(parent, content);
            keys.push(parent);
        }
        keys
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::hash::MmItem;

    fn scope(adapter: Option<&str>, salt: Option<&str>) -> Scope {
        let adapter = adapter.map(|name| (name.into(), "any".into()));
        Scope { adapter, cache_salt: salt.map(Into::into), mm: Vec::new() }
    }

    fn chain(model: &str, tokens: &[u32], scope: &Scope) -> Vec<BlockHash> {
        OwnHasher::new(model).scoped_chain(tokens, BlockSize::new(2).expect("not 0"), scope)
    }

    #[test]
    fn whatever_differs_in_a_block_differs_in_all_keys_from_there_on() {
        let tokens = [1, 2, 3, 4, 5, 6, 7];
        let plain = chain("m", &tokens, &Scope::default());
        assert_eq!(plain.len(), 3, "the partial block has no key");
        let changed = chain("m", &[1, 2, 3, 9, 5, 6], &Scope::default());
        let equal: Vec<bool> = plain.iter().zip(&changed).map(|(one, other)| one == other).collect();
        assert_eq!(equal, [true, false, false]);
        for (model, scope) in [
            ("other", Scope::default()),
            ("m", scope(Some("a"), None)),
            ("m", scope(None, Some("a"))),
            ("m", scope(Some("a"), Some("a"))),
            ("m", scope(None, Some("b"))),
        ] {
            let other = chain(model, &tokens, &scope);
            assert!(plain.iter().zip(&other).all(|(one, other)| one != other), "{model} {scope:?}");
        }
        assert_ne!(chain("m", &tokens, &scope(Some("a"), None)), chain("m", &tokens, &scope(None, Some("a"))));
    }

    #[test]
    fn item_is_in_the_blocks_that_it_overlaps_and_in_no_other() {
        let with = |items: &[(&str, u32, u32)]| {
            let item = |(identifier, offset, n_tokens): &(&str, u32, u32)| MmItem {
                identifier: (*identifier).into(),
                offset: *offset,
                n_tokens: *n_tokens,
            };
            let scope = Scope { mm: items.iter().map(item).collect(), ..scope(None, Some("s")) };
            chain("m", &[1, 2, 3, 4, 5, 6, 7, 8], &scope)
        };
        let n_equal =
            |one: &[BlockHash], other: &[BlockHash]| one.iter().zip(other).take_while(|(a, b)| a == b).count();
        let text = with(&[]);
        assert_eq!(n_equal(&text, &with(&[("a", 2, 3)])), 1, "the block before it is that of the text");
        assert_eq!(n_equal(&with(&[("a", 2, 3)]), &with(&[("b", 2, 3)])), 1);
        assert_eq!(n_equal(&with(&[("a", 2, 3)]), &with(&[("a", 3, 2)])), 1, "the offset counts");
        assert_eq!(n_equal(&with(&[("a", 2, 3)]), &with(&[("a", 2, 4)])), 4, "the end counts by its block");
        assert_eq!(n_equal(&with(&[("a", 2, 4)]), &with(&[("a", 2, 5)])), 3);
        assert_eq!(n_equal(&with(&[("a", 0, 1), ("b", 1, 1)]), &with(&[("b", 0, 1), ("a", 1, 1)])), 0);
    }

    #[test]
    fn path_of_an_adapter_does_not_matter() {
        let other_path = Scope { adapter: Some(("a".into(), "elsewhere".into())), ..Scope::default() };
        assert_eq!(chain("m", &[1, 2], &other_path), chain("m", &[1, 2], &scope(Some("a"), None)));
    }

    #[test]
    fn extra_keys_of_a_block_are_told_apart() {
        let mut hasher = OwnHasher::new("m");
        let keys: [&[OwnKey<'_>]; 9] = [
            &[],
            &[OwnKey::Adapter("a")],
            &[OwnKey::Salt("a")],
            &[OwnKey::Mm("a", 0)],
            &[OwnKey::Mm("a", -1)],
            &[OwnKey::Embeds(b"a")],
            &[OwnKey::Other(b"a")],
            &[OwnKey::Salt("a"), OwnKey::Salt("")],
            &[OwnKey::Salt(""), OwnKey::Salt("a")],
        ];
        let contents = keys.map(|keys| hasher.content([7], keys.iter().copied()).0);
        let distinct: std::collections::HashSet<u64> = contents.into_iter().collect();
        assert_eq!(distinct.len(), keys.len());
    }

    /// Replicas of different versions exchange what they know: a change of these numbers must be meant.
    #[test]
    fn keys_are_the_same_everywhere_and_for_ever() {
        let keys = chain("model", &[1, 2, 3, 4], &scope(Some("lora"), Some("salt")));
        assert_eq!(keys, EXPECTED);
    }

    const EXPECTED: [BlockHash; 2] = [BlockHash(10_507_890_911_234_962_418), BlockHash(9_476_220_689_673_123_091)];
}
