//! `cargo e2e engine`: one simulated engine in the foreground. `cargo e2e tools`: the programs of Kubernetes.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use warmroute::routing::hash::HashAlgorithm;

use crate::cache::Cache;
use crate::kube::{crds, tools};
use crate::sim::driver::TimeModel;
use crate::sim::engine::EngineOptions;
use crate::sim::event::WireHash;
use crate::sim::publisher::{BUFFER_STEPS, PublisherOptions};
use crate::sim::{SimOptions, Simulator};

/// Flags of a simulated engine, named after vLLM's where vLLM has them.
#[derive(Clone, Debug, Args)]
pub struct EngineArgs {
    /// HTTP address.
    #[arg(long, default_value = "127.0.0.1:8000")]
    listen: SocketAddr,
    /// PUB socket of the events; always bound.
    #[arg(long, default_value = "tcp://127.0.0.1:5557")]
    events: String,
    /// ROUTER socket for replays.
    #[arg(long, default_value = "tcp://127.0.0.1:5558")]
    replay: String,
    /// Topic of the events.
    #[arg(long, default_value = "")]
    topic: String,
    /// Batches that can be replayed.
    #[arg(long, default_value_t = BUFFER_STEPS)]
    buffer_steps: usize,
    /// Name of the model.
    #[arg(long, default_value = "tiny")]
    served_model_name: String,
    /// Adapters, as NAME=PATH.
    #[arg(long, value_parser = adapter)]
    lora_modules: Vec<(String, String)>,
    /// Blocks of the cache.
    #[arg(long, default_value_t = 4096)]
    num_gpu_blocks_override: usize,
    /// Tokens per block.
    #[arg(long, default_value_t = 16)]
    block_size: u32,
    /// Tokens of prompt and answer together.
    #[arg(long, default_value_t = 32_768)]
    max_model_len: usize,
    /// Requests that run at the same time.
    #[arg(long, default_value_t = 64)]
    max_num_seqs: usize,
    /// Tokens of one step.
    #[arg(long, default_value_t = 8192)]
    max_num_batched_tokens: usize,
    /// sha256, sha256_cbor, xxhash or xxhash_cbor.
    #[arg(long, default_value = "sha256")]
    prefix_caching_hash_algo: HashAlgorithm,
    /// PYTHONHASHSEED of the engine; unset by default.
    #[arg(long)]
    pythonhashseed: Option<String>,
    /// Write whole hashes into events (VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES=0).
    #[arg(long)]
    byte_hashes: bool,
    /// Prompt tokens computed per second.
    #[arg(long, default_value_t = 8000.0)]
    prefill_rate: f64,
    /// Milliseconds per step.
    #[arg(long, default_value_t = 12)]
    step_ms: u64,
}

/// Arguments of a tokenizer in a process of its own.
#[derive(Clone, Debug, Args)]
pub struct TokenizerArgs {
    /// HTTP address.
    #[arg(default_value = "127.0.0.1:0")]
    listen: SocketAddr,
}

impl EngineArgs {
    fn options(self) -> SimOptions {
        SimOptions {
            listen: self.listen,
            events: PublisherOptions {
                endpoint: self.events,
                replay_endpoint: self.replay,
                topic: self.topic,
                buffer_steps: self.buffer_steps,
            },
            model: self.served_model_name,
            adapters: self.lora_modules,
            engine: EngineOptions {
                n_blocks: self.num_gpu_blocks_override,
                block_size: self.block_size,
                max_model_len: self.max_model_len,
                max_num_seqs: self.max_num_seqs,
                max_num_batched_tokens: self.max_num_batched_tokens,
                algorithm: self.prefix_caching_hash_algo,
                seed: self.pythonhashseed,
            },
            time: TimeModel {
                prefill_tokens_per_second: self.prefill_rate,
                decode_step: Duration::from_millis(self.step_ms),
            },
            wire_hash: if self.byte_hashes { WireHash::Bytes } else { WireHash::Int },
        }
    }
}

/// Runs one simulated engine until Ctrl-C and prints where it is.
///
/// # Errors
/// When an address cannot be bound.
pub async fn run_engine(args: EngineArgs) -> Result<()> {
    let engine = Simulator::start(args.options())?;
    println!("http    http://{}", engine.address());
    println!("events  {}", engine.events());
    println!("replay  {}", engine.replay());
    tokio::signal::ctrl_c().await.context("cannot wait for Ctrl-C")
}

/// Serves `/tokenize` until its standard input ends: a process of its own, which can be stopped by a signal.
///
/// # Errors
/// When no address can be bound.
pub fn run_tokenizer(args: &TokenizerArgs) -> Result<()> {
    let engine = Simulator::start(SimOptions { listen: args.listen, ..SimOptions::default() })?;
    println!("{}", engine.address());
    std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink()).context("cannot read the standard input")?;
    Ok(())
}

/// Builds the programs that are not in the cache yet, and prints version and time of each.
///
/// # Errors
/// When one does not build.
pub fn build_tools() -> Result<()> {
    let cache = Cache::from_env()?;
    let report = |name: &str, version: &str, took: Duration, path: &Path| {
        println!("{name:<15} {version:<9} {:>6.1} s  {}", took.as_secs_f64(), path.display());
    };
    tools::build_all(&cache, |built| report(built.name, &built.version, built.took, &built.path))?;
    let start = Instant::now();
    let files = crds(&cache)?;
    let dir = files[0].parent().context("a file is in a directory")?;
    report("CRDs", &format!("{} files", files.len()), start.elapsed(), dir);
    Ok(())
}

fn adapter(text: &str) -> Result<(String, String), String> {
    let (name, path) = text.split_once('=').ok_or_else(|| format!("{text:?} is not NAME=PATH"))?;
    Ok((name.to_owned(), path.to_owned()))
}
