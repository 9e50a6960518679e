//! `--verify`: the script follows an engine's events through kubectl's port-forward, which here leads to a simulated
//! engine.

use e2e::http::client;
use e2e::sim::{SimOptions, Simulator};
use serde_json::json;

use super::{Bench, NAMESPACE, workload};

/// Seconds that the script listens.
const SECONDS: &str = "3";

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
    bench.cluster.apply(&workload("Deployment", "verified", &json!({"args": ["m"]})).to_string()).await.unwrap();
    assert_eq!(bench.run(&[], "verified").await.code, 0);

    let none = verify().await;
    assert_eq!(none.code, 4, "{}{}", none.stdout, none.stderr);
    assert!(
        none.stderr.contains("no pod with app=verified,model.aibrix.ai/kv-events-enabled=true is ready; found none")
    );

    let labels = json!({"app": "verified", "model.aibrix.ai/kv-events-enabled": "true"});
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "engine", "labels": labels},
                     "spec": {"nodeName": "node", "containers": [{"name": "vllm", "image": "vllm"}]}});
    bench.cluster.create_pod(&pod.to_string()).await.unwrap();
    let status = json!({"phase": "Running", "podIP": "127.0.0.2", "podIPs": [{"ip": "127.0.0.2"}],
                        "conditions": [{"type": "Ready", "status": "True"}]});
    bench.cluster.set_pod_status(NAMESPACE, "engine", &status).await.unwrap();
    let silent = verify().await;
    assert_eq!(silent.code, 4, "{}{}", silent.stdout, silent.stderr);
    assert!(silent.stderr.contains("connected, but nothing was published yet"), "{}", silent.stderr);

    let body = json!({"model": SimOptions::default().model, "prompt": (0..200).collect::<Vec<u32>>(), "max_tokens": 1});
    let url = format!("http://{}/v1/completions", engine.address());
    assert!(client().post(url).json(&body).send().await.unwrap().status().is_success());
    let seen = verify().await;
    assert_eq!(seen.code, 0, "{}{}", seen.stdout, seen.stderr);
    assert!(seen.stdout.contains("BlockStored") && seen.stdout.contains("rank 0: "), "{}", seen.stdout);

    drop(engine);
    let gone = verify().await;
    assert_eq!(gone.code, 4, "{}{}", gone.stdout, gone.stderr);
    assert!(gone.stderr.contains("nobody publishes there"), "{}", gone.stderr);
}
