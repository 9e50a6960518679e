//! Walks msgpack bytes in place.
//!
//! A [`Cursor`] reads one head at a time: a scalar with its payload, or the length of an array or map whose elements
//! follow. Every element takes at least one byte, so a declared length is held against the bytes that are left before
//! anyone acts on it, and nothing is ever allocated on the word of a sender.

/// Deepest nesting of a batch, the batch itself being level 1; vLLM's own batches have seven levels.
pub(super) const MAX_DEPTH: u32 = 32;

/// Hashes and extra keys of a batch: a step of vLLM, and the largest it could make, has far fewer. A hash of one byte
/// becomes 24 in memory, so that without a bound a frame would take many times its size.
pub(super) const MAX_ITEMS: usize = 1 << 18;

/// Events of a batch, for the same reason: each takes about 200 bytes.
pub(super) const MAX_EVENTS: usize = 1 << 16;

/// The bytes of a batch are damaged, or they are no batch: nothing in it can be trusted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The payload ends inside a value.
    #[error("event batch ends at byte {offset}, expected {expected}")]
    Truncated {
        /// Length of the payload.
        offset: usize,
        /// What was to follow.
        expected: &'static str,
    },
    /// A string, array or map claims to be longer than the rest of the payload.
    #[error("{what} of length {found} at byte {offset} of an event batch, expected at most {remaining} more bytes")]
    Length {
        /// Where the value starts.
        offset: usize,
        /// Its type.
        what: &'static str,
        /// Its declared length: bytes, elements or pairs.
        found: u32,
        /// Bytes after the declaration.
        remaining: usize,
    },
    /// The value is nested too deeply to be a part of a batch.
    #[error("value at byte {offset} of an event batch is nested deeper than {MAX_DEPTH} levels")]
    Depth {
        /// Where the value starts.
        offset: usize,
    },
    /// The value has another type than a batch has there.
    #[error("found {found} at byte {offset} of an event batch, expected {expected}")]
    Unexpected {
        /// Where the value starts.
        offset: usize,
        /// Its type.
        found: &'static str,
        /// What a batch has there.
        expected: &'static str,
    },
    /// The batch has no such field.
    #[error("event batch of {n_fields} fields has no {expected}")]
    Missing {
        /// Fields that it has.
        n_fields: usize,
        /// The field's name.
        expected: &'static str,
    },
    /// The batch has more parts than the payload's bytes may be turned into.
    #[error("event batch has more than {limit} {what} at byte {offset}")]
    Items {
        /// Where the one too many starts.
        offset: usize,
        /// What they are.
        what: &'static str,
        /// How many there may be.
        limit: usize,
    },
    /// Something follows the batch.
    #[error("{n_bytes} more bytes after the event batch, which ends at byte {offset}")]
    Trailing {
        /// Where the batch ends.
        offset: usize,
        /// Bytes after it.
        n_bytes: usize,
    },
}

impl WireError {
    /// What is wrong, as a metric names it.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Truncated { .. } => "truncated",
            Self::Length { .. } => "length",
            Self::Depth { .. } => "depth",
            Self::Unexpected { .. } => "unexpected",
            Self::Missing { .. } => "missing",
            Self::Items { .. } => "items",
            Self::Trailing { .. } => "trailing",
        }
    }
}

/// Bytes of an integer of up to 32 bits in its shortest form, by its marker; 0 for everything else.
///
/// A table, since the widths of token ids follow no pattern that a branch could be predicted by.
const UINT_WIDTHS: [u8; 256] = {
    let mut widths = [0; 256];
    let mut marker = 0;
    while marker < 0x80 {
        widths[marker] = 1;
        marker += 1;
    }
    widths[0xcc] = 2;
    widths[0xcd] = 3;
    widths[0xce] = 5;
    widths
};

/// Why a value was not read.
#[derive(Debug)]
pub(super) enum Fault {
    /// It is well-formed, but not what the event format has there: costs the event.
    Unfit,
    /// It is not well-formed: costs the batch.
    Damage(WireError),
}

impl From<WireError> for Fault {
    fn from(error: WireError) -> Self {
        Self::Damage(error)
    }
}

/// A scalar, or the start of a container.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Head<'a> {
    Nil,
    Bool,
    /// Any integer from 0, whatever its encoding.
    Uint(u64),
    Negative(i64),
    Float(f64),
    Str(&'a [u8]),
    Bin(&'a [u8]),
    Ext,
    /// That many elements follow.
    Array(usize),
    /// That many pairs follow.
    Map(usize),
}

impl Head<'_> {
    pub(super) fn type_name(&self) -> &'static str {
        match self {
            Self::Nil => "nil",
            Self::Bool => "a boolean",
            Self::Uint(_) => "an integer",
            Self::Negative(_) => "a negative integer",
            Self::Float(_) => "a float",
            Self::Str(_) => "a string",
            Self::Bin(_) => "a byte string",
            Self::Ext => "an extension",
            Self::Array(_) => "an array",
            Self::Map(_) => "a map",
        }
    }
}

/// A position in a payload.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cursor<'a> {
    payload: &'a [u8],
    offset: usize,
    /// Hashes and extra keys that may still be read.
    n_items_left: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(payload: &'a [u8]) -> Self {
        Self { payload, offset: 0, n_items_left: MAX_ITEMS }
    }

    /// Goes back to an earlier position; what was read since then still counts.
    pub(super) fn rewind(&mut self, start: Self) {
        self.offset = start.offset;
    }

    /// Counts `n_items` that are about to be read.
    pub(super) fn count(&mut self, n_items: usize) -> Result<(), WireError> {
        let left = self.n_items_left.checked_sub(n_items);
        let error = WireError::Items { offset: self.offset, what: "hashes and extra keys", limit: MAX_ITEMS };
        self.n_items_left = left.ok_or(error)?;
        Ok(())
    }

    pub(super) fn offset(&self) -> usize {
        self.offset
    }

    /// The bytes from `start` up to here.
    pub(super) fn since(&self, start: usize) -> &'a [u8] {
        &self.payload[start..self.offset]
    }

    /// Bytes that are left.
    pub(super) fn remaining(&self) -> usize {
        self.payload.len() - self.offset
    }

    /// Reads one head.
    #[inline]
    pub(super) fn head(&mut self) -> Result<Head<'a>, WireError> {
        let start = self.offset;
        let [marker] = self.take("a value")?;
        Ok(match marker {
            0x00..=0x7f => Head::Uint(u64::from(marker)),
            0x80..=0x8f => self.map(start, u32::from(marker & 0x0f))?,
            0x90..=0x9f => self.array(start, u32::from(marker & 0x0f))?,
            0xa0..=0xbf => Head::Str(self.bytes(start, "string", u32::from(marker & 0x1f))?),
            0xc0 => Head::Nil,
            0xc1 => {
                return Err(WireError::Unexpected { offset: start, found: "the unused marker", expected: "a value" });
            }
            0xc2 | 0xc3 => Head::Bool,
            0xc4..=0xc6 => {
                let len = self.length(marker - 0xc4)?;
                Head::Bin(self.bytes(start, "byte string", len)?)
            }
            0xc7..=0xc9 => {
                let len = self.length(marker - 0xc7)?;
                self.extension(start, len)?
            }
            0xca => Head::Float(f64::from(f32::from_be_bytes(self.take("a float")?))),
            0xcb => Head::Float(f64::from_be_bytes(self.take("a float")?)),
            0xcc => Head::Uint(u64::from(u8::from_be_bytes(self.take("an integer")?))),
            0xcd => Head::Uint(u64::from(u16::from_be_bytes(self.take("an integer")?))),
            0xce => Head::Uint(u64::from(u32::from_be_bytes(self.take("an integer")?))),
            0xcf => Head::Uint(u64::from_be_bytes(self.take("an integer")?)),
            0xd0 => signed(i64::from(i8::from_be_bytes(self.take("an integer")?))),
            0xd1 => signed(i64::from(i16::from_be_bytes(self.take("an integer")?))),
            0xd2 => signed(i64::from(i32::from_be_bytes(self.take("an integer")?))),
            0xd3 => signed(i64::from_be_bytes(self.take("an integer")?)),
            0xd4..=0xd8 => self.extension(start, 1 << (marker - 0xd4))?,
            0xd9..=0xdb => {
                let len = self.length(marker - 0xd9)?;
                Head::Str(self.bytes(start, "string", len)?)
            }
            0xdc | 0xdd => {
                let len = self.length(marker - 0xdc + 1)?;
                self.array(start, len)?
            }
            0xde | 0xdf => {
                let len = self.length(marker - 0xde + 1)?;
                self.map(start, len)?
            }
            0xe0..=0xff => Head::Negative(i64::from(marker.cast_signed())),
        })
    }

    /// Steps over one value on level `depth`, whatever it is.
    pub(super) fn skip(&mut self, depth: u32) -> Result<(), WireError> {
        let offset = self.offset;
        if depth > MAX_DEPTH {
            return Err(WireError::Depth { offset });
        }
        let n_elements = match self.head()? {
            Head::Array(n_elements) => n_elements,
            Head::Map(n_pairs) => 2 * n_pairs,
            _ => 0,
        };
        (0..n_elements).try_for_each(|_| self.skip(depth + 1))
    }

    /// Steps over `n` integers from 0 to 2^32-1.
    pub(super) fn skip_u32s(&mut self, n: usize) -> Result<(), Fault> {
        for _ in 0..n {
            let width = self.payload.get(self.offset).map_or(0, |marker| UINT_WIDTHS[usize::from(*marker)]);
            let end = self.offset + usize::from(width);
            if width == 0 || end > self.payload.len() {
                self.u32()?;
            } else {
                self.offset = end;
            }
        }
        Ok(())
    }

    /// Reads an integer from 0 to 2^32-1.
    pub(super) fn u32(&mut self) -> Result<u32, Fault> {
        match self.head()? {
            Head::Uint(int) => u32::try_from(int).map_err(|_| Fault::Unfit),
            _ => Err(Fault::Unfit),
        }
    }

    /// Reads a string.
    pub(super) fn str(&mut self) -> Result<&'a str, Fault> {
        match self.head()? {
            Head::Str(bytes) => std::str::from_utf8(bytes).map_err(|_| Fault::Unfit),
            _ => Err(Fault::Unfit),
        }
    }

    /// Reads the length of an array.
    pub(super) fn array_len(&mut self) -> Result<usize, Fault> {
        match self.head()? {
            Head::Array(n_elements) => Ok(n_elements),
            _ => Err(Fault::Unfit),
        }
    }

    /// Reads nil as none, anything else with `read`.
    pub(super) fn optional<T>(&mut self, read: impl FnOnce(&mut Self) -> Result<T, Fault>) -> Result<Option<T>, Fault> {
        if self.payload.get(self.offset) == Some(&0xc0) {
            self.offset += 1;
            return Ok(None);
        }
        read(self).map(Some)
    }

    #[inline]
    fn take<const N: usize>(&mut self, expected: &'static str) -> Result<[u8; N], WireError> {
        let bytes = self.payload[self.offset..].first_chunk();
        let bytes = bytes.ok_or(WireError::Truncated { offset: self.payload.len(), expected })?;
        self.offset += N;
        Ok(*bytes)
    }

    /// A length of 1, 2 or 4 bytes, for a `width` of 0, 1 or 2.
    fn length(&mut self, width: u8) -> Result<u32, WireError> {
        Ok(match width {
            0 => u32::from(u8::from_be_bytes(self.take("a length")?)),
            1 => u32::from(u16::from_be_bytes(self.take("a length")?)),
            _ => u32::from_be_bytes(self.take("a length")?),
        })
    }

    fn bytes(&mut self, start: usize, what: &'static str, len: u32) -> Result<&'a [u8], WireError> {
        let n_bytes = self.checked(start, what, len, u64::from(len))?;
        let bytes = &self.payload[self.offset..self.offset + n_bytes];
        self.offset += n_bytes;
        Ok(bytes)
    }

    fn extension(&mut self, start: usize, len: u32) -> Result<Head<'a>, WireError> {
        let [_kind] = self.take::<1>("an extension type")?;
        self.bytes(start, "extension", len)?;
        Ok(Head::Ext)
    }

    fn array(&self, start: usize, len: u32) -> Result<Head<'a>, WireError> {
        self.checked(start, "array", len, u64::from(len)).map(Head::Array)
    }

    fn map(&self, start: usize, len: u32) -> Result<Head<'a>, WireError> {
        self.checked(start, "map", len, 2 * u64::from(len)).map(|n_values| Head::Map(n_values / 2))
    }

    /// `min_bytes`, if the rest of the payload can hold them.
    fn checked(&self, start: usize, what: &'static str, len: u32, min_bytes: u64) -> Result<usize, WireError> {
        let remaining = self.remaining();
        let fitting = usize::try_from(min_bytes).ok().filter(|n_bytes| *n_bytes <= remaining);
        fitting.ok_or(WireError::Length { offset: start, what, found: len, remaining })
    }
}

fn signed(int: i64) -> Head<'static> {
    u64::try_from(int).map_or(Head::Negative(int), Head::Uint)
}
