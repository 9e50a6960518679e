//! What is said in one place holds everywhere: the router's configuration, its schema, and Envoy's side of it.

use std::collections::BTreeSet;

use e2e::cache::Cache;
use e2e::fetch;
use e2e::tool::run;
use serde_json::{Value, json};
use std::process::Command;
use warmroute::config::Config;

use super::helm::{FULLNAME, Helm, chart, configuration, documents, names, object, of_kind, set, sets};

#[test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
fn every_set_of_values_lints_and_renders_each_object_once() {
    let helm = Helm::get();
    helm.run(&["lint", "--strict", chart().to_str().unwrap()]).unwrap();
    for (name, file) in sets() {
        helm.run(&["lint", "--strict", chart().to_str().unwrap(), "--values", file.to_str().unwrap()]).unwrap();
        let objects = helm.template(&file, &[]).unwrap_or_else(|error| panic!("{name}: {error:#}"));
        let all = names(&objects);
        assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), all.len(), "{name} has an object twice: {all:?}");
        for object in &objects {
            let labels = &object["metadata"]["labels"];
            let standard = ["name", "instance", "version", "managed-by"];
            for label in standard.map(|label| format!("app.kubernetes.io/{label}")) {
                assert!(labels[&label].is_string(), "{name}: no {label} on {object}");
            }
            let namespace = object["metadata"]["namespace"].as_str();
            assert!(namespace.is_some(), "{name}: an object without a namespace goes wherever kubectl is: {object}");
        }
    }
}

#[test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
fn without_a_gateway_nothing_but_the_router_is_installed() {
    let objects = Helm::get().template(&set("static"), &[]).unwrap();
    let kinds: BTreeSet<&str> = objects.iter().map(|object| object["kind"].as_str().unwrap()).collect();
    let own = ["ConfigMap", "Deployment", "NetworkPolicy", "Pod", "PodDisruptionBudget", "Service", "ServiceAccount"];
    assert_eq!(kinds, BTreeSet::from(own), "the default install changes what is there");
}

/// What a release's configuration says where the set of values says `everything-values.yaml`'s name.
fn config_of(name: &str, objects: &[Value]) -> Config {
    let fullname = if name == "everything" { "warm" } else { FULLNAME };
    let yaml = configuration(objects, fullname);
    Config::parse(&yaml, []).unwrap_or_else(|error| panic!("{name}: {error}\n{yaml}"))
}

#[test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
fn router_takes_every_configuration_that_the_chart_writes() {
    let helm = Helm::get();
    for (name, file) in sets() {
        let config = config_of(&name, &helm.template(&file, &[]).unwrap());
        let port = |address: std::net::SocketAddr| (address.ip().is_unspecified(), address.port());
        assert_eq!(port(config.listen.extproc), (true, 9002), "{name}");
        assert_eq!(port(config.listen.admin), (true, 9090), "{name}");
        if name != "everything" {
            let siblings: Vec<String> = config.events.siblings.iter().map(ToString::to_string).collect();
            assert_eq!(siblings, [format!("http://{FULLNAME}-headless.llm.svc:9090")], "{name}");
        }
    }
}

#[test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
fn what_routers_notice_themselves_replaces_no_pod() {
    let helm = Helm::get();
    let pods = |settings: &[&str]| {
        let objects = helm.template(&set("static"), settings).unwrap();
        let template = object(&objects, "Deployment", FULLNAME)["spec"]["template"].clone();
        (template, configuration(&objects, FULLNAME))
    };
    let (before, configured) = pods(&[]);
    for setting in ["config.rollout.mode=off", "config.models[0].rollout.percent=5", "config.log.filter=debug"] {
        let (after, reconfigured) = pods(&[setting]);
        assert!(before == after && configured != reconfigured, "{setting}");
    }
    assert_ne!(pods(&["config.shutdown.grace=20s"]).0, before, "others take effect at a start");
    let mounts = before["spec"]["containers"][0]["volumeMounts"].as_array().unwrap();
    let mount = mounts.iter().find(|mount| mount["name"] == "config").unwrap();
    assert!(mount["subPath"].is_null(), "the kubelet never changes what is mounted by subPath: {mount}");
}

/// Paths of all settings below `value`, lists as if they had one item; `null`s included.
fn paths(value: &Value, path: &str, found: &mut BTreeSet<String>) {
    match value {
        Value::Object(fields) => {
            fields.iter().for_each(|(name, value)| paths(value, &format!("{path}.{name}"), found));
        }
        Value::Array(items) if items.iter().any(Value::is_object) => {
            items.iter().for_each(|item| paths(item, &format!("{path}[]"), found));
        }
        _ => drop(found.insert(path.to_owned())),
    }
}

/// The same of a schema.
fn schema_paths(schema: &Value, root: &Value, path: &str, found: &mut BTreeSet<String>) {
    if let Some(name) = schema["$ref"].as_str() {
        return schema_paths(root.pointer(&name[1..]).unwrap(), root, path, found);
    }
    if let Some(fields) = schema["properties"].as_object() {
        assert_eq!(schema["additionalProperties"], false, "{path} takes anything");
        return fields.iter().for_each(|(name, field)| schema_paths(field, root, &format!("{path}.{name}"), found));
    }
    match &schema["items"] {
        items if items["properties"].is_object() || items["$ref"].is_string() => {
            schema_paths(items, root, &format!("{path}[]"), found);
        }
        _ => drop(found.insert(path.to_owned())),
    }
}

#[test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
fn schema_knows_every_setting_of_the_router_and_no_other() {
    let helm = Helm::get();
    let mut settings = BTreeSet::new();
    for (name, file) in sets() {
        let config = config_of(&name, &helm.template(&file, &[]).unwrap());
        paths(&serde_saphyr::from_str(&config.to_yaml()).unwrap(), "config", &mut settings);
    }
    // A list that is empty in one set and has items in another.
    let prefixes: Vec<String> = settings.iter().filter_map(|path| Some(path.rsplit_once("[]")?.0.to_owned())).collect();
    settings.retain(|path| !prefixes.contains(path));
    let schema: Value =
        serde_json::from_str(&std::fs::read_to_string(chart().join("values.schema.json")).unwrap()).unwrap();
    let mut known = BTreeSet::new();
    schema_paths(&schema["properties"]["config"], &schema, "config", &mut known);
    assert_eq!(known, settings);
}

#[test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
fn numbers_of_the_configuration_are_those_of_envoy_gateway() {
    let objects = Helm::get().template(&set("gateway"), &[]).unwrap();
    let extension = &object(&objects, "EnvoyExtensionPolicy", FULLNAME)["spec"];
    let ext_proc = &extension["extProc"][0];
    assert_eq!((&ext_proc["messageTimeout"], &ext_proc["failOpen"]), (&json!("2s"), &json!(true)));
    assert_eq!(ext_proc["processingMode"]["request"]["body"], "Buffered");
    let attributes = json!(["upstream.address", "upstream.request_attempt_count"]);
    assert_eq!(ext_proc["processingMode"]["response"], json!({"attributes": attributes}), "headers, and no body");
    assert_eq!(ext_proc["backendRefs"][0]["name"], FULLNAME);
    let targets: Vec<&str> =
        extension["targetRefs"].as_array().unwrap().iter().map(|target| target["name"].as_str().unwrap()).collect();
    assert_eq!(targets, ["r-warmroute-qwen", "r-warmroute-llama"], "the route with extProc: false is left alone");
    let traffic = &object(&objects, "BackendTrafficPolicy", FULLNAME)["spec"];
    assert_eq!(traffic["targetRefs"], extension["targetRefs"]);
    let header = json!([{"header": "x-gateway-destination-endpoint"}]);
    assert_eq!(traffic["loadBalancer"]["endpointOverride"]["extractFrom"], header);
    let client = object(&objects, "ClientTrafficPolicy", FULLNAME);
    assert_eq!(client["metadata"]["namespace"], "gateways", "a policy and its Gateway are in one namespace");
    assert_eq!(client["spec"]["connection"]["bufferLimit"], "16777216");
    assert_eq!(client["spec"]["http2"]["initialStreamWindowSize"], "16777216", "the buffer limit of HTTP/2");
    let removed = json!(["x-gateway-destination-endpoint", "target-pod"]);
    assert_eq!(client["spec"]["headers"]["earlyRequestHeaders"]["remove"], removed);
    let grant = object(&objects, "ReferenceGrant", "r-warmroute.llm");
    assert_eq!(grant["metadata"]["namespace"], "engines");
    assert_eq!(grant["spec"]["to"], json!([{"group": "", "kind": "Service", "name": "llama"}]));
}

#[test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
fn a_header_of_ones_own_is_read_and_removed_everywhere() {
    let helm = Helm::get();
    let objects = helm.template(&set("gateway"), &["config.selection.header=x-pod"]).unwrap();
    let traffic = object(&objects, "BackendTrafficPolicy", FULLNAME);
    assert_eq!(traffic["spec"]["loadBalancer"]["endpointOverride"]["extractFrom"][0]["header"], "x-pod");
    let client = object(&objects, "ClientTrafficPolicy", FULLNAME);
    let removed = client["spec"]["headers"]["earlyRequestHeaders"]["remove"].as_array().unwrap();
    assert!(removed.contains(&json!("x-pod")) && removed.contains(&json!("target-pod")), "{removed:?}");
}

#[test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
fn original_dst_reads_the_metadata_that_no_client_can_send() {
    let objects = Helm::get().template(&set("original-dst"), &[]).unwrap();
    let traffic = &object(&objects, "BackendTrafficPolicy", FULLNAME)["spec"];
    assert!(traffic["loadBalancer"].is_null(), "there is nothing to balance: {traffic}");
    let metadata = &object(&objects, "EnvoyExtensionPolicy", FULLNAME)["spec"]["extProc"][0]["metadata"];
    assert_eq!(metadata["writableNamespaces"], json!(["envoy.lb"]));
    let patches = object(&objects, "EnvoyPatchPolicy", FULLNAME)["spec"]["jsonPatches"].as_array().unwrap().clone();
    assert!(patches.iter().all(|patch| patch["name"] == "httproute/llm/r-warmroute-qwen/rule/0"), "{patches:?}");
    let key = json!({"key": "envoy.lb", "path": [{"key": "target-pod"}]});
    assert_eq!(patches.last().unwrap()["operation"]["value"]["metadata_key"], key);
}

#[test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
fn full_duplex_fails_closed_and_has_the_answers_bodies_too() {
    let objects = Helm::get().template(&set("full-duplex"), &[]).unwrap();
    let ext_proc = &object(&objects, "EnvoyExtensionPolicy", FULLNAME)["spec"]["extProc"][0];
    assert_eq!(ext_proc["failOpen"], false);
    let bodies = ["request", "response"].map(|step| &ext_proc["processingMode"][step]["body"]);
    assert_eq!(bodies, [&json!("FullDuplexStreamed"); 2]);
    let backend = json!({"group": "gateway.envoyproxy.io", "kind": "Backend", "name": "qwen"});
    assert_eq!(object(&objects, "HTTPRoute", "r-warmroute-qwen")["spec"]["rules"][0]["backendRefs"], json!([backend]));
}

#[test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
fn a_pool_is_picked_for_by_the_router() {
    let objects = Helm::get().template(&set("inferencepool"), &[]).unwrap();
    let pool = &object(&objects, "InferencePool", "qwen")["spec"];
    assert_eq!(
        (&pool["endpointPickerRef"]["name"], &pool["endpointPickerRef"]["port"]["number"]),
        (&json!(FULLNAME), &json!(9002))
    );
    assert_eq!(pool["selector"]["matchLabels"], json!({"app": "qwen"}));
    let route = &object(&objects, "HTTPRoute", "r-warmroute-pool")["spec"];
    assert_eq!(route["rules"][0]["backendRefs"][0]["kind"], "InferencePool");
    assert_eq!(of_kind(&objects, "EnvoyExtensionPolicy").count(), 0, "the gateway makes its own filter");
}

#[test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
fn envoy_takes_the_configuration_of_the_sidecar() {
    let helm = Helm::get();
    let envoy = fetch::envoy(&Cache::from_env().unwrap()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    for settings in [
        &[][..],
        &["config.selection.mode=original_dst"],
        &["config.selection.body_mode=full_duplex_streamed", "config.limits.body_bytes=1048576"],
        &["config.listen.extproc=[::]:9002", "config.envoy.message_timeout=1m500ms"],
        &["envoyGateway.connectTimeout=500ms", "envoyGateway.clientTrafficPolicy.streamIdleTimeout=10m"],
    ] {
        let objects = helm.template(&set("sidecar"), settings).unwrap();
        let text = object(&objects, "ConfigMap", &format!("{FULLNAME}-envoy"))["data"]["envoy.yaml"].as_str().unwrap();
        let path = dir.path().join("envoy.yaml");
        std::fs::write(&path, text).unwrap();
        run(Command::new(&envoy).args(["--mode", "validate", "--config-path"]).arg(&path)).unwrap();
        let config = documents(text).unwrap().remove(0);
        let listener = &config["static_resources"]["listeners"][0];
        let is_small = settings.contains(&"config.limits.body_bytes=1048576");
        assert_eq!(listener["per_connection_buffer_limit_bytes"], if is_small { 1 << 20 } else { 32 << 20 });
        let manager = &listener["filter_chains"][0]["filters"][0]["typed_config"];
        let window = &manager["http2_protocol_options"]["initial_stream_window_size"];
        assert_eq!(window, &listener["per_connection_buffer_limit_bytes"], "the buffer limit of HTTP/2");
        assert_eq!(manager["stream_idle_timeout"], "600s");
        let is_quick = settings.contains(&"envoyGateway.connectTimeout=500ms");
        let cluster = &config["static_resources"]["clusters"][0];
        assert_eq!(cluster["connect_timeout"], if is_quick { "0.5s" } else { "2s" });
        let filter = &manager["http_filters"][0]["typed_config"];
        let is_long = settings.contains(&"config.envoy.message_timeout=1m500ms");
        assert_eq!(filter["message_timeout"], if is_long { "60.5s" } else { "1s" });
    }
}
