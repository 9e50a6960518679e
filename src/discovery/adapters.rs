//! Asks the endpoints of a pool which LoRA adapters they have loaded, and asks again.
//!
//! `GET /v1/models` (vLLM 0.32.0, `entrypoints/openai/models/serving.py`) lists the base model and each adapter; an
//! adapter's card names its base model as `parent`. Adapters are loaded and unloaded while an engine runs, by
//! `/v1/load_lora_adapter`, without anybody else being told. What an endpoint listed last counts while it does not
//! answer: whether it can be reached is for others to find out.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::rounds::{pause, visit_all};
use crate::engine::{self, EngineClient};
use crate::routing::endpoint::{Endpoint, EndpointSet};

/// What [`ListAdapters::interval`] is but in tests: how long an adapter that was loaded may be asked for in vain.
pub const INTERVAL: Duration = Duration::from_secs(5);
/// A bound for one question, above the pauses of a busy API server.
const TIMEOUT: Duration = Duration::from_secs(5);
/// A card has some 500 bytes.
const MOST_BYTES: usize = 1 << 20;

/// The background task of one pool.
pub struct ListAdapters {
    /// The pool's endpoints; what they list is noted in them.
    pub endpoints: watch::Receiver<Arc<EndpointSet>>,
    /// Asks them.
    pub client: EngineClient,
    /// Pause between two questions to an endpoint that answers, and the longest one after failures.
    pub interval: Duration,
}

#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("no answer within {TIMEOUT:?}")]
    Timeout,
    #[error(transparent)]
    Engine(#[from] engine::Error),
    #[error("the answer is not a list of models")]
    Nonsense(#[source] serde_json::Error),
}

impl ListAdapters {
    /// Asks until `shutdown`.
    ///
    /// # Errors
    /// None.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), Infallible> {
        let Self { endpoints, client, interval } = self;
        visit_all(endpoints, shutdown, |endpoint| visit(endpoint, client.clone(), interval)).await;
        Ok(())
    }
}

async fn visit(endpoint: Arc<Endpoint>, client: EngineClient, interval: Duration) {
    let mut last = None;
    let mut has_warned = false;
    let mut n_failures = 0;
    loop {
        n_failures = match ask(&endpoint, &client).await {
            Ok(adapters) => {
                take(&endpoint, &mut last, adapters);
                0
            }
            Err(failure) => {
                log(&endpoint, &failure, &mut has_warned);
                n_failures + 1
            }
        };
        tokio::time::sleep(pause(n_failures, interval)).await;
    }
}

/// An endpoint that is away is reported by those who need it. One that will never say it is reported once: without a
/// key for `--api-key`, say, any of them is taken to have any adapter.
fn log(endpoint: &Endpoint, failure: &Failure, has_warned: &mut bool) {
    let endpoint = endpoint.address;
    let is_final = matches!(failure, Failure::Engine(engine::Error::Status(401 | 403 | 404)) | Failure::Nonsense(_));
    if is_final && !*has_warned {
        *has_warned = true;
        warn!(%endpoint, error = %failure, "endpoint does not list its adapters at /v1/models (is models[].engine.api_key_file needed?)");
    } else {
        debug!(%endpoint, error = %failure, "endpoint does not list its adapters");
    }
}

async fn ask(endpoint: &Endpoint, client: &EngineClient) -> Result<BTreeSet<String>, Failure> {
    let question = client.get(endpoint.address, "/v1/models", MOST_BYTES);
    let body = tokio::time::timeout(TIMEOUT, question).await.map_err(|_| Failure::Timeout)??;
    adapters(&body).map_err(Failure::Nonsense)
}

fn take(endpoint: &Endpoint, last: &mut Option<BTreeSet<String>>, adapters: BTreeSet<String>) {
    if last.as_ref() == Some(&adapters) {
        return;
    }
    if last.is_some() || !adapters.is_empty() {
        info!(endpoint = %endpoint.address, n_adapters = adapters.len(), "endpoint has listed its adapters");
    }
    endpoint.adapters.set(adapters.clone());
    *last = Some(adapters);
}

#[derive(Deserialize)]
struct Models {
    data: Vec<Model>,
}

#[derive(Deserialize)]
struct Model {
    id: String,
    parent: Option<String>,
}

/// The adapters in an answer.
fn adapters(body: &[u8]) -> Result<BTreeSet<String>, serde_json::Error> {
    let Models { data } = serde_json::from_slice(body)?;
    Ok(data.into_iter().filter(|model| model.parent.is_some()).map(|model| model.id).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adapters_are_the_models_with_a_parent() {
        let listed = |body: &str| adapters(body.as_bytes()).ok().map(Vec::from_iter);
        let both = r#"{"object": "list", "data": [
            {"id": "tiny", "object": "model", "root": "/models/tiny", "parent": null, "max_model_len": 4096},
            {"id": "lora-a", "object": "model", "root": "/loras/a", "parent": "tiny"}
        ]}"#;
        assert_eq!(listed(both), Some(vec!["lora-a".to_owned()]));
        assert_eq!(listed(r#"{"data": [{"id": "tiny"}]}"#), Some(Vec::new()));
        assert_eq!(listed(r#"{"error": "no"}"#), None);
    }
}
