//! The programs, each built once into the cache from its module below `e2e/tools/`.
//!
//! A module's `go.mod` pins the program and all that it is made of, its `go.sum` holds their checksums, and both are
//! part of the cached item's name. The modules agree on the versions that they share, so that a package is compiled
//! once for all of them (`e2e/tools/README.md`).

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::cache::{Cache, item_name};
use crate::tool::run;

use super::go::Go;

/// Helm, which installs the chart.
///
/// # Errors
/// When it can't be built.
pub fn helm(cache: &Cache) -> Result<PathBuf> {
    HELM.get(cache)
}

/// The Kubernetes API server.
///
/// # Errors
/// When it can't be built.
pub fn kube_apiserver(cache: &Cache) -> Result<PathBuf> {
    KUBE_APISERVER.get(cache)
}

/// The store below the API server.
///
/// # Errors
/// When it can't be built.
pub fn etcd(cache: &Cache) -> Result<PathBuf> {
    ETCD.get(cache)
}

/// Kubernetes' command line.
///
/// # Errors
/// When it can't be built.
pub fn kubectl(cache: &Cache) -> Result<PathBuf> {
    KUBECTL.get(cache)
}

/// Envoy Gateway's control plane.
///
/// # Errors
/// When it can't be built.
pub fn envoy_gateway(cache: &Cache) -> Result<PathBuf> {
    ENVOY_GATEWAY.get(cache)
}

/// Envoy Gateway's command line.
///
/// # Errors
/// When it can't be built.
pub fn egctl(cache: &Cache) -> Result<PathBuf> {
    EGCTL.get(cache)
}

/// The OpenTelemetry Collector, which takes spans over OTLP and writes them to a file.
///
/// # Errors
/// When it can't be built.
pub fn otelcol(cache: &Cache) -> Result<PathBuf> {
    OTELCOL.get(cache)
}

/// A program that is there.
#[derive(Debug, Clone)]
pub struct Built {
    /// Its name.
    pub name: &'static str,
    /// The version of the module that it comes from.
    pub version: String,
    /// Where it is.
    pub path: PathBuf,
    /// How long it took to build, or to find.
    pub took: Duration,
}

/// Builds what is missing of all programs, in the order in which `report` is told of them.
///
/// # Errors
/// When one can't be built.
pub fn build_all(cache: &Cache, mut report: impl FnMut(&Built)) -> Result<()> {
    for program in [HELM, ETCD, KUBECTL, KUBE_APISERVER, EGCTL, ENVOY_GATEWAY, OTELCOL] {
        let start = Instant::now();
        let (path, version) = (program.get(cache)?, program.version()?.to_owned());
        report(&Built { name: program.name, version, path, took: start.elapsed() });
    }
    Ok(())
}

/// One `main` package of a module that is required by one of ours, or our own.
#[derive(Clone, Copy)]
struct Program {
    name: &'static str,
    package: &'static str,
    /// `main.go` of our own module, where that is the package: which parts the program is put together from.
    source: Option<&'static str>,
    /// The module of the package, whose version is the program's.
    module: &'static str,
    go_mod: &'static str,
    go_sum: &'static str,
    /// Variables that the linker sets to the version, with how: programs tell it, and API clients act upon it.
    stamps: &'static [(&'static str, Stamp)],
}

/// A part of `v1.36.3`.
#[derive(Clone, Copy)]
enum Stamp {
    Whole,
    Major,
    Minor,
}

const KUBERNETES_STAMPS: &[(&str, Stamp)] = &[
    ("k8s.io/component-base/version.gitVersion", Stamp::Whole),
    ("k8s.io/component-base/version.gitMajor", Stamp::Major),
    ("k8s.io/component-base/version.gitMinor", Stamp::Minor),
];
const ENVOY_GATEWAY_STAMPS: &[(&str, Stamp)] =
    &[("github.com/envoyproxy/gateway/internal/cmd/version.envoyGatewayVersion", Stamp::Whole)];

const HELM: Program = Program {
    name: "helm",
    package: "helm.sh/helm/v4/cmd/helm",
    source: None,
    module: "helm.sh/helm/v4",
    go_mod: include_str!("../../tools/helm/go.mod"),
    go_sum: include_str!("../../tools/helm/go.sum"),
    stamps: &[("helm.sh/helm/v4/internal/version.version", Stamp::Whole)],
};
const ETCD: Program = Program {
    name: "etcd",
    package: "go.etcd.io/etcd/server/v3",
    source: None,
    module: "go.etcd.io/etcd/server/v3",
    go_mod: include_str!("../../tools/etcd/go.mod"),
    go_sum: include_str!("../../tools/etcd/go.sum"),
    stamps: &[],
};
const KUBE_APISERVER: Program = Program {
    name: "kube-apiserver",
    package: "k8s.io/kubernetes/cmd/kube-apiserver",
    source: None,
    module: "k8s.io/kubernetes",
    go_mod: include_str!("../../tools/kube-apiserver/go.mod"),
    go_sum: include_str!("../../tools/kube-apiserver/go.sum"),
    stamps: KUBERNETES_STAMPS,
};
const KUBECTL: Program = Program { name: "kubectl", package: "k8s.io/kubernetes/cmd/kubectl", ..KUBE_APISERVER };
const ENVOY_GATEWAY: Program = Program {
    name: "envoy-gateway",
    package: "github.com/envoyproxy/gateway/cmd/envoy-gateway",
    source: None,
    module: "github.com/envoyproxy/gateway",
    go_mod: include_str!("../../tools/envoy-gateway/go.mod"),
    go_sum: include_str!("../../tools/envoy-gateway/go.sum"),
    stamps: ENVOY_GATEWAY_STAMPS,
};
const EGCTL: Program = Program { name: "egctl", package: "github.com/envoyproxy/gateway/cmd/egctl", ..ENVOY_GATEWAY };
const OTELCOL: Program = Program {
    name: "otelcol",
    package: ".",
    source: Some(include_str!("../../tools/otelcol/main.go")),
    module: "go.opentelemetry.io/collector/otelcol",
    go_mod: include_str!("../../tools/otelcol/go.mod"),
    go_sum: include_str!("../../tools/otelcol/go.sum"),
    stamps: &[],
};

impl Program {
    fn get(&self, cache: &Cache) -> Result<PathBuf> {
        let made_of: Vec<_> = [self.go_mod, self.go_sum].into_iter().chain(self.source).collect();
        let item = item_name(&format!("{}-{}", self.name, self.version()?), &made_of);
        let dir = cache.get(&item, |dir| self.build(&Go::get(cache)?, dir))?;
        Ok(dir.join(self.name))
    }

    /// Builds in `dir`, which keeps the module's files beside the program: they say what it is made of.
    fn build(&self, go: &Go, dir: &Path) -> Result<()> {
        write_module(dir, self.go_mod, self.go_sum)?;
        if let Some(source) = self.source {
            fs::write(dir.join("main.go"), source).with_context(|| format!("cannot write into {}", dir.display()))?;
        }
        let mut command = go.command(dir);
        // Nobody debugs these programs, and without debug information they compile faster and take a third of the space.
        command.args(["build", "-gcflags=all=-dwarf=false"]).arg(format!("-ldflags=-s -w {}", self.linker_flags()?));
        run(command.args(["-o", self.name, self.package])).map(drop)
    }

    fn linker_flags(&self) -> Result<String> {
        let version = self.version()?;
        let mut parts = version.trim_start_matches('v').split('.');
        let (major, minor) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        let flag = |(variable, stamp): &(&str, Stamp)| {
            let value = match stamp {
                Stamp::Whole => version,
                Stamp::Major => major,
                Stamp::Minor => minor,
            };
            format!("-X {variable}={value}")
        };
        Ok(self.stamps.iter().map(flag).collect::<Vec<_>>().join(" "))
    }

    fn version(&self) -> Result<&'static str> {
        required_version(self.go_mod, self.module)
    }
}

/// Writes the two files of a module into `dir`.
pub(super) fn write_module(dir: &Path, go_mod: &str, go_sum: &str) -> Result<()> {
    for (name, contents) in [("go.mod", go_mod), ("go.sum", go_sum)] {
        fs::write(dir.join(name), contents).with_context(|| format!("cannot write {name} into {}", dir.display()))?;
    }
    Ok(())
}

/// The version of `module` that `go_mod` requires.
fn required_version<'a>(go_mod: &'a str, module: &str) -> Result<&'a str> {
    for line in go_mod.lines() {
        let mut words = line.trim().trim_start_matches("require ").split_whitespace();
        if let (Some(name), Some(version)) = (words.next(), words.next())
            && name == module
            && version.starts_with('v')
        {
            return Ok(version);
        }
    }
    bail!("go.mod requires no {module}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_program_is_pinned_by_its_module() {
        for program in [HELM, ETCD, KUBECTL, KUBE_APISERVER, EGCTL, ENVOY_GATEWAY, OTELCOL] {
            let version = program.version().unwrap();
            let sum = format!("{} {version} h1:", program.module);
            assert!(program.go_sum.contains(&sum), "go.sum of {} has no {sum}", program.name);
            if program.source.is_some() {
                continue;
            }
            let is_tool = program.go_mod.lines().any(|line| line.trim_start_matches("tool").trim() == program.package);
            assert!(is_tool, "go.mod of {} has no tool {}", program.name, program.package);
        }
    }

    #[test]
    fn stamps_are_the_parts_of_the_version() {
        let program =
            Program { go_mod: "require k8s.io/kubernetes v1.36.3 // indirect", stamps: KUBERNETES_STAMPS, ..KUBECTL };
        let flags = program.linker_flags().unwrap();
        assert!(flags.contains("gitVersion=v1.36.3") && flags.ends_with("gitMinor=36"), "{flags}");
    }

    #[test]
    fn replaced_modules_are_not_taken_for_required_ones() {
        let error = required_version("replace k8s.io/api => k8s.io/api v0.36.3", "k8s.io/api").unwrap_err();
        assert_eq!(error.to_string(), "go.mod requires no k8s.io/api");
    }
}
