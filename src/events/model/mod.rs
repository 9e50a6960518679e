//! The event plane in virtual time: state machine, applier and index against random engines, networks and faults.
//!
//! A *program* is everything that follows from one seed: up to three engine processes with small caches, what they
//! compute, announce and evict, and what happens to their batches on the way: loss, duplication, delay, truncation,
//! broken and silent connections, restarts unseen, another engine at the same address, a replay that is late, lossy,
//! dead or absent. When the faults end, every source has to come to rest, and then:
//!
//! - a source that says that it is live is credited with exactly the blocks that its engine has cached,
//! - one that says that it is incomplete is credited with some of these, and never with any other.
//!
//! While it runs, no batch is applied twice or out of order in a generation, and none behind a hole.
//!
//! `library` has the prompts, `announce` the events' bytes, `engine` the cache, `publisher` the process, `world` time
//! and the network, `source` obeys the state machine as the socket code does, `program` draws, `check` decides.
//!
//! The same seed gives the same program. A seed that fails is printed, and run again, with all that happens, by
//!
//! ```text
//! WARMROUTE_MODEL_SEED=<seed> cargo test --lib events::model::one_program -- --ignored --nocapture
//! ```

mod announce;
mod check;
mod engine;
mod library;
mod program;
mod publisher;
mod source;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use program::Summary;

/// First seed of a run; `WARMROUTE_MODEL_BASE` has others looked at.
const BASE: u64 = 1_000_000;
const N_PROGRAMS: u64 = 2_000;
const N_MANY_PROGRAMS: u64 = 100_000;
const N_THREADS: u64 = 2;
/// Failed programs that are named.
const MAX_SHOWN: usize = 20;

#[test]
fn index_equals_the_engines_caches_after_random_faults() {
    run_all(N_PROGRAMS);
}

#[test]
#[ignore = "minutes: 100,000 programs"]
fn index_equals_the_engines_caches_after_random_faults_in_many_programs() {
    run_all(N_MANY_PROGRAMS);
}

#[test]
#[ignore = "repeats the program of WARMROUTE_MODEL_SEED"]
fn one_program() {
    // All ignored tests are run at times, and then no seed is meant.
    match number("WARMROUTE_MODEL_SEED") {
        Some(seed) => println!("{:?}", program::run(seed, true)),
        None => println!("no WARMROUTE_MODEL_SEED: nothing to repeat"),
    }
}

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text:?} is not a number")))
}

/// Runs the programs, and goes on after one that failed, since how many fail in what way says more than the first one.
fn run_all(n_programs: u64) {
    let base = number("WARMROUTE_MODEL_BASE").unwrap_or(BASE);
    let seeds = base..base + n_programs;
    println!("programs of the seeds {seeds:?}");
    let (summary, failures) = std::thread::scope(|scope| {
        let part = |first: u64| seeds.clone().skip(first as usize).step_by(N_THREADS as usize);
        let threads: Vec<_> = (0..N_THREADS).map(|first| scope.spawn(move || run_some(part(first)))).collect();
        threads.into_iter().fold((Summary::default(), Vec::new()), |(mut summary, mut failures), thread| {
            let (more, failed) = thread.join().unwrap_or_else(|panic| resume_unwind(panic));
            summary += more;
            failures.extend(failed);
            (summary, failures)
        })
    });
    failures.iter().take(MAX_SHOWN).for_each(|(seed, text)| println!("seed {seed}: {text}"));
    assert!(failures.is_empty(), "{} of {n_programs} programs failed", failures.len());
    println!("{summary:?}");
    // A model in which nothing is ever known would prove nothing.
    assert!(summary.n_live > n_programs / 2 && summary.n_credited > 4 * summary.n_live, "{summary:?}");
    assert!(summary.n_split < n_programs / 100, "{summary:?}");
}

/// What the programs of these seeds came to, and those that failed with their reasons.
fn run_some(seeds: impl Iterator<Item = u64>) -> (Summary, Vec<(u64, String)>) {
    let mut summary = Summary::default();
    let mut failures = Vec::new();
    for seed in seeds {
        match catch_unwind(AssertUnwindSafe(|| program::run(seed, false))) {
            Ok(one) => summary += one,
            Err(panic) => failures.push((seed, text_of(panic.as_ref()))),
        }
    }
    (summary, failures)
}

fn text_of(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
    text.unwrap_or("a panic without a text").to_owned()
}
