//! The event plane: few named threads that own the ZMQ sockets of many sources.
//!
//! A thread waits on all its sockets, at most `POLL_MS`; after that it takes commands and gives each source a turn. A panic
//! ends the source in whose turn it happened, and its credit, and no other. Identity is what was dialled: neither topic nor
//! rank of a message is trusted.
//!
//! A connection has its own sockets, see `link`. Between connections the plane waits 100 ms, longer if they do not last.

mod link;
mod subscription;

use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use tracing::error;

pub use super::apply::ModelSettings;
use super::apply::SourceName;
use super::stats::SourceStats;
pub use super::stats::{SourceState, SourceStatus};
use crate::routing::endpoint::EndpointId;
use crate::routing::index::PrefixIndex;
use subscription::Subscription;

/// Threads. One decodes some hundred thousand batches per second, more than a large pool sends.
const N_THREADS: usize = 1;
/// A context has 1,023 sockets (libzmq's default, which the `zmq` crate cannot raise), and a source has up to four.
const SOURCES_PER_CONTEXT: usize = 200;
/// Longest wait, hence the delay of commands and timers.
const POLL_MS: i64 = 20;

/// Where one rank of one endpoint publishes.
#[derive(Clone, Debug)]
pub struct Source {
    /// The endpoint.
    pub endpoint: EndpointId,
    /// Its address, for logs and status.
    pub address: SocketAddr,
    /// ZMQ endpoint of the publisher, such as `tcp://10.0.0.1:5557`.
    pub events: String,
    /// ZMQ endpoint of the replay; none: lost batches cost what is known.
    pub replay: Option<String>,
    /// Data-parallel rank.
    pub rank: u32,
    /// What the engine is known to run.
    pub model: Arc<ModelSettings>,
}

impl Source {
    fn name(&self) -> SourceName {
        SourceName { endpoint: self.endpoint, address: self.address, rank: self.rank }
    }

    fn place(&self) -> Place {
        Place { events: self.events.clone(), replay: self.replay.clone() }
    }
}

/// Follows the KV events of all sources; see the module.
#[derive(Debug)]
pub struct EventPlane {
    threads: Vec<EventThread>,
    /// What [`Self::status`] shows. Locked for as long as a list takes to copy.
    shown: Mutex<Vec<Shown>>,
}

#[derive(Debug)]
struct EventThread {
    commands: Sender<Command>,
    handle: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shown {
    name: SourceName,
    place: Place,
    model: Arc<str>,
    stats: Arc<SourceStats>,
}

/// Where a source is followed: one that moves is another source.
#[derive(Debug, PartialEq, Eq)]
struct Place {
    events: String,
    replay: Option<String>,
}

#[derive(Debug)]
enum Command {
    Add(Box<Source>, Arc<SourceStats>),
    Remove(EndpointId),
    RemoveSource(SourceName),
    Cleared(EndpointId),
    Suspect(EndpointId),
    Stop,
}

impl EventPlane {
    /// Starts the threads; they write what sources hold to `index`.
    pub fn start(index: &Arc<PrefixIndex>) -> Self {
        let threads = (0..N_THREADS).map(|thread_idx| EventThread::start(thread_idx, index.clone())).collect();
        Self { threads, shown: Mutex::default() }
    }

    /// Follows one more source.
    pub fn add(&self, source: Source) {
        self.add_to(&mut self.shown.lock().unwrap_or_else(PoisonError::into_inner), source);
    }

    fn add_to(&self, shown: &mut Vec<Shown>, source: Source) {
        let stats = Arc::<SourceStats>::default();
        let model = source.model.model.clone();
        shown.push(Shown { name: source.name(), place: source.place(), model, stats: stats.clone() });
        self.thread_of(source.endpoint).send(Command::Add(Box::new(source), stats));
    }

    /// Makes these the sources of an endpoint: those that it has already go on undisturbed, others are no longer followed,
    /// and new ones are.
    pub fn reconcile(&self, endpoint: EndpointId, sources: Vec<Source>) {
        // Held for as long as the commands take to send, so that two calls for one endpoint do not mix.
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        shown.retain(|old| {
            let is_wanted = |source: &Source| source.rank == old.name.rank && source.place() == old.place;
            let stays = old.name.endpoint != endpoint || sources.iter().any(is_wanted);
            if !stays {
                self.thread_of(endpoint).send(Command::RemoveSource(old.name));
            }
            stays
        });
        for source in sources {
            if !shown.iter().any(|old| old.name == source.name()) {
                self.add_to(&mut shown, source);
            }
        }
    }

    /// An engine is known to have dropped its cache: all credit of the endpoint goes, as if it had said so.
    pub fn cleared(&self, endpoint: EndpointId) {
        self.thread_of(endpoint).send(Command::Cleared(endpoint));
    }

    /// An engine may be another process than the one that is followed: its sources prove it is not, or begin anew.
    pub fn suspect(&self, endpoint: EndpointId) {
        self.thread_of(endpoint).send(Command::Suspect(endpoint));
    }

    /// Stops following all sources of an endpoint, and takes their credit away.
    pub fn remove(&self, endpoint: EndpointId) {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner).retain(|shown| shown.name.endpoint != endpoint);
        self.thread_of(endpoint).send(Command::Remove(endpoint));
    }

    /// How each source does.
    pub fn status(&self) -> Vec<SourceStatus> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner).iter().map(Shown::status).collect()
    }

    /// Stops following, takes all credit away and joins the threads. A second call does nothing.
    pub fn stop(&self) {
        self.threads.iter().for_each(|thread| thread.send(Command::Stop));
        self.threads.iter().for_each(EventThread::join);
    }

    fn thread_of(&self, endpoint: EndpointId) -> &EventThread {
        &self.threads[endpoint.0 as usize % self.threads.len()]
    }
}

impl EventThread {
    fn start(thread_idx: usize, index: Arc<PrefixIndex>) -> Self {
        let (commands, receiver) = channel();
        let worker =
            Worker { index, commands: receiver, started: Instant::now(), contexts: Vec::new(), followed: Vec::new() };
        let handle = std::thread::Builder::new()
            .name(format!("warmroute-events-{thread_idx}"))
            .spawn(move || worker.run())
            .expect("a starting process can have a few threads");
        Self { commands, handle: Mutex::new(Some(handle)) }
    }

    fn send(&self, command: Command) {
        if self.commands.send(command).is_err() {
            // Only after `stop`: the thread ends in no other way.
            tracing::debug!("command for a stopped KV event thread");
        }
    }

    fn join(&self) {
        let handle = self.handle.lock().unwrap_or_else(PoisonError::into_inner).take();
        if handle.is_some_and(|handle| handle.join().is_err()) {
            error!("a KV event thread panicked");
        }
    }
}

impl Shown {
    fn status(&self) -> SourceStatus {
        let Self { name, model, stats, place: _ } = self;
        SourceStatus {
            model: model.clone(),
            endpoint: name.endpoint,
            address: name.address,
            rank: name.rank,
            state: stats.state(),
            proved: stats.proved(),
            disproved: stats.disproved(),
            last_seq: stats.last_seq(),
            n_blocks: stats.n_blocks(),
            n_generations: stats.n_generations.get(),
            n_batches: stats.n_batches.get(),
            n_stored: stats.n_stored.get(),
            n_removed: stats.n_removed.get(),
            n_cleared: stats.n_cleared.get(),
            n_gaps: stats.n_gaps.get(),
            n_replays: stats.n_replays.get(),
            n_decode_failures: stats.n_decode_failures.get(),
            n_skipped: stats.n_skipped.get(),
            n_refused: stats.n_refused.get(),
        }
    }
}

/// What runs on a thread.
struct Worker {
    index: Arc<PrefixIndex>,
    commands: Receiver<Command>,
    started: Instant,
    /// Each with room for [`SOURCES_PER_CONTEXT`] sources.
    contexts: Vec<zmq::Context>,
    followed: Vec<Followed>,
}

struct Followed {
    subscription: Subscription,
    stats: Arc<SourceStats>,
    /// Position in [`Worker::contexts`].
    context_idx: usize,
}

impl Worker {
    fn run(mut self) {
        while self.obey_commands() {
            self.take_turns();
            self.wait();
        }
    }

    /// Says whether to go on.
    fn obey_commands(&mut self) -> bool {
        loop {
            match self.commands.try_recv() {
                Ok(Command::Add(source, stats)) => self.follow(*source, stats),
                Ok(Command::Remove(endpoint)) => {
                    self.followed.retain(|followed| followed.subscription.name().endpoint != endpoint);
                }
                Ok(Command::RemoveSource(name)) => {
                    self.followed.retain(|followed| followed.subscription.name() != name);
                }
                Ok(Command::Cleared(endpoint)) => {
                    self.subscriptions_of(endpoint).for_each(Subscription::clear);
                }
                Ok(Command::Suspect(endpoint)) => {
                    let now = self.started.elapsed();
                    self.subscriptions_of(endpoint).for_each(|subscription| subscription.reconnect(now));
                }
                Err(TryRecvError::Empty) => return true,
                Ok(Command::Stop) | Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn subscriptions_of(&mut self, endpoint: EndpointId) -> impl Iterator<Item = &mut Subscription> {
        let subscriptions = self.followed.iter_mut().map(|followed| &mut followed.subscription);
        subscriptions.filter(move |subscription| subscription.name().endpoint == endpoint)
    }

    fn follow(&mut self, source: Source, stats: Arc<SourceStats>) {
        let n_in = |context_idx| self.followed.iter().filter(|followed| followed.context_idx == context_idx).count();
        let with_room = (0..self.contexts.len()).find(|context_idx| n_in(*context_idx) < SOURCES_PER_CONTEXT);
        let context_idx = with_room.unwrap_or_else(|| {
            self.contexts.push(zmq::Context::new());
            self.contexts.len() - 1
        });
        let context = self.contexts[context_idx].clone();
        let subscription = Subscription::new(context, source, self.index.clone(), stats.clone());
        self.followed.push(Followed { subscription, stats, context_idx });
    }

    fn take_turns(&mut self) {
        let now = self.started.elapsed();
        // The state of a subscription that panicked is not looked at again: dropping it retires its slot.
        self.followed.retain_mut(|Followed { subscription, stats, .. }| {
            let panicked = catch_unwind(AssertUnwindSafe(|| subscription.turn(now))).is_err();
            if panicked {
                let SourceName { address, rank, .. } = subscription.name();
                stats.fail();
                error!(endpoint = %address, rank, "KV event source panicked and is no longer followed");
            }
            !panicked
        });
    }

    fn wait(&self) {
        let sockets = self.followed.iter().flat_map(|followed| followed.subscription.sockets());
        let mut items: Vec<_> = sockets.map(|socket| socket.as_poll_item(zmq::POLLIN)).collect();
        if let Err(error) = zmq::poll(&mut items, POLL_MS) {
            // A signal, or no memory: without a pause this would spin.
            tracing::debug!(%error, "waiting for KV events was interrupted");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }
}
