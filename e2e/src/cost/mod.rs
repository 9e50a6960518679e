//! `cargo e2e cost`: what the router costs per pod that publishes KV events: processor time and bytes.
//!
//! Publisher processes send events at a given rate, each as one pod does. In one phase the real router follows them; in
//! another a plain SUB socket in a process of its own takes the same load and decodes nothing, which is what libzmq alone
//! costs; in a third the connections are there and nobody publishes. Processor time is the kernel's account of each process,
//! so it says nothing of time spent waiting for a processor. Bytes are counted by a proxy between publishers and router, in
//! a phase of their own: payload of TCP both ways, without the headers of TCP and IP.
//!
//! Per event everything depends on what an event is, so the table names the batches: events per batch, blocks per event
//! at most, tokens per block. The publishers' caches are full after a while, and then half of the events are removals.

mod phase;
mod subscriber;

use std::fmt;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::Args;

use crate::publisher::PublisherArgs;
use crate::router;
use phase::{Phase, Stage};
pub use subscriber::{SubscriberArgs, run_subscriber};

/// Flags of the measurement.
#[derive(Clone, Debug, Args)]
pub struct CostArgs {
    /// Events per second of each publisher; several.
    #[arg(long, value_delimiter = ',', default_value = "100,10000")]
    pub rates: Vec<f64>,
    /// Publishers; several.
    #[arg(long, value_delimiter = ',', default_value = "1,4,16")]
    pub publishers: Vec<u64>,
    /// Events per second of all publishers together, above which a cell is left out.
    #[arg(long, default_value_t = 50_000.0)]
    pub most: f64,
    /// Events of each batch.
    #[arg(long, default_value_t = 10)]
    pub events_per_batch: usize,
    /// Most blocks of one event.
    #[arg(long, default_value_t = 4)]
    pub max_stored: usize,
    /// Tokens per block.
    #[arg(long, default_value_t = 16)]
    pub block_size: u32,
    /// Seconds of each phase.
    #[arg(long, default_value_t = 20.0)]
    pub seconds: f64,
    /// Times that the phases are run; the median counts.
    #[arg(long, default_value_t = 3)]
    pub rounds: usize,
}

/// One row: so many publishers of so many events per second each.
#[derive(Clone, Copy, Debug)]
struct Cell {
    n_publishers: u64,
    rate: f64,
}

/// What a cell showed, medians over its rounds.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    n_publishers: u64,
    /// Events per second that each publisher was to send.
    asked: f64,
    /// Events per second that arrived from each.
    reached: f64,
    /// Share of one core that the router takes while nobody publishes.
    idle: f64,
    /// Share of one core that it takes under the load.
    router: f64,
    /// The same of the plain subscriber.
    plain: f64,
    /// The same of all publishers.
    publishers: f64,
    /// Bytes of each event, from publisher to router.
    bytes_per_event: f64,
    /// Bytes per second from the router to each publisher.
    bytes_back: f64,
}

/// Measures and prints.
///
/// # Errors
/// When a process does not start, or not everything that is sent is applied.
pub async fn print(args: CostArgs) -> Result<()> {
    let binary = tokio::task::spawn_blocking(router::binary).await??;
    let stage = Stage::new(binary, args.clone())?;
    println!("{args}");
    println!("{}", Cost::header());
    for cell in args.cells() {
        println!("{}", measure(&stage, cell).await?);
    }
    Ok(())
}

async fn measure(stage: &Stage, cell: Cell) -> Result<Cost> {
    let mut phases: [Vec<Phase>; 3] = Default::default();
    // They take turns, so that a machine that slows down slows all of them.
    for _ in 0..stage.args.rounds.max(1) {
        phases[0].push(stage.idle(cell).await?);
        phases[1].push(stage.plain(cell).await?);
        phases[2].push(stage.router(cell).await?);
    }
    let traffic = stage.traffic(cell).await?;
    let median = |phases: &[Phase], of: fn(&Phase) -> f64| median(phases.iter().map(of).collect());
    let [idle, plain, router] = &phases;
    let cost = Cost {
        n_publishers: cell.n_publishers,
        asked: cell.rate,
        reached: median(router, |phase| phase.n_events as f64 / phase.took.as_secs_f64()) / cell.n_publishers as f64,
        idle: median(idle, Phase::receiver_share),
        router: median(router, Phase::receiver_share),
        plain: median(plain, Phase::receiver_share),
        publishers: median(router, Phase::publishers_share),
        bytes_per_event: traffic.n_down as f64 / traffic.n_events.max(1) as f64,
        bytes_back: traffic.n_up as f64 / traffic.took.as_secs_f64() / cell.n_publishers as f64,
    };
    ensure!(cost.reached > 0.0, "nothing was published");
    Ok(cost)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values[..] {
        [] => 0.0,
        _ if values.len().is_multiple_of(2) => (values[middle - 1] + values[middle]) / 2.0,
        _ => values[middle],
    }
}

impl CostArgs {
    fn cells(&self) -> impl Iterator<Item = Cell> {
        let all = self
            .rates
            .iter()
            .flat_map(|&rate| self.publishers.iter().map(move |&n_publishers| Cell { n_publishers, rate }));
        all.filter(|cell| cell.rate * cell.n_publishers as f64 <= self.most)
    }

    fn publisher(&self, seed: u64, cell: Cell) -> PublisherArgs {
        PublisherArgs {
            seed,
            rate: cell.rate / self.events_per_batch as f64,
            events_per_batch: self.events_per_batch,
            max_stored: self.max_stored,
            block_size: self.block_size,
            // A clear takes a sweep of milliseconds; in an engine's life it is an event of its own.
            clear_every: 0,
            ..PublisherArgs::default()
        }
    }

    /// Batches of each publisher in one phase.
    fn n_batches(&self, cell: Cell) -> u64 {
        (cell.rate * self.seconds / self.events_per_batch as f64).ceil() as u64
    }

    fn duration(&self) -> Duration {
        Duration::from_secs_f64(self.seconds)
    }
}

impl fmt::Display for CostArgs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { events_per_batch, max_stored, block_size, seconds, rounds, .. } = self;
        write!(
            f,
            "base: {events_per_batch} events per batch, up to {max_stored} blocks per stored event, {block_size} tokens per \
             block; phases of {seconds} s, medians of {rounds}\nprocessor time in % of one core; us per event above idle"
        )
    }
}

impl Cost {
    fn header() -> String {
        format!(
            "{:>4} {:>9} {:>9} {:>8} {:>9} {:>9} {:>7} {:>8} {:>8} {:>8} {:>8} {:>7} {:>9}",
            "pods",
            "asked/s",
            "reached/s",
            "B/event",
            "KB/s,pod",
            "back B/s",
            "idle %",
            "router %",
            "%,pod",
            "us/event",
            "plain us",
            "ratio",
            "publ. us"
        )
    }

    /// Events per second of all publishers.
    fn n_events(&self) -> f64 {
        self.reached * self.n_publishers as f64
    }

    /// Microseconds per event of a process that takes this share of a core.
    fn us_per_event(&self, share: f64) -> f64 {
        1e6 * share / self.n_events()
    }
}

impl fmt::Display for Cost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let above_idle = (self.router - self.idle).max(0.0);
        let (router_us, plain_us) = (self.us_per_event(above_idle), self.us_per_event(self.plain));
        write!(
            f,
            "{:>4} {:>9.0} {:>9.0} {:>8.1} {:>9.2} {:>9.1} {:>7.2} {:>8.2} {:>8.3} {:>8.2} {:>8.2} {:>7.2} {:>9.2}",
            self.n_publishers,
            self.asked,
            self.reached,
            self.bytes_per_event,
            self.bytes_per_event * self.reached / 1e3,
            self.bytes_back,
            self.idle * 100.0,
            self.router * 100.0,
            above_idle * 100.0 / self.n_publishers as f64,
            router_us,
            plain_us,
            router_us / plain_us,
            self.us_per_event(self.publishers),
        )
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        args: CostArgs,
    }

    fn args(flags: &[&str]) -> CostArgs {
        Cli::try_parse_from(["cost"].iter().chain(flags)).unwrap().args
    }

    #[test]
    fn cells_are_all_rates_with_all_publishers_up_to_the_most() {
        let cells = |flags: &[&str]| -> Vec<(u64, f64)> {
            args(flags).cells().map(|cell| (cell.n_publishers, cell.rate)).collect()
        };
        let default = [(1, 100.0), (4, 100.0), (16, 100.0), (1, 10_000.0), (4, 10_000.0)];
        assert_eq!(cells(&[]), default);
        assert_eq!(cells(&["--rates", "5", "--publishers", "2,3", "--most", "10"]), [(2, 5.0)]);
    }

    #[test]
    fn batches_have_the_rate_of_the_events() {
        let args = args(&["--seconds", "2", "--events-per-batch", "20"]);
        let cell = Cell { n_publishers: 4, rate: 1000.0 };
        assert_eq!((args.publisher(1, cell).rate, args.n_batches(cell)), (50.0, 100));
    }

    #[test]
    fn row_is_per_pod_and_above_idle() {
        let cost = Cost {
            n_publishers: 4,
            asked: 100.0,
            reached: 100.0,
            idle: 0.001,
            router: 0.005,
            plain: 0.002,
            publishers: 0.04,
            bytes_per_event: 250.0,
            bytes_back: 1.5,
        };
        let row: Vec<_> = cost.to_string().split_whitespace().map(str::to_owned).collect();
        let expected =
            ["4", "100", "100", "250.0", "25.00", "1.5", "0.10", "0.50", "0.100", "10.00", "5.00", "2.00", "100.00"];
        assert_eq!(row, expected);
        assert_eq!(
            row.len(),
            Cost::header().replace(" us", "").replace("back B/s", "back").split_whitespace().count() - 1
        );
    }

    #[test]
    fn medians_are_in_the_middle() {
        assert_eq!([vec![], vec![3.0], vec![4.0, 1.0], vec![9.0, 1.0, 2.0]].map(median), [0.0, 3.0, 2.5, 2.0]);
    }
}
