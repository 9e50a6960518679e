//! Where a source stands in its publisher's sequence of batches: a pure state machine.
//!
//! The socket code tells it what happened ([`Input`]) and when, and does what it answers ([`Action`]). It makes of a
//! live stream that loses batches, and of a replay that loses replies, one sequence without holes:
//!
//! - *Overlap.* Nothing on the wire names the publisher's process, and numbers may go on rising across a restart. So
//!   every replay is asked from the last known batch, that one included: if it comes back with the same payload, it is
//!   the same process, and what follows may be appended. If it does not, everything known is retired and the buffer is
//!   asked from 0. This holds after a reconnection, for a gap, for a suspicion, and for a snapshot that somebody
//!   offers.
//! - *Contiguous prefix.* Replies are accepted while they follow each other. A hole, an end of replies with something
//!   accepted, or silence ends the round, and the next one asks from the last known. So an END that outlived lost
//!   replies proves nothing: only a round that brings nothing new but END, or a live batch that joins, ends the
//!   catching up.
//! - A buffer that no longer begins at 0 is taken from where it begins; the source is then *incomplete*, until the
//!   snapshot of one who knew more is offered and proved.
//! - An engine that drops its whole cache makes an incomplete source complete: whatever it holds from then on is
//!   announced.
//! - Batches that are gone for good, or that nobody can decode, may have held removals, so a new generation starts
//!   behind them: knowledge is lost, but never wrong.
//! - A live number that is not above the last one of the same connection is a duplicate if its payload is, else a
//!   restart.
//! - After [`PROBE_AFTER`] of silence the replay is asked whether anything was missed. An answer that brings more than
//!   the live stream did, or none at all, makes a new connection: libzmq can be deaf without knowing it.
//! - Without a replay endpoint, or while it does not answer, the live stream is followed alone, and every reconnection
//!   or gap starts a new generation.
//! - A source that sends too much that is wrong is left alone for a while ([`Phase::Quarantined`]).
//!
//! Each batch is applied at most once per generation, in ascending order without holes. Held batches are bounded by
//! [`MAX_HELD_BYTES`] and by [`MAX_CATCH_UP`].

mod catch_up;
mod held;
mod input;
#[cfg(test)]
mod tests;
mod trust;

use std::time::Duration;

use catch_up::{CatchUp, Why};
pub use catch_up::{MAX_CATCH_UP, MAX_STALLED_ROUNDS, MAX_UNPROVED_ROUNDS, MAX_WAIT};
use held::Held;
pub use held::MAX_HELD_BYTES;
pub use input::{Action, Cause, Incident, Input, Overlap, Payload, PayloadDigest, Phase, SeqNo, Via};
use trust::{Recent, Repeat, Strikes};

/// How long the knowledge of a broken connection is credited. Longer than a network hiccup, shorter than a cache lives.
pub const DISCONNECTED_GRACE: Duration = Duration::from_secs(60);
/// Batches in vLLM's replay buffer by default (`buffer_steps`).
const USUAL_BUFFER: u64 = 10_000;
/// Silence of a live source after which the replay is asked whether anything was missed.
pub const PROBE_AFTER: Duration = Duration::from_secs(60);

/// See the module.
#[derive(Debug)]
pub struct Continuity {
    has_replay: bool,
    state: State,
    /// None while there is no generation.
    known: Option<Known>,
    /// A snapshot that nobody has looked at yet.
    offer: Option<Offer>,
    /// Highest number that the live stream of this connection brought.
    last_live: Option<SeqNo>,
    recent: Recent,
    strikes: Strikes,
    /// When what is known is retired unless it is proved before: set when the connection is lost, gone when it is
    /// proved.
    unproved_until: Option<Duration>,
    /// Whether live batches far behind what is known were doubted already on this connection.
    has_doubted: bool,
    /// False after the replay endpoint was given up in silence, until it says something.
    replay_answers: bool,
}

#[derive(Debug)]
enum State {
    /// There is no connection. What was known stays credited until `retire_at`.
    Away { retire_at: Option<Duration> },
    /// Everything before the first missing batch is applied; newer live batches wait.
    CatchingUp(CatchUp),
    /// The live stream is followed; it last said something at `heard_at`.
    Live { heard_at: Duration },
    /// Left alone.
    Quarantined { until: Duration },
}

/// What the running generation contains.
#[derive(Clone, Copy, Debug)]
struct Known {
    /// The batch to come; none: any batch is the first.
    next: Option<SeqNo>,
    /// The batch before.
    last: Option<Overlap>,
    /// Whether everything since the publisher's start is there.
    complete: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Offer {
    overlap: Overlap,
    complete: bool,
}

impl Offer {
    /// Whether it may hold more than the publisher's buffer: that begins at 0 for as long as it has not overflowed.
    fn is_better_than_the_buffer(self) -> bool {
        self.complete || self.overlap.seq.0 >= USUAL_BUFFER
    }
}

impl Known {
    /// A generation without batches.
    fn nothing(complete: bool) -> Self {
        Self { next: None, last: None, complete }
    }

    fn up_to(last: Overlap, complete: bool) -> Self {
        Self { next: Some(last.seq.next()), last: Some(last), complete }
    }
}

impl Continuity {
    /// A source that is not connected yet.
    pub fn new(has_replay: bool) -> Self {
        Self {
            has_replay,
            state: State::Away { retire_at: None },
            known: None,
            offer: None,
            last_live: None,
            recent: Recent::default(),
            strikes: Strikes::default(),
            unproved_until: None,
            has_doubted: false,
            replay_answers: true,
        }
    }

    /// The state in one word.
    pub fn phase(&self) -> Phase {
        let settled = if self.is_complete() { Phase::Live } else { Phase::Incomplete };
        match &self.state {
            State::Away { .. } if self.known.is_some() => Phase::Stale,
            State::Away { .. } => Phase::Connecting,
            State::CatchingUp(catch_up) => match catch_up.why {
                Why::Reconnected | Why::Suspect => Phase::Stale,
                Why::Probe => settled,
                Why::Offer(_) if self.known.is_some() => settled,
                Why::Offer(_) | Why::Beginning | Why::Gap => Phase::CatchingUp,
            },
            State::Live { .. } => settled,
            State::Quarantined { .. } => Phase::Quarantined,
        }
    }

    /// Whether it waits for a connection.
    pub fn is_away(&self) -> bool {
        matches!(self.state, State::Away { .. })
    }

    /// Whether it follows the live stream, with nothing held and no replay running.
    pub fn is_following(&self) -> bool {
        matches!(self.state, State::Live { .. })
    }

    /// The last batch of the running generation.
    pub fn overlap(&self) -> Option<Overlap> {
        self.known.and_then(|known| known.last)
    }

    /// Whether the running generation contains everything since the publisher's start.
    pub fn is_complete(&self) -> bool {
        self.known.is_some_and(|known| known.complete && known.next.is_some())
    }

    /// What the live batches cost that wait for earlier ones; at most [`MAX_HELD_BYTES`].
    pub fn n_held_bytes(&self) -> usize {
        match &self.state {
            State::CatchingUp(catch_up) => catch_up.held.n_bytes(),
            State::Away { .. } | State::Live { .. } | State::Quarantined { .. } => 0,
        }
    }

    /// Moves the state. `now` is the time since any fixed moment and never goes back.
    pub fn step(&mut self, now: Duration, input: Input) -> Vec<Action> {
        let mut actions = Vec::new();
        match input {
            Input::Connected => self.connected(now, &mut actions),
            Input::Disconnected => self.disconnected(now, &mut actions),
            Input::Live { seq, payload } => self.live(now, seq, payload, &mut actions),
            Input::ReplayStarted => self.replay_started(now),
            Input::Reply { seq, payload } => self.reply(now, seq, payload, &mut actions),
            Input::ReplayEnd => self.replay_end(now, &mut actions),
            Input::Offer { overlap, complete } => {
                self.offered(now, Offer { overlap, complete }, &mut actions);
            }
            Input::NotRestored => self.known.iter_mut().for_each(|known| known.complete = false),
            Input::Cleared => self.known.iter_mut().for_each(|known| known.complete = true),
            Input::Suspect => self.suspect(now, &mut actions),
            Input::Tick => self.tick(now, &mut actions),
        }
        actions
    }

    /// Whoever obeys keeps the latest snapshot only, so the one that is being proved is no longer there to be restored.
    fn offered(&mut self, now: Duration, offer: Offer, actions: &mut Vec<Action>) {
        self.offer = Some(offer);
        match &mut self.state {
            State::CatchingUp(CatchUp { why: Why::Offer(_), held, .. }) => {
                let held = std::mem::take(held);
                self.catch_up(now, Why::Offer(offer), held, actions);
            }
            _ => self.consider_offer(now, actions),
        }
    }

    fn connected(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if let State::Quarantined { .. } = self.state {
            return;
        }
        self.last_live = None;
        self.recent.clear();
        self.has_doubted = false;
        let was_known = self.known.is_some();
        match (self.overlap(), self.offer) {
            (Some(_), _) if self.has_replay => self.catch_up(now, Why::Reconnected, Held::default(), actions),
            (None, Some(offer)) if self.has_replay && offer.is_better_than_the_buffer() => {
                self.end_generation(actions);
                self.catch_up(now, Why::Offer(offer), Held::default(), actions);
            }
            _ => {
                let cause = if was_known { Cause::Unproved } else { Cause::First };
                self.begin(now, cause, Held::default(), actions);
            }
        }
    }

    fn disconnected(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if matches!(self.state, State::Away { .. } | State::Quarantined { .. }) {
            return;
        }
        actions.push(Action::CloseReplay);
        self.leave(now);
    }

    /// Waits for the next connection. Connections that prove nothing do not prolong the wait.
    fn leave(&mut self, now: Duration) {
        let retire_at = self.known.map(|_| *self.unproved_until.get_or_insert(now + DISCONNECTED_GRACE));
        self.state = State::Away { retire_at };
    }

    fn end_generation(&mut self, actions: &mut Vec<Action>) {
        self.unproved_until = None;
        if self.known.take().is_some() {
            actions.push(Action::EndGeneration);
        }
    }

    /// Starts a generation at the publisher's beginning, or, without a replay, at the next batch.
    fn begin(&mut self, now: Duration, cause: Cause, held: Held, actions: &mut Vec<Action>) {
        actions.push(Action::StartGeneration(cause));
        self.known = Some(Known::nothing(true));
        // What came before may be of another process, whose numbers say nothing about those of this one.
        self.last_live = held.last();
        self.recent.clear();
        self.unproved_until = None;
        self.has_doubted = false;
        if self.has_replay {
            self.catch_up(now, Why::Beginning, held, actions);
        } else {
            self.follow(now, held, actions);
        }
    }

    /// Starts a generation behind batches that nothing brings.
    fn begin_behind(&mut self, known: Known, actions: &mut Vec<Action>) {
        // One that holds nothing need not be retired.
        if self.known.is_none_or(|known| known.next.is_some()) {
            actions.push(Action::StartGeneration(Cause::BatchesLost));
        }
        self.known = Some(known);
    }

    fn live(&mut self, now: Duration, seq: SeqNo, payload: Payload, actions: &mut Vec<Action>) {
        if matches!(self.state, State::Away { .. } | State::Quarantined { .. }) {
            return;
        }
        let overlap = Overlap { seq, digest: payload.digest() };
        match self.repeats(overlap) {
            Some(Repeat::Same) => return,
            // Above what this connection brought: the replay was faster, or it is another process that nobody told of.
            Some(Repeat::Unknown) if self.last_live.is_none_or(|last_live| seq > last_live) => self.doubt(now, actions),
            Some(Repeat::Other | Repeat::Unknown) => {
                if self.strike(now, actions) {
                    return;
                }
                self.begin(now, Cause::Restarted, Held::default(), actions);
            }
            None => {}
        }
        self.last_live = Some(seq);
        self.recent.push(overlap);
        match payload {
            Payload::Readable(payload) => self.readable(now, overlap, payload, actions),
            Payload::Unreadable(_) => self.unreadable(now, overlap, actions),
        }
    }

    /// How a live batch compares with one that came before under its number; none: its number is new.
    fn repeats(&self, overlap: Overlap) -> Option<Repeat> {
        let next = self.known.and_then(|known| known.next);
        let is_old = self.last_live.is_some_and(|last_live| overlap.seq <= last_live)
            || next.is_some_and(|next| overlap.seq < next);
        is_old.then(|| self.recent.compare(overlap.seq, overlap.digest))
    }

    fn readable(&mut self, now: Duration, overlap: Overlap, payload: Vec<u8>, actions: &mut Vec<Action>) {
        let seq = overlap.seq;
        match &mut self.state {
            State::Away { .. } | State::Quarantined { .. } => {}
            State::CatchingUp(catch_up) => {
                catch_up.heard_live = true;
                if !catch_up.held.push(seq, payload) {
                    actions.push(Action::Report(Incident::HeldOverflow));
                }
                self.join(now, actions);
            }
            State::Live { heard_at } => {
                *heard_at = now;
                match self.known.and_then(|known| known.next) {
                    Some(next) if seq < next => {}
                    Some(next) if seq > next => self.gap(now, next, Held::of(seq, payload), actions),
                    _ => self.apply(overlap, payload, Via::Live, actions),
                }
            }
        }
    }

    /// A live batch that cannot be decoded is as good as lost: the replay may have it whole.
    fn unreadable(&mut self, now: Duration, overlap: Overlap, actions: &mut Vec<Action>) {
        if self.strike(now, actions) {
            return;
        }
        match &mut self.state {
            State::Away { .. } | State::Quarantined { .. } => {}
            State::CatchingUp(catch_up) => catch_up.heard_live = true,
            State::Live { heard_at } => {
                *heard_at = now;
                let expected = self.known.and_then(|known| known.next).unwrap_or(overlap.seq);
                if self.has_replay {
                    actions.push(Action::Report(Incident::Gap { expected, received: overlap.seq }));
                    self.catch_up(now, Why::Gap, Held::default(), actions);
                } else {
                    actions.push(Action::Report(Incident::UnreadableBatch { seq: overlap.seq }));
                    self.begin_behind(Known::up_to(overlap, false), actions);
                }
            }
        }
    }

    /// The live stream goes on with `held` where `expected` was due.
    fn gap(&mut self, now: Duration, expected: SeqNo, held: Held, actions: &mut Vec<Action>) {
        let received = held.first().unwrap_or(expected);
        actions.push(Action::Report(Incident::Gap { expected, received }));
        if self.has_replay {
            self.catch_up(now, Why::Gap, held, actions);
        } else {
            self.begin_behind(Known::nothing(false), actions);
            self.follow(now, held, actions);
        }
    }

    fn apply(&mut self, overlap: Overlap, payload: Vec<u8>, via: Via, actions: &mut Vec<Action>) {
        let known = self.known.get_or_insert(Known::nothing(true));
        let is_complete = match known.next {
            Some(next) => known.complete && overlap.seq == next,
            None => overlap.seq == SeqNo(0),
        };
        *known = Known::up_to(overlap, is_complete);
        actions.push(Action::Apply { seq: overlap.seq, payload, via });
    }

    /// Applies the held batches up to their end or to the first hole among them.
    fn follow(&mut self, now: Duration, mut held: Held, actions: &mut Vec<Action>) {
        while let Some((seq, payload)) = held.pop_up_to(self.known.and_then(|known| known.next)) {
            if self.known.and_then(|known| known.next).is_none_or(|next| seq == next) {
                let overlap = Overlap { seq, digest: PayloadDigest::of(&payload) };
                self.apply(overlap, payload, Via::Live, actions);
            }
        }
        match self.known.and_then(|known| known.next) {
            Some(expected) if !held.is_empty() => self.gap(now, expected, held, actions),
            _ => self.go_live(now, actions),
        }
    }

    fn go_live(&mut self, now: Duration, actions: &mut Vec<Action>) {
        self.unproved_until = None;
        self.state = State::Live { heard_at: now };
        self.consider_offer(now, actions);
    }

    /// A snapshot is wanted while the beginning is not known, and only if it contains it.
    fn consider_offer(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let (State::Live { .. }, Some(offer)) = (&self.state, self.offer) else { return };
        if self.has_replay && offer.complete && !self.is_complete() {
            self.catch_up(now, Why::Offer(offer), Held::default(), actions);
        } else {
            self.drop_offer(actions);
        }
    }

    fn drop_offer(&mut self, actions: &mut Vec<Action>) {
        if self.offer.take().is_some() {
            actions.push(Action::DropOffer);
        }
    }

    /// Has it proved, once per connection, that batches far behind what is known are only late.
    fn doubt(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if self.is_following() && !std::mem::replace(&mut self.has_doubted, true) {
            self.suspect(now, actions);
        }
    }

    fn suspect(&mut self, now: Duration, actions: &mut Vec<Action>) {
        match &mut self.state {
            State::Away { .. } | State::Quarantined { .. } => {}
            State::Live { .. } if !self.has_replay => self.begin(now, Cause::Unproved, Held::default(), actions),
            State::Live { .. } => self.catch_up(now, Why::Suspect, Held::default(), actions),
            State::CatchingUp(catch_up) => {
                // A new round proves it again, and until then nothing joins. A snapshot has to wait.
                catch_up.is_sure = false;
                if matches!(catch_up.why, Why::Offer(_)) && self.known.is_some() {
                    catch_up.why = Why::Suspect;
                }
                self.ask(actions);
            }
        }
    }

    fn tick(&mut self, now: Duration, actions: &mut Vec<Action>) {
        match &mut self.state {
            State::Away { retire_at: Some(retire_at) } if now >= *retire_at => {
                self.state = State::Away { retire_at: None };
                self.end_generation(actions);
            }
            State::Live { heard_at } if now >= *heard_at + PROBE_AFTER && self.has_replay && self.replay_answers => {
                self.catch_up(now, Why::Probe, Held::default(), actions);
            }
            State::Quarantined { until } if now >= *until => self.state = State::Away { retire_at: None },
            State::CatchingUp(CatchUp { why: Why::Reconnected, held, .. })
                if self.unproved_until.is_some_and(|until| now >= until) =>
            {
                let held = std::mem::take(held);
                self.begin(now, Cause::Unproved, held, actions);
            }
            State::CatchingUp(_) => self.check_deadlines(now, actions),
            _ => {}
        }
    }

    /// Notes that the source did something wrong; true: it was once too often, and the source is left alone.
    fn strike(&mut self, now: Duration, actions: &mut Vec<Action>) -> bool {
        let Some(length) = self.strikes.add(now) else { return false };
        actions.push(Action::CloseReplay);
        self.end_generation(actions);
        actions.push(Action::Report(Incident::Quarantined(length)));
        self.state = State::Quarantined { until: now + length };
        true
    }
}
