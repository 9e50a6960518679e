//! Tokenizers that fail under a steady load: through a real Envoy and the real router, in front of simulated engines.
//!
//! One run has a time before the fault, which is the control, one with it, and one after it. No request may fail, the
//! first ones may wait for their tokens as long as the budget says, the later ones not at all, and when the fault is
//! over, prefixes are matched again. What fails is `/tokenize` alone: the engines go on generating, so whatever a
//! request waits for beyond the control's time to the first token is the router's.

mod figures;
mod load;
mod stage;
mod watch;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use self::figures::Run;
pub use self::figures::{Times, TokenizerFigures};
use self::load::{FIRST_ROUND, SteadyLoad};
use self::stage::{Asked, N_ENGINES, Stage};
use self::watch::Watch;
use super::routed::on_runtime;
use super::{Outcome, Setting};
use crate::sim::fault::TokenizeFault;

/// The load's beginning: every conversation has been there twice.
const WARM: Duration = FIRST_ROUND.saturating_mul(2);
const CONTROL: Duration = Duration::from_secs(6);
const FAULT: Duration = Duration::from_secs(12);
/// Endpoints that work are compared with each other every 30 to 33 s.
const COMPARED: Duration = Duration::from_secs(40);
/// The load goes on for this long once prefixes are matched again.
const AFTER: Duration = Duration::from_secs(2);
/// Longest time from the end of a fault until prefixes are matched again.
const RECOVERY_DEADLINE: Duration = Duration::from_secs(30);
/// The router's default.
const BUDGET: Duration = Duration::from_millis(100);
const POLL: Duration = Duration::from_millis(100);

/// Slower than any budget.
const SLOW: TokenizeFault = TokenizeFault::Slow(Duration::from_secs(10));
/// One call takes what the budget allows, and all others wait for it.
const SATURATED: TokenizeFault = TokenizeFault::OneAtATime(Duration::from_millis(100));

/// One scenario.
struct Case {
    name: &'static str,
    asked: Asked,
    fault: Fault,
    lasts: Duration,
    expected: Expected,
}

/// What happens to who is asked for tokens.
#[derive(Clone, Copy)]
enum Fault {
    /// The engines, or the first few of them, or the endpoint of its own, answer `/tokenize` like this.
    Answers { n_engines: usize, how: TokenizeFault },
    /// The process gets SIGSTOP, later SIGCONT.
    Stopped,
    /// The process is killed, later there is another at its address.
    Gone,
}

/// What the router is to make of it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Expected {
    /// Breakers open, and nobody waits any more.
    Open,
    /// Nobody waits longer than the budget.
    Bounded,
}

pub(super) fn slow(setting: &Setting) -> Result<Outcome> {
    Case::engines("slow", N_ENGINES, SLOW, Expected::Open).run(setting)
}

pub(super) fn errors(setting: &Setting) -> Result<Outcome> {
    Case::engines("errors", N_ENGINES, TokenizeFault::Error, Expected::Open).run(setting)
}

pub(super) fn black_hole(setting: &Setting) -> Result<Outcome> {
    Case::engines("black-hole", N_ENGINES, TokenizeFault::BlackHole, Expected::Open).run(setting)
}

pub(super) fn cut(setting: &Setting) -> Result<Outcome> {
    Case::engines("cut", N_ENGINES, TokenizeFault::Cut, Expected::Open).run(setting)
}

pub(super) fn nonsense(setting: &Setting) -> Result<Outcome> {
    Case::engines("nonsense", N_ENGINES, TokenizeFault::Nonsense, Expected::Open).run(setting)
}

pub(super) fn half(setting: &Setting) -> Result<Outcome> {
    Case::engines("half", N_ENGINES / 2, TokenizeFault::BlackHole, Expected::Open).run(setting)
}

pub(super) fn saturated(setting: &Setting) -> Result<Outcome> {
    Case::engines("saturated", N_ENGINES, SATURATED, Expected::Bounded).run(setting)
}

pub(super) fn foreign_engine(setting: &Setting) -> Result<Outcome> {
    let case = Case::engines("foreign-engine", 1, TokenizeFault::OtherModel, Expected::Open);
    Case { lasts: COMPARED, ..case }.run(setting)
}

pub(super) fn foreign_endpoint(setting: &Setting) -> Result<Outcome> {
    let fault = Fault::Answers { n_engines: 0, how: TokenizeFault::OtherModel };
    Case { name: "foreign-endpoint", asked: Asked::OwnEndpoint, fault, lasts: FAULT, expected: Expected::Bounded }
        .run(setting)
}

pub(super) fn stopped(setting: &Setting) -> Result<Outcome> {
    Case::process("stopped", Fault::Stopped).run(setting)
}

pub(super) fn gone(setting: &Setting) -> Result<Outcome> {
    Case::process("gone", Fault::Gone).run(setting)
}

impl Case {
    fn engines(name: &'static str, n_engines: usize, how: TokenizeFault, expected: Expected) -> Self {
        Self { name, asked: Asked::Engines, fault: Fault::Answers { n_engines, how }, lasts: FAULT, expected }
    }

    fn process(name: &'static str, fault: Fault) -> Self {
        Self { name, asked: Asked::OwnProcess, fault, lasts: FAULT, expected: Expected::Open }
    }

    fn run(&self, setting: &Setting) -> Result<Outcome> {
        on_runtime(setting, async {
            let figures = self.play(setting).await?;
            self.check(&figures)?;
            Ok(Outcome::Tokenized(figures))
        })
    }

    async fn play(&self, setting: &Setting) -> Result<TokenizerFigures> {
        let mut stage = Stage::start(self.name, self.asked, &setting.binary).await?;
        let watch = Watch::start(stage.router()?.admin());
        let load = SteadyLoad::start(stage.target());
        tokio::time::sleep(WARM).await;
        let control = Instant::now();
        tokio::time::sleep(CONTROL).await;
        let fault = Instant::now();
        self.begin(&mut stage).await?;
        tokio::time::sleep(self.lasts).await;
        let end = Instant::now();
        self.end(&mut stage).await?;
        while figures::matched_again(&watch.since(end)?).is_none() && end.elapsed() < RECOVERY_DEADLINE {
            tokio::time::sleep(POLL).await;
        }
        tokio::time::sleep(AFTER).await;
        let answers = load.stop().await?;
        let run = Run { control, fault, end, answers, samples: watch.since(control)?, n_faulty: self.n_faulty() };
        Ok(run.figures())
    }

    async fn begin(&self, stage: &mut Stage) -> Result<()> {
        match self.fault {
            Fault::Answers { n_engines, how } => {
                stage.tell(n_engines, how);
                Ok(())
            }
            Fault::Stopped => stage.signal(Signal::SIGSTOP),
            Fault::Gone => stage.kill_process(),
        }
    }

    async fn end(&self, stage: &mut Stage) -> Result<()> {
        match self.fault {
            Fault::Answers { n_engines, .. } => {
                stage.tell(n_engines, TokenizeFault::None);
                Ok(())
            }
            Fault::Stopped => stage.signal(Signal::SIGCONT),
            Fault::Gone => stage.start_process(),
        }
    }

    /// Those that are asked for tokens and fail.
    fn n_faulty(&self) -> usize {
        match self.fault {
            Fault::Answers { n_engines, .. } => n_engines.max(1),
            Fault::Stopped | Fault::Gone => 1,
        }
    }

    /// What must be true on the slowest machine. Medians tell who waits: without a breaker everyone would, for a
    /// budget.
    fn check(&self, figures: &TokenizerFigures) -> Result<()> {
        ensure!(
            figures.matched_again.is_some(),
            "prefixes are not matched again {RECOVERY_DEADLINE:?} after: {figures}"
        );
        ensure!(!figures.first.decision_p50.is_zero(), "the router has counted no decisions: {figures}");
        // By the router's own clock: what its machine does meanwhile makes engines slower too.
        ensure!(
            figures.first.decision_p50 <= 2 * BUDGET,
            "requests wait for longer than the budget of {BUDGET:?}: {figures}"
        );
        if self.expected == Expected::Open {
            let open = figures.open.with_context(|| format!("no breaker opened in {:?}: {figures}", self.lasts))?;
            ensure!(open.decision_p50 < BUDGET / 2, "requests wait although breakers are open: {figures}");
        }
        Ok(())
    }
}
