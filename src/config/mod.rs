//! The configuration: one YAML file, overridable by `WARMROUTE_*`, parsed once into types that cannot be wrong.
//!
//! All faults are reported together, each with its path, what was found and what was expected, before any port is
//! opened. Every setting is documented at its field; `warmroute check-config` prints them with the values in force.

mod discovery;
mod engine;
mod reader;
mod values;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use discovery::read_discovery;
pub use discovery::{Discovery, StaticEndpoint};
pub use engine::ModelEvents;
use engine::{read_access, read_model_events};
pub use reader::Fault;
use reader::{Node, Source};
pub use values::{Human, TokenizerKind, ZmqEndpoint};

use crate::engine::Access;
use crate::routing::hash::{BlockHasher, HashAlgorithm};
use crate::routing::index::IndexLimits;
use crate::snapshots::Sibling;
use crate::telemetry::LogFormat;

/// Adapters per model: each has a bit in the index's set of proved kinds of keys.
const MOST_ADAPTERS: usize = 60;

/// The whole configuration.
#[derive(Clone, Debug, Serialize)]
pub struct Config {
    /// Where the servers listen.
    pub listen: Listen,
    /// How Envoy is told the endpoint.
    pub selection: Selection,
    /// Sizes.
    pub limits: Limits,
    /// Logs.
    pub log: Log,
    /// Traces.
    pub trace: Trace,
    /// What is known of the engines' KV events.
    pub events: Events,
    /// Stopping.
    pub shutdown: Shutdown,
    /// One pool of endpoints for each model.
    pub models: Vec<Model>,
}

/// `listen`: addresses of the servers; port 0 takes any free one.
#[derive(Clone, Debug, Serialize)]
pub struct Listen {
    /// gRPC external processor, default `127.0.0.1:9002`.
    pub extproc: SocketAddr,
    /// `/metrics`, `/livez`, `/readyz`, default `127.0.0.1:9090`.
    pub admin: SocketAddr,
}

/// `selection`: how Envoy is told the endpoint.
#[derive(Clone, Debug, Serialize)]
pub struct Selection {
    /// Request header, and key in the dynamic metadata `envoy.lb`; default `x-gateway-destination-endpoint`.
    pub header: String,
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
    /// Share of the requests without a sampled parent that are traced, 0 to 1, default 1.
    pub sample_ratio: f64,
}

/// `events`: what is known of the engines' KV events, beyond a life of ours.
#[derive(Clone, Debug, Serialize)]
pub struct Events {
    /// Snapshots on disk.
    pub snapshots: EventSnapshots,
    /// Admin ports of the other replicas, such as `http://warmroute-headless:9090`. A name may have many addresses, ours
    /// among them.
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

/// `shutdown`: what SIGTERM does.
#[derive(Clone, Debug, Serialize)]
pub struct Shutdown {
    /// Longest time that open streams may take to finish, default 25s. Keep below the pod's termination grace period.
    pub grace: Human,
}

/// `models[]`: one model and the endpoints that serve it.
#[derive(Clone, Debug, Serialize)]
pub struct Model {
    /// As in the request's `model` field.
    pub name: Arc<str>,
    /// Other names for the same model (`--served-model-name` takes several).
    pub aliases: Vec<String>,
    /// Whether requests that name no model come here; at most one model has it.
    pub default: bool,
    /// LoRA adapters, with the paths they were loaded from where they are known: the path is part of vLLM's block hash.
    pub adapters: Vec<Adapter>,
    /// The engine's hash settings.
    pub block_hash: BlockHash,
    /// How the engines are reached over HTTP.
    pub engine: Access,
    /// What the engines are asked about their KV events.
    pub events: ModelEvents,
    /// Where token ids come from.
    pub tokenizer: Tokenizer,
    /// The endpoints.
    pub discovery: Discovery,
}

/// `models[].adapters[]`
#[derive(Clone, Debug, Serialize)]
pub struct Adapter {
    /// As in the request's `model` field.
    pub name: Arc<str>,
    /// `lora_path` as it was given to vLLM; null where it is not known: then the adapter's blocks are credited by their tokens.
    pub path: Option<Arc<str>>,
}

/// `models[].block_hash`: what the engines were started with.
#[derive(Clone, Debug, Serialize)]
pub struct BlockHash {
    /// `--prefix-caching-hash-algo`, default `sha256` (vLLM's default).
    pub algorithm: HashAlgorithm,
    /// `PYTHONHASHSEED` of the engine process; null = unset.
    pub pythonhashseed: Option<String>,
}

impl BlockHash {
    /// The hasher; none when the engine draws a random root (xxhash without a seed).
    pub fn hasher(&self) -> Option<BlockHasher> {
        BlockHasher::new(self.algorithm, self.pythonhashseed.as_deref()).ok()
    }
}

/// `models[].tokenizer`: where token ids come from.
#[derive(Clone, Debug, Serialize)]
pub struct Tokenizer {
    /// `remote`: `/tokenize` of the model's own endpoints.
    pub kind: TokenizerKind,
    /// Longest that a request may wait for its tokens before it is picked by load, default 100ms. Keep below Envoy's
    /// `message_timeout`.
    pub budget: Human,
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
        let faults = source.into_faults();
        match config {
            Some(config) if faults.is_empty() => Ok(config),
            _ => Err(Error::Faults(faults)),
        }
    }

    /// The settings in force, as YAML that [`Config::parse`] reads back.
    pub fn to_yaml(&self) -> String {
        serde_saphyr::to_string(self).expect("a configuration has only strings, numbers, lists and mappings")
    }
}

/// None only together with a fault.
fn read_config(root: &Node<'_>) -> Option<Config> {
    let [listen, selection, limits, log, trace, events, shutdown, models] =
        root.fields(["listen", "selection", "limits", "log", "trace", "events", "shutdown", "models"]);
    let nodes = models.items();
    if nodes.is_empty() {
        models.fault("nothing", "a list of at least one model");
    }
    let parsed: Vec<Option<Model>> = nodes.iter().map(read_model).collect();
    check_names(&nodes, &parsed);
    Some(Config {
        listen: read_listen(&listen),
        selection: read_selection(&selection),
        limits: read_limits(&limits),
        log: read_log(&log),
        trace: read_trace(&trace),
        events: read_events(&events)?,
        shutdown: read_shutdown(&shutdown),
        models: parsed.into_iter().collect::<Option<_>>()?,
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

fn read_selection(node: &Node<'_>) -> Selection {
    const EXPECTED: &str = "a header name of lower-case letters, digits and hyphens that begins with x-";
    let [header] = node.fields(["header"]);
    let name = header.or("x-gateway-destination-endpoint".to_owned(), EXPECTED);
    let token = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if !name.starts_with("x-") || !name.chars().all(token) {
        header.fault(format!("{name:?}"), EXPECTED);
    }
    Selection { header: name }
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
        otlp_endpoint.fault(format!("{url:?}"), ENDPOINT);
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

fn read_shutdown(node: &Node<'_>) -> Shutdown {
    let [grace] = node.fields(["grace"]);
    Shutdown { grace: grace.or(Human(Duration::from_secs(25)), "a duration such as 25s") }
}

fn read_model(node: &Node<'_>) -> Option<Model> {
    let [name, aliases, default, adapters, block_hash, engine, events, tokenizer, discovery] = node.fields([
        "name",
        "aliases",
        "default",
        "adapters",
        "block_hash",
        "engine",
        "events",
        "tokenizer",
        "discovery",
    ]);
    let name = name.name("the model's name");
    let aliases = each(&aliases.items(), |alias| alias.name("a model name"));
    let default = default.or(false, "true or false");
    let n_adapters = adapters.items().len();
    if n_adapters > MOST_ADAPTERS {
        adapters.fault(format!("{n_adapters} adapters"), format!("at most {MOST_ADAPTERS}"));
    }
    let adapters = each(&adapters.items(), read_adapter);
    let block_hash = read_block_hash(&block_hash);
    let (engine, events) = (read_access(&engine), read_model_events(&events));
    let tokenizer = read_tokenizer(&tokenizer);
    let discovery = read_discovery(&discovery);
    Some(Model {
        name: name?.into(),
        aliases: aliases?,
        default,
        adapters: adapters?,
        block_hash,
        engine,
        events,
        tokenizer,
        discovery: discovery?,
    })
}

/// Reads every item, so that the faults of all of them are found, before it says whether one was wrong.
fn each<T>(nodes: &[Node<'_>], read: impl Fn(&Node<'_>) -> Option<T>) -> Option<Vec<T>> {
    let items: Vec<Option<T>> = nodes.iter().map(read).collect();
    items.into_iter().collect()
}

fn read_adapter(node: &Node<'_>) -> Option<Adapter> {
    let [name, path] = node.fields(["name", "path"]);
    const PATH: &str = "the adapter's lora_path, or null where it is not known";
    let (name, lora_path) = (name.name("the adapter's name"), path.string(PATH));
    if lora_path.as_deref() == Some("") {
        path.fault("nothing", PATH);
    }
    Some(Adapter { name: name?.into(), path: lora_path.map(Into::into) })
}

fn read_block_hash(node: &Node<'_>) -> BlockHash {
    let [algorithm, pythonhashseed] = node.fields(["algorithm", "pythonhashseed"]);
    BlockHash {
        algorithm: algorithm.or(HashAlgorithm::Sha256, "sha256, sha256_cbor, xxhash or xxhash_cbor"),
        pythonhashseed: pythonhashseed.string("the engine's PYTHONHASHSEED, or null where it is not set"),
    }
}

fn read_tokenizer(node: &Node<'_>) -> Tokenizer {
    const BUDGET: &str = "a duration from 1ms to 1m, such as 100ms";
    let [kind, budget] = node.fields(["kind", "budget"]);
    let limit = budget.or(Human(Duration::from_millis(100)), BUDGET);
    if !(Duration::from_millis(1)..=Duration::from_secs(60)).contains(&limit.0) {
        budget.fault(format!("{limit}"), BUDGET);
    }
    Tokenizer { kind: kind.or(TokenizerKind::Remote, "remote"), budget: limit }
}

/// A name in a request must lead to one model.
fn check_names(nodes: &[Node<'_>], models: &[Option<Model>]) {
    let mut owner: BTreeMap<&str, &str> = BTreeMap::new();
    let mut default: Option<&str> = None;
    for (node, model) in nodes.iter().zip(models).filter_map(|(node, model)| Some((node, model.as_ref()?))) {
        let names = std::iter::once(&*model.name)
            .chain(model.aliases.iter().map(String::as_str))
            .chain(model.adapters.iter().map(|adapter| &*adapter.name));
        for name in names {
            if let Some(other) = owner.insert(name, &model.name) {
                node.fault(format!("the name {name:?}, which model {other:?} has too"), "names that lead to one model");
            }
        }
        if let Some(other) = default.filter(|_| model.default) {
            node.fault(format!("default: true, which model {other:?} has too"), "one default model");
        }
        default = default.or(model.default.then_some(&*model.name));
    }
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
    tokenizer: {kind: remote, budget: 100ms}
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
            ("selection: {header: target-pod}", "selection.header"),
            ("selection: {header: content-type}", "selection.header"),
            ("trace: {otlp_endpoint: 'https://c:4317'}", "trace.otlp_endpoint"),
            ("trace: {otlp_endpoint: 'c:4317'}", "trace.otlp_endpoint"),
            ("trace: {sample_ratio: 2}", "trace.sample_ratio"),
            ("log: {filter: 'a=b=c'}", "log.filter"),
            ("limits: {body_bytes: 1}", "limits.body_bytes"),
            ("limits: {index_bytes: 1}", "limits.index_bytes"),
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
