//! The configuration: one YAML file, overridable by `WARMROUTE_*`, parsed once into types that cannot be wrong.
//!
//! All faults are reported together, each with its path, what was found and what was expected, before any port is
//! opened. Every setting is documented at its field; `warmroute check-config` prints them with the values in force.

mod admin;
mod aliases;
mod difference;
mod discovery;
mod engine;
mod file;
mod metrics;
mod model;
mod reader;
mod rollout;
mod selection;
mod tokenizer;
mod values;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;
use sha2::{Digest, Sha256};

pub use admin::{Admin, Explain};
use admin::{read_admin, read_explain};
pub use aliases::Alias;
pub use difference::Difference;
pub use discovery::{Discovery, Dns, DnsKind, EndpointFile, Kubernetes, Preset, StaticEndpoint, parse_endpoints};
pub use engine::ModelEvents;
pub use file::{ConfigFile, ReadError};
pub use metrics::Metrics;
use metrics::read_metrics;
pub use model::{Adapter, BlockHash, Model};
use model::{check_names, each, read_model};
pub use reader::Fault;
use reader::{Node, Source, shown};
use rollout::read_rollout;
pub use rollout::{Record, Rollout};
pub use selection::Selection;
use selection::read_selection;
pub use tokenizer::{Tokenizer, TokenizerApi, TokenizerKind};
pub use values::{Human, ZmqEndpoint};

use crate::routing::index::IndexLimits;
use crate::snapshots::Sibling;
use crate::telemetry::LogFormat;

/// The whole configuration.
#[derive(Clone, Debug, Serialize)]
pub struct Config {
    /// Where the servers listen.
    pub listen: Listen,
    /// Who may look at the router.
    pub admin: Admin,
    /// The decisions that are kept.
    pub explain: Explain,
    /// How Envoy is told the endpoint.
    pub selection: Selection,
    /// What Envoy is set to.
    pub envoy: Envoy,
    /// Sizes.
    pub limits: Limits,
    /// Logs.
    pub log: Log,
    /// Traces.
    pub trace: Trace,
    /// Metrics, besides `/metrics`.
    pub metrics: Metrics,
    /// What is known of the engines' KV events.
    pub events: Events,
    /// How far Envoy follows the picks.
    pub rollout: Rollout,
    /// Being sent requests.
    pub readiness: Readiness,
    /// Stopping.
    pub shutdown: Shutdown,
    /// One pool of endpoints for each model.
    pub models: Vec<Model>,
    /// Variables of AIBrix that were taken for settings of ours.
    #[serde(skip)]
    pub aliases: Vec<Alias>,
}

/// `listen`: addresses of the servers; port 0 takes any free one.
#[derive(Clone, Debug, Serialize)]
pub struct Listen {
    /// gRPC external processor, default `127.0.0.1:9002`.
    pub extproc: SocketAddr,
    /// The admin port: `/livez`, `/readyz`, `/metrics`, `/explain`, `/decisions`, `/overview`, `/endpoints`, `/sources`,
    /// `/index`, `/snapshots` and the page at `/`, default `127.0.0.1:9090`.
    pub admin: SocketAddr,
}

/// `envoy`: settings of Envoy that ours must agree with.
#[derive(Clone, Debug, Serialize)]
pub struct Envoy {
    /// `message_timeout` of Envoy's ext_proc filter, default 1s as in our examples; Envoy's own default is 200ms.
    /// Budgets have to end before it does.
    pub message_timeout: Human,
}

/// `limits`: sizes.
#[derive(Clone, Debug, Serialize)]
pub struct Limits {
    /// Largest request body in bytes, default 32 MiB. Set Envoy's buffer limit to the same value.
    pub body_bytes: usize,
    /// Memory for the index of all models in bytes, default 2 GiB, about 20 million blocks. At the limit
    /// new blocks are refused, counted, and their sources shown as incomplete.
    pub index_bytes: usize,
}

/// `log`: where it goes is standard error.
#[derive(Clone, Debug, Serialize)]
pub struct Log {
    /// `text` or `json`, default `text`.
    pub format: LogFormat,
    /// Directives of tracing-subscriber's `EnvFilter`, default `info`.
    pub filter: String,
}

/// `trace`: OpenTelemetry traces.
#[derive(Clone, Debug, Serialize)]
pub struct Trace {
    /// OTLP gRPC endpoint such as `http://127.0.0.1:4317`; unset, `OTEL_EXPORTER_OTLP_ENDPOINT` decides, and without
    /// either nothing is exported.
    pub otlp_endpoint: Option<String>,
    /// Share of the requests without a trace context of their own that are traced, 0 to 1, default 1.
    pub sample_ratio: f64,
}

/// `events`: what is known of the engines' KV events, beyond a life of ours.
#[derive(Clone, Debug, Serialize)]
pub struct Events {
    /// Snapshots on disk.
    pub snapshots: EventSnapshots,
    /// Admin ports of the other replicas, such as `http://warmroute-headless:9090`. A name may have many addresses,
    /// ours among them.
    pub siblings: Vec<Sibling>,
}

/// `events.snapshots`: what a restart finds on disk.
#[derive(Clone, Debug, Serialize)]
pub struct EventSnapshots {
    /// Directory of the files; null: none are written.
    pub dir: Option<PathBuf>,
    /// Time in which every source is written once, default 60s.
    pub interval: Human,
}

/// `readiness`: when `/readyz` and the gRPC health service say that requests may come.
#[derive(Clone, Debug, Serialize)]
pub struct Readiness {
    /// How long event sources may take to catch up, once every pool has been listed, before the process is ready
    /// without them; default 10s, 0s: they are not waited for.
    pub warm_deadline: Human,
}

/// `shutdown`: what SIGTERM does.
#[derive(Clone, Debug, Serialize)]
pub struct Shutdown {
    /// Time between "not ready" and the moment from which no new stream is taken, default 0s. In Kubernetes Envoy needs
    /// some seconds to hear that the pod is going; where nobody watches readiness, waiting helps nobody.
    pub delay: Human,
    /// Longest time that open streams may take to finish after that, default 25s. Keep the sum of both below the pod's
    /// termination grace period.
    pub grace: Human,
}

/// The configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file is not YAML.
    #[error("the configuration is not valid YAML: {0}")]
    Yaml(String),
    /// Settings are wrong.
    #[error("{}", render(.0))]
    Faults(Vec<Fault>),
}

fn render(faults: &[Fault]) -> String {
    let lines: Vec<String> = faults.iter().map(|fault| format!("  {fault}")).collect();
    format!("{} fault(s) in the configuration\n{}", faults.len(), lines.join("\n"))
}

impl Config {
    /// Reads the configuration from YAML text and environment variables.
    ///
    /// # Errors
    /// [`Error`] when the text is not YAML, or with every fault of its settings.
    pub fn parse(yaml: &str, env: impl IntoIterator<Item = (String, String)>) -> Result<Self, Error> {
        let document: Value = serde_saphyr::from_str(yaml).map_err(|error| Error::Yaml(error.to_string()))?;
        let source = Source::new(env);
        let config = read_config(&Node::root(&source, &document));
        let (faults, aliases) = source.into_faults();
        match config {
            Some(config) if faults.is_empty() => Ok(Self { aliases, ..config }),
            _ => Err(Error::Faults(faults)),
        }
    }

    /// Digest of [`Config::to_yaml`] with the models in the order of their names, by which replicas can be compared.
    pub fn hash(&self) -> String {
        let mut sorted = self.clone();
        sorted.models.sort_by(|one, other| one.name.cmp(&other.name));
        hex::encode(&Sha256::digest(sorted.to_yaml())[..8])
    }

    /// The settings in force, as YAML that [`Config::parse`] reads back.
    pub fn to_yaml(&self) -> String {
        serde_saphyr::to_string(self).expect("a configuration has only strings, numbers, lists and mappings")
    }
}

/// None only together with a fault.
fn read_config(root: &Node<'_>) -> Option<Config> {
    let [
        listen,
        admin,
        explain,
        selection,
        envoy,
        limits,
        log,
        trace,
        metrics,
        events,
        rollout,
        readiness,
        shutdown,
        models,
    ] = root.fields([
        "listen",
        "admin",
        "explain",
        "selection",
        "envoy",
        "limits",
        "log",
        "trace",
        "metrics",
        "events",
        "rollout",
        "readiness",
        "shutdown",
        "models",
    ]);
    let (selection, envoy) = (read_selection(&selection), read_envoy(&envoy));
    let nodes = models.items();
    if nodes.is_empty() {
        models.fault("nothing", "a list of at least one model");
    }
    let parsed: Vec<Option<Model>> = nodes.iter().map(|node| read_model(node, &envoy, &selection)).collect();
    check_names(&nodes, &parsed);
    Some(Config {
        listen: read_listen(&listen),
        admin: read_admin(&admin),
        explain: read_explain(&explain),
        rollout: read_rollout(&rollout, selection.mode),
        selection,
        envoy,
        limits: read_limits(&limits),
        log: read_log(&log),
        trace: read_trace(&trace),
        metrics: read_metrics(&metrics),
        events: read_events(&events)?,
        readiness: read_readiness(&readiness),
        shutdown: read_shutdown(&shutdown),
        models: parsed.into_iter().collect::<Option<_>>()?,
        aliases: Vec::new(),
    })
}

fn read_listen(node: &Node<'_>) -> Listen {
    const EXPECTED: &str = "an IP address with port, such as 127.0.0.1:9002";
    let [extproc, admin] = node.fields(["extproc", "admin"]);
    Listen {
        extproc: extproc.or(SocketAddr::from(([127, 0, 0, 1], 9002)), EXPECTED),
        admin: admin.or(SocketAddr::from(([127, 0, 0, 1], 9090)), EXPECTED),
    }
}

fn read_envoy(node: &Node<'_>) -> Envoy {
    const TIMEOUT: &str = "a duration from 20ms to 10m, such as 1s";
    let [message_timeout] = node.fields(["message_timeout"]);
    let timeout = message_timeout.or(Human(Duration::from_secs(1)), TIMEOUT);
    if !(Duration::from_millis(20)..=Duration::from_secs(600)).contains(&timeout.0) {
        message_timeout.fault(timeout, TIMEOUT);
    }
    Envoy { message_timeout: timeout }
}

fn read_limits(node: &Node<'_>) -> Limits {
    const BODY: &str = "a number of bytes from 1024 to 1073741824";
    const INDEX: &str = "a number of bytes from 1048576 on";
    let [body_bytes, index_bytes] = node.fields(["body_bytes", "index_bytes"]);
    let body_limit = body_bytes.or(32 << 20, BODY);
    if !(1 << 10..=1 << 30).contains(&body_limit) {
        body_bytes.fault(body_limit, BODY);
    }
    let index_limit = index_bytes.or(IndexLimits::default().bytes, INDEX);
    if index_limit < 1 << 20 {
        index_bytes.fault(index_limit, INDEX);
    }
    Limits { body_bytes: body_limit, index_bytes: index_limit }
}

fn read_log(node: &Node<'_>) -> Log {
    const EXPECTED: &str = "filter directives such as info or warmroute=debug,warn";
    let [format, filter] = node.fields(["format", "filter"]);
    let directives = filter.or("info".to_owned(), EXPECTED);
    if directives.parse::<tracing_subscriber::filter::EnvFilter>().is_err() {
        filter.fault(format!("{directives:?}"), EXPECTED);
    }
    Log { format: format.or(LogFormat::Text, "text or json"), filter: directives }
}

fn read_trace(node: &Node<'_>) -> Trace {
    const RATIO: &str = "a number from 0 to 1";
    const ENDPOINT: &str = "a URL such as http://127.0.0.1:4317";
    let [otlp_endpoint, sample_ratio] = node.fields(["otlp_endpoint", "sample_ratio"]);
    let ratio = sample_ratio.or(1.0, RATIO);
    if !(0.0..=1.0).contains(&ratio) {
        sample_ratio.fault(ratio, RATIO);
    }
    let endpoint: Option<String> = otlp_endpoint.optional(ENDPOINT);
    let is_url = |url: &str| url.parse::<axum::http::Uri>().is_ok_and(|uri| uri.scheme_str() == Some("http"));
    if let Some(url) = endpoint.as_ref().filter(|url| !is_url(url)) {
        otlp_endpoint.fault(shown(url), ENDPOINT);
    }
    Trace { otlp_endpoint: endpoint, sample_ratio: ratio }
}

fn read_events(node: &Node<'_>) -> Option<Events> {
    const SIBLING: &str = "a URL such as http://warmroute-headless:9090, without a path";
    let [snapshots, siblings] = node.fields(["snapshots", "siblings"]);
    let snapshots = read_event_snapshots(&snapshots);
    Some(Events { snapshots, siblings: each(&siblings.items(), |sibling| sibling.required(SIBLING))? })
}

fn read_event_snapshots(node: &Node<'_>) -> EventSnapshots {
    const DIR: &str = "the path of a directory, or null for no snapshots";
    const INTERVAL: &str = "a duration from 1s to 1h, such as 60s";
    let [dir, interval] = node.fields(["dir", "interval"]);
    let path = dir.string(DIR);
    if path.as_ref().is_some_and(String::is_empty) {
        dir.fault("nothing", DIR);
    }
    let period = interval.or(Human(Duration::from_secs(60)), INTERVAL);
    if !(Duration::from_secs(1)..=Duration::from_secs(3600)).contains(&period.0) {
        interval.fault(format!("{period}"), INTERVAL);
    }
    EventSnapshots { dir: path.map(PathBuf::from), interval: period }
}

fn read_readiness(node: &Node<'_>) -> Readiness {
    const DEADLINE: &str = "a duration of at most 1h, such as 10s";
    let [warm_deadline] = node.fields(["warm_deadline"]);
    let deadline = warm_deadline.or(Human(Duration::from_secs(10)), DEADLINE);
    if deadline.0 > Duration::from_secs(3600) {
        warm_deadline.fault(deadline, DEADLINE);
    }
    Readiness { warm_deadline: deadline }
}

fn read_shutdown(node: &Node<'_>) -> Shutdown {
    const DELAY: &str = "a duration from 0s to 10m, such as 5s";
    let [delay, grace] = node.fields(["delay", "grace"]);
    let pause = delay.or(Human(Duration::ZERO), DELAY);
    if pause.0 > Duration::from_secs(600) {
        delay.fault(pause, DELAY);
    }
    Shutdown { delay: pause, grace: grace.or(Human(Duration::from_secs(25)), "a duration such as 25s") }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FULL: &str = "
listen: {extproc: 127.0.0.1:9002, admin: 127.0.0.1:9090}
selection: {header: x-gateway-destination-endpoint}
events: {snapshots: {dir: /var/lib/warmroute, interval: 30s}, siblings: ['http://warmroute-headless:9090']}
models:
  - name: tiny
    aliases: [small]
    default: true
    adapters: [{name: lora-a, path: model/lora-a}]
    block_hash: {algorithm: sha256, pythonhashseed: null}
    engine: {scheme: http, ca: null, api_key_file: null}
    events: {discover: true, scrape: 10s, report: true}
    tokenizer: {kind: remote, budget: 100ms, budget_max: 300ms}
    discovery:
      static:
        - {address: 127.0.0.1:8000, events: tcp://127.0.0.1:5557, replay: tcp://127.0.0.1:5658, ranks: 2}
";

    fn parse(yaml: &str, env: &[(&str, &str)]) -> Result<Config, Error> {
        Config::parse(yaml, env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())))
    }

    fn faults(yaml: &str, env: &[(&str, &str)]) -> Vec<String> {
        match parse(yaml, env) {
            Err(Error::Faults(faults)) => faults.iter().map(ToString::to_string).collect(),
            other => panic!("expected faults, found {other:?}"),
        }
    }

    #[test]
    fn effective_configuration_reads_back() {
        let config = parse(FULL, &[]).expect("valid");
        assert_eq!(config.models[0].block_hash.pythonhashseed, None);
        assert_eq!(config.models[0].tokenizer.budget.0, Duration::from_millis(100));
        assert!(config.models[0].events.report);
        let again = parse(&config.to_yaml(), &[]).expect("the effective configuration is valid");
        assert_eq!(again.to_yaml(), config.to_yaml());
    }

    #[test]
    fn all_faults_come_at_once_with_path_found_and_expected() {
        let yaml = "
listen: {extproc: nowhere, adnim: 127.0.0.1:1}
models:
  - name: a
    default: true
    block_hash: {algorithm: md5}
    tokenizer: {budget: fast}
    events: {report: sometimes}
    discovery: {static: [{address: localhost:8000, events: 'udp://x'}, {events: tcp://h:1}]}
  - {name: b, default: true, aliases: [b], discovery: {static: [{address: 1.1.1.1:1}, {address: 1.1.1.1:1}]}}
  - {name: b, default: true, discovery: {static: [{address: 1.1.1.1:1}]}}
";
        let found = faults(yaml, &[]).join("\n");
        for expected in [
            "listen.adnim: found an unknown setting, expected one of extproc, admin",
            "listen.extproc: found \"nowhere\"",
            "models[0].block_hash.algorithm: found \"md5\"",
            "models[0].tokenizer.budget: found \"fast\"",
            "models[0].events.report: found \"sometimes\"",
            "models[0].discovery.static[0].address: found \"localhost:8000\"",
            "models[0].discovery.static[0].events: found \"udp://x\"",
            "models[0].discovery.static[1].address: found nothing",
            "models[1].discovery.static[1]: found 1.1.1.1:1",
            "models[1]: found the name \"b\"",
            "models[2]: found default: true, which model \"b\" has too",
        ] {
            assert!(found.contains(expected), "{expected}\nis missing in\n{found}");
        }
    }

    #[test]
    fn environment_overrides_scalars_and_unknown_names_are_faults() {
        let env = [
            ("WARMROUTE_LISTEN_ADMIN", "0.0.0.0:1234"),
            ("WARMROUTE_MODELS_0_BLOCK_HASH_PYTHONHASHSEED", "0"),
            ("WARMROUTE_PORT_9002_TCP_ADDR", "set by Kubernetes"),
            ("WARMROUTE_SERVICE_HOST", "set by Kubernetes"),
            ("PATH", "not ours"),
        ];
        let config = parse(FULL, &env).expect("valid");
        assert_eq!(config.listen.admin.port(), 1234);
        assert_eq!(config.models[0].block_hash.pythonhashseed.as_deref(), Some("0"));
        let found = faults(FULL, &[("WARMROUTE_LISTEN_ADMN", "x")]);
        assert_eq!(found.len(), 1);
        assert!(found[0].starts_with("WARMROUTE_LISTEN_ADMN: found \"x\""), "{found:?}");
    }

    #[test]
    fn wrong_shapes_are_faults_and_not_panics() {
        for yaml in ["", "[]", "7", "models: 3", "models: [3]", "models: [{name: [a]}]", "listen: []", "models: {a: 1}"]
        {
            assert!(!faults(yaml, &[]).is_empty(), "{yaml}");
        }
        assert!(matches!(parse("a: [", &[]), Err(Error::Yaml(_))));
        assert!(matches!(parse("listen: {}\nlisten: {}", &[]), Err(Error::Yaml(_))), "a key that is given twice");
    }

    #[test]
    fn text_that_yaml_would_alter_is_refused() {
        for (given, path) in [
            ("name: 1.10", "models[0].name"),
            ("name: yes", "models[0].name"),
            ("name: ''", "models[0].name"),
            ("name: m\n    block_hash: {pythonhashseed: 042}", "models[0].block_hash.pythonhashseed"),
            ("name: m\n    aliases: [1e3]", "models[0].aliases[0]"),
        ] {
            let yaml = format!("models:\n  - {given}\n    discovery: {{static: [{{address: 1.1.1.1:1}}]}}");
            let found = faults(&yaml, &[]);
            assert!(found.len() == 1 && found[0].starts_with(&format!("{path}: ")), "{given}: {found:?}");
        }
    }

    #[test]
    fn values_that_cannot_work_are_refused_before_serving() {
        for (setting, path) in [
            ("shutdown: {delay: 11m}", "shutdown.delay"),
            ("trace: {otlp_endpoint: 'https://c:4317'}", "trace.otlp_endpoint"),
            ("trace: {otlp_endpoint: 'c:4317'}", "trace.otlp_endpoint"),
            ("trace: {sample_ratio: 2}", "trace.sample_ratio"),
            ("log: {filter: 'a=b=c'}", "log.filter"),
            ("limits: {body_bytes: 1}", "limits.body_bytes"),
            ("limits: {index_bytes: 1}", "limits.index_bytes"),
            ("readiness: {warm_deadline: 2h}", "readiness.warm_deadline"),
            ("events: {siblings: ['https://h:1']}", "events.siblings[0]"),
            ("events: {snapshots: {dir: ''}}", "events.snapshots.dir"),
            ("events: {snapshots: {dir: /d, interval: 5ms}}", "events.snapshots.interval"),
        ] {
            let (key, _) = setting.split_once(' ').expect("a setting has a key");
            let others: Vec<&str> = FULL.lines().filter(|line| !line.starts_with(key)).collect();
            let found = faults(&format!("{setting}\n{}", others.join("\n")), &[]);
            assert!(found.len() == 1 && found[0].starts_with(&format!("{path}: ")), "{setting}: {found:?}");
        }
        for address in ["0.0.0.0:8000", "127.0.0.1:0", "localhost:8000"] {
            let found = faults(&FULL.replace("127.0.0.1:8000", address), &[]);
            assert!(found[0].starts_with("models[0].discovery.static[0].address: "), "{found:?}");
        }
    }

    #[test]
    fn settings_of_a_model_that_cannot_work_are_refused_before_serving() {
        let model = |settings: &str| format!("models: [{{name: m, {settings}}}]");
        let endpoint = |settings: &str| model(&format!("discovery: {{static: [{{address: 1.1.1.1:1, {settings}}}]}}"));
        let with_engine =
            |settings: &str| model(&format!("engine: {{{settings}}}, discovery: {{static: [{{address: 1.1.1.1:1}}]}}"));
        let with_events =
            |settings: &str| model(&format!("events: {{{settings}}}, discovery: {{static: [{{address: 1.1.1.1:1}}]}}"));
        for (yaml, expected) in [
            (endpoint("ranks: 0"), "models[0].discovery.static[0].ranks: found 0, expected a number from 1 to 256"),
            (endpoint("ranks: 1000"), "models[0].discovery.static[0].ranks: found 1000"),
            (endpoint("events: ipc:///kv, ranks: 2"), "static[0].ranks: found 2 ranks from ipc:///kv on"),
            (endpoint("events: tcp://h:65535, ranks: 2"), "static[0].ranks: found 2 ranks from tcp://h:65535 on"),
            (endpoint("replay: tcp://h:1"), "models[0].discovery.static[0].replay: found a replay endpoint without"),
            (with_engine("scheme: ftp"), "models[0].engine.scheme: found \"ftp\", expected http or https"),
            (
                with_engine("scheme: https, ca: /no/ca"),
                "models[0].engine.ca: found /no/ca cannot be read: No such file",
            ),
            (with_engine("api_key_file: /no/key"), "models[0].engine.api_key_file: found /no/key cannot be read"),
            (with_engine("api_key_file: 1.10"), "models[0].engine.api_key_file: found a value that YAML reads"),
            (with_events("scrape: 0s"), "models[0].events.scrape: found 0s, expected a duration from 1s to 1h"),
            (with_events("scrape: often"), "models[0].events.scrape: found \"often\""),
            (with_events("discover: perhaps"), "models[0].events.discover: found \"perhaps\", expected true or false"),
        ] {
            let found = faults(&yaml, &[]);
            assert!(found.len() == 1 && found[0].contains(expected), "{expected}\nis not\n{found:?}");
        }
        let both = faults(&with_engine("ca: /no/ca, api_key_file: /no/key"), &[]).join("\n");
        for expected in ["engine.ca: found /no/ca", "engine.ca: found certificates for", "engine.api_key_file: found"] {
            assert!(both.contains(expected), "{expected}\nis missing in\n{both}");
        }
    }

    fn with_discovery(discovery: &str) -> String {
        format!("models: [{{name: m, discovery: {{{discovery}}}}}]")
    }

    #[test]
    fn each_way_of_discovery_reads_back() {
        for discovery in [
            "kubernetes: {}",
            "kubernetes: {namespace: models, preset: llm-d, events_label: kv=yes, port: 80, events_port: 1, ranks: 2}",
            "kubernetes: {preset: none, selector: 'app in (a, b),!c', events_label: ''}",
            "kubernetes: {selector: app=vllm}",
            "kubernetes: {service: engines, replay_port: 7}",
            "kubernetes: {service: engines, preset: none}",
            "kubernetes: {inference_pool: pool.v1}",
            "kubernetes: {inference_pool: pool, preset: aibrix}",
            "dns: {name: engines.models.svc.cluster.local.}",
            "dns: {name: _http._tcp.engines, kind: srv, interval: 5s, events_port: 1, replay_port: 4, ranks: 3}",
            "dns: {name: engines, port: 80}",
            "file: {path: /etc/warmroute/endpoints.yaml}",
            "file: {path: e.json, interval: 100ms}",
        ] {
            let config = parse(&with_discovery(discovery), &[]).expect(discovery);
            let again = parse(&config.to_yaml(), &[]).expect(discovery);
            assert_eq!(again.to_yaml(), config.to_yaml());
        }
    }

    #[test]
    fn discovery_that_cannot_work_is_refused_before_serving() {
        for (discovery, expected) in [
            ("", ": found none of them, expected exactly one of static, kubernetes, dns and file"),
            ("static: []", ".static: found nothing, expected a list of at least one endpoint"),
            ("dns: {name: a}, file: {path: b}", ": found dns and file, expected exactly one of"),
            ("kubernetes: {preset: other}", ".kubernetes.preset: found \"other\", expected aibrix, llm-d or none"),
            ("kubernetes: {preset: none}", ".kubernetes.preset: found none, expected a selector"),
            ("kubernetes: {selector: 'a=b c'}", ".kubernetes.selector: found \"a=b c\""),
            ("kubernetes: {selector: a, service: s}", ".kubernetes: found selector and service, expected at most one"),
            ("kubernetes: {service: s, preset: aibrix}", ".kubernetes.preset: found labels of pods beside a service"),
            ("kubernetes: {service: s, events_label: a=b}", ".kubernetes.events_label: found a label of pods beside"),
            ("kubernetes: {service: S}", ".kubernetes.service: found \"S\", expected the name of a Service"),
            ("kubernetes: {namespace: a/b}", ".kubernetes.namespace: found \"a/b\""),
            ("kubernetes: {events_label: kv}", ".kubernetes.events_label: found \"kv\", expected a label such as"),
            ("kubernetes: {port: 0}", ".kubernetes.port: found 0, expected a port from 1 to 65535"),
            ("kubernetes: {ranks: 257}", ".kubernetes.ranks: found 257, expected a number from 1 to 256"),
            (
                "kubernetes: {ranks: 2}",
                ".kubernetes.replay_port: found events_port 5557 and replay_port 5558 for 2 ranks",
            ),
            ("kubernetes: {events_port: 65535, ranks: 2}", ".kubernetes.ranks: found 2 ranks"),
            ("kubernetes: {label: a}", ".kubernetes.label: found an unknown setting"),
            ("dns: {kind: a}", ".dns.name: found nothing"),
            ("dns: {name: 'a b'}", ".dns.name: found \"a b\""),
            ("dns: {name: a, kind: mx}", ".dns.kind: found \"mx\", expected a or srv"),
            ("dns: {name: a, kind: srv, port: 1}", ".dns.port: found a port beside kind: srv"),
            ("dns: {name: a, interval: 1ms}", ".dns.interval: found 1ms, expected a duration from 1s to 1h"),
            ("file: {}", ".file.path: found nothing"),
            ("file: {path: a, interval: 2h}", ".file.interval: found 2h, expected a duration from 100ms to 1h"),
        ] {
            let found = faults(&with_discovery(discovery), &[]);
            let expected = format!("models[0].discovery{expected}");
            assert!(found.len() == 1 && found[0].starts_with(&expected), "{expected}\nis not\n{found:?}");
        }
        let unlabelled = "models: [{name: org/model, discovery: {kubernetes: {}}}]";
        let found = faults(unlabelled, &[]);
        assert!(found.len() == 1 && found[0].contains("which no label can be"), "{found:?}");
        let selected = "models: [{name: org/model, discovery: {kubernetes: {selector: app=vllm}}}]";
        parse(selected, &[]).expect("a selector needs no label of the model");
    }

    #[test]
    fn an_adapter_needs_no_path_but_an_empty_one_is_a_mistake() {
        let yaml = |adapter: &str| FULL.replace("{name: lora-a, path: model/lora-a}", adapter);
        for adapter in ["{name: lora-a}", "{name: lora-a, path: null}"] {
            assert_eq!(parse(&yaml(adapter), &[]).expect("valid").models[0].adapters[0].path, None);
        }
        let found = faults(&yaml("{name: lora-a, path: ''}"), &[]);
        assert!(found.len() == 1 && found[0].starts_with("models[0].adapters[0].path: found nothing"), "{found:?}");
    }

    #[test]
    fn a_seed_that_looks_like_a_number_stays_text() {
        let yaml = FULL.replace("pythonhashseed: null", "pythonhashseed: 0");
        let config = parse(&yaml, &[]).expect("valid");
        assert_eq!(config.models[0].block_hash.pythonhashseed.as_deref(), Some("0"));
        assert!(config.to_yaml().contains("pythonhashseed: \"0\"") || config.to_yaml().contains("pythonhashseed: '0'"));
    }
}
