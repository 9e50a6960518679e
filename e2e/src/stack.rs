//! Engines, router and Envoy together, for tests: one value that ends all of them.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::cache::Cache;
use crate::envoy::{Balancing, Envoy};
use crate::fetch;
use crate::router::{self, Router, RouterOptions};

const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// Polls without a new batch that count as silence: 300 ms, where an event takes a few.
const QUIET_POLLS: u32 = 15;
const INDEX_DEADLINE: Duration = Duration::from_secs(10);

/// A running Envoy with the router beside it. The engines are the caller's.
#[derive(Debug)]
pub struct Stack {
    /// The proxy; first, so that it ends before what it depends on.
    pub envoy: Envoy,
    /// The router; none after [`Stack::stop_router`].
    pub router: Option<Router>,
}

impl Stack {
    /// Starts both in front of the engines of `options`, with configurations and logs in `dir`.
    ///
    /// # Errors
    /// When one cannot be got, built or started.
    pub async fn start(dir: &Path, options: &RouterOptions) -> Result<Self> {
        Self::start_traced(dir, options, None).await
    }

    /// As [`Self::start`], and Envoy makes a trace of every request if there is a collector. The router is told of it
    /// in its options.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub async fn start_traced(dir: &Path, options: &RouterOptions, collector: Option<SocketAddr>) -> Result<Self> {
        let cache = Cache::from_env()?;
        let (envoy, binary) =
            tokio::task::spawn_blocking(move || Ok::<_, anyhow::Error>((fetch::envoy(&cache)?, router::binary()?)))
                .await
                .context("getting the programs panicked")??;
        let router = Router::start(&binary, dir, options).await?;
        let addresses: Vec<SocketAddr> = options.engines.iter().map(|engine| engine.http).collect();
        let balancing = Balancing::Warmroute(router.extproc(), options.gateway);
        let envoy = Envoy::start_traced(&envoy, dir, balancing, &addresses, collector).await?;
        Ok(Self { envoy, router: Some(router) })
    }

    /// The URL of `path` behind Envoy.
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.envoy.address())
    }

    /// Kills the router; Envoy goes on.
    ///
    /// # Errors
    /// When it cannot be signalled.
    pub async fn kill_router(&mut self) -> Result<()> {
        self.router.take().context("the router was stopped")?.kill().await
    }

    /// Ends the router; Envoy goes on.
    pub fn stop_router(&mut self) {
        self.router.take();
    }

    /// Waits until the router credits `engine` with `n_blocks` blocks or more.
    ///
    /// # Errors
    /// When that takes longer than 10 s.
    pub async fn wait_indexed(&self, engine: SocketAddr, n_blocks: u64) -> Result<()> {
        wait_indexed(self.router.as_ref().context("the router was stopped")?, engine, n_blocks).await
    }
}

impl Stack {
    /// Waits until no more events arrive: engines send them before the first token of an answer, so a short silence
    /// after an answer means that there are none under way.
    ///
    /// # Errors
    /// When that takes longer than 10 s.
    pub async fn wait_quiet(&self) -> Result<()> {
        let router = self.router.as_ref().context("the router was stopped")?;
        let deadline = Instant::now() + INDEX_DEADLINE;
        let (mut n_batches, mut n_same) = (0.0, 0);
        while n_same < QUIET_POLLS {
            ensure!(Instant::now() < deadline, "events went on for {INDEX_DEADLINE:?}");
            tokio::time::sleep(POLL_INTERVAL).await;
            let seen = sum(&router.metrics().await?, "warmroute_event_batches_total{");
            n_same = if seen == n_batches { n_same + 1 } else { 0 };
            n_batches = seen;
        }
        Ok(())
    }

    /// Waits until the router follows the events of `engine`.
    ///
    /// # Errors
    /// When that takes longer than 10 s.
    pub async fn wait_following(&self, engine: SocketAddr) -> Result<()> {
        let router = self.router.as_ref().context("the router was stopped")?;
        let deadline = Instant::now() + INDEX_DEADLINE;
        loop {
            let metrics = router.metrics().await?;
            let endpoint = format!("endpoint=\"{engine}\"");
            let mut states = metrics.lines().filter(|line| line.starts_with("warmroute_source_state{"));
            let state = states.find(|line| line.contains(&endpoint)).unwrap_or_default();
            if ["live", "incomplete"].iter().any(|name| state.contains(&format!("state=\"{name}\""))) {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "the router shows {state:?}, expected it to be followed");
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    /// Sum of all series of a metric of the router, 0 when it has none.
    ///
    /// # Errors
    /// When the router does not answer.
    pub async fn metric(&self, name: &str) -> Result<f64> {
        let router = self.router.as_ref().context("the router was stopped")?;
        Ok(sum(&router.metrics().await?, name))
    }

    /// Tokens that the router has matched so far, over all requests.
    ///
    /// # Errors
    /// When the router does not answer.
    pub async fn matched_tokens(&self) -> Result<u64> {
        let router = self.router.as_ref().context("the router was stopped")?;
        Ok(sum(&router.metrics().await?, "warmroute_matched_tokens_total{") as u64)
    }
}

/// Waits until `router` credits `engine` with `n_blocks` blocks or more.
///
/// # Errors
/// When that takes longer than 10 s.
pub async fn wait_indexed(router: &Router, engine: SocketAddr, n_blocks: u64) -> Result<()> {
    let deadline = Instant::now() + INDEX_DEADLINE;
    loop {
        let metrics = router.metrics().await?;
        let indexed = gauge(&metrics, "warmroute_index_blocks", engine);
        let proved = gauge(&metrics, "warmroute_index_source_proved", engine);
        if indexed >= Some(n_blocks) && proved == Some(1) {
            return Ok(());
        }
        let found = format!("{indexed:?} blocks of {engine}, proved: {proved:?}");
        ensure!(Instant::now() < deadline, "the router holds {found}, expected {n_blocks}");
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// Sum of the samples that begin with `prefix`.
fn sum(metrics: &str, prefix: &str) -> f64 {
    let samples = metrics.lines().filter(|line| line.starts_with(prefix));
    samples.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

/// The value of a metric's sample for one endpoint.
fn gauge(metrics: &str, name: &str, endpoint: SocketAddr) -> Option<u64> {
    let label = format!("endpoint=\"{endpoint}\"");
    let mut samples = metrics.lines().filter(|line| line.starts_with(name) && line.contains(&label));
    samples.next()?.rsplit(' ').next()?.parse().ok()
}
