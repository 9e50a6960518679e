//! The command line.

pub mod admin_port;
mod columns;
pub mod decode;
pub mod doctor;
pub mod explain;
pub mod hash;
mod lines;
pub mod ready;
mod sockets;
pub mod tail;
pub mod top;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};

use crate::config::{self, Alias, Config, ConfigFile};
use crate::supervisor::{self, ConfigText};

/// Exit code for a configuration that cannot be used, as `sysexits`-minded supervisors and the chart expect.
const EXIT_CONFIG: u8 = 2;

/// Longest wait, after everything has stopped, for threads that are still in a call to the system.
const STUCK_THREADS_GRACE: Duration = Duration::from_secs(1);

/// Envoy external processor that sends each LLM request to the vLLM endpoint whose KV cache is warm for it.
#[derive(Debug, Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve ext_proc and the admin port until SIGTERM or SIGINT.
    Serve {
        /// YAML file; WARMROUTE_* variables override its settings.
        #[arg(long)]
        config: PathBuf,
    },
    /// Check a configuration and print it with every setting's value in force.
    CheckConfig {
        /// YAML file; WARMROUTE_* variables override its settings.
        #[arg(long)]
        config: PathBuf,
    },
    /// Ask routers whether they are ready; exit with 1 and their reasons when one is not.
    Ready(ready::Options),
    /// Look at engines and say what is right, what is wrong and what to change; exit with 1 when something has to.
    Doctor(doctor::Options),
    /// Say why a request goes, or went, where it does.
    Explain(explain::Options),
    /// Watch a router's endpoints and decisions, live.
    Top(top::Options),
    /// Compute vLLM's block hashes: JSON lines from standard input to standard output.
    Hash,
    /// Decode vLLM's KV event batches: JSON lines from standard input to standard output.
    Decode,
    /// Look at what an engine publishes.
    #[command(subcommand)]
    Events(EventsCommand),
}

#[derive(Debug, Subcommand)]
enum EventsCommand {
    /// Show KV events as they come, decoded, with marks for gaps, restarts and what cannot be read.
    Tail(tail::Options),
}

/// The program could not do what it was asked.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    ReadConfig(#[from] config::ReadError),
    #[error(transparent)]
    Config(#[from] config::Error),
    #[error("cannot start the async runtime")]
    Runtime(#[source] io::Error),
    #[error(transparent)]
    Serve(#[from] supervisor::Error),
    #[error("cannot read standard input or write standard output")]
    Stdio(#[source] io::Error),
    #[error(transparent)]
    Ready(#[from] ready::Error),
    #[error(transparent)]
    Tail(#[from] tail::Error),
    #[error(transparent)]
    Doctor(#[from] doctor::Error),
    #[error(transparent)]
    Explain(#[from] explain::Error),
    #[error(transparent)]
    Top(#[from] top::Error),
}

/// Runs the command that the arguments name.
pub fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(code) => code,
        Err(error) => {
            report(&error);
            // Of `doctor` 1 means that something is wrong with an engine, not with how it was asked.
            if matches!(error, Error::Config(_) | Error::ReadConfig(_) | Error::Doctor(_)) {
                EXIT_CONFIG.into()
            } else {
                ExitCode::FAILURE
            }
        }
    }
}

fn run(command: Command) -> Result<ExitCode, Error> {
    match command {
        Command::Serve { config } => serve(&config),
        Command::CheckConfig { config } => {
            let config = load(&config)?;
            for Alias { name, setting } in &config.aliases {
                eprintln!("warmroute: {name} is taken for {setting}: use that");
            }
            io::stdout().write_all(config.to_yaml().as_bytes()).map_err(Error::Stdio)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Ready(options) => {
            for address in ready::run(&options)? {
                writeln!(io::stdout(), "{address} is ready").map_err(Error::Stdio)?;
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Doctor(options) => {
            let config = options.config.as_deref().map(load).transpose()?;
            Ok(doctor::run(&options, config.as_ref(), io::stdout())?)
        }
        Command::Explain(options) => {
            explain::run(options, io::stdout())?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Top(options) => {
            top::run(options)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Hash => hash::run(io::stdin().lock(), io::stdout().lock()).map_err(Error::Stdio),
        Command::Decode => decode::run(io::stdin().lock(), io::stdout().lock()).map_err(Error::Stdio),
        Command::Events(EventsCommand::Tail(options)) => {
            tail::run(options, io::stdout())?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn load(path: &Path) -> Result<Config, Error> {
    let file = ConfigFile::of_process(path);
    Ok(file.parse(&file.read()?)?)
}

fn serve(path: &Path) -> Result<ExitCode, Error> {
    let file = ConfigFile::of_process(path);
    let text = file.read()?;
    let config = file.parse(&text)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(Error::Runtime)?;
    let ended = runtime.block_on(supervisor::run(config, ConfigText { file, text }));
    // A file system or a name server that hangs holds a thread, and dropping the runtime would wait for it without end.
    runtime.shutdown_timeout(STUCK_THREADS_GRACE);
    ended?;
    Ok(ExitCode::SUCCESS)
}

/// Writes an error and its causes on one line each.
fn report(error: &dyn std::error::Error) {
    eprintln!("warmroute: {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        eprintln!("  caused by: {error}");
        cause = error.source();
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    /// Names that two commands or their groups share are found by this alone, or by whoever runs the command.
    #[test]
    fn commands_fit_together() {
        Cli::command().debug_assert();
        for command in ["explain", "top"] {
            let arguments = ["warmroute", command, "http://127.0.0.1:9090", "--token-file", "t"];
            let more = if command == "explain" { &["an-id"][..] } else { &["--interval", "2s"] };
            let parsed = Cli::try_parse_from(arguments.iter().chain(more));
            assert!(parsed.is_ok(), "{command}: {parsed:?}");
        }
    }
}
