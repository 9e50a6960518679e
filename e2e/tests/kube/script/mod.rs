//! `envoy/vllm/enable-kv-events.sh` against workloads on a real API server.

mod refused;
mod verified;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use e2e::cache::Cache;
use e2e::kube::{Cluster, ClusterOptions, tools};
use reqwest::Method;
use serde_json::{Value, json};

const NAMESPACE: &str = "default";
/// What the script is to add for one rank on the usual ports.
const CONFIG: &str =
    r#"{"enable_kv_cache_events":true,"publisher":"zmq","endpoint":"tcp://*:5557","replay_endpoint":"tcp://*:5558"}"#;

/// What a dry run shows of it.
const ADDED_LABEL: &str = "\n+        model.aibrix.ai/kv-events-enabled: \"true\"\n";

/// A cluster, and the script run against it.
struct Bench {
    cluster: Cluster,
    kubectl: PathBuf,
}

/// What the script did.
struct Ran {
    code: i32,
    stdout: String,
    stderr: String,
}

impl Bench {
    async fn start() -> Self {
        let cache = Cache::from_env().unwrap();
        let cluster = Cluster::start(&cache, ClusterOptions::default()).await.unwrap();
        let kubectl = tools::kubectl(&cache).unwrap();
        Self { cluster, kubectl }
    }

    async fn run(&self, options: &[&str], name: &str) -> Ran {
        self.run_with(&self.kubectl, options, name).await
    }

    /// [`Self::run`] with a program in place of kubectl.
    async fn run_with(&self, kubectl: &Path, options: &[&str], name: &str) -> Ran {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../envoy/vllm/enable-kv-events.sh");
        let mut command = Command::new("bash");
        command.arg(script).args(options).args([NAMESPACE, name]);
        command.env("KUBECTL", kubectl).env("KUBECONFIG", self.cluster.kubeconfig()).env("HOME", self.cluster.dir());
        if options.contains(&"--verify") {
            command.env("WARMROUTE_BIN", e2e::router::binary().unwrap());
        }
        let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
        let Output { status, stdout, stderr } = output;
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Ran { code: status.code().unwrap(), stdout: text(stdout), stderr: text(stderr) }
    }

    async fn get(&self, path: &str) -> Value {
        self.cluster.request(Method::GET, path, None).await.unwrap()
    }

    /// What a real shell gives to vLLM of the container's command.
    fn words_by_shell(&self, container: &Value) -> Vec<String> {
        let vllm = self.cluster.dir().join("vllm");
        std::fs::write(&vllm, "#!/bin/sh\nprintf '%s\\n' \"$@\"\n").unwrap();
        std::fs::set_permissions(&vllm, std::fs::Permissions::from_mode(0o755)).unwrap();
        let words = [&container["command"], &container["args"]].map(|field| field.as_array().unwrap().clone()).concat();
        let words: Vec<&str> = words.iter().map(|word| word.as_str().unwrap()).collect();
        let output = Command::new(words[0]).args(&words[1..]).env("PATH", self.cluster.dir()).output().unwrap();
        assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
    }

    /// A program for `KUBECTL` that does `first`, a piece of a shell script, and then what kubectl does.
    fn wrapped_kubectl(&self, name: &str, first: &str) -> PathBuf {
        let path = self.cluster.dir().join(name);
        let script = format!("#!/usr/bin/env bash\nkubectl={:?}\n{first}\nexec \"$kubectl\" \"$@\"\n", self.kubectl);
        std::fs::write(&path, script).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }
}

/// Where the API serves a workload.
fn path(kind: &str, name: &str) -> String {
    format!("/apis/apps/v1/namespaces/{NAMESPACE}/{kind}s/{name}")
}

/// A workload whose only container is `container`, beside whatever the API server adds.
fn workload(kind: &str, name: &str, container: &Value) -> Value {
    let mut container = container.clone();
    let fields = container.as_object_mut().unwrap();
    fields.entry("name").or_insert(json!("vllm"));
    fields.entry("image").or_insert(json!("registry:5000/vllm/vllm-openai:v0.32.0@sha256:00"));
    let image = fields["image"].as_str().unwrap().replace("@sha256:00", &format!("@sha256:{}", "0".repeat(64)));
    fields.insert("image".to_owned(), json!(image));
    json!({
        "apiVersion": "apps/v1",
        "kind": kind,
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": {"app": name}},
            "template": {
                "metadata": {"labels": {"app": name}},
                "spec": {"containers": [container, {"name": "other", "image": "busybox"}]},
            },
        },
    })
}

/// What people decide in an object: not what the API server counts and records.
fn decided(object: &Value) -> Value {
    let mut object = object.clone();
    let metadata = object["metadata"].as_object_mut().unwrap();
    for counted in ["generation", "managedFields", "resourceVersion"] {
        metadata.remove(counted);
    }
    object
}

fn container(object: &Value) -> &Value {
    &object["spec"]["template"]["spec"]["containers"][0]
}

/// A workload that the script understands, and what becomes of it.
struct Case {
    name: &'static str,
    kind: &'static str,
    container: Value,
    options: &'static [&'static str],
    /// The container's `command` and `args` afterwards.
    expected: Value,
    /// The annotations of its pods afterwards.
    annotations: Value,
}

fn cases() -> Vec<Case> {
    let sharded = CONFIG.replace("5558", "5559");
    let elsewhere = CONFIG.replace("5557", "6000").replace("5558", "6100");
    let by_hand = CONFIG.replace(r#""publisher":"zmq","endpoint":"tcp://*:5557""#, r#""topic":"x""#);
    let by_hand = format!("--kv_events_config={by_hand}");
    let script = "exec vllm serve \"Qwen/Qwen3-8B\" \\\n  --served-model-name m \\\n  --port 9000\n";
    vec![
        Case {
            name: "arguments",
            kind: "Deployment",
            container: json!({"args": ["--model", "Qwen/Qwen3-8B", "--served-model-name", "m"]}),
            options: &[],
            expected: json!([
                null,
                ["--model", "Qwen/Qwen3-8B", "--served-model-name", "m", "--kv-events-config", CONFIG]
            ]),
            annotations: json!(null),
        },
        Case {
            name: "subcommand",
            kind: "Deployment",
            container: json!({"args": ["serve", "m", "--max-model-len", "4096"]}),
            options: &[],
            expected: json!([null, ["serve", "m", "--max-model-len", "4096", "--kv-events-config", CONFIG]]),
            annotations: json!(null),
        },
        Case {
            name: "command-alone",
            kind: "StatefulSet",
            container: json!({
                "image": "engine",
                "command": ["/usr/bin/python3", "-m", "vllm.entrypoints.openai.api_server", "--model", "m"],
            }),
            options: &["--vllm-version", "0.10", "--hash-algo", "sha256_cbor"],
            expected: json!([
                ["/usr/bin/python3", "-m", "vllm.entrypoints.openai.api_server", "--model", "m"],
                ["--kv-events-config", CONFIG, "--prefix-caching-hash-algo", "sha256_cbor"]
            ]),
            annotations: json!(null),
        },
        Case {
            name: "shell",
            kind: "Deployment",
            container: json!({"command": ["/bin/sh", "-c"], "args": [script]}),
            options: &[],
            expected: json!([["/bin/sh", "-c"], [format!("{} --kv-events-config '{CONFIG}'\n", script.trim_end())]]),
            annotations: json!({"warmroute.io/port": "9000"}),
        },
        Case {
            name: "ranks",
            kind: "Deployment",
            container: json!({"command": ["vllm", "serve", "m", "-dp", "2"]}),
            options: &["--ranks", "2"],
            expected: json!([["vllm", "serve", "m", "-dp", "2"], ["--kv-events-config", sharded]]),
            annotations: json!({"warmroute.io/ranks": "2", "warmroute.io/replay-port": "5559"}),
        },
        Case {
            name: "ports",
            kind: "Deployment",
            container: json!({"args": ["org/model", "--api-key", "$(KEY)"]}),
            options: &["--model", "m", "--events-port", "6000", "--replay-port", "6100"],
            expected: json!([null, ["org/model", "--api-key", "$(KEY)", "--kv-events-config", elsewhere]]),
            annotations: json!({"warmroute.io/events-port": "6000", "warmroute.io/replay-port": "6100"}),
        },
        Case {
            name: "set-by-hand",
            kind: "Deployment",
            container: json!({"args": ["m", by_hand]}),
            options: &[],
            expected: json!([null, ["m", by_hand]]),
            annotations: json!(null),
        },
    ]
}

#[tokio::test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
async fn events_are_switched_on_once_and_off_without_a_trace() {
    let bench = Bench::start().await;
    for case in cases() {
        let name = case.name;
        let path = path(&case.kind.to_lowercase(), name);
        bench.cluster.apply(&workload(case.kind, name, &case.container).to_string()).await.unwrap();
        let original = bench.get(&path).await;

        let dry = bench.run(&[case.options, &["--dry-run"]].concat(), name).await;
        assert_eq!(dry.code, 0, "{name}: {}", dry.stderr);
        assert!(dry.stdout.contains(ADDED_LABEL), "{name}: {}", dry.stdout);
        assert_eq!(bench.get(&path).await, original, "{name}: a dry run changes nothing");

        let ran = bench.run(case.options, name).await;
        assert_eq!(ran.code, 0, "{name}: {}", ran.stderr);
        let enabled = bench.get(&path).await;
        let found = container(&enabled);
        assert_eq!(json!([found["command"], found["args"]]), case.expected, "{name}");
        if case.name == "shell" {
            let expected = ["serve", "Qwen/Qwen3-8B", "--served-model-name", "m", "--port", "9000"];
            assert_eq!(bench.words_by_shell(found), [&expected[..], &["--kv-events-config", CONFIG]].concat());
        }
        let template = &enabled["spec"]["template"]["metadata"];
        let labels = json!({"app": name, "model.aibrix.ai/name": "m", "model.aibrix.ai/kv-events-enabled": "true"});
        assert_eq!(template["labels"], labels, "{name}");
        assert_eq!(template["annotations"], case.annotations, "{name}");
        assert_eq!(enabled["spec"]["selector"], original["spec"]["selector"], "{name}");

        let again = bench.run(case.options, name).await;
        assert!(again.code == 0 && again.stdout.contains("nothing to do"), "{name}: {}{}", again.stdout, again.stderr);
        assert_eq!(bench.get(&path).await, enabled, "{name}: nothing is written a second time");

        let back = bench.run(&["--rollback"], name).await;
        assert_eq!(back.code, 0, "{name}: {}", back.stderr);
        let rolled_back = bench.get(&path).await;
        assert_eq!(decided(&rolled_back), decided(&original), "{name}");
        let again = bench.run(&["--rollback"], name).await;
        assert!(again.code == 0 && again.stdout.contains("nothing to roll back"), "{name}: {}", again.stdout);
        assert_eq!(bench.get(&path).await, rolled_back, "{name}");
    }
}

#[tokio::test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
async fn annotations_of_other_ports_and_ranks_are_taken_off_until_the_rollback() {
    let bench = Bench::start().await;
    let path = path("deployment", "stale");
    let mut stale = workload("Deployment", "stale", &json!({"args": ["m"]}));
    stale["spec"]["template"]["metadata"]["annotations"] = json!({
        "by": "others",
        "warmroute.io/events-port": "6000",
        "warmroute.io/replay-port": "5558",
        "warmroute.io/ranks": "4",
    });
    bench.cluster.apply(&stale.to_string()).await.unwrap();
    let original = bench.get(&path).await;

    let ran = bench.run(&[], "stale").await;
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let enabled = bench.get(&path).await;
    // What says the right thing stays.
    let expected = json!({"by": "others", "warmroute.io/replay-port": "5558"});
    assert_eq!(enabled["spec"]["template"]["metadata"]["annotations"], expected);
    let again = bench.run(&[], "stale").await;
    assert!(again.code == 0 && again.stdout.contains("nothing to do"), "{}{}", again.stdout, again.stderr);

    let back = bench.run(&["--rollback"], "stale").await;
    assert_eq!(back.code, 0, "{}", back.stderr);
    assert_eq!(decided(&bench.get(&path).await), decided(&original));
}

#[tokio::test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
async fn what_others_change_is_kept() {
    let bench = Bench::start().await;
    let path = path("deployment", "shared");
    let args = json!({"args": ["m"]});
    bench.cluster.apply(&workload("Deployment", "shared", &args).to_string()).await.unwrap();
    // Somebody else is faster, once.
    let flag = bench.cluster.dir().join("raced");
    let race = format!(
        "if [[ \" $* \" == *' patch '* && ! -e {flag:?} ]]; then\n\
         touch {flag:?}\n\"$kubectl\" annotate deployment/shared by=others >/dev/null\nfi"
    );
    let kubectl = bench.wrapped_kubectl("racing-kubectl", &race);
    let ran = bench.run_with(&kubectl, &[], "shared").await;
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert!(flag.exists(), "somebody was faster");
    let enabled = bench.get(&path).await;
    assert_eq!(enabled["metadata"]["annotations"]["by"], "others");
    assert_eq!(container(&enabled)["args"], json!(["m", "--kv-events-config", CONFIG]));

    // Another field of the container stays as others have it, another argument stands in the way.
    let scale = json!({"spec": {"replicas": 3, "template": {"metadata": {"annotations": {"by": "others"}}}}});
    bench.cluster.request(Method::PATCH, &path, Some(&scale)).await.unwrap();
    let mut changed = container(&enabled)["args"].as_array().unwrap().clone();
    changed.push(json!("--enforce-eager"));
    let other = json!({"name": "other", "image": "busybox"});
    let vllm = |args: &Value| json!([{"name": "vllm", "image": container(&enabled)["image"], "args": args}, other]);
    let patch = |args: &Value| json!({"spec": {"template": {"spec": {"containers": vllm(args)}}}});
    bench.cluster.request(Method::PATCH, &path, Some(&patch(&json!(changed)))).await.unwrap();
    let refused = bench.run(&["--rollback"], "shared").await;
    assert_eq!(refused.code, 3, "{}", refused.stdout);
    assert!(
        refused.stderr.contains("args vllm was changed since: found [\"m\",\"--kv-events-config\""),
        "{}",
        refused.stderr
    );

    bench.cluster.request(Method::PATCH, &path, Some(&patch(&container(&enabled)["args"]))).await.unwrap();
    let back = bench.run(&["--rollback"], "shared").await;
    assert_eq!(back.code, 0, "{}", back.stderr);
    let rolled_back = bench.get(&path).await;
    assert_eq!(container(&rolled_back)["args"], json!(["m"]));
    assert_eq!(rolled_back["spec"]["replicas"], 3);
    assert_eq!(rolled_back["spec"]["template"]["metadata"]["annotations"], json!({"by": "others"}));
    assert_eq!(rolled_back["metadata"]["annotations"], json!({"by": "others"}));

    // What is put right the second time is part of the same change.
    assert_eq!(bench.run(&[], "shared").await.code, 0);
    let label = json!({"spec": {"template": {"metadata": {"labels": {"model.aibrix.ai/name": null}}}}});
    bench.cluster.request(Method::PATCH, &path, Some(&label)).await.unwrap();
    let ran = bench.run(&[], "shared").await;
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert_eq!(decided(&bench.get(&path).await)["spec"]["template"]["metadata"]["labels"]["model.aibrix.ai/name"], "m");
    assert_eq!(bench.run(&["--rollback"], "shared").await.code, 0);
    assert_eq!(decided(&bench.get(&path).await), decided(&rolled_back));
}
