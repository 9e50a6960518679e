//! A real Envoy, configured from one of `envoy/static-*.yaml`.
//!
//! The files stay valid examples of their own; here they become a tree of values in which ports, endpoints
//! and the policy are replaced, and are written as JSON, which Envoy reads as well.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::service::{Service, free_addresses};

/// Response header in which the harness has Envoy name the engine that served.
pub const SERVED_BY: &str = "x-served-by";

const START_DEADLINE: Duration = Duration::from_secs(20);
/// Where the HTTP connection manager is.
const MANAGER: &str = "/static_resources/listeners/0/filter_chains/0/filters/0/typed_config";
const TYPES: &str = "type.googleapis.com/envoy.extensions";

/// Who chooses the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Balancing {
    /// warmroute at this address.
    Warmroute(SocketAddr, Gateway),
    /// Envoy alone, in turn.
    RoundRobin,
    /// Envoy alone, the less busy of two random ones.
    LeastRequest,
}

impl Balancing {
    /// Whether Envoy's cluster has a list of hosts.
    fn has_hosts(self) -> bool {
        !matches!(self, Self::Warmroute(_, Gateway::OriginalDst))
    }
}

/// How Envoy works with warmroute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Gateway {
    /// Bodies are buffered; `override_host` dials hosts of the cluster, and `least_request` picks where nobody is named.
    #[default]
    OverrideHost,
    /// The same with bodies in full duplex, both ways, and a health check of the router.
    FullDuplex,
    /// Bodies are buffered; Envoy dials whatever it is told.
    OriginalDst,
}

/// A running Envoy; it ends when it is dropped.
#[derive(Debug)]
pub struct Envoy {
    service: Service,
    address: SocketAddr,
    admin: SocketAddr,
}

impl Envoy {
    /// Starts `binary` on free ports, with its configuration and log in `dir`, and waits until it is ready.
    ///
    /// # Errors
    /// When the example cannot be read, or when Envoy does not accept what was made of it.
    pub async fn start(binary: &Path, dir: &Path, balancing: Balancing, engines: &[SocketAddr]) -> Result<Self> {
        Self::start_traced(binary, dir, balancing, engines, None).await
    }

    /// As [`Self::start`], and makes a trace of every request if there is a collector.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub async fn start_traced(
        binary: &Path,
        dir: &Path,
        balancing: Balancing,
        engines: &[SocketAddr],
        collector: Option<SocketAddr>,
    ) -> Result<Self> {
        let [address, admin] = free_addresses()?;
        let mut config = bootstrap(&example(balancing)?, &Ports { address, admin }, balancing, engines)?;
        if let Some(collector) = collector {
            trace_to(&mut config, collector)?;
        }
        let file = dir.join("envoy.json");
        std::fs::write(&file, serde_json::to_vec_pretty(&config)?)?;
        let mut command = Command::new(binary);
        command.arg("-c").arg(&file).arg("--use-dynamic-base-id").args(["--concurrency", "1"]);
        let service = Service::start("envoy", command, &dir.join("envoy.log"))?;
        service.wait_ready(&format!("http://{admin}/ready"), START_DEADLINE).await?;
        Ok(Self { service, address, admin })
    }

    /// Where clients come in.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The admin interface.
    pub fn admin(&self) -> SocketAddr {
        self.admin
    }

    /// The program, for its memory and processor time.
    pub fn service(&self) -> &Service {
        &self.service
    }
}

struct Ports {
    address: SocketAddr,
    admin: SocketAddr,
}

fn example(balancing: Balancing) -> Result<Value> {
    let name = match balancing {
        Balancing::Warmroute(_, Gateway::OriginalDst) => "static-original-dst.yaml",
        Balancing::Warmroute(_, Gateway::FullDuplex) => "static-full-duplex.yaml",
        _ => "static-override-host.yaml",
    };
    read(name)
}

fn read(name: &str) -> Result<Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../envoy").join(name);
    let text = std::fs::read_to_string(&path);
    let text = text.with_context(|| format!("cannot read {}", path.display()))?;
    serde_saphyr::from_str(&text).with_context(|| format!("{} is not YAML", path.display()))
}

fn bootstrap(example: &Value, ports: &Ports, balancing: Balancing, engines: &[SocketAddr]) -> Result<Value> {
    let mut config = example.clone();
    *at(&mut config, "/admin/address")? = address(ports.admin);
    *at(&mut config, "/static_resources/listeners/0/address")? = address(ports.address);
    at(&mut config, &format!("{MANAGER}/route_config"))?["response_headers_to_add"] =
        json!([{"header": {"key": SERVED_BY, "value": "%UPSTREAM_REMOTE_ADDRESS%"}}]);
    let pods = cluster(&mut config, "pods")?;
    if balancing.has_hosts() {
        pods["load_assignment"]["endpoints"][0]["lb_endpoints"] = lb_endpoints(engines);
    }
    let policy = match balancing {
        Balancing::Warmroute(router, _) => return warmroute(config, router),
        Balancing::RoundRobin => ("round_robin", "RoundRobin"),
        Balancing::LeastRequest => ("least_request", "LeastRequest"),
    };
    pods["load_balancing_policy"] = plain_policy(policy);
    let filters = at(&mut config, &format!("{MANAGER}/http_filters"))?;
    let filters = filters.as_array_mut().context("http_filters is not a list")?;
    filters.retain(|filter| filter["name"] != "envoy.filters.http.ext_proc");
    let routes = at(&mut config, &format!("{MANAGER}/route_config/virtual_hosts/0/routes"))?;
    for route in routes.as_array_mut().context("routes is not a list")? {
        route.as_object_mut().context("a route is not a map")?.remove("typed_per_filter_config");
    }
    Ok(config)
}

fn warmroute(mut config: Value, router: SocketAddr) -> Result<Value> {
    let ext_proc = cluster(&mut config, "ext_proc")?;
    ext_proc["load_assignment"]["endpoints"][0]["lb_endpoints"] = lb_endpoints(&[router]);
    Ok(config)
}

/// Adds what `envoy/tracing.yaml` says, for every request.
fn trace_to(config: &mut Value, collector: SocketAddr) -> Result<()> {
    let mut parts = read("tracing.yaml")?;
    *at(&mut parts, "/tracing/random_sampling/value")? = json!(100);
    *at(&mut parts, "/cluster/load_assignment/endpoints/0/lb_endpoints")? = lb_endpoints(&[collector]);
    at(config, MANAGER)?["tracing"] = parts["tracing"].take();
    let clusters = at(config, "/static_resources/clusters")?.as_array_mut().context("clusters is not a list")?;
    clusters.push(parts["cluster"].take());
    Ok(())
}

fn plain_policy((name, message): (&str, &str)) -> Value {
    json!({"policies": [{"typed_extension_config": {
        "name": format!("envoy.load_balancing_policies.{name}"),
        "typed_config": {"@type": format!("{TYPES}.load_balancing_policies.{name}.v3.{message}")},
    }}]})
}

fn cluster<'a>(config: &'a mut Value, name: &str) -> Result<&'a mut Value> {
    let clusters = at(config, "/static_resources/clusters")?.as_array_mut().context("clusters is not a list")?;
    let found = clusters.iter_mut().find(|cluster| cluster["name"] == name);
    found.with_context(|| format!("the example has no cluster {name:?}"))
}

fn at<'a>(config: &'a mut Value, pointer: &str) -> Result<&'a mut Value> {
    config.pointer_mut(pointer).with_context(|| format!("the example has no {pointer}"))
}

fn lb_endpoints(addresses: &[SocketAddr]) -> Value {
    addresses.iter().map(|endpoint| json!({"endpoint": {"address": address(*endpoint)}})).collect()
}

fn address(address: SocketAddr) -> Value {
    json!({"socket_address": {"address": address.ip().to_string(), "port_value": address.port()}})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(balancing: Balancing) -> Value {
        let [address, admin, engine] = [1, 2, 3].map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
        bootstrap(&example(balancing).unwrap(), &Ports { address, admin }, balancing, &[engine, engine]).unwrap()
    }

    #[test]
    fn example_is_changed_only_in_what_the_harness_replaces() {
        let config = made(Balancing::Warmroute(SocketAddr::from(([127, 0, 0, 1], 4)), Gateway::OverrideHost));
        assert_eq!(config.pointer("/admin/address/socket_address/port_value"), Some(&json!(2)));
        let pods = &config["static_resources"]["clusters"][0];
        assert_eq!(pods["load_assignment"]["endpoints"][0]["lb_endpoints"].as_array().unwrap().len(), 2);
        let router = &config["static_resources"]["clusters"][1]["load_assignment"];
        assert!(router.to_string().contains(r#""port_value":4"#));
        assert_eq!(
            pods["circuit_breakers"], config["static_resources"]["clusters"][1]["circuit_breakers"],
            "the anchor is resolved"
        );
    }

    #[test]
    fn tracing_is_added_as_its_example_says() {
        let mut config = made(Balancing::LeastRequest);
        trace_to(&mut config, SocketAddr::from(([127, 0, 0, 1], 9))).unwrap();
        let tracing = &config.pointer(MANAGER).unwrap()["tracing"];
        assert_eq!(tracing["random_sampling"]["value"], 100);
        assert_eq!(tracing["provider"]["typed_config"]["grpc_service"]["envoy_grpc"]["cluster_name"], "otel_collector");
        let clusters = config["static_resources"]["clusters"].as_array().unwrap();
        let collector = clusters.iter().find(|cluster| cluster["name"] == "otel_collector").unwrap();
        assert!(collector["load_assignment"].to_string().contains(r#""port_value":9"#), "{collector}");
    }

    #[test]
    fn rivals_are_plain_envoy() {
        for balancing in [Balancing::RoundRobin, Balancing::LeastRequest] {
            let text = made(balancing).to_string();
            assert!(!text.contains("http.ext_proc"), "{text}");
            assert!(!text.contains("OverrideHost"), "{text}");
        }
    }
}
