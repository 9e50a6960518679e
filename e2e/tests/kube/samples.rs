//! The manifests of `envoy/` against a real API server: strictly read, validated, not kept.

use std::path::{Path, PathBuf};

use e2e::cache::Cache;
use e2e::kube::{Cluster, ClusterOptions};

fn envoy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../envoy")
}

async fn start() -> Cluster {
    let options = ClusterOptions { crds: true, ..ClusterOptions::default() };
    Cluster::start(&Cache::from_env().unwrap(), options).await.unwrap()
}

/// What kubectl says of the objects in `path`, a file or a kustomization, none of which may have a field too many.
async fn check(cluster: &Cluster, flag: &str, path: &Path) -> anyhow::Result<String> {
    let path = path.to_str().unwrap();
    cluster.kubectl(&["apply", "--dry-run=server", "--validate=strict", flag, path], None).await
}

#[tokio::test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
async fn samples_are_accepted() {
    let cluster = start().await;
    for (flag, path, expected) in [
        ("--filename", "vllm/quick-start.yaml", "deployment.apps/vllm-quick-start created"),
        ("--kustomize", "kind/vllm", "service/vllm-quick-start created"),
        ("--filename", "kind/gateway.yaml", "gateway.gateway.networking.k8s.io/eg created"),
        ("--filename", "chaos/engine-kill.yaml", "podchaos.chaos-mesh.org/engine-kill created"),
        ("--filename", "chaos/engine-restart.yaml", "podchaos.chaos-mesh.org/engine-restart created"),
        ("--filename", "chaos/router-kill.yaml", "podchaos.chaos-mesh.org/router-kill created"),
        ("--filename", "chaos/events-partition.yaml", "networkchaos.chaos-mesh.org/events-partition created"),
        ("--filename", "chaos/events-delay.yaml", "networkchaos.chaos-mesh.org/events-delay created"),
        ("--filename", "chaos/discovery-partition.yaml", "networkchaos.chaos-mesh.org/discovery-partition created"),
        ("--filename", "chaos/clock-skew.yaml", "timechaos.chaos-mesh.org/clock-skew created"),
    ] {
        let said = check(&cluster, flag, &envoy().join(path)).await.unwrap();
        assert!(said.contains(expected), "{path}: {said}");
    }
}

#[tokio::test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
async fn wrong_samples_would_be_refused() {
    let cluster = start().await;
    for (path, right, wrong, expected) in [
        ("vllm/quick-start.yaml", "preStop:", "beforeStop:", "unknown field"),
        ("chaos/engine-kill.yaml", "gracePeriod", "gracePeriods", "unknown field"),
        ("chaos/events-delay.yaml", "direction: both", "direction: sideways", "Unsupported value"),
        ("chaos/clock-skew.yaml", "timeOffset: -10m", "", "timeOffset: Required value"),
    ] {
        let text = std::fs::read_to_string(envoy().join(path)).unwrap();
        assert!(text.contains(right), "{path} holds {right}");
        let file = cluster.dir().join("wrong.yaml");
        std::fs::write(&file, text.replace(right, wrong)).unwrap();
        let said = check(&cluster, "--filename", &file).await.unwrap_err().to_string();
        assert!(said.contains(expected), "{path} with {wrong:?}: {said}");
    }
}
