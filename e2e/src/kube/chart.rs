//! The chart, by way of the real Helm.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::cache::Cache;
use crate::tool::run_with_input;

use super::{Cluster, tools};

/// What Helm prints for a release `name` of the chart in the namespace `namespace`: all objects, one document each.
///
/// # Errors
/// When Helm can't be built, or refuses the values.
pub fn render(cache: &Cache, name: &str, namespace: &str, values: &Value) -> Result<String> {
    let mut command = Command::new(tools::helm(cache)?);
    command.arg("template").arg(name).arg(directory()).args(["--namespace", namespace, "--values", "-"]);
    run_with_input(&mut command, &values.to_string())
}

/// Installs a release `name` of the chart into `namespace`, which is created if need be, without waiting for pods,
/// which nobody would start.
///
/// # Errors
/// When Helm can't be built, or refuses the values, or the API server one of the objects.
pub async fn install(cache: &Cache, cluster: &Cluster, name: &str, namespace: &str, values: &Value) -> Result<()> {
    let (cache, values) = (cache.clone(), values.to_string());
    let (home, kubeconfig) = (cluster.dir().to_owned(), cluster.kubeconfig().to_owned());
    let (name, namespace) = (name.to_owned(), namespace.to_owned());
    let install = move || {
        let mut command = Command::new(tools::helm(&cache)?);
        command.arg("install").arg(name).arg(directory()).arg("--kubeconfig").arg(kubeconfig);
        command.args(["--create-namespace", "--values", "-", "--namespace"]).arg(namespace);
        // Its caches would be the owner's, and outlive the cluster.
        command.env("HOME", home).env_remove("KUBECONFIG").env_remove("XDG_CACHE_HOME").env_remove("HELM_CACHE_HOME");
        run_with_input(&mut command, &values).map(drop)
    };
    tokio::task::spawn_blocking(install).await.context("running Helm panicked")?
}

/// Where the chart is.
pub fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts/warmroute")
}
