//! What has to be true of the continuity machine for any inputs at any times, sensible or not: it does not panic,
//! applies batches only while it is connected, in ascending order and without holes, each once per generation, holds a
//! bounded number of bytes, and comes to rest when nothing happens any more.
//!
//! The bytes are read as a program: one byte for what happens, then its arguments.

use std::time::Duration;

use warmroute::events::continuity::{
    Action, Continuity, Input, MAX_HELD_BYTES, Overlap, Payload, PayloadDigest, Phase, SeqNo,
};

/// Payload of a batch that fills the room for held batches quickly.
const LARGE_PAYLOAD: usize = 9 << 20;
/// More inputs show nothing new.
const MAX_INPUTS: usize = 400;
/// Time after which nothing may be left to do: the longest quarantine, and some rounds of replay.
const REST: Duration = Duration::from_secs(700);
const TICK: Duration = Duration::from_millis(500);
/// Replays that may be asked for in that time; a probe per minute among them.
const MAX_REPLAYS_AT_REST: usize = 100;

pub(crate) fn run(bytes: &[u8]) {
    let mut program = Program { bytes };
    let Some(first) = program.byte() else { return };
    let mut machine = Machine::new(first & 1 == 1);
    for _ in 0..MAX_INPUTS {
        let Some(step) = program.step() else { break };
        match step {
            Step::Wait(time) => machine.now += time,
            Step::Happens(input) => machine.step(input),
        }
    }
    machine.rest();
}

struct Program<'a> {
    bytes: &'a [u8],
}

enum Step {
    Wait(Duration),
    Happens(Input),
}

impl Program<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.bytes.split_first()?;
        self.bytes = rest;
        Some(*first)
    }

    fn step(&mut self) -> Option<Step> {
        Some(Step::Happens(match self.byte()? % 16 {
            0 => Input::Connected,
            1 => Input::Disconnected,
            2..=4 => Input::Live { seq: self.seq()?, payload: self.payload()? },
            5 => Input::ReplayStarted,
            6..=8 => Input::Reply { seq: self.seq()?, payload: self.payload()? },
            9 => Input::ReplayEnd,
            10 => {
                let (seq, payload) = (self.seq()?, self.payload()?);
                Input::Offer { overlap: Overlap { seq, digest: payload.digest() }, complete: self.byte()? & 1 == 1 }
            }
            11 => Input::NotRestored,
            12 => Input::Suspect,
            13 => Input::Tick,
            14 => return Some(Step::Wait(Duration::from_millis(10 * u64::from(self.byte()?)))),
            _ => return Some(Step::Wait(Duration::from_secs(u64::from(self.byte()?)))),
        }))
    }

    /// Small numbers mostly, and the largest: one more is END.
    fn seq(&mut self) -> Option<SeqNo> {
        self.byte()
            .map(|byte| SeqNo(if byte < 250 { u64::from(byte) } else { u64::MAX - u64::from(256 - u16::from(byte)) }))
    }

    /// Few different ones, so that they repeat.
    fn payload(&mut self) -> Option<Payload> {
        let byte = self.byte()?;
        Some(match byte % 16 {
            0 => Payload::Unreadable(PayloadDigest(u128::from(byte))),
            1 => Payload::Readable(vec![0; LARGE_PAYLOAD]),
            _ => Payload::Readable(vec![byte % 4]),
        })
    }
}

/// The machine, and what a socket would know.
struct Machine {
    continuity: Continuity,
    now: Duration,
    is_connected: bool,
    generation: Option<Generation>,
    /// The snapshot that is at hand.
    offer: Option<(Overlap, bool)>,
    n_replays: usize,
}

#[derive(Clone, Copy, Default)]
struct Generation {
    /// Whether it began with batch 0, or with a snapshot that did.
    is_complete: Option<bool>,
    last: Option<SeqNo>,
}

impl Machine {
    fn new(has_replay: bool) -> Self {
        Self {
            continuity: Continuity::new(has_replay),
            now: Duration::ZERO,
            is_connected: false,
            generation: None,
            offer: None,
            n_replays: 0,
        }
    }

    fn step(&mut self, input: Input) {
        match &input {
            // The socket code makes no connection while the source is left alone.
            Input::Connected if self.continuity.phase() == Phase::Quarantined => return,
            Input::Connected => self.is_connected = true,
            Input::Disconnected => self.is_connected = false,
            Input::Offer { overlap, complete } => self.offer = Some((*overlap, *complete)),
            _ => {}
        }
        for action in self.continuity.step(self.now, input) {
            self.obey(&action);
        }
        self.check();
    }

    fn obey(&mut self, action: &Action) {
        match action {
            Action::StartGeneration(_) => self.generation = Some(Generation::default()),
            Action::EndGeneration => self.generation = None,
            Action::Restore => {
                let (overlap, is_complete) = self.offer.take().expect("what is restored was offered");
                self.generation = Some(Generation { is_complete: Some(is_complete), last: Some(overlap.seq) });
            }
            Action::DropOffer => self.offer = None,
            Action::RequestReplay { .. } => self.n_replays += 1,
            Action::Apply { seq, .. } => self.apply(*seq),
            Action::Reconnect => self.is_connected = false,
            Action::CloseReplay | Action::Report(_) => {}
        }
    }

    fn apply(&mut self, seq: SeqNo) {
        assert!(self.is_connected, "{seq:?} is applied without a connection");
        let generation = self.generation.as_mut().expect("a batch is applied in a generation");
        if let Some(last) = generation.last {
            assert_eq!(Some(seq.0), last.0.checked_add(1), "batches are applied in order and without holes");
        }
        generation.is_complete.get_or_insert(seq == SeqNo(0));
        generation.last = Some(seq);
    }

    fn check(&self) {
        let phase = self.continuity.phase();
        assert!(self.continuity.n_held_bytes() <= MAX_HELD_BYTES, "{} bytes are held", self.continuity.n_held_bytes());
        match phase {
            Phase::Live | Phase::Incomplete | Phase::Stale => {
                assert!(self.generation.is_some(), "{phase:?} of nothing");
            }
            Phase::Connecting | Phase::Quarantined => assert!(self.generation.is_none(), "{phase:?} with knowledge"),
            Phase::CatchingUp => {}
        }
        let is_complete = self.generation.is_some_and(|generation| generation.is_complete != Some(false));
        assert!(phase != Phase::Live || is_complete, "live, but the beginning is not known");
        assert!(!self.continuity.is_complete() || is_complete, "complete, but the beginning is not known");
        if let (Some(overlap), Some(last)) = (self.continuity.overlap(), self.generation.and_then(|known| known.last)) {
            assert_eq!(overlap.seq, last, "the last batch is not the one that was applied last");
        }
    }

    /// Nothing happens any more but that time passes.
    fn rest(&mut self) {
        self.n_replays = 0;
        let until = self.now + REST;
        while self.now < until {
            self.now += TICK;
            self.step(Input::Tick);
        }
        assert!(self.n_replays <= MAX_REPLAYS_AT_REST, "{} replays without any input", self.n_replays);
        assert!(self.continuity.phase() != Phase::CatchingUp, "still catching up");
    }
}
