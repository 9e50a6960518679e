//! One source at work: its sockets tell its state machine, which tells its applier.

use std::sync::Arc;
use std::time::Duration;

use tracing::{debug, info, warn};

use super::Source;
use super::link::{ConnectionEvent, Link, Message, Replay};
use crate::events::apply::{Applier, SourceName};
use crate::events::continuity::{Action, Continuity, Incident, Input, Phase, SeqNo};
use crate::events::stats::SourceStats;
use crate::events::wire::EventBatch;
use crate::routing::index::PrefixIndex;

/// Messages of one kind read in a row, so that no source starves the others.
const MESSAGES_PER_TURN: usize = 256;
/// Pause before a broken connection is made again; doubles while connections are short.
const RECONNECT_PAUSE: Duration = Duration::from_millis(100);
const MAX_RECONNECT_PAUSE: Duration = Duration::from_secs(5);
/// A connection that stood this long was a good one.
const LONG_CONNECTION: Duration = Duration::from_secs(10);

/// See the module.
pub(super) struct Subscription {
    context: zmq::Context,
    name: SourceName,
    publisher: String,
    replayer: Option<String>,
    connection: Connection,
    n_short_connections: u32,
    replay: Option<Replay>,
    continuity: Continuity,
    applier: Applier,
    stats: Arc<SourceStats>,
}

enum Connection {
    /// To be opened at a time.
    Closed { open_at: Duration },
    /// Opened; libzmq tries until it stands.
    Opening { link: Link },
    /// Stands since a time.
    Open { link: Link, since: Duration },
}

impl Connection {
    fn link(&self) -> Option<&Link> {
        match self {
            Self::Closed { .. } => None,
            Self::Opening { link } | Self::Open { link, .. } => Some(link),
        }
    }
}

impl Subscription {
    pub(super) fn new(context: zmq::Context, source: Source, index: Arc<PrefixIndex>, stats: Arc<SourceStats>) -> Self {
        let name = source.name();
        Self {
            context,
            name,
            continuity: Continuity::new(source.replay.is_some()),
            applier: Applier::new(name, source.model, index, stats.clone()),
            publisher: source.events,
            replayer: source.replay,
            connection: Connection::Closed { open_at: Duration::ZERO },
            n_short_connections: 0,
            replay: None,
            stats,
        }
    }

    pub(super) fn name(&self) -> SourceName {
        self.name
    }

    /// The engine has dropped its cache and may never say so itself.
    pub(super) fn clear(&mut self) {
        self.applier.clear();
    }

    /// Drops the connection, so that the next one shows whose it is.
    pub(super) fn reconnect(&mut self, now: Duration) {
        if let Connection::Open { since, .. } = self.connection {
            self.close(now, since);
        }
    }

    /// The sockets to wait on.
    pub(super) fn sockets(&self) -> impl Iterator<Item = &zmq::Socket> {
        let link = self.connection.link().into_iter().flat_map(Link::sockets);
        link.chain(self.replay.iter().map(Replay::socket))
    }

    /// Does what can be done without waiting. `now` is the time since any fixed moment.
    pub(super) fn turn(&mut self, now: Duration) {
        self.open_when_due(now);
        self.watch_connection(now);
        self.read_live(now);
        self.read_replies(now);
        self.step(now, Input::Tick);
    }

    fn open_when_due(&mut self, now: Duration) {
        let Connection::Closed { open_at } = self.connection else { return };
        if now < open_at {
            return;
        }
        match Link::open(&self.context, &self.publisher) {
            Ok(link) => self.connection = Connection::Opening { link },
            Err(error) => {
                self.connection = Connection::Closed { open_at: now + MAX_RECONNECT_PAUSE };
                warn!(endpoint = %self.name.address, rank = self.name.rank, %error, "KV event socket cannot be opened");
            }
        }
    }

    fn watch_connection(&mut self, now: Duration) {
        while let Some(event) = self.connection.link().and_then(Link::connection_event) {
            let closed = Connection::Closed { open_at: now };
            match (event, std::mem::replace(&mut self.connection, closed)) {
                (ConnectionEvent::Connected, Connection::Opening { link }) => {
                    self.connection = Connection::Open { link, since: now };
                    self.step(now, Input::Connected);
                }
                (ConnectionEvent::Disconnected, Connection::Open { since, .. }) => self.close(now, since),
                // A handshake that failed: libzmq tries again.
                (_, unchanged) => self.connection = unchanged,
            }
        }
    }

    /// Drops the sockets of a broken connection with all that waits in them.
    fn close(&mut self, now: Duration, since: Duration) {
        let was_short = now.saturating_sub(since) < LONG_CONNECTION;
        self.n_short_connections = if was_short { self.n_short_connections.saturating_add(1) } else { 0 };
        let pause = RECONNECT_PAUSE * 2_u32.pow(self.n_short_connections.min(6));
        self.connection = Connection::Closed { open_at: now + pause.min(MAX_RECONNECT_PAUSE) };
        self.step(now, Input::Disconnected);
    }

    fn read_live(&mut self, now: Duration) {
        for _ in 0..MESSAGES_PER_TURN {
            let Some(message) = self.connection.link().and_then(Link::message) else { return };
            // Asked again for each message: one of the next connection must not be taken for one of this.
            self.watch_connection(now);
            if !matches!(self.connection, Connection::Open { .. }) {
                return;
            }
            match message {
                Message::Batch { seq, payload } => self.step(now, Input::Live { seq, payload }),
                Message::ReplayEnd | Message::Malformed => self.stats.n_decode_failures.add(1_u64),
            }
        }
    }

    fn read_replies(&mut self, now: Duration) {
        for _ in 0..MESSAGES_PER_TURN {
            let Some(message) = self.replay.as_ref().and_then(Replay::message) else { return };
            match message {
                Message::Batch { seq, payload } => self.step(now, Input::Reply { seq, payload }),
                Message::ReplayEnd => self.step(now, Input::ReplayEnd),
                Message::Malformed => self.stats.n_decode_failures.add(1_u64),
            }
        }
    }

    fn step(&mut self, now: Duration, input: Input) {
        let before = self.continuity.phase();
        for action in self.continuity.step(now, input) {
            self.obey(action);
        }
        let phase = self.continuity.phase();
        if phase != before {
            self.stats.set_state(phase.into());
            self.log_phase(phase);
        }
    }

    fn obey(&mut self, action: Action) {
        match action {
            Action::StartGeneration(cause) => {
                self.applier.start_generation();
                debug!(endpoint = %self.name.address, rank = self.name.rank, ?cause, "KV event source starts a generation");
            }
            Action::EndGeneration => {
                self.applier.end_generation();
                info!(endpoint = %self.name.address, rank = self.name.rank, "KV event source is away for too long");
            }
            Action::RequestReplay { from } => self.request_replay(from),
            Action::CloseReplay => self.replay = None,
            Action::Apply { seq, payload, via: _ } => self.apply(seq, &payload),
            Action::Report(incident) => self.report(incident),
        }
    }

    fn request_replay(&mut self, from: SeqNo) {
        self.stats.n_replays.add(1_u64);
        let Some(replayer) = &self.replayer else { return };
        self.replay = Replay::request(&self.context, replayer, from)
            .inspect_err(|error| {
                // No answer comes then, and the state machine asks again.
                warn!(endpoint = %self.name.address, rank = self.name.rank, %error, "KV event replay cannot be requested");
            })
            .ok();
    }

    fn apply(&mut self, seq: SeqNo, payload: &[u8]) {
        match EventBatch::decode(payload) {
            Ok(batch) => self.applier.apply(&batch),
            Err(error) => {
                self.stats.n_decode_failures.add(1_u64);
                debug!(endpoint = %self.name.address, rank = self.name.rank, seq = seq.0, %error, "KV event batch is unreadable");
            }
        }
        self.stats.set_last_seq(Some(seq));
    }

    fn report(&self, incident: Incident) {
        let (endpoint, rank) = (self.name.address, self.name.rank);
        match incident {
            Incident::Gap { expected, received } => {
                self.stats.n_gaps.add(1_u64);
                let (expected, received) = (expected.0, received.0);
                warn!(%endpoint, rank, expected, received, "KV event gap");
            }
            Incident::HeldOverflow => warn!(%endpoint, rank, "too many KV events held while catching up"),
            Incident::ReplayGaveUp => warn!(%endpoint, rank, "KV event replay does not bring what is missing"),
        }
    }

    fn log_phase(&self, phase: Phase) {
        let (endpoint, rank) = (self.name.address, self.name.rank);
        match phase {
            Phase::Disconnected => info!(%endpoint, rank, "KV event source is disconnected"),
            Phase::CatchingUp => debug!(%endpoint, rank, "KV event source is catching up"),
            Phase::Live => info!(%endpoint, rank, "KV event source is live"),
            Phase::Incomplete => info!(%endpoint, rank, "KV event source is live, its beginning is not known"),
        }
    }
}
