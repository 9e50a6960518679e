//! What Envoy Gateway makes of the chart's objects, by its own translation (`egctl`), without a cluster.

use std::process::Command;

use e2e::cache::Cache;
use e2e::kube::tools;
use e2e::tool::run;
use serde_json::{Value, json};

use super::helm::{Helm, NAMESPACE, set};

/// Objects that the translation knows.
const KINDS: [&str; 7] = [
    "Service",
    "Backend",
    "HTTPRoute",
    "EnvoyExtensionPolicy",
    "BackendTrafficPolicy",
    "ClientTrafficPolicy",
    "EnvoyPatchPolicy",
];

/// A Gateway, and a Service over engines, as somebody who installs the chart has them.
fn surroundings() -> Vec<Value> {
    let controller = json!({"controllerName": "gateway.envoyproxy.io/gatewayclass-controller"});
    let listener = json!({"name": "http", "protocol": "HTTP", "port": 80});
    let of = |api: &str, kind: &str, name: &str, spec: Value| json!({"apiVersion": api, "kind": kind, "spec": spec, "metadata": {"name": name, "namespace": NAMESPACE}});
    vec![
        json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "GatewayClass", "metadata": {"name": "eg"}, "spec": controller}),
        of(
            "gateway.networking.k8s.io/v1",
            "Gateway",
            "llm",
            json!({"gatewayClassName": "eg", "listeners": [listener]}),
        ),
        of("v1", "Service", "qwen", json!({"ports": [{"name": "http", "port": 8000}]})),
    ]
}

/// The objects of a set of values, translated to what `to` says.
fn translate(name: &str, to: &[&str]) -> Value {
    let mut objects = surroundings();
    let rendered = Helm::get().template(&set(name), &[]).unwrap();
    objects.extend(rendered.into_iter().filter(|object| KINDS.iter().any(|kind| object["kind"] == *kind)));
    for service in objects.iter_mut().filter(|object| object["kind"] == "Service") {
        // The translation has no EndpointSlices, and goes by the address that an API server would give.
        service["spec"]["clusterIP"] = json!("10.0.0.7");
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("objects.yaml");
    let documents: Vec<String> = objects.iter().map(Value::to_string).collect();
    std::fs::write(&path, documents.join("\n---\n")).unwrap();
    let egctl = tools::egctl(&Cache::from_env().unwrap()).unwrap();
    let mut command = Command::new(egctl);
    command.args(["experimental", "translate", "--from", "gateway-api", "--output", "yaml", "--to"]).args(to);
    let said = run(command.arg("--file").arg(&path).env("HOME", dir.path())).unwrap();
    serde_saphyr::from_str(&said).unwrap_or_else(|error| panic!("{error}\n{said}"))
}

/// Every value of the field `name`, however deep.
fn all<'a>(value: &'a Value, name: &str, found: &mut Vec<&'a Value>) {
    match value {
        Value::Object(fields) => {
            for (field, value) in fields {
                if field == name {
                    found.push(value);
                }
                all(value, name, found);
            }
        }
        Value::Array(items) => items.iter().for_each(|item| all(item, name, found)),
        _ => {}
    }
}

/// The one value of the field.
fn one<'a>(value: &'a Value, name: &str) -> &'a Value {
    let mut found = Vec::new();
    all(value, name, &mut found);
    assert_eq!(found.len(), 1, "{name} in {value}");
    found[0]
}

#[test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
fn envoy_gateway_accepts_every_object() {
    for name in ["original-dst", "full-duplex"] {
        let objects = translate(name, &["gateway-api"]);
        let mut conditions = Vec::new();
        all(&objects, "conditions", &mut conditions);
        let conditions: Vec<&Value> = conditions.into_iter().flat_map(|list| list.as_array().unwrap()).collect();
        let failed: Vec<_> = conditions.iter().filter(|condition| condition["status"] != "True").collect();
        assert!(failed.is_empty() && conditions.len() >= 8, "{name}: {failed:?} of {conditions:?}");
    }
}

#[test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
fn original_dst_is_what_envoy_gets() {
    let xds = translate("original-dst", &["xds", "--type", "all"]);
    assert_eq!(
        one(&xds, "originalDstLbConfig"),
        &json!({"metadataKey": {"key": "envoy.lb", "path": [{"key": "target-pod"}]}})
    );
    let mut types = Vec::new();
    all(&xds, "lbPolicy", &mut types);
    assert_eq!(types, [&json!("CLUSTER_PROVIDED")]);
    assert_eq!(
        one(&xds, "receivingNamespaces"),
        &json!({"untyped": ["envoy.lb"]}),
        "the router may write what is read"
    );
    assert_eq!(one(&xds, "failureModeAllow"), true);
    assert_eq!(one(&xds, "processingMode")["requestBodyMode"], "BUFFERED");
    let removed = one(&xds, "mutations");
    assert_eq!(removed, &json!([{"remove": "x-gateway-destination-endpoint"}, {"remove": "target-pod"}]));
}

#[test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
fn full_duplex_is_what_envoy_gets() {
    let xds = translate("full-duplex", &["xds", "--type", "all"]);
    let mode = one(&xds, "processingMode");
    for field in ["requestBodyMode", "responseBodyMode"] {
        assert_eq!(mode[field], "FULL_DUPLEX_STREAMED", "{field}");
    }
    for field in ["requestTrailerMode", "responseTrailerMode", "requestHeaderMode", "responseHeaderMode"] {
        assert_eq!(mode[field], "SEND", "{field}");
    }
    let sources = one(&xds, "overrideHostSources");
    assert_eq!(sources, &json!([{"header": "x-gateway-destination-endpoint"}]));
}
