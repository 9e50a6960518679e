//! Envoy Gateway on the API server: what becomes of the chart's resources, and of Envoy.

use std::time::{Duration, Instant};

use e2e::cache::Cache;
use e2e::kube::gateway::{CONTROLLER, GatewayEnvoy, InCluster};
use e2e::kube::{Cluster, ClusterOptions, chart};
use reqwest::Method;
use serde_json::{Value, json};

const DEADLINE: Duration = Duration::from_secs(60);
/// What the load balancer of every Gateway is told to be at.
const ADDRESS: &str = "192.0.2.1";
const EXTENSIONS: &str = "type.googleapis.com/envoy.extensions";
/// Kinds of the chart that Envoy Gateway gives conditions, with the path of their API.
const KINDS: [(&str, &str); 5] = [
    ("gateway.networking.k8s.io/v1", "httproutes"),
    ("gateway.envoyproxy.io/v1alpha1", "backendtrafficpolicies"),
    ("gateway.envoyproxy.io/v1alpha1", "clienttrafficpolicies"),
    ("gateway.envoyproxy.io/v1alpha1", "envoyextensionpolicies"),
    ("gateway.envoyproxy.io/v1alpha1", "envoypatchpolicies"),
];

/// A namespace with a Gateway of its own and the chart behind it.
struct Installed {
    namespace: &'static str,
    envoy: GatewayEnvoy,
}

/// Installs the chart with `selection`, behind a Gateway that does not fail open if the mode forbids it, and runs the
/// Gateway's Envoy.
async fn install(
    cache: &Cache,
    cluster: &Cluster,
    gateway: &InCluster,
    namespace: &'static str,
    selection: &Value,
) -> Installed {
    cluster.create_namespace(namespace).await.unwrap();
    let manifest = json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
        "metadata": {"name": namespace, "namespace": namespace},
        "spec": {"gatewayClassName": "llm", "listeners": [{"name": "http", "protocol": "HTTP", "port": 80}]}});
    cluster.apply(&manifest.to_string()).await.unwrap();
    let fails_open = selection["body_mode"] != "full_duplex_streamed";
    let values = json!({
        "config": {"selection": selection, "models": [{"name": "qwen", "discovery": {"kubernetes": {"preset": "aibrix"}}}]},
        "envoyGateway": {
            "gateway": {"name": namespace},
            "failOpen": fails_open,
            "routes": [{"name": "qwen", "backends": [{"name": "qwen", "port": 8000}]}],
        },
        "engineServices": [{"name": "qwen", "selector": {"model.aibrix.ai/name": "qwen"}, "port": 8000}],
    });
    chart::install(cache, cluster, "warmroute", namespace, &values).await.unwrap();
    // The controller of EndpointSlices would make these of the pods.
    for (service, port_name, port) in [("qwen", "http", 8000), ("warmroute", "grpc-extproc", 9002)] {
        cluster.apply(&endpoints(cluster, namespace, service, port_name, port).await.to_string()).await.unwrap();
    }
    let envoy = gateway.run_envoy(cluster, namespace, ADDRESS).await.unwrap();
    Installed { namespace, envoy }
}

/// An EndpointSlice with one address, under the name that the Service has for the port.
async fn endpoints(cluster: &Cluster, namespace: &str, service: &str, port_name: &str, port: u16) -> Value {
    let path = format!("/api/v1/namespaces/{namespace}/services/{service}");
    let object = cluster.request(Method::GET, &path, None).await.unwrap();
    let ports = object["spec"]["ports"].as_array().unwrap();
    let named = ports.iter().find(|found| found["port"] == port).unwrap_or_else(|| panic!("no port {port}: {object}"));
    assert_eq!(named["name"], port_name, "{object}");
    json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": service, "namespace": namespace, "labels": {"kubernetes.io/service-name": service}},
        "ports": [{"name": port_name, "port": port, "protocol": "TCP"}],
        "endpoints": [{"addresses": ["10.0.0.11"], "conditions": {"ready": true}}]})
}

/// All conditions in `status`, whomever they are for, as `Type=Status (reason: message)`.
fn conditions(status: &Value) -> Vec<String> {
    match status {
        Value::Object(fields) if fields.contains_key("lastTransitionTime") => {
            let text = |name: &str| fields[name].as_str().unwrap_or_default();
            vec![format!("{}={} ({}: {})", text("type"), text("status"), text("reason"), text("message"))]
        }
        Value::Object(fields) => fields.values().flat_map(conditions).collect(),
        Value::Array(values) => values.iter().flat_map(conditions).collect(),
        _ => Vec::new(),
    }
}

/// Waits until the object has these conditions, and no other that is false.
async fn accepted(cluster: &Cluster, path: &str, expected: &[&str]) {
    let start = Instant::now();
    loop {
        let object = cluster.request(Method::GET, path, None).await.unwrap();
        let found = conditions(&object["status"]);
        let holds = |name: &&str| found.iter().any(|condition| condition.starts_with(&format!("{name}=True")));
        if expected.iter().all(holds) && !found.iter().any(|condition| condition.contains("=False")) {
            return;
        }
        assert!(start.elapsed() < DEADLINE, "{path} has {found:#?}, expected {expected:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// That every object of the chart in the namespace is taken; returns how many.
async fn all_accepted(cluster: &Cluster, namespace: &str) -> usize {
    let gateway = format!("/apis/gateway.networking.k8s.io/v1/namespaces/{namespace}/gateways/{namespace}");
    accepted(cluster, &gateway, &["Accepted", "Programmed", "ResolvedRefs"]).await;
    let mut n_objects = 0;
    for (api, kind) in KINDS {
        let list = format!("/apis/{api}/namespaces/{namespace}/{kind}");
        let objects = cluster.request(Method::GET, &list, None).await.unwrap();
        for object in objects["items"].as_array().unwrap() {
            let expected: &[&str] = match kind {
                "httproutes" => &["Accepted", "ResolvedRefs"],
                "envoypatchpolicies" => &["Accepted", "Programmed"],
                _ => &["Accepted"],
            };
            accepted(cluster, &format!("{list}/{}", object["metadata"]["name"].as_str().unwrap()), expected).await;
            n_objects += 1;
        }
    }
    n_objects
}

/// Every object of a type (the end of its `@type`) in Envoy's configuration.
fn of_type<'a>(config: &'a Value, name: &str) -> Vec<&'a Value> {
    let within: Vec<&Value> = match config {
        Value::Object(fields) => fields.values().flat_map(|value| of_type(value, name)).collect(),
        Value::Array(values) => values.iter().flat_map(|value| of_type(value, name)).collect(),
        _ => Vec::new(),
    };
    let itself = config["@type"].as_str().is_some_and(|found| found == format!("{EXTENSIONS}.{name}"));
    itself.then_some(config).into_iter().chain(within).collect()
}

const EXT_PROC: &str = "filters.http.ext_proc.v3.ExternalProcessor";

/// Envoy's configuration once the router's filter is in it.
async fn configured(installed: &Installed) -> Value {
    let has_filter = |config: &Value| !of_type(config, EXT_PROC).is_empty();
    installed.envoy.config_when(DEADLINE, has_filter).await.unwrap_or_else(|error| {
        panic!("{}: {error:#}; {}", installed.namespace, std::fs::read_to_string(installed.envoy.log()).unwrap())
    })
}

/// The cluster of the route, as Envoy has it.
fn route_cluster<'a>(config: &'a Value, namespace: &str) -> &'a Value {
    let name = format!("httproute/{namespace}/warmroute-qwen/rule/0");
    let all =
        config["configs"].as_array().unwrap().iter().filter_map(|part| part["dynamic_active_clusters"].as_array());
    let found = all.flatten().find(|cluster| cluster["cluster"]["name"] == *name);
    &found.unwrap_or_else(|| panic!("Envoy has no cluster {name}"))["cluster"]
}

/// What every mode has: a client's routing headers are gone before any filter, and bodies of the chart's size pass.
fn assert_guarded(config: &Value) {
    let mutations = of_type(config, "http.early_header_mutation.header_mutation.v3.HeaderMutation");
    let removed = json!([{"remove": "x-gateway-destination-endpoint"}, {"remove": "target-pod"}]);
    assert!(mutations.iter().any(|mutation| mutation["mutations"] == removed), "{mutations:?}");
    assert!(config.to_string().contains(r#""per_connection_buffer_limit_bytes":33554432"#), "the limit of bodies");
    assert!(config.to_string().contains(r#""initial_stream_window_size":33554432"#), "the limit of HTTP/2 bodies");
}

#[tokio::test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
async fn every_resource_of_the_chart_is_taken_and_programs_envoy() {
    let cache = Cache::from_env().unwrap();
    let cluster = Cluster::start(&cache, ClusterOptions { crds: true, ..ClusterOptions::default() }).await.unwrap();
    let gateway = InCluster::start(&cache, &cluster).await.unwrap();
    let class = json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "GatewayClass",
                       "metadata": {"name": "llm"}, "spec": {"controllerName": CONTROLLER}});
    cluster.apply(&class.to_string()).await.unwrap();
    accepted(&cluster, "/apis/gateway.networking.k8s.io/v1/gatewayclasses/llm", &["Accepted"]).await;
    override_host(&cache, &cluster, &gateway).await;
    original_dst(&cache, &cluster, &gateway).await;
    full_duplex(&cache, &cluster, &gateway).await;
}

async fn override_host(cache: &Cache, cluster: &Cluster, gateway: &InCluster) {
    let installed = install(cache, cluster, gateway, "named", &json!({"mode": "override_host"})).await;
    assert_eq!(all_accepted(cluster, "named").await, 4, "a route and three policies");
    let config = configured(&installed).await;
    assert_guarded(&config);
    let filter = of_type(&config, EXT_PROC)[0];
    assert_eq!(filter["processing_mode"]["request_body_mode"], "BUFFERED");
    assert_eq!(filter["processing_mode"]["response_header_mode"], "SEND");
    assert_eq!((&filter["failure_mode_allow"], &filter["message_timeout"]), (&json!(true), &json!("1s")));
    assert_eq!(filter["response_attributes"], json!(["upstream.address", "upstream.request_attempt_count"]));
    let policies = of_type(route_cluster(&config, "named"), "load_balancing_policies.override_host.v3.OverrideHost");
    assert_eq!(policies.len(), 1, "{}", route_cluster(&config, "named"));
    assert_eq!(policies[0]["override_host_sources"], json!([{"header": "x-gateway-destination-endpoint"}]));
    let fallback = of_type(&policies[0]["fallback_policy"], "load_balancing_policies.least_request.v3.LeastRequest");
    assert_eq!(fallback.len(), 1, "{}", policies[0]);
}

async fn original_dst(cache: &Cache, cluster: &Cluster, gateway: &InCluster) {
    let installed = install(cache, cluster, gateway, "dialled", &json!({"mode": "original_dst"})).await;
    assert_eq!(all_accepted(cluster, "dialled").await, 5, "a route, three policies and a patch");
    let config = configured(&installed).await;
    assert_guarded(&config);
    let filter = of_type(&config, EXT_PROC)[0];
    assert_eq!(filter["metadata_options"]["receiving_namespaces"]["untyped"], json!(["envoy.lb"]), "{filter}");
    let cluster = route_cluster(&config, "dialled");
    assert_eq!((&cluster["type"], &cluster["lb_policy"]), (&json!("ORIGINAL_DST"), &json!("CLUSTER_PROVIDED")));
    let key = json!({"key": "envoy.lb", "path": [{"key": "target-pod"}]});
    assert_eq!(cluster["original_dst_lb_config"]["metadata_key"], key, "{cluster}");
}

async fn full_duplex(cache: &Cache, cluster: &Cluster, gateway: &InCluster) {
    let selection = json!({"mode": "override_host", "body_mode": "full_duplex_streamed"});
    let installed = install(cache, cluster, gateway, "streamed", &selection).await;
    assert_eq!(all_accepted(cluster, "streamed").await, 4, "a route and three policies");
    let config = configured(&installed).await;
    assert_guarded(&config);
    let filter = of_type(&config, EXT_PROC)[0];
    for body in ["request_body_mode", "response_body_mode"] {
        assert_eq!(filter["processing_mode"][body], "FULL_DUPLEX_STREAMED", "{filter}");
    }
    assert!(filter["failure_mode_allow"].as_bool() != Some(true), "{filter}");
}
