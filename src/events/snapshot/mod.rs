//! What is known of a source at one moment, as bytes that another process can read.
//!
//! A snapshot is a claim and not yet knowledge: it says "once the publisher had sent this payload under this number, it
//! held these blocks". Whoever restores it has the publisher replay that number first; only the same payload there
//! shows that the claim is about the running process and not about one before it. That proof is the continuity
//! machine's; the checks here are against damage and other releases alone, and a checksum is no signature.
//!
//! | bytes | what |
//! |---|---|
//! | 8 | [`MAGIC`] |
//! | 4 | [`VERSION`], little-endian like all numbers here |
//! | 8 | length of the body |
//! | 16 | xxh3-128 of the body |
//! | … | the body: MessagePack, fields by position |
//!
//! Decoding hostile bytes ends in a [`SnapshotError`]; it reads no more than [`MAX_ENCODED_BYTES`] and allocates in
//! proportion to what it reads.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_128;

use super::apply::Image;
use super::continuity::{Overlap, PayloadDigest, SeqNo};

/// The first bytes of every snapshot.
pub const MAGIC: [u8; 8] = *b"warmsnap";
/// Form of the body. Raised with every change of what is in it, [`Image`] included: fields have no names there.
pub const VERSION: u32 = 1;
/// Longest snapshot that is decoded. A full source, 2^20 blocks in each tier, takes a fraction of it.
pub const MAX_ENCODED_BYTES: usize = 256 << 20;

const VERSION_AT: usize = MAGIC.len();
const LENGTH_AT: usize = VERSION_AT + size_of::<u32>();
const CHECKSUM_AT: usize = LENGTH_AT + size_of::<u64>();
const BODY_AT: usize = CHECKSUM_AT + size_of::<u128>();

/// What all replicas call a source.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SourceKey {
    /// Name of the model's pool.
    pub model: Arc<str>,
    /// The endpoint, as Envoy dials it.
    pub address: SocketAddr,
    /// Data-parallel rank.
    pub rank: u32,
}

impl fmt::Display for SourceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { model, address, rank } = self;
        write!(f, "{model} {address} rank {rank}")
    }
}

/// What was known of a source at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    /// The source.
    pub key: SourceKey,
    /// The last batch that is contained in it.
    pub overlap: Overlap,
    /// Whether everything since the publisher's start is contained in it.
    pub complete: bool,
    /// The blocks.
    pub image: Image,
}

/// Bytes that are not the snapshot that was wanted.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// Too short for a header, or something else altogether.
    #[error("found {found} bytes that are no snapshot, expected {MAGIC:02x?} and a header of {BODY_AT} bytes")]
    NoSnapshot {
        /// How many there are.
        found: usize,
    },
    /// Written by another release.
    #[error("found a snapshot of version {found}, expected {VERSION}")]
    Version {
        /// Its version.
        found: u32,
    },
    /// Cut short, or followed by something.
    #[error("found a body of {found} bytes, expected the {expected} that the header announces")]
    Length {
        /// How many there are.
        found: u64,
        /// How many the header announces.
        expected: u64,
    },
    /// Larger than any source makes it.
    #[error("found a snapshot of {found} bytes, expected at most {MAX_ENCODED_BYTES}")]
    TooLarge {
        /// How many there are.
        found: usize,
    },
    /// Damaged.
    #[error("found a body with checksum {found:032x}, expected {expected:032x} as in the header")]
    Checksum {
        /// That of the body.
        found: u128,
        /// That in the header.
        expected: u128,
    },
    /// Intact, but not of our making.
    #[error("the body is not that of a snapshot")]
    Body(#[from] rmp_serde::decode::Error),
    /// About another source.
    #[error("found a snapshot of {found}, expected one of {expected}")]
    Key {
        /// What it is about.
        found: SourceKey,
        /// What it should be about.
        expected: SourceKey,
    },
}

/// [`Snapshot`] as it lies in the bytes.
#[derive(Serialize, Deserialize)]
struct Body<I> {
    model: Arc<str>,
    address: SocketAddr,
    rank: u32,
    seq: u64,
    digest: u128,
    complete: bool,
    image: I,
}

impl Snapshot {
    /// The snapshot as bytes.
    pub fn encode(&self) -> Vec<u8> {
        let body = Body {
            model: self.key.model.clone(),
            address: self.key.address,
            rank: self.key.rank,
            seq: self.overlap.seq.0,
            digest: self.overlap.digest.0,
            complete: self.complete,
            image: &self.image,
        };
        let mut encoded = vec![0; BODY_AT];
        rmp_serde::encode::write(&mut encoded, &body).expect("a snapshot has no value that MessagePack lacks");
        let (header, body) = encoded.split_at_mut(BODY_AT);
        header[..VERSION_AT].copy_from_slice(&MAGIC);
        header[VERSION_AT..LENGTH_AT].copy_from_slice(&VERSION.to_le_bytes());
        header[LENGTH_AT..CHECKSUM_AT].copy_from_slice(&(body.len() as u64).to_le_bytes());
        header[CHECKSUM_AT..].copy_from_slice(&xxh3_128(body).to_le_bytes());
        encoded
    }

    /// Reads a snapshot back.
    ///
    /// # Errors
    /// [`SnapshotError`] when the bytes are damaged, too many, of another release or no snapshot at all.
    pub fn decode(encoded: &[u8]) -> Result<Self, SnapshotError> {
        let body: Body<Image> = rmp_serde::from_slice(checked_body(encoded)?)?;
        Ok(Self {
            key: SourceKey { model: body.model, address: body.address, rank: body.rank },
            overlap: Overlap { seq: SeqNo(body.seq), digest: PayloadDigest(body.digest) },
            complete: body.complete,
            image: body.image,
        })
    }

    /// Reads the snapshot of a certain source.
    ///
    /// # Errors
    /// As [`Self::decode`], and when it is that of another source.
    pub fn decode_of(expected: &SourceKey, encoded: &[u8]) -> Result<Self, SnapshotError> {
        let snapshot = Self::decode(encoded)?;
        if snapshot.key != *expected {
            return Err(SnapshotError::Key { found: snapshot.key, expected: expected.clone() });
        }
        Ok(snapshot)
    }
}

/// The body, if the header is ours and fits it.
fn checked_body(encoded: &[u8]) -> Result<&[u8], SnapshotError> {
    let found = encoded.len();
    if found > MAX_ENCODED_BYTES {
        return Err(SnapshotError::TooLarge { found });
    }
    let Some((header, body)) = encoded.split_at_checked(BODY_AT).filter(|(header, _)| header.starts_with(&MAGIC))
    else {
        return Err(SnapshotError::NoSnapshot { found });
    };
    let version = u32::from_le_bytes(field(header, VERSION_AT));
    if version != VERSION {
        return Err(SnapshotError::Version { found: version });
    }
    let (found, expected) = (body.len() as u64, u64::from_le_bytes(field(header, LENGTH_AT)));
    if found != expected {
        return Err(SnapshotError::Length { found, expected });
    }
    let (found, expected) = (xxh3_128(body), u128::from_le_bytes(field(header, CHECKSUM_AT)));
    if found != expected {
        return Err(SnapshotError::Checksum { found, expected });
    }
    Ok(body)
}

fn field<const N: usize>(header: &[u8], at: usize) -> [u8; N] {
    *header[at..].first_chunk().expect("a header has all its fields")
}

#[cfg(test)]
pub(crate) mod tests;
