//! Real vLLM servers: the CPU build with a tiny random model, one per [`VllmServer`].
//!
//! The first start installs vLLM into the cache (`install`, minutes). A start takes about a minute, nearly all of it
//! imports, and a server holds 2 GB of memory, beside its block cache. Servers listen on free ports of the loopback
//! address, except that the event publisher binds all addresses: vLLM 0.32.0 binds only an endpoint with `*` and
//! connects to any other (`distributed/kv_events.py`).

mod family;
mod install;

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::{Value, json};
use warmroute::routing::hash::HashAlgorithm;

use crate::cache::Cache;
use crate::process::ProcessGroup;
use crate::tool::{path_with, tail};

pub use family::Family;
use install::Install;
pub use install::VLLM_VERSION;

/// The name under which a server serves its model.
pub const MODEL: &str = "tiny";
/// The name of the LoRA adapter, served when [`VllmOptions::lora`] is set.
pub const LORA: &str = "lora-a";
/// Where the adapter lies, as the server is told: the text is part of the block hash, so it must not differ between
/// machines.
pub const LORA_PATH: &str = "model/lora-a";

/// Two servers that start at once beside other load took 87 s on 2 cores; the rest is for slower machines, and for the
/// first start after an install, which compiles the modules that it imports.
const START_DEADLINE: Duration = Duration::from_secs(300);
const POLL_INTERVAL: Duration = Duration::from_millis(250);
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);
/// Below the range from which Linux takes the ports of outgoing connections, which could come in between our look and
/// vLLM's bind.
const PORTS: std::ops::Range<u16> = 20_000..32_000;

/// What a server is started with.
#[derive(Debug, Clone)]
pub struct VllmOptions {
    /// How blocks are hashed.
    pub algorithm: HashAlgorithm,
    /// `PYTHONHASHSEED`, from which the first block's parent hash follows; `None` leaves it unset.
    pub pythonhashseed: Option<String>,
    /// Tokens per block; the CPU backend takes multiples of 32 only.
    pub block_size: u32,
    /// Number of blocks in the cache; `None` lets vLLM fill 1 GiB, which it takes at once (32 KiB per block of 32
    /// tokens).
    pub n_blocks: Option<u32>,
    /// Longest prompt and answer together, in tokens.
    pub max_model_len: u32,
    /// How the model's prompts become tokens.
    pub family: Family,
    /// Whether [`LORA`] is served beside [`MODEL`].
    pub lora: bool,
    /// The core that computes; `None` lets the kernel choose.
    pub core: Option<usize>,
    /// Topic of the event stream.
    pub topic: String,
    /// Data-parallel ranks, each with a cache and event ports of its own, all behind one HTTP port.
    pub n_ranks: u16,
    /// Further flags of `vllm serve`.
    pub args: Vec<String>,
}

impl Default for VllmOptions {
    /// vLLM's own defaults where it has some, on its smallest block size for CPUs.
    fn default() -> Self {
        Self {
            algorithm: HashAlgorithm::Sha256,
            pythonhashseed: None,
            block_size: 32,
            n_blocks: None,
            max_model_len: 2048,
            family: Family::default(),
            lora: false,
            core: None,
            topic: String::new(),
            n_ranks: 1,
            args: Vec::new(),
        }
    }
}

/// Whether `cache` holds vLLM already.
pub fn is_installed(cache: &Cache) -> bool {
    Install::is_in(cache)
}

/// A running vLLM server; dropping it ends it.
#[derive(Debug)]
pub struct VllmServer {
    options: VllmOptions,
    group: ProcessGroup,
    ports: Ports,
    log: PathBuf,
    http: reqwest::Client,
}

impl VllmServer {
    /// Starts a server and waits until it answers. Installs vLLM first when the cache does not hold it.
    ///
    /// # Errors
    /// When vLLM can't be installed, when the server exits or does not answer in time (the error ends with what its log
    /// says), or when something else answers in its place.
    pub async fn start(options: VllmOptions) -> Result<Self> {
        Self::start_on(options, None).await
    }

    /// Kills all processes of the server without a warning, and starts another one on the same ports.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub async fn kill_and_restart(self) -> Result<Self> {
        let Self { options, group, ports, .. } = self;
        group.kill().await?;
        Self::start_on(options, Some(ports)).await
    }

    async fn start_on(options: VllmOptions, ports: Option<Ports>) -> Result<Self> {
        let spawn = move || Self::spawn(options, ports);
        let server = tokio::task::spawn_blocking(spawn).await.context("starting vLLM panicked")??;
        match server.wait_ready().await {
            Ok(()) => Ok(server),
            Err(error) => {
                let log = fs::read(&server.log).unwrap_or_default();
                let said = summary(&String::from_utf8_lossy(&log));
                Err(anyhow!("{error:#}; its log {} holds {said}", server.log.display()))
            }
        }
    }

    /// Where the OpenAI API is served.
    pub fn addr(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.ports.http).into()
    }

    /// The URL of `path` on this server.
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.addr())
    }

    /// The endpoint where events are published, for a subscriber.
    pub fn events(&self) -> String {
        format!("tcp://127.0.0.1:{}", self.ports.events)
    }

    /// The endpoint where past events are replayed.
    pub fn replay(&self) -> String {
        format!("tcp://127.0.0.1:{}", self.ports.replay)
    }

    /// What the server wrote, standard output and error together.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// The id of the server's process group.
    pub fn group_id(&self) -> u32 {
        self.group.id()
    }

    /// Posts `body` to `path` and returns the answer's JSON.
    ///
    /// # Errors
    /// When the server does not answer, or with another status than 2xx.
    pub async fn post(&self, path: &str, body: &Value) -> Result<Value> {
        let request = self.http.post(self.url(path)).timeout(REQUEST_TIMEOUT).json(body);
        let response = request.send().await.with_context(|| format!("POST {path}"))?;
        let status = response.status();
        let text = response.text().await.with_context(|| format!("POST {path}: answer"))?;
        ensure!(status.is_success(), "POST {path}: {status}: {text}");
        serde_json::from_str(&text).with_context(|| format!("POST {path}: {text:?} is not JSON"))
    }

    /// Makes the engine forget all blocks. It says so in its event stream only with its next step.
    ///
    /// # Errors
    /// When the server refuses, as it does while a request runs.
    pub async fn reset_prefix_cache(&self) -> Result<()> {
        let answer = self.post("/reset_prefix_cache", &json!({})).await?;
        ensure!(answer["success"] == true, "POST /reset_prefix_cache answered {answer}, expected success");
        Ok(())
    }

    /// Ends the server with all its processes.
    ///
    /// # Errors
    /// When they can't be signalled.
    pub async fn stop(self) -> Result<ExitStatus> {
        self.group.stop().await
    }

    fn spawn(options: VllmOptions, ports: Option<Ports>) -> Result<Self> {
        let cache = Cache::from_env()?;
        let install = Install::get(&cache)?;
        let model_dir = install.model(&cache, options.max_model_len, options.family)?;
        let ports = match ports {
            Some(ports) => ports,
            None => Ports::free(options.n_ranks)?,
        };
        let log = log_path(&cache, ports.http)?;
        let log_file = File::create(&log).with_context(|| format!("cannot create {}", log.display()))?;
        let log_file_too = log_file.try_clone().context("cannot share the log file")?;
        let mut command = Command::new(install.python());
        command
            .arg(install.serve_script())
            .args(arguments(&options, ports))
            .current_dir(model_dir)
            .env("PATH", path_with(&install.bin())?)
            .env_remove("PYTHONHASHSEED")
            // Else every process of every start compiles what it imports.
            .env_remove("PYTHONDONTWRITEBYTECODE")
            .envs(environment(&options))
            .stdout(Stdio::from(log_file))
            .stderr(Stdio::from(log_file_too));
        let group = ProcessGroup::spawn("vLLM", &mut command)?;
        let http = crate::http::client();
        Ok(Self { options, group, ports, log, http })
    }

    async fn wait_ready(&self) -> Result<()> {
        let deadline = Instant::now() + START_DEADLINE;
        while !self.is_healthy().await {
            ensure!(!self.group.has_exited()?, "vLLM exited while starting");
            ensure!(Instant::now() < deadline, "vLLM does not answer {START_DEADLINE:?} after its start");
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        // Whatever else might listen there, it is not our server.
        ensure!(!self.group.has_exited()?, "vLLM exited, but {} answers", self.url("/health"));
        let url = self.url("/version");
        let answer: Value = self.http.get(&url).timeout(REQUEST_TIMEOUT).send().await?.json().await?;
        ensure!(answer["version"] == VLLM_VERSION, "{url} answered {answer}, expected version {VLLM_VERSION}");
        Ok(())
    }

    async fn is_healthy(&self) -> bool {
        let request = self.http.get(self.url("/health")).timeout(Duration::from_secs(2));
        matches!(request.send().await, Ok(response) if response.status().is_success())
    }
}

/// The ports of one server.
#[derive(Debug, Clone, Copy)]
struct Ports {
    http: u16,
    events: u16,
    replay: u16,
}

impl Ports {
    /// Ports on which nobody listens: one for HTTP, one per rank for events and for replays. They are not reserved:
    /// vLLM binds them itself, some seconds later.
    fn free(n_ranks: u16) -> Result<Self> {
        let n_ports = 1 + 2 * n_ranks;
        for _ in 0..100 {
            let http = fastrand::u16(PORTS.start..PORTS.end - n_ports);
            // On all addresses, as the publisher will.
            let listeners: Vec<_> = (http..http + n_ports)
                .map_while(|port| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).ok())
                .collect();
            if listeners.len() == usize::from(n_ports) {
                return Ok(Self { http, events: http + 1, replay: http + 1 + n_ranks });
            }
        }
        bail!("found no {n_ports} free ports in a row in {PORTS:?}")
    }
}

fn log_path(cache: &Cache, port: u16) -> Result<PathBuf> {
    let dir = cache.root().join("logs");
    fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    Ok(dir.join(format!("vllm-{}-{port}.log", std::process::id())))
}

fn arguments(options: &VllmOptions, ports: Ports) -> Vec<String> {
    let events = json!({
        "enable_kv_cache_events": true,
        "publisher": "zmq",
        "endpoint": format!("tcp://*:{}", ports.events),
        "replay_endpoint": format!("tcp://127.0.0.1:{}", ports.replay),
        "topic": options.topic,
    });
    let mut arguments: Vec<String> = ["serve", "model/tiny", "--served-model-name", MODEL].map(Into::into).into();
    arguments.extend(["--load-format", "dummy", "--dtype", "float32", "--enforce-eager"].map(Into::into));
    arguments.extend(["--host".into(), "127.0.0.1".into(), "--port".into(), ports.http.to_string()]);
    arguments.extend(["--block-size".into(), options.block_size.to_string()]);
    arguments.extend(["--max-model-len".into(), options.max_model_len.to_string()]);
    arguments.extend(["--max-num-seqs", "8", "--enable-prompt-tokens-details"].map(Into::into));
    arguments.extend(["--enable-prefix-caching", "--prefix-caching-hash-algo"].map(Into::into));
    arguments.push(algorithm_flag(options.algorithm).into());
    arguments.extend(["--kv-events-config".into(), events.to_string()]);
    if let Some(n_blocks) = options.n_blocks {
        arguments.extend(["--num-gpu-blocks-override".into(), n_blocks.to_string()]);
    }
    if options.n_ranks > 1 {
        // By default vLLM starts as many API servers as ranks.
        arguments.extend(["--data-parallel-size".into(), options.n_ranks.to_string()]);
        arguments.extend(["--api-server-count", "1"].map(Into::into));
    }
    if options.lora {
        arguments.extend(["--enable-lora", "--max-lora-rank", "8", "--lora-modules"].map(Into::into));
        arguments.push(format!("{LORA}={LORA_PATH}"));
    }
    arguments.extend(options.args.iter().cloned());
    arguments
}

/// The first error in `log`, which is nearer to the cause than the last, and the last lines.
fn summary(log: &str) -> String {
    let is_error = |line: &&str| line.contains("Error: ") && !line.contains("WARNING");
    let first_error = log.lines().find(is_error).unwrap_or("no error");
    format!("first:\n{first_error}\nand last:\n{}", tail(log))
}

fn algorithm_flag(algorithm: HashAlgorithm) -> &'static str {
    match algorithm {
        HashAlgorithm::Sha256 => "sha256",
        HashAlgorithm::Sha256Cbor => "sha256_cbor",
        HashAlgorithm::Xxhash => "xxhash",
        HashAlgorithm::XxhashCbor => "xxhash_cbor",
    }
}

fn environment(options: &VllmOptions) -> Vec<(&'static str, String)> {
    // A list of cores must have one part per rank, so several ranks are left to the kernel.
    let core = options.core.filter(|_| options.n_ranks == 1);
    let core = core.map_or_else(|| "nobind".to_owned(), |core| core.to_string());
    let mut environment = vec![
        ("VLLM_CPU_KVCACHE_SPACE", "1".to_owned()),
        ("VLLM_CPU_OMP_THREADS_BIND", core),
        ("OMP_NUM_THREADS", "1".to_owned()),
        ("VLLM_HOST_IP", "127.0.0.1".to_owned()),
        // Serves /reset_prefix_cache.
        ("VLLM_SERVER_DEV_MODE", "1".to_owned()),
        ("VLLM_NO_USAGE_STATS", "1".to_owned()),
        ("DO_NOT_TRACK", "1".to_owned()),
        ("HF_HUB_OFFLINE", "1".to_owned()),
        ("TRANSFORMERS_OFFLINE", "1".to_owned()),
    ];
    environment.extend(options.pythonhashseed.clone().map(|seed| ("PYTHONHASHSEED", seed)));
    environment
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_ports_differ() {
        let Ports { http, events, replay } = Ports::free(3).unwrap();
        assert!(PORTS.contains(&http) && http < events && events + 3 <= replay && PORTS.contains(&(replay + 2)));
    }

    #[test]
    fn summary_starts_with_the_root_cause() {
        let log = "WARNING see OSError: x\nValueError: no common block size\n  trace\nRuntimeError: failed\n";
        assert!(summary(log).starts_with("first:\nValueError: no common block size\nand last:\n"));
    }
}
