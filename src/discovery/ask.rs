//! Asks the endpoints of a pool where their ranks publish, and asks again.
//!
//! Engines older than 0.32 answer 404: what is configured for their endpoints stays, and they are asked again as the
//! others are, because they may be upgraded in place. So does it where nobody answers, or nonsense; then the next
//! question comes sooner, with exponential backoff and full jitter. An answer is handed over when it differs from the
//! last one. Time and size of an answer are bounded.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::event_sources::{Answer, Nonsense};
use super::rounds::{pause, visit_all};
use super::{Finding, OnFinding};
use crate::engine::{self, EngineClient};
use crate::routing::endpoint::{Endpoint, EndpointSet};

/// What [`Ask::interval`] is but in tests: how long a change of ranks or ports may go unnoticed.
pub const INTERVAL: Duration = Duration::from_secs(30);
/// A bound for one question, above the pauses of a busy API server.
const TIMEOUT: Duration = Duration::from_secs(5);
/// An answer for the most ranks that we take has some 60 KiB.
const MOST_BYTES: usize = 256 << 10;

/// The background task of one pool.
pub struct Ask {
    /// The pool's endpoints.
    pub endpoints: watch::Receiver<Arc<EndpointSet>>,
    /// Asks them.
    pub client: EngineClient,
    /// Pause between two questions to an endpoint that answers, and the longest one after failures.
    pub interval: Duration,
    /// Takes [`Finding::Sources`] and [`Finding::Refused`].
    pub on_finding: OnFinding,
}

#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("no answer within {TIMEOUT:?}")]
    Timeout,
    #[error(transparent)]
    Engine(#[from] engine::Error),
    #[error(transparent)]
    Nonsense(#[from] Nonsense),
}

impl Ask {
    /// Asks until `shutdown`.
    ///
    /// # Errors
    /// None.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), Infallible> {
        let Self { endpoints, client, interval, on_finding } = self;
        visit_all(endpoints, shutdown, |endpoint| {
            let (client, on_finding) = (client.clone(), on_finding.clone());
            Visit { endpoint, client, interval, on_finding, last: Answer::default() }.run()
        })
        .await;
        Ok(())
    }
}

/// What is known of one endpoint.
struct Visit {
    endpoint: Arc<Endpoint>,
    client: EngineClient,
    interval: Duration,
    on_finding: OnFinding,
    last: Answer,
}

impl Visit {
    async fn run(mut self) {
        let mut n_failures = 0;
        loop {
            n_failures = match self.ask().await {
                Ok(()) => 0,
                Err(failure) => {
                    self.log(&failure, n_failures);
                    n_failures + 1
                }
            };
            tokio::time::sleep(pause(n_failures, self.interval)).await;
        }
    }

    async fn ask(&mut self) -> Result<(), Failure> {
        let question = self.client.get(self.endpoint.address, "/kv_event_sources", MOST_BYTES);
        let body = match tokio::time::timeout(TIMEOUT, question).await.map_err(|_| Failure::Timeout)? {
            // Older than 0.32: what is configured stays.
            Err(engine::Error::Status(404)) => return Ok(()),
            answer => answer?,
        };
        self.take(Answer::parse(&body, self.endpoint.address.ip())?);
        Ok(())
    }

    fn take(&mut self, answer: Answer) {
        if answer == self.last {
            return;
        }
        if answer.refused != self.last.refused && !answer.refused.is_empty() {
            let (endpoint, refused) = (self.endpoint.address, &answer.refused);
            warn!(%endpoint, ?refused, "endpoint publishes KV events at addresses that are not its own");
            (self.on_finding)(&self.endpoint, Finding::Refused(answer.refused.len()));
        }
        // An engine that names no source that can be dialled may still publish where the configuration says.
        if answer.sources != self.last.sources && !answer.sources.is_empty() {
            info!(endpoint = %self.endpoint.address, ranks = answer.sources.len(), "endpoint has told where it publishes KV events");
            (self.on_finding)(&self.endpoint, Finding::Sources(answer.sources.clone()));
        }
        self.last = answer;
    }

    /// An endpoint that is away is reported by those who need it. One that answers nonsense is reported once.
    fn log(&self, failure: &Failure, n_failures: u32) {
        let endpoint = self.endpoint.address;
        match failure {
            Failure::Nonsense(_) | Failure::Engine(engine::Error::TooLarge(_)) if n_failures == 0 => {
                warn!(%endpoint, error = %failure, "endpoint does not say where it publishes KV events");
            }
            _ => debug!(%endpoint, error = %failure, "endpoint does not say where it publishes KV events"),
        }
    }
}
