//! Command line of the harness.

use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use e2e::audit::{self, AuditArgs};
use e2e::cli::{EngineArgs, TokenizerArgs, build_tools, run_engine, run_tokenizer};
use e2e::cost::{self, CostArgs, SubscriberArgs, run_subscriber};
use e2e::coverage::{self, CoverageArgs};
use e2e::demo::{self, DemoArgs};
use e2e::faults::{self, FaultsArgs};
use e2e::interrupt::interrupted;
use e2e::lag::{self, LagArgs};
use e2e::proxy::{ProxyArgs, run_proxy};
use e2e::publisher::swarm::{SwarmArgs, run_swarm};
use e2e::publisher::{PublisherArgs, run_publisher};
use e2e::suites::{self, Suite, SuiteArgs, ratios};
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
    /// Run the tests of several parts together: the router's sockets, Envoy, simulated engines, vLLM where it is installed.
    Integration(SuiteArgs),
    /// Build the programs of Kubernetes, and run the tests against them.
    K8s(SuiteArgs),
    /// Run the benchmarks in short, and print what they compare.
    Bench(SuiteArgs),
    /// Run every scenario of faults.
    Chaos(SuiteArgs),
    /// Run what is too long for every day: hours.
    Deep(SuiteArgs),
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
    /// Measure what the router takes of processors and network, per pod.
    Cost(CostArgs),
    /// Count the lines that the tests have run, by what `cargo llvm-cov` has written.
    Coverage(CoverageArgs),
    /// Compare the figures of the benchmarks that were run last.
    Ratios,
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
    /// Receive and drop, in a process of its own, for the measurements.
    #[command(hide = true)]
    Subscriber(SubscriberArgs),
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
        Command::Integration(args) => on_runtime(run_suite(Suite::Integration, args)),
        Command::K8s(args) => on_runtime(run_suite(Suite::K8s, args)),
        Command::Bench(args) => on_runtime(run_suite(Suite::Bench, args)),
        Command::Chaos(args) => on_runtime(run_suite(Suite::Chaos, args)),
        Command::Deep(args) => on_runtime(run_suite(Suite::Deep, args)),
        Command::Cost(args) => on_runtime(run_cost(args)),
        Command::Coverage(args) => coverage::run(&args).map(code),
        Command::Ratios => ratios::print().map(|()| ExitCode::SUCCESS),
        Command::Subscriber(args) => run_subscriber(&args).map(|()| ExitCode::SUCCESS),
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
    ended.map(code)
}

fn run_audit(args: &AuditArgs) -> Result<ExitCode> {
    let balance = audit::run(&std::env::current_exe().context("path of this program")?, args)?;
    println!("{balance}");
    Ok(code(balance.is_even()))
}

fn on_runtime(work: impl Future<Output = Result<ExitCode>>) -> Result<ExitCode> {
    let runtime = tokio::runtime::Runtime::new().context("cannot start the runtime")?;
    runtime.block_on(work)
}

/// What the demo has started ends when its future is dropped.
async fn run_demo(args: DemoArgs) -> Result<ExitCode> {
    tokio::select! {
        proved = demo::run(args) => proved.map(code),
        interrupted = interrupted() => interrupted.and(Ok(ExitCode::FAILURE)),
    }
}

/// As [`run_demo`]: the program that runs ends with the future.
async fn run_suite(suite: Suite, args: SuiteArgs) -> Result<ExitCode> {
    tokio::select! {
        passed = suites::run(suite, args) => passed.map(code),
        interrupted = interrupted() => interrupted.and(Ok(ExitCode::FAILURE)),
    }
}

/// As [`run_demo`]: routers and publishers end with the future.
async fn run_cost(args: CostArgs) -> Result<ExitCode> {
    tokio::select! {
        measured = cost::print(args) => measured.map(|()| ExitCode::SUCCESS),
        interrupted = interrupted() => interrupted.and(Ok(ExitCode::FAILURE)),
    }
}

fn code(is_good: bool) -> ExitCode {
    if is_good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
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

    #[test]
    fn each_suite_has_a_command() {
        for name in ["integration", "k8s", "bench", "chaos", "deep"] {
            let cli = Cli::try_parse_from(["e2e", name, "--list"]).expect("valid arguments");
            let is_meant = match (name, &cli.command) {
                ("integration", Command::Integration(args))
                | ("k8s", Command::K8s(args))
                | ("bench", Command::Bench(args))
                | ("chaos", Command::Chaos(args))
                | ("deep", Command::Deep(args)) => args.list,
                _ => false,
            };
            assert!(is_meant, "{name}: {:?}", cli.command);
        }
    }
}
