//! `metrics`: what is told besides `/metrics`.

use std::time::Duration;

use serde::Serialize;

use super::reader::{Node, shown};
use super::values::Human;
use crate::telemetry::metrics::push::Push;

/// `metrics`: names for others, and the push to a collector.
#[derive(Clone, Debug, Serialize)]
pub struct Metrics {
    /// Whether AIBrix's names for the prefix cache's metrics are kept as well, default false.
    pub aibrix_names: bool,
    /// OTLP gRPC endpoint that all metrics are pushed to, such as `http://127.0.0.1:4317`; null (default): none are.
    pub otlp_endpoint: Option<String>,
    /// Time between two pushes, default 60s.
    pub otlp_interval: Human,
}

impl Metrics {
    /// Where metrics are pushed to, if they are.
    pub fn push(&self) -> Option<Push> {
        let endpoint = self.otlp_endpoint.clone()?;
        Some(Push { endpoint, interval: self.otlp_interval.0 })
    }
}

pub(super) fn read_metrics(node: &Node<'_>) -> Metrics {
    const NAMES: &str = "true or false";
    const ENDPOINT: &str = "a URL such as http://127.0.0.1:4317, or null for no push";
    const INTERVAL: &str = "a duration from 1s to 1h, such as 60s";
    let [aibrix_names, otlp_endpoint, otlp_interval] = node.fields(["aibrix_names", "otlp_endpoint", "otlp_interval"]);
    let endpoint: Option<String> = otlp_endpoint.optional(ENDPOINT);
    let is_url = |url: &str| url.parse::<axum::http::Uri>().is_ok_and(|uri| uri.scheme_str() == Some("http"));
    if let Some(url) = endpoint.as_ref().filter(|url| !is_url(url)) {
        otlp_endpoint.fault(shown(url), ENDPOINT);
    }
    let interval = otlp_interval.or(Human(Duration::from_secs(60)), INTERVAL);
    if !(Duration::from_secs(1)..=Duration::from_secs(3600)).contains(&interval.0) {
        otlp_interval.fault(format!("{interval}"), INTERVAL);
    }
    Metrics { aibrix_names: aibrix_names.or(false, NAMES), otlp_endpoint: endpoint, otlp_interval: interval }
}

#[cfg(test)]
mod tests {
    use super::super::{Config, Error};
    use super::*;

    const MODELS: &str = "models: [{name: m, discovery: {static: [{address: 127.0.0.1:1}]}}]";

    fn parse(metrics: &str) -> Result<Metrics, Error> {
        Config::parse(&format!("{MODELS}\nmetrics: {metrics}\n"), []).map(|config| config.metrics)
    }

    #[test]
    fn nothing_is_pushed_and_no_foreign_name_kept_unless_asked_for() {
        let metrics = parse("{}").unwrap();
        assert!(!metrics.aibrix_names && metrics.push().is_none(), "{metrics:?}");
        assert_eq!(metrics.otlp_interval.0, Duration::from_secs(60));
        let metrics = parse("{aibrix_names: true, otlp_endpoint: 'http://c:4317', otlp_interval: 5s}").unwrap();
        let push = metrics.push().unwrap();
        assert_eq!((metrics.aibrix_names, push.endpoint.as_str(), push.interval.as_secs()), (true, "http://c:4317", 5));
    }

    #[test]
    fn what_cannot_be_is_named() {
        for (metrics, path) in [
            ("{aibrix_names: 7}", "metrics.aibrix_names"),
            ("{otlp_endpoint: 'https://c:4317'}", "metrics.otlp_endpoint"),
            ("{otlp_endpoint: 'c:4317'}", "metrics.otlp_endpoint"),
            ("{otlp_interval: 10ms}", "metrics.otlp_interval"),
            ("{otlp_interval: 2h}", "metrics.otlp_interval"),
            ("{interval: 1s}", "metrics.interval"),
        ] {
            let error = parse(metrics).unwrap_err().to_string();
            assert!(error.contains(path) && error.contains("1 fault"), "{metrics}: {error}");
        }
    }
}
