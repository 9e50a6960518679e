//! What runs on an event thread.

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError};
use std::time::{Duration, Instant};

use tracing::{debug, error, warn};

use super::Source;
use super::backoff::{Backoff, REVIVE};
use super::link::LIVE_QUEUE;
use super::listener::{Listener, LostPeer, Topic};
use super::subscription::{MESSAGES_PER_TURN, Shared, Subscription};
use crate::events::snapshot::{Snapshot, SourceKey};
use crate::events::stats::SourceStats;
use crate::routing::endpoint::EndpointId;

/// A context has 1,023 sockets (libzmq's default, which the `zmq` crate cannot raise), and a source has up to four.
const SOURCES_PER_CONTEXT: usize = 200;
/// Longest wait, hence the delay of commands and timers.
const POLL_MS: i64 = 20;
/// Time between two ticks of a source.
const TICK: Duration = Duration::from_millis(20);
/// Time between two looks at the ports that engines dial.
const BIND_INTERVAL: Duration = Duration::from_secs(1);

/// What a thread is told.
#[derive(Debug)]
pub(super) enum Command {
    /// Follow a source.
    Add(Box<Source>, Arc<SourceStats>),
    /// Forget an endpoint, or one rank of it.
    Remove(EndpointId, Option<u32>),
    /// The engine has dropped its cache.
    Cleared(EndpointId),
    /// The engine may be another process now.
    Suspect(EndpointId),
    /// Say what is known of a source.
    Snapshot(SourceKey, SyncSender<Option<Box<Snapshot>>>),
    /// This was known of a source once.
    Offer(Box<Snapshot>),
    /// End.
    Stop,
}

/// See the module.
pub(super) struct Worker {
    shared: Shared,
    commands: Receiver<Command>,
    started: Instant,
    last_tick: Duration,
    /// Each with room for [`SOURCES_PER_CONTEXT`] sources.
    contexts: Vec<zmq::Context>,
    followed: Vec<Followed>,
    /// Ports that engines dial.
    listeners: Vec<Listener>,
    /// Ports that could not be opened the last time.
    refused: HashSet<String>,
    /// The next time that ports which could not be opened are tried again.
    bind_at: Duration,
}

struct Followed {
    source: Source,
    stats: Arc<SourceStats>,
    life: Life,
    /// Pauses between lives.
    backoff: Backoff,
    /// Position in [`Worker::contexts`].
    context_idx: usize,
}

enum Life {
    Running(Box<Subscription>),
    /// Its code panicked.
    Failed {
        revive_at: Duration,
    },
}

impl Worker {
    pub(super) fn new(shared: Shared, commands: Receiver<Command>) -> Self {
        Self {
            shared,
            commands,
            started: Instant::now(),
            last_tick: Duration::ZERO,
            contexts: Vec::new(),
            followed: Vec::new(),
            listeners: Vec::new(),
            refused: HashSet::new(),
            bind_at: Duration::ZERO,
        }
    }

    pub(super) fn run(mut self) {
        while self.obey_commands() {
            let readable = self.wait();
            self.take_turns(&readable);
            self.listen();
        }
    }

    /// Says whether to go on.
    fn obey_commands(&mut self) -> bool {
        loop {
            match self.commands.try_recv() {
                Ok(Command::Add(source, stats)) => self.follow(*source, stats),
                Ok(Command::Remove(endpoint, rank)) => self.followed.retain(|followed| {
                    followed.source.endpoint != endpoint || rank.is_some_and(|rank| followed.source.rank != rank)
                }),
                Ok(Command::Cleared(endpoint)) => self.each_of(endpoint, |subscription, _| subscription.cleared()),
                Ok(Command::Suspect(endpoint)) => self.each_of(endpoint, Subscription::suspect),
                Ok(Command::Snapshot(key, answer)) => self.answer(&key, &answer),
                Ok(Command::Offer(snapshot)) => self.offer(snapshot),
                Err(TryRecvError::Empty) => return true,
                Ok(Command::Stop) | Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn each_of(&mut self, endpoint: EndpointId, act: impl Fn(&mut Subscription, Duration)) {
        let now = self.started.elapsed();
        let of_endpoint = self.followed.iter_mut().filter(|followed| followed.source.endpoint == endpoint);
        of_endpoint.for_each(|followed| followed.guarded(now, |subscription| act(subscription, now)));
    }

    fn answer(&mut self, key: &SourceKey, answer: &SyncSender<Option<Box<Snapshot>>>) {
        let now = self.started.elapsed();
        let mut snapshot = None;
        if let Some(followed) = self.of_key(key) {
            followed.guarded(now, |subscription| snapshot = subscription.snapshot(key.clone()).map(Box::new));
        }
        // Whoever asked may have given up waiting.
        let _ = answer.try_send(snapshot);
    }

    fn offer(&mut self, snapshot: Box<Snapshot>) {
        let now = self.started.elapsed();
        if let Some(followed) = self.of_key(&snapshot.key) {
            followed.guarded(now, |subscription| subscription.offer(now, snapshot));
        }
    }

    fn of_key(&mut self, key: &SourceKey) -> Option<&mut Followed> {
        self.followed.iter_mut().find(|followed| followed.source.key() == *key)
    }

    fn follow(&mut self, source: Source, stats: Arc<SourceStats>) {
        let n_in = |context_idx| self.followed.iter().filter(|followed| followed.context_idx == context_idx).count();
        let with_room = (0..self.contexts.len()).find(|context_idx| n_in(*context_idx) < SOURCES_PER_CONTEXT);
        let context_idx = with_room.unwrap_or_else(|| {
            self.contexts.push(zmq::Context::new());
            self.contexts.len() - 1
        });
        let context = self.contexts[context_idx].clone();
        let subscription = Subscription::new(context, source.clone(), self.shared.clone(), stats.clone());
        let life = Life::Running(Box::new(subscription));
        self.followed.push(Followed { source, stats, life, backoff: Backoff::new(REVIVE), context_idx });
    }

    fn take_turns(&mut self, readable: &[bool]) {
        let now = self.started.elapsed();
        let is_tick = now >= self.last_tick + TICK;
        if is_tick {
            self.last_tick = now;
        }
        for (followed, is_readable) in self.followed.iter_mut().zip(readable) {
            if *is_readable {
                followed.guarded(now, |subscription| subscription.read(now));
            }
            if is_tick {
                followed.revive(now, &self.contexts, &self.shared);
                followed.guarded(now, |subscription| subscription.tick(now));
            }
        }
    }

    /// Opens the ports that engines dial, and hands what comes there to the sources.
    fn listen(&mut self) {
        let now = self.started.elapsed();
        if now >= self.bind_at {
            self.bind_at = now + BIND_INTERVAL;
            self.bind_missing();
        }
        for listener_idx in 0..self.listeners.len() {
            let lost: Vec<LostPeer> = std::iter::from_fn(|| self.listeners[listener_idx].lost_peer()).collect();
            // What a lost connection had brought waits in the socket, and is of the life that has ended.
            let n_messages = if lost.is_empty() { MESSAGES_PER_TURN } else { LIVE_QUEUE as usize };
            self.hear(listener_idx, n_messages, now);
            lost.into_iter().for_each(|lost| self.lose(listener_idx, lost, now));
        }
    }

    /// Hands at most `n_messages` that came to a port to their sources.
    fn hear(&mut self, listener_idx: usize, n_messages: usize, now: Duration) {
        let listener = &self.listeners[listener_idx];
        for (topic, message) in std::iter::from_fn(|| listener.message()).take(n_messages) {
            let is_meant = |followed: &&mut Followed| followed.is_meant(listener.endpoint(), topic.as_ref());
            match self.followed.iter_mut().find(is_meant) {
                Some(followed) => followed.guarded(now, |subscription| subscription.hear(now, message)),
                None => self.shared.n_foreign.add(1_u64),
            }
        }
    }

    /// Tells the sources whose connection to a port may have been the one that is lost.
    fn lose(&mut self, listener_idx: usize, lost: LostPeer, now: Duration) {
        let endpoint = self.listeners[listener_idx].endpoint();
        // Behind address translation no source has the peer's address, and it may have been anyone's.
        let is_known = self.followed.iter().any(|followed| followed.dials_from(endpoint, lost));
        let lost = if is_known { lost } else { LostPeer::Unknown };
        let of_peer = self.followed.iter_mut().filter(|followed| followed.dials_from(endpoint, lost));
        of_peer.for_each(|followed| followed.guarded(now, |subscription| subscription.may_be_gone(now)));
    }

    /// Opens the ports that sources are to dial, and closes those that no source does any more.
    fn bind_missing(&mut self) {
        let followed = &self.followed;
        let is_wanted = |endpoint: &str| followed.iter().any(|followed| followed.source.events == endpoint);
        self.listeners.retain(|listener| is_wanted(listener.endpoint()));
        self.refused.retain(|endpoint| is_wanted(endpoint));
        for Followed { source, context_idx, .. } in &self.followed {
            if !source.dials_in() || self.listeners.iter().any(|listener| listener.endpoint() == source.events) {
                continue;
            }
            match Listener::bind(&self.contexts[*context_idx], &source.events) {
                Ok(listener) => {
                    self.refused.remove(&source.events);
                    self.listeners.push(listener);
                }
                // Tried every second, and worth one line.
                Err(error) if self.refused.insert(source.events.clone()) => {
                    warn!(endpoint = source.events, %error, "port for KV events cannot be opened, and is tried again");
                }
                Err(error) => debug!(endpoint = source.events, %error, "port for KV events still cannot be opened"),
            }
        }
    }

    /// Waits until there is something to read; says for each source whether it has something.
    fn wait(&self) -> Vec<bool> {
        let mut items = Vec::with_capacity(self.followed.len() * 3);
        let mut ends = Vec::with_capacity(self.followed.len());
        items.extend(self.listeners.iter().flat_map(Listener::sockets).map(|socket| socket.as_poll_item(zmq::POLLIN)));
        let first = items.len();
        for followed in &self.followed {
            if let Life::Running(subscription) = &followed.life {
                items.extend(subscription.sockets().map(|socket| socket.as_poll_item(zmq::POLLIN)));
            }
            ends.push(items.len());
        }
        if let Err(error) = zmq::poll(&mut items, POLL_MS) {
            // A signal, or no memory: without a pause this would spin.
            debug!(%error, "waiting for KV events was interrupted");
            std::thread::sleep(Duration::from_millis(1));
        }
        let starts = std::iter::once(first).chain(ends.iter().copied());
        starts.zip(&ends).map(|(start, end)| items[start..*end].iter().any(zmq::PollItem::is_readable)).collect()
    }
}

impl Followed {
    /// Whether a lost connection to a port may have been this source's.
    fn dials_from(&self, endpoint: &str, lost: LostPeer) -> bool {
        let is_from = match lost {
            LostPeer::From(ip) => self.source.address.ip() == ip,
            LostPeer::Unknown => true,
        };
        self.source.events == endpoint && is_from
    }

    /// Whether a message that came to a port is this source's.
    fn is_meant(&self, endpoint: &str, topic: Option<&Topic>) -> bool {
        let names_it = |topic: &Topic| topic.address == self.source.address && *topic.model == *self.source.model.model;
        self.source.events == endpoint && topic.is_some_and(names_it)
    }

    /// Lets a running source act. The state of one that panicked is not looked at again: dropping it retires its slots.
    fn guarded(&mut self, now: Duration, act: impl FnOnce(&mut Subscription)) {
        let Life::Running(subscription) = &mut self.life else { return };
        if catch_unwind(AssertUnwindSafe(|| act(subscription))).is_err() {
            let pause = self.backoff.pause(&mut fastrand::Rng::new());
            self.life = Life::Failed { revive_at: now + pause };
            self.stats.fail();
            let Source { address, rank, .. } = &self.source;
            error!(endpoint = %address, rank, ?pause, "KV event source panicked and is started again after a pause");
        }
    }

    fn revive(&mut self, now: Duration, contexts: &[zmq::Context], shared: &Shared) {
        if let Life::Failed { revive_at } = self.life
            && now >= revive_at
        {
            let context = contexts[self.context_idx].clone();
            let subscription = Subscription::new(context, self.source.clone(), shared.clone(), self.stats.clone());
            self.life = Life::Running(Box::new(subscription));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;
    use crate::events::socket::permits::ReplayPermits;
    use crate::events::socket::{ModelSettings, SourceState};
    use crate::routing::hash::HashAlgorithm;
    use crate::routing::index::PrefixIndex;

    /// An event thread that takes its turns only when told, with one source that dials `port`.
    fn worker(port: u16) -> (Worker, Arc<SourceStats>) {
        let shared = Shared {
            index: Arc::new(PrefixIndex::default()),
            permits: ReplayPermits::default(),
            on_lag: Arc::new(|_| ()),
            n_foreign: Arc::default(),
        };
        let model = ModelSettings {
            model: "tiny".into(),
            algorithm: HashAlgorithm::Sha256Cbor,
            pythonhashseed: None,
            adapters: Vec::new(),
            reports: false,
        };
        let source = Source {
            endpoint: EndpointId(0),
            address: ([127, 0, 0, 1], 8000).into(),
            events: format!("tcp://*:{port}"),
            replay: None,
            rank: 0,
            model: Arc::new(model),
            endpoint_knowledge: Arc::default(),
        };
        let stats = Arc::new(SourceStats::default());
        let mut worker = Worker::new(shared, channel().1);
        worker.follow(source, stats.clone());
        worker.listen();
        (worker, stats)
    }

    #[test]
    fn what_a_lost_connection_had_brought_is_read_before_it_is_given_up() {
        let port = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port").local_addr().expect("bound").port();
        let (mut worker, stats) = worker(port);
        let publisher = zmq::Context::new().socket(zmq::PUB).expect("a socket");
        publisher.connect(&format!("tcp://127.0.0.1:{port}")).expect("a listener");
        // Batches without events, until one is heard; then more than a turn's that nobody reads before the end.
        let mut publish = |seq: u64| {
            let frames = [&b"kv@127.0.0.1:8000@tiny"[..], &seq.to_be_bytes(), b"\x93\xcb\0\0\0\0\0\0\0\0\x90\0"];
            publisher.send_multipart(frames, 0).expect("a publisher never blocks");
        };
        let seqs = &mut (0..);
        while stats.n_batches.get() == 0 {
            seqs.take(1).for_each(&mut publish);
            std::thread::sleep(Duration::from_millis(5));
            worker.listen();
        }
        seqs.take(3 * MESSAGES_PER_TURN).for_each(&mut publish);
        std::thread::sleep(Duration::from_millis(200));
        drop(publisher);
        std::thread::sleep(Duration::from_millis(200));
        for _ in 0..10 {
            worker.listen();
        }
        assert_eq!(stats.state(), SourceState::Stale, "{stats:?}");
        assert!(stats.n_batches.get() > MESSAGES_PER_TURN as u64, "what came before the end counts");
    }
}
