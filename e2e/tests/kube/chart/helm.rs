//! Helm, the chart's sets of values, and rendered objects.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use e2e::cache::Cache;
use e2e::kube::tools;
use e2e::tool::run;
use serde_json::Value;

/// Release and namespace of everything that is only rendered.
pub(super) const RELEASE: &str = "r";
pub(super) const NAMESPACE: &str = "llm";
/// Name of the objects of such a release.
pub(super) const FULLNAME: &str = "r-warmroute";

/// The repository.
pub(super) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap()
}

pub(super) fn chart() -> PathBuf {
    root().join("charts/warmroute")
}

/// The sets of values, by name.
pub(super) fn sets() -> Vec<(String, PathBuf)> {
    let files = fs::read_dir(chart().join("ci")).unwrap().map(|entry| entry.unwrap().path());
    let mut sets: Vec<(String, PathBuf)> = files.map(|path| (name_of(&path), path)).collect();
    sets.sort();
    assert!(sets.len() >= 8, "the sets of values are gone: {sets:?}");
    sets
}

fn name_of(path: &Path) -> String {
    let name = path.file_name().unwrap().to_str().unwrap();
    name.strip_suffix("-values.yaml").unwrap_or_else(|| panic!("{name} is no set of values")).to_owned()
}

/// The file of one set.
pub(super) fn set(name: &str) -> PathBuf {
    let path = chart().join(format!("ci/{name}-values.yaml"));
    assert!(path.is_file(), "no set {name}");
    path
}

/// Helm's program, away from its owner's settings and repositories.
pub(super) struct Helm {
    program: PathBuf,
    home: tempfile::TempDir,
}

impl Helm {
    /// Built first if need be.
    pub(super) fn get() -> Self {
        let program = tools::helm(&Cache::from_env().unwrap()).unwrap();
        Self { program, home: tempfile::tempdir().unwrap() }
    }

    pub(super) fn program(&self) -> &Path {
        &self.program
    }

    pub(super) fn run(&self, args: &[&str]) -> Result<String> {
        self.run_in(None, args)
    }

    /// As [`Self::run`], with a cluster.
    pub(super) fn run_in(&self, kubeconfig: Option<&Path>, args: &[&str]) -> Result<String> {
        let mut command = Command::new(&self.program);
        command.args(args).env("HOME", self.home.path()).env_remove("KUBECONFIG").current_dir(root());
        for name in ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME", "XDG_CACHE_HOME"] {
            command.env_remove(name);
        }
        if let Some(path) = kubeconfig {
            command.env("KUBECONFIG", path);
        }
        run(&mut command)
    }

    /// The objects of a release with the values of `file` and `settings` (`--set`, or `--set-json` after `json:`).
    pub(super) fn template(&self, file: &Path, settings: &[&str]) -> Result<Vec<Value>> {
        self.template_of(&chart(), file, settings)
    }

    /// As [`Self::template`], of another chart.
    pub(super) fn template_of(&self, chart: &Path, file: &Path, settings: &[&str]) -> Result<Vec<Value>> {
        let (chart, file) = (chart.to_str().context("a path")?, file.to_str().context("a path")?);
        let mut args = vec!["template", RELEASE, chart, "--namespace", NAMESPACE, "--values", file];
        for setting in settings {
            args.extend(setting.strip_prefix("json:").map_or(["--set", setting], |json| ["--set-json", json]));
        }
        documents(&self.run(&args)?)
    }
}

/// The documents of a YAML stream that are not empty. A key that is there twice is an error.
pub(super) fn documents(yaml: &str) -> Result<Vec<Value>> {
    let parts = yaml.split("\n---").map(|part| part.strip_prefix("---").unwrap_or(part));
    let parsed = parts.map(|part| serde_saphyr::from_str::<Value>(part).with_context(|| format!("not YAML: {part}")));
    Ok(parsed.collect::<Result<Vec<_>>>()?.into_iter().filter(|document| !document.is_null()).collect())
}

/// The objects of a kind.
pub(super) fn of_kind<'a>(objects: &'a [Value], kind: &'a str) -> impl Iterator<Item = &'a Value> {
    objects.iter().filter(move |object| object["kind"] == kind)
}

/// The one object of a kind with a name.
pub(super) fn object<'a>(objects: &'a [Value], kind: &'a str, name: &str) -> &'a Value {
    let mut found = of_kind(objects, kind).filter(|object| object["metadata"]["name"] == name);
    let object = found.next().unwrap_or_else(|| panic!("no {kind} {name} in {:?}", names(objects)));
    assert!(found.next().is_none(), "{kind} {name} is there twice");
    object
}

/// Kind, namespace and name of each object.
pub(super) fn names(objects: &[Value]) -> Vec<String> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let name = |object: &Value| {
        let metadata = &object["metadata"];
        format!("{} {}/{}", text(&object["kind"]), text(&metadata["namespace"]), text(&metadata["name"]))
    };
    objects.iter().map(name).collect()
}

/// warmroute's configuration as a release has it.
pub(super) fn configuration(objects: &[Value], name: &str) -> String {
    object(objects, "ConfigMap", name)["data"]["config.yaml"].as_str().expect("the ConfigMap has the file").to_owned()
}
