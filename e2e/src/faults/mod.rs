//! `cargo e2e faults`: what the router makes of faults on real sockets.
//!
//! A scenario of the event plane has an engine's publisher ([`crate::publisher`]) and the event plane (`follower`) in
//! processes of their own, in between mostly the fault proxy. It ends with a check against the publisher's model: the
//! index equals the engine's cache, or the source is flagged and nothing is credited that the engine does not hold. A
//! scenario that finds otherwise fails. Those of `tokenizer` have a load go on through Envoy while the tokenizer fails.

mod crowds;
mod follower;
mod line;
mod losses;
mod namespace;
mod restarts;
mod routed;
mod tokenizer;

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;
use tokio_util::sync::CancellationToken;

pub use follower::{Check, SourceView, run_follower};
pub(crate) use follower::{Follower, raise_file_limit, source};
pub use tokenizer::{Times, TokenizerFigures};

/// Flags of the scenarios.
#[derive(Clone, Debug, Args)]
pub struct FaultsArgs {
    /// Scenarios to run; none: all.
    pub names: Vec<String>,
    /// How long the thousand sources flap.
    #[arg(long, default_value_t = 60)]
    pub flap_seconds: u64,
}

/// What a scenario showed.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    /// From the fault, or its end, until nothing of what is gone was credited.
    pub purge: Option<Duration>,
    /// From the fault, or its end, until the source was settled and checked.
    pub converge: Option<Duration>,
    /// Blocks credited afterwards that the engine does not hold.
    pub n_false: u64,
    /// Blocks that it holds and that are not credited.
    pub n_missing: u64,
    /// Whether the source's digest is that of what the engine holds.
    pub is_digest_equal: bool,
    /// Gaps of the live stream.
    pub n_gaps: u64,
    /// Replays requested.
    pub n_replays: u64,
    /// The source's state at the end.
    pub state: String,
    /// What else there is to say.
    pub note: String,
}

/// One scenario.
#[derive(Clone, Copy, Debug)]
pub struct Scenario {
    /// Its name.
    pub name: &'static str,
    /// What goes wrong.
    pub what: &'static str,
    run: fn(&Setting) -> Result<Outcome>,
}

/// What scenarios are run with.
#[derive(Clone, Debug)]
pub struct Setting {
    /// This harness's program.
    pub binary: std::path::PathBuf,
    /// How long the thousand sources flap.
    pub flap: Duration,
    /// Ends a scenario that has started routers, and these with it: unlike followers and publishers they do not end
    /// with us.
    pub interrupted: CancellationToken,
}

/// How a scenario ended.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// It showed what it should.
    Held(Figures),
    /// So did one with a faulty tokenizer.
    Tokenized(TokenizerFigures),
    /// It cannot be run here.
    Skipped(String),
}

/// All scenarios, in the order in which they are shown.
pub const SCENARIOS: &[Scenario] = &[
    Scenario { name: "restart", what: "kill -9 and restart", run: restarts::restart },
    Scenario { name: "overtaken", what: "restart whose numbers overtake the old ones", run: restarts::overtaken },
    Scenario { name: "reused", what: "address reused by another model", run: restarts::reused },
    Scenario {
        name: "half-open",
        what: "half-open TCP: black hole, the engine is replaced behind it",
        run: restarts::half_open,
    },
    Scenario {
        name: "half-open-netns",
        what: "the same by packets dropped in a network namespace",
        run: namespace::half_open,
    },
    Scenario { name: "stalled", what: "black hole of 3 s, then everything arrives late", run: restarts::stalled },
    Scenario {
        name: "deaf",
        what: "the publisher's side of the connection is closed, ours is not told",
        run: restarts::deaf,
    },
    Scenario { name: "loss", what: "20 % of live messages and replies are lost", run: losses::loss },
    Scenario { name: "duplicates", what: "30 % of live messages and replies come twice", run: losses::duplicates },
    Scenario {
        name: "truncated",
        what: "replay cut in the middle of a frame every 200 replies",
        run: losses::truncated,
    },
    Scenario { name: "end-lost", what: "END of replays is lost", run: losses::end_lost },
    Scenario { name: "overrun", what: "replay buffer overrun", run: losses::overrun },
    Scenario {
        name: "hwm",
        what: "publisher drops at its high-water mark while we are stopped",
        run: losses::high_water_mark,
    },
    Scenario { name: "flapping", what: "publisher killed and restarted every 300 ms", run: restarts::flapping },
    Scenario { name: "herd", what: "200 sources reconnect at once", run: crowds::herd },
    Scenario { name: "crowd", what: "1,000 sources flap for a minute", run: crowds::flapping_crowd },
    Scenario { name: "garbage", what: "garbage beside healthy sources", run: crowds::garbage },
    Scenario { name: "router-restart", what: "the router is restarted under load", run: routed::restart },
    Scenario {
        name: "router-overrun",
        what: "the router starts anew behind overrun buffers, under load",
        run: routed::overrun,
    },
    Scenario { name: "tokenizer-slow", what: "all tokenizers take 10 s", run: tokenizer::slow },
    Scenario { name: "tokenizer-errors", what: "all tokenizers answer 500", run: tokenizer::errors },
    Scenario {
        name: "tokenizer-black-hole",
        what: "all tokenizers accept and never answer",
        run: tokenizer::black_hole,
    },
    Scenario { name: "tokenizer-cut", what: "all tokenizers cut their answers", run: tokenizer::cut },
    Scenario { name: "tokenizer-nonsense", what: "all tokenizers answer nonsense", run: tokenizer::nonsense },
    Scenario { name: "tokenizer-half", what: "half of the tokenizers never answer", run: tokenizer::half },
    Scenario {
        name: "tokenizer-saturated",
        what: "tokenizers serve one call at a time, 100 ms each",
        run: tokenizer::saturated,
    },
    Scenario {
        name: "tokenizer-foreign-engine",
        what: "one of four tokenizers answers another model's ids",
        run: tokenizer::foreign_engine,
    },
    Scenario {
        name: "tokenizer-foreign-endpoint",
        what: "the only tokenizer answers another model's ids",
        run: tokenizer::foreign_endpoint,
    },
    Scenario { name: "tokenizer-stopped", what: "the only tokenizer gets SIGSTOP", run: tokenizer::stopped },
    Scenario { name: "tokenizer-gone", what: "the only tokenizer is killed", run: tokenizer::gone },
];

impl Scenario {
    /// The scenario called `name`.
    pub fn by_name(name: &str) -> Option<Self> {
        SCENARIOS.iter().find(|scenario| scenario.name == name).copied()
    }

    /// Runs it.
    ///
    /// # Errors
    /// When something is credited that the engine does not hold, or a source claims to be complete and is not.
    pub fn run(&self, setting: &Setting) -> Result<Outcome> {
        (self.run)(setting).with_context(|| format!("{} ({})", self.name, self.what))
    }
}

impl Outcome {
    /// The names of the columns in which it is shown.
    fn header(&self) -> Option<String> {
        match self {
            Self::Held(_) => Some(row(&[
                "scenario", "purge", "converge", "false", "missing", "gaps", "replays", "state", "run", "note",
            ])),
            Self::Tokenized(_) => Some(TokenizerFigures::header()),
            Self::Skipped(_) => None,
        }
    }
}

impl Setting {
    /// Scenarios run by `binary`, flapping for `flap`.
    pub fn new(binary: &Path, flap: Duration) -> Self {
        Self { binary: binary.to_owned(), flap, interrupted: CancellationToken::new() }
    }
}

/// Runs the named scenarios until `interrupted`, and prints a table; false when one failed.
///
/// # Errors
/// When a name is unknown, or when it is interrupted.
pub fn run(args: &FaultsArgs, interrupted: CancellationToken) -> Result<bool> {
    let binary = std::env::current_exe().context("path of this program")?;
    let setting = Setting { interrupted, ..Setting::new(&binary, Duration::from_secs(args.flap_seconds)) };
    let known = |name: &String| Scenario::by_name(name).with_context(|| format!("no scenario is called {name:?}"));
    let chosen: Vec<Scenario> = args.names.iter().map(known).collect::<Result<_>>()?;
    let chosen = if chosen.is_empty() { SCENARIOS.to_vec() } else { chosen };
    let (mut n_failed, mut shown) = (0, None);
    for scenario in &chosen {
        let started = Instant::now();
        let outcome = scenario.run(&setting);
        ensure!(!setting.interrupted.is_cancelled(), "interrupted in {}", scenario.name);
        let took = format!("{:.0} s", started.elapsed().as_secs_f64());
        let header = outcome.as_ref().ok().and_then(Outcome::header);
        if let Some(header) = header.filter(|header| shown.as_ref() != Some(header)) {
            println!("{header}");
            shown = Some(header);
        }
        match outcome {
            Ok(Outcome::Held(figures)) => println!("{}", figures.row(scenario.name, &took)),
            Ok(Outcome::Tokenized(figures)) => println!("{}", figures.rows(scenario.name)),
            Ok(Outcome::Skipped(reason)) => println!("{:<16} SKIPPED: {reason}", scenario.name),
            Err(error) => {
                n_failed += 1;
                println!("{:<16} FAILED: {error:#}", scenario.name);
            }
        }
    }
    println!("\n{} scenarios, {n_failed} failed", chosen.len());
    Ok(n_failed == 0)
}

impl Figures {
    /// What a check and the source's state say.
    fn of(view: &SourceView, check: Check) -> Self {
        Self {
            n_false: check.n_false,
            n_missing: check.n_held - check.n_credited,
            is_digest_equal: check.is_digest_equal,
            n_gaps: view.n_gaps,
            n_replays: view.n_replays,
            state: view.state.clone(),
            ..Self::default()
        }
    }

    /// Holds the figures against what must be true whatever happened.
    ///
    /// # Errors
    /// When something is credited that is not held, or something is missing from a source that is not flagged.
    fn verified(self) -> Result<Self> {
        ensure!(self.n_false == 0, "{} blocks are credited that the engine does not hold: {self:?}", self.n_false);
        let is_exact = self.n_missing == 0 && self.is_digest_equal;
        ensure!(is_exact || self.state != "live", "{} blocks are missing from a live source: {self:?}", self.n_missing);
        Ok(self)
    }

    fn row(&self, name: &str, took: &str) -> String {
        let time =
            |time: Option<Duration>| time.map_or_else(|| "-".to_owned(), |time| format!("{:.3} s", time.as_secs_f64()));
        row(&[
            name,
            &time(self.purge),
            &time(self.converge),
            &self.n_false.to_string(),
            &self.n_missing.to_string(),
            &self.n_gaps.to_string(),
            &self.n_replays.to_string(),
            &self.state,
            took,
            &self.note,
        ])
    }
}

fn row(cells: &[&str; 10]) -> String {
    let [name, purge, converge, n_false, n_missing, n_gaps, n_replays, state, took, note] = cells;
    format!(
        "{name:<16} {purge:>9} {converge:>9} {n_false:>6} {n_missing:>7} {n_gaps:>6} {n_replays:>7}  {state:<11} {took:>5}  {note}"
    )
}
