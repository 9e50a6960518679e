//! Many sources at once.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::follower::Follower;
use super::line::SETTLE;
use super::{Figures, Outcome, Setting};
use crate::proxy::{Faults, Proxy, Which};
use crate::publisher::PublisherArgs;
use crate::publisher::process::PublisherProcess;
use crate::publisher::swarm::{SwarmArgs, SwarmProcess, SwarmReport};

const N_HERD: usize = 200;
const N_CROWD: usize = 1000;
/// Most replays that the plane may have running at the same time.
const MAX_REPLAYS: usize = 8;
/// A crowd takes its turns at the replays, and every turn may take a whole idle round of a publisher.
const CROWD_SETTLE: Duration = Duration::from_secs(300);
/// Milliseconds between two replacements in the flapping crowd.
const CROWD_FLAP_MS: u64 = 20;
/// Looks at the memory while the crowd flaps.
const N_SIZES: u32 = 6;
/// Memory may grow by so much in the second half of the flapping: allocators breathe, and not every source has had its
/// turn before.
const MAX_GROWTH: f64 = 1.10;
const GROWTH_SLACK_MIB: u64 = 8;
const N_HEALTHY: u32 = 4;
const GARBAGE_RATE: f64 = 500.0;
const N_PROBES: u64 = 200;

/// A follower of all publishers of a swarm, once everything is known.
fn following(setting: &Setting, args: &SwarmArgs, n_batches: u64) -> Result<(SwarmProcess, Follower)> {
    let (mut swarm, _) = SwarmProcess::start(&setting.binary, args)?;
    let report = swarm.tell(&format!("publish {n_batches}"))?;
    let mut follower = Follower::start(&setting.binary)?;
    for (endpoint, member) in (0..).zip(&report.publishers) {
        follower.follow(endpoint, &member.events, Some(&member.replay))?;
    }
    settle(&mut follower, &report)?;
    Ok((swarm, follower))
}

/// Waits until every source has applied everything and waits for nothing; the time that it took.
fn settle(follower: &mut Follower, report: &SwarmReport) -> Result<Duration> {
    let started = Instant::now();
    loop {
        let views = follower.views()?;
        let is_settled = |view: &&super::SourceView| {
            let member = &report.publishers[view.endpoint as usize];
            view.is_settled() && view.last_seq == member.n_batches.checked_sub(1)
        };
        let n_settled = views.iter().filter(is_settled).count();
        if n_settled == report.publishers.len() {
            return Ok(started.elapsed());
        }
        if started.elapsed() > CROWD_SETTLE {
            let example = views.iter().find(|view| !is_settled(view)).context("nobody is unsettled")?;
            let member = &report.publishers[example.endpoint as usize];
            bail!("{n_settled} of {} sources are settled; {example:?} at {} batches", views.len(), member.n_batches);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Sums over all sources, each held against its publisher's model.
fn figures(follower: &mut Follower, report: &SwarmReport) -> Result<Figures> {
    let mut sum = Figures { state: "live".to_owned(), ..Figures::default() };
    for view in follower.views()? {
        let member = &report.publishers[view.endpoint as usize];
        let check = follower.check(view.endpoint, &member.program, member.n_batches)?;
        let figures = Figures::of(&view, check).verified().with_context(|| format!("source {}", view.endpoint))?;
        sum.n_missing += figures.n_missing;
        sum.n_gaps += figures.n_gaps;
        sum.n_replays += figures.n_replays;
        if !view.is_live() {
            sum.state = view.state;
        }
    }
    Ok(sum)
}

pub(super) fn herd(setting: &Setting) -> Result<Outcome> {
    let args = SwarmArgs { publishers: N_HERD, cache_blocks: 64, replay_ms: 20 };
    let (mut swarm, mut follower) = following(setting, &args, 20)?;
    let severed = swarm.tell("sever")?;
    let started = Instant::now();
    swarm.tell("publish 1")?;
    let report = swarm.tell("report")?;
    settle(&mut follower, &report)?;
    let converge = started.elapsed();
    let report = swarm.tell("report")?;
    ensure!(report.peak_replays <= MAX_REPLAYS, "{} replays ran at once, expected {MAX_REPLAYS}", report.peak_replays);
    let n_replays = report.n_replays - severed.n_replays;
    let note = format!("peak of {} replays at once, {n_replays} after the cut", report.peak_replays);
    Ok(Outcome::Held(Figures { converge: Some(converge), note, ..figures(&mut follower, &report)? }))
}

pub(super) fn flapping_crowd(setting: &Setting) -> Result<Outcome> {
    let args = SwarmArgs { publishers: N_CROWD, cache_blocks: 64, replay_ms: 0 };
    let (mut swarm, mut follower) = following(setting, &args, 20)?;
    swarm.tell(&format!("flap {CROWD_FLAP_MS}"))?;
    let mut sizes = Vec::new();
    for _ in 0..N_SIZES {
        std::thread::sleep(setting.flap / N_SIZES);
        sizes.push(follower.resident_bytes()? >> 20);
    }
    swarm.tell("flap 0")?;
    let report = swarm.tell("publish 1")?;
    let converge = settle(&mut follower, &report)?;
    let (middle, last) = (sizes[sizes.len() / 2 - 1], sizes[sizes.len() - 1]);
    let limit = (middle as f64 * MAX_GROWTH) as u64 + GROWTH_SLACK_MIB;
    let note = format!("{} restarts, MiB by time: {sizes:?}", report.n_replaced);
    ensure!(last <= limit, "memory grew from {middle} to {last} MiB in the second half: {note}");
    Ok(Outcome::Held(Figures { converge: Some(converge), note, ..figures(&mut follower, &report)? }))
}

pub(super) fn garbage(setting: &Setting) -> Result<Outcome> {
    let mut follower = Follower::start(&setting.binary)?;
    let mut healthy = Vec::new();
    for endpoint in 0..N_HEALTHY {
        let args = PublisherArgs { seed: u64::from(endpoint), start_batches: 50, ..PublisherArgs::default() };
        let publisher = PublisherProcess::start(&setting.binary, &args)?;
        follower.follow(endpoint, publisher.events(), Some(publisher.replay()))?;
        healthy.push((publisher, args));
    }
    for endpoint in 0..N_HEALTHY {
        follower.wait(endpoint, "a healthy source", SETTLE, |view| view.is_live() && view.last_seq == Some(49))?;
    }
    let calm = probe(&mut follower, &mut healthy, 50)?;

    let args = PublisherArgs { seed: 99, rate: GARBAGE_RATE, endless: true, ..PublisherArgs::default() };
    let bad = PublisherProcess::start(&setting.binary, &args)?;
    let [events, replays] = bad.addresses()?;
    let spoil = Faults { corrupt: Which::All, ..Faults::default() };
    let proxies = [Proxy::start(events, 7)?, Proxy::start(replays, 8)?];
    proxies.iter().for_each(|proxy| proxy.set(spoil.clone()));
    follower.follow(N_HEALTHY, &proxies[0].endpoint(), Some(&proxies[1].endpoint()))?;
    let noticed = follower.wait(N_HEALTHY, "noticing garbage", SETTLE, |view| view.n_decode_failures > 0)?;
    let disturbed = probe(&mut follower, &mut healthy, 50 + N_PROBES)?;
    follower.wait(N_HEALTHY, "quarantine", SETTLE, |view| view.state == "quarantined")?;

    let mut sum = Figures::default();
    for (endpoint, (_, args)) in (0..).zip(&healthy) {
        let check = follower.check(endpoint, &args.program(), 50 + 2 * N_PROBES)?;
        let view = follower.view(endpoint)?;
        ensure!(view.is_live() && check.is_exact(), "a healthy source suffers: {view:?}, {check:?}");
        sum.n_replays += view.n_replays;
    }
    let bad = follower.view(N_HEALTHY)?;
    ensure!(bad.n_blocks == 0, "garbage made blocks: {bad:?}");
    let ms = |time: Duration| time.as_secs_f64() * 1000.0;
    let note = format!(
        "healthy sources' median lag {:.2} ms before, {:.2} ms beside {GARBAGE_RATE} bad batches/s",
        ms(calm),
        ms(disturbed)
    );
    Ok(Outcome::Held(Figures { purge: Some(noticed), state: bad.state, note, ..sum }))
}

/// Median time from one batch's order to its application, over all healthy sources by turns.
fn probe(
    follower: &mut Follower,
    healthy: &mut [(PublisherProcess, PublisherArgs)],
    n_before: u64,
) -> Result<Duration> {
    let mut times = Vec::new();
    for n_batches in n_before..n_before + N_PROBES {
        for (endpoint, (publisher, _)) in (0..).zip(healthy.iter_mut()) {
            publisher.publish(n_batches + 1)?;
            times.push(follower.wait(endpoint, "a batch", SETTLE, |view| view.last_seq == Some(n_batches))?);
        }
    }
    times.sort();
    Ok(times[times.len() / 2])
}
