//! A long-running program with its own process group, so that it ends with all its children and nobody else's.
//!
//! The group is named by the leader's id. The leader is reaped last: until then the kernel gives its id to no other
//! process, so no signal can reach a stranger.

use std::fmt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;

/// How long a program may take to end after SIGTERM, unless it is given more.
const GRACE: Duration = Duration::from_secs(10);
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// A running program and its children; dropping it ends them.
///
/// The program's standard input is a pipe that closes when the harness ends in any way, so a program can notice even a
/// SIGKILL.
pub struct ProcessGroup {
    name: String,
    leader: Child,
    ended: bool,
}

impl ProcessGroup {
    /// Starts `command` as leader of a new group. `name` is for messages.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn spawn(name: &str, command: &mut Command) -> Result<Self> {
        let leader = command
            .process_group(0)
            .stdin(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {name} ({})", command.get_program().display()))?;
        Ok(Self { name: name.to_owned(), leader, ended: false })
    }

    /// The leader's process id, which is the group's id too.
    pub fn id(&self) -> u32 {
        self.leader.id()
    }

    /// Whether the leader has exited. Its children may still run.
    ///
    /// # Errors
    /// When the kernel does not know it.
    pub fn has_exited(&self) -> Result<bool> {
        if self.ended {
            return Ok(true);
        }
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        let status = waitid(Id::Pid(self.pid()), flags).with_context(|| format!("cannot watch {}", self.name))?;
        Ok(status != WaitStatus::StillAlive)
    }

    /// Ends the group: SIGTERM, and SIGKILL for whatever is left when the leader has exited or the grace period is
    /// over.
    ///
    /// # Errors
    /// When the group can't be signalled.
    pub async fn stop(self) -> Result<ExitStatus> {
        self.stop_within(GRACE).await
    }

    /// [`Self::stop`] with another grace period.
    ///
    /// # Errors
    /// As [`Self::stop`].
    pub async fn stop_within(mut self, grace: Duration) -> Result<ExitStatus> {
        let deadline = self.terminate(grace)?;
        while !self.has_exited()? && Instant::now() < deadline {
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        self.finish()
    }

    /// Ends the group with SIGKILL at once, as a lack of memory would.
    ///
    /// # Errors
    /// When the group can't be signalled.
    pub async fn kill(mut self) -> Result<ExitStatus> {
        tokio::task::spawn_blocking(move || self.finish()).await.context("killing a program panicked")?
    }

    fn stop_blocking(&mut self) -> Result<ExitStatus> {
        let deadline = self.terminate(GRACE)?;
        while !self.has_exited()? && Instant::now() < deadline {
            thread::sleep(POLL_INTERVAL);
        }
        self.finish()
    }

    fn terminate(&self, grace: Duration) -> Result<Instant> {
        killpg(self.pid(), Signal::SIGTERM).with_context(|| format!("cannot end {}", self.name))?;
        Ok(Instant::now() + grace)
    }

    fn finish(&mut self) -> Result<ExitStatus> {
        killpg(self.pid(), Signal::SIGKILL).with_context(|| format!("cannot kill {}", self.name))?;
        let status = self.leader.wait().with_context(|| format!("cannot wait for {}", self.name))?;
        self.ended = true;
        Ok(status)
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.leader.id().try_into().expect("a process id fits pid_t"))
    }
}

/// Processor time that a process has used so far, user and system.
///
/// # Errors
/// When it has exited.
pub fn cpu_time(id: u32) -> Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).with_context(|| format!("no process {id}"))?;
    // Fields 14 and 15 (proc(5)), counted behind the name, which may hold spaces.
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields).split_whitespace();
    let n_ticks: u64 = fields.skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    // A tick is 10 ms on every Linux of our kind (USER_HZ).
    Ok(Duration::from_millis(n_ticks * 10))
}

impl Drop for ProcessGroup {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        if let Err(error) = self.stop_blocking() {
            eprintln!("{error:#}");
        }
    }
}

impl fmt::Debug for ProcessGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (process group {})", self.name, self.id())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};

    use super::*;

    fn shell(script: &str) -> ProcessGroup {
        ProcessGroup::spawn("shell", Command::new("sh").args(["-c", script]).stdout(Stdio::piped())).unwrap()
    }

    /// The first line that the group's leader or a child wrote: it is up, and its traps are set.
    fn first_line(group: &mut ProcessGroup) -> String {
        let mut line = String::new();
        BufReader::new(group.leader.stdout.take().unwrap()).read_line(&mut line).unwrap();
        line.trim().to_owned()
    }

    /// Running, and not merely waiting to be reaped.
    fn is_running(id: &str) -> bool {
        let status = std::fs::read_to_string(format!("/proc/{id}/status")).unwrap_or_default();
        status.lines().any(|line| line.starts_with("State:") && !line.contains('Z'))
    }

    #[tokio::test]
    async fn stop_ends_leader_by_sigterm() {
        let mut group = shell("trap 'exit 7' TERM; echo up; while :; do sleep 0.05; done");
        first_line(&mut group);
        assert!(!group.has_exited().unwrap());
        assert_eq!(group.stop().await.unwrap().code(), Some(7));
    }

    #[tokio::test]
    async fn stop_kills_children_that_ignore_sigterm() {
        let mut group = shell("(trap '' TERM; exec sh -c 'echo $$; while :; do sleep 0.05; done') & wait");
        let child = first_line(&mut group);
        group.stop().await.unwrap();
        let deadline = Instant::now() + Duration::from_secs(5);
        while is_running(&child) {
            assert!(Instant::now() < deadline, "process {child} outlived its group");
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    #[tokio::test]
    async fn kill_leaves_no_time_for_a_farewell() {
        let mut group = shell("trap 'exit 7' TERM; echo up; while :; do sleep 0.05; done");
        first_line(&mut group);
        assert_eq!(group.kill().await.unwrap().code(), None);
    }

    #[test]
    fn exit_is_seen_without_reaping() {
        let group = shell("exit 3");
        let deadline = Instant::now() + Duration::from_secs(5);
        while !group.has_exited().unwrap() {
            assert!(Instant::now() < deadline);
            thread::sleep(POLL_INTERVAL);
        }
        assert!(group.has_exited().unwrap());
    }
}
