//! What a generation knows, in a form that can be stored, sent to another replica and taken over there.
//!
//! An image comes from a file or another process: whatever is in it, restoring it takes no more memory than its size
//! and the limits of the index allow. It says by which settings it was made, and is refused where others hold.

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use crate::routing::hash::own::BlockContent;
use crate::routing::hash::{BlockHash, BlockSize};
use crate::routing::index::{KeyKinds, Tier};

use super::Shared;
use super::generation::Generation;
use super::parked::{Copies, Waiting};

/// Version of the meaning of what follows.
const FORM: u32 = 1;

/// See the module. Blocks are packed as little-endian words, 8 bytes for an ordinary one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Image {
    settings: u64,
    block_size: Option<u32>,
    group: Option<u32>,
    shows_extra_keys: bool,
    is_full: bool,
    proved: u64,
    disproved: u64,
    n_passed: u64,
    n_unexplained: u64,
    /// By tier: hashes of the blocks in the Engine keyspace that have one copy.
    single: [Packed; 3],
    /// By tier: hash and copies of the others.
    copied: [Packed; 3],
    /// Hash, our key and copies of the blocks in the keyspace Own.
    own: Packed,
    /// Parent, hash, content and copies of the blocks whose chain is not known back to its root.
    parked: Packed,
}

impl Image {
    /// Number of blocks in it.
    pub fn n_blocks(&self) -> usize {
        let engine = self.single.iter().map(|packed| packed.0.len() / 8);
        let copied = self.copied.iter().map(|packed| packed.0.len() / 12);
        engine.chain(copied).sum::<usize>() + self.own.0.len() / OWN_LEN
    }

    pub(super) fn of(generation: &Generation, shared: &Shared) -> Self {
        let mut image = Self {
            settings: fingerprint(shared),
            block_size: generation.block_size.map(BlockSize::get),
            group: generation.group,
            shows_extra_keys: generation.shows_extra_keys,
            is_full: generation.is_full,
            proved: generation.proof.proved.bits(),
            disproved: generation.proof.disproved.bits(),
            n_passed: generation.proof.n_passed,
            n_unexplained: generation.proof.n_unexplained,
            single: Default::default(),
            copied: Default::default(),
            own: Packed::default(),
            parked: Packed::default(),
        };
        for tier in Tier::ALL {
            let slot = generation.engine.as_ref().and_then(|engine| engine.get(tier));
            for (hash, n_copies) in slot.into_iter().flat_map(|slot| slot.iter()) {
                match n_copies {
                    1 => image.single[tier as usize].put(hash.0),
                    _ => image.copied[tier as usize].put_copied(hash.0, n_copies),
                }
            }
        }
        for (hash, key, copies) in generation.own.iter().flat_map(|own| own.iter()) {
            image.own.put(hash.0);
            image.own.put(key.0);
            image.own.put_copies(copies);
        }
        for (parent, hash, waiting) in generation.parked.iter() {
            [parent.0, hash.0, waiting.content.0].into_iter().for_each(|word| image.parked.put(word));
            image.parked.put_copies(waiting.copies);
        }
        image
    }

    /// Whether it was made under these settings, and is well-formed.
    pub(super) fn fits(&self, shared: &Shared) -> bool {
        self.settings == fingerprint(shared) && self.is_well_formed()
    }

    /// A generation that knows what the image says; none when it was made under other settings or is not well-formed.
    pub(super) fn restore(&self, shared: &Shared) -> Option<Generation> {
        if !self.fits(shared) {
            return None;
        }
        let mut generation = Generation {
            block_size: self.block_size.and_then(BlockSize::new),
            group: self.group,
            shows_extra_keys: self.shows_extra_keys,
            is_full: self.is_full,
            ..Generation::default()
        };
        generation.proof.proved = KeyKinds::from_bits(self.proved);
        generation.proof.disproved = KeyKinds::from_bits(self.disproved);
        generation.proof.n_passed = self.n_passed;
        generation.proof.n_unexplained = self.n_unexplained;
        self.restore_engine(&mut generation, shared);
        self.restore_own(&mut generation, shared);
        Some(generation)
    }

    fn is_well_formed(&self) -> bool {
        let is_packed = |packed: &Packed, len: usize| packed.0.len().is_multiple_of(len);
        let has_blocks = self.n_blocks() > 0 || !self.parked.0.is_empty();
        self.single.iter().all(|packed| is_packed(packed, 8))
            && self.copied.iter().all(|packed| is_packed(packed, 12))
            && is_packed(&self.own, OWN_LEN)
            && is_packed(&self.parked, PARKED_LEN)
            && self.parked.0.len() / PARKED_LEN * super::parked::PARKED_BYTES <= super::generation::PARKED_LIMIT
            && self.block_size.is_none_or(super::generation::is_block_size)
            && (self.block_size.is_some() || !has_blocks)
    }

    fn restore_engine(&self, generation: &mut Generation, shared: &Shared) {
        let mut has_room = true;
        for tier in Tier::ALL {
            let (single, copied) = (&self.single[tier as usize], &self.copied[tier as usize]);
            if single.0.is_empty() && copied.0.is_empty() {
                continue;
            }
            let slot = generation.engine(shared).and_then(|engine| engine.ensure(tier, &shared.index));
            let Some(slot) = slot else {
                has_room = false;
                continue;
            };
            let hashes: Vec<BlockHash> = single.0.chunks_exact(8).map(|block| BlockHash(word(block, 0))).collect();
            has_room &= slot.store_missing(&hashes).n_refused == 0;
            for block in copied.0.chunks_exact(12) {
                has_room &= slot.store_copies(BlockHash(word(block, 0)), number(block, 8));
            }
        }
        generation.is_full |= !has_room;
    }

    fn restore_own(&self, generation: &mut Generation, shared: &Shared) {
        let mut has_room = true;
        for block in self.own.0.chunks_exact(OWN_LEN) {
            let (ids, copies) = ((BlockHash(word(block, 0)), BlockHash(word(block, 8))), copies(block, 16));
            for tier in Tier::ALL.into_iter().filter(|tier| copies[*tier as usize] > 0) {
                let own = generation.own(shared);
                has_room &= own.is_some_and(|own| own.add(tier, ids, copies[tier as usize], &shared.index));
            }
        }
        generation.is_full |= !has_room;
        for block in self.parked.0.chunks_exact(PARKED_LEN) {
            let waiting = Waiting { content: BlockContent(word(block, 16)), copies: copies(block, 24) };
            generation.parked.restore(BlockHash(word(block, 0)), BlockHash(word(block, 8)), waiting);
        }
    }
}

/// Bytes of a block in [`Image::own`] and in [`Image::parked`].
const OWN_LEN: usize = 8 + 8 + 6;
const PARKED_LEN: usize = 8 + 8 + 8 + 6;

/// What the meaning of an image depends on: the form, the hash settings, and the order of the adapters, which proved
/// kinds are named by.
fn fingerprint(shared: &Shared) -> u64 {
    let hasher = shared.hasher.as_ref().map(|hasher| (hasher.algorithm().as_str(), hasher.root()));
    let settings = &shared.settings;
    xxh3_64(format!("{:?}", (FORM, &settings.model, settings.algorithm, hasher, &settings.adapters)).as_bytes())
}

/// Bytes that every format writes as such, and not as a list of numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Packed(Vec<u8>);

impl Packed {
    fn put(&mut self, word: u64) {
        self.0.extend_from_slice(&word.to_le_bytes());
    }

    fn put_copied(&mut self, word: u64, n_copies: u32) {
        self.put(word);
        self.0.extend_from_slice(&n_copies.to_le_bytes());
    }

    fn put_copies(&mut self, copies: Copies) {
        copies.into_iter().for_each(|n_copies| self.0.extend_from_slice(&n_copies.to_le_bytes()));
    }
}

fn word(block: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(block[offset..offset + 8].try_into().expect("a range of 8 has 8 bytes"))
}

fn number(block: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(block[offset..offset + 4].try_into().expect("a range of 4 has 4 bytes"))
}

fn copies(block: &[u8], offset: usize) -> Copies {
    [0, 2, 4].map(|position| u16::from_le_bytes([block[offset + position], block[offset + position + 1]]))
}

impl Serialize for Packed {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for Packed {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_byte_buf(PackedVisitor)
    }
}

struct PackedVisitor;

impl<'de> serde::de::Visitor<'de> for PackedVisitor {
    type Value = Packed;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("packed blocks as a byte string")
    }

    fn visit_bytes<E: serde::de::Error>(self, bytes: &[u8]) -> Result<Packed, E> {
        Ok(Packed(bytes.to_vec()))
    }

    fn visit_byte_buf<E: serde::de::Error>(self, bytes: Vec<u8>) -> Result<Packed, E> {
        Ok(Packed(bytes))
    }

    /// Text formats have no byte strings.
    fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut bytes: A) -> Result<Packed, A::Error> {
        let mut packed = Packed::default();
        while let Some(byte) = bytes.next_element()? {
            packed.0.push(byte);
        }
        Ok(packed)
    }
}
