//! A real Prometheus scrapes the real router under load: what dashboards and alerts ask for is there.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use e2e::cache::Cache;
use e2e::engines::{ENGINE_MODEL, Engines};
use e2e::kube::tools;
use e2e::load::{self, Target};
use e2e::router::{Router, RouterOptions};
use e2e::service::{Service, free_addresses};
use e2e::sim::driver::TimeModel;
use e2e::sim::engine::EngineOptions;
use e2e::sim::{SimOptions, tokenizer};
use e2e::stack::Stack;
use e2e::tool::{run, run_with_input};
use e2e::workload::{Workload, WorkloadOptions};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{TURN, declared};

/// What a scraped router has as labels, as its `ServiceMonitor` gives them in the namespace `llm` for the release `r`.
const NAMESPACE: &str = "llm";
const SERVICE: &str = "r-warmroute-headless";
/// Stands for Grafana's `$__rate_interval`: some scrapes of this test, which come every second.
const RATE_INTERVAL: &str = "10s";
const PATIENCE: Duration = Duration::from_secs(60);

/// Series that a healthy run does not have, and why: what happens only when something goes wrong has no series until
/// then. Everything else that a dashboard or an alert asks for has to be there.
const RIGHTLY_ABSENT: [(&str, &str); 10] = [
    (
        "warmroute_discovery_last_success_timestamp_seconds",
        "the endpoints of this run are static, and cannot be out of date",
    ),
    ("warmroute_discovery_errors_total", "nothing fails"),
    ("warmroute_fallbacks_total", "every prompt is tokenized in time"),
    ("warmroute_left_to_envoy_total", "every request names the model"),
    ("warmroute_immediate_responses_total", "no request is refused"),
    ("warmroute_misconfigured_streams_total", "Envoy is set as it should be"),
    ("warmroute_snapshots_total", "no snapshots are kept"),
    ("warmroute_snapshot_failures_total", "no snapshots are kept"),
    ("warmroute_tokenizer_conversations_total", "there is no local tokenizer whose work could be reused"),
    ("warmroute_tokenizer_trusted", "there is no local tokenizer that could be trusted"),
];

/// What AIBrix's dashboard names as the job of its gateway, and `docs/migrating-from-aibrix.md` with it.
const AIBRIX_JOB: &str = "aibrix-gateway-plugins";
/// What panels on AIBrix's prefix cache ask for; but for errors, of which a healthy run has none.
const AIBRIX_QUERIES: [&str; 6] = [
    r#"sum(rate(aibrix_prefix_cache_routing_decisions_total{match_percent_bucket!="0", JOB}[10s])) / sum(rate(aibrix_prefix_cache_routing_decisions_total{JOB}[10s]))"#,
    "sum by (match_percent_bucket) (rate(aibrix_prefix_cache_routing_decisions_total{JOB}[10s]))",
    r#"sum by (model, selection) (rate(aibrix_prefix_cache_routing_selection_total{selection="prefix_match", JOB}[10s])) > 0"#,
    r#"sum by (selection) (increase(aibrix_prefix_cache_routing_selection_total{using_kv_sync="true", JOB}[10s]))"#,
    r#"aibrix_prefix_cache_indexer_status{indexer_type="sync", JOB} == 1"#,
    "histogram_quantile(0.99, sum by (le) (rate(aibrix_prefix_cache_routing_latency_seconds_bucket{JOB}[10s]))) > 0",
];

/// Installed by the system's packages.
fn program(name: &str) -> PathBuf {
    let found =
        std::env::split_paths(&std::env::var_os("PATH").unwrap()).map(|dir| dir.join(name)).find(|p| p.is_file());
    found.unwrap_or_else(|| panic!("{name} is not installed: it comes with Debian's package prometheus"))
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap()
}

/// The rules of the PrometheusRule of the release `r`.
fn rules() -> Vec<Value> {
    let home = TempDir::new().unwrap();
    let helm = tools::helm(&Cache::from_env().unwrap()).unwrap();
    let mut command = Command::new(helm);
    let chart = root().join("charts/warmroute");
    command.env("HOME", home.path()).args(["template", "r"]).arg(&chart).args(["--namespace", NAMESPACE, "--values"]);
    command.arg(chart.join("ci/kubernetes-values.yaml")).args(["--show-only", "templates/prometheusrule.yaml"]);
    let object: Value = serde_saphyr::from_str(&run(&mut command).unwrap()).unwrap();
    let mut rules = object["spec"]["groups"][0]["rules"].as_array().unwrap().clone();
    for rule in &mut rules {
        // The others are those of the set of values.
        rule["labels"].as_object_mut().unwrap().retain(|name, _| name == "severity");
    }
    rules
}

/// Writes `rules` where promtool finds them; JSON is YAML.
fn write_rules(dir: &Path, rules: &[Value]) -> PathBuf {
    let path = dir.join("rules.yaml");
    fs::write(&path, json!({"groups": [{"name": "warmroute", "rules": rules}]}).to_string()).unwrap();
    path
}

fn dashboards() -> Vec<(String, Value)> {
    let files = fs::read_dir(root().join("charts/warmroute/files/dashboards")).unwrap();
    let mut dashboards: Vec<(String, Value)> = files
        .map(|entry| {
            let path = entry.unwrap().path();
            let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
            (name, serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap())
        })
        .collect();
    dashboards.sort_by(|one, other| one.0.cmp(&other.0));
    assert_eq!(dashboards.len(), 4, "{:?}", dashboards.iter().map(|(name, _)| name).collect::<Vec<_>>());
    dashboards
}

/// A panel's title and one of its queries.
fn targets(dashboard: &Value) -> Vec<(String, String)> {
    let panels = dashboard["panels"].as_array().unwrap();
    let of_panel = |panel: &Value| {
        let title = panel["title"].as_str().unwrap().to_owned();
        let targets = panel["targets"].as_array().cloned().unwrap_or_default();
        targets.into_iter().map(move |target| (title.clone(), target["expr"].as_str().unwrap().to_owned()))
    };
    panels.iter().flat_map(of_panel).collect()
}

/// As Grafana asks it with everything chosen.
fn substituted(query: &str) -> String {
    let values = [("$namespace", NAMESPACE), ("$service", SERVICE), ("$instance", ".*"), ("$model", ".*")];
    let query = values.iter().fold(query.to_owned(), |query, (name, value)| query.replace(name, value));
    let query = query.replace("$__rate_interval", RATE_INTERVAL);
    assert!(!query.contains('$'), "a variable is left in {query}");
    query
}

/// Names of metrics in an expression.
fn metrics_in(expression: &str) -> BTreeSet<String> {
    let words = expression.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    words.filter(|word| word.starts_with("warmroute_") || word.starts_with("process_")).map(str::to_owned).collect()
}

fn why_absent(expression: &str) -> Option<&'static str> {
    let metrics = metrics_in(expression);
    RIGHTLY_ABSENT.iter().find(|(name, _)| metrics.contains(*name)).map(|(_, why)| *why)
}

/// A running Prometheus.
struct Prometheus {
    url: String,
    _service: Service,
}

impl Prometheus {
    async fn start(dir: &Path, router: &Router) -> Self {
        let [address] = free_addresses().unwrap();
        let labels = json!({"namespace": NAMESPACE, "service": SERVICE});
        let scrape = json!({
            "job_name": "warmroute",
            "static_configs": [{"targets": [router.admin().to_string()], "labels": labels}],
            "metric_relabel_configs": [relabelling_for_aibrix()],
        });
        let config = json!({"global": {"scrape_interval": "1s"}, "scrape_configs": [scrape]});
        fs::write(dir.join("prometheus.yml"), config.to_string()).unwrap();
        let mut command = Command::new(program("prometheus"));
        command.arg(format!("--config.file={}", dir.join("prometheus.yml").display()));
        command.arg(format!("--storage.tsdb.path={}", dir.join("tsdb").display()));
        command.arg(format!("--web.listen-address={address}"));
        let service = Service::start("prometheus", command, &dir.join("prometheus.log")).unwrap();
        let url = format!("http://{address}");
        service.wait_ready(&format!("{url}/-/ready"), PATIENCE).await.unwrap();
        Self { url, _service: service }
    }

    async fn get(&self, path: &str, query: &[(&str, &str)]) -> Value {
        let mut url = reqwest::Url::parse(&format!("{}{path}", self.url)).unwrap();
        url.query_pairs_mut().extend_pairs(query);
        let answer = e2e::http::client().get(url).send().await.unwrap();
        let answer: Value = serde_json::from_str(&answer.text().await.unwrap()).unwrap();
        assert_eq!(answer["status"], "success", "{query:?}: {answer}");
        assert!(answer["warnings"].is_null(), "{query:?}: {answer}");
        answer["data"].clone()
    }

    /// The series that an expression has now; an error of Prometheus fails the test.
    async fn query(&self, expression: &str) -> Vec<Value> {
        let data = self.get("/api/v1/query", &[("query", expression)]).await;
        match data["resultType"].as_str().unwrap() {
            "vector" => data["result"].as_array().unwrap().clone(),
            _ => vec![data["result"].clone()],
        }
    }

    /// The values of Grafana's `label_values(metric{…}, label)`.
    async fn label_values(&self, query: &str) -> Vec<Value> {
        let inner = query.strip_prefix("label_values(").and_then(|rest| rest.strip_suffix(')'));
        let (selector, label) = inner.unwrap_or_else(|| panic!("{query}")).rsplit_once(", ").unwrap();
        let data = self.get(&format!("/api/v1/label/{label}/values"), &[("match[]", selector)]).await;
        data.as_array().unwrap().clone()
    }
}

/// What the page on coming from AIBrix has its series relabelled with.
fn relabelling_for_aibrix() -> Value {
    let page = fs::read_to_string(root().join("docs/migrating-from-aibrix.md")).unwrap();
    let (_, rest) = page.split_once("metric_relabel_configs:").unwrap();
    let parsed: Value = serde_saphyr::from_str(rest.split_once("```").unwrap().0).unwrap();
    assert_eq!(parsed[0]["replacement"], AIBRIX_JOB);
    parsed[0].clone()
}

/// The demo's load, shorter: conversations with shared system prompts on four simulated engines.
fn workload() -> WorkloadOptions {
    WorkloadOptions {
        seed: 1,
        n_conversations: 24,
        n_users: 8,
        n_turns: 4,
        n_shared_prompts: 2,
        system_words: 400,
        opening_words: 300,
        question_words: 60,
        answer_tokens: 12,
        think: Duration::from_millis(600),
        words: (0..tokenizer::N_WORDS).map(tokenizer::word).collect(),
    }
}

fn engines() -> Engines {
    let engine = EngineOptions { max_model_len: 4096, max_num_batched_tokens: 2048, ..EngineOptions::default() };
    let time = TimeModel { prefill_tokens_per_second: 20_000.0, decode_step: Duration::from_millis(10) };
    Engines::simulated(4, &SimOptions { engine, time, ..SimOptions::default() }).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Envoy, Debian's prometheus and Helm: cargo e2e tools"]
async fn dashboards_and_alerts_find_what_they_ask_for() {
    let _turn = TURN.lock().await;
    let dir = TempDir::new().unwrap();
    let engines = engines();
    let mut options = RouterOptions::new(engines.addresses());
    options.env.push(("WARMROUTE_METRICS_AIBRIX_NAMES".to_owned(), "true".to_owned()));
    let stack = Stack::start(dir.path(), &options).await.unwrap();
    let router = stack.router.as_ref().unwrap();
    let prometheus = Prometheus::start(dir.path(), router).await;
    let target = Target { url: stack.url(""), model: ENGINE_MODEL.to_owned() };
    let load = load::run(target, Arc::new(Workload::generate(workload())), Arc::new(AtomicUsize::new(0)));
    let load = tokio::spawn(load);
    let begun = Instant::now();
    // Rates need two scrapes that differ, in the middle of the load.
    let wanted =
        "sum(rate(warmroute_matched_tokens_total[10s])) > 0 and sum(increase(warmroute_events_total[10s])) > 0";
    while prometheus.query(wanted).await.is_empty() {
        assert!(begun.elapsed() < PATIENCE, "Prometheus sees no tokens matched");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }

    let (mut n_with_data, mut n_absent) = (0, 0);
    let (mut faults, mut asked) = (Vec::new(), BTreeSet::new());
    for query in AIBRIX_QUERIES.map(|query| query.replace("JOB", &format!("job=\"{AIBRIX_JOB}\""))) {
        if prometheus.query(&query).await.is_empty() {
            faults.push(format!("AIBrix's dashboard: no data for {query}"));
        }
    }
    for (name, dashboard) in dashboards() {
        for (title, query) in targets(&dashboard) {
            asked.extend(metrics_in(&query));
            let found = prometheus.query(&substituted(&query)).await;
            match (found.is_empty(), why_absent(&query)) {
                (true, None) => faults.push(format!("{name}: {title}: no data for {query}")),
                (true, Some(_)) => n_absent += 1,
                (false, _) => n_with_data += 1,
            }
        }
        for variable in dashboard["templating"]["list"].as_array().unwrap() {
            if variable["type"] == "query" {
                let query = substituted(variable["query"]["query"].as_str().unwrap());
                if prometheus.label_values(&query).await.is_empty() {
                    faults.push(format!("{name}: ${}: no values by {query}", variable["name"]));
                }
            }
        }
    }
    let rules = rules();
    for rule in &rules {
        let (alert, expression) = (&rule["alert"], rule["expr"].as_str().unwrap());
        let found = prometheus.query(expression).await;
        asked.extend(metrics_in(expression));
        // How fast this machine is, is not the question.
        if !found.is_empty() && *alert != "WarmrouteSlowDecisions" {
            faults.push(format!("{alert} would fire in a healthy run: {found:?}"));
        }
        for metric in metrics_in(expression) {
            if prometheus.query(&metric).await.is_empty() && why_absent(&metric).is_none() {
                faults.push(format!("{alert} asks for {metric}, which is not there"));
            }
        }
    }
    for (metric, _) in RIGHTLY_ABSENT {
        if !asked.contains(metric) {
            faults.push(format!("nobody asks for {metric} any more"));
        }
    }
    let outcomes = load.await.unwrap().unwrap();
    println!(
        "{n_with_data} queries of dashboards have data, {n_absent} rightly none; {} alerts are silent; {} requests",
        rules.len(),
        outcomes.len()
    );
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    assert!(n_with_data > 60, "only {n_with_data} queries have data");

    let classic = e2e::http::client().get(format!("http://{}/metrics", router.admin()));
    let classic = classic.header("accept", "text/plain;version=0.0.4").send().await.unwrap();
    assert_eq!(classic.headers()["content-type"], "text/plain; version=0.0.4; charset=utf-8");
    let text = classic.text().await.unwrap();
    check_metrics(&text);
    let n_closed = declared::check(&text);
    assert!(n_closed > 50, "only {n_closed} labels were looked at");
}

/// `promtool check metrics` says nothing of `text`, neither an error nor advice.
fn check_metrics(text: &str) {
    let mut command = Command::new("sh");
    // Advice goes to standard error with status 3: both are looked at.
    command.args(["-c", "\"$0\" check metrics 2>&1 || true"]).arg(program("promtool"));
    let said = run_with_input(&mut command, text).unwrap();
    assert_eq!(said, "", "promtool check metrics: {said}");
}

#[test]
#[ignore = "needs Debian's prometheus"]
fn promtool_is_heard_when_it_has_something_to_say() {
    let _turn = TURN.blocking_lock();
    let heard = std::panic::catch_unwind(|| check_metrics("# TYPE a_seconds_total gauge\na_seconds_total 1\n"));
    assert!(heard.is_err(), "a gauge named as a counter, and without help");
}

#[test]
#[ignore = "needs Debian's prometheus and Helm: cargo e2e tools"]
fn rules_are_valid_and_link_to_their_runbooks() {
    let _turn = TURN.blocking_lock();
    let dir = TempDir::new().unwrap();
    let rules = rules();
    run(Command::new(program("promtool"))
        .args(["check", "rules", "--lint-fatal"])
        .arg(write_rules(dir.path(), &rules)))
    .unwrap();
    for rule in &rules {
        let url = rule["annotations"]["runbook_url"].as_str().unwrap_or_else(|| panic!("{rule} has no runbook"));
        let (_, file) = url.rsplit_once("docs/runbooks/").unwrap_or_else(|| panic!("{url}"));
        assert!(root().join("docs/runbooks").join(file).is_file(), "{}: no {file}", rule["alert"]);
    }
    for (name, dashboard) in dashboards() {
        for panel in dashboard["panels"].as_array().unwrap() {
            let links = panel["links"].as_array().cloned().unwrap_or_default();
            for url in links.iter().map(|link| link["url"].as_str().unwrap()) {
                let file = url.strip_prefix("${runbooks}/").unwrap_or_else(|| panic!("{name}: {url}"));
                assert!(root().join("docs/runbooks").join(file).is_file(), "{name}: {}: no {file}", panel["title"]);
            }
        }
    }
}

#[test]
#[ignore = "needs Debian's prometheus and Helm: cargo e2e tools"]
fn every_alert_fires_in_one_case_and_is_silent_in_another() {
    let _turn = TURN.blocking_lock();
    let dir = TempDir::new().unwrap();
    let mut rules = rules();
    let alerts: BTreeSet<String> = rules.iter().map(|rule| rule["alert"].as_str().unwrap().to_owned()).collect();
    for rule in &mut rules {
        // The texts are for people; cases that repeat them would only be in the way of a better word.
        rule.as_object_mut().unwrap().remove("annotations");
    }
    write_rules(dir.path(), &rules);
    let cases = fs::read_to_string(root().join("tests/data/alerts.yaml")).unwrap();
    let parsed: Value = serde_saphyr::from_str(&cases).unwrap();
    let (mut firing, mut silent) = (BTreeSet::new(), BTreeSet::new());
    for test in parsed["tests"].as_array().unwrap() {
        for case in test["alert_rule_test"].as_array().unwrap() {
            let expects_none = case["exp_alerts"].as_array().is_none_or(Vec::is_empty);
            let set = if expects_none { &mut silent } else { &mut firing };
            set.insert(case["alertname"].as_str().unwrap().to_owned());
        }
    }
    assert_eq!(firing, alerts, "alerts with a case in which they fire");
    assert_eq!(silent, alerts, "alerts with a case in which they do not");
    let file = dir.path().join("alerts.yaml");
    fs::write(&file, cases).unwrap();
    run(Command::new(program("promtool")).args(["test", "rules"]).arg(file)).unwrap();
}
