//! Catching up through the publisher's lossy replay.

use std::time::Duration;

use super::held::Held;
use super::input::{Action, Cause, Incident, Overlap, Payload, SeqNo, Via};
use super::{Continuity, Known, Offer, State};

/// Silence after a request that ends its round. vLLM answers between two batches: up to 100 ms when idle, later when
/// busy.
const FIRST_REPLY_TIMEOUT: Duration = Duration::from_secs(3);
/// Silence after a reply that ends the round: replies, and END itself, get lost at the server's send limit.
const NEXT_REPLY_TIMEOUT: Duration = Duration::from_millis(500);
/// Rounds in a row that may bring nothing new.
pub const MAX_STALLED_ROUNDS: u32 = 4;
/// Rounds in a row that may be answered without the batch that proves the process. More than one, since a reply gets
/// lost; few, since what is known may be wrong.
pub const MAX_UNPROVED_ROUNDS: u32 = 2;
/// Pause after a round without progress; doubles with each.
const STALL_PAUSE: Duration = Duration::from_millis(250);
/// Longest that live batches wait for a replay, from its first request on.
pub const MAX_CATCH_UP: Duration = Duration::from_secs(120);
/// Longest that a request may wait for its turn: as long as it takes when all engines of a large pool come up at once.
pub const MAX_WAIT: Duration = Duration::from_secs(900);
/// Spread of the requests for whole buffers, which keep a publisher busy for a while: every replica asks at the same
/// time when an engine comes up.
const WHOLE_BUFFER_SPREAD: Duration = Duration::from_millis(100);

/// The state of catching up.
#[derive(Debug)]
pub(super) struct CatchUp {
    pub(super) why: Why,
    pub(super) held: Held,
    /// Whether the live stream said anything meanwhile.
    pub(super) heard_live: bool,
    /// Whether replies left out batches that none brought.
    has_hole: bool,
    /// Whether replies were proved to come from the process whose batches are known.
    pub(super) is_sure: bool,
    round: Round,
    n_stalled: u32,
    n_unproved: u32,
    n_replayed: u64,
    has_answer: bool,
    has_asked: bool,
    until: Duration,
}

/// Why it is done; says what it means if the process is not the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Why {
    /// Nothing is known.
    Beginning,
    /// The live stream lost batches.
    Gap,
    /// There is a new connection.
    Reconnected,
    /// There is a snapshot.
    Offer(Offer),
    /// Nothing was heard for a while.
    Probe,
    /// Somebody doubts that it is the same process.
    Suspect,
}

#[derive(Debug)]
enum Round {
    /// The request waits for its turn.
    Requested,
    /// Replies come.
    Asking {
        deadline: Duration,
        is_proved: bool,
        n_accepted: u64,
    },
    Pausing {
        until: Duration,
    },
}

/// How a round ended that did not complete the sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RoundEnd {
    /// It brought something.
    Progress,
    /// It brought nothing new.
    Stalled,
    /// It was answered without the batch that proves the process.
    Unproved,
}

impl Continuity {
    pub(super) fn catch_up(&mut self, now: Duration, why: Why, held: Held, actions: &mut Vec<Action>) {
        self.state = State::CatchingUp(CatchUp {
            why,
            held,
            heard_live: false,
            has_hole: false,
            is_sure: false,
            round: Round::Requested,
            n_stalled: 0,
            n_unproved: 0,
            n_replayed: 0,
            has_answer: false,
            has_asked: false,
            until: now + MAX_WAIT,
        });
        self.ask(actions);
    }

    /// The batch that has to come back first; none: any batch is the beginning.
    fn anchor(&self) -> Option<Overlap> {
        match &self.state {
            State::CatchingUp(CatchUp { why: Why::Offer(offer), .. }) => Some(offer.overlap),
            _ => self.overlap(),
        }
    }

    pub(super) fn ask(&mut self, actions: &mut Vec<Action>) {
        let anchor = self.anchor();
        let State::CatchingUp(catch_up) = &mut self.state else { return };
        catch_up.round = Round::Requested;
        let from = anchor.map_or(SeqNo(0), |anchor| anchor.seq);
        let within = if anchor.is_none() { WHOLE_BUFFER_SPREAD } else { Duration::ZERO };
        actions.push(Action::RequestReplay { from, within });
    }

    pub(super) fn replay_started(&mut self, now: Duration) {
        let State::CatchingUp(catch_up) = &mut self.state else { return };
        if !matches!(catch_up.round, Round::Requested) {
            return;
        }
        catch_up.round = Round::Asking { deadline: now + FIRST_REPLY_TIMEOUT, is_proved: false, n_accepted: 0 };
        if !std::mem::replace(&mut catch_up.has_asked, true) {
            catch_up.until = now + MAX_CATCH_UP;
        }
    }

    pub(super) fn reply(&mut self, now: Duration, seq: SeqNo, payload: Payload, actions: &mut Vec<Action>) {
        let anchor = self.anchor();
        let State::CatchingUp(catch_up) = &mut self.state else { return };
        let Round::Asking { is_proved, n_accepted, .. } = catch_up.round else { return };
        catch_up.has_answer = true;
        self.replay_answers = true;
        let overlap = Overlap { seq, digest: payload.digest() };
        let next = self.known.and_then(|known| known.next);
        match anchor {
            Some(anchor) if !is_proved => self.prove(now, anchor, overlap, actions),
            // Not progress: a replayer that repeats itself must not keep the round open.
            _ if next.is_some_and(|next| seq < next) => {}
            _ if anchor.is_some() && next.is_some_and(|next| seq > next) => {
                catch_up.has_hole = true;
                let end = if n_accepted > 0 { RoundEnd::Progress } else { RoundEnd::Stalled };
                self.end_round(now, end, actions);
            }
            _ => self.accept(now, overlap, payload, actions),
        }
    }

    /// Looks whether the first reply is the batch that the publisher must have if it is the same process.
    fn prove(&mut self, now: Duration, anchor: Overlap, overlap: Overlap, actions: &mut Vec<Action>) {
        if overlap.seq < anchor.seq {
            return;
        }
        if overlap.seq > anchor.seq {
            return self.end_round(now, RoundEnd::Unproved, actions);
        }
        if overlap.digest != anchor.digest {
            return self.disproved(now, actions);
        }
        let State::CatchingUp(catch_up) = &mut self.state else { return };
        catch_up.round = Round::Asking { deadline: now + NEXT_REPLY_TIMEOUT, is_proved: true, n_accepted: 0 };
        catch_up.is_sure = true;
        catch_up.n_unproved = 0;
        self.unproved_until = None;
        match catch_up.why {
            Why::Offer(offer) => {
                catch_up.why = Why::Gap;
                self.offer = None;
                self.known = Some(Known::up_to(offer.overlap, offer.complete));
                actions.push(Action::Restore);
            }
            // From here on it is like any other catching up.
            Why::Reconnected | Why::Suspect => catch_up.why = Why::Gap,
            Why::Beginning | Why::Gap | Why::Probe => {}
        }
        self.join(now, actions);
    }

    /// Takes a reply that follows what is known.
    fn accept(&mut self, now: Duration, overlap: Overlap, payload: Payload, actions: &mut Vec<Action>) {
        let State::CatchingUp(catch_up) = &mut self.state else { return };
        let Round::Asking { n_accepted, .. } = catch_up.round else { return };
        catch_up.round =
            Round::Asking { deadline: now + NEXT_REPLY_TIMEOUT, is_proved: true, n_accepted: n_accepted + 1 };
        catch_up.is_sure = true;
        catch_up.has_hole = false;
        catch_up.n_stalled = 0;
        catch_up.n_replayed += 1;
        self.recent.push(overlap);
        match payload {
            Payload::Readable(payload) => self.apply(overlap, payload, Via::Replay, actions),
            Payload::Unreadable(_) => {
                if self.strike(now, actions) {
                    return;
                }
                actions.push(Action::Report(Incident::UnreadableBatch { seq: overlap.seq }));
                self.begin_behind(Known::up_to(overlap, false), actions);
            }
        }
        self.join(now, actions);
    }

    pub(super) fn replay_end(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let has_anchor = self.anchor().is_some();
        let State::CatchingUp(catch_up) = &mut self.state else { return };
        let Round::Asking { is_proved, n_accepted, .. } = catch_up.round else { return };
        catch_up.has_answer = true;
        self.replay_answers = true;
        if n_accepted > 0 {
            return self.end_round(now, RoundEnd::Progress, actions);
        }
        if has_anchor && !is_proved {
            return self.end_round(now, RoundEnd::Unproved, actions);
        }
        if !catch_up.held.is_empty() {
            return self.end_round(now, RoundEnd::Stalled, actions);
        }
        // The publisher has nothing more; where nothing is known either, it has published nothing yet.
        if let Some(known) = &mut self.known {
            known.next.get_or_insert(SeqNo(0));
        }
        self.finish(now, actions);
    }

    /// Nothing is missing.
    fn finish(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let State::CatchingUp(catch_up) = &self.state else { return };
        actions.push(Action::CloseReplay);
        if catch_up.why == Why::Probe && catch_up.n_replayed > 0 && !catch_up.heard_live {
            actions.push(Action::Report(Incident::Deaf));
            actions.push(Action::Reconnect);
            return self.leave(now);
        }
        self.go_live(now, actions);
    }

    /// Goes live if the held batches join what is known.
    pub(super) fn join(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let next = self.known.and_then(|known| known.next);
        let State::CatchingUp(catch_up) = &mut self.state else { return };
        let joins = catch_up.held.first().is_some_and(|first| next.is_some_and(|next| first <= next));
        if catch_up.is_sure && joins {
            let held = std::mem::take(&mut catch_up.held);
            actions.push(Action::CloseReplay);
            self.follow(now, held, actions);
        }
    }

    pub(super) fn check_deadlines(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let State::CatchingUp(catch_up) = &self.state else { return };
        match catch_up.round {
            _ if now >= catch_up.until => self.give_up(now, actions),
            Round::Asking { deadline, n_accepted, .. } if now >= deadline => {
                let end = if n_accepted > 0 { RoundEnd::Progress } else { RoundEnd::Stalled };
                self.end_round(now, end, actions);
            }
            Round::Pausing { until } if now >= until => self.ask(actions),
            _ => {}
        }
    }

    /// Asks again: at once after progress, else after a pause and not for ever.
    fn end_round(&mut self, now: Duration, end: RoundEnd, actions: &mut Vec<Action>) {
        let State::CatchingUp(catch_up) = &mut self.state else { return };
        match end {
            RoundEnd::Progress => return self.ask(actions),
            RoundEnd::Stalled => catch_up.n_stalled += 1,
            RoundEnd::Unproved => catch_up.n_unproved += 1,
        }
        if catch_up.n_unproved >= MAX_UNPROVED_ROUNDS {
            return self.disproved(now, actions);
        }
        if catch_up.n_stalled > MAX_STALLED_ROUNDS {
            return self.give_up(now, actions);
        }
        let pause = STALL_PAUSE * 2_u32.pow(catch_up.n_stalled.saturating_sub(1));
        catch_up.round = Round::Pausing { until: now + pause };
        actions.push(Action::CloseReplay);
    }

    /// The publisher is not the process whose batches are known, or its buffer has moved beyond them.
    fn disproved(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let State::CatchingUp(catch_up) = &mut self.state else { return };
        let (why, held) = (catch_up.why, std::mem::take(&mut catch_up.held));
        match why {
            Why::Offer(_) => self.without_offer(now, held, actions),
            // What is held came over the new connection, hence from the new process.
            Why::Reconnected => self.begin(now, Cause::Unproved, held, actions),
            // What is held may be of either process; the replay has it.
            Why::Beginning | Why::Gap | Why::Probe | Why::Suspect => {
                self.begin(now, Cause::Unproved, Held::default(), actions);
            }
        }
    }

    /// Goes on as if no snapshot had been offered.
    fn without_offer(&mut self, now: Duration, held: Held, actions: &mut Vec<Action>) {
        self.drop_offer(actions);
        if self.known.is_some() {
            actions.push(Action::CloseReplay);
            self.follow(now, held, actions);
        } else {
            self.begin(now, Cause::First, held, actions);
        }
    }

    /// Goes on without what the replay did not bring.
    fn give_up(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let State::CatchingUp(catch_up) = &mut self.state else { return };
        let CatchUp { why, is_sure, has_hole, has_asked, has_answer, .. } = *catch_up;
        let held = std::mem::take(&mut catch_up.held);
        // Whoever was never asked has not been silent.
        self.replay_answers = has_answer || !has_asked;
        actions.push(Action::Report(Incident::ReplayGaveUp));
        actions.push(Action::CloseReplay);
        match why {
            Why::Offer(_) => self.without_offer(now, held, actions),
            // Dead or only silent: a new connection shows it.
            Why::Probe if !is_sure => {
                actions.push(Action::Reconnect);
                self.leave(now);
            }
            // The same process, and nothing is known to be missing: an END that is always lost looks like this.
            _ if is_sure && held.is_empty() && !has_hole => self.go_live(now, actions),
            _ => {
                self.begin_behind(Known::nothing(false), actions);
                self.follow(now, held, actions);
            }
        }
    }
}
