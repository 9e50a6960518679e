//! Values that cannot be used, and what is said of them: where, what was found, what was expected.

use super::helm::{Helm, set};

/// What the schema refuses: settings, and what the message has.
const BY_SCHEMA: [(&[&str], &[&str]); 20] = [
    (&["replica=3"], &["additional properties 'replica' not allowed"]),
    (&["config.limit.x=1"], &["/config", "additional properties 'limit' not allowed"]),
    (&["config.selection.body_mode=streamed"], &["/config/selection/body_mode", "'buffered', 'full_duplex_streamed'"]),
    (&["config.selection.mode=metadata"], &["/config/selection/mode", "'override_host', 'original_dst'"]),
    (&["config.listen.extproc=0.0.0.0:9003"], &["/config/listen/extproc", "does not match pattern"]),
    (&["config.limits.body_bytes=many"], &["/config/limits/body_bytes", "got string, want integer"]),
    (&["config.limits.body_bytes=100"], &["/config/limits/body_bytes", "got 100"]),
    (&["config.envoy.message_timeout=fast"], &["/config/envoy/message_timeout", "does not match pattern"]),
    (&["config.models[0].tokeniser.kind=text"], &["/config/models/0", "'tokeniser' not allowed"]),
    (&["config.models[0].tokenizer.kind=tiktoken"], &["/config/models/0/tokenizer/kind", "'remote'"]),
    (&["config.models[0].discovery.consul.name=x"], &["/config/models/0/discovery", "'consul' not allowed"]),
    (&["config.models[0].discovery.static[0].address=localhost:8000"], &["/static/0/address", "pattern"]),
    (&["config.models[0].discovery.static[0].ranks=0"], &["/static/0/ranks", "got 0"]),
    (&["config.rollout.mode=dark"], &["/config/rollout/mode", "'active', 'shadow', 'off'"]),
    (&["image.digest=latest"], &["/image/digest", "does not match pattern"]),
    (
        &["envoySidecar.service.type=ExternalName"],
        &["/envoySidecar/service/type", "'ClusterIP', 'NodePort', 'LoadBalancer'"],
    ),
    (&["resources.limits.memory=lots"], &["/resources/limits/memory", "does not match pattern"]),
    (&["resources.limits.memory=4294967296000m"], &["/resources/limits/memory", "does not match pattern"]),
    (&["snapshots.volume.hostPath.path=/"], &["/snapshots/volume", "'hostPath' not allowed"]),
    (&["envoyGateway.routes[0].backends[0].name=vllm"], &["/envoyGateway/routes/0", "missing property 'name'"]),
];

/// What the templates refuse, since it is wrong only together.
const BY_TEMPLATES: [(&str, &[&str], &str); 30] = [
    ("static", &["json:config.models=[]"], "config.models: found nothing, expected at least one model"),
    (
        "static",
        &["config.models[0].discovery.dns.name=x"],
        "config.models[0].discovery: found dns and static, expected exactly one of static, kubernetes, dns, file",
    ),
    (
        "gateway",
        &["config.models[0].discovery.kubernetes.service=a", "config.models[0].discovery.kubernetes.selector=b"],
        "config.models[0].discovery.kubernetes: found selector and service, expected at most one of",
    ),
    (
        "gateway",
        &["config.models[0].discovery.kubernetes.preset=none"],
        "config.models[0].discovery.kubernetes.preset: found none, expected a selector, a service or an inference_pool",
    ),
    (
        "gateway",
        &["config.models[0].name=Qwen/Qwen3-8B"],
        "config.models[0].name: found Qwen/Qwen3-8B, which no label can be, expected a selector",
    ),
    (
        "static",
        &["config.models[0].tokenizer.budget_max=950ms"],
        "config.models[0].tokenizer.budget_max: found 950ms, expected at most nine tenths of \
         config.envoy.message_timeout, 1s",
    ),
    (
        "static",
        &["config.envoy.message_timeout=500ms", "config.models[0].tokenizer.budget=1s"],
        "config.models[0].tokenizer.budget: found 1s, expected at most nine tenths",
    ),
    (
        "static",
        &["config.selection.header=target-pod"],
        "config.selection.header: found target-pod, expected a name that begins with x-",
    ),
    (
        "original-dst",
        &["config.rollout.mode=off"],
        "config.rollout: found off, expected active for all requests, since Envoy cannot pick by itself",
    ),
    (
        "original-dst",
        &["config.models[0].rollout.percent=0"],
        "config.rollout: found 0 percent, expected active for all requests",
    ),
    ("static", &["resources.limits.memory=2Gi"], "resources.limits.memory: found 2Gi, expected at least 2684354560"),
    (
        "static",
        &["json:resources.limits.memory=2147483648"],
        "resources.limits.memory: found 2147483648, expected at least 2684354560",
    ),
    (
        "kubernetes",
        &["config.models[0].discovery.kubernetes.replay_port=5558"],
        "config.models[0].discovery.kubernetes.replay_port: found port 5558, expected one at least 2 away from that of \
         events_port, 5557",
    ),
    (
        "kubernetes",
        &["config.models[0].discovery.kubernetes.replay_port=5556"],
        "config.models[0].discovery.kubernetes.replay_port: found port 5556, expected one at least 2 away",
    ),
    (
        "sidecar",
        &[
            "config.models[0].name=qwen",
            "config.models[0].discovery.dns.name=x",
            "config.models[0].discovery.dns.ranks=2",
        ],
        "config.models[0].discovery.dns.replay_port: found port 5558, expected one at least 2 away",
    ),
    (
        "static",
        &["json:config.models[0].discovery.static=[{\"address\": \"10.0.0.11:8000\", \"ranks\": 2, \
            \"events\": \"tcp://10.0.0.11:5557\", \"replay\": \"tcp://10.0.0.11:5558\"}]"],
        "config.models[0].discovery.static[0].replay: found port 5558, expected one at least 2 away from that of events",
    ),
    (
        "static",
        &["autoscaling.enabled=true", "autoscaling.minReplicas=7"],
        "autoscaling.minReplicas: found 7, expected",
    ),
    (
        "static",
        &["envoyGateway.gateway.name=llm"],
        "envoyGateway.routes: found nothing, expected at least one route, since envoyGateway.gateway.name is llm",
    ),
    (
        "gateway",
        &["envoyGateway.gateway.name="],
        "envoyGateway.gateway.name: found nothing, expected the Gateway that envoyGateway.routes attach to",
    ),
    (
        "gateway",
        &["envoyGateway.routes[1].name=qwen"],
        "envoyGateway.routes: found the names qwen, qwen, models, expected each name once",
    ),
    (
        "gateway",
        &["config.selection.body_mode=full_duplex_streamed"],
        "envoyGateway.failOpen: found true, expected false, since config.selection.body_mode is full_duplex_streamed",
    ),
    ("sidecar", &["envoySidecar.engines.host="], "envoySidecar.engines.host: found nothing, expected the name of"),
    (
        "gateway",
        &["envoySidecar.enabled=true", "envoySidecar.engines.host=qwen"],
        "config.models: found 2 models, expected one with envoySidecar.enabled",
    ),
    (
        "inferencepool",
        &["json:inferencePool.matchLabels={}"],
        "inferencePool.matchLabels: found nothing, expected the labels of the engines' pods",
    ),
    (
        "inferencepool",
        &["config.selection.mode=original_dst"],
        "config.selection: found the header target-pod, expected x-gateway-destination-endpoint",
    ),
    (
        "inferencepool",
        &["inferencePool.name=other"],
        "inferencePool.name: found other, expected the discovery.kubernetes.inference_pool of one of config.models",
    ),
    (
        "static",
        &["networkPolicy.engines.enabled=true", "networkPolicy.enginePodLabels.role=engine"],
        "networkPolicy.engines.enabled: found true, expected a model with discovery.kubernetes",
    ),
    (
        "gateway",
        &["networkPolicy.engines.enabled=true"],
        "networkPolicy.enginePodLabels: found nothing, expected the labels of the engines' pods",
    ),
    (
        "static",
        &["config.models[0].discovery.static=null", "config.models[0].discovery.file.path=/etc/engines.yaml"],
        "networkPolicy.extraEgress: found nothing, expected rules for the engines of config.models[0]",
    ),
    (
        "sidecar",
        &[
            "config.models[0].name=qwen",
            "config.models[0].discovery.dns.name=x",
            "config.models[0].discovery.dns.kind=srv",
        ],
        "networkPolicy.extraEgress: found nothing",
    ),
];

#[test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
fn what_the_schema_does_not_know_is_refused_with_its_place() {
    let helm = Helm::get();
    for (settings, expected) in BY_SCHEMA {
        let error = helm.template(&set("static"), settings).expect_err(settings[0]);
        let said = format!("{error:#}");
        for part in expected {
            assert!(said.contains(part), "{settings:?}: {part:?} is not in\n{said}");
        }
    }
}

#[test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
fn what_does_not_fit_together_is_refused_with_what_was_expected() {
    let helm = Helm::get();
    for (name, settings, expected) in BY_TEMPLATES {
        let error = helm.template(&set(name), settings).expect_err(expected);
        assert!(format!("{error:#}").contains(expected), "{settings:?}: {expected:?} is not in\n{error:#}");
    }
}

#[test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
fn a_cluster_that_is_too_old_is_refused() {
    let (chart, values) = (super::helm::chart(), set("sidecar"));
    let template = |version| {
        let args =
            ["template", "r", chart.to_str().unwrap(), "--values", values.to_str().unwrap(), "--kube-version", version];
        Helm::get().run(&args).map_err(|error| format!("{error:#}"))
    };
    assert!(template("v1.26.0").unwrap_err().contains("incompatible with Kubernetes v1.26.0"));
    assert!(template("v1.29.3").unwrap_err().contains("found Kubernetes v1.29.3, expected 1.30 or newer"));
    assert!(template("v1.30.1-eks-1").is_ok(), "a vendor's suffix is no pre-release");
}
