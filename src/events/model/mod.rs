//! The event plane in virtual time: state machine, applier and index against random engines, networks and faults.
//!
//! A *program* is everything that follows from one seed: up to three engine processes with small caches, what they compute,
//! announce and evict, and what happens to their batches on the way: loss, duplication, delay, truncation, broken
//! and silent connections, restarts unseen, another engine at the same address, a replay that is late, lossy, dead or absent. When the
//! faults end, every source has to come to rest, and then:
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
    let seed = number("WARMROUTE_MODEL_SEED").expect("WARMROUTE_MODEL_SEED is the seed of the program");
    println!("{:?}", program::run(seed, true));
}

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text:?} is not a number")))
}

fn run_all(n_programs: u64) {
    let base = number("WARMROUTE_MODEL_BASE").unwrap_or(BASE);
    let seeds = base..base + n_programs;
    println!("programs of the seeds {seeds:?}");
    let summary = std::thread::scope(|scope| {
        let part = |first: u64| seeds.clone().skip(first as usize).step_by(N_THREADS as usize);
        let threads: Vec<_> = (0..N_THREADS).map(|first| scope.spawn(move || run_some(part(first)))).collect();
        threads.into_iter().fold(Summary::default(), |mut all, thread| {
            all += thread.join().unwrap_or_else(|panic| resume_unwind(panic));
            all
        })
    });
    println!("{summary:?}");
    // A model in which nothing is ever known would prove nothing.
    assert!(summary.n_live > n_programs / 2 && summary.n_credited > 4 * summary.n_live, "{summary:?}");
}

fn run_some(seeds: impl Iterator<Item = u64>) -> Summary {
    let mut summary = Summary::default();
    for seed in seeds {
        match catch_unwind(AssertUnwindSafe(|| program::run(seed, false))) {
            Ok(one) => summary += one,
            Err(panic) => {
                eprintln!("the program of seed {seed} failed, see events::model for how to repeat it");
                resume_unwind(panic);
            }
        }
    }
    summary
}
