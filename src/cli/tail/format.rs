//! Lines of `warmroute events tail`: pure, from frames to text or JSON.
//!
//! A line is an event or a mark. Marks say what the sequence numbers show (gaps, restarts), where replies begin and
//! end, and what could not be read. Of token ids there is a count and of salts nothing; names that a publisher chose
//! are escaped.

use std::fmt;

use serde::{Serialize, Serializer};

use crate::cli::sockets::{END, split};
use crate::events::wire::{BlockRemoved, BlockStored, EngineHash, Event, EventBatch};

/// Form of the lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    Text,
    Json,
}

/// How a message came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Via {
    Live,
    Replay,
}

impl fmt::Display for Via {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Live => "live",
            Self::Replay => "replay",
        })
    }
}

/// What is worth a line and is no event.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "mark", rename_all = "snake_case")]
pub(super) enum Mark {
    Connecting { endpoint: String },
    Connected,
    Disconnected,
    Gap { via: Via, expected: u64, received: u64 },
    Restart { via: Via, expected: u64, received: u64 },
    Empty { via: Via, seq: u64 },
    Skipped { via: Via, seq: u64, n_events: u32 },
    Unreadable { via: Via, seq: u64, n_bytes: usize, reason: String },
    Malformed { via: Via, n_frames: usize },
    ReplayAsked { from: u64 },
    ReplayEnd,
    ReplaySilent,
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("-- ")?;
        match self {
            Self::Connecting { endpoint } => write!(f, "connecting to {endpoint}"),
            Self::Connected => f.write_str("connected"),
            Self::Disconnected => f.write_str("disconnected"),
            Self::Gap { via, expected, received } => {
                write!(f, "{}gap: expected {expected}, received {received}", prefix(*via))
            }
            Self::Restart { via, expected, received } => {
                write!(f, "{}restart: expected {expected}, received {received}", prefix(*via))
            }
            Self::Empty { via, seq } => write!(f, "{}empty: batch {seq} has no events", prefix(*via)),
            Self::Skipped { via, seq, n_events } => {
                write!(f, "{}skipped: {n_events} event(s) of batch {seq} are not understood", prefix(*via))
            }
            Self::Unreadable { via, seq, n_bytes, reason } => {
                write!(f, "{}unreadable: batch {seq} of {n_bytes} bytes: {reason}", prefix(*via))
            }
            Self::Malformed { via, n_frames } => write!(
                f,
                "{}malformed: {n_frames} frame(s), expected topic, sequence number of 8 bytes and payload",
                prefix(*via)
            ),
            Self::ReplayAsked { from } => write!(f, "replay from {from}"),
            Self::ReplayEnd => f.write_str("replay END"),
            Self::ReplaySilent => f.write_str("replay silent: no END came"),
        }?;
        f.write_str(" --")
    }
}

/// The live stream is the usual one and goes without its name.
fn prefix(via: Via) -> &'static str {
    match via {
        Via::Live => "",
        Via::Replay => "replay ",
    }
}

/// Follows the sequence numbers of both streams and writes lines.
#[derive(Debug)]
pub(super) struct Tail {
    format: Format,
    next_live: Option<u64>,
    next_reply: Option<u64>,
}

impl Tail {
    pub(super) fn new(format: Format) -> Self {
        Self { format, next_live: None, next_reply: None }
    }

    /// Begins a replay from a number: if another one comes first, the publisher's buffer no longer has it.
    pub(super) fn replay_asked(&mut self, from: u64) -> String {
        self.next_reply = Some(from);
        self.mark(&Mark::ReplayAsked { from })
    }

    /// One line for something that is no event.
    pub(super) fn mark(&self, mark: &Mark) -> String {
        self.line(mark)
    }

    /// Appends the lines of a message to `lines`; true when it is the END of a replay. Frames are read from the end,
    /// since those before differ between releases.
    pub(super) fn message(&mut self, via: Via, frames: &[Vec<u8>], lines: &mut Vec<String>) -> bool {
        let Some((seq, payload)) = split(frames) else {
            lines.push(self.mark(&Mark::Malformed { via, n_frames: frames.len() }));
            return false;
        };
        if seq == END && via == Via::Replay {
            lines.push(self.mark(&Mark::ReplayEnd));
            return true;
        }
        lines.extend(self.follow(via, seq).map(|mark| self.mark(&mark)));
        match EventBatch::decode(payload) {
            Ok(batch) => self.batch(via, seq, &batch, lines),
            Err(error) => {
                let reason = error.to_string();
                lines.push(self.mark(&Mark::Unreadable { via, seq, n_bytes: payload.len(), reason }));
            }
        }
        false
    }

    /// What a batch's number says, compared with the one before.
    fn follow(&mut self, via: Via, received: u64) -> Option<Mark> {
        let next = match via {
            Via::Live => &mut self.next_live,
            Via::Replay => &mut self.next_reply,
        };
        let expected = next.replace(received.saturating_add(1))?;
        match received.cmp(&expected) {
            std::cmp::Ordering::Equal => None,
            std::cmp::Ordering::Greater => Some(Mark::Gap { via, expected, received }),
            std::cmp::Ordering::Less => Some(Mark::Restart { via, expected, received }),
        }
    }

    fn batch(&self, via: Via, seq: u64, batch: &EventBatch<'_>, lines: &mut Vec<String>) {
        lines.extend(batch.events.iter().map(|event| self.line(&EventLine::of(via, seq, batch, event))));
        if batch.n_skipped > 0 {
            lines.push(self.mark(&Mark::Skipped { via, seq, n_events: batch.n_skipped }));
        } else if batch.events.is_empty() {
            lines.push(self.mark(&Mark::Empty { via, seq }));
        }
    }

    fn line(&self, line: &(impl fmt::Display + Serialize)) -> String {
        match self.format {
            Format::Text => line.to_string(),
            Format::Json => serde_json::to_string(line).expect("a line has only strings and numbers"),
        }
    }
}

/// One event. What it does not have is absent.
#[derive(Debug, Serialize)]
struct EventLine<'a> {
    via: Via,
    seq: u64,
    ts: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    rank: Option<u32>,
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    medium: Option<&'a str>,
    #[serde(flatten)]
    blocks: Option<Blocks<'a>>,
}

/// The blocks that an event is about.
#[derive(Debug, Default, Serialize)]
struct Blocks<'a> {
    n_blocks: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    n_tokens: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    block_size: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    parent: Option<Parent>,
    #[serde(skip_serializing_if = "Option::is_none")]
    first: Option<Hash>,
    #[serde(skip_serializing_if = "Option::is_none")]
    last: Option<Hash>,
    #[serde(skip_serializing_if = "Option::is_none")]
    group: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    group_kind: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    adapter: Option<&'a str>,
}

/// The low 64 bits of a block hash in hexadecimal: JSON numbers are exact only up to 2^53.
#[derive(Clone, Copy, Debug)]
struct Hash(u64);

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl Serialize for Hash {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// What comes before an event's first block.
#[derive(Clone, Copy, Debug)]
enum Parent {
    /// Nothing: it begins a prompt.
    Root,
    Block(Hash),
}

impl fmt::Display for Parent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Root => f.write_str("root"),
            Self::Block(hash) => hash.fmt(f),
        }
    }
}

impl Serialize for Parent {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'a> EventLine<'a> {
    fn of(via: Via, seq: u64, batch: &EventBatch<'_>, event: &Event<'a>) -> Self {
        let (kind, medium, blocks) = match event {
            Event::BlockStored(stored) => ("BlockStored", stored.medium, Some(Blocks::stored(stored))),
            Event::BlockRemoved(removed) => ("BlockRemoved", removed.medium, Some(Blocks::removed(removed))),
            Event::AllBlocksCleared => ("AllBlocksCleared", None, None),
            Event::TierBlocksCleared { medium } => ("TierBlocksCleared", *medium, None),
        };
        Self { via, seq, ts: batch.ts, rank: batch.rank, kind, medium, blocks }
    }
}

impl<'a> Blocks<'a> {
    fn stored(stored: &BlockStored<'a>) -> Self {
        Self {
            n_tokens: Some(stored.token_ids.len()),
            block_size: Some(stored.block_size),
            parent: Some(stored.parent.map_or(Parent::Root, |parent| Parent::Block(Hash(parent.low64().0)))),
            group: stored.group_idx,
            group_kind: stored.spec_kind,
            adapter: stored.lora_name,
            ..Self::of(&stored.block_hashes)
        }
    }

    fn removed(removed: &BlockRemoved<'a>) -> Self {
        Self { group: removed.group_idx, ..Self::of(&removed.block_hashes) }
    }

    fn of(hashes: &[EngineHash<'_>]) -> Self {
        let hash = |hash: &EngineHash<'_>| Hash(hash.low64().0);
        Self {
            n_blocks: hashes.len(),
            first: hashes.first().map(hash),
            last: hashes.last().map(hash),
            ..Self::default()
        }
    }
}

impl fmt::Display for EventLine<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { via, seq, ts, rank, kind, medium, blocks } = self;
        write!(f, "{via} seq={seq} ts={ts:.6}")?;
        field(f, "rank", *rank)?;
        write!(f, " {kind}")?;
        field(f, "medium", medium.map(Name))?;
        blocks.as_ref().map_or(Ok(()), |blocks| blocks.fmt(f))
    }
}

impl fmt::Display for Blocks<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, " blocks={}", self.n_blocks)?;
        field(f, "tokens", self.n_tokens)?;
        field(f, "block_size", self.block_size)?;
        field(f, "parent", self.parent)?;
        field(f, "first", self.first)?;
        field(f, "last", self.last)?;
        field(f, "group", self.group)?;
        field(f, "group_kind", self.group_kind.map(Name))?;
        field(f, "adapter", self.adapter.map(Name))
    }
}

fn field(f: &mut fmt::Formatter<'_>, name: &str, value: Option<impl fmt::Display>) -> fmt::Result {
    value.map_or(Ok(()), |value| write!(f, " {name}={value}"))
}

/// A name that a publisher chose: it must not write to the operator's terminal, nor look like a field.
struct Name<'a>(&'a str);

impl fmt::Display for Name<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "_-./:@".contains(c);
        if !self.0.is_empty() && self.0.chars().all(is_plain) { f.write_str(self.0) } else { write!(f, "{:?}", self.0) }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// Frames of a message as vLLM 0.32 sends it.
    fn frames(seq: u64, payload: &[u8]) -> Vec<Vec<u8>> {
        vec![b"kv".to_vec(), seq.to_be_bytes().to_vec(), payload.to_vec()]
    }

    fn batch(events: &[Value]) -> Vec<u8> {
        rmp_serde::to_vec(&json!([1.5, events, 0])).expect("encodable")
    }

    fn removed() -> Value {
        json!({"type": "BlockRemoved", "block_hashes": [7, 8], "medium": "GPU", "group_idx": 1})
    }

    fn stored(parent: &Value, lora_name: &str) -> Value {
        json!({
            "type": "BlockStored", "block_hashes": [255, 256], "parent_block_hash": parent, "token_ids": [901, 902, 903, 904],
            "block_size": 2, "lora_id": 1, "medium": "GPU", "lora_name": lora_name,
            "extra_keys": [[lora_name, "pepper"], [lora_name]], "group_idx": 0, "kv_cache_spec_kind": "full_attention",
        })
    }

    fn lines(tail: &mut Tail, via: Via, seq: u64, payload: &[u8]) -> Vec<String> {
        let mut lines = Vec::new();
        assert!(!tail.message(via, &frames(seq, payload), &mut lines));
        lines
    }

    #[test]
    fn every_event_is_one_line_without_tokens_and_salts() {
        let payload = batch(&[
            stored(&Value::Null, "sql"),
            stored(&json!(9), "sql"),
            removed(),
            json!({"type": "AllBlocksCleared"}),
            json!({"type": "TierBlocksCleared", "medium": "CPU"}),
        ]);
        let found = lines(&mut Tail::new(Format::Text), Via::Live, 12, &payload);
        let expected = [
            "live seq=12 ts=1.500000 rank=0 BlockStored medium=GPU blocks=2 tokens=4 block_size=2 parent=root first=00000000000000ff \
             last=0000000000000100 group=0 group_kind=full_attention adapter=sql",
            "live seq=12 ts=1.500000 rank=0 BlockStored medium=GPU blocks=2 tokens=4 block_size=2 parent=0000000000000009 \
             first=00000000000000ff last=0000000000000100 group=0 group_kind=full_attention adapter=sql",
            "live seq=12 ts=1.500000 rank=0 BlockRemoved medium=GPU blocks=2 first=0000000000000007 last=0000000000000008 group=1",
            "live seq=12 ts=1.500000 rank=0 AllBlocksCleared",
            "live seq=12 ts=1.500000 rank=0 TierBlocksCleared medium=CPU",
        ];
        assert_eq!(found, expected);
        for format in [Format::Text, Format::Json] {
            let text = lines(&mut Tail::new(format), Via::Live, 12, &payload).join("\n");
            assert!(!text.contains("90") && !text.contains("pepper"), "{text}");
        }
    }

    #[test]
    fn json_lines_have_the_same_fields() {
        let found =
            lines(&mut Tail::new(Format::Json), Via::Replay, 3, &batch(&[stored(&Value::Null, "sql"), removed()]));
        let found: Vec<Value> = found.iter().map(|line| serde_json::from_str(line).expect("a JSON line")).collect();
        assert_eq!(
            found,
            [
                json!({
                    "via": "replay", "seq": 3, "ts": 1.5, "rank": 0, "kind": "BlockStored", "n_blocks": 2, "n_tokens": 4,
                    "block_size": 2, "parent": "root", "first": "00000000000000ff", "last": "0000000000000100",
                    "medium": "GPU", "group": 0, "group_kind": "full_attention", "adapter": "sql",
                }),
                json!({
                    "via": "replay", "seq": 3, "ts": 1.5, "rank": 0, "kind": "BlockRemoved", "n_blocks": 2,
                    "first": "0000000000000007", "last": "0000000000000008", "medium": "GPU", "group": 1,
                }),
            ]
        );
        let mut tail = Tail::new(Format::Json);
        lines(&mut tail, Via::Live, 4, &batch(&[]));
        let gap = lines(&mut tail, Via::Live, 9, &batch(&[removed()])).remove(0);
        let gap: Value = serde_json::from_str(&gap).expect("a JSON line");
        assert_eq!(gap, json!({"mark": "gap", "via": "live", "expected": 5, "received": 9}));
    }

    #[test]
    fn gaps_and_restarts_are_marked_before_the_batch_that_shows_them() {
        let mut tail = Tail::new(Format::Text);
        let mut marks = |via, seq| {
            let mut found = lines(&mut tail, via, seq, &batch(&[removed()]));
            assert!(found.pop().is_some_and(|line| line.contains("BlockRemoved")), "the batch comes last");
            found
        };
        assert_eq!(marks(Via::Live, 11), [""; 0], "the first one is where we came in");
        assert_eq!(marks(Via::Live, 15), ["-- gap: expected 12, received 15 --"]);
        assert_eq!(marks(Via::Live, 16), [""; 0]);
        assert_eq!(marks(Via::Replay, 3), [""; 0], "the streams are counted apart");
        assert_eq!(marks(Via::Replay, 5), ["-- replay gap: expected 4, received 5 --"]);
        assert_eq!(marks(Via::Live, 0), ["-- restart: expected 17, received 0 --"]);
        assert_eq!(marks(Via::Live, 0), ["-- restart: expected 1, received 0 --"], "twice the same number");
    }

    #[test]
    fn replay_shows_where_the_buffer_begins_and_ends() {
        let mut tail = Tail::new(Format::Text);
        assert_eq!(tail.replay_asked(0), "-- replay from 0 --");
        let found = lines(&mut tail, Via::Replay, 500, &batch(&[removed()]));
        assert_eq!(found[0], "-- replay gap: expected 0, received 500 --");
        assert!(found[1].starts_with("replay seq=500 "), "{found:?}");
        let end = |frames: &[Vec<u8>], tail: &mut Tail| {
            let mut lines = Vec::new();
            (tail.message(Via::Replay, frames, &mut lines), lines)
        };
        for before in [vec![vec![]], vec![vec![], vec![]]] {
            let frames = [before, vec![vec![0xff; 8], vec![]]].concat();
            assert_eq!(end(&frames, &mut tail), (true, vec!["-- replay END --".to_owned()]));
        }
    }

    #[test]
    fn what_cannot_be_read_is_said_with_its_reason() {
        let mut tail = Tail::new(Format::Text);
        let unreadable = lines(&mut tail, Via::Live, 1, &[0xc1]).remove(0);
        assert!(unreadable.starts_with("-- unreadable: batch 1 of 1 bytes: "), "{unreadable}");
        let unknown = lines(&mut tail, Via::Live, 2, &batch(&[json!({"type": "Other"}), removed()]));
        assert_eq!(unknown[1], "-- skipped: 1 event(s) of batch 2 are not understood --");
        assert_eq!(lines(&mut tail, Via::Live, 3, &batch(&[])), ["-- empty: batch 3 has no events --"]);
        for frames in [vec![], vec![vec![1]], vec![vec![1, 2], vec![3]]] {
            let mut lines = Vec::new();
            assert!(!tail.message(Via::Live, &frames, &mut lines));
            assert!(lines[0].starts_with(&format!("-- malformed: {} frame(s)", frames.len())), "{lines:?}");
        }
    }

    #[test]
    fn names_cannot_write_to_the_terminal() {
        let payload = batch(&[stored(&Value::Null, "a\u{1b}[2J seq=1")]);
        let line = lines(&mut Tail::new(Format::Text), Via::Live, 0, &payload).remove(0);
        assert!(line.ends_with(r#"adapter="a\u{1b}[2J seq=1""#), "{line}");
    }
}
