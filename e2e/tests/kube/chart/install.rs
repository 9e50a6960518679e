//! The chart on a real API server: dry run, install, upgrade, rollback.

use std::path::Path;

use e2e::cache::Cache;
use e2e::kube::{Cluster, ClusterOptions};
use reqwest::Method;
use serde_json::Value;

use super::helm::{Helm, sets};
use super::pods::selectors;

async fn cluster() -> Cluster {
    let options = ClusterOptions { crds: true, ..ClusterOptions::default() };
    let cluster = Cluster::start(&Cache::from_env().unwrap(), options).await.unwrap();
    // Those that the sets of values name.
    for namespace in ["engines", "gateways"] {
        cluster.create_namespace(namespace).await.unwrap();
    }
    cluster
}

/// Objects of a release, as the API server has them.
async fn objects(cluster: &Cluster, namespace: &str) -> Vec<Value> {
    let kinds =
        "deployments,services,networkpolicies,poddisruptionbudgets,configmaps,serviceaccounts,roles,rolebindings";
    let selector = "app.kubernetes.io/managed-by=Helm";
    let list = cluster.kubectl(&["get", kinds, "-n", namespace, "-l", selector, "-o", "json"], None).await.unwrap();
    let list: Value = serde_json::from_str(&list).unwrap();
    list["items"].as_array().unwrap().clone()
}

struct Release<'a> {
    helm: &'a Helm,
    cluster: &'a Cluster,
    namespace: &'a str,
}

impl Release<'_> {
    fn helm(&self, args: &[&str]) -> anyhow::Result<String> {
        let args: Vec<&str> = args.iter().copied().chain(["--namespace", self.namespace]).collect();
        self.helm.run_in(Some(self.cluster.kubeconfig()), &args)
    }

    fn change(&self, verb: &str, file: &Path, more: &[&str]) -> anyhow::Result<String> {
        let chart = super::helm::chart();
        let args = [verb, "r", chart.to_str().unwrap(), "--values", file.to_str().unwrap()];
        self.helm(&args.into_iter().chain(more.iter().copied()).collect::<Vec<_>>())
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
async fn api_server_takes_every_set_of_values_and_changes_of_it() {
    let (helm, cluster) = (Helm::get(), cluster().await);
    for (name, file) in sets() {
        let namespace = format!("of-{name}");
        create_restricted_namespace(&cluster, &namespace).await;
        let release = Release { helm: &helm, cluster: &cluster, namespace: &namespace };
        let explain = |error: anyhow::Error| panic!("{name}: {error:#}");
        release.change("install", &file, &["--dry-run=server"]).unwrap_or_else(explain);
        assert!(objects(&cluster, &namespace).await.is_empty(), "{name}: a dry run has left something");

        let notes = release.change("install", &file, &[]).unwrap_or_else(explain);
        assert!(notes.contains("rollout status deployment/"), "{name}: NOTES tell what to do next: {notes}");
        let installed = objects(&cluster, &namespace).await;
        assert!(installed.len() >= 6, "{name}: {installed:?}");

        let changes = ["--set", "image.tag=v2,config.log.filter=debug,commonLabels.team=b"];
        release.change("upgrade", &file, &changes).unwrap_or_else(explain);
        let upgraded = objects(&cluster, &namespace).await;
        assert_ne!(of_deployment(&installed, "/spec/template"), of_deployment(&upgraded, "/spec/template"), "{name}");
        assert_eq!(selectors(&installed), selectors(&upgraded), "{name}");

        release.helm(&["rollback", "r", "1"]).unwrap_or_else(explain);
        let back = objects(&cluster, &namespace).await;
        assert_eq!(of_deployment(&installed, "/spec/template"), of_deployment(&back, "/spec/template"), "{name}");
        assert_eq!(selectors(&installed), selectors(&back), "{name}");

        release.helm(&["uninstall", "r"]).unwrap_or_else(explain);
        assert!(objects(&cluster, &namespace).await.is_empty(), "{name}: something is left");
    }
}

/// The one Deployment's value there.
fn of_deployment(objects: &[Value], pointer: &str) -> Value {
    let deployment = objects.iter().find(|object| object["kind"] == "Deployment").expect("a release has a Deployment");
    deployment.pointer(pointer).expect("a Deployment has that").clone()
}

/// A namespace whose pods must be restricted, as the Pod Security Standards have it.
async fn create_restricted_namespace(cluster: &Cluster, name: &str) {
    cluster.create_namespace(name).await.unwrap();
    let label = "pod-security.kubernetes.io/enforce=restricted";
    cluster.kubectl(&["label", "namespace", name, label], None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
async fn restricted_namespaces_take_the_pods() {
    let (helm, cluster) = (Helm::get(), cluster().await);
    create_restricted_namespace(&cluster, "strict").await;
    let release = Release { helm: &helm, cluster: &cluster, namespace: "strict" };
    for (name, file) in sets() {
        release
            .change("install", &file, &["--set", "rbac.create=false"])
            .unwrap_or_else(|error| panic!("{name}: {error:#}"));
        let template = of_deployment(&objects(&cluster, "strict").await, "/spec/template");
        let pod = serde_json::json!({"apiVersion": "v1", "kind": "Pod", "spec": template["spec"],
            "metadata": {"name": "router", "namespace": "strict", "labels": template["metadata"]["labels"]}});
        let path = "/api/v1/namespaces/strict/pods";
        cluster.request(Method::POST, path, Some(&pod)).await.unwrap_or_else(|error| panic!("{name}: {error:#}"));
        cluster.delete_pod("strict", "router").await.unwrap();
        let mut privileged = pod.clone();
        privileged["spec"]["containers"][0]["securityContext"]["allowPrivilegeEscalation"] = true.into();
        let refused = cluster.request(Method::POST, path, Some(&privileged)).await.unwrap_err().to_string();
        assert!(refused.contains("PodSecurity"), "nobody looks: {refused}");
        release.helm(&["uninstall", "r"]).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
async fn account_may_read_what_it_watches_and_nothing_else() {
    let (helm, cluster) = (Helm::get(), cluster().await);
    cluster.create_namespace("llm").await.unwrap();
    let release = Release { helm: &helm, cluster: &cluster, namespace: "llm" };
    release.change("install", &super::helm::set("kubernetes"), &[]).unwrap();
    let account = "system:serviceaccount:llm:r-warmroute";
    let may = async |verb: &str, resource: &str, namespace: &str| {
        let args = ["auth", "can-i", verb, resource, "-n", namespace, "--as", account];
        // It answers no with an exit code of its own.
        cluster.kubectl(&args, None).await.is_ok_and(|answer| answer.trim() == "yes")
    };
    for (resource, namespace, expected) in [
        ("pods", "llm", true),
        ("pods", "engines", true),
        ("endpointslices.discovery.k8s.io", "engines", true),
        ("inferencepools.inference.networking.k8s.io", "engines", true),
        ("endpointslices.discovery.k8s.io", "llm", false),
        ("pods", "default", false),
        ("pods", "kube-system", false),
        ("secrets", "llm", false),
        ("configmaps", "llm", false),
        ("services", "engines", false),
    ] {
        for verb in ["get", "list", "watch"] {
            assert_eq!(may(verb, resource, namespace).await, expected, "{verb} {resource} in {namespace}");
        }
        for verb in ["create", "update", "patch", "delete", "deletecollection"] {
            assert!(!may(verb, resource, namespace).await, "{verb} {resource} in {namespace}");
        }
    }
}
