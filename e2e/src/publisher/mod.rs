//! vLLM's publisher thread as a process of its own, so that it can be stopped, killed and replaced like an engine.
//!
//! [`program`] makes the events, `worker` publishes them as vLLM does, [`process`] is the handle that the harness
//! holds. [`swarm`] is many small publishers in one process, for crowds.
//!
//! The process says `ready EVENTS REPLAY` on its standard output, is told `until N` on its standard input, publishes up
//! to N batches and says `at N`. It ends when its standard input does, so it never outlives the harness.

pub mod process;
pub mod program;
pub mod swarm;
mod worker;

use std::io::BufRead;
use std::sync::mpsc::{Receiver, channel};

use anyhow::{Context, Result};
use clap::Args;

use program::ProgramOptions;
pub use worker::run_publisher;
pub(crate) use worker::say;

/// Flags of a publisher.
#[derive(Clone, Debug, Args)]
pub struct PublisherArgs {
    /// PUB socket, always bound.
    #[arg(long, default_value = "tcp://127.0.0.1:0")]
    pub events: String,
    /// ROUTER socket for replays.
    #[arg(long, default_value = "tcp://127.0.0.1:0")]
    pub replay: String,
    /// Batches per second; 0: as fast as it goes.
    #[arg(long, default_value_t = 0.0)]
    pub rate: f64,
    /// Events of each batch.
    #[arg(long, default_value_t = 4)]
    pub events_per_batch: usize,
    /// Blocks of the cache.
    #[arg(long, default_value_t = 2000)]
    pub cache_blocks: usize,
    /// Tokens per block.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..))]
    pub block_size: u32,
    /// Most blocks of one event.
    #[arg(long, default_value_t = 4)]
    pub max_stored: usize,
    /// One event in so many clears the cache; 0: none does.
    #[arg(long, default_value_t = 20_000)]
    pub clear_every: u32,
    /// Seed of the events.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// PYTHONHASHSEED of the engine.
    #[arg(long, default_value = "0")]
    pub pythonhashseed: String,
    /// Batches published before anybody can subscribe.
    #[arg(long, default_value_t = 0)]
    pub start_batches: u64,
    /// `hwm`: batches that may wait for a subscriber.
    #[arg(long, default_value_t = crate::sim::publisher::PUB_HWM)]
    pub hwm: i32,
    /// `buffer_steps`: batches that can be replayed.
    #[arg(long, default_value_t = crate::sim::publisher::BUFFER_STEPS)]
    pub buffer_steps: usize,
    /// Do not wait to be told: publish for ever.
    #[arg(long)]
    pub endless: bool,
}

impl Default for PublisherArgs {
    fn default() -> Self {
        let any = "tcp://127.0.0.1:0".to_owned();
        let ProgramOptions {
            seed,
            events_per_batch,
            cache_blocks,
            block_size,
            max_stored,
            clear_every,
            pythonhashseed,
        } = ProgramOptions::default();
        Self {
            events: any.clone(),
            replay: any,
            rate: 0.0,
            events_per_batch,
            cache_blocks,
            block_size,
            max_stored,
            clear_every,
            seed,
            pythonhashseed,
            start_batches: 0,
            hwm: crate::sim::publisher::PUB_HWM,
            buffer_steps: crate::sim::publisher::BUFFER_STEPS,
            endless: false,
        }
    }
}

impl PublisherArgs {
    /// The program that it publishes.
    pub fn program(&self) -> ProgramOptions {
        let Self { seed, events_per_batch, cache_blocks, block_size, max_stored, clear_every, .. } = *self;
        let pythonhashseed = self.pythonhashseed.clone();
        ProgramOptions { seed, events_per_batch, cache_blocks, block_size, max_stored, clear_every, pythonhashseed }
    }

    /// The command line that makes these.
    fn to_flags(&self) -> Vec<String> {
        let mut flags: Vec<String> = [
            ("--events", self.events.clone()),
            ("--replay", self.replay.clone()),
            ("--rate", self.rate.to_string()),
            ("--events-per-batch", self.events_per_batch.to_string()),
            ("--cache-blocks", self.cache_blocks.to_string()),
            ("--block-size", self.block_size.to_string()),
            ("--max-stored", self.max_stored.to_string()),
            ("--clear-every", self.clear_every.to_string()),
            ("--seed", self.seed.to_string()),
            ("--pythonhashseed", self.pythonhashseed.clone()),
            ("--start-batches", self.start_batches.to_string()),
            ("--hwm", self.hwm.to_string()),
            ("--buffer-steps", self.buffer_steps.to_string()),
        ]
        .into_iter()
        .flat_map(|(flag, value)| [flag.to_owned(), value])
        .collect();
        flags.extend(self.endless.then(|| "--endless".to_owned()));
        flags
    }
}

/// The lines of standard input, read on a thread of their own. Disconnected: standard input has ended.
pub(crate) fn standard_input() -> Result<Receiver<String>> {
    let (lines, receiver) = channel();
    let read = move || {
        let lines_in = std::io::stdin().lock().lines();
        for line in lines_in.map_while(std::result::Result::ok) {
            if lines.send(line).is_err() {
                return;
            }
        }
    };
    std::thread::Builder::new().name("stdin".to_owned()).spawn(read).context("cannot start a thread")?;
    Ok(receiver)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        args: PublisherArgs,
    }

    #[test]
    fn flags_make_the_same_arguments_again() {
        let args = PublisherArgs {
            rate: 2.5,
            seed: 9,
            hwm: 10,
            block_size: 4,
            max_stored: 2,
            clear_every: 5,
            buffer_steps: 7,
            start_batches: 3,
            endless: true,
            ..PublisherArgs::default()
        };
        let flags = std::iter::once("publisher".to_owned()).chain(args.to_flags());
        assert_eq!(format!("{:?}", Cli::try_parse_from(flags).unwrap().args), format!("{args:?}"));
        assert_eq!(
            format!("{:?}", Cli::try_parse_from(["publisher"]).unwrap().args),
            format!("{:?}", PublisherArgs::default())
        );
    }
}
