//! What the router may ask of the API server, and whom it may talk to.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::helm::{FULLNAME, Helm, object, of_kind, set, sets};

/// Namespace, API group and resource of every rule, which must only read.
fn rules(objects: &[Value]) -> BTreeSet<(String, String, String)> {
    let mut found = BTreeSet::new();
    for role in of_kind(objects, "Role") {
        for rule in role["rules"].as_array().unwrap() {
            assert_eq!(rule["verbs"], json!(["get", "list", "watch"]), "{role}");
            let text = |value: &Value| value.as_str().unwrap().to_owned();
            let namespace = text(&role["metadata"]["namespace"]);
            found.insert((namespace, text(&rule["apiGroups"][0]), text(&rule["resources"][0])));
        }
    }
    found
}

#[test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
fn rights_are_what_the_discovery_reads_where_it_reads_it() {
    let helm = Helm::get();
    let objects = helm.template(&set("kubernetes"), &[]).unwrap();
    let expected = [
        ("engines", "", "pods"),
        ("engines", "discovery.k8s.io", "endpointslices"),
        ("engines", "inference.networking.k8s.io", "inferencepools"),
        ("llm", "", "pods"),
    ];
    let expected =
        expected.map(|(namespace, group, resource)| (namespace.to_owned(), group.to_owned(), resource.to_owned()));
    assert_eq!(rules(&objects), BTreeSet::from(expected));
    for binding in of_kind(&objects, "RoleBinding") {
        let subject = json!([{"kind": "ServiceAccount", "name": FULLNAME, "namespace": "llm"}]);
        assert_eq!(binding["subjects"], subject);
        assert_eq!(binding["roleRef"]["name"], binding["metadata"]["name"]);
    }
    for (name, file) in sets() {
        let objects = helm.template(&file, &[]).unwrap();
        assert_eq!(
            of_kind(&objects, "ClusterRole").count() + of_kind(&objects, "ClusterRoleBinding").count(),
            0,
            "{name}"
        );
        let asks = !rules(&objects).is_empty();
        let pod = &of_kind(&objects, "Deployment").next().unwrap()["spec"]["template"]["spec"];
        assert_eq!(
            pod["automountServiceAccountToken"], asks,
            "{name}: a token that is not needed, or one that is missing"
        );
    }
    let slices = helm
        .template(
            &set("inferencepool"),
            &[
                "config.models[0].discovery.kubernetes.service=qwen",
                "config.models[0].discovery.kubernetes.inference_pool=null",
                "inferencePool.create=false",
            ],
        )
        .unwrap();
    assert_eq!(rules(&slices).len(), 1, "EndpointSlices alone: {:?}", rules(&slices));
}

/// Ports of the rules of a policy's `direction` that `fits` takes, as `5557` or `5557-5558`, or `all` of a rule that names none.
fn ports(policy: &Value, direction: &str, fits: impl Fn(&Value) -> bool) -> BTreeSet<String> {
    let rules = policy["spec"][direction].as_array().unwrap().iter().filter(|rule| fits(rule));
    let ports =
        rules.flat_map(|rule| rule["ports"].as_array().cloned().unwrap_or_else(|| vec![json!({"port": "all"})]));
    let shown = |port: Value| match (&port["port"], &port["endPort"]) {
        (Value::Null, _) => port["protocol"].as_str().unwrap().to_owned(),
        (Value::String(port), _) => port.clone(),
        (port, Value::Null) => port.to_string(),
        (port, end) => format!("{port}-{end}"),
    };
    ports.map(shown).collect()
}

fn strings<const N: usize>(items: [&str; N]) -> BTreeSet<String> {
    items.map(str::to_owned).into()
}

#[test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
fn routers_are_reached_by_envoy_prometheus_and_each_other() {
    let objects = Helm::get().template(&set("kubernetes"), &[]).unwrap();
    let policy = object(&objects, "NetworkPolicy", FULLNAME);
    assert_eq!(policy["spec"]["policyTypes"], json!(["Ingress", "Egress"]));
    let from = |namespace: &'static str| move |rule: &Value| rule["from"].to_string().contains(namespace);
    assert_eq!(ports(policy, "ingress", from("envoy-gateway-system")), strings(["9002"]));
    assert_eq!(ports(policy, "ingress", from("\"monitoring\"")), strings(["9090"]));
    assert_eq!(ports(policy, "ingress", from("app.kubernetes.io/instance")), strings(["9090"]));
    assert_eq!(policy["spec"]["ingress"].as_array().unwrap().len(), 3, "nobody else");
}

#[test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
fn routers_reach_what_the_configuration_names() {
    let helm = Helm::get();
    let egress = |name: &str, fullname: &str, part: &'static str| {
        let objects = helm.template(&set(name), &[]).unwrap();
        ports(object(&objects, "NetworkPolicy", fullname), "egress", |rule| rule["to"].to_string().contains(part))
    };
    // An engine says itself on which ports it publishes, and a pod's label or annotation where it is asked.
    assert_eq!(egress("static", FULLNAME, "10.0.0.11/32"), strings(["all"]));
    assert_eq!(egress("static", FULLNAME, "fd00::12/128"), strings(["all"]));
    assert_eq!(egress("static", FULLNAME, "null"), strings(["53", "5353"]), "nowhere else but to name servers");
    assert_eq!(egress("gateway", FULLNAME, "model.aibrix.ai/name\":\"qwen"), strings(["all"]));
    assert_eq!(egress("gateway", FULLNAME, "\"engines\""), strings(["all"]));
    assert_eq!(
        egress("gateway", FULLNAME, "\"app\":\"llama\""),
        strings(["all"]),
        "a selector of equalities is the pods'"
    );
    assert_eq!(egress("gateway", FULLNAME, "null"), strings(["53", "5353", "443", "6443"]), "the API server too");
    assert_eq!(egress("kubernetes", FULLNAME, "\"role\":\"engine\""), strings(["all"]));
    assert_eq!(egress("kubernetes", FULLNAME, "10.96.0.1/32"), strings(["443", "6443"]));
    // The collectors of traces and metrics, the tokenizer, siblings, and engines whose addresses a name server tells.
    let named = strings(["53", "5353", "4317", "4327", "5557", "5558", "8000", "9090"]);
    assert_eq!(egress("everything", "warm", "null"), named);
    assert_eq!(egress("sidecar", FULLNAME, "null"), strings(["53", "5353", "5557", "5558", "8000"]));
}

#[test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
fn publishers_elsewhere_are_reached_and_those_that_dial_are_let_in() {
    let endpoints = json!([
        {"address": "10.0.0.11:8000", "events": "tcp://10.0.0.99:5557", "replay": "tcp://replay.llm.svc:5567", "ranks": 2},
        {"address": "[fd00::12]:8000", "events": "tcp://*:6557", "ranks": 3},
    ]);
    let setting = format!("json:config.models[0].discovery.static={endpoints}");
    let objects = Helm::get().template(&set("static"), &[&setting]).unwrap();
    let policy = object(&objects, "NetworkPolicy", FULLNAME);
    let to = |part: &'static str| move |rule: &Value| rule["to"].to_string().contains(part);
    assert_eq!(ports(policy, "egress", to("10.0.0.99/32")), strings(["5557-5558"]));
    assert_eq!(ports(policy, "egress", to("null")), strings(["53", "5353", "5567-5568"]), "a name is no address");
    let from = |rule: &Value| rule["from"].to_string().contains("fd00::12/128");
    assert_eq!(ports(policy, "ingress", from), strings(["6557-6559"]));
}

#[test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
fn engines_keep_their_events_for_the_routers_and_everything_else_as_it_was() {
    let objects = Helm::get().template(&set("kubernetes"), &[]).unwrap();
    let policy = object(&objects, "NetworkPolicy", &format!("{FULLNAME}-engines"));
    assert_eq!(policy["spec"]["podSelector"], json!({"matchLabels": {"role": "engine"}}));
    let is_ours = |rule: &Value| rule["from"].is_array();
    assert_eq!(ports(policy, "ingress", is_ours), strings(["5557-5558", "5567-5568", "5557", "5558"]));
    let others = strings(["1-5556", "5559-5566", "5569-65535", "UDP", "SCTP"]);
    assert_eq!(ports(policy, "ingress", |rule| !is_ours(rule)), others);
    let elsewhere = object(&objects, "NetworkPolicy", &format!("{FULLNAME}-engines.llm"));
    assert_eq!(elsewhere["metadata"]["namespace"], "engines");
    assert_eq!(ports(elsewhere, "ingress", |rule| !is_ours(rule)), strings(["1-5556", "5559-65535", "UDP", "SCTP"]));
}
