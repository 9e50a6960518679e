//! `cargo e2e integration | k8s | bench | chaos | deep`: all tests or measurements of one kind by one command.
//!
//! A suite is a list of steps, each a program that is run to its end with its output on ours. A step whose programs are
//! not on this machine is skipped, and the sum says so; a step that fails makes the command fail, and the next one is run
//! all the same. `steps` has the lists, `ratios` what a benchmark's figures are compared with.

pub mod ratios;
mod steps;

use std::env;
use std::fmt;
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;

use crate::process::ProcessGroup;
use crate::tool::cargo;
pub use steps::Suite;
use steps::{Program, Step};

const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Flags of a suite.
#[derive(Clone, Copy, Debug, Args)]
pub struct SuiteArgs {
    /// Print the steps instead of running them.
    #[arg(long)]
    pub list: bool,
}

/// What became of a step.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Ending {
    Passed,
    Failed(String),
    /// What it needs and is not here.
    Skipped(String),
}

/// Runs a suite; false when a step failed. Dropping it ends the program that runs.
///
/// # Errors
/// When a program cannot be started or watched.
pub async fn run(suite: Suite, args: SuiteArgs) -> Result<bool> {
    if args.list {
        suite.steps().iter().for_each(|step| println!("{:<14} {}", step.name, step.command_line()));
        return Ok(true);
    }
    let harness = env::current_exe().context("path of this program")?;
    let mut endings = Vec::new();
    for step in suite.steps() {
        let started = Instant::now();
        let ending = match step.missing() {
            Some(missing) => Ending::Skipped(missing),
            None => {
                println!("\n=== {}: {}", step.name, step.command_line());
                Ending::of(run_to_its_end(step.name, &mut step.command(&harness)).await?)
            }
        };
        println!("=== {}: {ending}", step.name);
        endings.push((step.name, ending, started.elapsed()));
    }
    println!("\n{:<14} {:>8}  result", "step", "took");
    for (name, ending, took) in &endings {
        println!("{name:<14} {:>6.0} s  {ending}", took.as_secs_f64());
    }
    if let Some(note) = suite.note() {
        println!("\n{note}");
    }
    Ok(!endings.iter().any(|(_, ending, _)| matches!(ending, Ending::Failed(_))))
}

async fn run_to_its_end(name: &str, command: &mut Command) -> Result<ExitStatus> {
    let group = ProcessGroup::spawn(name, command)?;
    while !group.has_exited()? {
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    // What it has left behind ends too.
    group.stop().await
}

impl Ending {
    fn of(status: ExitStatus) -> Self {
        if status.success() { Self::Passed } else { Self::Failed(status.to_string()) }
    }
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Passed => write!(f, "passed"),
            Self::Failed(status) => write!(f, "FAILED ({status})"),
            Self::Skipped(missing) => write!(f, "SKIPPED: {missing}"),
        }
    }
}

impl Step {
    fn command(&self, harness: &Path) -> Command {
        let mut command = match self.program {
            Program::Cargo => cargo(),
            Program::Nightly => {
                let mut rustup = Command::new("rustup");
                rustup.args(["run", "nightly", "cargo"]);
                // Otherwise they name the toolchain that has started us.
                rustup.env_remove("CARGO").env_remove("RUSTUP_TOOLCHAIN");
                rustup
            }
            Program::Harness => Command::new(harness),
        };
        command.args(self.arguments).current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."));
        command
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_child_that_fails_has_failed() {
        let status = |script: &'static str| async move {
            Ending::of(run_to_its_end("shell", Command::new("sh").args(["-c", script])).await.unwrap())
        };
        assert_eq!(status("exit 0").await, Ending::Passed);
        assert_eq!(status("exit 3").await, Ending::Failed("exit status: 3".to_owned()));
        assert_eq!(status("kill -9 $$").await, Ending::Failed("signal: 9 (SIGKILL)".to_owned()));
    }

    #[test]
    fn arguments_go_to_the_program_that_is_meant() {
        let harness = Path::new("/bin/harness");
        let line = |program, arguments| {
            let step = Step { name: "step", program, arguments, needs: &[] };
            let command = step.command(harness);
            let mut words = vec![Path::new(command.get_program()).file_name().unwrap().to_str().unwrap().to_owned()];
            words.extend(command.get_args().map(|word| word.to_str().unwrap().to_owned()));
            words.join(" ")
        };
        assert_eq!(line(Program::Cargo, &["test", "--locked"]), "cargo test --locked");
        assert_eq!(line(Program::Nightly, &["fuzz", "run"]), "rustup run nightly cargo fuzz run");
        assert_eq!(line(Program::Harness, &["faults"]), "harness faults");
    }
}
