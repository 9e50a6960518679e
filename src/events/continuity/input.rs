//! What the machine is told, and what it tells the socket code to do.

use std::time::Duration;

/// Number of a batch: from 0 per publisher process and rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct SeqNo(pub u64);

impl SeqNo {
    /// The number after this one. The last number is vLLM's END marker and never that of a batch.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

/// XXH3-128 of a payload. A payload begins with the publisher's clock, so two processes practically never send the same
/// one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PayloadDigest(pub u128);

impl PayloadDigest {
    /// The digest of a payload.
    pub fn of(payload: &[u8]) -> Self {
        Self(xxhash_rust::xxh3::xxh3_128(payload))
    }
}

/// At this number the publisher sent this payload: what tells one publisher process from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Overlap {
    /// The batch's number.
    pub seq: SeqNo,
    /// The batch's payload.
    pub digest: PayloadDigest,
}

/// An encoded batch. Whoever read it from the socket has tried to decode it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Payload {
    /// It can be applied.
    Readable(Vec<u8>),
    /// It cannot; the digest is all that is left of it.
    Unreadable(PayloadDigest),
}

impl Payload {
    /// The payload's digest.
    pub fn digest(&self) -> PayloadDigest {
        match self {
            Self::Readable(bytes) => PayloadDigest::of(bytes),
            Self::Unreadable(digest) => *digest,
        }
    }
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// A new connection to the publisher stands.
    Connected,
    /// The connection is gone.
    Disconnected,
    /// The live stream brought a batch.
    Live {
        /// Its number.
        seq: SeqNo,
        /// The batch.
        payload: Payload,
    },
    /// The latest replay request has been sent: until then it may wait for its turn.
    ReplayStarted,
    /// The latest replay request brought a batch.
    Reply {
        /// Its number.
        seq: SeqNo,
        /// The batch.
        payload: Payload,
    },
    /// The latest replay request was answered with END.
    ReplayEnd,
    /// There is a snapshot of the source. A newer one replaces it.
    Offer {
        /// The last batch in the snapshot.
        overlap: Overlap,
        /// Whether it contains everything since the publisher's start.
        complete: bool,
    },
    /// The snapshot of the last [`Action::Restore`] was of no use: the generation is empty.
    NotRestored,
    /// The batch applied last says that the engine dropped its whole cache: nothing is unknown any more.
    Cleared,
    /// Somebody saw that the publisher may be another process now.
    Suspect,
    /// Time passed. Wanted a few times per second.
    Tick,
}

/// What is to be done, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Retire what is known and start anew.
    StartGeneration(Cause),
    /// Retire what is known; nothing is applied before the next generation.
    EndGeneration,
    /// Retire what is known and start with the offered snapshot.
    Restore,
    /// The offered snapshot is of another process or no longer wanted.
    DropOffer,
    /// Ask for the batches from here on, and forget any earlier request.
    RequestReplay {
        /// First batch wanted.
        from: SeqNo,
        /// The request may wait a random time up to this, so that not everybody asks at once.
        within: Duration,
    },
    /// No further replies are wanted.
    CloseReplay,
    /// Apply a batch.
    Apply {
        /// Its number.
        seq: SeqNo,
        /// The encoded batch.
        payload: Vec<u8>,
        /// How it came.
        via: Via,
    },
    /// Drop the connection and make a new one.
    Reconnect,
    /// Count this, and log it.
    Report(Incident),
}

/// Why a generation starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// There was none.
    First,
    /// The publisher started its numbers again.
    Restarted,
    /// The publisher did not repeat the last known batch: it is another process, or its buffer has moved on.
    Unproved,
    /// Batches are gone for good.
    BatchesLost,
}

/// How a batch came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Via {
    /// By the live stream, perhaps held for a while.
    Live,
    /// By a replay.
    Replay,
}

/// What an operator may want to know of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Incident {
    /// The live stream lost batches, or brought one that cannot be read.
    Gap {
        /// First missing batch.
        expected: SeqNo,
        /// The batch that came instead.
        received: SeqNo,
    },
    /// Too many live batches were held.
    HeldOverflow,
    /// The replay endpoint does not answer, or cannot fill a gap.
    ReplayGaveUp,
    /// A batch can be read neither from the live stream nor from the replay.
    UnreadableBatch {
        /// Its number.
        seq: SeqNo,
    },
    /// The replay brings batches that the live stream did not: the connection is dead without saying so.
    Deaf,
    /// The source sends too much that is wrong, and is left alone for this long.
    Quarantined(Duration),
}

/// A source's state in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// There is no connection, and nothing is known.
    Connecting,
    /// A replay is running; what it brought so far is known.
    CatchingUp,
    /// Everything since the publisher's start is known.
    Live,
    /// The live stream is followed, but its beginning is not known.
    Incomplete,
    /// What is known may be out of date: there is no connection, or it is not proved yet to lead to the same process.
    Stale,
    /// The source is left alone for a while because it sent too much that is wrong. Nothing is known.
    Quarantined,
}
