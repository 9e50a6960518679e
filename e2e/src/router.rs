//! The real `warmroute` binary, with a written configuration.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use warmroute::routing::hash::HashAlgorithm;

use crate::engines::ENGINE_MODEL;
use crate::envoy::Gateway;
use crate::service::{Service, free_addresses};
use crate::tool::{cargo, env_path, run};

const START_DEADLINE: Duration = Duration::from_secs(20);
/// How long it may take to end: as long as answers go on, which is what the chart gives a pod and more.
const GRACE: Duration = Duration::from_secs(40);

/// One engine as the router is told of it.
#[derive(Clone, Debug)]
pub struct EngineAddress {
    /// HTTP address, as Envoy dials it.
    pub http: SocketAddr,
    /// PUB socket of its events.
    pub events: String,
    /// ROUTER socket for replays.
    pub replay: String,
}

/// What the router is configured with; everything else stays at its default.
#[derive(Clone, Debug)]
pub struct RouterOptions {
    /// Name of the model that all engines serve.
    pub model: String,
    /// `--prefix-caching-hash-algo` of the engines, `PYTHONHASHSEED` unset.
    pub algorithm: HashAlgorithm,
    /// Whether the engines themselves are asked where they publish events, and the router is not told. By default it is
    /// told and does not ask: what stands between router and engine in a test must not be gone round.
    pub asks_for_sources: bool,
    /// Name and `lora_path` of each adapter that the engines have; an empty path is left out.
    pub adapters: Vec<(String, String)>,
    /// The engines.
    pub engines: Vec<EngineAddress>,
    /// `models[].discovery` in whole; none: a static list of the engines.
    pub discovery: Option<Value>,
    /// Whether the router is told where events are replayed.
    pub replays: bool,
    /// `models[].events.report`.
    pub reports: bool,
    /// `models[].events.sync`; none: not in the file.
    pub sync: Option<bool>,
    /// `models[].tokenizer` in whole; none: not in the file.
    pub tokenizer: Option<Value>,
    /// Variables of the router's environment.
    pub env: Vec<(String, String)>,
    /// `events.snapshots.dir`, written every second.
    pub snapshots: Option<PathBuf>,
    /// How Envoy is set up, which decides how it is told the endpoint.
    pub gateway: Gateway,
    /// `limits.body_bytes`; none: not in the file.
    pub body_bytes: Option<usize>,
}

impl RouterOptions {
    /// Engines with vLLM's default algorithm and no adapters; replays, but no reports.
    pub fn new(engines: Vec<EngineAddress>) -> Self {
        let model = ENGINE_MODEL.to_owned();
        Self {
            model,
            algorithm: HashAlgorithm::Sha256,
            adapters: Vec::new(),
            asks_for_sources: false,
            engines,
            discovery: None,
            replays: true,
            reports: false,
            sync: None,
            tokenizer: Some(json!({"kind": "remote"})),
            env: Vec::new(),
            snapshots: None,
            gateway: Gateway::default(),
            body_bytes: None,
        }
    }

    /// With a budget for tokens that no machine exceeds, though shorter than Envoy's patience: for whoever looks at
    /// where requests go, and not at when.
    pub fn patient(self) -> Self {
        Self { tokenizer: Some(json!({"kind": "remote", "budget": "800ms"})), ..self }
    }
}

/// A running router; it ends when it is dropped.
#[derive(Debug)]
pub struct Router {
    service: Service,
    extproc: SocketAddr,
    admin: SocketAddr,
}

impl Router {
    /// Starts `binary` on free ports, with its configuration and log in `dir`, and waits until it is ready.
    ///
    /// # Errors
    /// When it does not accept the configuration or does not become ready.
    pub async fn start(binary: &Path, dir: &Path, options: &RouterOptions) -> Result<Self> {
        Self::start_at(binary, dir, options, free_addresses()?).await
    }

    /// As [`Self::start`], on these addresses for ext_proc and admin.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub async fn start_at(
        binary: &Path,
        dir: &Path,
        options: &RouterOptions,
        [extproc, admin]: [SocketAddr; 2],
    ) -> Result<Self> {
        let command = command(binary, dir, options, [extproc, admin])?;
        let service = Service::start("warmroute", command, &dir.join("warmroute.log"))?;
        service.wait_ready(&format!("http://{admin}/readyz"), START_DEADLINE).await?;
        Ok(Self { service, extproc, admin })
    }

    /// Ends it as Kubernetes does: SIGTERM.
    ///
    /// # Errors
    /// When it cannot be signalled.
    pub async fn stop(self) -> Result<()> {
        self.service.stop_within(GRACE).await
    }

    /// Ends it without a word: SIGKILL.
    ///
    /// # Errors
    /// When it cannot be signalled.
    pub async fn kill(self) -> Result<()> {
        self.service.kill().await
    }

    /// The ext_proc gRPC server.
    pub fn extproc(&self) -> SocketAddr {
        self.extproc
    }

    /// Health and metrics.
    pub fn admin(&self) -> SocketAddr {
        self.admin
    }

    /// The program, for its memory and processor time.
    pub fn service(&self) -> &Service {
        &self.service
    }

    /// `/metrics` of the router.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn metrics(&self) -> Result<String> {
        let request = crate::http::client().get(format!("http://{}/metrics", self.admin));
        let answer = request.send().await.context("GET /metrics")?;
        answer.text().await.context("GET /metrics: answer")
    }
}

/// What starts the router on these addresses for ext_proc and admin, with a configuration that it has written into
/// `dir`.
///
/// # Errors
/// When the configuration cannot be written.
pub fn command(
    binary: &Path,
    dir: &Path,
    options: &RouterOptions,
    [extproc, admin]: [SocketAddr; 2],
) -> Result<Command> {
    let file = dir.join("warmroute.yaml");
    // JSON is YAML.
    std::fs::write(&file, serde_json::to_vec_pretty(&config(options, extproc, admin))?)
        .with_context(|| format!("cannot write {}", file.display()))?;
    let mut command = Command::new(binary);
    command.arg("serve").arg("--config").arg(&file);
    // The router takes these for settings, and the harness has some WARMROUTE_* of its own.
    let is_setting = |name: &str| name.starts_with("WARMROUTE_") || name.starts_with("AIBRIX_");
    for (name, _) in std::env::vars_os().filter(|(name, _)| is_setting(&name.to_string_lossy())) {
        command.env_remove(name);
    }
    command.envs(options.env.iter().map(|(name, value)| (name, value)));
    Ok(command)
}

/// The path of the router's binary: `E2E_WARMROUTE_BIN`, else built now in the profile that this harness was built in.
///
/// # Errors
/// When it does not build.
pub fn binary() -> Result<PathBuf> {
    if let Some(path) = env_path("E2E_WARMROUTE_BIN") {
        return Ok(path);
    }
    let mut command = cargo();
    command.current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."));
    // Of what is compiled already: features of dependencies are those that all that is named here asks for, and where they
    // differ from those that this harness was built with, the dependencies are compiled once more.
    command.args(if is_test(&std::env::current_exe().context("path of this program")?) {
        ["test", "--no-run", "--workspace", "--test", "configuration"].as_slice()
    } else {
        &["build", "--package", "warmroute", "--package", "e2e", "--bin", "warmroute"]
    });
    if !cfg!(debug_assertions) {
        command.arg("--release");
    }
    command.arg("--message-format=json-render-diagnostics");
    let messages = run(&mut command)?;
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let mut executables = messages.filter_map(|message| executable(&message));
    executables.next().context("cargo named no executable")
}

/// Whether this is a program of `cargo test`, which wants what tests need on top of what the packages do.
fn is_test(program: &Path) -> bool {
    program.parent().is_some_and(|dir| dir.ends_with("deps"))
}

/// The router's binary, if this is cargo's message of having it.
fn executable(message: &Value) -> Option<PathBuf> {
    let is_router = message["target"]["name"] == "warmroute" && message["target"]["kind"] == json!(["bin"]);
    let is_test = message["profile"]["test"] == true;
    Some(PathBuf::from(message["executable"].as_str().filter(|_| is_router && !is_test)?))
}

fn config(options: &RouterOptions, extproc: SocketAddr, admin: SocketAddr) -> Value {
    let engine = |engine: &EngineAddress| {
        let replay = options.replays.then_some(&engine.replay);
        if options.asks_for_sources {
            json!({"address": engine.http})
        } else {
            json!({"address": engine.http, "events": engine.events, "replay": replay})
        }
    };
    let adapter = |(name, path): &(String, String)| {
        let path = Some(path).filter(|path| !path.is_empty());
        json!({"name": name, "path": path})
    };
    let mut config = json!({
        "listen": {"extproc": extproc, "admin": admin},
        // Some engines are dead on purpose, and nobody shall wait for them.
        "readiness": {"warm_deadline": "2s"},
        "events": {"snapshots": {"dir": options.snapshots, "interval": "1s"}},
        "selection": match options.gateway {
            Gateway::OverrideHost | Gateway::FullDuplex => json!({"header": "x-gateway-destination-endpoint"}),
            Gateway::OriginalDst => json!({"mode": "original_dst"}),
        },
        "models": [{
            "name": options.model,
            "adapters": options.adapters.iter().map(adapter).collect::<Vec<_>>(),
            "block_hash": {"algorithm": options.algorithm.as_str()},
            "events": {"discover": options.asks_for_sources, "report": options.reports},
            "discovery": {"static": options.engines.iter().map(engine).collect::<Vec<_>>()},
        }],
    });
    if let Some(body_bytes) = options.body_bytes {
        config["limits"] = json!({"body_bytes": body_bytes});
    }
    // What is not in the file may come from the environment, and an empty value would be one.
    let model = &mut config["models"][0];
    if let Some(tokenizer) = &options.tokenizer {
        model["tokenizer"] = tokenizer.clone();
    }
    if let Some(discovery) = &options.discovery {
        model["discovery"] = discovery.clone();
    }
    if let Some(sync) = options.sync {
        model["events"]["sync"] = sync.into();
    }
    config
}
