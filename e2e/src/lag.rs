//! `cargo e2e lag`: from a publisher's clock to the index, at a given rate, beside what libzmq alone takes.
//!
//! Publisher processes stamp each batch right before they encode and send it. In one phase the event plane in this
//! process follows them and tells the lag of each live batch once it is in the index; in the other, a plain SUB socket
//! receives the same load and reads nothing but the stamp. The phases take turns, so that a machine that slows down
//! slows both. All clocks are this machine's.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use clap::Args;
use warmroute::events::socket::{EventPlane, LagObserver, SourceState};
use warmroute::routing::index::{IndexLimits, PrefixIndex};

use crate::faults::source;
use crate::publisher::PublisherArgs;
use crate::publisher::process::PublisherProcess;

/// Longest wait for connections, and for what is under way at the end of a phase.
const PATIENCE: Duration = Duration::from_secs(20);
/// A plain SUB socket cannot say when its subscription has arrived; on one machine it is a matter of milliseconds.
const SUBSCRIBING: Duration = Duration::from_secs(1);
/// Silence after which nothing more is under way.
const SILENCE_MS: i32 = 1000;
/// Marks of the histogram, in microseconds.
const MARKS: [u64; 12] = [50, 100, 200, 300, 500, 700, 1000, 2000, 5000, 10_000, 100_000, u64::MAX];
const BAR: usize = 50;

/// Flags of the measurement.
#[derive(Clone, Debug, Args)]
pub struct LagArgs {
    /// Events per second of all publishers together.
    #[arg(long, default_value_t = 100_000.0)]
    pub rate: f64,
    /// Publishers.
    #[arg(long, default_value_t = 2)]
    pub publishers: u64,
    /// Events of each batch.
    #[arg(long, default_value_t = 20)]
    pub events_per_batch: usize,
    /// Seconds of each phase.
    #[arg(long, default_value_t = 10.0)]
    pub seconds: f64,
    /// Times that both phases are run.
    #[arg(long, default_value_t = 3)]
    pub rounds: usize,
}

/// The lags of one phase, over all its rounds.
#[derive(Clone, Debug, Default)]
pub struct Lags {
    /// One per batch.
    pub lags: Vec<Duration>,
    /// Time that the batches took, from the first order to the last lag.
    pub took: Duration,
    /// Batches sent.
    pub n_sent: u64,
}

/// What a measurement showed.
#[derive(Clone, Debug, Default)]
pub struct Measurement {
    /// A plain SUB socket.
    pub baseline: Lags,
    /// The event plane, index included.
    pub plane: Lags,
}

/// Measures, with `binary` for the publishers.
///
/// # Errors
/// When a process does not start, or too little arrives.
pub fn run(binary: &Path, args: &LagArgs) -> Result<Measurement> {
    let mut measurement = Measurement::default();
    for round in 1..=args.rounds {
        measurement.baseline.take(baseline(binary, args).with_context(|| format!("baseline {round}"))?);
        measurement.plane.take(plane(binary, args).with_context(|| format!("plane {round}"))?);
    }
    Ok(measurement)
}

/// Runs the measurement and prints it.
///
/// # Errors
/// When it cannot be run.
pub fn print(args: &LagArgs) -> Result<()> {
    let binary = std::env::current_exe().context("path of this program")?;
    let Measurement { mut baseline, mut plane } = run(&binary, args)?;
    for (name, lags) in
        [("libzmq alone (plain SUB, not decoded)", &mut baseline), ("event plane (decoded, in the index)", &mut plane)]
    {
        println!("{name}\n{}", lags.describe(args.events_per_batch));
    }
    Ok(())
}

impl LagArgs {
    fn n_batches(&self) -> u64 {
        (self.batch_rate() * self.seconds) as u64
    }

    /// Batches per second of each publisher.
    fn batch_rate(&self) -> f64 {
        self.rate / self.publishers as f64 / self.events_per_batch as f64
    }

    fn start(&self, binary: &Path) -> Result<Vec<PublisherProcess>> {
        let publisher = |seed| PublisherArgs {
            seed,
            rate: self.batch_rate(),
            events_per_batch: self.events_per_batch,
            cache_blocks: 20_000,
            // A clear takes a sweep of milliseconds, here and in the publisher; in an engine's life it is an event of
            // its own.
            clear_every: 0,
            ..PublisherArgs::default()
        };
        (0..self.publishers).map(|seed| PublisherProcess::start(binary, &publisher(seed))).collect()
    }
}

impl Lags {
    fn take(&mut self, other: Self) {
        self.lags.extend(other.lags);
        self.took += other.took;
        self.n_sent += other.n_sent;
    }

    /// The lag that a share of all batches does not exceed.
    pub fn quantile(&mut self, share: f64) -> Duration {
        self.lags.sort_unstable();
        let last = self.lags.len().saturating_sub(1);
        self.lags.get((last as f64 * share).round() as usize).copied().unwrap_or_default()
    }

    fn describe(&mut self, events_per_batch: usize) -> String {
        let us = |lag: Duration| lag.as_micros();
        let [p50, p90, p99, max] = [0.5, 0.9, 0.99, 1.0].map(|share| us(self.quantile(share)));
        let rate = (self.lags.len() * events_per_batch) as f64 / self.took.as_secs_f64();
        let head = format!(
            "  {} of {} batches, {rate:.0} events/s; p50 {p50} us, p90 {p90} us, p99 {p99} us, max {max} us\n",
            self.lags.len(),
            self.n_sent
        );
        let mut below = 0;
        let rows = MARKS.iter().map(|mark| {
            let upto = self.lags.partition_point(|lag| lag.as_micros() < u128::from(*mark));
            let share = (upto - below) as f64 / self.lags.len().max(1) as f64;
            below = upto;
            let name = if *mark == u64::MAX { "more".to_owned() } else { format!("< {mark} us") };
            format!("  {name:>11} {:>6.2} % {}\n", share * 100.0, "#".repeat((share * BAR as f64).round() as usize))
        });
        head + &rows.collect::<String>()
    }
}

/// Has all publishers publish, and `receive` collect until `n_expected` lags are there.
fn publish_all(publishers: &mut [PublisherProcess], n_batches: u64) -> Result<()> {
    publishers.iter_mut().try_for_each(|publisher| publisher.publish_on(n_batches))?;
    publishers.iter().try_for_each(|publisher| publisher.wait_at(n_batches))
}

fn plane(binary: &Path, args: &LagArgs) -> Result<Lags> {
    let lags = Arc::new(Mutex::new(Vec::<Duration>::with_capacity((args.n_batches() * args.publishers) as usize)));
    let observer: LagObserver = {
        let lags = lags.clone();
        // Uncontended until the end of the phase.
        Arc::new(move |lag| lags.lock().unwrap_or_else(PoisonError::into_inner).push(lag))
    };
    let index = Arc::new(PrefixIndex::new(IndexLimits::default()));
    let plane = EventPlane::start_observed(&index, observer);
    let mut publishers = args.start(binary)?;
    for (endpoint, publisher) in (0..).zip(&publishers) {
        plane.add(source(endpoint, publisher.events().to_owned(), Some(publisher.replay().to_owned())));
    }
    wait("live sources", || plane.status().iter().all(|status| status.state == SourceState::Live))?;
    let (started, n_sent) = (Instant::now(), args.n_batches() * args.publishers);
    publish_all(&mut publishers, args.n_batches())?;
    wait("the last batches", || plane.status().iter().map(|status| status.n_batches).sum::<u64>() == n_sent)?;
    let took = started.elapsed();
    plane.stop();
    let lags = std::mem::take(&mut *lags.lock().unwrap_or_else(PoisonError::into_inner));
    Ok(Lags { lags, took, n_sent })
}

fn baseline(binary: &Path, args: &LagArgs) -> Result<Lags> {
    let mut publishers = args.start(binary)?;
    let context = zmq::Context::new();
    let subscriber = context.socket(zmq::SUB)?;
    subscriber.set_linger(0)?;
    subscriber.set_rcvhwm(10_000)?;
    subscriber.set_rcvtimeo(SILENCE_MS)?;
    subscriber.set_subscribe(b"")?;
    for publisher in &publishers {
        subscriber.connect(publisher.events())?;
    }
    std::thread::sleep(SUBSCRIBING);
    let is_done = Arc::new(AtomicBool::new(false));
    let receiver = {
        let is_done = is_done.clone();
        let receive = move || receive_lags(&subscriber, &is_done);
        std::thread::Builder::new().name("plain-sub".to_owned()).spawn(receive).context("cannot start a thread")?
    };
    let (started, n_sent) = (Instant::now(), args.n_batches() * args.publishers);
    publish_all(&mut publishers, args.n_batches())?;
    let took = started.elapsed();
    is_done.store(true, Ordering::Relaxed);
    let lags = receiver.join().ok().context("the receiver panicked")?;
    Ok(Lags { lags, took, n_sent })
}

/// Until all is sent and nothing more comes.
fn receive_lags(subscriber: &zmq::Socket, is_done: &AtomicBool) -> Vec<Duration> {
    let mut lags = Vec::new();
    loop {
        match subscriber.recv_multipart(0) {
            Ok(frames) => lags.extend(frames.last().and_then(|payload| lag_of(payload))),
            Err(_) if is_done.load(Ordering::Relaxed) => return lags,
            Err(_) => {}
        }
    }
}

/// The stamp is the first element of the batch: an array header of one byte, then a float of 8 behind its marker.
fn lag_of(payload: &[u8]) -> Option<Duration> {
    let stamp = f64::from_be_bytes(*payload.get(2..)?.first_chunk()?);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
    Duration::try_from_secs_f64(now.as_secs_f64() - stamp).ok()
}

fn wait(what: &str, mut condition: impl FnMut() -> bool) -> Result<()> {
    let started = Instant::now();
    while !condition() {
        ensure!(started.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_and_stamps_are_read() {
        let mut lags = Lags { lags: (0..=100).rev().map(Duration::from_micros).collect(), ..Lags::default() };
        assert_eq!([0.5, 0.99, 1.0].map(|share| lags.quantile(share).as_micros()), [50, 99, 100]);
        let payload = crate::sim::event::encode_batch(1.5, &[], 0, crate::sim::event::WireHash::Int);
        assert!(lag_of(&payload).unwrap() > Duration::from_secs(1_000_000));
        assert_eq!(lag_of(&payload[..5]), None);
    }
}
