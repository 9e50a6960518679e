//! Random programs: what engines, networks and operators do to the sources, drawn from a seed.

use std::time::Duration;

use super::check;
use super::publisher::Process;
use super::world::{Faults, ReplayServer, SiteIdx, World};
use crate::events::continuity::PROBE_AFTER;

/// Longest virtual time after the last fault until every source has to be at rest. The longest quarantine is 300 s.
const BOUND: Duration = Duration::from_secs(900);
/// Longer than the silence after which a source is asked whether anything was missed, and the answer.
const SILENCE: Duration = PROBE_AFTER.saturating_add(Duration::from_secs(20));
/// Pause between two looks.
const SETTLE_STEP: Duration = Duration::from_secs(5);

/// What a program did, for the log.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Summary {
    /// Sources that ended with everything known.
    pub(super) n_live: u64,
    /// Sources that ended without knowing the beginning.
    pub(super) n_incomplete: u64,
    /// Prompts found shorter than they are cached, since one block lies in the Engine keyspace and the next in Own.
    pub(super) n_split: u64,
    /// Snapshots that were taken over.
    pub(super) n_restored: u64,
    /// Blocks that were credited in the end.
    pub(super) n_credited: u64,
}

impl std::ops::AddAssign for Summary {
    fn add_assign(&mut self, other: Self) {
        self.n_live += other.n_live;
        self.n_incomplete += other.n_incomplete;
        self.n_split += other.n_split;
        self.n_restored += other.n_restored;
        self.n_credited += other.n_credited;
    }
}

/// Runs the program of `seed`, and checks it.
pub(super) fn run(seed: u64, traced: bool) -> Summary {
    let mut rng = fastrand::Rng::with_seed(seed);
    let n_sites = [1, 1, 1, 2, 2, 3][rng.usize(..6)];
    let n_acts = rng.usize(4..40);
    let harshness = rng.u8(..4);
    let are_ranks = rng.bool();
    let mut world = World::new(rng.u8(..4) == 0, rng.fork(), traced);
    for _ in 0..n_sites {
        world.add_site(replay_server(&mut rng), are_ranks);
    }
    for _ in 0..n_acts {
        let site = rng.usize(..n_sites);
        act(&mut world, site, harshness, &mut rng);
        world.advance(pause(&mut rng));
    }
    world.heal();
    settle(&mut world, &mut rng);
    check::quiescent(&world)
}

fn replay_server(rng: &mut fastrand::Rng) -> ReplayServer {
    match rng.u8(..10) {
        0 => ReplayServer::Absent,
        1 => ReplayServer::Dead,
        _ => ReplayServer::Serving {
            max_latency_ms: [5, 100, 500, 5000][rng.usize(..4)],
            loss: [0, 0, 10, 40][rng.usize(..4)],
            n_replies: if rng.u8(..4) == 0 { rng.usize(1..6) } else { usize::MAX },
            end_loss: [0, 0, 50, 100][rng.usize(..4)],
        },
    }
}

fn pause(rng: &mut fastrand::Rng) -> Duration {
    Duration::from_millis(match rng.u8(..10) {
        0..6 => rng.u64(1..50),
        6..9 => rng.u64(50..1500),
        _ => rng.u64(1500..30_000),
    })
}

fn act(world: &mut World, site: SiteIdx, harshness: u8, rng: &mut fastrand::Rng) {
    if rng.u8(..6) > harshness {
        return (0..rng.u8(1..5)).for_each(|_| world.publish(site, Process::publish));
    }
    let faults = &mut world.sites[site].faults;
    match rng.u8(..19) {
        0 => faults.n_dropped = rng.u32(1..5),
        1 => faults.n_duplicated = 1,
        2 => faults.n_truncated = rng.u32(1..3),
        3 => *faults = Faults { loss: [0, 20, 60][rng.usize(..3)], ..*faults },
        4 => world.delay(site, Duration::from_millis(rng.u64(10..4000))),
        5 | 6 => world.break_link(site, rng.bool()),
        7 => world.darken(site, Duration::from_millis(rng.u64(100..10_000))),
        8 => world.darken(site, Duration::from_secs(rng.u64(15..90))),
        9 | 10 => {
            world.kill(site, rng.bool());
            world.boot_within(site, 1..5000);
        }
        // A restart that overtakes, or another engine that got the address: it has worked before anybody listens.
        11 | 12 => {
            world.kill(site, rng.bool());
            world.boot(site, rng.u32(..40));
        }
        13 => world.suspect(site),
        14 | 15 => world.take_snapshot(site),
        16 => world.offer_snapshot(site),
        17 => world.forget(site),
        _ => world.publish(site, Process::publish_poison),
    }
}

/// Engines work on now and then, since a batch that was lost last can only be missed when another comes, or after a
/// silence. When all sources are at rest, each engine shows all that is needed for a proof.
fn settle(world: &mut World, rng: &mut fastrand::Rng) {
    come_to_rest(world, rng);
    (0..world.sites.len()).for_each(|site| world.publish(site, Process::publish_all_kinds));
    world.advance(SILENCE);
    come_to_rest(world, rng);
}

fn come_to_rest(world: &mut World, rng: &mut fastrand::Rng) {
    let until = world.now + BOUND;
    loop {
        world.advance(SETTLE_STEP);
        if world.is_settled() {
            return;
        }
        assert!(world.now < until, "not at rest within {BOUND:?}: {:?}", world.phases());
        let busy = rng.usize(..world.sites.len());
        world.publish(busy, Process::publish);
    }
}
