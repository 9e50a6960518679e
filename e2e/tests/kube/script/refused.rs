//! What the script does not understand: nothing is changed, and the message says why.

use serde_json::{Value, json};

use super::{Bench, path, workload};

/// The container, options, and what is said; several faults are told together.
fn cases() -> Vec<(&'static str, Value, &'static [&'static str], &'static [&'static str])> {
    let events = |config: &str| json!({"args": ["m", "--kv-events-config", config]});
    let shell = |script: &str| json!({"command": ["bash", "-c", script]});
    vec![
        (
            "no-vllm",
            json!({"image": "busybox", "args": ["m"]}),
            &[],
            &["has no container that runs vLLM; found vllm (busybox)"],
        ),
        ("wrapper", json!({"command": ["/start.sh"]}), &[], &["found [\"/start.sh\"], expected vllm serve"]),
        ("no-such-container", json!({"args": ["m"]}), &["--container", "x"], &["has no container x; found vllm"]),
        ("substitution", shell("vllm serve $MODEL"), &[], &["a substitution ($M…)", "--kv-events-config '{\"enable"]),
        ("in-quotes", shell("vllm serve \"`cat /model`\""), &[], &["a substitution (`c…)"]),
        ("two-commands", shell("pip install x && vllm serve m"), &[], &["more than one plain command (&)"]),
        ("two-lines", shell("ulimit -n 9000\nvllm serve m"), &[], &["more than one line"]),
        ("glob", shell("vllm serve /models/*"), &[], &["a * outside quotes"]),
        ("quote", shell("vllm serve 'm"), &[], &["a quote that is not closed"]),
        (
            "shell-file",
            json!({"command": ["bash", "/start.sh"]}),
            &[],
            &["found [\"bash\",\"/start.sh\"], expected [\"sh\", \"-c\""],
        ),
        (
            "other-ports",
            events("{\"enable_kv_cache_events\":true,\"endpoint\":\"tcp://*:1\"}"),
            &[],
            &["tcp://*:1", "remove it, or give its ports"],
        ),
        ("off", events("{}"), &[], &["found --kv-events-config \"{}\", expected {\"enable_kv_cache_events\":true"]),
        (
            "dotted",
            json!({"args": ["m", "--kv-events-config.publisher", "zmq"]}),
            &[],
            &["found --kv-events-config.publisher, expected one"],
        ),
        (
            "ranks",
            json!({"args": ["m", "-dp", "4"]}),
            &["--ranks", "2"],
            &["--ranks is 2, but vLLM is started with --data-parallel-size 4"],
        ),
        ("overlap", json!({"args": ["m", "-dp", "4"]}), &["--replay-port", "5558"], &["the ports of 4 ranks overlap"]),
        (
            "spread",
            json!({"args": ["m", "--data-parallel-rank=1"]}),
            &[],
            &["--data-parallel-rank: the ranks are spread over pods"],
        ),
        (
            "nameless",
            json!({"args": ["org/model"]}),
            &[],
            &["\"org/model\" cannot be the value of a label: say --model NAME"],
        ),
        (
            "algorithm",
            json!({"args": ["m", "--prefix-caching-hash-algo", "sha256"]}),
            &["--hash-algo", "xxhash"],
            &["--hash-algo is xxhash, but vLLM is started with --prefix-caching-hash-algo sha256"],
        ),
        (
            "old",
            json!({"image": "vllm/vllm-openai:v0.8.5", "args": ["m", "--no-enable-prefix-caching"],
                   "env": [{"name": "VLLM_USE_V1", "value": "0"}]}),
            &[],
            &["vLLM v0.8.5 has no KV events", "--no-enable-prefix-caching is set", "VLLM_USE_V1=0"],
        ),
    ]
}

#[tokio::test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
async fn what_is_not_understood_is_refused_and_left_alone() {
    let bench = Bench::start().await;
    for (name, container, options, expected) in cases() {
        let path = path("deployment", name);
        bench.cluster.apply(&workload("Deployment", name, &container).to_string()).await.unwrap();
        let before = bench.get(&path).await;
        let ran = bench.run(options, name).await;
        assert_eq!(ran.code, 3, "{name}: {}{}", ran.stdout, ran.stderr);
        for said in expected {
            assert!(ran.stderr.contains(said), "{name}: {said:?} is not in\n{}", ran.stderr);
        }
        assert_eq!(bench.get(&path).await, before, "{name}");
    }
}

#[tokio::test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
async fn what_is_not_ours_to_change_is_refused() {
    let bench = Bench::start().await;
    let refused = async |options: &[&str], name: &str, expected: &str| {
        let ran = bench.run(options, name).await;
        assert_eq!(ran.code, 3, "{name}: {}{}", ran.stdout, ran.stderr);
        assert!(ran.stderr.contains(expected), "{name}: {expected:?} is not in\n{}", ran.stderr);
    };
    let plain = json!({"args": ["m"]});
    refused(&[], "nothing", "has neither a Deployment nor a StatefulSet nothing").await;
    refused(&[], "leaderworkerset/x", "is a leaderworkerset, expected a Deployment or a StatefulSet").await;
    for kind in ["Deployment", "StatefulSet"] {
        bench.cluster.apply(&workload(kind, "both", &plain).to_string()).await.unwrap();
    }
    refused(&[], "both", "both a Deployment and a StatefulSet both").await;
    assert_eq!(bench.run(&[], "statefulset/both").await.code, 0, "said which");

    let mut two = workload("Deployment", "two", &plain);
    two["spec"]["template"]["spec"]["containers"][1]["image"] = json!("vllm/vllm-openai");
    bench.cluster.apply(&two.to_string()).await.unwrap();
    refused(&[], "two", "several containers that run vLLM: vllm other").await;
    assert_eq!(bench.run(&["--container", "vllm"], "two").await.code, 0, "said which");

    let mut owned = workload("Deployment", "owned", &plain);
    owned["metadata"]["ownerReferences"] = json!([{
        "apiVersion": "orchestration.aibrix.ai/v1alpha1", "kind": "StormService", "name": "storm", "uid": "1",
        "controller": true,
    }]);
    bench.cluster.apply(&owned.to_string()).await.unwrap();
    refused(&[], "owned", "StormService storm owns it").await;

    let mut selected = workload("Deployment", "selected", &plain);
    selected["spec"]["selector"]["matchLabels"]["model.aibrix.ai/kv-events-enabled"] = json!("false");
    selected["spec"]["template"]["metadata"]["labels"]["model.aibrix.ai/kv-events-enabled"] = json!("false");
    bench.cluster.apply(&selected.to_string()).await.unwrap();
    refused(&[], "selected", "the label model.aibrix.ai/kv-events-enabled is part of the selector, as \"false\"").await;
}

#[tokio::test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
async fn wrong_usage_and_failures_have_codes_of_their_own() {
    let bench = Bench::start().await;
    for options in
        [&["--ranks", "0"][..], &["--events-port", "x"], &["--what"], &["--verify", "--rollback"], &["--model"]]
    {
        let ran = bench.run(options, "any").await;
        assert_eq!(ran.code, 2, "{options:?}: {}", ran.stderr);
    }
    let kubectl = bench.wrapped_kubectl("failing-kubectl", "echo 'no server' >&2; exit 7");
    let ran = bench.run_with(&kubectl, &[], "any").await;
    assert_eq!((ran.code, ran.stderr.as_str()), (1, "no server\n"));
}

#[tokio::test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
async fn a_dry_run_fails_where_the_api_server_refuses() {
    let bench = Bench::start().await;
    bench.cluster.apply(&workload("Deployment", "dry", &json!({"args": ["m"]})).to_string()).await.unwrap();
    for (step, expected) in [
        ("patch", "refused by policy\nenable-kv-events: the API server does not take the patch of deployment/dry\n"),
        ("yaml", "refused by policy\nenable-kv-events: deployment/dry cannot be read\n"),
    ] {
        let refusal = format!("if [[ \" $* \" == *' {step} '* ]]; then echo 'refused by policy' >&2; exit 7; fi");
        let kubectl = bench.wrapped_kubectl(&format!("refusing-{step}"), &refusal);
        let ran = bench.run_with(&kubectl, &["--dry-run"], "dry").await;
        assert_eq!((ran.code, ran.stdout.as_str(), ran.stderr.as_str()), (1, "", expected), "{step}");
    }
}
