//! One publisher, a proxy in front of each of its sockets, and a follower behind them.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::Figures;
use super::follower::{Check, Follower};
use crate::proxy::{Faults, Proxy};
use crate::publisher::PublisherArgs;
use crate::publisher::process::PublisherProcess;

/// The only source's endpoint.
pub(super) const ENDPOINT: u32 = 3;
/// Longest wait for a source to settle: some rounds of backoff and replay.
pub(super) const SETTLE: Duration = Duration::from_secs(90);

pub(super) struct Line {
    pub(super) publisher: PublisherProcess,
    pub(super) args: PublisherArgs,
    pub(super) live: Proxy,
    pub(super) replay: Proxy,
    pub(super) follower: Follower,
    /// Batches that the publisher was told to publish.
    pub(super) n_batches: u64,
    binary: std::path::PathBuf,
}

impl Line {
    /// Starts all parts; `faults` hold from the first connection on.
    pub(super) fn start(binary: &Path, args: &PublisherArgs, live: Faults, replay: Faults) -> Result<Self> {
        let publisher = PublisherProcess::start(binary, args)?;
        let [events, replays] = publisher.addresses()?;
        let proxies = [Proxy::start(events, 7)?, Proxy::start(replays, 8)?];
        let [live_proxy, replay_proxy] = proxies;
        live_proxy.set(live);
        replay_proxy.set(replay);
        let mut follower = Follower::start(binary)?;
        follower.follow(ENDPOINT, &live_proxy.endpoint(), Some(&replay_proxy.endpoint()))?;
        Ok(Self {
            publisher,
            n_batches: args.start_batches,
            args: args.clone(),
            live: live_proxy,
            replay: replay_proxy,
            follower,
            binary: binary.to_owned(),
        })
    }

    /// A line without faults whose source is live and exact after `n_batches` batches.
    pub(super) fn healthy(binary: &Path, args: &PublisherArgs, n_batches: u64) -> Result<Self> {
        let mut line = Self::start(binary, args, Faults::default(), Faults::default())?;
        line.follower.wait(ENDPOINT, "the first connection", SETTLE, |view| view.is_live())?;
        line.publish(n_batches)?;
        let (_, check) = line.settle()?;
        ensure!(check.is_exact() && check.n_held > 0, "before any fault: {check:?}");
        Ok(line)
    }

    pub(super) fn set(&self, faults: &Faults) {
        self.live.set(faults.clone());
        self.replay.set(faults.clone());
    }

    pub(super) fn kill_connections(&self) {
        self.live.kill();
        self.replay.kill();
    }

    /// Publishes so many batches more.
    pub(super) fn publish(&mut self, n_more: u64) -> Result<()> {
        self.n_batches += n_more;
        self.publisher.publish(self.n_batches)
    }

    /// Waits until the source has applied everything and waits for nothing; the time that it took, and what it then
    /// knows.
    pub(super) fn settle(&mut self) -> Result<(Duration, Check)> {
        let last = self.n_batches.checked_sub(1);
        let started = Instant::now();
        self.follower.wait(ENDPOINT, "settling", SETTLE, |view| view.last_seq == last && view.is_settled())?;
        let took = started.elapsed();
        Ok((took, self.check()?))
    }

    pub(super) fn check(&mut self) -> Result<Check> {
        self.follower.check(ENDPOINT, &self.args.program(), self.n_batches)
    }

    /// SIGKILL, and another publisher behind the same proxies.
    pub(super) fn replace(&mut self, args: PublisherArgs) -> Result<()> {
        self.publisher.kill()?;
        self.publisher = PublisherProcess::start(&self.binary, &args)?;
        let [events, replays] = self.publisher.addresses()?;
        self.live.redirect(events);
        self.replay.redirect(replays);
        self.n_batches = args.start_batches;
        self.args = args;
        Ok(())
    }

    /// Settles and says what is then known.
    pub(super) fn figures(&mut self) -> Result<Figures> {
        let (converge, check) = self.settle()?;
        let figures = Figures::of(&self.follower.view(ENDPOINT)?, check);
        Figures { converge: Some(converge), ..figures }.verified()
    }
}
