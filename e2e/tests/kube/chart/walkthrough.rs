//! `docs/install.md`, line by line: each command is run here, or is listed with what it needs and is not here.

use std::fs;
use std::path::Path;
use std::process::Command;

use e2e::cache::Cache;
use e2e::kube::{Cluster, ClusterOptions, tools};
use e2e::tool::run;

use super::helm::{Helm, root};

/// Commands of the page that are not run, by how they begin, and why.
const NOT_RUN: [(&str, &str); 15] = [
    ("helm install eg ", "the chart of Envoy Gateway is in a registry; its version is compared"),
    ("kubectl wait --namespace envoy-gateway-system ", "no node runs Envoy Gateway"),
    (
        "kubectl wait --namespace default ",
        "no Envoy Gateway programs the Gateway here; the gateway tests have one that does",
    ),
    ("kubectl rollout status ", "no node runs the pods"),
    ("envoy/vllm/enable-kv-events.sh ", "its own tests run it"),
    ("docker build ", "no container engine; .ci/image-build runs what the Dockerfile does"),
    ("docker push ", "no registry"),
    ("helm test ", "no node runs the pod; `warmroute ready` has tests of its own"),
    ("service=", "the Service is Envoy Gateway's"),
    ("kubectl port-forward ", "no pods to forward to"),
    ("ask() ", "a request needs engines"),
    ("ask", "a request needs engines"),
    ("curl --silent http://127.0.0.1:9090/", "no router to ask"),
    ("kubectl create namespace llm", "run, but with the service account that controllers would give it"),
    ("helm uninstall ", "run at the end"),
];

/// The commands in the page's `sh` blocks; a here-document belongs to its command.
fn commands() -> Vec<String> {
    let page = fs::read_to_string(root().join("docs/install.md")).unwrap();
    let mut commands: Vec<String> = Vec::new();
    let mut in_block = false;
    let mut here = false;
    for line in page.lines() {
        match line {
            "```sh" => in_block = true,
            "```" => in_block = false,
            _ if !in_block => {}
            "YAML" => {
                here = false;
                commands.last_mut().unwrap().push_str("\nYAML\n");
            }
            _ if here => {
                let command = commands.last_mut().unwrap();
                command.push('\n');
                command.push_str(line);
            }
            _ => {
                here = line.ends_with("<<'YAML'");
                commands.push(line.to_owned());
            }
        }
    }
    assert!(commands.len() > 15, "the page's commands are gone: {commands:?}");
    commands
}

#[test]
fn versions_of_the_page_are_those_that_are_tested() {
    let page = fs::read_to_string(root().join("docs/install.md")).unwrap();
    let pins = fs::read_to_string(root().join("e2e/tools/envoy-gateway/go.mod")).unwrap();
    let pinned = pins
        .lines()
        .find_map(|line| line.trim().trim_start_matches("require ").strip_prefix("github.com/envoyproxy/gateway "));
    let version = pinned.expect("Envoy Gateway is pinned").split_whitespace().next().unwrap();
    assert!(page.contains(&format!("gateway-helm --version {version} ")), "the tests have Envoy Gateway {version}");
    let chart = fs::read_to_string(root().join("charts/warmroute/Chart.yaml")).unwrap();
    let app = chart.lines().find_map(|line| line.strip_prefix("appVersion: ")).unwrap().trim_matches('"');
    assert!(page.contains(&format!("$REGISTRY/warmroute:{app}")), "the chart installs {app}");
    assert_eq!(app, env!("CARGO_PKG_VERSION"), "the chart is of this version");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
async fn page_leads_where_it_says() {
    let helm = Helm::get();
    let cache = Cache::from_env().unwrap();
    let kubectl = tools::kubectl(&cache).unwrap();
    let cluster = Cluster::start(&cache, ClusterOptions { crds: true, ..ClusterOptions::default() }).await.unwrap();
    let mut used = vec![false; NOT_RUN.len()];
    let mut n_run = 0;
    for command in commands() {
        if command == "kubectl create namespace llm" {
            cluster.create_namespace("llm").await.unwrap();
        }
        if let Some(i) = NOT_RUN.iter().position(|(begin, _)| command.starts_with(begin)) {
            used[i] = true;
            continue;
        }
        shell(&command, &cluster, &[helm.program(), &kubectl]);
        n_run += 1;
    }
    assert!(n_run >= 6, "only {n_run} commands were run");
    for ((begin, why), used) in NOT_RUN.iter().zip(used) {
        assert!(used, "the page has no command {begin:?} any more, of which is said: {why}");
    }
    shell("helm uninstall warmroute --namespace llm", &cluster, &[helm.program(), &kubectl]);
}

/// Runs a command as the page's reader does: in the checkout, with these programs and a cluster.
fn shell(command: &str, cluster: &Cluster, programs: &[&Path]) {
    let dirs: Vec<&str> = programs.iter().map(|program| program.parent().unwrap().to_str().unwrap()).collect();
    let path = format!("{}:{}", dirs.join(":"), std::env::var("PATH").unwrap());
    let mut bash = Command::new("bash");
    bash.args(["-euo", "pipefail", "-c", command]).current_dir(root());
    bash.env("PATH", path).env("KUBECONFIG", cluster.kubeconfig()).env("HOME", cluster.dir());
    bash.env("REGISTRY", "registry.example.com");
    run(&mut bash).unwrap_or_else(|error| panic!("{command}\n{error:#}"));
}
