//! Which endpoints a Service's EndpointSlices list.
//!
//! Slices know neither labels nor restarts: all of their endpoints publish KV events, or none does, and a restarted
//! engine is noticed because it is not ready in between.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use super::resources::{EndpointSlice, SliceEndpoint};
use crate::discovery::listed::{DEFAULT_PORT, EventPorts, Listed};

/// How the slices of a Service are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SliceRules {
    /// Port of the engines; none: the slices' own.
    pub port: Option<u16>,
    /// Where they publish KV events.
    pub events: EventPorts,
}

/// The endpoints of all slices. One that is in two slices, as happens while the controller moves it, is listed once;
/// one with addresses of both families has the IPv4 one.
pub(super) fn endpoints<'a>(slices: impl IntoIterator<Item = &'a EndpointSlice>, rules: SliceRules) -> Vec<Listed> {
    let mut by_target: BTreeMap<(String, u16), Listed> = BTreeMap::new();
    for slice in slices.into_iter().filter(|slice| matches!(slice.address_type.as_str(), "IPv4" | "IPv6")) {
        let port = rules.port.unwrap_or_else(|| port(slice));
        for (ip, uid) in slice.endpoints.iter().flatten().filter_map(serving) {
            let sources = rules.events.sources(ip, 0);
            let address = SocketAddr::new(ip, port);
            let listed = Listed { identity: format!("{uid}@{ip}"), ..Listed::at(address, sources) };
            let target = (if uid.is_empty() { ip.to_string() } else { uid.to_owned() }, port);
            match by_target.get(&target) {
                Some(known) if known.address.is_ipv4() || address.is_ipv6() => {}
                _ => drop(by_target.insert(target, listed)),
            }
        }
    }
    by_target.into_values().collect()
}

/// Address and UID of an endpoint that may be sent requests. Unknown readiness means ready (API reference of
/// `EndpointConditions`); all addresses of an endpoint are the same one.
fn serving(endpoint: &SliceEndpoint) -> Option<(IpAddr, &str)> {
    let is_ready = endpoint.conditions.ready.unwrap_or(true) && !endpoint.conditions.terminating.unwrap_or(false);
    let ip: IpAddr = endpoint.addresses.first()?.parse().ok()?;
    let uid = endpoint.target_ref.as_ref().map_or("", |target| &target.uid);
    (is_ready && !ip.is_unspecified()).then_some((ip, uid))
}

/// The one port that a slice has, or the one called `http`, or the first.
fn port(slice: &EndpointSlice) -> u16 {
    let is_tcp = |protocol: &Option<String>| protocol.as_deref().is_none_or(|protocol| protocol == "TCP");
    let mut ports = slice.ports.iter().flatten().filter(|port| is_tcp(&port.protocol));
    let first = ports.clone().find_map(|port| port.port);
    let http = ports.find(|port| port.name.as_deref() == Some("http")).and_then(|port| port.port);
    http.or(first).unwrap_or(DEFAULT_PORT)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const RULES: SliceRules = SliceRules { port: None, events: EventPorts { events: 5557, replay: 5558, ranks: 1 } };

    fn slice(kind: &str, ports: &Value, endpoints: &Value) -> EndpointSlice {
        let slice = json!({
            "metadata": {"name": "s", "uid": "s"}, "addressType": kind, "ports": ports, "endpoints": endpoints});
        serde_json::from_value(slice).expect("a slice")
    }

    fn endpoint(ip: &str, uid: &str, conditions: &Value) -> Value {
        json!({"addresses": [ip], "conditions": conditions, "targetRef": {"kind": "Pod", "name": uid, "uid": uid}})
    }

    fn addresses(slices: &[EndpointSlice], rules: SliceRules) -> Vec<String> {
        endpoints(slices, rules).iter().map(|listed| listed.address.to_string()).collect()
    }

    #[test]
    fn an_endpoint_is_known_by_its_pod_and_its_address() {
        let slice =
            slice("IPv4", &json!([{"port": 8080}]), &json!([endpoint("10.0.0.1", "u", &json!({"ready": true}))]));
        let listed = endpoints([&slice], RULES);
        assert_eq!((listed.len(), &*listed[0].identity), (1, "u@10.0.0.1"));
        assert_eq!(listed[0].address, ([10, 0, 0, 1], 8080).into());
        assert_eq!(listed[0].sources[0].events, "tcp://10.0.0.1:5557");
    }

    #[test]
    fn only_those_that_are_ready_and_stay_are_endpoints() {
        for (conditions, is_listed) in [
            (json!({}), true),
            (json!({"ready": true}), true),
            (json!({"ready": true, "terminating": false}), true),
            (json!({"ready": false}), false),
            (json!({"ready": false, "serving": true, "terminating": true}), false),
            // publishNotReadyAddresses says ready of everybody.
            (json!({"ready": true, "terminating": true}), false),
        ] {
            let slice = slice("IPv4", &Value::Null, &json!([endpoint("10.0.0.1", "u", &conditions)]));
            assert_eq!(endpoints([&slice], RULES).len(), usize::from(is_listed), "{conditions}");
        }
    }

    #[test]
    fn the_port_is_the_slices_own_unless_one_is_configured() {
        let endpoint = json!([endpoint("10.0.0.1", "u", &json!({}))]);
        for (ports, expected) in [
            (Value::Null, 8000),
            (json!([]), 8000),
            (json!([{"port": 1, "name": "metrics"}]), 1),
            (json!([{"port": 1, "name": "metrics"}, {"port": 2, "name": "http"}]), 2),
            (json!([{"port": 1, "protocol": "UDP"}, {"port": 2, "protocol": "TCP"}]), 2),
        ] {
            let slices = [slice("IPv4", &ports, &endpoint)];
            assert_eq!(addresses(&slices, RULES), [format!("10.0.0.1:{expected}")], "{ports}");
            assert_eq!(addresses(&slices, SliceRules { port: Some(9), ..RULES }), ["10.0.0.1:9"], "{ports}");
        }
    }

    #[test]
    fn an_endpoint_of_several_slices_is_one() {
        let v4 = slice("IPv4", &Value::Null, &json!([endpoint("10.0.0.1", "u", &json!({}))]));
        let v6 = slice(
            "IPv6",
            &Value::Null,
            &json!([endpoint("fd00::1", "u", &json!({})), endpoint("fd00::2", "v", &json!({}))]),
        );
        let moved = slice("IPv4", &Value::Null, &json!([endpoint("10.0.0.1", "u", &json!({}))]));
        for slices in [[v4.clone(), v6.clone(), moved.clone()], [v6, moved, v4]] {
            assert_eq!(addresses(&slices, RULES), ["10.0.0.1:8000", "[fd00::2]:8000"]);
        }
    }

    #[test]
    fn what_has_no_address_of_ours_is_no_endpoint() {
        let names = slice("FQDN", &Value::Null, &json!([{"addresses": ["engine.example"]}]));
        let empty = slice("IPv4", &Value::Null, &Value::Null);
        let odd =
            slice("IPv4", &Value::Null, &json!([{"addresses": []}, {"addresses": ["x"]}, {"addresses": ["0.0.0.0"]}]));
        assert_eq!(endpoints([&names, &empty, &odd], RULES), []);
        let bare = slice("IPv4", &Value::Null, &json!([{"addresses": ["10.0.0.1"]}, {"addresses": ["10.0.0.2"]}]));
        assert_eq!(addresses(&[bare], RULES).len(), 2, "endpoints without a pod are told apart by their addresses");
    }
}
