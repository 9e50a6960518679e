//! Reads the `/metrics` of a pool's endpoints from time to time: the backstop for what their events do not tell.
//!
//! An endpoint that does not answer says nothing: whether it is gone is for its event connection to find out.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use super::exposition::{Backstop, Change, Exposition};
use super::rounds::{visit_all, with_jitter};
use super::{Finding, OnFinding};
use crate::engine::EngineClient;
use crate::routing::endpoint::{Endpoint, EndpointSet};

/// A bound for one scrape, above the pauses of a busy API server.
const TIMEOUT: Duration = Duration::from_secs(5);
/// vLLM's exposition has some 100 KiB, with many ranks and adapters some MiB.
const MOST_BYTES: usize = 8 << 20;

/// The background task of one pool.
pub struct Scrape {
    /// The pool's endpoints.
    pub endpoints: watch::Receiver<Arc<EndpointSet>>,
    /// Asks them.
    pub client: EngineClient,
    /// Pause between two scrapes of an endpoint.
    pub interval: Duration,
    /// Takes [`Finding::Cleared`] and [`Finding::Restarted`].
    pub on_finding: OnFinding,
}

impl Scrape {
    /// Scrapes until `shutdown`.
    ///
    /// # Errors
    /// None.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), Infallible> {
        let Self { endpoints, client, interval, on_finding } = self;
        visit_all(endpoints, shutdown, |endpoint| visit(endpoint, client.clone(), interval, on_finding.clone())).await;
        Ok(())
    }
}

async fn visit(endpoint: Arc<Endpoint>, client: EngineClient, interval: Duration, on_finding: OnFinding) {
    let mut backstop = Backstop::default();
    loop {
        let scrape = client.get(endpoint.address, "/metrics", MOST_BYTES);
        match tokio::time::timeout(TIMEOUT, scrape).await {
            Ok(Ok(body)) => {
                for change in backstop.observe(Exposition::parse(&String::from_utf8_lossy(&body))) {
                    info!(endpoint = %endpoint.address, ?change, "KV event missing: endpoint's metrics tell of a lost cache");
                    on_finding(&endpoint, finding(change));
                }
            }
            Ok(Err(error)) => debug!(endpoint = %endpoint.address, %error, "endpoint's metrics cannot be read"),
            Err(_) => debug!(endpoint = %endpoint.address, "endpoint's metrics took longer than {TIMEOUT:?}"),
        }
        tokio::time::sleep(with_jitter(interval)).await;
    }
}

fn finding(change: Change) -> Finding {
    match change {
        Change::Cleared => Finding::Cleared,
        Change::Restarted => Finding::Restarted,
    }
}
