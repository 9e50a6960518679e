//! An engine process: its engine, its numbers and its replay buffer.

use std::collections::VecDeque;
use std::rc::Rc;

use super::announce::{Announcement, encode};
use super::engine::{Engine, EngineTraits};
use crate::events::continuity::{Payload, PayloadDigest};
use crate::events::wire::EventBatch;

/// Number of an engine process within a program: what a restart changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ProcessId(pub(super) u32);

/// Which batch of which process: every batch says so in its timestamp, from which the checks read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Origin {
    pub(super) process: ProcessId,
    pub(super) seq: u64,
}

impl Origin {
    const N_SEQS: f64 = 1e6;

    fn as_ts(self) -> f64 {
        f64::from(self.process.0) * Self::N_SEQS + self.seq as f64
    }

    pub(super) fn of_ts(ts: f64) -> Self {
        Self { process: ProcessId((ts / Self::N_SEQS) as u32), seq: (ts % Self::N_SEQS) as u64 }
    }
}

/// An encoded batch and its number.
#[derive(Clone, Debug)]
pub(super) struct Message {
    pub(super) seq: u64,
    bytes: Rc<[u8]>,
    /// Bytes that are left of it.
    n_bytes: usize,
}

impl Message {
    /// Cuts it somewhere, which nothing that is left of it can hide.
    pub(super) fn truncate(&mut self, rng: &mut fastrand::Rng) {
        self.n_bytes = rng.usize(..self.n_bytes.max(1));
    }

    /// What the socket code makes of it after it has tried to decode it.
    pub(super) fn payload(&self) -> Payload {
        let bytes = &self.bytes[..self.n_bytes];
        if self.n_bytes == self.bytes.len() {
            return Payload::Readable(bytes.to_vec());
        }
        assert!(EventBatch::decode(bytes).is_err(), "a truncated batch is decoded");
        Payload::Unreadable(PayloadDigest::of(bytes))
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) id: ProcessId,
    pub(super) engine: Engine,
    next_seq: u64,
    buffer: VecDeque<Message>,
    /// Batches that the replay buffer keeps.
    buffer_steps: usize,
    /// Everything that was announced, for whoever follows one program.
    pub(super) diary: Option<Vec<String>>,
}

impl Process {
    pub(super) fn new(id: ProcessId, traits: EngineTraits, buffer_steps: usize, traced: bool) -> Self {
        let diary = traced.then(|| vec![format!("{id:?} {traits:?}")]);
        Self { id, engine: Engine::new(traits), next_seq: 0, buffer: VecDeque::new(), buffer_steps, diary }
    }

    /// Some random work, and the batch that tells of it.
    pub(super) fn publish(&mut self, rng: &mut fastrand::Rng) -> Option<Message> {
        let announcements = self.engine.work(rng);
        self.send(&announcements)
    }

    /// A batch in which every kind of prompt is shown.
    pub(super) fn publish_all_kinds(&mut self, rng: &mut fastrand::Rng) -> Option<Message> {
        let announcements = self.engine.show_all_kinds(rng);
        self.send(&announcements)
    }

    /// Some random work that nobody learns of: its batch cannot be decoded, wherever it comes from.
    pub(super) fn publish_poison(&mut self, rng: &mut fastrand::Rng) -> Option<Message> {
        let mut message = self.publish(rng)?;
        message.truncate(rng);
        if let Some(buffered) = self.buffer.back_mut() {
            *buffered = message.clone();
        }
        Some(message)
    }

    /// What a replay from `from` on sends before END.
    pub(super) fn replay(&self, from: u64) -> impl Iterator<Item = &Message> {
        self.buffer.iter().filter(move |message| message.seq >= from)
    }

    /// A step without events sends nothing.
    fn send(&mut self, announcements: &[Announcement]) -> Option<Message> {
        if announcements.is_empty() {
            return None;
        }
        let seq = self.next_seq;
        if let Some(diary) = &mut self.diary {
            diary.push(format!("{seq}: {announcements:?}"));
        }
        self.next_seq += 1;
        let ts = Origin { process: self.id, seq }.as_ts();
        let bytes: Rc<[u8]> = encode(ts, announcements, self.engine.traits.form).into();
        let message = Message { seq, n_bytes: bytes.len(), bytes };
        self.buffer.push_back(message.clone());
        if self.buffer.len() > self.buffer_steps {
            self.buffer.pop_front();
        }
        Some(message)
    }
}
