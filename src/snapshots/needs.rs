//! Which sources a sibling could help, and when it is asked again: a pure part of [`super::siblings`].

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::time::Duration;

use super::serve::Listed;
use crate::events::snapshot::SourceKey;
use crate::events::socket::SourceState;

/// Longest random wait before a source is asked for first, so that replicas that start together do not ask together.
const FIRST_WAIT: Duration = Duration::from_secs(1);
/// Wait after the first time that siblings were asked; doubles with each.
const FIRST_PAUSE: Duration = Duration::from_secs(5);
const MAX_PAUSE: Duration = Duration::from_secs(300);

/// The sources, and when they were asked for.
#[derive(Debug, Default)]
pub(super) struct Needs {
    /// Sources that have a snapshot of our own to prove first.
    from_disk: HashSet<SourceKey>,
    sources: HashMap<SourceKey, Asked>,
}

#[derive(Debug)]
struct Asked {
    n_times: u32,
    /// Not before this time.
    due: Duration,
    /// Nothing was known of the source so far, and nobody was asked.
    is_new: bool,
}

/// A source that siblings are to be asked for now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Need {
    pub(super) key: SourceKey,
    /// Whether only a complete snapshot is better than what we have.
    pub(super) only_complete: bool,
    /// Times that siblings were asked before.
    pub(super) n_times: u32,
}

impl Needs {
    pub(super) fn new(from_disk: impl IntoIterator<Item = SourceKey>) -> Self {
        Self { from_disk: from_disk.into_iter().collect(), sources: HashMap::new() }
    }

    /// What to ask for at `now`, the time since any fixed moment. Every need that this yields counts as asked for.
    pub(super) fn due(
        &mut self,
        now: Duration,
        sources: &[(SourceKey, SourceState)],
        rng: &mut fastrand::Rng,
    ) -> Vec<Need> {
        let present: HashSet<&SourceKey> = sources.iter().map(|(key, _)| key).collect();
        self.sources.retain(|key, _| present.contains(key));
        sources.iter().filter_map(|(key, state)| self.due_of(now, key, *state, rng)).collect()
    }

    fn due_of(&mut self, now: Duration, key: &SourceKey, state: SourceState, rng: &mut fastrand::Rng) -> Option<Need> {
        let asked = self.sources.entry(key.clone()).or_insert_with(|| Asked {
            n_times: 0,
            due: now + FIRST_WAIT.mul_f64(rng.f64()),
            is_new: !self.from_disk.contains(key),
        });
        let only_complete = match state {
            SourceState::Live => {
                // A source that comes and goes keeps its pause; one that stays begins anew.
                asked.n_times = if now < asked.due { asked.n_times } else { 0 };
                asked.is_new = false;
                return None;
            }
            SourceState::Incomplete => true,
            _ if asked.is_new => false,
            _ => return None,
        };
        if now < asked.due {
            return None;
        }
        let need = Need { key: key.clone(), only_complete, n_times: asked.n_times };
        let pause = FIRST_PAUSE.saturating_mul(2_u32.saturating_pow(asked.n_times)).min(MAX_PAUSE);
        *asked = Asked {
            n_times: asked.n_times.saturating_add(1),
            due: now + pause.mul_f64(0.5 + rng.f64() / 2.0),
            is_new: false,
        };
        Some(need)
    }
}

/// Whom to ask for the snapshot: complete ones first, then the newest.
///
/// A sibling that is cut off from a restarted engine may boast the highest number of a process that is gone. So
/// each time that the need comes again, the next best is taken.
pub(super) fn choose<'a>(need: &Need, offers: &'a [(SocketAddr, Listed)]) -> Option<&'a (SocketAddr, Listed)> {
    let fits = |listed: &Listed| listed.key() == need.key && (listed.complete || !need.only_complete);
    let mut fitting: Vec<_> = offers.iter().filter(|(_, listed)| fits(listed)).collect();
    fitting.sort_by_key(|(sibling, listed)| (std::cmp::Reverse((listed.complete, listed.seq)), *sibling));
    let n_fitting = u32::try_from(fitting.len()).ok().filter(|n_fitting| *n_fitting > 0)?;
    fitting.get((need.n_times % n_fitting) as usize).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn key(rank: u32) -> SourceKey {
        SourceKey { model: "m".into(), address: SocketAddr::from(([10, 0, 0, 1], 8000)), rank }
    }

    fn due(needs: &mut Needs, now: Duration, state: SourceState) -> Option<Need> {
        needs.due(now, &[(key(0), state)], &mut fastrand::Rng::with_seed(7)).pop()
    }

    fn need(only_complete: bool, n_times: u32) -> Need {
        Need { key: key(0), only_complete, n_times }
    }

    #[test]
    fn a_new_source_is_asked_for_once_while_it_catches_up() {
        let mut needs = Needs::default();
        assert_eq!(due(&mut needs, Duration::ZERO, SourceState::Connecting), None, "replicas do not ask together");
        assert_eq!(due(&mut needs, SECOND, SourceState::CatchingUp), Some(need(false, 0)));
        for now in 2..1000 {
            assert_eq!(due(&mut needs, now * SECOND, SourceState::CatchingUp), None);
        }
    }

    #[test]
    fn a_source_with_a_snapshot_of_our_own_is_asked_for_when_that_did_not_do() {
        let mut needs = Needs::new([key(0)]);
        for now in 0..10 {
            assert_eq!(due(&mut needs, now * SECOND, SourceState::CatchingUp), None);
        }
        assert_eq!(due(&mut needs, 10 * SECOND, SourceState::Incomplete), Some(need(true, 0)));
    }

    #[test]
    fn an_incomplete_source_is_asked_for_with_growing_pauses_up_to_five_minutes() {
        let mut needs = Needs::default();
        let asked: Vec<u32> =
            (0..3600).filter(|now| due(&mut needs, *now * SECOND, SourceState::Incomplete).is_some()).collect();
        let pauses: Vec<u32> = asked.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert!(asked[0] <= 1, "{asked:?}");
        for (pause, most) in pauses.iter().zip([5, 10, 20, 40, 80, 160, 300, 300, 300]) {
            assert!((most / 2..=most + 1).contains(pause), "{pauses:?}");
        }
        assert!((10..30).contains(&asked.len()), "{asked:?}");
    }

    #[test]
    fn a_source_that_comes_and_goes_is_not_asked_for_more_often() {
        let mut needs = Needs::default();
        let state = |now: u32| if now.is_multiple_of(2) { SourceState::Incomplete } else { SourceState::Live };
        let n_asked = (0..100).filter(|now| due(&mut needs, *now * SECOND, state(*now)).is_some()).count();
        assert!((2..=40).contains(&n_asked), "{n_asked}");
    }

    #[test]
    fn a_live_source_needs_nothing_and_one_that_is_gone_is_forgotten() {
        let mut needs = Needs::default();
        for now in 0..100 {
            assert_eq!(due(&mut needs, now * SECOND, SourceState::Live), None);
        }
        assert_eq!(needs.sources.len(), 1);
        needs.due(SECOND, &[], &mut fastrand::Rng::with_seed(7));
        assert!(needs.sources.is_empty());
    }

    #[test]
    fn complete_snapshots_are_taken_first_then_the_newest_and_the_next_time_another() {
        let offer = |port: u16, rank: u32, seq: u64, complete: bool| {
            let SourceKey { model, address, rank } = key(rank);
            (
                SocketAddr::from(([10, 0, 1, 0], port)),
                Listed { model, address, rank, seq, complete, digest: String::new() },
            )
        };
        let offers = [offer(1, 0, 99, false), offer(2, 0, 5, true), offer(3, 0, 7, true), offer(4, 1, 100, true)];
        let chosen = |need: Need| choose(&need, &offers).map(|(sibling, _)| sibling.port());
        assert_eq!([0, 1, 2].map(|n_times| chosen(need(false, n_times))), [Some(3), Some(2), Some(1)]);
        assert_eq!([0, 1, 2].map(|n_times| chosen(need(true, n_times))), [Some(3), Some(2), Some(3)]);
        assert_eq!(chosen(Need { key: key(2), ..need(false, 0) }), None);
    }
}
