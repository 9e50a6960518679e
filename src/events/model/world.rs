//! Virtual time, and a network that misbehaves as libzmq, TCP and vLLM's publisher let it.
//!
//! What is modelled of them: messages of one connection arrive in order, and none arrives on another connection.
//! Batches published before a new connection's subscription has arrived are not seen by it. A broken connection is
//! noticed at once, or, when the peer fell silent, after the heartbeat's timeout. A replay request takes a connection
//! of its own, so it may reach another process than the live stream comes from; it is answered late, with losses, and
//! even END may be lost.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::engine::EngineTraits;
use super::publisher::{Message, Process, ProcessId};
use super::source::{Command, Snapshot, Source};
use crate::events::apply::SourceName;
use crate::events::continuity::{Input, Phase, SeqNo};
use crate::routing::endpoint::EndpointId;
use crate::routing::index::{IndexLimits, PrefixIndex};

/// Replays that may run at the same time, over all sources.
const N_PERMITS: usize = 2;
/// After so long a silent peer is given up: interval and timeout of the heartbeat.
const HEARTBEAT_MS: std::ops::Range<u64> = 15_000..20_000;

/// See the module.
pub(super) struct World {
    pub(super) now: Duration,
    queue: BinaryHeap<Reverse<Scheduled>>,
    n_scheduled: u64,
    pub(super) rng: fastrand::Rng,
    pub(super) index: Arc<PrefixIndex>,
    pub(super) sites: Vec<Site>,
    /// Sites whose replay runs, and those whose replay waits for one of these to end.
    running: Vec<SiteIdx>,
    waiting: VecDeque<(SiteIdx, u64)>,
    n_processes: u32,
    /// Whether the router asks for full reports.
    reports: bool,
    /// Snapshots that were taken at some time, of whichever source.
    snapshots: Vec<Snapshot>,
    traced: bool,
}

pub(super) type SiteIdx = usize;

/// One address: the process that has it now, the way there, and the source that listens to it.
pub(super) struct Site {
    pub(super) process: Option<Process>,
    pub(super) source: Source,
    pub(super) replay_server: ReplayServer,
    pub(super) faults: Faults,
    link: Option<Link>,
    /// Number of the last link that was opened or tried.
    last_link: u64,
    replay: Option<Replay>,
    last_replay: u64,
    /// Nothing passes before this.
    dark_until: Duration,
}

/// A connection of the live stream.
struct Link {
    id: u64,
    /// Batches published earlier are not sent.
    joined_at: Duration,
    /// Messages stay in order.
    last_delivery: Duration,
    /// The peer is gone or out of reach for good, which is not noticed yet.
    doomed: bool,
}

struct Replay {
    id: u64,
    from: SeqNo,
}

/// How replay requests are answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReplayServer {
    Absent,
    Dead,
    Serving {
        max_latency_ms: u64,
        /// Replies that get lost, per hundred.
        loss: u8,
        /// Replies after which all are lost.
        n_replies: usize,
        /// ENDs that get lost, per hundred.
        end_loss: u8,
    },
}

/// What happens to the next messages of the live stream.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Faults {
    pub(super) n_dropped: u32,
    pub(super) n_duplicated: u32,
    pub(super) n_truncated: u32,
    /// Batches that get lost, per hundred.
    pub(super) loss: u8,
}

#[derive(Debug)]
enum Event {
    Tick,
    Connect { link: u64 },
    Established { link: u64 },
    Lost { link: u64 },
    Live { link: u64, message: Message },
    ReplayDue { replay: u64 },
    Serve { replay: u64 },
    Reply { replay: u64, message: Message },
    ReplayEnd { replay: u64 },
    Boot,
}

struct Scheduled {
    at: Duration,
    n: u64,
    site: SiteIdx,
    event: Event,
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        self.n == other.n
    }
}

impl Eq for Scheduled {}

impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Scheduled {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.n).cmp(&(other.at, other.n))
    }
}

impl World {
    pub(super) fn new(reports: bool, rng: fastrand::Rng, traced: bool) -> Self {
        let limits = IndexLimits { slots: 16, ..IndexLimits::default() };
        Self {
            now: Duration::ZERO,
            queue: BinaryHeap::new(),
            n_scheduled: 0,
            rng,
            index: Arc::new(PrefixIndex::new(limits)),
            sites: Vec::new(),
            running: Vec::new(),
            waiting: VecDeque::new(),
            n_processes: 0,
            reports,
            snapshots: Vec::new(),
            traced,
        }
    }

    /// One more address, and a source that listens to it. Ranks of one endpoint have addresses of their own.
    pub(super) fn add_site(&mut self, replay_server: ReplayServer, is_rank: bool) {
        let site = self.sites.len();
        let (endpoint, rank) = if is_rank { (0, site as u32) } else { (site as u32, 0) };
        let address = SocketAddr::from(([127, 0, 0, 1], 8000));
        let name = SourceName { endpoint: EndpointId(endpoint), address, rank };
        let has_replay = replay_server != ReplayServer::Absent;
        let process = self.new_process();
        self.sites.push(Site {
            process: Some(process),
            source: Source::new(name, has_replay, self.reports, &self.index),
            replay_server,
            faults: Faults::default(),
            link: None,
            last_link: 0,
            replay: None,
            last_replay: 0,
            dark_until: Duration::ZERO,
        });
        self.schedule_within(site, 0..1000, Event::Connect { link: 0 });
        self.schedule_within(site, 0..100, Event::Tick);
    }

    /// Lets time pass.
    pub(super) fn advance(&mut self, by: Duration) {
        let until = self.now + by;
        while self.queue.peek().is_some_and(|Reverse(next)| next.at <= until) {
            let Some(Reverse(Scheduled { at, site, event, .. })) = self.queue.pop() else { break };
            self.now = at;
            self.happen(site, event);
        }
        self.now = until;
    }

    /// The process at `site` does some work and publishes a batch of it.
    pub(super) fn publish(&mut self, site: SiteIdx, publish: fn(&mut Process, &mut fastrand::Rng) -> Option<Message>) {
        let Some(process) = &mut self.sites[site].process else { return };
        let Some(message) = publish(process, &mut self.rng) else { return };
        self.trace(site, || format!("publishes {}", message.seq));
        self.send(site, &message);
    }

    /// The process at `site` ends. A silent end is noticed by the heartbeat alone.
    pub(super) fn kill(&mut self, site: SiteIdx, silent: bool) {
        self.trace(site, || format!("dies, silent: {silent}"));
        self.sites[site].process = None;
        self.break_link(site, silent);
    }

    /// A new process at `site`, which has worked already.
    pub(super) fn boot(&mut self, site: SiteIdx, n_batches: u32) {
        let mut process = self.new_process();
        self.trace(site, || format!("boots {:?} with {n_batches} batches", process.id));
        for _ in 0..n_batches {
            process.publish(&mut self.rng);
        }
        self.sites[site].process = Some(process);
    }

    pub(super) fn boot_within(&mut self, site: SiteIdx, within: std::ops::Range<u64>) {
        self.schedule_within(site, within, Event::Boot);
    }

    /// The connection to a process that goes on ends.
    pub(super) fn break_link(&mut self, site: SiteIdx, silent: bool) {
        let Some(link) = &mut self.sites[site].link else { return };
        link.doomed = true;
        let id = link.id;
        self.trace(site, || format!("loses its link, silent: {silent}"));
        self.schedule_within(site, if silent { HEARTBEAT_MS } else { 0..100 }, Event::Lost { link: id });
    }

    /// Nothing passes for a while. What was sent arrives late, or the heartbeat gives up.
    pub(super) fn darken(&mut self, site: SiteIdx, length: Duration) {
        self.trace(site, || format!("is out of reach for {length:?}"));
        let until = self.now + length;
        self.sites[site].dark_until = until;
        if length > Duration::from_millis(HEARTBEAT_MS.start) {
            self.break_link(site, true);
        }
        if let Some(link) = &mut self.sites[site].link {
            link.last_delivery = link.last_delivery.max(until);
        }
    }

    /// Whatever is on its way comes later.
    pub(super) fn delay(&mut self, site: SiteIdx, by: Duration) {
        if let Some(link) = &mut self.sites[site].link {
            link.last_delivery = link.last_delivery.max(self.now) + by;
        }
    }

    pub(super) fn suspect(&mut self, site: SiteIdx) {
        self.step(site, Input::Suspect);
    }

    /// Keeps what the source knows now.
    pub(super) fn take_snapshot(&mut self, site: SiteIdx) {
        self.snapshots.extend(self.sites[site].source.snapshot());
    }

    /// Offers a source one of the snapshots that were kept, mostly of itself, and perhaps of another time.
    pub(super) fn offer_snapshot(&mut self, site: SiteIdx) {
        if let Some(snapshot) = self.rng.choice(&self.snapshots).cloned() {
            let input = self.sites[site].source.offer(snapshot);
            self.step(site, input);
        }
    }

    /// The router starts again, and reads what it wrote at its end, perhaps long ago.
    pub(super) fn forget(&mut self, site: SiteIdx) {
        self.trace(site, || "is read by a new router".to_owned());
        self.close_replay(site);
        let place = &mut self.sites[site];
        let has_replay = place.replay_server != ReplayServer::Absent;
        place.source = Source::new(place.source.name, has_replay, self.reports, &self.index);
        self.drop_link(site);
        self.offer_snapshot(site);
    }

    /// Ends all faults of the network.
    pub(super) fn heal(&mut self) {
        for site in 0..self.sites.len() {
            self.trace(site, || "heals".to_owned());
            self.sites[site].faults = Faults::default();
            self.sites[site].dark_until = self.now;
            if let ReplayServer::Serving { loss, n_replies, .. } = &mut self.sites[site].replay_server {
                (*loss, *n_replies) = (0, usize::MAX);
            }
            if self.sites[site].process.is_none() {
                self.boot_within(site, 0..2000);
            }
            self.sites[site].source.audit.n_replays = 0;
        }
    }

    /// Whether every source has come to rest, and listens to the process that is there.
    pub(super) fn is_settled(&self) -> bool {
        self.sites.iter().all(|site| {
            let is_connected = site.link.as_ref().is_some_and(|link| !link.doomed && link.last_delivery <= self.now);
            let is_calm = matches!(site.source.phase(), Phase::Live | Phase::Incomplete);
            is_connected && is_calm && site.replay.is_none()
        })
    }

    /// The sources' states, for a message.
    pub(super) fn phases(&self) -> Vec<Phase> {
        self.sites.iter().map(|site| site.source.phase()).collect()
    }

    fn new_process(&mut self) -> Process {
        let id = ProcessId(self.n_processes);
        self.n_processes += 1;
        let buffer_steps = if self.rng.u8(..4) == 0 { self.rng.usize(1..12) } else { 10_000 };
        Process::new(id, EngineTraits::random(self.reports, &mut self.rng), buffer_steps, self.traced)
    }

    fn happen(&mut self, site: SiteIdx, event: Event) {
        match event {
            Event::Tick => {
                self.step(site, Input::Tick);
                self.schedule_within(site, 100..400, Event::Tick);
            }
            Event::Connect { link } => self.connect(site, link),
            Event::Established { link } => {
                if self.is_link(site, link) {
                    self.step(site, Input::Connected);
                }
            }
            Event::Lost { link } => {
                if self.is_link(site, link) {
                    self.drop_link(site);
                    self.step(site, Input::Disconnected);
                }
            }
            Event::Live { link, message } => {
                if self.is_link(site, link) {
                    self.step(site, Input::Live { seq: SeqNo(message.seq), payload: message.payload() });
                }
            }
            Event::ReplayDue { replay } => self.start_replay(site, replay),
            Event::Serve { replay } => self.serve(site, replay),
            Event::Reply { replay, message } => {
                if self.is_replay(site, replay) {
                    self.step(site, Input::Reply { seq: SeqNo(message.seq), payload: message.payload() });
                }
            }
            Event::ReplayEnd { replay } => {
                if self.is_replay(site, replay) {
                    self.step(site, Input::ReplayEnd);
                }
            }
            Event::Boot => {
                if self.sites[site].process.is_none() {
                    let n_batches = self.rng.u32(..4);
                    self.boot(site, n_batches);
                }
            }
        }
    }

    /// Tells a source what happened, and does what it wants.
    fn step(&mut self, site: SiteIdx, input: Input) {
        let shown = self.traced && input != Input::Tick;
        let before = self.sites[site].source.phase();
        if shown {
            self.trace(site, || format!("→ {}", brief(&input)));
        }
        for command in self.sites[site].source.step(self.now, input) {
            self.trace(site, || format!("  {command:?}"));
            self.obey(site, command);
        }
        let phase = self.sites[site].source.phase();
        if phase != before {
            self.trace(site, || format!("  is {phase:?}"));
        }
    }

    fn obey(&mut self, site: SiteIdx, command: Command) {
        match command {
            Command::RequestReplay { from, within } => {
                self.close_replay(site);
                let place = &mut self.sites[site];
                place.last_replay += 1;
                let replay = place.last_replay;
                place.replay = Some(Replay { id: replay, from });
                let within = u64::try_from(within.as_millis()).unwrap_or(u64::MAX);
                self.schedule_within(site, 0..within + 1, Event::ReplayDue { replay });
            }
            Command::CloseReplay => self.close_replay(site),
            Command::Reconnect => self.drop_link(site),
            Command::Quarantine => {
                self.close_replay(site);
                self.drop_link(site);
            }
        }
    }

    fn connect(&mut self, site: SiteIdx, link: u64) {
        let place = &self.sites[site];
        if place.last_link != link || place.link.is_some() {
            return;
        }
        let is_shunned = place.source.phase() == Phase::Quarantined;
        if is_shunned || place.process.is_none() || place.dark_until > self.now {
            return self.schedule_within(site, 100..3000, Event::Connect { link });
        }
        let id = link + 1;
        let established = self.now + Duration::from_millis(self.rng.u64(1..20));
        let joined_at = established + Duration::from_millis(self.rng.u64(..50));
        self.sites[site].last_link = id;
        self.sites[site].link = Some(Link { id, joined_at, last_delivery: established, doomed: false });
        self.schedule(site, established, Event::Established { link: id });
    }

    /// Drops the connection with all that is on its way, and makes another.
    fn drop_link(&mut self, site: SiteIdx) {
        self.sites[site].link = None;
        let link = self.sites[site].last_link;
        self.schedule_within(site, 50..2000, Event::Connect { link });
    }

    /// Sends a batch along the live stream, with the faults that are due.
    fn send(&mut self, site: SiteIdx, message: &Message) {
        let place = &mut self.sites[site];
        let Some(link) = place.link.as_mut().filter(|link| !link.doomed && self.now >= link.joined_at) else { return };
        if take(&mut place.faults.n_dropped) || self.rng.u8(..100) < place.faults.loss {
            return self.trace(site, || format!("loses {}", message.seq));
        }
        let delivery = link.last_delivery.max(self.now + Duration::from_millis(self.rng.u64(1..10)));
        link.last_delivery = delivery;
        let (link, mut message) = (link.id, message.clone());
        if take(&mut place.faults.n_truncated) {
            message.truncate(&mut self.rng);
        }
        if take(&mut place.faults.n_duplicated) {
            self.schedule(site, delivery, Event::Live { link, message: message.clone() });
        }
        self.schedule(site, delivery, Event::Live { link, message });
    }

    /// The request may go as soon as a permit is free.
    fn start_replay(&mut self, site: SiteIdx, replay: u64) {
        if !self.is_replay(site, replay) {
            return;
        }
        if self.running.len() >= N_PERMITS {
            return self.waiting.push_back((site, replay));
        }
        self.running.push(site);
        self.step(site, Input::ReplayStarted);
        let max_latency_ms = match self.sites[site].replay_server {
            ReplayServer::Absent | ReplayServer::Dead => return,
            ReplayServer::Serving { max_latency_ms, .. } => max_latency_ms,
        };
        self.schedule_within(site, 1..max_latency_ms + 2, Event::Serve { replay });
    }

    /// Answers with what the process that is there now has buffered. A request waits in libzmq for a process to come.
    fn serve(&mut self, site: SiteIdx, replay: u64) {
        if !self.is_replay(site, replay) {
            return;
        }
        let place = &self.sites[site];
        let (Some(process), false) = (&place.process, place.dark_until > self.now) else {
            return self.schedule_within(site, 100..2000, Event::Serve { replay });
        };
        let ReplayServer::Serving { loss, n_replies, end_loss, .. } = place.replay_server else { return };
        let from = place.replay.as_ref().map_or(0, |replay| replay.from.0);
        let replies: Vec<Message> = process.replay(from).take(n_replies).cloned().collect();
        let is_cut = replies.len() == n_replies;
        let mut at = self.now;
        for message in replies {
            at += Duration::from_micros(self.rng.u64(10..3000));
            if self.rng.u8(..100) >= loss {
                self.schedule(site, at, Event::Reply { replay, message });
            }
        }
        if !is_cut && self.rng.u8(..100) >= end_loss {
            self.schedule(site, at + Duration::from_millis(1), Event::ReplayEnd { replay });
        }
    }

    /// Ends a replay, and lets the one that waits longest begin.
    fn close_replay(&mut self, site: SiteIdx) {
        self.sites[site].replay = None;
        self.running.retain(|running| *running != site);
        self.waiting.retain(|(waiting, _)| *waiting != site);
        if self.running.len() < N_PERMITS
            && let Some((next, replay)) = self.waiting.pop_front()
        {
            self.start_replay(next, replay);
        }
    }

    fn is_link(&self, site: SiteIdx, link: u64) -> bool {
        self.sites[site].link.as_ref().is_some_and(|open| open.id == link)
    }

    fn is_replay(&self, site: SiteIdx, replay: u64) -> bool {
        self.sites[site].replay.as_ref().is_some_and(|open| open.id == replay)
    }

    fn schedule_within(&mut self, site: SiteIdx, within_ms: std::ops::Range<u64>, event: Event) {
        let at = self.now + Duration::from_millis(self.rng.u64(within_ms));
        self.schedule(site, at, event);
    }

    fn schedule(&mut self, site: SiteIdx, at: Duration, event: Event) {
        self.n_scheduled += 1;
        self.queue.push(Reverse(Scheduled { at, n: self.n_scheduled, site, event }));
    }

    pub(super) fn trace(&self, site: SiteIdx, text: impl FnOnce() -> String) {
        if self.traced {
            println!("{:10.3}s site {site} {}", self.now.as_secs_f64(), text());
        }
    }
}

/// One fewer, if there is one.
fn take(n: &mut u32) -> bool {
    let is_due = *n > 0;
    *n = n.saturating_sub(1);
    is_due
}

fn brief(input: &Input) -> String {
    match input {
        Input::Live { seq, .. } => format!("Live {}", seq.0),
        Input::Reply { seq, .. } => format!("Reply {}", seq.0),
        other => format!("{other:?}"),
    }
}
