//! Command line of the harness.

use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use e2e::audit::{self, AuditArgs};
use e2e::cli::{EngineArgs, TokenizerArgs, build_tools, run_engine, run_tokenizer};
use e2e::demo::{self, DemoArgs};
use e2e::faults::{self, FaultsArgs};
use e2e::interrupt::interrupted;
use e2e::lag::{self, LagArgs};
use e2e::proxy::{ProxyArgs, run_proxy};
use e2e::publisher::swarm::{SwarmArgs, run_swarm};
use e2e::publisher::{PublisherArgs, run_publisher};
use tokio_util::sync::CancellationToken;

/// Longest wait for scenarios that are told to end: routers and engines have a grace period of their own.
const INTERRUPTED_GRACE: Duration = Duration::from_secs(30);

/// Harness of warmroute.
#[derive(Debug, Parser)]
#[command(name = "e2e", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Compare warmroute with Envoy's own policies on the same load.
    Demo(DemoArgs),
    /// Run one simulated engine until Ctrl-C.
    Engine(Box<EngineArgs>),
    /// Show what faults on real sockets do to the event plane.
    Faults(FaultsArgs),
    /// Send events without faults, and count what arrives.
    Audit(AuditArgs),
    /// Build the programs that the tests on Kubernetes run: API server, etcd, kubectl, Helm, Envoy Gateway.
    Tools,
    /// Measure the time from a publisher's clock to the index.
    Lag(LagArgs),
    /// The event plane in a process of its own, for the scenarios.
    #[command(hide = true)]
    Follower,
    /// Serve `/tokenize` in a process of its own, for the scenarios.
    #[command(hide = true)]
    Tokenizer(TokenizerArgs),
    /// Publish the KV events of a cache that follows from a seed, as vLLM's publisher thread does.
    Publisher(PublisherArgs),
    /// Many small publishers in one process.
    #[command(hide = true)]
    Swarm(SwarmArgs),
    /// Stand between a subscriber and a publisher, and lose, delay or spoil messages.
    Proxy(ProxyArgs),
}

fn main() -> ExitCode {
    run(Cli::parse_from(arguments(std::env::args_os()))).unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

/// Drops the `--` of `cargo demo -- --engine vllm`: the alias has one of its own before the subcommand.
fn arguments(given: impl Iterator<Item = OsString>) -> impl Iterator<Item = OsString> {
    given.enumerate().filter(|(position, argument)| !(*position == 2 && argument == "--")).map(|(_, argument)| argument)
}

fn run(cli: Cli) -> Result<ExitCode> {
    match cli.command {
        Command::Faults(args) => run_faults(args),
        Command::Audit(args) => run_audit(&args),
        Command::Tools => build_tools().map(|()| ExitCode::SUCCESS),
        Command::Lag(args) => lag::print(&args).map(|()| ExitCode::SUCCESS),
        Command::Follower => faults::run_follower().map(|()| ExitCode::SUCCESS),
        Command::Tokenizer(args) => run_tokenizer(&args).map(|()| ExitCode::SUCCESS),
        Command::Publisher(args) => run_publisher(&args).map(|()| ExitCode::SUCCESS),
        Command::Swarm(args) => run_swarm(&args).map(|()| ExitCode::SUCCESS),
        Command::Proxy(args) => run_proxy(&args).map(|()| ExitCode::SUCCESS),
        Command::Demo(args) => on_runtime(run_demo(args)),
        Command::Engine(args) => on_runtime(async { run_engine(*args).await.map(|()| ExitCode::SUCCESS) }),
    }
}

/// Scenarios block, so they run beside the signals. A second signal changes nothing: the wait for them is bounded.
fn run_faults(args: FaultsArgs) -> Result<ExitCode> {
    let runtime = tokio::runtime::Runtime::new().context("cannot start the runtime")?;
    let told = CancellationToken::new();
    let ended = runtime.block_on(async {
        let scenarios = told.clone();
        let mut running = tokio::task::spawn_blocking(move || faults::run(&args, scenarios));
        tokio::select! {
            ended = &mut running => return ended.context("the scenarios panicked")?,
            interrupted = interrupted() => interrupted?,
        }
        told.cancel();
        let ended = tokio::time::timeout(INTERRUPTED_GRACE, running).await.context("a scenario goes on")?;
        ended.context("the scenarios panicked")?
    });
    runtime.shutdown_background();
    Ok(if ended? { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn run_audit(args: &AuditArgs) -> Result<ExitCode> {
    let balance = audit::run(&std::env::current_exe().context("path of this program")?, args)?;
    println!("{balance}");
    Ok(if balance.is_even() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn on_runtime(work: impl Future<Output = Result<ExitCode>>) -> Result<ExitCode> {
    let runtime = tokio::runtime::Runtime::new().context("cannot start the runtime")?;
    runtime.block_on(work)
}

/// What the demo has started ends when its future is dropped.
async fn run_demo(args: DemoArgs) -> Result<ExitCode> {
    tokio::select! {
        proved = demo::run(args) => Ok(if proved? { ExitCode::SUCCESS } else { ExitCode::FAILURE }),
        interrupted = interrupted() => interrupted.and(Ok(ExitCode::FAILURE)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn demo_takes_its_options_with_and_without_a_separator() {
        for given in [&["e2e", "demo", "--engine", "vllm"][..], &["e2e", "demo", "--", "--engine", "vllm"]] {
            let cli = Cli::try_parse_from(arguments(given.iter().map(OsString::from))).expect("valid arguments");
            assert!(matches!(cli.command, Command::Demo(DemoArgs { engine: demo::EngineKind::Vllm, .. })), "{given:?}");
        }
    }
}
