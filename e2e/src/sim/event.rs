//! KV events in the map form of vLLM 0.32, and their msgpack encoding.
//!
//! Keys, their order and which of them are left out when null follow `vllm/distributed/kv_events.py` of
//! vLLM 0.32.0. Encoding goes through `rmp` rather than serde, because `omit_defaults` and the choice
//! between integer and byte-string hashes are per value.

use std::io::{self, Write};

use warmroute::routing::hash::Digest;

/// How block hashes are written (`VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WireHash {
    /// The low 64 bits of the digest as an unsigned integer: vLLM's default.
    #[default]
    Int,
    /// The whole digest as a byte string.
    Bytes,
}

/// One KV-cache event.
#[derive(Clone, Debug, PartialEq)]
pub enum KvEvent {
    /// Blocks entered the cache.
    BlockStored(BlockStored),
    /// One block left the cache.
    BlockRemoved {
        /// Its hash.
        block_hash: Digest,
    },
    /// The whole cache was dropped.
    AllBlocksCleared,
}

/// Blocks entered the cache.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockStored {
    /// Hashes in chain order.
    pub block_hashes: Vec<Digest>,
    /// Hash before the first one; none at the start of a prompt.
    pub parent: Option<Digest>,
    /// All tokens of the stored blocks.
    pub token_ids: Vec<u32>,
    /// Tokens per block.
    pub block_size: u32,
    /// The adapter's engine-local number, from 1 in the order of loading.
    pub lora_id: Option<u32>,
    /// The adapter's name.
    pub lora_name: Option<String>,
    /// Untagged extra keys, one list per block; an empty list is written as nil.
    pub extra_keys: Vec<Vec<String>>,
    /// Session of the request, when the client named one.
    pub session_id: Option<String>,
}

/// Encodes `[ts, events, rank]`, the payload of one scheduler step.
pub fn encode_batch(ts: f64, events: &[KvEvent], rank: u32, wire_hash: WireHash) -> Vec<u8> {
    let mut encoder = Encoder { out: Vec::with_capacity(256), wire_hash };
    encoder.batch(ts, events, rank).expect("writing to a Vec never fails");
    encoder.out
}

struct Encoder {
    out: Vec<u8>,
    wire_hash: WireHash,
}

impl Encoder {
    fn batch(&mut self, ts: f64, events: &[KvEvent], rank: u32) -> io::Result<()> {
        self.array(len32(3))?;
        rmp::encode::write_f64(&mut self.out, ts)?;
        self.array(len32(events.len()))?;
        for event in events {
            self.event(event)?;
        }
        self.uint(u64::from(rank))
    }

    fn event(&mut self, event: &KvEvent) -> io::Result<()> {
        match event {
            KvEvent::BlockStored(stored) => self.stored(stored),
            KvEvent::BlockRemoved { block_hash } => {
                self.map(4)?;
                self.field("type", "BlockRemoved")?;
                self.str("block_hashes")?;
                self.array(1)?;
                self.hash(block_hash)?;
                self.field("medium", "GPU")?;
                self.str("group_idx")?;
                self.uint(0)
            }
            KvEvent::AllBlocksCleared => {
                self.map(1)?;
                self.field("type", "AllBlocksCleared")
            }
        }
    }

    fn stored(&mut self, stored: &BlockStored) -> io::Result<()> {
        self.map(11 + u32::from(stored.session_id.is_some()))?;
        self.field("type", "BlockStored")?;
        self.str("block_hashes")?;
        self.array(len32(stored.block_hashes.len()))?;
        for hash in &stored.block_hashes {
            self.hash(hash)?;
        }
        self.str("parent_block_hash")?;
        match &stored.parent {
            Some(parent) => self.hash(parent)?,
            None => self.nil()?,
        }
        self.str("token_ids")?;
        self.array(len32(stored.token_ids.len()))?;
        for token in &stored.token_ids {
            self.uint(u64::from(*token))?;
        }
        self.str("block_size")?;
        self.uint(u64::from(stored.block_size))?;
        self.str("lora_id")?;
        match stored.lora_id {
            Some(id) => self.uint(u64::from(id))?,
            None => self.nil()?,
        }
        self.field("medium", "GPU")?;
        self.str("lora_name")?;
        match &stored.lora_name {
            Some(name) => self.str(name)?,
            None => self.nil()?,
        }
        self.str("extra_keys")?;
        self.array(len32(stored.extra_keys.len()))?;
        for keys in &stored.extra_keys {
            self.extra_keys(keys)?;
        }
        self.str("group_idx")?;
        self.uint(0)?;
        self.field("kv_cache_spec_kind", "full_attention")?;
        match &stored.session_id {
            Some(session_id) => self.field("session_id", session_id),
            None => Ok(()),
        }
    }

    fn extra_keys(&mut self, keys: &[String]) -> io::Result<()> {
        if keys.is_empty() {
            return self.nil();
        }
        self.array(len32(keys.len()))?;
        keys.iter().try_for_each(|key| self.str(key))
    }

    fn hash(&mut self, hash: &Digest) -> io::Result<()> {
        match self.wire_hash {
            WireHash::Int => self.uint(hash.low64().0),
            WireHash::Bytes => {
                let bytes = hash.as_bytes();
                rmp::encode::write_bin_len(&mut self.out, len32(bytes.len()))?;
                self.out.write_all(bytes)
            }
        }
    }

    fn field(&mut self, key: &str, value: &str) -> io::Result<()> {
        self.str(key)?;
        self.str(value)
    }

    fn str(&mut self, value: &str) -> io::Result<()> {
        Ok(rmp::encode::write_str(&mut self.out, value)?)
    }

    fn uint(&mut self, value: u64) -> io::Result<()> {
        rmp::encode::write_uint(&mut self.out, value)?;
        Ok(())
    }

    fn nil(&mut self) -> io::Result<()> {
        rmp::encode::write_nil(&mut self.out)
    }

    fn array(&mut self, len: u32) -> io::Result<()> {
        rmp::encode::write_array_len(&mut self.out, len)?;
        Ok(())
    }

    fn map(&mut self, len: u32) -> io::Result<()> {
        rmp::encode::write_map_len(&mut self.out, len)?;
        Ok(())
    }
}

fn len32(len: usize) -> u32 {
    u32::try_from(len).expect("lists in one batch are far shorter than 2^32")
}
