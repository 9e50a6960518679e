//! Command line of the harness.

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use e2e::cli::{EngineArgs, run_engine};
use e2e::demo::{self, DemoArgs};
use tokio::signal::unix::{SignalKind, signal};

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
    let runtime = tokio::runtime::Runtime::new().context("cannot start the runtime")?;
    match cli.command {
        Command::Demo(args) => runtime.block_on(run_demo(args)),
        Command::Engine(args) => runtime.block_on(run_engine(*args)).map(|()| ExitCode::SUCCESS),
    }
}

/// What the demo has started ends when its future is dropped.
async fn run_demo(args: DemoArgs) -> Result<ExitCode> {
    tokio::select! {
        proved = demo::run(args) => Ok(if proved? { ExitCode::SUCCESS } else { ExitCode::FAILURE }),
        interrupted = interrupted() => interrupted.and(Ok(ExitCode::FAILURE)),
    }
}

/// SIGINT or SIGTERM.
async fn interrupted() -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;
    tokio::select! {
        result = tokio::signal::ctrl_c() => result.context("cannot handle SIGINT"),
        _ = terminate.recv() => Ok(()),
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
