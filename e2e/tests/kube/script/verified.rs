//! `--verify`: the script follows an engine's events through kubectl's port-forward, which here leads to a simulated
//! engine.

use std::path::Path;

use e2e::http::client;
use e2e::router;
use e2e::sim::{SimOptions, Simulator};
use serde_json::{Value, json};

use super::{Bench, NAMESPACE, workload};

/// Seconds that the script listens.
const SECONDS: &str = "3";
const PODS: &str = "/api/v1/namespaces/default/pods";

/// What kubectl would say of a port-forward, on `ports`; there is no kubelet that could do one.
fn port_forward(ports: [&str; 2]) -> String {
    let [events, replay] = ports;
    format!(
        "if [[ \" $* \" == *' port-forward '* ]]; then\n\
         [[ \" $* \" == *' pod/engine --address 127.0.0.1 :5557 :5558 '* ]] || {{ echo \"$*\" >&2; exit 1; }}\n\
         echo 'Forwarding from 127.0.0.1:{events} -> 5557'\necho 'Forwarding from 127.0.0.1:{replay} -> 5558'\n\
         exec sleep 60\nfi"
    )
}

/// What kubectl would say of a pod that runs our image: it runs here instead, beside a note of its arguments and of the
/// restrictions that its namespace holds it to.
fn pod_runs(engine: &Simulator, note: &Path) -> String {
    let (events, replay) = (engine.events(), engine.replay());
    let warmroute = router::binary().unwrap();
    format!(
        "case \" $* \" in\n*' wait '*) exit ;;\n\
         *' logs '*) \"$kubectl\" -n {NAMESPACE} get \"${{*: -1}}\" -o json >{note:?}\n\
         exec {warmroute:?} events tail {events} --replay {replay} ;;\nesac"
    )
}

fn port(endpoint: &str) -> &str {
    endpoint.rsplit_once(':').unwrap().1
}

#[tokio::test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
async fn verify_shows_what_a_pod_publishes() {
    let bench = Bench::start().await;
    let engine = Simulator::start(SimOptions::default()).unwrap();
    let ports = [port(engine.events()), port(engine.replay())];
    let kubectl = bench.wrapped_kubectl("forwarding-kubectl", &port_forward(ports));
    let verify = async || bench.run_with(&kubectl, &["--verify", "--seconds", SECONDS], "verified").await;
    enable(&bench).await;

    let none = verify().await;
    assert_eq!(none.code, 4, "{}{}", none.stdout, none.stderr);
    assert!(
        none.stderr.contains("no pod with app=verified,model.aibrix.ai/kv-events-enabled=true is ready; found none")
    );

    create_engine_pod(&bench).await;
    let silent = verify().await;
    assert_eq!(silent.code, 4, "{}{}", silent.stdout, silent.stderr);
    assert!(silent.stderr.contains("connected, but nothing was published yet"), "{}", silent.stderr);

    ask(&engine).await;
    let seen = verify().await;
    assert_eq!(seen.code, 0, "{}{}", seen.stdout, seen.stderr);
    assert!(seen.stdout.contains("BlockStored") && seen.stdout.contains("rank 0: "), "{}", seen.stdout);

    drop(engine);
    let gone = verify().await;
    assert_eq!(gone.code, 4, "{}{}", gone.stdout, gone.stderr);
    assert!(gone.stderr.contains("nobody publishes there"), "{}", gone.stderr);
}

#[tokio::test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
async fn verify_can_run_in_a_pod_that_a_restricted_namespace_takes() {
    let bench = Bench::start().await;
    let engine = Simulator::start(SimOptions::default()).unwrap();
    ask(&engine).await;
    enable(&bench).await;
    create_engine_pod(&bench).await;
    let restricted = ["label", "namespace", NAMESPACE, "pod-security.kubernetes.io/enforce=restricted"];
    bench.cluster.kubectl(&restricted, None).await.unwrap();
    let note = bench.cluster.dir().join("visitor.json");
    let kubectl = bench.wrapped_kubectl("running-kubectl", &pod_runs(&engine, &note));

    let options = ["--verify", "--seconds", SECONDS, "--image", "registry/warmroute:1"];
    let seen = bench.run_with(&kubectl, &options, "verified").await;

    assert_eq!(seen.code, 0, "{}{}", seen.stdout, seen.stderr);
    assert!(seen.stdout.contains("BlockStored"), "{}", seen.stdout);
    let visitor: Value = serde_json::from_slice(&std::fs::read(note).unwrap()).unwrap();
    let ran = &visitor["spec"]["containers"][0];
    assert_eq!(ran["image"], "registry/warmroute:1");
    let args = json!(["events", "tail", "tcp://127.0.0.2:5557", "--replay", "tcp://127.0.0.2:5558"]);
    assert_eq!(ran["args"], args);
    let pods = bench.get(PODS).await;
    let left: Vec<&Value> = pods["items"].as_array().unwrap().iter().map(|pod| &pod["metadata"]["name"]).collect();
    assert_eq!(left, ["engine"], "the visitor is gone");
}

/// A workload whose events are on.
async fn enable(bench: &Bench) {
    bench.cluster.apply(&workload("Deployment", "verified", &json!({"args": ["m"]})).to_string()).await.unwrap();
    assert_eq!(bench.run(&[], "verified").await.code, 0);
}

/// A pod of it that is ready.
async fn create_engine_pod(bench: &Bench) {
    let labels = json!({"app": "verified", "model.aibrix.ai/kv-events-enabled": "true"});
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "engine", "labels": labels},
                     "spec": {"nodeName": "node", "containers": [{"name": "vllm", "image": "vllm"}]}});
    bench.cluster.create_pod(&pod.to_string()).await.unwrap();
    let status = json!({"phase": "Running", "podIP": "127.0.0.2", "podIPs": [{"ip": "127.0.0.2"}],
                        "conditions": [{"type": "Ready", "status": "True"}]});
    bench.cluster.set_pod_status(NAMESPACE, "engine", &status).await.unwrap();
}

/// Lets the engine publish something.
async fn ask(engine: &Simulator) {
    let body = json!({"model": SimOptions::default().model, "prompt": (0..200).collect::<Vec<u32>>(), "max_tokens": 1});
    let url = format!("http://{}/v1/completions", engine.address());
    assert!(client().post(url).json(&body).send().await.unwrap().status().is_success());
}
