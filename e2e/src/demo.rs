//! `cargo demo`: the same load under round-robin, least-request and warmroute, through a real Envoy.
//!
//! Every run starts from empty caches, with a fresh router and a fresh Envoy; the policies take turns within each
//! round, so that a machine that slows down slows all of them.

use std::io::{IsTerminal, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};

use crate::cache::Cache;
use crate::engines::{ENGINE_MODEL, Engines};
use crate::envoy::{Balancing, Envoy, Gateway};
use crate::fetch;
use crate::load::{self, Target};
use crate::report::{self, PolicyRuns, Proof, Run};
use crate::router::{self, Router, RouterOptions};
use crate::sim::driver::TimeModel;
use crate::sim::engine::EngineOptions;
use crate::sim::{SimOptions, tokenizer};
use crate::vllm::VllmOptions;
use crate::workload::{Workload, WorkloadOptions};

/// How many engines' caches the working set would fill.
const WORKING_SET_CACHES: usize = 3;
const PROGRESS_INTERVAL: Duration = Duration::from_millis(500);

/// Which engines the demo runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum EngineKind {
    /// Four simulated engines: vLLM's cache rules, and the speed of a GPU.
    Simulated,
    /// Two real vLLM servers on the CPU.
    Vllm,
}

/// Arguments of the demo.
#[derive(Clone, Debug, Args)]
pub struct DemoArgs {
    /// Which engines to run on.
    #[arg(long, value_enum, default_value_t = EngineKind::Simulated)]
    pub engine: EngineKind,
    /// Runs per policy; the median counts.
    #[arg(long, default_value_t = 3)]
    pub runs: usize,
    /// Seed of the load.
    #[arg(long, default_value_t = 20_261_121)]
    pub seed: u64,
}

/// Who chooses the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Policy {
    RoundRobin,
    LeastRequest,
    Warmroute,
}

impl Policy {
    const ALL: [Self; 3] = [Self::RoundRobin, Self::LeastRequest, Self::Warmroute];

    fn name(self) -> &'static str {
        match self {
            Self::RoundRobin => "round-robin",
            Self::LeastRequest => "least-request",
            Self::Warmroute => "warmroute",
        }
    }
}

/// Runs the demo; false when the proof is not complete.
///
/// # Errors
/// When a part cannot be got or started.
pub async fn run(args: DemoArgs) -> Result<bool> {
    let stage = Stage::build(&args).await?;
    stage.announce();
    let mut policies = Policy::ALL.map(|policy| PolicyRuns { name: policy.name(), runs: Vec::new() });
    for round in 1..=args.runs {
        for (policy, runs) in Policy::ALL.into_iter().zip(&mut policies) {
            let label = format!("run {round}/{} {}", args.runs, policy.name());
            let start = Instant::now();
            let run = stage.play(policy, &label).await.with_context(|| label.clone())?;
            println!("{label:<22} {run} ({:.1} s)", start.elapsed().as_secs_f64());
            runs.runs.push(run);
        }
    }
    let [round_robin, least_request, ours] = policies;
    let rivals = [round_robin, least_request];
    let all: Vec<PolicyRuns> = rivals.iter().chain([&ours]).cloned().collect();
    println!("\nmedians of {} runs\n{}\n", args.runs, report::table(&all));
    let faults = report::faults(&rivals, &ours, stage.kind.proof());
    for fault in &faults {
        println!("FAILED: {fault}");
    }
    if faults.is_empty() {
        println!("warmroute keeps conversations where they are warm");
    }
    Ok(faults.is_empty())
}

impl EngineKind {
    fn proof(self) -> Proof {
        match self {
            Self::Simulated => Proof::CacheAndLatency,
            Self::Vllm => Proof::Cache,
        }
    }

    fn workload(self, seed: u64) -> WorkloadOptions {
        match self {
            Self::Simulated => WorkloadOptions {
                seed,
                n_conversations: 56,
                n_users: 28,
                n_turns: 5,
                n_shared_prompts: 4,
                system_words: 400,
                opening_words: 600,
                question_words: 60,
                answer_tokens: 24,
                think: Duration::from_millis(700),
                words: (0..tokenizer::N_WORDS).map(tokenizer::word).collect(),
            },
            Self::Vllm => WorkloadOptions {
                seed,
                n_conversations: 24,
                n_users: 18,
                n_turns: 6,
                n_shared_prompts: 2,
                system_words: 200,
                opening_words: 250,
                question_words: 150,
                answer_tokens: 8,
                think: Duration::from_millis(500),
                words: TINY_WORDS.split(' ').map(String::from).collect(),
            },
        }
    }
}

/// Words that are one token each in the tokenizer of the tiny model (`e2e/vllm/make_model.py`).
const TINY_WORDS: &str = "the quick brown fox jumps over lazy dog router cache block prefix token hash envoy engine";

/// Everything that all runs share.
struct Stage {
    kind: EngineKind,
    envoy: PathBuf,
    router: PathBuf,
    dir: PathBuf,
    workload: Arc<Workload>,
    n_blocks: usize,
    sim: SimOptions,
    /// vLLM takes a minute to start, so its servers serve all runs and are emptied in between.
    vllm: Option<Engines>,
}

impl Stage {
    async fn build(args: &DemoArgs) -> Result<Self> {
        let cache = Cache::from_env()?;
        let envoy = fetch::envoy(&cache)?;
        let router = tokio::task::spawn_blocking(router::binary).await.context("building the router panicked")??;
        let dir = cache.root().join("logs").join(format!("demo-{}", std::process::id()));
        std::fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let workload = Arc::new(Workload::generate(args.engine.workload(args.seed)));
        let (n_blocks, vllm) = match args.engine {
            EngineKind::Simulated => (n_blocks(&workload, 16), None),
            EngineKind::Vllm => {
                let n_blocks = n_blocks(&workload, 32);
                println!("starting two vLLM servers, this takes a minute or two");
                let n_blocks_flag = Some(u32::try_from(n_blocks)?);
                let options = VllmOptions { n_blocks: n_blocks_flag, ..VllmOptions::default() };
                (n_blocks, Some(Engines::vllm(2, &options).await?))
            }
        };
        let engine =
            EngineOptions { n_blocks, max_model_len: 4096, max_num_batched_tokens: 2048, ..EngineOptions::default() };
        let time = TimeModel { prefill_tokens_per_second: 6000.0, decode_step: Duration::from_millis(15) };
        let sim = SimOptions { engine, time, ..SimOptions::default() };
        Ok(Self { kind: args.engine, envoy, router, dir, workload, n_blocks, sim, vllm })
    }

    fn announce(&self) {
        println!("load: {}", self.workload);
        match self.kind {
            EngineKind::Simulated => println!(
                "engines: 4 simulated, {} blocks of 16 tokens each (a third of the working set), prefill {} tokens/s, {:?} per step",
                self.n_blocks, self.sim.time.prefill_tokens_per_second, self.sim.time.decode_step
            ),
            EngineKind::Vllm => println!(
                "engines: 2 vLLM servers on the CPU, {} blocks of 32 tokens each (a third of the working set)",
                self.n_blocks
            ),
        }
        println!("logs: {}\n", self.dir.display());
    }

    async fn play(&self, policy: Policy, label: &str) -> Result<Run> {
        let started;
        let engines = match &self.vllm {
            Some(engines) => {
                engines.reset().await?;
                engines
            }
            None => {
                started = Engines::simulated(4, &self.sim)?;
                &started
            }
        };
        let dir = self.dir.join(label.replace([' ', '/'], "-"));
        std::fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let (router, balancing) = self.balance(policy, engines, &dir).await?;
        let envoy = Envoy::start(&self.envoy, &dir, balancing, &engines.http()).await?;
        let target = Target { url: format!("http://{}", envoy.address()), model: ENGINE_MODEL.to_owned() };
        let n_done = Arc::new(AtomicUsize::new(0));
        let load = load::run(target, self.workload.clone(), n_done.clone());
        let outcomes = with_progress(label, self.workload.n_requests(), &n_done, load).await?;
        if let Some(router) = router {
            let file = dir.join("warmroute-metrics.txt");
            std::fs::write(&file, router.metrics().await?)
                .with_context(|| format!("cannot write {}", file.display()))?;
        }
        Ok(Run::of(&outcomes))
    }

    /// The router, if the policy has one, and what Envoy is told.
    async fn balance(&self, policy: Policy, engines: &Engines, dir: &Path) -> Result<(Option<Router>, Balancing)> {
        Ok(match policy {
            Policy::RoundRobin => (None, Balancing::RoundRobin),
            Policy::LeastRequest => (None, Balancing::LeastRequest),
            Policy::Warmroute => {
                let options = RouterOptions::new(engines.addresses());
                let router = Router::start(&self.router, dir, &options).await?;
                let extproc = router.extproc();
                (Some(router), Balancing::Warmroute(extproc, Gateway::OverrideHost))
            }
        })
    }
}

/// Blocks of one engine, so that the working set is [`WORKING_SET_CACHES`] times its cache.
fn n_blocks(workload: &Workload, block_size: usize) -> usize {
    workload.working_set_tokens() / WORKING_SET_CACHES / block_size
}

/// Shows how far `load` is, on a terminal only.
async fn with_progress<T>(label: &str, n_requests: usize, n_done: &AtomicUsize, load: impl Future<Output = T>) -> T {
    let mut load = std::pin::pin!(load);
    let mut ticks = tokio::time::interval(PROGRESS_INTERVAL);
    let visible = std::io::stderr().is_terminal();
    loop {
        tokio::select! {
            result = &mut load => {
                if visible {
                    eprint!("\r{:78}\r", "");
                }
                return result;
            }
            _ = ticks.tick() => if visible {
                eprint!("\r{label:<22} {}/{n_requests} requests", n_done.load(Ordering::Relaxed));
                // Progress that cannot be shown is no reason to stop.
                let _ = std::io::stderr().flush();
            },
        }
    }
}
