//! Many small publishers in one process, all on one thread: crowds of sources without crowds of processes.
//!
//! Commands on standard input, each answered by one line of JSON: `publish N` (each publisher N batches more), `sever`
//! (all connections end, the publishers live on), `flap MS` (one publisher after another is replaced by a new one, one
//! every MS milliseconds; 0 stops that) and `report`.

use std::collections::VecDeque;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use serde::{Deserialize, Serialize};

use super::process::Talker;
use super::program::{Program, ProgramOptions};
use super::standard_input;
use super::worker::{Outlet, ReplayRequest, say, unix_seconds};

/// libzmq's contexts have 1,023 sockets, and a publisher has two.
const PUBLISHERS_PER_CONTEXT: usize = 400;
const POLL_MS: i64 = 5;

/// Flags of a swarm.
#[derive(Clone, Debug, Args)]
pub struct SwarmArgs {
    /// Number of publishers.
    #[arg(long)]
    pub publishers: usize,
    /// Blocks of each cache.
    #[arg(long, default_value_t = 64)]
    pub cache_blocks: usize,
    /// Milliseconds between a replay request and its answer, as of a busy engine.
    #[arg(long, default_value_t = 0)]
    pub replay_ms: u64,
}

/// What a swarm tells.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SwarmReport {
    /// One per publisher.
    pub publishers: Vec<Member>,
    /// Replay requests answered.
    pub n_replays: u64,
    /// Most replay requests that waited for their answers at the same time.
    pub peak_replays: usize,
    /// Publishers that were replaced.
    pub n_replaced: u64,
}

/// One publisher of a swarm.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Member {
    /// ZMQ endpoint of the live stream.
    pub events: String,
    /// ZMQ endpoint of the replay.
    pub replay: String,
    /// What it publishes now.
    pub program: ProgramOptions,
    /// How much of that it has published.
    pub n_batches: u64,
}

/// Runs a swarm until standard input ends.
///
/// # Errors
/// When a socket cannot be bound or used, or a command is not understood.
pub fn run_swarm(args: &SwarmArgs) -> Result<()> {
    crate::faults::raise_file_limit()?;
    let commands = standard_input()?;
    let mut swarm = Swarm::bind(args)?;
    swarm.say_report()?;
    while swarm.obey(&commands)? {
        swarm.flap()?;
        swarm.serve_replays()?;
        swarm.wait();
    }
    Ok(())
}

struct Swarm {
    args: SwarmArgs,
    contexts: Vec<zmq::Context>,
    publishers: Vec<(Outlet, Program)>,
    members: Vec<Member>,
    /// Replays to be answered, in the order of their requests.
    waiting: VecDeque<(Instant, usize, ReplayRequest)>,
    /// Pause between two replacements, and when the next is due.
    flapping: Option<(Duration, Instant)>,
    next_replaced: usize,
    n_replays: u64,
    peak_replays: usize,
    n_replaced: u64,
}

impl Swarm {
    fn bind(args: &SwarmArgs) -> Result<Self> {
        let n_contexts = args.publishers.div_ceil(PUBLISHERS_PER_CONTEXT);
        let mut swarm = Self {
            args: args.clone(),
            contexts: (0..n_contexts).map(|_| zmq::Context::new()).collect(),
            publishers: Vec::new(),
            members: Vec::new(),
            waiting: VecDeque::new(),
            flapping: None,
            next_replaced: 0,
            n_replays: 0,
            peak_replays: 0,
            n_replaced: 0,
        };
        for position in 0..args.publishers {
            let outlet = swarm.outlet(position, "tcp://127.0.0.1:0", "tcp://127.0.0.1:0")?;
            let [events, replay] = outlet.endpoints()?;
            let program = ProgramOptions {
                seed: position as u64,
                events_per_batch: 2,
                cache_blocks: args.cache_blocks,
                ..ProgramOptions::default()
            };
            swarm.publishers.push((outlet, Program::new(program.clone())));
            swarm.members.push(Member { events, replay, program, n_batches: 0 });
        }
        Ok(swarm)
    }

    fn outlet(&self, position: usize, events: &str, replay: &str) -> Result<Outlet> {
        Outlet::bind(&self.contexts[position / PUBLISHERS_PER_CONTEXT], events, replay, 1000, 1000)
    }

    /// Says whether to go on.
    fn obey(&mut self, commands: &Receiver<String>) -> Result<bool> {
        let command = match commands.try_recv() {
            Ok(command) => command,
            Err(TryRecvError::Empty) => return Ok(true),
            Err(TryRecvError::Disconnected) => return Ok(false),
        };
        let (word, number) = command.split_once(' ').unwrap_or((&command, "0"));
        let number: u64 = number.parse().with_context(|| format!("{command:?} has no number"))?;
        match word {
            "publish" => (0..self.publishers.len()).try_for_each(|position| self.publish(position, number))?,
            "sever" => (0..self.publishers.len()).try_for_each(|position| self.sever(position))?,
            "flap" => self.flapping = (number > 0).then(|| (Duration::from_millis(number), Instant::now())),
            "report" => {}
            _ => bail!("command {command:?}, expected publish, sever, flap or report"),
        }
        self.say_report()?;
        Ok(true)
    }

    fn publish(&mut self, position: usize, n_batches: u64) -> Result<()> {
        let (outlet, program) = &mut self.publishers[position];
        for _ in 0..n_batches {
            outlet.publish(program.n_batches(), program.encoded_batch(unix_seconds()))?;
        }
        self.members[position].n_batches = program.n_batches();
        Ok(())
    }

    /// Closes the sockets and binds new ones with the same buffer.
    fn sever(&mut self, position: usize) -> Result<()> {
        let Member { events, replay, .. } = self.members[position].clone();
        self.waiting.retain(|(_, waiting, _)| *waiting != position);
        // The old sockets end, and with them their connections, when the new ones have taken their place.
        let buffer = self.publishers[position].0.close()?;
        let outlet = self.outlet(position, &events, &replay)?;
        self.publishers[position].0 = outlet.with_buffer(buffer);
        Ok(())
    }

    /// Replaces publishers that are due by ones with other blocks, which have some batches already.
    fn flap(&mut self) -> Result<()> {
        let Some((pause, due)) = self.flapping.filter(|(_, due)| *due <= Instant::now()) else { return Ok(()) };
        self.flapping = Some((pause, due + pause));
        let position = self.next_replaced;
        self.next_replaced = (position + 1) % self.publishers.len();
        self.n_replaced += 1;
        let n_batches = self.members[position].n_batches;
        let program = &mut self.members[position].program;
        program.seed += self.args.publishers as u64;
        self.publishers[position].1 = Program::new(program.clone());
        self.sever(position)?;
        self.publishers[position].0.forget_buffer();
        // Every other one overtakes its predecessor's numbers.
        self.publish(position, if self.n_replaced.is_multiple_of(2) { n_batches + 1 } else { 5 })
    }

    fn serve_replays(&mut self) -> Result<()> {
        let due = Instant::now() + Duration::from_millis(self.args.replay_ms);
        for (position, (outlet, _)) in self.publishers.iter().enumerate() {
            while let Some(request) = outlet.request()? {
                self.waiting.push_back((due, position, request));
            }
        }
        self.peak_replays = self.peak_replays.max(self.waiting.len());
        while self.waiting.front().is_some_and(|(due, ..)| *due <= Instant::now()) {
            let Some((_, position, request)) = self.waiting.pop_front() else { break };
            self.n_replays += 1;
            self.publishers[position].0.answer(&request)?;
        }
        Ok(())
    }

    fn wait(&self) {
        let sockets = self.publishers.iter().map(|(outlet, _)| outlet.replay_socket());
        let mut items: Vec<_> = sockets.map(|socket| socket.as_poll_item(zmq::POLLIN)).collect();
        // Interrupted: as good as a timeout.
        let _ = zmq::poll(&mut items, POLL_MS);
    }

    fn say_report(&self) -> Result<()> {
        let report = SwarmReport {
            publishers: self.members.clone(),
            n_replays: self.n_replays,
            peak_replays: self.peak_replays,
            n_replaced: self.n_replaced,
        };
        say(&serde_json::to_string(&report)?)
    }
}

/// A swarm in the harness's hand.
#[derive(Debug)]
pub struct SwarmProcess(Talker);

impl SwarmProcess {
    /// Starts `binary swarm`.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start(binary: &Path, args: &SwarmArgs) -> Result<(Self, SwarmReport)> {
        let mut command = Command::new(binary);
        command.arg("swarm").args(["--publishers", &args.publishers.to_string()]);
        command.args(["--cache-blocks", &args.cache_blocks.to_string(), "--replay-ms", &args.replay_ms.to_string()]);
        let swarm = Self(Talker::start(&mut command)?);
        let report = swarm.report()?;
        Ok((swarm, report))
    }

    /// Tells it a command and waits for the answer.
    ///
    /// # Errors
    /// When it is gone.
    pub fn tell(&mut self, command: &str) -> Result<SwarmReport> {
        self.0.tell(command)?;
        self.report()
    }

    fn report(&self) -> Result<SwarmReport> {
        serde_json::from_str(&self.0.hear()?).context("the swarm's report")
    }
}
