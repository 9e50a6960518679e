//! Envoy Gateway, which makes Envoy's configuration out of the chart's resources.
//!
//! - [`Standalone`] reads resources from a file and runs Envoy itself: for requests.
//! - [`InCluster`] reads them from an API server and writes their conditions: for what users see. No kubelet runs the
//!   Envoy it asks for, so the harness does, with the arguments of that Deployment.
//!
//! Several ports of Envoy Gateway are fixed (18000 serves xDS, 8081 its health), so one of either kind runs at a time:
//! a second waits, across processes.

mod in_cluster;
mod standalone;

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::cache::Cache;

pub use in_cluster::{GatewayEnvoy, InCluster};
pub use standalone::Standalone;

/// The name by which a GatewayClass asks for Envoy Gateway.
pub const CONTROLLER: &str = "gateway.envoyproxy.io/gatewayclass-controller";

/// What Envoy Gateway answers on when it has read its resources.
const READY: &str = "http://127.0.0.1:8081/readyz";
const START_DEADLINE: Duration = Duration::from_secs(60);
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// The objects of `rendered` that Envoy Gateway reads: those of Gateway API and of its own.
///
/// # Errors
/// When this is no YAML.
pub fn gateway_objects(rendered: &str) -> Result<Vec<Value>> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(rendered).context("the rendered chart is not YAML")?;
    let is_read = |object: &Value| {
        let group = object["apiVersion"].as_str().and_then(|version| version.split_once('/')).map(|(group, _)| group);
        matches!(group, Some("gateway.networking.k8s.io" | "gateway.envoyproxy.io"))
    };
    Ok(documents.into_iter().filter(is_read).collect())
}

/// The right to the fixed ports, until it is dropped.
#[derive(Debug)]
struct Ports {
    _lock: File,
}

impl Ports {
    async fn take(cache: &Cache) -> Result<Self> {
        let path = cache.root().join("envoy-gateway-ports.lock");
        let take = move || {
            let lock = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
            lock.lock().with_context(|| format!("cannot lock {}", path.display()))?;
            Ok(Self { _lock: lock })
        };
        tokio::task::spawn_blocking(take).await.context("waiting for the ports panicked")?
    }
}

/// Writes Envoy Gateway's own configuration into `file`, with everything allowed that the chart may use.
fn write_config(file: &Path, provider: &Value) -> Result<()> {
    let config = json!({
        "apiVersion": "gateway.envoyproxy.io/v1alpha1",
        "kind": "EnvoyGateway",
        "gateway": {"controllerName": CONTROLLER},
        "provider": provider,
        "logging": {"level": {"default": "info"}},
        "extensionApis": {"enableBackend": true, "enableEnvoyPatchPolicy": true},
        // Both would be on ports that Envoy itself takes.
        "admin": {"address": {"host": "127.0.0.1", "port": 18003}},
        "telemetry": {"metrics": {"prometheus": {"disable": true}}},
    });
    // JSON is YAML.
    std::fs::write(file, serde_json::to_vec_pretty(&config)?)
        .with_context(|| format!("cannot write {}", file.display()))
}

/// Polls until `found` finds something.
async fn wait_for<T>(what: &str, limit: Duration, mut found: impl AsyncFnMut() -> Option<T>) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(found) = found().await {
            return Ok(found);
        }
        ensure!(Instant::now() < deadline, "{what} was not there after {limit:?}");
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// Envoy's configuration as it is in force (`/config_dump` of its admin interface).
async fn config_dump(admin: &str) -> Result<Value> {
    let answer = crate::http::client().get(format!("http://{admin}/config_dump?include_eds")).send().await?;
    answer.error_for_status()?.json().await.context("Envoy's config_dump is not JSON")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_gateway_reads_is_kept() {
        let rendered = "---\napiVersion: apps/v1\nkind: Deployment\n---\n# Source: x\napiVersion: v1\nkind: Service\n---\n\
                        apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\n---\n\
                        apiVersion: gateway.envoyproxy.io/v1alpha1\nkind: Backend\n";
        let kinds: Vec<Value> =
            gateway_objects(rendered).unwrap().into_iter().map(|object| object["kind"].clone()).collect();
        assert_eq!(kinds, ["HTTPRoute", "Backend"]);
    }
}
