//! The harness' cluster itself: what the other tests rely on.

use std::time::{Duration, Instant};

use e2e::cache::Cache;
use e2e::kube::{Cluster, ClusterOptions};
use reqwest::Method;
use serde_json::{Value, json};

const PODS: &str = "/api/v1/namespaces/default/pods";

const POD: &str = "
apiVersion: v1
kind: Pod
metadata: {name: engine, labels: {app: vllm}}
spec:
  nodeName: node
  containers: [{name: vllm, image: vllm}]
";

async fn start(options: ClusterOptions) -> Cluster {
    Cluster::start(&Cache::from_env().unwrap(), options).await.unwrap()
}

/// Status and name of each pod that `kubeconfig` may see, or what kubectl said.
async fn get_pods(cluster: &Cluster, kubeconfig: &str) -> anyhow::Result<String> {
    cluster.kubectl(&["--kubeconfig", kubeconfig, "get", "pods", "-o", "name"], None).await
}

#[tokio::test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
async fn pods_live_by_api_calls_alone() {
    let cluster = start(ClusterOptions::default()).await;
    let created = cluster.create_pod(POD).await.unwrap();
    assert_eq!(created["status"]["phase"], "Pending");
    let ready = json!({"phase": "Running", "podIP": "127.0.0.2", "podIPs": [{"ip": "127.0.0.2"}],
                       "conditions": [{"type": "Ready", "status": "True"}]});
    cluster.set_pod_status("default", "engine", &ready).await.unwrap();
    let pod = cluster.request(Method::GET, &format!("{PODS}/engine"), None).await.unwrap();
    assert_eq!((&pod["status"]["podIP"], &pod["status"]["phase"]), (&json!("127.0.0.2"), &json!("Running")));
    cluster.delete_pod("default", "engine").await.unwrap();
    let pod = cluster.request(Method::GET, &format!("{PODS}/engine"), None).await.unwrap();
    assert!(pod["metadata"]["deletionTimestamp"].is_string(), "its node has not ended it yet: {pod}");
    cluster.force_delete_pod("default", "engine").await.unwrap();
    let gone = cluster.request(Method::GET, &format!("{PODS}/engine"), None).await.unwrap_err().to_string();
    assert!(gone.contains("404"), "{gone}");
}

#[tokio::test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
async fn service_account_may_do_what_its_role_says_and_nothing_more() {
    let cluster = start(ClusterOptions::default()).await;
    cluster.create_namespace("llm").await.unwrap();
    cluster.kubectl(&["create", "serviceaccount", "router", "-n", "llm"], None).await.unwrap();
    let kubeconfig = cluster.kubeconfig_for("llm", "router").await.unwrap();
    let kubeconfig = kubeconfig.to_str().unwrap();
    let refused = get_pods(&cluster, kubeconfig).await.unwrap_err().to_string();
    let account = "system:serviceaccount:llm:router";
    assert!(refused.contains("Forbidden") && refused.contains(account), "{refused}");
    let role = ["create", "role", "reader", "-n", "llm", "--verb=get,list,watch", "--resource=pods"];
    cluster.kubectl(&role, None).await.unwrap();
    let binding = ["create", "rolebinding", "reader", "-n", "llm", "--role=reader", "--serviceaccount=llm:router"];
    cluster.kubectl(&binding, None).await.unwrap();
    assert_eq!(get_pods(&cluster, kubeconfig).await.unwrap(), "");
    let elsewhere = ["--kubeconfig", kubeconfig, "get", "pods", "-n", "default"];
    assert!(cluster.kubectl(&elsewhere, None).await.unwrap_err().to_string().contains("Forbidden"));
}

#[tokio::test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
async fn state_outlives_the_api_server_but_not_its_history() {
    let mut cluster = start(ClusterOptions::default()).await;
    let before = cluster.request(Method::GET, PODS, None).await.unwrap()["metadata"]["resourceVersion"].clone();
    cluster.create_pod(POD).await.unwrap();
    let watch = format!("{PODS}?watch=1&timeoutSeconds=1&resourceVersion={}", before.as_str().unwrap());
    let event: Value = cluster.request(Method::GET, &watch, None).await.unwrap();
    assert_eq!(event["type"], "ADDED", "the past is remembered: {event}");
    cluster.compact_etcd().await.unwrap();
    cluster.stop_api_server().await.unwrap();
    assert!(cluster.request(Method::GET, PODS, None).await.is_err(), "nobody serves the API");
    cluster.start_api_server().await.unwrap();
    let pods = cluster.request(Method::GET, PODS, None).await.unwrap();
    assert_eq!(pods["items"].as_array().unwrap().len(), 1);
    let event: Value = cluster.request(Method::GET, &watch, None).await.unwrap();
    assert_eq!((&event["type"], &event["object"]["code"]), (&json!("ERROR"), &json!(410)), "{event}");
}

#[tokio::test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
async fn definitions_are_loaded_with_their_rules() {
    let cluster = start(ClusterOptions { crds: true, ..ClusterOptions::default() }).await;
    let names = cluster.kubectl(&["get", "crd", "-o", "name"], None).await.unwrap();
    for name in [
        "httproutes.gateway.networking.k8s.io",
        "backendtrafficpolicies.gateway.envoyproxy.io",
        "servicemonitors.monitoring.coreos.com",
        "inferencepools.inference.networking.k8s.io",
    ] {
        assert!(names.contains(name), "{names}");
    }
    // A rule in CEL: a Gateway's listeners have names of their own.
    let gateway = "{apiVersion: gateway.networking.k8s.io/v1, kind: Gateway, metadata: {name: g}, spec: {
        gatewayClassName: c, listeners: [{name: a, port: 80, protocol: HTTP}, {name: a, port: 81, protocol: HTTP}]}}";
    let refused = cluster.apply(gateway).await.unwrap_err().to_string();
    assert!(refused.to_lowercase().contains("duplicate"), "{refused}");
}

#[tokio::test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
async fn failed_start_shows_what_the_api_server_said() {
    let start = Instant::now();
    let options = ClusterOptions { api_server_args: vec!["--no-such-flag".to_owned()], ..ClusterOptions::default() };
    let error = Cluster::start(&Cache::from_env().unwrap(), options).await.unwrap_err();
    assert!(format!("{error:#}").contains("unknown flag: --no-such-flag"), "{error:#}");
    assert!(start.elapsed() < Duration::from_secs(60), "it waited for a program that had ended");
}
