//! The whole stack under load: simulated engines, the real router, a real Envoy.
//!
//! The figure is the hit ratio, cached tokens per prompt token as the engines count them, of the requests that were
//! asked in a span of time. Two equal stacks play the same load at the same time, one of them with the fault, so that
//! both are as slow as the machine is.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::{Figures, Outcome, Setting};
use crate::cache::Cache;
use crate::engines::{ENGINE_MODEL, Engines};
use crate::load::{self, Outcome as Answer, Target};
use crate::router::{self, Router, RouterOptions};
use crate::sim::driver::TimeModel;
use crate::sim::engine::EngineOptions;
use crate::sim::publisher::PublisherOptions;
use crate::sim::{SimOptions, tokenizer};
use crate::stack::Stack;
use crate::workload::{Workload, WorkloadOptions};

const N_ENGINES: usize = 4;
/// More conversations than any of the loads gets through.
const N_CONVERSATIONS: usize = 4000;
/// The load's beginning, before the fault: caches are filled, conversations have spread over their turns.
const WARM: Duration = Duration::from_secs(20);
/// What is looked at after the router's restart. In 30 s of this load there are some 360 requests, of which the half second
/// without a router costs about 7 their prefix: that is 1.3 points, and one request more or less is 0.2, so that chance
/// would decide.
const RESTARTED: Duration = Duration::from_secs(90);
/// What is shown beside it.
const AT_ONCE: Duration = Duration::from_secs(30);
/// Load between the overrun and what is looked at, and how long that is.
const HEALING: Duration = Duration::from_secs(60);
const HEALED: Duration = Duration::from_secs(20);
/// Points of hit ratio that a restart may cost, and that may be missing after the healing.
const MAX_LOST_BY_RESTART: f64 = 2.0;
const MAX_LOST_BY_OVERRUN: f64 = 5.0;
/// A replay buffer that is overrun within a second of load.
const SHORT_BUFFER: usize = 20;
/// A replay buffer that holds what is published while a router is away, and not what was published before.
const MIDDLE_BUFFER: usize = 400;

/// How a router ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// It goes on.
    None,
    /// SIGTERM.
    Asked,
    /// SIGKILL.
    Killed,
}

/// One load, with what its requests saw.
struct Run {
    started: Instant,
    answers: Vec<Answer>,
    /// From the order to end until the next router was ready.
    away: Duration,
    /// Sources that did not know everything when the load was over.
    n_incomplete: usize,
}

pub(super) fn restart(setting: &Setting) -> Result<Outcome> {
    on_runtime(setting, async {
        let length = WARM + RESTARTED;
        let [control, restarted] = Run::pair("restart", length, End::Asked, MIDDLE_BUFFER).await?;
        restarted.ensure_answered()?;
        let (without, with) = (control.hit_percent(WARM..length)?, restarted.hit_percent(WARM..length)?);
        let at_once = WARM..WARM + AT_ONCE;
        let note = format!(
            "hit ratio {with:.1} % in the {RESTARTED:?} after it, {without:.1} % without it ({:.1} % and {:.1} % in the first \
             {AT_ONCE:?}); away for {:.1} s, {} of {N_ENGINES} sources incomplete",
            restarted.hit_percent(at_once.clone())?,
            control.hit_percent(at_once)?,
            restarted.away.as_secs_f64(),
            restarted.n_incomplete
        );
        ensure!(without - with < MAX_LOST_BY_RESTART, "the restart costs {MAX_LOST_BY_RESTART} points or more: {note}");
        Ok(Outcome::Held(Figures { note, ..Figures::default() }))
    })
}

pub(super) fn overrun(setting: &Setting) -> Result<Outcome> {
    on_runtime(setting, async {
        let length = WARM + HEALING + HEALED;
        let [control, overrun] = Run::pair("overrun", length, End::Killed, SHORT_BUFFER).await?;
        let both = |span: Range<Duration>| -> Result<(f64, f64)> {
            Ok((overrun.hit_percent(span.clone())?, control.hit_percent(span)?))
        };
        let (before, at_once) = (both(WARM / 2..WARM)?, both(WARM..WARM + HEALED)?);
        let healed = both(WARM + HEALING..length)?;
        let show = |(with, without)| format!("{with:.1} % ({without:.1} % without it)");
        let note = format!(
            "hit ratio {} before, {} in the {HEALED:?} after it, {} after {HEALING:?}; {} of {N_ENGINES} sources incomplete",
            show(before),
            show(at_once),
            show(healed),
            overrun.n_incomplete
        );
        ensure!(overrun.n_incomplete > 0, "no buffer was overrun: {note}");
        ensure!(healed.1 - healed.0 <= MAX_LOST_BY_OVERRUN, "more than {MAX_LOST_BY_OVERRUN} points are lost: {note}");
        Ok(Outcome::Held(Figures { note, ..Figures::default() }))
    })
}

/// What `work` has started ends when it is dropped.
pub(super) fn on_runtime(setting: &Setting, work: impl Future<Output = Result<Outcome>>) -> Result<Outcome> {
    let runtime = tokio::runtime::Runtime::new().context("cannot start the runtime")?;
    runtime.block_on(setting.interrupted.run_until_cancelled(work)).context("interrupted")?
}

impl Run {
    /// The same load without and with the fault, at the same time.
    async fn pair(name: &str, length: Duration, end: End, buffer_steps: usize) -> Result<[Self; 2]> {
        // Before anything is timed.
        tokio::task::spawn_blocking(router::binary).await.context("building the router panicked")??;
        let control = format!("{name}-control");
        let control = Self::play(&control, length, End::None, buffer_steps);
        let faulty = Self::play(name, length, end, buffer_steps);
        tokio::try_join!(control, faulty).map(|(control, faulty)| [control, faulty])
    }

    /// Plays a load of `length` through a fresh stack; after [`WARM`] the router ends and the next takes its place. A
    /// router that is killed leaves no snapshots behind.
    async fn play(name: &str, length: Duration, end: End, buffer_steps: usize) -> Result<Self> {
        let dir = directory(name)?;
        let engines = Engines::simulated(N_ENGINES, &engine(buffer_steps))?;
        let snapshots = (end != End::Killed).then(|| dir.join("snapshots"));
        let options = RouterOptions { snapshots, reports: true, ..RouterOptions::new(engines.addresses()) };
        let mut stack = Stack::start(&dir, &options).await?;
        let target = Target { url: stack.url(""), model: ENGINE_MODEL.to_owned() };
        let started = Instant::now();
        let load = load::run_until(target, Arc::new(workload()), Arc::<AtomicUsize>::default(), started + length);
        let load = tokio::spawn(load);
        tokio::time::sleep(WARM).await;
        let away = replace_router(&mut stack, &dir, &options, end).await?;
        let answers = load.await.context("the load panicked")??;
        let n_incomplete = n_incomplete(&stack).await?;
        Ok(Self { started, answers, away, n_incomplete })
    }

    /// Cached tokens per prompt token of what was asked in `span` of the load, in percent.
    fn hit_percent(&self, span: Range<Duration>) -> Result<f64> {
        let asked = |answer: &&load::Answered| span.contains(&answer.asked_at.saturating_duration_since(self.started));
        let answered = self.answers.iter().filter_map(|answer| match answer {
            Answer::Answered(answered) => Some(answered),
            Answer::Failed(_) => None,
        });
        let (mut n_prompt, mut n_cached) = (0, 0);
        for answer in answered.filter(asked) {
            n_prompt += answer.n_prompt;
            n_cached += answer.n_cached;
        }
        ensure!(n_prompt > 0, "nothing was answered in {span:?}");
        Ok(n_cached as f64 * 100.0 / n_prompt as f64)
    }

    fn ensure_answered(&self) -> Result<()> {
        let mut failures = self.answers.iter().filter_map(|answer| match answer {
            Answer::Failed(reason) => Some(reason),
            Answer::Answered(_) => None,
        });
        let first = failures.next();
        ensure!(first.is_none(), "{} requests failed, the first with: {first:?}", failures.count() + 1);
        Ok(())
    }
}

/// Logs and configurations, and the snapshots of nobody before.
fn directory(name: &str) -> Result<PathBuf> {
    let dir = Cache::from_env()?.root().join("logs").join(format!("faults-{}-{name}", std::process::id()));
    std::fs::create_dir_all(dir.join("snapshots")).with_context(|| format!("cannot create {}", dir.display()))?;
    Ok(dir)
}

fn engine(buffer_steps: usize) -> SimOptions {
    SimOptions {
        engine: EngineOptions {
            n_blocks: 4000,
            max_model_len: 4096,
            max_num_batched_tokens: 2048,
            ..EngineOptions::default()
        },
        time: TimeModel { prefill_tokens_per_second: 20_000.0, decode_step: Duration::from_millis(15) },
        events: PublisherOptions { buffer_steps, ..PublisherOptions::default() },
        ..SimOptions::default()
    }
}

fn workload() -> Workload {
    Workload::generate(WorkloadOptions {
        seed: 20_261_121,
        n_conversations: N_CONVERSATIONS,
        n_users: 10,
        n_turns: 12,
        n_shared_prompts: 4,
        system_words: 300,
        opening_words: 400,
        question_words: 60,
        answer_tokens: 16,
        think: Duration::from_millis(700),
        words: (0..tokenizer::N_WORDS).map(tokenizer::word).collect(),
    })
}

/// The time without a router.
async fn replace_router(
    stack: &mut Stack,
    dir: &std::path::Path,
    options: &RouterOptions,
    end: End,
) -> Result<Duration> {
    if end == End::None {
        return Ok(Duration::ZERO);
    }
    // Known before there is no router: asking cargo takes its time.
    let binary = tokio::task::spawn_blocking(router::binary).await.context("building the router panicked")??;
    let router = stack.router.take().context("the router was stopped")?;
    let (started, addresses) = (Instant::now(), [router.extproc(), router.admin()]);
    match end {
        End::Killed => router.kill().await?,
        End::None | End::Asked => router.stop().await?,
    }
    stack.router = Some(Router::start_at(&binary, dir, options, addresses).await?);
    Ok(started.elapsed())
}

async fn n_incomplete(stack: &Stack) -> Result<usize> {
    let Some(router) = &stack.router else { return Ok(0) };
    let metrics = router.metrics().await?;
    let is_incomplete =
        |line: &&str| line.starts_with("warmroute_source_state{") && line.contains("state=\"incomplete\"");
    Ok(metrics.lines().filter(is_incomplete).count())
}
