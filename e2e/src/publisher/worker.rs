//! The loop of the publisher process.
//!
//! As `ZmqEventPublisher` in `vllm/distributed/kv_events.py` (vLLM 0.32.0): a replay is served between two batches, an
//! idle publisher looks for one every 100 ms, the ROUTER keeps libzmq's default high-water mark of 1,000 and drops what
//! is above it.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail};

use super::program::Program;
use super::{PublisherArgs, standard_input};

const END: [u8; 8] = [0xff; 8];
const TOPIC: &[u8] = b"kv";
/// How long an idle publisher leaves a replay request waiting, as in vLLM.
const IDLE_WAIT: Duration = Duration::from_millis(100);
/// The port of a former life may be free only a moment later.
const BIND_DEADLINE: Duration = Duration::from_secs(10);

/// The buffer and the sockets of a publisher.
pub(super) struct Outlet {
    live: zmq::Socket,
    replay: zmq::Socket,
    buffer: VecDeque<(u64, Vec<u8>)>,
    buffer_steps: usize,
}

/// A request for batches from a number on.
#[derive(Debug)]
pub(super) struct ReplayRequest {
    client: Vec<u8>,
    from: u64,
}

impl Outlet {
    pub(super) fn bind(
        context: &zmq::Context,
        events: &str,
        replay: &str,
        hwm: i32,
        buffer_steps: usize,
    ) -> Result<Self> {
        let live = context.socket(zmq::PUB)?;
        live.set_sndhwm(hwm)?;
        let router = context.socket(zmq::ROUTER)?;
        for (socket, endpoint) in [(&live, events), (&router, replay)] {
            socket.set_linger(0)?;
            bind(socket, endpoint)?;
        }
        Ok(Self { live, replay: router, buffer: VecDeque::new(), buffer_steps })
    }

    /// Where the live stream and the replay are.
    pub(super) fn endpoints(&self) -> Result<[String; 2]> {
        let endpoint = |socket: &zmq::Socket| {
            let endpoint = socket.get_last_endpoint()?;
            endpoint.map_err(|_| anyhow::anyhow!("libzmq names the bound endpoint in something else than UTF-8"))
        };
        Ok([endpoint(&self.live)?, endpoint(&self.replay)?])
    }

    pub(super) fn replay_socket(&self) -> &zmq::Socket {
        &self.replay
    }

    /// Takes the buffer out, to go on with it elsewhere, and frees the ports.
    pub(super) fn close(&mut self) -> Result<VecDeque<(u64, Vec<u8>)>> {
        for socket in [&self.live, &self.replay] {
            let endpoint =
                socket.get_last_endpoint()?.unwrap_or_else(|bytes| String::from_utf8_lossy(&bytes).into_owned());
            socket.unbind(&endpoint)?;
        }
        Ok(std::mem::take(&mut self.buffer))
    }

    /// Goes on with the buffer of another.
    pub(super) fn with_buffer(self, buffer: VecDeque<(u64, Vec<u8>)>) -> Self {
        Self { buffer, ..self }
    }

    pub(super) fn forget_buffer(&mut self) {
        self.buffer.clear();
    }

    pub(super) fn publish(&mut self, seq: u64, payload: Vec<u8>) -> Result<()> {
        self.live.send_multipart([TOPIC, &seq.to_be_bytes(), &payload], 0)?;
        if self.buffer.len() >= self.buffer_steps {
            self.buffer.pop_front();
        }
        if self.buffer_steps > 0 {
            self.buffer.push_back((seq, payload));
        }
        Ok(())
    }

    /// The next request that waits. What is no request is dropped, as vLLM does.
    pub(super) fn request(&self) -> Result<Option<ReplayRequest>> {
        while self.replay.poll(zmq::POLLIN, 0)? > 0 {
            let frames = self.replay.recv_multipart(0)?;
            if let [client, _, from] = &frames[..] {
                let from = from.iter().fold(0_u64, |number, byte| number << 8 | u64::from(*byte));
                return Ok(Some(ReplayRequest { client: client.clone(), from }));
            }
        }
        Ok(None)
    }

    pub(super) fn answer(&self, ReplayRequest { client, from }: &ReplayRequest) -> Result<()> {
        for (seq, payload) in self.buffer.iter().filter(|(seq, _)| seq >= from) {
            self.replay.send_multipart([client.as_slice(), b"", TOPIC, &seq.to_be_bytes(), payload], 0)?;
        }
        Ok(self.replay.send_multipart([client.as_slice(), b"", b"", &END, b""], 0)?)
    }
}

fn bind(socket: &zmq::Socket, endpoint: &str) -> Result<()> {
    let started = Instant::now();
    loop {
        match socket.bind(endpoint) {
            Err(zmq::Error::EADDRINUSE) if started.elapsed() < BIND_DEADLINE => {
                std::thread::sleep(Duration::from_millis(2));
            }
            result => return result.with_context(|| format!("cannot bind {endpoint}")),
        }
    }
}

/// Publishes until standard input ends.
///
/// # Errors
/// When a socket cannot be bound or used, or a command is not understood.
pub fn run_publisher(args: &PublisherArgs) -> Result<()> {
    let context = zmq::Context::new();
    let mut outlet = Outlet::bind(&context, &args.events, &args.replay, args.hwm, args.buffer_steps)?;
    let [events, replay] = outlet.endpoints()?;
    let mut program = Program::new(args.program());
    while program.n_batches() < args.start_batches {
        outlet.publish(program.n_batches(), program.encoded_batch(unix_seconds()))?;
    }
    let mut publisher = Publisher {
        outlet,
        program,
        commands: standard_input()?,
        limit: if args.endless { u64::MAX } else { args.start_batches },
        interval: if args.rate > 0.0 { Duration::from_secs_f64(1.0 / args.rate) } else { Duration::ZERO },
        due: Instant::now(),
    };
    say(&format!("ready {events} {replay}"))?;
    while publisher.turn()? {}
    Ok(())
}

struct Publisher {
    outlet: Outlet,
    program: Program,
    commands: Receiver<String>,
    /// Batches to publish.
    limit: u64,
    interval: Duration,
    /// When the next batch is to be published.
    due: Instant,
}

impl Publisher {
    /// Says whether to go on.
    fn turn(&mut self) -> Result<bool> {
        if let Some(request) = self.outlet.request()? {
            self.outlet.answer(&request)?;
        }
        let wait = if self.program.n_batches() >= self.limit {
            IDLE_WAIT
        } else {
            self.due.saturating_duration_since(Instant::now()).min(IDLE_WAIT)
        };
        match self.command(wait) {
            Ok(command) => self.obey(&command)?,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Ok(false),
        }
        if self.program.n_batches() < self.limit && Instant::now() >= self.due {
            self.publish()?;
        }
        Ok(true)
    }

    fn command(&self, wait: Duration) -> Result<String, RecvTimeoutError> {
        if wait > Duration::ZERO {
            return self.commands.recv_timeout(wait);
        }
        self.commands.try_recv().map_err(|error| match error {
            TryRecvError::Empty => RecvTimeoutError::Timeout,
            TryRecvError::Disconnected => RecvTimeoutError::Disconnected,
        })
    }

    fn obey(&mut self, command: &str) -> Result<()> {
        let limit = command.strip_prefix("until ").and_then(|number| number.parse().ok());
        let Some(limit) = limit else { bail!("command {command:?}, expected until N") };
        self.limit = limit;
        self.due = Instant::now();
        if self.program.n_batches() >= limit { self.say_at() } else { Ok(()) }
    }

    fn publish(&mut self) -> Result<()> {
        let seq = self.program.n_batches();
        self.outlet.publish(seq, self.program.encoded_batch(unix_seconds()))?;
        self.due += self.interval;
        if self.program.n_batches() == self.limit { self.say_at() } else { Ok(()) }
    }

    fn say_at(&self) -> Result<()> {
        say(&format!("at {}", self.program.n_batches()))
    }
}

pub(crate) fn say(line: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).context("cannot write to standard output")
}

pub(super) fn unix_seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}
