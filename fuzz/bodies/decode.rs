//! What has to be true of the decoder for any bytes: it does not panic, makes no more of them than there is, and agrees
//! with a reader that first builds the whole tree of values and then looks what it means.

use rmp::Marker;
use warmroute::events::wire::{Event, EventBatch, ExtraItem, WireError};

/// Deepest nesting that both readers accept for sure.
const SURE_DEPTH: u32 = 31;

pub fn run(bytes: &[u8]) {
    let decoded = EventBatch::decode(bytes);
    let tree = Reader { rest: bytes, max_depth: 0 }.whole();
    match (&decoded, &tree) {
        (Ok(batch), tree) => {
            let (tree, _) = tree.as_ref().expect("what is decoded is well-formed");
            let events = tree.batch_events().expect("what is decoded has a time and events");
            let expected: Vec<Told> = events.iter().filter_map(Told::expected).collect();
            let found: Vec<Told> = batch.events.iter().map(Told::found).collect();
            assert_eq!(found, expected);
            assert_eq!(batch.events.len() + batch.n_skipped as usize, events.len());
        }
        // More than anyone takes at once.
        (Err(WireError::Items { .. }), _) => {}
        (Err(error), Some((tree, depth))) if *depth <= SURE_DEPTH => {
            assert!(tree.batch_events().is_none(), "{error}, although it is a batch: {tree:?}");
        }
        (Err(_), _) => {}
    }
}

/// Any msgpack value.
#[derive(Clone, Debug, PartialEq)]
enum Value {
    Nil,
    Uint(u64),
    Negative(i64),
    Float(f64),
    Str(Vec<u8>),
    Bin(Vec<u8>),
    /// Booleans and extensions, which no event has.
    Other,
    Array(Vec<Value>),
    Map(Vec<(Value, Value)>),
}

/// Reads values one after the other.
struct Reader<'a> {
    rest: &'a [u8],
    max_depth: u32,
}

impl<'a> Reader<'a> {
    /// The one value that all bytes are, and its depth.
    fn whole(mut self) -> Option<(Value, u32)> {
        let value = self.value(1)?;
        self.rest.is_empty().then_some((value, self.max_depth))
    }

    fn value(&mut self, depth: u32) -> Option<Value> {
        // Deeper ones are refused by the decoder, and would only exhaust the stack here.
        if depth > 64 {
            return None;
        }
        self.max_depth = self.max_depth.max(depth);
        let marker = Marker::from_u8(self.uint(1)? as u8);
        Some(match marker {
            Marker::Null => Value::Nil,
            Marker::True | Marker::False => Value::Other,
            Marker::Reserved => return None,
            Marker::FixPos(int) => Value::Uint(u64::from(int)),
            Marker::FixNeg(int) => Value::Negative(i64::from(int)),
            Marker::U8 => Value::Uint(self.uint(1)?),
            Marker::U16 => Value::Uint(self.uint(2)?),
            Marker::U32 => Value::Uint(self.uint(4)?),
            Marker::U64 => Value::Uint(self.uint(8)?),
            Marker::I8 => signed(i64::from(self.uint(1)? as i8)),
            Marker::I16 => signed(i64::from(self.uint(2)? as i16)),
            Marker::I32 => signed(i64::from(self.uint(4)? as i32)),
            Marker::I64 => signed(self.uint(8)? as i64),
            Marker::F32 => Value::Float(f64::from(f32::from_bits(self.uint(4)? as u32))),
            Marker::F64 => Value::Float(f64::from_bits(self.uint(8)?)),
            Marker::FixStr(len) => Value::Str(self.bytes(u64::from(len))?),
            Marker::Str8 => self.sized(1).map(Value::Str)?,
            Marker::Str16 => self.sized(2).map(Value::Str)?,
            Marker::Str32 => self.sized(4).map(Value::Str)?,
            Marker::Bin8 => self.sized(1).map(Value::Bin)?,
            Marker::Bin16 => self.sized(2).map(Value::Bin)?,
            Marker::Bin32 => self.sized(4).map(Value::Bin)?,
            Marker::FixArray(len) => self.array(u64::from(len), depth)?,
            Marker::Array16 => self.uint(2).and_then(|len| self.array(len, depth))?,
            Marker::Array32 => self.uint(4).and_then(|len| self.array(len, depth))?,
            Marker::FixMap(len) => self.map(u64::from(len), depth)?,
            Marker::Map16 => self.uint(2).and_then(|len| self.map(len, depth))?,
            Marker::Map32 => self.uint(4).and_then(|len| self.map(len, depth))?,
            Marker::FixExt1 => self.extension(1)?,
            Marker::FixExt2 => self.extension(2)?,
            Marker::FixExt4 => self.extension(4)?,
            Marker::FixExt8 => self.extension(8)?,
            Marker::FixExt16 => self.extension(16)?,
            Marker::Ext8 => self.uint(1).and_then(|len| self.extension(len))?,
            Marker::Ext16 => self.uint(2).and_then(|len| self.extension(len))?,
            Marker::Ext32 => self.uint(4).and_then(|len| self.extension(len))?,
        })
    }

    fn bytes(&mut self, len: u64) -> Option<Vec<u8>> {
        let (bytes, rest) = self.rest.split_at_checked(usize::try_from(len).ok()?)?;
        self.rest = rest;
        Some(bytes.to_vec())
    }

    fn sized(&mut self, n_bytes: u64) -> Option<Vec<u8>> {
        self.uint(n_bytes).and_then(|len| self.bytes(len))
    }

    fn uint(&mut self, n_bytes: u64) -> Option<u64> {
        Some(self.bytes(n_bytes)?.iter().fold(0, |int, byte| int << 8 | u64::from(*byte)))
    }

    fn array(&mut self, len: u64, depth: u32) -> Option<Value> {
        (0..len).map(|_| self.value(depth + 1)).collect::<Option<_>>().map(Value::Array)
    }

    fn map(&mut self, len: u64, depth: u32) -> Option<Value> {
        let pairs = (0..len).map(|_| Some((self.value(depth + 1)?, self.value(depth + 1)?)));
        pairs.collect::<Option<_>>().map(Value::Map)
    }

    fn extension(&mut self, len: u64) -> Option<Value> {
        self.bytes(1 + len).map(|_| Value::Other)
    }
}

fn signed(int: i64) -> Value {
    u64::try_from(int).map_or(Value::Negative(int), Value::Uint)
}

impl Value {
    /// The events, if this is a batch.
    fn batch_events(&self) -> Option<&[Value]> {
        let (ts, events) = match self {
            Self::Array(fields) => (fields.first()?, fields.get(1)?),
            Self::Map(_) => (self.last("ts")?, self.last("events")?),
            _ => return None,
        };
        // Whoever repeats a field has to mean it each time.
        let all =
            |name: &str, fits: fn(&Value) -> bool| self.pairs().iter().all(|(key, value)| !key.is(name) || fits(value));
        let is_time = |value: &Value| matches!(value, Value::Float(_) | Value::Uint(_));
        let fits = is_time(ts) && all("ts", is_time) && all("events", |value| matches!(value, Value::Array(_)));
        match events {
            Self::Array(events) if fits => Some(events),
            _ => None,
        }
    }

    fn pairs(&self) -> &[(Value, Value)] {
        match self {
            Self::Map(pairs) => pairs,
            _ => &[],
        }
    }

    fn is(&self, text: &str) -> bool {
        matches!(self, Self::Str(bytes) if bytes == text.as_bytes())
    }

    /// The last value under that key.
    fn last(&self, name: &str) -> Option<&Value> {
        self.pairs().iter().rfind(|(key, _)| key.is(name)).map(|(_, value)| value)
    }

    fn text(&self) -> Option<String> {
        match self {
            Self::Str(bytes) => String::from_utf8(bytes.clone()).ok(),
            _ => None,
        }
    }

    fn uint(&self) -> Option<u64> {
        match self {
            Self::Uint(int) => Some(*int),
            _ => None,
        }
    }

    fn u32(&self) -> Option<u32> {
        self.uint().and_then(|int| u32::try_from(int).ok())
    }

    fn list<T>(&self, read: impl Fn(&Value) -> Option<T>) -> Option<Vec<T>> {
        match self {
            Self::Array(values) => values.iter().map(read).collect(),
            _ => None,
        }
    }

    /// Nil as none; outer none: something else that does not fit.
    fn optional<T>(&self, read: impl Fn(&Value) -> Option<T>) -> Option<Option<T>> {
        match self {
            Self::Nil => Some(None),
            value => read(value).map(Some),
        }
    }

    fn hash(&self) -> Option<u64> {
        match self {
            Self::Uint(hash) => Some(*hash),
            Self::Negative(hash) => Some(hash.cast_unsigned()),
            Self::Bin(bytes) => bytes.last_chunk().map(|low| u64::from_be_bytes(*low)),
            _ => None,
        }
    }

    fn item(&self) -> Item {
        match self {
            Self::Str(_) => self.text().map_or(Item::Other, Item::Str),
            Self::Bin(bytes) => Item::Bytes(bytes.clone()),
            Self::Array(pair) if pair.len() == 2 => {
                let offset = match &pair[1] {
                    Self::Uint(int) => i64::try_from(*int).ok(),
                    Self::Negative(int) => Some(*int),
                    _ => None,
                };
                pair[0].text().zip(offset).map_or(Item::Other, |(identifier, offset)| Item::Mm(identifier, offset))
            }
            _ => Item::Other,
        }
    }
}

/// One item of a block's extra keys.
#[derive(Debug, PartialEq)]
enum Item {
    Str(String),
    Mm(String, i64),
    Bytes(Vec<u8>),
    Other,
}

/// What an event says, in a form of its own.
#[derive(Debug, PartialEq)]
enum Told {
    Stored {
        hashes: Vec<u64>,
        parent: Option<u64>,
        tokens: Vec<u32>,
        block_size: u32,
        lora: (Option<u64>, Option<String>),
        medium: Option<String>,
        extra_keys: Option<Vec<Vec<Item>>>,
        group: (Option<u32>, Option<String>),
    },
    Removed {
        hashes: Vec<u64>,
        medium: Option<String>,
        group_idx: Option<u32>,
    },
    Cleared,
    TierCleared(Option<String>),
}

/// The fields of an event that is an array, in their order.
const STORED: [&str; 10] = [
    "block_hashes",
    "parent_block_hash",
    "token_ids",
    "block_size",
    "lora_id",
    "medium",
    "lora_name",
    "extra_keys",
    "group_idx",
    "kv_cache_spec_kind",
];
const REMOVED: [&str; 3] = ["block_hashes", "medium", "group_idx"];

/// The fields of an event by name; a name may come more than once.
struct Fields<'a>(Vec<(&'a str, &'a Value)>);

impl<'a> Fields<'a> {
    fn of(event: &'a Value, names: &[&'static str]) -> Self {
        Self(match event {
            Value::Array(values) => names.iter().copied().zip(values.iter().skip(1)).collect(),
            _ => {
                let name = |key: &'a Value| match key {
                    Value::Str(bytes) => std::str::from_utf8(bytes).unwrap_or_default(),
                    _ => "",
                };
                event.pairs().iter().map(|(key, value)| (name(key), value)).collect()
            }
        })
    }

    /// The last value of that name; outer none: one of them does not fit.
    fn get<T>(&self, name: &str, read: impl Fn(&Value) -> Option<T>) -> Option<Option<T>> {
        let named = self.0.iter().filter(|(other, _)| *other == name);
        named.map(|(_, value)| read(value)).try_fold(None, |_, value| value.map(Some))
    }

    fn optional<T>(&self, name: &str, read: impl Fn(&Value) -> Option<T> + Copy) -> Option<Option<T>> {
        self.get(name, |value| value.optional(read)).map(Option::flatten)
    }

    fn required<T>(&self, name: &str, read: impl Fn(&Value) -> Option<T>) -> Option<T> {
        self.get(name, read).flatten()
    }
}

impl Told {
    /// What the event is by the book; none: it has to be skipped.
    fn expected(event: &Value) -> Option<Self> {
        let tag = match event {
            Value::Array(elements) => elements.first()?.text()?,
            _ => event.pairs().iter().find(|(key, _)| key.is("type"))?.1.text()?,
        };
        match tag.as_str() {
            "BlockStored" => Self::stored(&Fields::of(event, &STORED)),
            "BlockRemoved" => Self::removed(&Fields::of(event, &REMOVED)),
            "AllBlocksCleared" => Some(Self::Cleared),
            "TierBlocksCleared" => {
                Fields::of(event, &["medium"]).optional("medium", Value::text).map(Self::TierCleared)
            }
            _ => None,
        }
    }

    fn stored(fields: &Fields<'_>) -> Option<Self> {
        let block_keys =
            |keys: &Value| keys.optional(|keys| keys.list(|item| Some(item.item()))).map(Option::unwrap_or_default);
        Some(Self::Stored {
            hashes: fields.required("block_hashes", |hashes| hashes.list(Value::hash))?,
            parent: fields.required("parent_block_hash", |parent| parent.optional(Value::hash))?,
            tokens: fields.required("token_ids", |tokens| tokens.list(Value::u32))?,
            block_size: fields.required("block_size", Value::u32)?,
            lora: (fields.optional("lora_id", Value::uint)?, fields.optional("lora_name", Value::text)?),
            medium: fields.optional("medium", Value::text)?,
            extra_keys: fields.optional("extra_keys", |keys| keys.list(block_keys))?,
            group: (fields.optional("group_idx", Value::u32)?, fields.optional("kv_cache_spec_kind", Value::text)?),
        })
    }

    fn removed(fields: &Fields<'_>) -> Option<Self> {
        Some(Self::Removed {
            hashes: fields.required("block_hashes", |hashes| hashes.list(Value::hash))?,
            medium: fields.optional("medium", Value::text)?,
            group_idx: fields.optional("group_idx", Value::u32)?,
        })
    }

    /// What the decoder made of it.
    fn found(event: &Event<'_>) -> Self {
        let item = |item: ExtraItem<'_>| match item {
            ExtraItem::Str(text) => Item::Str(text.to_owned()),
            ExtraItem::Mm(identifier, offset) => Item::Mm(identifier.to_owned(), offset),
            ExtraItem::Bytes(bytes) => Item::Bytes(bytes.to_vec()),
            ExtraItem::Other(_) => Item::Other,
        };
        match event {
            Event::BlockStored(stored) => Self::Stored {
                hashes: stored.block_hashes.iter().map(|hash| hash.low64().0).collect(),
                parent: stored.parent.map(|parent| parent.low64().0),
                tokens: stored.token_ids.to_vec(),
                block_size: stored.block_size,
                lora: (stored.lora_id, stored.lora_name.map(str::to_owned)),
                medium: stored.medium.map(str::to_owned),
                extra_keys: stored
                    .extra_keys
                    .map(|keys| keys.iter().map(|keys| keys.iter().map(item).collect()).collect()),
                group: (stored.group_idx, stored.spec_kind.map(str::to_owned)),
            },
            Event::BlockRemoved(removed) => Self::Removed {
                hashes: removed.block_hashes.iter().map(|hash| hash.low64().0).collect(),
                medium: removed.medium.map(str::to_owned),
                group_idx: removed.group_idx,
            },
            Event::AllBlocksCleared => Self::Cleared,
            Event::TierBlocksCleared { medium } => Self::TierCleared(medium.map(str::to_owned)),
        }
    }
}
