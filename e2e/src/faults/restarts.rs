//! The publisher becomes another one, with and without the connection telling.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::line::{ENDPOINT, Line, SETTLE};
use super::{Figures, Outcome, Setting};
use crate::proxy::{Faults, Side};
use crate::publisher::PublisherArgs;
use crate::publisher::program::ProgramOptions;

/// Batches before the fault.
const BEFORE: u64 = 500;
/// Restarts of the flapping publisher, and the pause between them.
const N_FLAPS: u64 = 20;
const FLAP_PAUSE: Duration = Duration::from_millis(300);
/// Heartbeats find a dead peer within 20 s.
pub(super) const DETECTION: Duration = Duration::from_secs(40);

fn successor(start_batches: u64) -> PublisherArgs {
    PublisherArgs { seed: 77, start_batches, ..PublisherArgs::default() }
}

/// Replaces the publisher by `args` and waits until the old one's blocks are gone and the new one's are known.
fn replaced(line: &mut Line, args: PublisherArgs) -> Result<Figures> {
    let (old, n_old) = (line.args.program(), line.n_batches);
    line.replace(args)?;
    line.kill_connections();
    let started = Instant::now();
    let purge = line.follower.wait_purged(ENDPOINT, &old, n_old, SETTLE)?;
    let figures = line.figures()?;
    let n_false = figures.n_false + line.follower.check(ENDPOINT, &old, n_old)?.n_credited;
    Figures { purge: Some(purge), converge: Some(started.elapsed()), n_false, ..figures }.verified()
}

pub(super) fn restart(setting: &Setting) -> Result<Outcome> {
    let mut line = Line::healthy(&setting.binary, &PublisherArgs::default(), BEFORE)?;
    replaced(&mut line, successor(50)).map(Outcome::Held)
}

pub(super) fn overtaken(setting: &Setting) -> Result<Outcome> {
    let mut line = Line::healthy(&setting.binary, &PublisherArgs::default(), BEFORE)?;
    // Nothing of the end is seen: the first sign of life after the pause is the new publisher.
    line.set(&Faults { blackhole: true, ..Faults::default() });
    let (old, n_old) = (line.args.program(), line.n_batches);
    line.replace(successor(3 * BEFORE))?;
    line.set(&Faults::default());
    line.kill_connections();
    let started = Instant::now();
    let purge = line.follower.wait_purged(ENDPOINT, &old, n_old, SETTLE)?;
    let figures = line.figures()?;
    Figures { purge: Some(purge), converge: Some(started.elapsed()), ..figures }.verified().map(Outcome::Held)
}

pub(super) fn reused(setting: &Setting) -> Result<Outcome> {
    let mut line = Line::healthy(&setting.binary, &PublisherArgs::default(), BEFORE)?;
    let (old, n_old) = (line.args.program(), line.n_batches);
    let another = PublisherArgs { pythonhashseed: "1".to_owned(), ..successor(2 * BEFORE) };
    line.replace(another)?;
    line.kill_connections();
    let started = Instant::now();
    let purge = line.follower.wait_purged(ENDPOINT, &old, n_old, SETTLE)?;
    let last = line.n_batches.checked_sub(1);
    line.follower
        .wait(ENDPOINT, "following the other model", SETTLE, |view| view.last_seq == last && view.is_settled())?;
    let converge = started.elapsed();
    let view = line.follower.view(ENDPOINT)?;
    ensure!(view.is_disproved, "hashes of another root are not noticed: {view:?}");
    let n_false = line.check()?.n_credited + line.follower.check(ENDPOINT, &old, n_old)?.n_credited;
    ensure!(n_false == 0, "{n_false} blocks are credited by hashes that are not proved");
    Ok(Outcome::Held(Figures {
        purge: Some(purge),
        converge: Some(converge),
        n_gaps: view.n_gaps,
        n_replays: view.n_replays,
        state: view.state,
        note: "hashes disproved, none credited".to_owned(),
        ..Figures::default()
    }))
}

pub(super) fn half_open(setting: &Setting) -> Result<Outcome> {
    let mut line = Line::healthy(&setting.binary, &PublisherArgs::default(), BEFORE)?;
    let (old, n_old) = (line.args.program(), line.n_batches);
    line.set(&Faults { blackhole: true, ..Faults::default() });
    line.replace(successor(2 * BEFORE))?;
    let detection = line.follower.wait(ENDPOINT, "noticing a dead peer", DETECTION, |view| !view.is_settled())?;
    line.set(&Faults::default());
    let figures = after_heal(&mut line, &old, n_old)?;
    Ok(Outcome::Held(Figures { note: format!("noticed after {:.1} s", detection.as_secs_f64()), ..figures }))
}

/// Purge and convergence from the moment on at which packets pass again.
pub(super) fn after_heal(line: &mut Line, old: &ProgramOptions, n_old: u64) -> Result<Figures> {
    let started = Instant::now();
    let purge = line.follower.wait_purged(ENDPOINT, old, n_old, SETTLE)?;
    line.publish(5)?;
    let figures = line.figures()?;
    Figures { purge: Some(purge), converge: Some(started.elapsed()), ..figures }.verified()
}

pub(super) fn stalled(setting: &Setting) -> Result<Outcome> {
    let mut line = Line::healthy(&setting.binary, &PublisherArgs::default(), BEFORE)?;
    line.set(&Faults { blackhole: true, ..Faults::default() });
    line.publish(BEFORE)?;
    std::thread::sleep(Duration::from_secs(3));
    line.set(&Faults::default());
    let figures = line.figures()?;
    ensure!(line.follower.view(ENDPOINT)?.n_generations == 1, "a pause is no reason to forget");
    Ok(Outcome::Held(figures))
}

pub(super) fn deaf(setting: &Setting) -> Result<Outcome> {
    let mut line = Line::healthy(&setting.binary, &PublisherArgs::default(), BEFORE)?;
    line.live.half_close(Side::Publisher);
    line.publish(BEFORE)?;
    // Heartbeats are not answered any more.
    line.figures().map(Outcome::Held)
}

pub(super) fn flapping(setting: &Setting) -> Result<Outcome> {
    let mut line = Line::healthy(&setting.binary, &PublisherArgs::default(), BEFORE)?;
    let mut lives = Vec::new();
    for flap in 0..N_FLAPS {
        lives.push((line.args.program(), line.n_batches));
        // Numbers fall and rise by turns.
        let start_batches = if flap % 2 == 0 { 50 } else { 2 * BEFORE };
        line.replace(PublisherArgs { seed: 100 + flap, start_batches, ..PublisherArgs::default() })?;
        line.publish(5)?;
        std::thread::sleep(FLAP_PAUSE);
    }
    line.publish(5)?;
    let figures = line.figures()?;
    let mut n_false = figures.n_false;
    for (program, n_batches) in &lives {
        n_false += line.follower.check(ENDPOINT, program, *n_batches)?.n_credited;
    }
    let n_generations = line.follower.view(ENDPOINT)?.n_generations;
    let note = format!("{N_FLAPS} restarts, {n_generations} generations");
    Figures { n_false, note, ..figures }.verified().map(Outcome::Held)
}
