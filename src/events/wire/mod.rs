//! Decodes vLLM's event batches by walking the msgpack bytes.
//!
//! Every form that a release from 0.10 to 0.32 has sent is read (`vllm/distributed/kv_events.py`): events as arrays (up
//! to 0.23) or maps, batches as arrays (every release) or a map (the main branch for a while), hashes as integers or
//! byte strings. So are those of SGLang (`sglang/srt/disaggregation/kv_events.py`): vLLM's arrays without the fields
//! after `lora_id`, and with hashes that are signed. Unknown fields are stepped over.
//!
//! Two kinds of trouble are kept apart. An event that is well-formed msgpack but not as the format says (an unknown
//! tag, a field of another type, a required field missing) is skipped and counted; the rest of its batch stands. Damage
//! to the msgpack itself (truncation, trailing bytes, a length beyond the payload, nesting deeper than 32 levels) is a
//! [`WireError`], since nothing after it can be trusted.
//!
//! Strings, byte strings, token ids and extra keys borrow from the payload; only the lists of events and hashes are
//! allocated, and they are bounded: a payload of 16 MiB, whatever is in it, takes about twice that.

mod msgpack;
#[cfg(test)]
mod tests;

use crate::routing::hash::BlockHash;
use msgpack::{Cursor, Fault, Head, MAX_EVENTS};

pub use msgpack::WireError;

/// One event batch: everything that one scheduler step did to one rank's cache.
#[derive(Debug)]
pub struct EventBatch<'a> {
    /// Publisher's clock, seconds since the Unix epoch.
    pub ts: f64,
    /// Data-parallel rank, absent from old publishers.
    pub rank: Option<u32>,
    /// The events in cause order.
    pub events: Vec<Event<'a>>,
    /// Events that were skipped: unknown tags or events that are not as the format says.
    pub n_skipped: u32,
}

/// One KV-cache event.
#[derive(Debug)]
pub enum Event<'a> {
    /// Blocks entered the cache.
    BlockStored(BlockStored<'a>),
    /// Blocks left the cache.
    BlockRemoved(BlockRemoved<'a>),
    /// The whole cache of the rank was dropped.
    AllBlocksCleared,
    /// One tier of the rank's cache was dropped (vLLM's main branch after 0.32, if asked for).
    TierBlocksCleared {
        /// The tier, named as in the other events.
        medium: Option<&'a str>,
    },
}

/// Blocks entered the cache.
#[derive(Debug)]
pub struct BlockStored<'a> {
    /// Hashes of the stored blocks, in chain order; may be empty.
    pub block_hashes: Vec<EngineHash<'a>>,
    /// Hash of the block before the first one; none for the first block of a prompt.
    pub parent: Option<EngineHash<'a>>,
    /// Token ids of the covered range, still encoded; sparse groups cover more than they have hashes for.
    pub token_ids: TokenIds<'a>,
    /// Tokens per block; 0 in placeholders of offload tiers.
    pub block_size: u32,
    /// Where the blocks lie: `GPU`, `CPU`, `STORAGE`; none means GPU.
    pub medium: Option<&'a str>,
    /// Engine-local number of the adapter: the only trace of one before vLLM 0.14.
    pub lora_id: Option<u64>,
    /// Name of the adapter; none before vLLM 0.14.
    pub lora_name: Option<&'a str>,
    /// Untagged extra keys, one entry per block, still encoded; none before vLLM 0.17.
    pub extra_keys: Option<ExtraKeys<'a>>,
    /// KV-cache group.
    pub group_idx: Option<u32>,
    /// Kind of that group, such as `full_attention`.
    pub spec_kind: Option<&'a str>,
}

/// Blocks left the cache.
#[derive(Debug)]
pub struct BlockRemoved<'a> {
    /// Hashes of the removed blocks.
    pub block_hashes: Vec<EngineHash<'a>>,
    /// Where the blocks lay.
    pub medium: Option<&'a str>,
    /// KV-cache group.
    pub group_idx: Option<u32>,
}

/// A block hash as the engine wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineHash<'a> {
    /// `VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES=1` (default): the low 64 bits. Of a negative integer, as SGLang sends
    /// it, the two's complement.
    Int(u64),
    /// The whole digest.
    Bytes(&'a [u8]),
}

impl EngineHash<'_> {
    /// The low 64 bits, which both forms have.
    pub fn low64(&self) -> BlockHash {
        match self {
            Self::Int(hash) => BlockHash(*hash),
            // A shorter byte string is the whole of a smaller number.
            Self::Bytes(bytes) => BlockHash(match bytes.last_chunk() {
                Some(low) => u64::from_be_bytes(*low),
                None => bytes.iter().fold(0, |hash, byte| hash << 8 | u64::from(*byte)),
            }),
        }
    }
}

/// Token ids, checked when the batch was decoded and read on demand.
#[derive(Clone, Copy, Debug, Default)]
pub struct TokenIds<'a> {
    len: usize,
    bytes: &'a [u8],
}

impl<'a> TokenIds<'a> {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none, as in placeholders of offload tiers.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The token ids.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = u32> + use<'a> {
        let mut cursor = Cursor::new(self.bytes);
        (0..self.len).map(move |_| cursor.u32().expect("token ids were checked when the batch was decoded"))
    }

    /// The token ids, decoded.
    pub fn to_vec(&self) -> Vec<u32> {
        self.iter().collect()
    }

    /// Appends the token ids to `tokens`.
    pub fn decode_into(&self, tokens: &mut Vec<u32>) {
        tokens.extend(self.iter());
    }
}

/// Extra keys of an event's blocks, checked when the batch was decoded and read on demand: most blocks have none.
#[derive(Clone, Copy, Debug)]
pub struct ExtraKeys<'a> {
    n_blocks: usize,
    bytes: &'a [u8],
}

impl<'a> ExtraKeys<'a> {
    /// Number of blocks that have an entry.
    pub fn n_blocks(&self) -> usize {
        self.n_blocks
    }

    /// The entries, empty for a block without extra keys.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = BlockKeys<'a>> + use<'a> {
        let mut cursor = Cursor::new(self.bytes);
        (0..self.n_blocks).map(move |_| block_keys(&mut cursor).expect("extra keys were checked with the batch"))
    }
}

/// Extra keys of one block.
#[derive(Clone, Copy, Debug)]
pub struct BlockKeys<'a> {
    n_items: usize,
    bytes: &'a [u8],
}

impl<'a> BlockKeys<'a> {
    /// Number of items.
    pub fn len(&self) -> usize {
        self.n_items
    }

    /// Whether the block has no extra keys.
    pub fn is_empty(&self) -> bool {
        self.n_items == 0
    }

    /// The items, in vLLM's order: adapter, multimodal items, salt, embeddings.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = ExtraItem<'a>> + use<'a> {
        let mut cursor = Cursor::new(self.bytes);
        (0..self.n_items).map(move |_| extra_item(&mut cursor).expect("extra keys were checked with the batch"))
    }
}

/// One untagged item of a block's extra keys.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ExtraItem<'a> {
    /// Adapter name or cache salt: which of the two, `lora_name` and the position tell.
    Str(&'a str),
    /// Multimodal item: identifier and offset relative to the block's start.
    Mm(&'a str, i64),
    /// Digest of prompt embeddings.
    Bytes(&'a [u8]),
    /// Something else, as its bytes.
    Other(&'a [u8]),
}

/// Level of the batch's fields, of the events, of their fields and of the items of their extra keys in a payload, whose
/// top level is 1.
const BATCH_FIELD_DEPTH: u32 = 2;
const EVENT_DEPTH: u32 = 3;
const EVENT_FIELD_DEPTH: u32 = 4;
const EXTRA_ITEM_DEPTH: u32 = 6;

/// Bytes of the shortest event, `["BlockRemoved", []]`.
const MIN_EVENT_LEN: usize = 15;

/// Bytes of an integer hash, but for one in 2^32. What is allocated on a sender's word is held against it.
const USUAL_HASH_LEN: usize = 9;

/// Bytes of a hash's low 64 bits, the least that a byte string must have to be one.
const MIN_HASH_LEN: usize = 8;

/// Fields in the order of the array forms.
const BATCH_FIELDS: &[&[u8]] = &[b"ts", b"events", b"data_parallel_rank"];
const STORED_FIELDS: &[&[u8]] = &[
    b"block_hashes",
    b"parent_block_hash",
    b"token_ids",
    b"block_size",
    b"lora_id",
    b"medium",
    b"lora_name",
    b"extra_keys",
    b"group_idx",
    b"kv_cache_spec_kind",
];
const REMOVED_FIELDS: &[&[u8]] = &[b"block_hashes", b"medium", b"group_idx"];
const TIER_CLEARED_FIELDS: &[&[u8]] = &[b"medium"];

impl<'a> EventBatch<'a> {
    /// Decodes the payload of one message.
    ///
    /// # Errors
    /// The payload is not well-formed msgpack, or it is not a batch.
    pub fn decode(payload: &'a [u8]) -> Result<Self, WireError> {
        let mut cursor = Cursor::new(payload);
        let record = match cursor.head()? {
            Head::Array(n_fields) => Record::Array { n_fields, names: BATCH_FIELDS },
            Head::Map(n_fields) => Record::Map { n_fields },
            other => return Err(unexpected(0, other, "an array or a map")),
        };
        let batch = batch(&mut cursor, record)?;
        match cursor.remaining() {
            0 => Ok(batch),
            n_bytes => Err(WireError::Trailing { offset: cursor.offset(), n_bytes }),
        }
    }
}

/// How msgspec wrote a struct.
#[derive(Clone, Copy)]
enum Record {
    /// The values alone; those beyond the known names are a later release's.
    Array { n_fields: usize, names: &'static [&'static [u8]] },
    /// Pairs of name and value, in any order.
    Map { n_fields: usize },
}

impl Record {
    fn n_fields(self) -> usize {
        match self {
            Self::Array { n_fields, .. } | Self::Map { n_fields } => n_fields,
        }
    }

    /// Name of the field that the cursor has reached, empty for one that nobody knows.
    fn field<'a>(self, cursor: &mut Cursor<'a>, field_idx: usize, depth: u32) -> Result<&'a [u8], WireError> {
        match self {
            Self::Array { names, .. } => Ok(names.get(field_idx).copied().unwrap_or_default()),
            Self::Map { .. } => name(cursor, depth),
        }
    }
}

fn name<'a>(cursor: &mut Cursor<'a>, depth: u32) -> Result<&'a [u8], WireError> {
    let start = *cursor;
    if let Head::Str(name) = cursor.head()? {
        return Ok(name);
    }
    *cursor = start;
    cursor.skip(depth)?;
    Ok(b"")
}

fn batch<'a>(cursor: &mut Cursor<'a>, record: Record) -> Result<EventBatch<'a>, WireError> {
    let (mut ts, mut rank, mut decoded) = (None, None, None);
    for field_idx in 0..record.n_fields() {
        match record.field(cursor, field_idx, BATCH_FIELD_DEPTH)? {
            b"ts" => ts = Some(timestamp(cursor)?),
            b"events" => decoded = Some(events(cursor)?),
            b"data_parallel_rank" => rank = data_parallel_rank(cursor)?,
            _ => cursor.skip(BATCH_FIELD_DEPTH)?,
        }
    }
    let missing = |expected| WireError::Missing { n_fields: record.n_fields(), expected };
    let ts = ts.ok_or(missing("ts"))?;
    let (events, n_skipped) = decoded.ok_or(missing("events"))?;
    Ok(EventBatch { ts, rank, events, n_skipped })
}

fn timestamp(cursor: &mut Cursor<'_>) -> Result<f64, WireError> {
    let offset = cursor.offset();
    match cursor.head()? {
        Head::Float(seconds) => Ok(seconds),
        Head::Uint(seconds) => Ok(seconds as f64),
        other => Err(unexpected(offset, other, "a float")),
    }
}

/// None as well for what cannot be a rank: the rank that counts is the one that was dialled.
fn data_parallel_rank(cursor: &mut Cursor<'_>) -> Result<Option<u32>, WireError> {
    let start = *cursor;
    if let Head::Uint(rank) = cursor.head()? {
        return Ok(u32::try_from(rank).ok());
    }
    *cursor = start;
    cursor.skip(BATCH_FIELD_DEPTH)?;
    Ok(None)
}

fn events<'a>(cursor: &mut Cursor<'a>) -> Result<(Vec<Event<'a>>, u32), WireError> {
    let offset = cursor.offset();
    let n_events = match cursor.head()? {
        Head::Array(n_events) => n_events,
        other => return Err(unexpected(offset, other, "an array of events")),
    };
    if n_events > MAX_EVENTS {
        return Err(WireError::Items { offset, what: "events", limit: MAX_EVENTS });
    }
    let mut events = Vec::with_capacity(n_events.min(cursor.remaining() / MIN_EVENT_LEN));
    let mut n_skipped = 0;
    for _ in 0..n_events {
        let start = *cursor;
        match event(cursor) {
            Ok(event) => events.push(event),
            Err(Fault::Damage(error)) => return Err(error),
            Err(Fault::Unfit) => {
                cursor.rewind(start);
                cursor.skip(EVENT_DEPTH)?;
                n_skipped += 1;
            }
        }
    }
    Ok((events, n_skipped))
}

fn event<'a>(cursor: &mut Cursor<'a>) -> Result<Event<'a>, Fault> {
    match cursor.head()? {
        Head::Array(n_elements) => {
            let n_fields = n_elements.checked_sub(1).ok_or(Fault::Unfit)?;
            let tag = cursor.str()?;
            tagged(cursor, tag, |names| Record::Array { n_fields, names })
        }
        Head::Map(n_fields) => {
            // The fields are met again below: there the tag is one that nobody knows.
            let tag = tag(&mut Cursor::clone(cursor), n_fields)?;
            tagged(cursor, tag, |_| Record::Map { n_fields })
        }
        _ => Err(Fault::Unfit),
    }
}

/// The tag of an event that is a map; msgspec writes it first.
fn tag<'a>(cursor: &mut Cursor<'a>, n_fields: usize) -> Result<&'a str, Fault> {
    for _ in 0..n_fields {
        match name(cursor, EVENT_FIELD_DEPTH)? {
            b"type" => return cursor.str(),
            _ => cursor.skip(EVENT_FIELD_DEPTH)?,
        }
    }
    Err(Fault::Unfit)
}

fn tagged<'a>(
    cursor: &mut Cursor<'a>,
    tag: &str,
    record: impl FnOnce(&'static [&'static [u8]]) -> Record,
) -> Result<Event<'a>, Fault> {
    match tag {
        "BlockStored" => block_stored(cursor, record(STORED_FIELDS)).map(Event::BlockStored),
        "BlockRemoved" => block_removed(cursor, record(REMOVED_FIELDS)).map(Event::BlockRemoved),
        "AllBlocksCleared" => all_blocks_cleared(cursor, record(&[])),
        "TierBlocksCleared" => tier_blocks_cleared(cursor, record(TIER_CLEARED_FIELDS)),
        _ => Err(Fault::Unfit),
    }
}

fn block_stored<'a>(cursor: &mut Cursor<'a>, record: Record) -> Result<BlockStored<'a>, Fault> {
    let (mut block_hashes, mut parent, mut tokens, mut block_size) = (None, None, None, None);
    let (mut lora_id, mut lora_name, mut medium) = (None, None, None);
    let (mut keys, mut group_idx, mut spec_kind) = (None, None, None);
    for field_idx in 0..record.n_fields() {
        match record.field(cursor, field_idx, EVENT_FIELD_DEPTH)? {
            b"block_hashes" => block_hashes = Some(engine_hashes(cursor)?),
            b"parent_block_hash" => parent = Some(cursor.optional(engine_hash)?),
            b"token_ids" => tokens = Some(token_ids(cursor)?),
            b"block_size" => block_size = Some(cursor.u32()?),
            b"lora_id" => lora_id = cursor.optional(uint)?,
            b"medium" => medium = cursor.optional(Cursor::str)?,
            b"lora_name" => lora_name = cursor.optional(Cursor::str)?,
            b"extra_keys" => keys = cursor.optional(extra_keys)?,
            b"group_idx" => group_idx = cursor.optional(Cursor::u32)?,
            b"kv_cache_spec_kind" => spec_kind = cursor.optional(Cursor::str)?,
            _ => cursor.skip(EVENT_FIELD_DEPTH)?,
        }
    }
    Ok(BlockStored {
        block_hashes: block_hashes.ok_or(Fault::Unfit)?,
        // A parent that is missing is not nil: taken for a root, the blocks would answer for other prompts.
        parent: parent.ok_or(Fault::Unfit)?,
        token_ids: tokens.ok_or(Fault::Unfit)?,
        block_size: block_size.ok_or(Fault::Unfit)?,
        medium,
        lora_id,
        lora_name,
        extra_keys: keys,
        group_idx,
        spec_kind,
    })
}

fn block_removed<'a>(cursor: &mut Cursor<'a>, record: Record) -> Result<BlockRemoved<'a>, Fault> {
    let (mut block_hashes, mut medium, mut group_idx) = (None, None, None);
    for field_idx in 0..record.n_fields() {
        match record.field(cursor, field_idx, EVENT_FIELD_DEPTH)? {
            b"block_hashes" => block_hashes = Some(engine_hashes(cursor)?),
            b"medium" => medium = cursor.optional(Cursor::str)?,
            b"group_idx" => group_idx = cursor.optional(Cursor::u32)?,
            _ => cursor.skip(EVENT_FIELD_DEPTH)?,
        }
    }
    Ok(BlockRemoved { block_hashes: block_hashes.ok_or(Fault::Unfit)?, medium, group_idx })
}

fn all_blocks_cleared<'a>(cursor: &mut Cursor<'a>, record: Record) -> Result<Event<'a>, Fault> {
    for field_idx in 0..record.n_fields() {
        record.field(cursor, field_idx, EVENT_FIELD_DEPTH)?;
        cursor.skip(EVENT_FIELD_DEPTH)?;
    }
    Ok(Event::AllBlocksCleared)
}

fn tier_blocks_cleared<'a>(cursor: &mut Cursor<'a>, record: Record) -> Result<Event<'a>, Fault> {
    let mut medium = None;
    for field_idx in 0..record.n_fields() {
        match record.field(cursor, field_idx, EVENT_FIELD_DEPTH)? {
            b"medium" => medium = cursor.optional(Cursor::str)?,
            _ => cursor.skip(EVENT_FIELD_DEPTH)?,
        }
    }
    Ok(Event::TierBlocksCleared { medium })
}

fn engine_hashes<'a>(cursor: &mut Cursor<'a>) -> Result<Vec<EngineHash<'a>>, Fault> {
    let n_hashes = cursor.array_len()?;
    cursor.count(n_hashes)?;
    let mut hashes = Vec::with_capacity(n_hashes.min(cursor.remaining() / USUAL_HASH_LEN));
    for _ in 0..n_hashes {
        hashes.push(engine_hash(cursor)?);
    }
    Ok(hashes)
}

/// Negative integers are those of SGLang, and of vLLM 0.9: no root of ours makes them.
fn engine_hash<'a>(cursor: &mut Cursor<'a>) -> Result<EngineHash<'a>, Fault> {
    match cursor.head()? {
        Head::Uint(hash) => Ok(EngineHash::Int(hash)),
        Head::Negative(hash) => Ok(EngineHash::Int(hash.cast_unsigned())),
        Head::Bin(hash) if hash.len() >= MIN_HASH_LEN => Ok(EngineHash::Bytes(hash)),
        _ => Err(Fault::Unfit),
    }
}

fn token_ids<'a>(cursor: &mut Cursor<'a>) -> Result<TokenIds<'a>, Fault> {
    let len = cursor.array_len()?;
    let start = cursor.offset();
    cursor.skip_u32s(len)?;
    Ok(TokenIds { len, bytes: cursor.since(start) })
}

fn extra_keys<'a>(cursor: &mut Cursor<'a>) -> Result<ExtraKeys<'a>, Fault> {
    let n_blocks = cursor.array_len()?;
    cursor.count(n_blocks)?;
    let start = cursor.offset();
    for _ in 0..n_blocks {
        let keys = block_keys(cursor)?;
        cursor.count(keys.len())?;
    }
    Ok(ExtraKeys { n_blocks, bytes: cursor.since(start) })
}

fn block_keys<'a>(cursor: &mut Cursor<'a>) -> Result<BlockKeys<'a>, Fault> {
    let n_items = cursor.optional(Cursor::array_len)?.unwrap_or(0);
    let start = cursor.offset();
    for _ in 0..n_items {
        extra_item(cursor)?;
    }
    Ok(BlockKeys { n_items, bytes: cursor.since(start) })
}

fn extra_item<'a>(cursor: &mut Cursor<'a>) -> Result<ExtraItem<'a>, Fault> {
    let start = *cursor;
    match known_extra_item(cursor) {
        Err(Fault::Unfit) => {
            cursor.rewind(start);
            cursor.skip(EXTRA_ITEM_DEPTH)?;
            Ok(ExtraItem::Other(cursor.since(start.offset())))
        }
        known_or_damaged => known_or_damaged,
    }
}

fn known_extra_item<'a>(cursor: &mut Cursor<'a>) -> Result<ExtraItem<'a>, Fault> {
    match cursor.head()? {
        Head::Str(text) => std::str::from_utf8(text).map(ExtraItem::Str).map_err(|_| Fault::Unfit),
        Head::Bin(digest) => Ok(ExtraItem::Bytes(digest)),
        Head::Array(2) => Ok(ExtraItem::Mm(cursor.str()?, int(cursor)?)),
        _ => Err(Fault::Unfit),
    }
}

fn uint(cursor: &mut Cursor<'_>) -> Result<u64, Fault> {
    match cursor.head()? {
        Head::Uint(int) => Ok(int),
        _ => Err(Fault::Unfit),
    }
}

fn int(cursor: &mut Cursor<'_>) -> Result<i64, Fault> {
    match cursor.head()? {
        Head::Uint(int) => i64::try_from(int).map_err(|_| Fault::Unfit),
        Head::Negative(int) => Ok(int),
        _ => Err(Fault::Unfit),
    }
}

fn unexpected(offset: usize, found: Head<'_>, expected: &'static str) -> WireError {
    WireError::Unexpected { offset, found: found.type_name(), expected }
}
