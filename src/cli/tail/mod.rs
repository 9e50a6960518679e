//! `warmroute events tail`: what an engine publishes, as it comes, decoded by the router's own decoder.
//!
//! One line per event and one per mark, see `format`. The replay, where one is given, is asked for once, as soon as the
//! live stream stands: then no batch falls between the two. Ends with 0 on SIGINT and SIGTERM, even while its reader
//! pauses, and when nobody reads its output any more.

mod format;

use std::io::{self, BufWriter, ErrorKind, Write};
use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use self::format::{Format, Mark, Tail, Via};
use super::sockets::{self, receive};
use crate::config::ZmqEndpoint;

/// Longest wait for a message, and for a signal while there are many.
const POLL: Duration = Duration::from_millis(20);
const BUSY_POLL: Duration = Duration::from_millis(1);
/// Messages between two looks at the signals.
const MESSAGES_PER_TURN: usize = 1024;
/// Silence that ends a replay: replies get lost, END too, and a busy engine answers late.
const REPLAY_TIMEOUT: Duration = Duration::from_secs(5);

/// What to follow, and how to show it.
#[derive(Debug, Args)]
pub struct Options {
    /// Where the engine publishes its events, such as tcp://10.0.0.1:5557.
    #[arg(value_parser = endpoint)]
    events: ZmqEndpoint,
    /// Where the engine replays them: its buffer is shown first.
    #[arg(long, value_parser = endpoint)]
    replay: Option<ZmqEndpoint>,
    /// First batch to replay.
    #[arg(long, value_name = "SEQ", default_value_t = 0, requires = "replay")]
    from: u64,
    /// Show only messages whose topic begins so.
    #[arg(long, value_name = "PREFIX", default_value = "")]
    topic: String,
    /// Write JSON lines.
    #[arg(long)]
    json: bool,
}

fn endpoint(text: &str) -> Result<ZmqEndpoint, String> {
    let parsed = text.parse().ok().filter(|endpoint: &ZmqEndpoint| !endpoint.is_bound());
    parsed.ok_or_else(|| "expected tcp://HOST:PORT or ipc://PATH to connect to".to_owned())
}

/// The events cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A socket cannot be set up.
    #[error("cannot open a socket to {endpoint}")]
    Socket {
        /// What it was to connect to.
        endpoint: String,
        /// libzmq's reason.
        #[source]
        source: zmq::Error,
    },
    /// Signals or timers cannot be handled.
    #[error("cannot handle signals")]
    Signals(#[source] io::Error),
    /// The output is broken in another way than that nobody reads it.
    #[error("cannot write to standard output")]
    Output(#[source] io::Error),
}

/// Runs the command.
///
/// # Errors
/// [`Error`] when it cannot start, or cannot write.
pub fn run(options: Options, output: impl Write + Send + 'static) -> Result<(), Error> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Error::Signals)?;
    let result = runtime.block_on(follow(options, BufWriter::new(output)));
    // A write to a reader that pauses may never end.
    runtime.shutdown_background();
    match result {
        Err(Error::Output(error)) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}

async fn follow(options: Options, output: impl Write + Send + 'static) -> Result<(), Error> {
    let mut terminate = signal(SignalKind::terminate()).map_err(Error::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Error::Signals)?;
    let mut session = Session::open(options)?;
    let show = async {
        let mut output = output;
        loop {
            let is_busy = session.turn()?;
            output = write(mem::take(&mut session.lines), output).await.map_err(Error::Output)?;
            tokio::time::sleep(if is_busy { BUSY_POLL } else { POLL }).await;
        }
    };
    tokio::select! {
        biased;
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
        ended = show => ended,
    }
}

/// Writes `lines` on a thread of its own, since a reader that pauses must not keep the signals from being seen; gives
/// the output back.
async fn write<W: Write + Send + 'static>(lines: Vec<String>, mut output: W) -> io::Result<W> {
    if lines.is_empty() {
        return Ok(output);
    }
    let writing = tokio::task::spawn_blocking(move || {
        lines.iter().try_for_each(|line| writeln!(output, "{line}"))?;
        output.flush()?;
        Ok(output)
    });
    writing.await.expect("writing lines is no panic")
}

/// The sockets, and what is to be written.
struct Session {
    context: zmq::Context,
    live: zmq::Socket,
    monitor: zmq::Socket,
    replay: Replay,
    tail: Tail,
    lines: Vec<String>,
}

/// The one replay of a session.
enum Replay {
    /// Asked for once the live stream stands.
    Wanted {
        endpoint: Arc<str>,
        from: u64,
    },
    Running {
        dealer: zmq::Socket,
        heard_at: Instant,
    },
    /// None is wanted, or it has ended.
    Past,
}

impl Session {
    fn open(options: Options) -> Result<Self, Error> {
        let Options { events, replay, from, topic, json } = options;
        let context = zmq::Context::new();
        let (live, monitor) = sockets::subscribe(&context, events.as_str(), &topic).map_err(at(events.as_str()))?;
        let replay = replay.map_or(Replay::Past, |replay| Replay::Wanted { endpoint: replay.as_str().into(), from });
        let tail = Tail::new(if json { Format::Json } else { Format::Text });
        let lines = vec![tail.mark(&Mark::Connecting { endpoint: events.as_str().to_owned() })];
        Ok(Self { context, live, monitor, replay, tail, lines })
    }

    /// Takes what waits in the sockets; true when there may be more.
    fn turn(&mut self) -> Result<bool, Error> {
        self.watch_connection()?;
        self.read_replies();
        for _ in 0..MESSAGES_PER_TURN {
            let Some(frames) = receive(&self.live) else { return Ok(false) };
            self.tail.message(Via::Live, &frames, &mut self.lines);
        }
        Ok(true)
    }

    fn watch_connection(&mut self) -> Result<(), Error> {
        while let Some(event) = sockets::next_event(&self.monitor) {
            match event {
                sockets::LinkEvent::Up => {
                    self.lines.push(self.tail.mark(&Mark::Connected));
                    self.ask_for_replay()?;
                }
                sockets::LinkEvent::Down => self.lines.push(self.tail.mark(&Mark::Disconnected)),
                sockets::LinkEvent::Refused | sockets::LinkEvent::Other => {}
            }
        }
        Ok(())
    }

    fn ask_for_replay(&mut self) -> Result<(), Error> {
        let Replay::Wanted { endpoint, from } = &self.replay else { return Ok(()) };
        let dealer = sockets::request(&self.context, endpoint, *from).map_err(at(endpoint))?;
        self.lines.push(self.tail.replay_asked(*from));
        self.replay = Replay::Running { dealer, heard_at: Instant::now() };
        Ok(())
    }

    fn read_replies(&mut self) {
        let Replay::Running { dealer, heard_at } = &mut self.replay else { return };
        for _ in 0..MESSAGES_PER_TURN {
            let Some(frames) = receive(dealer) else { break };
            *heard_at = Instant::now();
            if self.tail.message(Via::Replay, &frames, &mut self.lines) {
                self.replay = Replay::Past;
                return;
            }
        }
        if heard_at.elapsed() > REPLAY_TIMEOUT {
            self.lines.push(self.tail.mark(&Mark::ReplaySilent));
            self.replay = Replay::Past;
        }
    }
}

fn at(endpoint: &str) -> impl FnOnce(zmq::Error) -> Error {
    let endpoint = endpoint.to_owned();
    move |source| Error::Socket { endpoint, source }
}
