//! A publisher process in the harness's hand.

use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::PublisherArgs;
use super::program::{Program, Truth};

const DEADLINE: Duration = Duration::from_secs(120);

/// A child that is told lines and says lines. Dropping it kills it.
#[derive(Debug)]
pub struct Talker {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<String>,
}

impl Talker {
    /// Starts `command`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(command: &mut Command) -> Result<Self> {
        let program = command.get_program().to_owned();
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take().context("the child has no standard output")?);
        let (sender, lines) = channel();
        let read = move || {
            for line in BufReader::new(stdout).lines().map_while(std::result::Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        };
        std::thread::Builder::new().name("child-output".to_owned()).spawn(read).context("cannot start a thread")?;
        Ok(Self { child, stdin, lines })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Tells it `line`.
    ///
    /// # Errors
    /// When it is gone.
    pub fn tell(&mut self, line: &str) -> Result<()> {
        let stdin = self.stdin.as_mut().context("the child was killed")?;
        writeln!(stdin, "{line}").and_then(|()| stdin.flush()).context("the child does not listen")
    }

    /// The next line that it says.
    ///
    /// # Errors
    /// When it is gone, or says nothing for two minutes.
    pub fn hear(&self) -> Result<String> {
        self.lines.recv_timeout(DEADLINE).context("the child says nothing")
    }

    /// Sends it a signal, such as SIGSTOP.
    ///
    /// # Errors
    /// When it is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let id = Pid::from_raw(self.child.id().try_into().context("process id")?);
        kill(id, signal).with_context(|| format!("cannot send {signal} to process {id}"))
    }

    /// SIGKILL, and waits for its end.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill().context("cannot kill the child")?;
        self.child.wait().context("cannot wait for the child")?;
        Ok(())
    }

    /// Resident memory in bytes.
    ///
    /// # Errors
    /// When it is gone.
    pub fn resident_bytes(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
        Ok(kib.context("the child has no VmRSS")? * 1024)
    }
}

impl Drop for Talker {
    fn drop(&mut self) {
        // Both fail when it has ended, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A running publisher.
#[derive(Debug)]
pub struct PublisherProcess {
    talker: Talker,
    args: PublisherArgs,
    events: String,
    replay: String,
}

impl PublisherProcess {
    /// Starts `binary publisher` with `args`.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start(binary: &Path, args: &PublisherArgs) -> Result<Self> {
        Self::start_by(Command::new(binary).arg("publisher"), args)
    }

    /// Starts a publisher by a command that only lacks the flags.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start_by(command: &mut Command, args: &PublisherArgs) -> Result<Self> {
        let talker = Talker::start(command.args(args.to_flags()))?;
        let ready = talker.hear()?;
        let [_, events, replay] = ready.split(' ').collect::<Vec<_>>()[..] else {
            bail!("the publisher says {ready:?}, expected ready and two endpoints");
        };
        Ok(Self { events: events.to_owned(), replay: replay.to_owned(), talker, args: args.clone() })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.talker.id()
    }

    /// ZMQ endpoint of the live stream.
    pub fn events(&self) -> &str {
        &self.events
    }

    /// ZMQ endpoint of the replay.
    pub fn replay(&self) -> &str {
        &self.replay
    }

    /// Addresses of live stream and replay, for a proxy.
    ///
    /// # Errors
    /// When they are no IP addresses.
    pub fn addresses(&self) -> Result<[SocketAddr; 2]> {
        let address = |endpoint: &str| {
            let address = endpoint.strip_prefix("tcp://").unwrap_or(endpoint).replace("0.0.0.0", "127.0.0.1");
            address.parse().with_context(|| format!("{endpoint:?} is no TCP endpoint"))
        };
        Ok([address(&self.events)?, address(&self.replay)?])
    }

    /// Has it publish up to `n_batches` batches, without waiting for that.
    ///
    /// # Errors
    /// When it is gone.
    pub fn publish_on(&mut self, n_batches: u64) -> Result<()> {
        self.talker.tell(&format!("until {n_batches}"))
    }

    /// Waits until it has published `n_batches` batches.
    ///
    /// # Errors
    /// When it is gone.
    pub fn wait_at(&self, n_batches: u64) -> Result<()> {
        let (at, started) = (format!("at {n_batches}"), Instant::now());
        while self.talker.hear()? != at {
            ensure!(started.elapsed() < DEADLINE, "the publisher does not reach {n_batches} batches");
        }
        Ok(())
    }

    /// Has it publish up to `n_batches` batches, and waits for that.
    ///
    /// # Errors
    /// When it is gone.
    pub fn publish(&mut self, n_batches: u64) -> Result<()> {
        self.publish_on(n_batches)?;
        self.wait_at(n_batches)
    }

    /// What its cache holds after `n_batches` batches.
    pub fn truth(&self, n_batches: u64) -> Truth {
        Program::truth_after(&self.args.program(), n_batches)
    }

    /// SIGKILL: the kernel closes its sockets, it says nothing.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn kill(&mut self) -> Result<()> {
        self.talker.kill()
    }

    /// Sends it a signal, such as SIGSTOP.
    ///
    /// # Errors
    /// When it is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.talker.signal(signal)
    }

    /// The next life on the same ports: numbers from 0, an empty buffer, other blocks.
    ///
    /// # Errors
    /// When it does not start.
    pub fn restart(mut self, binary: &Path, args: &PublisherArgs) -> Result<Self> {
        self.kill()?;
        let args = PublisherArgs { events: self.events.clone(), replay: self.replay.clone(), ..args.clone() };
        Self::start(binary, &args)
    }
}
