//! `cargo e2e audit`: without faults nothing is lost.
//!
//! Publisher processes send a known number of events through libzmq, the event plane in a process of its own applies
//! them, and at the end both are compared: batches, events, gaps, and the cache block by block. The publishers are let
//! on as the plane keeps up, so that no high-water mark is reached: what is above it is dropped by design, and a gap.

use std::fmt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::faults::{Check, Follower, SourceView};
use crate::publisher::PublisherArgs;
use crate::publisher::process::PublisherProcess;

/// Small blocks, one per event: what is counted is events, and generating them should not be the longer half.
const BLOCK_SIZE: u32 = 4;
/// Batches of a publisher that may be on their way: fewer than any queue between it and the index holds.
const WINDOW: u64 = 4000;
const POLL: Duration = Duration::from_millis(2);
/// Longest time without any progress.
const PATIENCE: Duration = Duration::from_secs(60);

/// Flags of the audit.
#[derive(Clone, Debug, Args)]
pub struct AuditArgs {
    /// Events of all publishers together.
    #[arg(long, default_value_t = 10_000_000)]
    pub events: u64,
    /// Publishers.
    #[arg(long, default_value_t = 2)]
    pub publishers: u64,
    /// Events of each batch.
    #[arg(long, default_value_t = 50)]
    pub events_per_batch: u64,
    /// Blocks of each cache.
    #[arg(long, default_value_t = 50_000)]
    pub cache_blocks: usize,
}

impl Default for AuditArgs {
    fn default() -> Self {
        Self { events: 10_000_000, publishers: 2, events_per_batch: 50, cache_blocks: 50_000 }
    }
}

/// What was sent and what arrived, over all publishers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Balance {
    /// Batches published.
    pub n_batches_sent: u64,
    /// Batches applied.
    pub n_batches_applied: u64,
    /// Events published.
    pub n_events_sent: u64,
    /// Events applied.
    pub n_events_applied: u64,
    /// Gaps, replays after the first, undecodable batches and skipped events.
    pub n_irregular: u64,
    /// Blocks that the publishers hold.
    pub n_held: u64,
    /// Of these, blocks that are credited.
    pub n_credited: u64,
    /// Blocks credited that no publisher holds, and sources whose digest is not the model's.
    pub n_false: u64,
    /// From the first batch to the last one applied.
    pub took: Duration,
}

impl Balance {
    /// Whether everything that was sent was applied, once, and nothing else.
    pub fn is_even(&self) -> bool {
        (self.n_batches_sent, self.n_events_sent, self.n_held)
            == (self.n_batches_applied, self.n_events_applied, self.n_credited)
            && (self.n_irregular, self.n_false) == (0, 0)
    }

    fn add(&mut self, n_batches: u64, args: &AuditArgs, view: &SourceView, check: Check) {
        self.n_batches_sent += n_batches;
        self.n_batches_applied += view.n_batches;
        self.n_events_sent += n_batches * args.events_per_batch;
        self.n_events_applied += view.n_events;
        self.n_irregular += view.n_gaps + view.n_decode_failures + view.n_skipped + (view.n_generations - 1);
        self.n_held += check.n_held;
        self.n_credited += check.n_credited;
        self.n_false += check.n_false + u64::from(!check.is_digest_equal);
    }
}

impl fmt::Display for Balance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rate = self.n_events_applied as f64 / self.took.as_secs_f64();
        writeln!(f, "batches  {:>12} sent {:>12} applied", self.n_batches_sent, self.n_batches_applied)?;
        writeln!(f, "events   {:>12} sent {:>12} applied", self.n_events_sent, self.n_events_applied)?;
        writeln!(f, "blocks   {:>12} held {:>12} credited, {} false", self.n_held, self.n_credited, self.n_false)?;
        write!(
            f,
            "gaps, losses and skipped events: {}; {:.1} s, {rate:.0} events/s",
            self.n_irregular,
            self.took.as_secs_f64()
        )
    }
}

/// Runs the audit with `binary` for the processes.
///
/// # Errors
/// When a process does not start, or nothing arrives any more.
pub fn run(binary: &Path, args: &AuditArgs) -> Result<Balance> {
    let n_batches = args.events.div_ceil(args.events_per_batch * args.publishers);
    let mut follower = Follower::start(binary)?;
    let mut publishers = (0..args.publishers)
        .map(|endpoint| start(binary, args, endpoint, &mut follower))
        .collect::<Result<Vec<PublisherProcess>>>()?;
    for endpoint in 0..args.publishers {
        follower.wait(u32::try_from(endpoint)?, "the connection", PATIENCE, SourceView::is_live)?;
    }
    let started = Instant::now();
    feed(&mut publishers, &mut follower, n_batches)?;
    let mut balance = Balance { took: started.elapsed(), ..Balance::default() };
    for endpoint in 0..args.publishers {
        let program = publisher_args(args, endpoint).program();
        let endpoint = u32::try_from(endpoint)?;
        let check = follower.check(endpoint, &program, n_batches)?;
        balance.add(n_batches, args, &follower.view(endpoint)?, check);
    }
    Ok(balance)
}

fn publisher_args(args: &AuditArgs, seed: u64) -> PublisherArgs {
    PublisherArgs {
        seed,
        events_per_batch: args.events_per_batch as usize,
        cache_blocks: args.cache_blocks,
        block_size: BLOCK_SIZE,
        max_stored: 1,
        ..PublisherArgs::default()
    }
}

fn start(binary: &Path, args: &AuditArgs, endpoint: u64, follower: &mut Follower) -> Result<PublisherProcess> {
    let publisher = PublisherProcess::start(binary, &publisher_args(args, endpoint))?;
    follower.follow(u32::try_from(endpoint)?, publisher.events(), Some(publisher.replay()))?;
    Ok(publisher)
}

/// Lets all publishers on until `n_batches` of each are applied.
fn feed(publishers: &mut [PublisherProcess], follower: &mut Follower, n_batches: u64) -> Result<()> {
    let mut limits = vec![0; publishers.len()];
    let (mut n_applied, mut moved_at) = (0, Instant::now());
    while n_applied < n_batches * publishers.len() as u64 {
        let views = follower.views()?;
        for view in &views {
            let idx = view.endpoint as usize;
            let limit = (view.last_seq.map_or(0, |seq| seq + 1) + WINDOW).min(n_batches);
            // In large steps: each order costs the publisher a look at its standard input.
            if limit >= limits[idx] + WINDOW / 4 || (limit == n_batches && limits[idx] < limit) {
                limits[idx] = limit;
                publishers.get_mut(idx).context("a source that nobody added")?.publish_on(limit)?;
            }
        }
        let n_now: u64 = views.iter().map(|view| view.last_seq.map_or(0, |seq| seq + 1)).sum();
        if n_now != n_applied {
            (n_applied, moved_at) = (n_now, Instant::now());
        }
        ensure!(moved_at.elapsed() < PATIENCE, "nothing more arrives: {views:?}");
        std::thread::sleep(POLL);
    }
    Ok(())
}
