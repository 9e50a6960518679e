//! Events as the model's engines announce them, in the forms of old and new releases.

use rmp::encode as mp;

use super::library::{BLOCK_SIZE, Prompt};
use crate::routing::hash::{BlockHash, Digest};

/// Where a copy of a block lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Medium {
    Gpu,
    Cpu,
    Storage,
}

impl Medium {
    fn as_str(self) -> &'static str {
        match self {
            Self::Gpu => "GPU",
            Self::Cpu => "CPU",
            Self::Storage => "STORAGE",
        }
    }
}

/// How an engine writes its events.
#[derive(Clone, Copy, Debug)]
pub(super) struct Form {
    /// Maps (vLLM 0.24 and later) or arrays.
    pub(super) maps: bool,
    /// Hashes as integers or as whole digests.
    pub(super) int_hashes: bool,
    /// Whether events name their KV-cache group.
    pub(super) groups: bool,
}

/// One event, before it is encoded.
#[derive(Clone, Debug)]
pub(super) enum Announcement {
    /// Blocks `from..to` of a prompt by the full-attention group.
    Stored { prompt: &'static Prompt, from: usize, to: usize, medium: Medium },
    /// The range as a sliding-window group announces it: all tokens, the last block alone.
    Sparse { prompt: &'static Prompt, from: usize, to: usize },
    /// One block that an offload tier took, without its tokens.
    Placeholder { digest: Digest, medium: Medium },
    /// Copies of these blocks left the tier.
    Removed { digests: Vec<Digest>, medium: Medium },
    /// The sliding-window group let a block go.
    SparseRemoved { digest: Digest },
    /// The cache was dropped.
    Cleared,
    /// An event of a later release.
    Unknown,
}

impl Announcement {
    /// The blocks that a full-attention store on the GPU announces.
    pub(super) fn stored_on_gpu(&self) -> Option<(&'static Prompt, usize, usize)> {
        match self {
            Self::Stored { prompt, from, to, medium: Medium::Gpu } => Some((prompt, *from, *to)),
            _ => None,
        }
    }

    /// Hash of the block that a store continues.
    pub(super) fn parent(&self) -> Option<BlockHash> {
        match self {
            Self::Stored { prompt, from, .. } | Self::Sparse { prompt, from, .. } => {
                from.checked_sub(1).map(|parent| prompt.hashes[parent])
            }
            _ => None,
        }
    }
}

/// A batch as vLLM encodes it.
pub(super) fn encode(ts: f64, announcements: &[Announcement], form: Form) -> Vec<u8> {
    let mut encoder = Encoder { bytes: Vec::with_capacity(64 + 160 * announcements.len()), form };
    encoder.array(3);
    encoder.float(ts);
    encoder.array(announcements.len());
    announcements.iter().for_each(|announcement| encoder.event(announcement));
    encoder.uint(0);
    encoder.bytes
}

struct Encoder {
    bytes: Vec<u8>,
    form: Form,
}

/// The group's number and its kind.
const FULL: (u64, &str) = (0, "full_attention");
const SLIDING: (u64, &str) = (1, "sliding_window");

impl Encoder {
    fn event(&mut self, announcement: &Announcement) {
        match announcement {
            Announcement::Stored { prompt, from, to, medium } => {
                self.stored(announcement, prompt, (*from, *to), *from, Some(*medium), FULL);
            }
            Announcement::Sparse { prompt, from, to } => {
                self.stored(announcement, prompt, (*from, *to), to - 1, Some(Medium::Gpu), SLIDING);
            }
            Announcement::Placeholder { digest, medium } => self.placeholder(digest, *medium),
            Announcement::Removed { digests, medium } => self.removed(digests, *medium, FULL),
            Announcement::SparseRemoved { digest } => self.removed(std::slice::from_ref(digest), Medium::Gpu, SLIDING),
            Announcement::Cleared => self.begin("AllBlocksCleared", 0),
            Announcement::Unknown => {
                self.begin("BlocksPondered", 1);
                self.name("depth");
                self.uint(7);
            }
        }
    }

    fn stored(
        &mut self,
        announcement: &Announcement,
        prompt: &Prompt,
        (from, to): (usize, usize),
        first_hash: usize,
        medium: Option<Medium>,
        group: (u64, &str),
    ) {
        self.begin("BlockStored", if self.form.groups { 10 } else { 8 });
        self.name("block_hashes");
        self.hashes(&prompt.digests[first_hash..to]);
        self.name("parent_block_hash");
        match announcement.parent() {
            Some(_) => self.hash(&prompt.digests[from - 1]),
            None => self.nil(),
        }
        self.name("token_ids");
        let tokens = &prompt.tokens[from * BLOCK_SIZE as usize..to * BLOCK_SIZE as usize];
        self.array(tokens.len());
        tokens.iter().for_each(|token| self.uint(u64::from(*token)));
        self.name("block_size");
        self.uint(u64::from(BLOCK_SIZE));
        self.name("lora_id");
        self.nil();
        self.name("medium");
        self.optional(medium.map(Medium::as_str));
        self.name("lora_name");
        self.optional(prompt.kind.lora_name());
        self.name("extra_keys");
        self.extra_keys(prompt, first_hash, to);
        self.group(group);
    }

    fn placeholder(&mut self, digest: &Digest, medium: Medium) {
        self.begin("BlockStored", if self.form.groups { 10 } else { 8 });
        self.name("block_hashes");
        self.hashes(std::slice::from_ref(digest));
        self.name("parent_block_hash");
        self.nil();
        self.name("token_ids");
        self.array(0);
        self.name("block_size");
        self.uint(0);
        self.name("lora_id");
        self.nil();
        self.name("medium");
        self.optional(Some(medium.as_str()));
        self.name("lora_name");
        self.nil();
        self.name("extra_keys");
        self.nil();
        self.group(FULL);
    }

    fn removed(&mut self, digests: &[Digest], medium: Medium, (group_idx, _): (u64, &str)) {
        self.begin("BlockRemoved", if self.form.groups { 3 } else { 2 });
        self.name("block_hashes");
        self.hashes(digests);
        self.name("medium");
        self.optional(Some(medium.as_str()));
        if self.form.groups {
            self.name("group_idx");
            self.uint(group_idx);
        }
    }

    fn extra_keys(&mut self, prompt: &Prompt, from: usize, to: usize) {
        self.array(to - from);
        for block_idx in from..to {
            match prompt.kind.extra_key(block_idx) {
                Some(key) => {
                    self.array(1);
                    self.optional(Some(key));
                }
                None => self.nil(),
            }
        }
    }

    fn group(&mut self, (group_idx, kind): (u64, &str)) {
        if self.form.groups {
            self.name("group_idx");
            self.uint(group_idx);
            self.name("kv_cache_spec_kind");
            self.optional(Some(kind));
        }
    }

    /// Opens an event with its tag; its fields follow.
    fn begin(&mut self, tag: &str, n_fields: u32) {
        if self.form.maps {
            mp::write_map_len(&mut self.bytes, n_fields + 1).expect("a vector takes all bytes");
            self.name("type");
        } else {
            mp::write_array_len(&mut self.bytes, n_fields + 1).expect("a vector takes all bytes");
        }
        self.optional(Some(tag));
    }

    /// Name of the next field, which only maps show.
    fn name(&mut self, name: &str) {
        if self.form.maps {
            self.optional(Some(name));
        }
    }

    fn hashes(&mut self, digests: &[Digest]) {
        self.array(digests.len());
        digests.iter().for_each(|digest| self.hash(digest));
    }

    fn hash(&mut self, digest: &Digest) {
        if self.form.int_hashes {
            self.uint(digest.low64().0);
        } else {
            mp::write_bin(&mut self.bytes, digest.as_bytes()).expect("a vector takes all bytes");
        }
    }

    fn array(&mut self, len: usize) {
        mp::write_array_len(&mut self.bytes, len as u32).expect("a vector takes all bytes");
    }

    fn uint(&mut self, value: u64) {
        mp::write_uint(&mut self.bytes, value).expect("a vector takes all bytes");
    }

    fn float(&mut self, value: f64) {
        mp::write_f64(&mut self.bytes, value).expect("a vector takes all bytes");
    }

    fn optional(&mut self, text: Option<&str>) {
        match text {
            Some(text) => mp::write_str(&mut self.bytes, text).expect("a vector takes all bytes"),
            None => self.nil(),
        }
    }

    fn nil(&mut self) {
        mp::write_nil(&mut self.bytes).expect("a vector takes all bytes");
    }
}
