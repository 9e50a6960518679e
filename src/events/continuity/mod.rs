//! Where a source stands in its publisher's sequence of batches: a pure state machine.
//!
//! The socket code tells it what happened ([`Input`]) and when, and does what it answers ([`Action`]). It makes of a live stream
//! that loses batches, and of a replay that loses replies, one sequence without holes:
//!
//! - Every connection begins a new generation: nothing that was known before is credited after it. With a replay
//!   endpoint the publisher's buffer is asked from 0 while live batches are held.
//! - Replies are accepted while they follow each other. A hole, an end of replies with something accepted, or silence
//!   ends the round, and the next one asks from the first missing batch. So an END that outlived lost replies
//!   proves nothing: only a round that brings nothing but END, or a live batch that joins, ends the catching up.
//! - A buffer that no longer begins at 0 is taken from where it begins; the source is then *incomplete*.
//! - A gap in the live stream is caught up in the same way. If the batches are gone, a removal may have been among
//!   them, so a new generation starts behind the gap: knowledge is lost, but never wrong.
//! - A live sequence number that is not above the last one of the same connection means a restarted publisher, and
//!   a new generation. Numbers below the first missing one but above the last live one repeat the replay: they are dropped.
//! - Without a replay endpoint, or if it does not answer [`MAX_STALLED_ROUNDS`] times, the live stream is followed alone.
//!
//! Each batch is applied at most once per generation, in ascending order without holes. Held batches are bounded by
//! [`MAX_HELD_BYTES`].
//!
//! Known limit: a restart behind a forwarder that keeps our connection open is seen only from the second live batch on.

use std::collections::VecDeque;
use std::time::Duration;

/// Silence after a request that ends its round. vLLM answers between two batches: up to 100 ms when idle, later when busy.
const FIRST_REPLY_TIMEOUT: Duration = Duration::from_secs(3);
/// Silence after a reply that ends the round: replies, and END itself, get lost at the server's send limit.
const NEXT_REPLY_TIMEOUT: Duration = Duration::from_millis(500);
/// Rounds in a row that may bring nothing new.
pub const MAX_STALLED_ROUNDS: u32 = 4;
/// Pause after the first such round; doubles with each.
const STALL_PAUSE: Duration = Duration::from_millis(250);
/// Live batches held at most while catching up. Beyond it they are dropped, and the replay has to bring them.
pub const MAX_HELD_BYTES: usize = 64 << 20;
/// How long the knowledge of a broken connection is credited. Longer than a network hiccup, shorter than a cache lives.
const DISCONNECTED_GRACE: Duration = Duration::from_secs(60);

/// Number of a batch: from 0 per publisher process and rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SeqNo(pub u64);

impl SeqNo {
    /// The number after this one. The last number is vLLM's END marker and never that of a batch.
    fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

/// xxh3-128 of a payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PayloadDigest(pub u128);

impl PayloadDigest {
    /// Of these bytes.
    pub fn of(payload: &[u8]) -> Self {
        Self(xxhash_rust::xxh3::xxh3_128(payload))
    }
}

/// At this number the publisher sent this payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overlap {
    /// The number.
    pub seq: SeqNo,
    /// The payload.
    pub digest: PayloadDigest,
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
        /// The encoded batch.
        payload: Vec<u8>,
    },
    /// The latest replay request brought a batch.
    Reply {
        /// Its number.
        seq: SeqNo,
        /// The encoded batch.
        payload: Vec<u8>,
    },
    /// The latest replay request was answered with END.
    ReplayEnd,
    /// Time passed. Wanted a few times per second.
    Tick,
}

/// What is to be done, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Retire what is known and start anew.
    StartGeneration(Cause),
    /// Retire what is known; nothing is applied before the next [`Action::StartGeneration`].
    EndGeneration,
    /// Ask for the batches from here on, and forget any earlier request.
    RequestReplay {
        /// First batch wanted.
        from: SeqNo,
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
    /// Count this, and log it.
    Report(Incident),
}

/// Why a generation starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// A connection was made.
    Connected,
    /// The publisher started its numbers again.
    Restarted,
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
    /// The live stream lost batches.
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
}

/// A source's state in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// There is no connection.
    Disconnected,
    /// A replay is running; what it brought so far is known.
    CatchingUp,
    /// Everything since the publisher's start is known.
    Live,
    /// The live stream is followed, but its beginning is not known.
    Incomplete,
}

/// See the module.
#[derive(Debug)]
pub struct Continuity {
    has_replay: bool,
    state: State,
    /// Highest number that the live stream of this connection brought.
    last_live: Option<SeqNo>,
    /// Whether the generation contains the publisher's first batch.
    complete: bool,
}

#[derive(Debug)]
enum State {
    /// What was known stays credited until `retire_at`.
    Disconnected { retire_at: Option<Duration> },
    /// Everything before the first missing batch is applied; newer live batches wait.
    CatchingUp(CatchUp),
    /// Everything before `next` is applied; none: the next batch is the first of the generation.
    Live { next: Option<SeqNo> },
}

#[derive(Debug)]
struct CatchUp {
    /// First missing batch; none while nothing is applied, so that the first reply is the beginning.
    next: Option<SeqNo>,
    held: Held,
    round: Round,
    /// Rounds since the last one that brought something new.
    n_stalled: u32,
}

#[derive(Debug)]
enum Round {
    Asking { deadline: Duration, n_accepted: u64 },
    Pausing { until: Duration },
}

/// Live batches that wait for earlier ones, ascending.
#[derive(Debug, Default)]
struct Held {
    batches: VecDeque<(SeqNo, Vec<u8>)>,
    n_bytes: usize,
}

impl Continuity {
    /// A source that is not connected yet.
    pub fn new(has_replay: bool) -> Self {
        Self { has_replay, state: State::Disconnected { retire_at: None }, last_live: None, complete: true }
    }

    /// The state in one word.
    pub fn phase(&self) -> Phase {
        match self.state {
            State::Disconnected { .. } => Phase::Disconnected,
            State::CatchingUp(_) => Phase::CatchingUp,
            State::Live { .. } if self.complete => Phase::Live,
            State::Live { .. } => Phase::Incomplete,
        }
    }

    /// Moves the state. `now` is the time since any fixed moment.
    pub fn step(&mut self, now: Duration, input: Input) -> Vec<Action> {
        let mut actions = Vec::new();
        match input {
            Input::Connected => self.start_generation(now, Cause::Connected, &mut actions),
            Input::Disconnected => self.disconnect(now, &mut actions),
            Input::Live { seq, payload } => self.live(now, seq, payload, &mut actions),
            Input::Reply { seq, payload } => self.reply(now, seq, payload, &mut actions),
            Input::ReplayEnd => self.replay_end(now, &mut actions),
            Input::Tick => self.tick(now, &mut actions),
        }
        actions
    }

    fn start_generation(&mut self, now: Duration, cause: Cause, actions: &mut Vec<Action>) {
        actions.push(Action::StartGeneration(cause));
        self.last_live = None;
        self.complete = true;
        if self.has_replay {
            self.catch_up(now, None, Held::default(), actions);
        } else {
            self.state = State::Live { next: None };
        }
    }

    fn disconnect(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if let State::Disconnected { .. } = self.state {
            return;
        }
        actions.push(Action::CloseReplay);
        self.state = State::Disconnected { retire_at: Some(now + DISCONNECTED_GRACE) };
    }

    fn live(&mut self, now: Duration, seq: SeqNo, payload: Vec<u8>, actions: &mut Vec<Action>) {
        if let State::Disconnected { .. } = self.state {
            return;
        }
        if self.last_live.is_some_and(|last_live| seq <= last_live) {
            self.start_generation(now, Cause::Restarted, actions);
        }
        self.last_live = Some(seq);
        match &mut self.state {
            State::Disconnected { .. } => {}
            State::CatchingUp(catch_up) => {
                if !catch_up.held.push(seq, payload) {
                    actions.push(Action::Report(Incident::HeldOverflow));
                }
                self.join(now, actions);
            }
            State::Live { next } => match *next {
                Some(next) if seq < next => {}
                Some(next) if seq > next => self.gap(now, next, (seq, payload), actions),
                _ => {
                    self.complete &= next.is_some() || seq == SeqNo(0);
                    *next = Some(seq.next());
                    actions.push(Action::Apply { seq, payload, via: Via::Live });
                }
            },
        }
    }

    /// The live stream went on with `received` where `expected` was due.
    fn gap(&mut self, now: Duration, expected: SeqNo, received: (SeqNo, Vec<u8>), actions: &mut Vec<Action>) {
        let (seq, payload) = received;
        actions.push(Action::Report(Incident::Gap { expected, received: seq }));
        let mut held = Held::default();
        held.push(seq, payload);
        if self.has_replay {
            self.catch_up(now, Some(expected), held, actions);
        } else {
            self.start_from_held(now, Some(expected), held, actions);
        }
    }

    fn reply(&mut self, now: Duration, seq: SeqNo, payload: Vec<u8>, actions: &mut Vec<Action>) {
        let State::CatchingUp(catch_up) = &mut self.state else { return };
        let Round::Asking { deadline, n_accepted } = &mut catch_up.round else { return };
        match catch_up.next {
            // Not progress: a replayer that repeats itself must not keep the round open.
            Some(next) if seq < next => return,
            // A hole behind something accepted, or one in front that may still be filled: ask again.
            Some(next) if seq > next && (*n_accepted > 0 || catch_up.n_stalled < MAX_STALLED_ROUNDS) => {
                let accepted = *n_accepted > 0;
                return self.end_round(now, accepted, actions);
            }
            Some(next) if seq > next => {
                // The publisher's buffer has moved on: a removal may have been among what is gone.
                actions.push(Action::StartGeneration(Cause::BatchesLost));
                self.complete = false;
            }
            Some(_) => {}
            None => self.complete = seq == SeqNo(0),
        }
        *deadline = now + NEXT_REPLY_TIMEOUT;
        *n_accepted += 1;
        catch_up.n_stalled = 0;
        catch_up.next = Some(seq.next());
        actions.push(Action::Apply { seq, payload, via: Via::Replay });
        self.join(now, actions);
    }

    fn replay_end(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let State::CatchingUp(catch_up) = &mut self.state else { return };
        let Round::Asking { n_accepted, .. } = catch_up.round else { return };
        if n_accepted == 0 && catch_up.held.batches.is_empty() {
            // The publisher has nothing from `next` on; if nothing is applied either, it has published nothing yet.
            let next = catch_up.next.unwrap_or(SeqNo(0));
            self.state = State::Live { next: Some(next) };
            actions.push(Action::CloseReplay);
        } else {
            self.end_round(now, n_accepted > 0, actions);
        }
    }

    fn tick(&mut self, now: Duration, actions: &mut Vec<Action>) {
        match &mut self.state {
            State::Disconnected { retire_at } if retire_at.is_some_and(|retire_at| now >= retire_at) => {
                *retire_at = None;
                actions.push(Action::EndGeneration);
            }
            State::CatchingUp(CatchUp { round: Round::Asking { deadline, n_accepted }, .. }) if now >= *deadline => {
                let accepted = *n_accepted > 0;
                self.end_round(now, accepted, actions);
            }
            State::CatchingUp(CatchUp { round: Round::Pausing { until }, .. }) if now >= *until => {
                self.ask(now, actions);
            }
            _ => {}
        }
    }

    /// Ends a round that did not complete the sequence: asks again, at once if it brought something, else after a
    /// pause and not for ever.
    fn end_round(&mut self, now: Duration, accepted: bool, actions: &mut Vec<Action>) {
        let State::CatchingUp(catch_up) = &mut self.state else { return };
        if accepted {
            catch_up.n_stalled = 0;
            return self.ask(now, actions);
        }
        catch_up.n_stalled += 1;
        if catch_up.n_stalled > MAX_STALLED_ROUNDS {
            return self.give_up(now, actions);
        }
        catch_up.round = Round::Pausing { until: now + STALL_PAUSE * 2_u32.pow(catch_up.n_stalled - 1) };
        actions.push(Action::CloseReplay);
    }

    /// Follows the live stream without what the replay could not bring.
    fn give_up(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let State::CatchingUp(catch_up) = &mut self.state else { return };
        let (next, held) = (catch_up.next, std::mem::take(&mut catch_up.held));
        actions.push(Action::Report(Incident::ReplayGaveUp));
        actions.push(Action::CloseReplay);
        self.complete = false;
        if held.batches.is_empty() {
            self.state = State::Live { next };
        } else {
            self.start_from_held(now, next, held, actions);
        }
    }

    /// Starts behind a gap that nothing fills, with the first held batch. What was applied before the gap, if
    /// anything, is retired.
    fn start_from_held(&mut self, now: Duration, next: Option<SeqNo>, held: Held, actions: &mut Vec<Action>) {
        if next.is_some() {
            actions.push(Action::StartGeneration(Cause::BatchesLost));
        }
        self.complete = false;
        let first = held.batches.front().map(|(seq, _)| *seq);
        self.follow(now, first, held, actions);
    }

    /// Goes live if the held batches join what is applied.
    fn join(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let State::CatchingUp(catch_up) = &mut self.state else { return };
        let Some((first, _)) = catch_up.held.batches.front() else { return };
        if catch_up.next.is_some_and(|next| *first <= next) {
            let (next, held) = (catch_up.next, std::mem::take(&mut catch_up.held));
            actions.push(Action::CloseReplay);
            self.follow(now, next, held, actions);
        }
    }

    /// Applies the held batches from `next` on, up to their end or the first hole among them.
    fn follow(&mut self, now: Duration, next: Option<SeqNo>, mut held: Held, actions: &mut Vec<Action>) {
        let mut next = next;
        while let Some((seq, payload)) = held.pop_up_to(next) {
            if next.is_none_or(|next| seq == next) {
                next = Some(seq.next());
                actions.push(Action::Apply { seq, payload, via: Via::Live });
            }
        }
        match (held.batches.front(), next) {
            (Some((received, _)), Some(expected)) => {
                actions.push(Action::Report(Incident::Gap { expected, received: *received }));
                self.catch_up(now, next, held, actions);
            }
            _ => self.state = State::Live { next },
        }
    }

    fn catch_up(&mut self, now: Duration, next: Option<SeqNo>, held: Held, actions: &mut Vec<Action>) {
        let round = Round::Pausing { until: now };
        self.state = State::CatchingUp(CatchUp { next, held, round, n_stalled: 0 });
        self.ask(now, actions);
    }

    fn ask(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let State::CatchingUp(catch_up) = &mut self.state else { return };
        catch_up.round = Round::Asking { deadline: now + FIRST_REPLY_TIMEOUT, n_accepted: 0 };
        actions.push(Action::RequestReplay { from: catch_up.next.unwrap_or(SeqNo(0)) });
    }
}

/// What an empty batch costs to hold.
const BATCH_OVERHEAD: usize = size_of::<(SeqNo, Vec<u8>)>();

impl Held {
    /// Holds a batch; false: there was no room, and all are dropped.
    fn push(&mut self, seq: SeqNo, payload: Vec<u8>) -> bool {
        self.n_bytes += payload.len() + BATCH_OVERHEAD;
        self.batches.push_back((seq, payload));
        let fits = self.n_bytes <= MAX_HELD_BYTES;
        if !fits {
            *self = Self::default();
        }
        fits
    }

    /// Takes the first batch if it is not behind `next`.
    fn pop_up_to(&mut self, next: Option<SeqNo>) -> Option<(SeqNo, Vec<u8>)> {
        let (first, _) = self.batches.front()?;
        if next.is_some_and(|next| *first > next) {
            return None;
        }
        let (seq, payload) = self.batches.pop_front()?;
        self.n_bytes -= payload.len() + BATCH_OVERHEAD;
        Some((seq, payload))
    }
}

#[cfg(test)]
mod tests;
