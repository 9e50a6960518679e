//! One source at work: its sockets tell its state machine, which tells its applier.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tracing::{debug, info, warn};

use super::backoff::{Backoff, RECONNECT};
use super::link::{ConnectionEvent, Link, Message, Replay};
use super::permits::{ReplayPermit, ReplayPermits, Ticket};
use super::{LagObserver, Source};
use crate::events::apply::{Applier, SourceName, When};
use crate::events::continuity::{
    Action, Cause, Continuity, Incident, Input, Payload, PayloadDigest, Phase, SeqNo, Via,
};
use crate::events::snapshot::{Snapshot, SourceKey};
use crate::events::stats::{Content, Counter, SourceState, SourceStats};
use crate::events::wire::{Event, EventBatch};
use crate::routing::endpoint::SourceKnowledge;
use crate::routing::index::PrefixIndex;

/// Messages of one kind read in a row, so that no source starves the others.
pub(super) const MESSAGES_PER_TURN: usize = 256;
/// A connection that stood this long was a good one.
const LONG_CONNECTION: Duration = Duration::from_secs(10);
/// Longest that an attempt to connect may take. libzmq tells of a refused one; of one that it has forgotten it does
/// not.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// What all sources share.
#[derive(Clone)]
pub(super) struct Shared {
    pub(super) index: Arc<PrefixIndex>,
    pub(super) permits: ReplayPermits,
    pub(super) on_lag: LagObserver,
    /// Messages of engines that dial in without being listed.
    pub(super) n_foreign: Arc<Counter>,
}

/// See the module.
pub(super) struct Subscription {
    context: zmq::Context,
    name: SourceName,
    publisher: String,
    replayer: Option<String>,
    connection: Connection,
    backoff: Backoff,
    asked: Asked,
    continuity: Continuity,
    applier: Applier,
    /// The snapshot that the state machine was told of.
    offer: Option<Box<Snapshot>>,
    shared: Shared,
    stats: Arc<SourceStats>,
    knowledge: SourceKnowledge,
    /// The engine's cache was dropped while batches from before may still have been on their way.
    is_to_be_cleared: bool,
    random: fastrand::Rng,
}

enum Connection {
    /// To be opened at a time.
    Closed { open_at: Duration },
    /// Opened; has to stand before `until`.
    Opening { link: Link, until: Duration },
    /// Stands since a time.
    Open { link: Link, since: Duration },
    /// The engine dials: its messages come through a listener.
    DialsIn,
}

impl Connection {
    fn link(&self) -> Option<&Link> {
        match self {
            Self::Closed { .. } | Self::DialsIn => None,
            Self::Opening { link, .. } | Self::Open { link, .. } => Some(link),
        }
    }
}

/// The replay that the state machine wants.
enum Asked {
    Nothing,
    /// Waits for its time, then for its turn.
    Waiting {
        from: SeqNo,
        not_before: Duration,
        ticket: Option<Ticket>,
    },
    Running {
        replay: Replay,
        _permit: ReplayPermit,
    },
}

/// What an action did.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Effect {
    Usual,
    /// The engine's whole cache is known to be gone.
    Cleared,
}

impl Subscription {
    pub(super) fn new(context: zmq::Context, source: Source, shared: Shared, stats: Arc<SourceStats>) -> Self {
        let name = source.name();
        let dials_in = source.dials_in();
        Self {
            context,
            name,
            continuity: Continuity::new(source.replay.is_some()),
            applier: Applier::new(name, source.model, shared.index.clone(), stats.clone()),
            publisher: source.events,
            replayer: source.replay,
            connection: if dials_in { Connection::DialsIn } else { Connection::Closed { open_at: Duration::ZERO } },
            backoff: Backoff::new(RECONNECT),
            asked: Asked::Nothing,
            offer: None,
            shared,
            stats,
            knowledge: SourceKnowledge::new(source.endpoint_knowledge),
            is_to_be_cleared: false,
            random: fastrand::Rng::new(),
        }
    }

    /// The sockets to wait on.
    pub(super) fn sockets(&self) -> impl Iterator<Item = &zmq::Socket> {
        let link = self.connection.link().into_iter().flat_map(Link::sockets);
        link.chain(self.replay().map(Replay::socket))
    }

    /// Reads what has come. `now` is the time since any fixed moment.
    pub(super) fn read(&mut self, now: Duration) {
        self.watch_connection(now);
        self.read_live(now);
        self.read_replies(now);
        self.start_replay(now);
    }

    /// Does what is due.
    pub(super) fn tick(&mut self, now: Duration) {
        self.step(now, Input::Tick);
        self.connect(now);
        self.start_replay(now);
    }

    /// Takes a message that a listener heard.
    pub(super) fn hear(&mut self, now: Duration, message: Message) {
        if self.continuity.is_away() {
            self.step(now, Input::Connected);
        }
        self.take_live(now, message);
        self.start_replay(now);
    }

    /// A connection to the listener is gone that may have been this engine's.
    pub(super) fn may_be_gone(&mut self, now: Duration) {
        // The next message is taken for that of a new connection; a replay proves it before there is one.
        let input = if self.replayer.is_some() { Input::Suspect } else { Input::Disconnected };
        self.step(now, input);
        self.start_replay(now);
    }

    /// The engine is known to have dropped its cache.
    pub(super) fn cleared(&mut self) {
        self.clear();
        // What is still on its way may be from before.
        self.is_to_be_cleared = !self.continuity.is_following();
    }

    fn clear(&mut self) {
        self.applier.clear();
        self.knowledge.start_generation();
        let seq = self.continuity.overlap().map(|overlap| overlap.seq);
        self.stats.set_content(Content { seq, digest: self.applier.digest() });
    }

    /// The engine may be another process now.
    pub(super) fn suspect(&mut self, now: Duration) {
        self.step(now, Input::Suspect);
    }

    /// What is known now; none while there is nothing that a later life could prove.
    pub(super) fn snapshot(&self, key: SourceKey) -> Option<Snapshot> {
        let overlap = self.continuity.overlap()?;
        let complete = self.continuity.is_complete() && !self.applier.is_full();
        Some(Snapshot { key, overlap, complete, image: self.applier.image()? })
    }

    /// Somebody else's, or an earlier life's, knowledge of the source.
    pub(super) fn offer(&mut self, now: Duration, snapshot: Box<Snapshot>) {
        if !self.applier.fits(&snapshot.image) {
            // Before anything is proved by it, since what is known is retired for it then.
            warn!(endpoint = %self.name.address, rank = self.name.rank, "snapshot of a KV event source is of other settings");
            return;
        }
        let (overlap, complete) = (snapshot.overlap, snapshot.complete);
        self.offer = Some(snapshot);
        self.step(now, Input::Offer { overlap, complete });
    }

    fn replay(&self) -> Option<&Replay> {
        match &self.asked {
            Asked::Running { replay, .. } => Some(replay),
            Asked::Nothing | Asked::Waiting { .. } => None,
        }
    }

    fn connect(&mut self, now: Duration) {
        if self.continuity.phase() == Phase::Quarantined {
            return;
        }
        match &self.connection {
            Connection::Closed { open_at } if now >= *open_at => self.open(now),
            Connection::Opening { until, .. } if now >= *until => self.close(now),
            _ => {}
        }
    }

    fn open(&mut self, now: Duration) {
        match Link::open(&self.context, &self.publisher) {
            Ok(link) => self.connection = Connection::Opening { link, until: now + CONNECT_TIMEOUT },
            Err(error) => {
                self.close(now);
                warn!(endpoint = %self.name.address, rank = self.name.rank, %error, "KV event socket cannot be opened");
            }
        }
    }

    fn watch_connection(&mut self, now: Duration) {
        while let Some(event) = self.connection.link().and_then(Link::connection_event) {
            let closed = Connection::Closed { open_at: now };
            match (event, std::mem::replace(&mut self.connection, closed)) {
                (ConnectionEvent::Connected, Connection::Opening { link, .. }) => {
                    self.connection = Connection::Open { link, since: now };
                    self.step(now, Input::Connected);
                }
                (ConnectionEvent::Disconnected, former) => {
                    self.connection = former;
                    self.close(now);
                    self.step(now, Input::Disconnected);
                }
                (ConnectionEvent::Connected, unchanged) => self.connection = unchanged,
            }
        }
    }

    /// Drops the sockets of a connection with all that waits in them, and sets the time of the next attempt.
    fn close(&mut self, now: Duration) {
        if let Connection::DialsIn = self.connection {
            return;
        }
        if let Connection::Open { since, .. } = self.connection
            && now.saturating_sub(since) >= LONG_CONNECTION
        {
            self.backoff.reset();
        }
        self.connection = Connection::Closed { open_at: now + self.backoff.pause(&mut self.random) };
    }

    fn read_live(&mut self, now: Duration) {
        for _ in 0..MESSAGES_PER_TURN {
            let Some(message) = self.connection.link().and_then(Link::message) else { return };
            // Asked again for each message: one of the next connection must not be taken for one of this.
            self.watch_connection(now);
            if !matches!(self.connection, Connection::Open { .. }) {
                return;
            }
            self.take_live(now, message);
        }
    }

    fn take_live(&mut self, now: Duration, message: Message) {
        match message {
            Message::Batch { seq, payload } => {
                let payload = self.payload(seq, payload);
                self.step(now, Input::Live { seq, payload });
            }
            Message::ReplayEnd | Message::Malformed => self.stats.count_malformed(),
        }
    }

    fn read_replies(&mut self, now: Duration) {
        for _ in 0..MESSAGES_PER_TURN {
            let Some(message) = self.replay().and_then(Replay::message) else { return };
            match message {
                Message::Batch { seq, payload } => {
                    let payload = self.payload(seq, payload);
                    self.step(now, Input::Reply { seq, payload });
                }
                Message::ReplayEnd => self.step(now, Input::ReplayEnd),
                Message::Malformed => self.stats.count_malformed(),
            }
        }
    }

    /// Whether a batch can be applied has to be known before it takes its place in the sequence. Decoding it twice
    /// costs less than keeping what borrows from it.
    fn payload(&self, seq: SeqNo, payload: Vec<u8>) -> Payload {
        match EventBatch::decode(&payload) {
            Ok(_) => Payload::Readable(payload),
            Err(error) => {
                self.stats.count_unreadable(&error);
                debug!(endpoint = %self.name.address, rank = self.name.rank, seq = seq.0, %error, "KV event batch is unreadable");
                Payload::Unreadable(PayloadDigest::of(&payload))
            }
        }
    }

    fn step(&mut self, now: Duration, input: Input) {
        let before = self.continuity.phase();
        // Whatever is applied in another state was missed, or has waited for that.
        let when = if self.continuity.is_following() { When::Now } else { When::Before };
        let mut is_cleared = false;
        for action in self.continuity.step(now, input) {
            // What a batch says of the cache holds for the generation that it is applied to.
            is_cleared &= !matches!(action, Action::StartGeneration(_) | Action::EndGeneration | Action::Restore);
            is_cleared |= self.obey(now, action, when) == Effect::Cleared;
        }
        if is_cleared {
            self.knowledge.start_generation();
            self.continuity.step(now, Input::Cleared);
        }
        if self.is_to_be_cleared && self.continuity.is_following() {
            self.is_to_be_cleared = false;
            self.clear();
            // What the engine has computed since is among what was dropped.
            self.continuity.step(now, Input::NotRestored);
        }
        let phase = self.continuity.phase();
        if phase != before {
            self.log_phase(phase);
        }
        self.stats.set_state(SourceState::of(phase, self.applier.is_full()));
        self.knowledge.mark_incomplete(phase == Phase::Incomplete);
    }

    fn obey(&mut self, now: Duration, action: Action, when: When) -> Effect {
        match action {
            Action::StartGeneration(cause) => self.start_generation(cause),
            Action::EndGeneration => {
                self.applier.end_generation();
                self.knowledge.start_generation();
                info!(endpoint = %self.name.address, rank = self.name.rank, "KV event source is no longer credited");
            }
            Action::Restore => self.restore(now),
            Action::DropOffer => self.offer = None,
            Action::RequestReplay { from, within } => {
                let not_before = now + within.mul_f64(self.random.f64());
                self.asked = Asked::Waiting { from, not_before, ticket: None };
            }
            Action::CloseReplay => self.asked = Asked::Nothing,
            Action::Apply { seq, payload, via } => {
                // It has been decoded before, or it would not be here.
                let Ok(batch) = EventBatch::decode(&payload) else { return Effect::Usual };
                self.applier.apply(&batch, when);
                return self.applied(seq, &batch, via);
            }
            Action::Reconnect => self.close(now),
            Action::Report(incident) => self.report(now, incident),
        }
        Effect::Usual
    }

    fn start_generation(&mut self, cause: Cause) {
        self.applier.start_generation();
        self.knowledge.start_generation();
        debug!(endpoint = %self.name.address, rank = self.name.rank, ?cause, "KV event source starts a generation");
    }

    fn restore(&mut self, now: Duration) {
        let (endpoint, rank) = (self.name.address, self.name.rank);
        let snapshot = self.offer.take();
        self.knowledge.start_generation();
        if let Some(snapshot) = snapshot.filter(|snapshot| self.applier.restore(&snapshot.image)) {
            self.stats.n_restored.add(1_u64);
            self.stats.set_content(Content { seq: Some(snapshot.overlap.seq), digest: self.applier.digest() });
            info!(%endpoint, rank, "KV event source goes on from a snapshot");
        } else {
            warn!(%endpoint, rank, "snapshot of a KV event source does not fit the settings");
            self.applier.start_generation();
            self.step(now, Input::NotRestored);
        }
    }

    fn start_replay(&mut self, now: Duration) {
        let Asked::Waiting { from, not_before, ticket } = &mut self.asked else { return };
        let Some(replayer) = self.replayer.as_ref().filter(|_| now >= *not_before) else { return };
        let from = *from;
        let Some(permit) = ticket.get_or_insert_with(|| self.shared.permits.queue()).try_take() else { return };
        self.stats.n_replays.add(1_u64);
        self.asked = match Replay::request(&self.context, replayer, from) {
            Ok(replay) => Asked::Running { replay, _permit: permit },
            Err(error) => {
                // No answer comes then, and the state machine asks again.
                warn!(endpoint = %self.name.address, rank = self.name.rank, %error, "KV event replay cannot be requested");
                Asked::Nothing
            }
        };
        self.step(now, Input::ReplayStarted);
    }

    fn applied(&mut self, seq: SeqNo, batch: &EventBatch<'_>, via: Via) -> Effect {
        self.stats.set_content(Content { seq: Some(seq), digest: self.applier.digest() });
        if via == Via::Live {
            let lag = since(batch.ts);
            self.stats.set_lag(lag);
            (self.shared.on_lag)(lag);
        }
        let is_cleared = batch.events.iter().any(|event| matches!(event, Event::AllBlocksCleared));
        if is_cleared { Effect::Cleared } else { Effect::Usual }
    }

    fn report(&mut self, now: Duration, incident: Incident) {
        let (endpoint, rank) = (self.name.address, self.name.rank);
        match incident {
            Incident::Gap { expected, received } => {
                self.stats.n_gaps.add(1_u64);
                let (expected, received) = (expected.0, received.0);
                warn!(%endpoint, rank, expected, received, "KV event gap");
            }
            Incident::HeldOverflow => warn!(%endpoint, rank, "too many KV events held while catching up"),
            Incident::ReplayGaveUp => warn!(%endpoint, rank, "KV event replay does not bring what is missing"),
            Incident::UnreadableBatch { seq } => {
                warn!(%endpoint, rank, seq = seq.0, "KV event batch is unreadable, what was known before it is dropped");
            }
            Incident::Deaf => warn!(%endpoint, rank, "KV event connection is deaf, making a new one"),
            Incident::Quarantined(length) => {
                self.stats.n_quarantines.add(1_u64);
                self.close(now);
                warn!(%endpoint, rank, ?length, "KV event source sends too much that is wrong, it is left alone");
            }
        }
    }

    fn log_phase(&self, phase: Phase) {
        let (endpoint, rank) = (self.name.address, self.name.rank);
        match phase {
            Phase::Connecting => info!(%endpoint, rank, "KV event source is not connected"),
            Phase::CatchingUp => debug!(%endpoint, rank, "KV event source is catching up"),
            Phase::Live => info!(%endpoint, rank, "KV event source is live"),
            Phase::Incomplete => info!(%endpoint, rank, "KV event source is live, its beginning is not known"),
            Phase::Stale => info!(%endpoint, rank, "KV event source is stale"),
            Phase::Quarantined => {}
        }
    }
}

/// Time since a publisher's clock showed `ts` seconds since the Unix epoch; 0 where its clock is ahead of ours.
fn since(ts: f64) -> Duration {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Duration::try_from_secs_f64(ts).map_or(Duration::ZERO, |ts| now.saturating_sub(ts))
}
