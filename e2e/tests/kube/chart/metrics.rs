//! Alerts and dashboard: every series that they ask for is one of the router's.

use std::collections::BTreeSet;
use std::fs;

use serde_json::Value;

use super::helm::{FULLNAME, Helm, object, of_kind, root, set};

/// Names of series in an expression.
fn series(expression: &str) -> BTreeSet<String> {
    let words = expression.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    words.filter(|word| word.starts_with("warmroute_")).map(str::to_owned).collect()
}

/// Whether the router has a series. Families are registered by their names without prefix, unit and suffix, and what has
/// no sample yet is in no answer of `/metrics`: so the names are looked for where they are declared.
fn is_declared(name: &str, sources: &str) -> bool {
    let stem = name.trim_start_matches("warmroute_").trim_end_matches("_bucket").trim_end_matches("_total");
    let stem = stem.trim_end_matches("_seconds");
    sources.contains(&format!("\"{stem}\""))
}

#[test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
fn alerts_and_dashboard_ask_for_series_that_there_are() {
    let objects = Helm::get().template(&set("kubernetes"), &[]).unwrap();
    let dir = root().join("src/telemetry/metrics");
    let read = |entry: std::io::Result<fs::DirEntry>| fs::read_to_string(entry.unwrap().path()).unwrap();
    let sources: String = fs::read_dir(dir).unwrap().map(read).collect();
    let alerts = object(&objects, "PrometheusRule", FULLNAME)["spec"]["groups"][0]["rules"].as_array().unwrap().clone();
    assert_eq!(alerts.len(), 8);
    let mut expressions: Vec<String> = alerts.iter().map(|alert| alert["expr"].as_str().unwrap().to_owned()).collect();
    for alert in &alerts {
        let expression = alert["expr"].as_str().unwrap();
        assert!(expression.contains("namespace=\"llm\", service=\"r-warmroute-headless\""), "of this release: {alert}");
        assert_eq!(alert["labels"]["team"], "llm", "alertLabels are missing: {alert}");
        assert!(alert["labels"]["severity"].is_string() && alert["annotations"]["summary"].is_string(), "{alert}");
    }
    let dashboards = object(&objects, "ConfigMap", &format!("{FULLNAME}-dashboards"));
    assert_eq!(dashboards["metadata"]["labels"]["grafana_dashboard"], "1");
    let dashboard: Value = serde_json::from_str(dashboards["data"]["warmroute.json"].as_str().unwrap()).unwrap();
    for target in
        dashboard["panels"].as_array().unwrap().iter().filter_map(|panel| panel["targets"].as_array()).flatten()
    {
        expressions.push(target["expr"].as_str().unwrap().to_owned());
    }
    let asked: BTreeSet<String> = expressions.iter().flat_map(|expression| series(expression)).collect();
    assert!(asked.len() > 15, "{asked:?}");
    for name in &asked {
        assert!(is_declared(name, &sources), "{name} is no series of warmroute");
    }
    assert!(!is_declared("warmroute_no_such_total", &sources), "the test would find anything");
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
