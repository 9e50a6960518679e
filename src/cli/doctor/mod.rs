//! `warmroute doctor`: looks at engines and says in plain words what is right, what is wrong and what to change.
//!
//! ```text
//! targets ──▶ observe (HTTP, events, replay, two small requests) ──▶ seen ──▶ judge ──▶ findings ──▶ report
//! ```
//!
//! `observe` does all that is done to an engine and judges nothing; `judge` is a pure function of what was seen. Exit
//! code: 0 where nothing has to change, 1 where something has, 2 where it cannot be said: no engine answers, what
//! matters could not be seen, or the command was used wrongly.

mod judge;
mod observe;
mod report;
mod seen;
mod targets;
mod trial;
mod versions;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use futures_util::future::join_all;

use self::judge::{Expected, Outcome};
use self::observe::Means;
use self::targets::EngineTarget;
use crate::config::{Config, Human, ZmqEndpoint};
use crate::engine::{Base, BuildError, EngineClient};
use crate::tokenizer::local::{LoadError, LocalTokenizer};

/// Exit code where something has to change, and where nothing can be said.
const EXIT_FAULTS: u8 = 1;
const EXIT_UNJUDGED: u8 = 2;

/// Which engines to look at, and how.
#[derive(Debug, Args)]
pub struct Options {
    /// An engine's HTTP server, such as http://10.0.0.1:8000; may be given several times.
    #[arg(long, value_name = "URL", value_parser = engine)]
    engine: Vec<Base>,
    /// Where the first rank of the engine publishes its events, such as tcp://10.0.0.1:5557; the n-th belongs to the n-th engine.
    #[arg(long, value_name = "ZMQ", value_parser = zmq_endpoint)]
    events: Vec<ZmqEndpoint>,
    /// Where it replays them; the n-th belongs to the n-th engine.
    #[arg(long, value_name = "ZMQ", value_parser = zmq_endpoint)]
    replay: Vec<ZmqEndpoint>,
    /// The router's configuration: the engines are compared with it, and taken from its static list where none is named.
    #[arg(long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    /// The model that the engines are to serve.
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// File with the engines' API key.
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// PEM file with the certificates that an engine's may be signed by; without it, those of the system.
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// A PYTHONHASHSEED to try, beside none, "0" and the configured one; may be given several times.
    #[arg(long, value_name = "SEED")]
    pythonhashseed: Vec<String>,
    /// tokenizer.json, or the directory that has it: its tokens are compared with the engines'.
    #[arg(long, value_name = "PATH")]
    tokenizer: Option<PathBuf>,
    /// Send no request to the engines; only what they publish anyway, and replay, can then be judged.
    #[arg(long)]
    no_request: bool,
    /// Write a list of JSON objects.
    #[arg(long)]
    json: bool,
    /// Longest wait for one answer.
    #[arg(long, value_name = "DURATION", default_value = "30s")]
    timeout: Human,
}

fn engine(text: &str) -> Result<Base, String> {
    text.parse().map_err(|error: crate::engine::BaseError| error.to_string())
}

fn zmq_endpoint(text: &str) -> Result<ZmqEndpoint, String> {
    let parsed = text.parse().ok().filter(|endpoint: &ZmqEndpoint| !endpoint.is_bound());
    parsed.ok_or_else(|| "expected tcp://HOST:PORT or ipc://PATH to connect to".to_owned())
}

/// The engines cannot be looked at.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Neither the command line nor the configuration names one.
    #[error("found no engine, expected --engine URL or a --config with a static list of endpoints")]
    NoEngine,
    /// More event addresses than engines.
    #[error(
        "found {n_engines} --engine, {n_events} --events and {n_replays} --replay, expected at most one of these per engine"
    )]
    Unpaired {
        /// `--engine`
        n_engines: usize,
        /// `--events`
        n_events: usize,
        /// `--replay`
        n_replays: usize,
    },
    /// The configuration has no such model, or several.
    #[error("found --model {}, expected one of the configuration's: {expected}", found.as_deref().unwrap_or("not given"))]
    Model {
        /// `--model`
        found: Option<String>,
        /// The configuration's.
        expected: String,
    },
    /// The HTTP client cannot be made.
    #[error(transparent)]
    Client(#[from] BuildError),
    /// The local tokenizer cannot be loaded.
    #[error(transparent)]
    Tokenizer(#[from] LoadError),
    /// The runtime cannot be made.
    #[error("cannot start the async runtime")]
    Runtime(#[source] io::Error),
    /// The findings cannot be written.
    #[error("cannot write to standard output")]
    Output(#[source] io::Error),
}

/// Looks at the engines and writes what was found.
///
/// # Errors
/// [`Error`] when they cannot be looked at.
pub fn run(options: &Options, config: Option<&Config>, mut output: impl Write) -> Result<ExitCode, Error> {
    let model = targets::configured(config, options.model.as_deref())?;
    let access = targets::access(options, model);
    let local = options.tokenizer.as_deref().map(LocalTokenizer::load).transpose()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Error::Runtime)?;
    let name = options.model.as_deref().or(model.map(|model| &*model.name));
    let seen = runtime.block_on(async {
        let targets = targets::targets(options, model).await?;
        let means = Means {
            timeout: options.timeout.0.max(Duration::from_millis(1)),
            sends: !options.no_request,
            model: name,
            local: local.as_ref(),
        };
        let client = |target: &EngineTarget| EngineClient::new(&access.of_base(&target.http));
        let clients = targets.iter().map(client).collect::<Result<Vec<_>, _>>()?;
        let observed = targets.iter().zip(clients).map(|(target, client)| observe::observe(target, client, &means));
        let seen = join_all(observed).await;
        Ok::<_, Error>(targets.into_iter().map(|target| target.configured).zip(seen).collect::<Vec<_>>())
    })?;
    // A name server that hangs holds a thread.
    runtime.shutdown_background();
    let expected = Expected {
        model: model.map(judge::Configured::of),
        seeds: seeds(options, model.and_then(|model| model.block_hash.pythonhashseed.clone())),
        sends: !options.no_request,
    };
    let findings = judge::judge(&seen, &expected);
    let outcome = judge::outcome(&findings);
    let written = if options.json {
        report::json(&findings, &mut output)
    } else {
        report::text(&findings, outcome, expected.sends, &mut output)
    };
    written.map_err(Error::Output)?;
    Ok(match outcome {
        Outcome::Good => ExitCode::SUCCESS,
        Outcome::Faults => EXIT_FAULTS.into(),
        Outcome::Unjudged => EXIT_UNJUDGED.into(),
    })
}

/// What is tried as `PYTHONHASHSEED`; none: not set.
fn seeds(options: &Options, configured: Option<String>) -> Vec<Option<String>> {
    let mut seeds = vec![None, Some("0".to_owned())];
    for seed in configured.into_iter().chain(options.pythonhashseed.iter().cloned()).map(Some) {
        if !seeds.contains(&seed) {
            seeds.push(seed);
        }
    }
    seeds
}
