//! Messages are lost, repeated or cut, on the live stream and in replays.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use super::line::{ENDPOINT, Line, SETTLE};
use super::{Figures, Outcome, Setting};
use crate::proxy::{Faults, Which};
use crate::publisher::PublisherArgs;

pub(super) fn loss(setting: &Setting) -> Result<Outcome> {
    let lossy = Faults { drop: Which::Chance(0.2), ..Faults::default() };
    let args = PublisherArgs { rate: 200.0, ..PublisherArgs::default() };
    let mut line = Line::healthy(&setting.binary, &args, 200)?;
    line.set(&lossy);
    line.publish(1000)?;
    let counts = line.live.counts();
    line.set(&Faults::default());
    // A loss at the end of the stream shows with the next batch.
    line.publish(5)?;
    let figures = line.figures()?;
    ensure!(counts.dropped > 0 && figures.n_gaps > 0, "nothing was lost: {counts}");
    Ok(Outcome::Held(Figures {
        note: format!("{} of {} live batches lost", counts.dropped, counts.messages),
        ..figures
    }))
}

pub(super) fn duplicates(setting: &Setting) -> Result<Outcome> {
    let doubled = Faults { duplicate: Which::Chance(0.3), ..Faults::default() };
    let args = PublisherArgs { start_batches: 500, ..PublisherArgs::default() };
    let mut line = Line::start(&setting.binary, &args, doubled.clone(), doubled)?;
    line.follower.wait(ENDPOINT, "catching up", SETTLE, |view| view.is_settled() && view.last_seq == Some(499))?;
    line.publish(500)?;
    let figures = line.figures()?;
    let counts = line.live.counts();
    ensure!(counts.duplicated > 0, "nothing came twice: {counts}");
    Ok(Outcome::Held(Figures { note: format!("{} live batches came twice", counts.duplicated), ..figures }))
}

pub(super) fn truncated(setting: &Setting) -> Result<Outcome> {
    let cut = Faults { truncate: Which::Every(200), ..Faults::default() };
    let (figures, line) = caught_up(setting, cut)?;
    let counts = line.replay.counts();
    ensure!(counts.truncated > 0 && figures.state == "live", "{counts}: {figures:?}");
    Ok(Outcome::Held(Figures { note: format!("{} replays cut", counts.truncated), ..figures }))
}

pub(super) fn end_lost(setting: &Setting) -> Result<Outcome> {
    let without_end = Faults { drop: Which::End, ..Faults::default() };
    let (first, mut line) = caught_up(setting, without_end)?;
    // A live batch joins what the replays brought: END was never needed.
    line.publish(5)?;
    let figures = line.figures()?;
    let counts = line.replay.counts();
    ensure!(counts.dropped > 0, "no END was lost: {counts}");
    let note = format!("{} ENDs lost, {} before a live batch came", counts.dropped, first.state);
    Ok(Outcome::Held(Figures { converge: first.converge, note, ..figures }))
}

/// A publisher with 1,500 batches, learned through replays with `faults`.
fn caught_up(setting: &Setting, faults: Faults) -> Result<(Figures, Line)> {
    let args = PublisherArgs { start_batches: 1500, ..PublisherArgs::default() };
    let started = Instant::now();
    let mut line = Line::start(&setting.binary, &args, Faults::default(), faults)?;
    let figures = line.figures()?;
    Ok((Figures { converge: Some(started.elapsed()), ..figures }, line))
}

pub(super) fn overrun(setting: &Setting) -> Result<Outcome> {
    let args = PublisherArgs { start_batches: 1000, buffer_steps: 100, ..PublisherArgs::default() };
    let started = Instant::now();
    let mut line = Line::start(&setting.binary, &args, Faults::default(), Faults::default())?;
    let figures = line.figures()?;
    let converge = started.elapsed();
    ensure!(figures.state == "incomplete", "900 batches are out of reach, and the source is {}", figures.state);
    // Removals of blocks that nobody told us of change nothing.
    line.publish(500)?;
    let later = line.figures()?;
    let note = format!("{} missing at first, {} after 500 live batches", figures.n_missing, later.n_missing);
    Ok(Outcome::Held(Figures { converge: Some(converge), note, ..later }))
}

pub(super) fn high_water_mark(setting: &Setting) -> Result<Outcome> {
    // Some 40 MB while the kernel's buffers hold some: what is above 10 batches is dropped.
    let args = PublisherArgs { hwm: 10, events_per_batch: 200, cache_blocks: 20_000, ..PublisherArgs::default() };
    let mut line = Line::healthy(&setting.binary, &args, 20)?;
    // The proxies would buffer without end what we do not take.
    let direct = line.publisher.events().to_owned();
    let replay = line.publisher.replay().to_owned();
    let endpoint = ENDPOINT + 1;
    line.follower.follow(endpoint, &direct, Some(&replay))?;
    let settled = |last: u64| move |view: &super::SourceView| view.last_seq == Some(last) && view.is_settled();
    line.follower.wait(endpoint, "the direct connection", SETTLE, settled(19))?;
    line.follower.signal(Signal::SIGSTOP)?;
    let published = line.publish(600);
    std::thread::sleep(Duration::from_millis(500));
    line.follower.signal(Signal::SIGCONT)?;
    published.context("publishing to a stopped subscriber")?;
    let started = Instant::now();
    line.publish(5)?;
    line.follower.wait(endpoint, "settling after the stop", SETTLE, settled(624))?;
    let converge = started.elapsed();
    let check = line.follower.check(endpoint, &line.args.program(), line.n_batches)?;
    let figures =
        Figures { converge: Some(converge), ..Figures::of(&line.follower.view(endpoint)?, check) }.verified()?;
    ensure!(figures.n_gaps > 0, "nothing was dropped at the high-water mark: {figures:?}");
    Ok(Outcome::Held(figures))
}
