//! Definitions of the resources that the chart and Envoy Gateway use, out of the modules that carry them.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::{Deserializer, Value};

use crate::cache::{Cache, item_name};
use crate::tool::run;

use super::go::Go;
use super::tools::write_module;

const GO_MOD: &str = include_str!("../../tools/crds/go.mod");
const GO_SUM: &str = include_str!("../../tools/crds/go.sum");

/// Modules, and the files or directories of files in them.
const SOURCES: [(&str, &[&str]); 4] = [
    // What `helm install` of Envoy Gateway brings: its own, and Gateway API's.
    ("github.com/envoyproxy/gateway", &["charts/gateway-helm/charts/crds/crds"]),
    (
        "github.com/prometheus-operator/prometheus-operator",
        &[
            "example/prometheus-operator-crd/monitoring.coreos.com_podmonitors.yaml",
            "example/prometheus-operator-crd/monitoring.coreos.com_prometheusrules.yaml",
            "example/prometheus-operator-crd/monitoring.coreos.com_servicemonitors.yaml",
        ],
    ),
    // For `envoy/chaos`.
    (
        "github.com/chaos-mesh/chaos-mesh",
        &[
            "config/crd/bases/chaos-mesh.org_networkchaos.yaml",
            "config/crd/bases/chaos-mesh.org_podchaos.yaml",
            "config/crd/bases/chaos-mesh.org_timechaos.yaml",
        ],
    ),
    (
        "sigs.k8s.io/gateway-api-inference-extension",
        &["config/crd/bases/inference.networking.k8s.io_inferencepools.yaml"],
    ),
];

/// Files with the definitions of Gateway API, Envoy Gateway, InferencePool, Prometheus' operator and Chaos Mesh, in a fixed
/// order.
///
/// # Errors
/// When a module can't be fetched or lacks what is expected in it.
pub fn crds(cache: &Cache) -> Result<Vec<PathBuf>> {
    // The list of files is part of the contents.
    let item = item_name("crds", &[GO_MOD, GO_SUM, &format!("{SOURCES:?}")]);
    let dir = cache.get(&item, |dir| {
        write_module(dir, GO_MOD, GO_SUM)?;
        let go = Go::get(cache)?;
        for (module, paths) in SOURCES {
            let source = module_dir(&go, dir, module)?;
            for path in paths {
                copy_yaml(&source.join(path), dir)?;
            }
        }
        Ok(())
    })?;
    yaml_files(&dir)
}

/// Where Go has unpacked `module`, in the version that the `go.mod` in `dir` requires.
fn module_dir(go: &Go, dir: &Path, module: &str) -> Result<PathBuf> {
    let output = run(go.command(dir).args(["mod", "download", "-json", module]))?;
    let answer = Deserializer::from_str(&output).into_iter::<Value>().next();
    let answer = answer.context("go mod download told nothing")?.context("go mod download told no JSON")?;
    let found = answer["Dir"].as_str().with_context(|| format!("go mod download told no directory: {answer}"))?;
    Ok(found.into())
}

/// Copies a file, or the YAML files at any depth of a directory.
fn copy_yaml(source: &Path, to: &Path) -> Result<()> {
    if source.is_dir() {
        for entry in fs::read_dir(source).with_context(|| format!("cannot read {}", source.display()))? {
            copy_yaml(&entry?.path(), to)?;
        }
        return Ok(());
    }
    ensure!(is_yaml(source), "{} is no YAML file", source.display());
    let to = to.join(source.file_name().context("a file has a name")?);
    ensure!(!to.exists(), "two definitions are called {}", to.display());
    // Not fs::copy, which would make the copy as read-only as the module is.
    let contents = fs::read(source).with_context(|| format!("cannot read {}", source.display()))?;
    fs::write(&to, contents).with_context(|| format!("cannot write {}", to.display()))
}

fn yaml_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))?;
    let mut files: Vec<PathBuf> = entries.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    files.retain(|file| is_yaml(file));
    files.sort();
    Ok(files)
}

fn is_yaml(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "yaml")
}
