//! Alerts and dashboard: every series that they ask for is one of the router's.

use std::collections::BTreeSet;

use serde_json::Value;
use warmroute::telemetry::metrics::{Instrument, Kind, Metrics};

use super::helm::{FULLNAME, Helm, object, of_kind, set};

/// Names of series in an expression.
fn series(expression: &str) -> BTreeSet<String> {
    let words = expression.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    words.filter(|word| word.starts_with("warmroute_")).map(str::to_owned).collect()
}

/// Names of all series that the router declares, a histogram's as well.
fn declared() -> BTreeSet<String> {
    let metrics = Metrics::new();
    let of_instrument = |instrument: &Instrument| {
        let name = instrument.name.clone();
        match instrument.kind {
            Kind::Histogram => ["_bucket", "_sum", "_count"].map(|suffix| format!("{name}{suffix}")).to_vec(),
            _ => vec![name],
        }
    };
    metrics.instruments().iter().flat_map(of_instrument).collect()
}

#[test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
fn alerts_and_dashboard_ask_for_series_that_there_are() {
    let objects = Helm::get().template(&set("kubernetes"), &[]).unwrap();
    let declared = declared();
    let alerts = object(&objects, "PrometheusRule", FULLNAME)["spec"]["groups"][0]["rules"].as_array().unwrap().clone();
    assert_eq!(alerts.len(), 20);
    let mut expressions: Vec<String> = alerts.iter().map(|alert| alert["expr"].as_str().unwrap().to_owned()).collect();
    for alert in &alerts {
        let expression = alert["expr"].as_str().unwrap();
        assert!(expression.contains("namespace=\"llm\", service=\"r-warmroute-headless\""), "of this release: {alert}");
        assert_eq!(alert["labels"]["team"], "llm", "alertLabels are missing: {alert}");
        assert!(alert["labels"]["severity"].is_string() && alert["annotations"]["summary"].is_string(), "{alert}");
    }
    let dashboards = object(&objects, "ConfigMap", &format!("{FULLNAME}-dashboards"));
    assert_eq!(dashboards["metadata"]["labels"]["grafana_dashboard"], "1");
    let dashboards = dashboards["data"].as_object().unwrap();
    let names: Vec<&String> = dashboards.keys().collect();
    let expected = ["decisions", "event-plane", "fleet", "tokenizer"].map(|name| format!("warmroute-{name}.json"));
    assert_eq!(names, expected.iter().collect::<Vec<_>>());
    for dashboard in dashboards.values() {
        let dashboard: Value = serde_json::from_str(dashboard.as_str().unwrap()).unwrap();
        let panels = dashboard["panels"].as_array().unwrap();
        for target in panels.iter().filter_map(|panel| panel["targets"].as_array()).flatten() {
            expressions.push(target["expr"].as_str().unwrap().to_owned());
        }
    }
    let asked: BTreeSet<String> = expressions.iter().flat_map(|expression| series(expression)).collect();
    assert!(asked.len() > 60, "{asked:?}");
    for name in &asked {
        assert!(declared.contains(name), "{name} is no series of warmroute");
    }
}

#[test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
fn prometheus_scrapes_the_admin_port_of_every_router() {
    let objects = Helm::get().template(&set("kubernetes"), &[]).unwrap();
    let monitor = &object(&objects, "ServiceMonitor", FULLNAME)["spec"];
    let wanted = monitor["selector"]["matchLabels"].as_object().unwrap();
    let fits = |service: &&Value| wanted.iter().all(|(label, value)| service["metadata"]["labels"][label] == *value);
    let services: Vec<&Value> = of_kind(&objects, "Service").filter(fits).collect();
    assert_eq!(services.len(), 1, "{services:?}");
    assert_eq!(services[0]["spec"]["ports"][0]["name"], monitor["endpoints"][0]["port"]);
}
