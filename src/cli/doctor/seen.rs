//! What was seen of an engine: values without a judgement.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::discovery::event_sources::Answer;
use crate::routing::hash::BlockHash;

/// What became of a question.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Asked<T> {
    /// A good answer.
    Answer(T),
    /// An answer with another status than 200.
    Status(u16),
    /// No answer, or one that is not understood: why.
    Failed(String),
    /// Not asked.
    Unasked,
}

impl<T> Asked<T> {
    pub(super) fn answer(&self) -> Option<&T> {
        match self {
            Self::Answer(answer) => Some(answer),
            Self::Status(_) | Self::Failed(_) | Self::Unasked => None,
        }
    }

    /// Why there is no answer, in words.
    pub(super) fn why_not(&self) -> String {
        match self {
            Self::Answer(_) => "answered".to_owned(),
            Self::Status(status) => format!("status {status}"),
            Self::Failed(why) => why.clone(),
            Self::Unasked => "not asked".to_owned(),
        }
    }
}

/// One engine.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    /// The URL that it was asked at.
    pub(super) name: String,
    /// How long its first answer took; otherwise why there was none.
    pub(super) reach: Result<Duration, String>,
    /// `/version`
    pub(super) version: Asked<String>,
    /// `/v1/models`
    pub(super) models: Asked<Vec<Served>>,
    /// `/kv_event_sources`
    pub(super) told: Asked<Told>,
    /// `/metrics`; none where it does not tell of the cache.
    pub(super) cache: Asked<Option<CacheConfig>>,
    /// The ranks that were dialled.
    pub(super) ranks: Vec<RankSeen>,
    /// How far the clock of its `date` header is before ours, in seconds.
    pub(super) date_skew: Option<f64>,
    /// The model that it is to serve.
    pub(super) wanted: Option<String>,
    /// The name under which it was asked for tokens and completions: that, or another that it serves.
    pub(super) model: Option<String>,
    /// The requests that were sent to it.
    pub(super) probes: Vec<Probe>,
    /// `/tokenize` of a text that is the same for all engines.
    pub(super) fixed_tokens: Asked<Vec<u32>>,
}

/// A line of `/v1/models`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Served {
    pub(super) id: String,
    /// The base model; none for that itself.
    pub(super) parent: Option<String>,
    /// Path of an adapter.
    pub(super) root: Option<String>,
    pub(super) max_model_len: Option<u64>,
}

/// `/kv_event_sources`, read.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Told {
    /// Where to dial.
    pub(super) answer: Answer,
    /// The engine says that it publishes no events.
    pub(super) is_off: bool,
    /// Batches that a replay may go back, where it says so.
    pub(super) buffer_steps: Option<u64>,
}

/// `vllm:cache_config_info`
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct CacheConfig {
    pub(super) block_size: Option<u32>,
    pub(super) algorithm: Option<String>,
    pub(super) is_prefix_cached: Option<bool>,
}

/// Who said where a rank publishes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// The command line.
    Given,
    /// The engine.
    Told,
    /// The configuration.
    Configured,
    /// Nobody: vLLM's usual ports.
    Assumed,
}

/// A connection.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Link {
    Up(Duration),
    Down(String),
    /// There is no address, or none that can be dialled: why.
    NotDialled(&'static str),
}

/// One data-parallel rank.
#[derive(Clone, Debug)]
pub(super) struct RankSeen {
    pub(super) rank: u32,
    pub(super) origin: Origin,
    pub(super) events: String,
    pub(super) events_link: Link,
    pub(super) replay: Option<String>,
    pub(super) replay_link: Link,
    pub(super) replayed: Option<Replayed>,
    pub(super) wire: Wire,
    /// `BlockStored` events, as many as are kept.
    pub(super) stored: Vec<Stored>,
    /// Our clock when a live batch came less the time that is written in it, in seconds: the least of all.
    pub(super) skew: Option<f64>,
}

/// What a replay from the beginning brought.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Replayed {
    pub(super) first: Option<u64>,
    pub(super) last: Option<u64>,
    pub(super) n_batches: u64,
    pub(super) has_end: bool,
}

/// The shape of what came.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Wire {
    pub(super) n_live: u64,
    pub(super) n_stored: u64,
    pub(super) n_removed: u64,
    pub(super) n_cleared: u64,
    pub(super) n_skipped: u64,
    /// Messages without the three frames, or with a payload that cannot be decoded; and why the first could not.
    pub(super) n_unreadable: u64,
    pub(super) fault: Option<String>,
    pub(super) has_int_hashes: bool,
    /// Bytes of a hash, where it comes whole.
    pub(super) hash_bytes: BTreeSet<usize>,
    pub(super) has_tokens: bool,
    pub(super) shows_extra_keys: bool,
    pub(super) media: BTreeSet<String>,
    pub(super) kinds: BTreeSet<String>,
    pub(super) topics: BTreeSet<String>,
    /// Ranks that batches name.
    pub(super) ranks: BTreeSet<u32>,
    pub(super) block_sizes: BTreeSet<u32>,
}

/// A `BlockStored` event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stored {
    pub(super) is_live: bool,
    pub(super) parent: Option<Hash>,
    pub(super) hashes: Vec<Hash>,
    pub(super) tokens: Vec<u32>,
    pub(super) block_size: u32,
    /// Neither an adapter's nor with an extra key that is shown.
    pub(super) is_plain: bool,
}

/// A hash as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Hash {
    Low(BlockHash),
    Whole(Vec<u8>),
}

/// What kind of request was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ProbeKind {
    Completion,
    Chat,
}

impl ProbeKind {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Completion => "completion",
            Self::Chat => "chat",
        }
    }
}

/// A request that was sent, and what is known of its tokens.
#[derive(Clone, Debug)]
pub(super) struct Probe {
    pub(super) kind: ProbeKind,
    pub(super) rank: u32,
    /// The answer: the tokens of the prompt, where the engine tells them.
    pub(super) answer: Asked<Option<Vec<u32>>>,
    /// What the router would ask the engine.
    pub(super) tokenized: Asked<Vec<u32>>,
    /// What the local tokenizer says.
    pub(super) local: Option<Result<Vec<u32>, String>>,
}

impl Probe {
    /// The tokens that the engine used, as far as it has said it.
    pub(super) fn tokens(&self) -> Option<&[u32]> {
        let used = self.answer.answer()?.as_deref();
        used.or_else(|| self.tokenized.answer().map(Vec::as_slice))
    }
}
