//! One phase of the measurement: publishers, whoever receives their events, and the accounts of both.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tempfile::TempDir;

use super::subscriber::Subscriber;
use super::{Cell, CostArgs};
use crate::process::cpu_time;
use crate::proxy::Proxy;
use crate::publisher::process::PublisherProcess;
use crate::publisher::program::ALGORITHM;
use crate::router::{EngineAddress, Router, RouterOptions};

/// Longest wait for connections, and for what is under way at the end of a phase.
const PATIENCE: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(100);
/// After a connection, before the accounts are read: a subscription has to arrive, a replay to end.
const SETTLING: Duration = Duration::from_millis(500);

/// What phases are run with.
pub(super) struct Stage {
    pub(super) args: CostArgs,
    harness: PathBuf,
    router: PathBuf,
    dir: TempDir,
}

/// What a phase showed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Phase {
    pub(super) took: Duration,
    pub(super) n_events: u64,
    receiver: Duration,
    publishers: Duration,
}

/// Bytes between publishers and router.
#[derive(Clone, Copy, Debug)]
pub(super) struct Traffic {
    pub(super) took: Duration,
    pub(super) n_events: u64,
    pub(super) n_down: u64,
    pub(super) n_up: u64,
}

/// Accounts of processor time, read at the same time.
struct Accounts {
    at: Instant,
    receiver: Duration,
    publishers: Duration,
}

impl Phase {
    /// Share of one core that the receiver took.
    pub(super) fn receiver_share(&self) -> f64 {
        self.receiver.as_secs_f64() / self.took.as_secs_f64()
    }

    /// Share of one core that all publishers took.
    pub(super) fn publishers_share(&self) -> f64 {
        self.publishers.as_secs_f64() / self.took.as_secs_f64()
    }
}

impl Accounts {
    fn read(receiver: u32, publishers: &[PublisherProcess]) -> Result<Self> {
        let publishers = publishers.iter().map(|publisher| cpu_time(publisher.id())).sum::<Result<Duration>>()?;
        Ok(Self { at: Instant::now(), receiver: cpu_time(receiver)?, publishers })
    }

    /// What was used since `before`.
    fn since(&self, before: &Self, n_events: u64) -> Phase {
        Phase {
            took: self.at - before.at,
            n_events,
            receiver: self.receiver - before.receiver,
            publishers: self.publishers - before.publishers,
        }
    }
}

impl Stage {
    /// With `router` as the router's program.
    pub(super) fn new(router: PathBuf, args: CostArgs) -> Result<Self> {
        let harness = std::env::current_exe().context("path of this program")?;
        Ok(Self { args, harness, router, dir: tempfile::tempdir().context("cannot create a directory")? })
    }

    /// The router follows publishers that are silent.
    pub(super) async fn idle(&self, cell: Cell) -> Result<Phase> {
        let publishers = self.publishers(cell)?;
        let router = self.followed(&engines(&publishers)).await?;
        let before = Accounts::read(router.service().id(), &publishers)?;
        tokio::time::sleep(self.args.duration()).await;
        let phase = Accounts::read(router.service().id(), &publishers)?.since(&before, 0);
        router.stop().await?;
        Ok(phase)
    }

    /// The router follows the load.
    pub(super) async fn router(&self, cell: Cell) -> Result<Phase> {
        let mut publishers = self.publishers(cell)?;
        let router = self.followed(&engines(&publishers)).await?;
        let before = Accounts::read(router.service().id(), &publishers)?;
        self.publish(cell, &mut publishers).await?;
        self.wait_applied(&router, cell).await?;
        let phase = Accounts::read(router.service().id(), &publishers)?.since(&before, self.n_events(cell));
        router.stop().await?;
        Ok(phase)
    }

    /// A plain subscriber receives the load.
    pub(super) async fn plain(&self, cell: Cell) -> Result<Phase> {
        let mut publishers = self.publishers(cell)?;
        let endpoints = publishers.iter().map(PublisherProcess::events);
        let mut subscriber = Subscriber::start(&self.harness, endpoints)?;
        tokio::time::sleep(SETTLING).await;
        let before = Accounts::read(subscriber.id(), &publishers)?;
        self.publish(cell, &mut publishers).await?;
        let phase = Accounts::read(subscriber.id(), &publishers)?.since(&before, self.n_events(cell));
        let started = Instant::now();
        let n_sent = self.args.n_batches(cell) * cell.n_publishers;
        while subscriber.n_messages()? < n_sent {
            ensure!(started.elapsed() < PATIENCE, "found {} messages, expected {n_sent}", subscriber.n_messages()?);
            tokio::time::sleep(POLL).await;
        }
        Ok(phase)
    }

    /// The router follows the load through proxies that count.
    pub(super) async fn traffic(&self, cell: Cell) -> Result<Traffic> {
        let mut publishers = self.publishers(cell)?;
        let addresses = publishers.iter().map(PublisherProcess::addresses).collect::<Result<Vec<_>>>()?;
        let start = move |[events, replay]: [SocketAddr; 2]| Ok([Proxy::start(events, 1)?, Proxy::start(replay, 1)?]);
        // A proxy has a runtime of its own, which cannot be started on this one's threads.
        let start_all = move || addresses.into_iter().map(start).collect::<Result<Vec<_>>>();
        let proxies = tokio::task::spawn_blocking(start_all).await??;
        let engines: Vec<_> = (1..)
            .zip(&proxies)
            .map(|(number, [events, replay])| engine(number, events.endpoint(), replay.endpoint()))
            .collect();
        let bytes = || {
            let counts = proxies.iter().flatten().map(Proxy::counts);
            counts.fold([0, 0], |[down, up], counts| [down + counts.bytes_down, up + counts.bytes_up])
        };
        let router = self.followed(&engines).await?;
        let (started, [down, up]) = (Instant::now(), bytes());
        self.publish(cell, &mut publishers).await?;
        self.wait_applied(&router, cell).await?;
        let (took, [all_down, all_up]) = (started.elapsed(), bytes());
        router.stop().await?;
        Ok(Traffic { took, n_events: self.n_events(cell), n_down: all_down - down, n_up: all_up - up })
    }

    fn publishers(&self, cell: Cell) -> Result<Vec<PublisherProcess>> {
        let start = |seed| PublisherProcess::start(&self.harness, &self.args.publisher(seed, cell));
        (1..=cell.n_publishers).map(start).collect()
    }

    fn n_events(&self, cell: Cell) -> u64 {
        self.args.n_batches(cell) * self.args.events_per_batch as u64 * cell.n_publishers
    }

    /// A router that knows all there is of each engine, which is nothing yet.
    async fn followed(&self, engines: &[EngineAddress]) -> Result<Router> {
        let seed = ("WARMROUTE_MODELS_0_BLOCK_HASH_PYTHONHASHSEED".to_owned(), "0".to_owned());
        let options = RouterOptions { algorithm: ALGORITHM, env: vec![seed], ..RouterOptions::new(engines.to_vec()) };
        let router = Router::start(&self.router, self.dir.path(), &options).await?;
        wait("live sources", &router, |source| source["state"] == "live").await?;
        tokio::time::sleep(SETTLING).await;
        Ok(router)
    }

    async fn publish(&self, cell: Cell, publishers: &mut [PublisherProcess]) -> Result<()> {
        let n_batches = self.args.n_batches(cell);
        publishers.iter_mut().try_for_each(|publisher| publisher.publish_on(n_batches))?;
        tokio::time::sleep(self.args.duration()).await;
        publishers.iter().try_for_each(|publisher| publisher.wait_at(n_batches))
    }

    async fn wait_applied(&self, router: &Router, cell: Cell) -> Result<()> {
        let last_seq = self.args.n_batches(cell) - 1;
        wait("the last batches", router, |source| source["last_seq"] == last_seq && source["gaps"] == 0).await
    }
}

fn engines(publishers: &[PublisherProcess]) -> Vec<EngineAddress> {
    let engine = |(number, publisher): (u16, &PublisherProcess)| {
        engine(number, publisher.events().to_owned(), publisher.replay().to_owned())
    };
    (1..).zip(publishers).map(engine).collect()
}

/// Nobody asks the engine anything, so that nobody listens there.
fn engine(number: u16, events: String, replay: String) -> EngineAddress {
    EngineAddress { http: ([127, 0, 0, 1], number).into(), events, replay }
}

/// Asks the router until all its sources are as expected.
async fn wait(what: &str, router: &Router, is_met: impl Fn(&Value) -> bool) -> Result<()> {
    let started = Instant::now();
    loop {
        let answer = crate::http::client().get(format!("http://{}/sources", router.admin())).send().await;
        let sources: Value = serde_json::from_str(&answer.context("GET /sources")?.text().await?)?;
        let sources = sources.as_array().context("GET /sources: expected a list")?;
        if !sources.is_empty() && sources.iter().all(&is_met) {
            return Ok(());
        }
        ensure!(started.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}: {sources:?}");
        tokio::time::sleep(POLL).await;
    }
}
