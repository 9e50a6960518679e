//! The pick, and how the candidates stood when it was made.
//!
//! Rule: most tokens matched on a GPU, then most that other tiers add, then fewest in flight, then at random. Where
//! nothing matched this is least-request. What an endpoint holds speaks for it only while it is not too far ahead of
//! the least loaded one ([`MOST_AHEAD`]): prompts of all conversations begin alike, and would otherwise all go where
//! the first one went.

use std::cmp::{Ordering, Reverse};
use std::sync::Arc;

pub use super::decision::{Decision, Fallback, Outcome, Timings};
use super::endpoint::Endpoint;
use super::score::{Candidate, Candidates};
use super::standing::greatest;
pub use super::standing::{MOST_STANDINGS, Policy, Standing};

/// Requests in flight that an endpoint may have more than the least loaded candidate before what it holds no longer
/// counts: the threshold of AIBrix's Helm chart for the same purpose
/// (`AIBRIX_PREFIX_CACHE_POD_RUNNING_REQUEST_IMBALANCE_ABS_COUNT`).
pub const MOST_AHEAD: u32 = 16;

/// The chosen endpoint and the next best one, which Envoy tries when the first cannot be reached.
#[derive(Clone, Debug)]
pub struct Pick {
    /// The endpoint to send the request to.
    pub endpoint: Arc<Endpoint>,
    /// Tokens of the prompt that it holds on a GPU.
    pub matched_tokens: u32,
    /// Tokens after those that it holds on any tier.
    pub offloaded_tokens: u32,
    /// The data-parallel rank whose match that is; none where nothing matched.
    pub rank: Option<u32>,
    /// The runner-up, if there is another candidate.
    pub alternate: Option<Arc<Endpoint>>,
}

/// A pick, and how the candidates stood.
#[derive(Clone, Debug)]
pub struct Choice {
    /// The pick.
    pub pick: Pick,
    /// What ordered the candidates.
    pub policy: Policy,
    /// The best of them, best first, the pick and the runner-up before their equals; at most [`MOST_STANDINGS`].
    pub standings: Vec<Standing>,
    /// How many there were.
    pub n_candidates: u32,
    /// Endpoints that are avoided: left out, unless there is nobody else.
    pub n_avoided: u32,
}

/// Picks among `candidates` and says how they stood; none when there are none. `random` breaks ties.
pub fn choose(candidates: &Candidates, random: &mut fastrand::Rng) -> Option<Choice> {
    choose_keeping(MOST_STANDINGS, candidates, random)
}

/// The same, with the standings of up to `n` candidates.
pub fn choose_keeping(n: usize, candidates: &Candidates, random: &mut fastrand::Rng) -> Option<Choice> {
    let Candidates { all, n_avoided } = candidates;
    let pick = pick(all, random)?;
    let fewest = fewest_in_flight(all)?;
    let is_first = |candidate: &Candidate| candidate.endpoint.id == pick.endpoint.id;
    let is_second = |candidate: &Candidate| pick.alternate.as_ref().is_some_and(|it| it.id == candidate.endpoint.id);
    // Of equals those that chance has preferred stand in front.
    let order = |candidate: &Candidate| (is_first(candidate), is_second(candidate), merit(candidate, fewest));
    let best = greatest(all.iter(), n, |a, b| order(a).cmp(&order(b)));
    let n_tokens = |first: &&Candidate| merit(first, fewest).0 + merit(first, fewest).1;
    let policy = if best.first().map_or(0, n_tokens) > 0 { Policy::PrefixCache } else { Policy::LeastRequest };
    Some(Choice {
        policy,
        standings: best.into_iter().map(|candidate| standing(candidate, fewest)).collect(),
        pick,
        n_candidates: u32::try_from(all.len()).unwrap_or(u32::MAX),
        n_avoided: *n_avoided,
    })
}

fn standing(candidate: &Candidate, fewest_in_flight: u32) -> Standing {
    Standing::new(candidate, is_too_far_ahead(candidate, fewest_in_flight))
}

fn fewest_in_flight(candidates: &[Candidate]) -> Option<u32> {
    candidates.iter().map(|candidate| candidate.in_flight).min()
}

/// Picks among `candidates`; none when there are none. `random` breaks ties.
pub fn pick(candidates: &[Candidate], random: &mut fastrand::Rng) -> Option<Pick> {
    let fewest = fewest_in_flight(candidates)?;
    let merit = |candidate: &Candidate| merit(candidate, fewest);
    let first = best(candidates, None, merit, random)?;
    let alternate = best(candidates, Some(first), merit, random);
    Some(Pick {
        endpoint: first.endpoint.clone(),
        matched_tokens: first.matched_tokens,
        offloaded_tokens: first.offloaded_tokens,
        rank: first.rank,
        alternate: alternate.map(|candidate| candidate.endpoint.clone()),
    })
}

/// The best candidate apart from `except`: reservoir sampling, so that each of n equals is taken with chance 1/n.
fn best<'a>(
    candidates: &'a [Candidate],
    except: Option<&Candidate>,
    merit: impl Fn(&Candidate) -> Merit,
    random: &mut fastrand::Rng,
) -> Option<&'a Candidate> {
    let mut best: Option<&Candidate> = None;
    let mut n_equal = 0;
    for candidate in candidates {
        if except.is_some_and(|except| except.endpoint.id == candidate.endpoint.id) {
            continue;
        }
        match best.map(|best| merit(candidate).cmp(&merit(best))) {
            Some(Ordering::Less) => {}
            Some(Ordering::Equal) => {
                n_equal += 1;
                if random.usize(..n_equal) == 0 {
                    best = Some(candidate);
                }
            }
            None | Some(Ordering::Greater) => {
                n_equal = 1;
                best = Some(candidate);
            }
        }
    }
    best
}

/// Tokens on a GPU, tokens on other tiers, requests in flight.
type Merit = (u32, u32, Reverse<u32>);

fn merit(candidate: &Candidate, fewest_in_flight: u32) -> Merit {
    let Candidate { matched_tokens, offloaded_tokens, in_flight, .. } = *candidate;
    if is_too_far_ahead(candidate, fewest_in_flight) {
        return (0, 0, Reverse(in_flight));
    }
    (matched_tokens, offloaded_tokens, Reverse(in_flight))
}

fn is_too_far_ahead(candidate: &Candidate, fewest_in_flight: u32) -> bool {
    candidate.in_flight - fewest_in_flight > MOST_AHEAD
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::endpoint::EndpointId;

    fn candidate(id: u32, matched_tokens: u32, in_flight: u32) -> Candidate {
        let address = ([127, 0, 0, 1], 8000 + id as u16).into();
        let endpoint = Arc::new(Endpoint::new(EndpointId(id), address));
        Candidate { endpoint, matched_tokens, offloaded_tokens: 0, promised_tokens: 0, rank: None, in_flight }
    }

    fn picked(candidates: &[Candidate]) -> (u32, Option<u32>) {
        let pick = pick(candidates, &mut fastrand::Rng::with_seed(1)).expect("there are candidates");
        (pick.endpoint.id.0, pick.alternate.map(|endpoint| endpoint.id.0))
    }

    #[test]
    fn most_matched_then_fewest_in_flight() {
        let warm = [candidate(0, 0, 0), candidate(1, 64, 9), candidate(2, 64, 5), candidate(3, 32, 0)];
        assert_eq!(picked(&warm), (2, Some(1)));
        let cold = [candidate(0, 0, 3), candidate(1, 0, 1), candidate(2, 0, 2)];
        assert_eq!(picked(&cold), (1, Some(2)));
    }

    #[test]
    fn what_an_endpoint_holds_does_not_put_it_too_far_ahead() {
        let with_lead = |lead| [candidate(0, 64, 5 + lead), candidate(1, 0, 5), candidate(2, 0, 6)];
        assert_eq!(picked(&with_lead(MOST_AHEAD)), (0, Some(1)));
        assert_eq!(picked(&with_lead(MOST_AHEAD + 1)), (1, Some(2)));
        let all_hold = [candidate(0, 64, MOST_AHEAD + 1), candidate(1, 32, 0)];
        assert_eq!(picked(&all_hold), (1, Some(0)));
    }

    #[test]
    fn offloaded_tokens_decide_between_equal_matches_only() {
        let offloading = |id, matched, offloaded_tokens| Candidate {
            offloaded_tokens,
            rank: Some(id),
            ..candidate(id, matched, id)
        };
        let candidates = [offloading(0, 64, 0), offloading(1, 64, 32), offloading(2, 32, 640)];
        let pick = pick(&candidates, &mut fastrand::Rng::with_seed(1)).expect("there are candidates");
        assert_eq!((pick.endpoint.id.0, pick.offloaded_tokens, pick.rank), (1, 32, Some(1)));
        assert_eq!(pick.alternate.map(|endpoint| endpoint.id.0), Some(0));
    }

    fn chosen(candidates: &[Candidate], seed: u64) -> Choice {
        let candidates = Candidates { all: candidates.to_vec(), n_avoided: 3 };
        choose(&candidates, &mut fastrand::Rng::with_seed(seed)).expect("there are candidates")
    }

    #[test]
    fn choice_is_the_pick_and_the_best_stand_in_its_order() {
        let candidates: Vec<_> = (0..40).map(|id| candidate(id, 16 * (id % 5), id % 7)).collect();
        for seed in 0..20 {
            let choice = chosen(&candidates, seed);
            let pick = pick(&candidates, &mut fastrand::Rng::with_seed(seed)).expect("there are candidates");
            let ports: Vec<_> = choice.standings.iter().map(|standing| standing.endpoint).collect();
            assert_eq!(choice.pick.endpoint.id, pick.endpoint.id);
            assert_eq!(ports.len(), MOST_STANDINGS);
            assert_eq!(Some(ports[0]), Some(pick.endpoint.address));
            assert_eq!(Some(ports[1]), pick.alternate.map(|endpoint| endpoint.address));
            let terms = |standing: &Standing| (standing.matched_tokens, Reverse(standing.in_flight));
            assert!(choice.standings.is_sorted_by_key(|standing| Reverse(terms(standing))));
            assert_eq!((choice.n_candidates, choice.n_avoided), (40, 3));
        }
    }

    #[test]
    fn policy_is_what_made_the_difference() {
        let cold = [candidate(0, 0, 3), candidate(1, 0, 1)];
        assert_eq!(chosen(&cold, 1).policy, Policy::LeastRequest);
        let warm = [candidate(0, 16, 3), candidate(1, 0, 1)];
        assert_eq!(chosen(&warm, 1).policy, Policy::PrefixCache);
        let warm_and_busy = [candidate(0, 16, MOST_AHEAD + 2), candidate(1, 0, 1)];
        let choice = chosen(&warm_and_busy, 1);
        assert_eq!(choice.policy, Policy::LeastRequest);
        assert_eq!(choice.standings.iter().map(|it| it.is_too_far_ahead).collect::<Vec<_>>(), [false, true]);
        let offloaded = [Candidate { offloaded_tokens: 16, ..candidate(0, 0, 3) }, candidate(1, 0, 1)];
        assert_eq!(chosen(&offloaded, 1).policy, Policy::PrefixCache);
    }

    #[test]
    fn one_candidate_has_no_alternate_and_none_no_pick() {
        assert_eq!(picked(&[candidate(7, 0, 0)]), (7, None));
        assert!(pick(&[], &mut fastrand::Rng::with_seed(1)).is_none());
    }

    #[test]
    fn ties_break_evenly() {
        let mut random = fastrand::Rng::with_seed(1);
        let equal = [candidate(0, 0, 1), candidate(1, 0, 1), candidate(3, 0, 2), candidate(2, 0, 1)];
        let mut counts = [0; 4];
        for _ in 0..3_000 {
            counts[pick(&equal, &mut random).expect("there are candidates").endpoint.id.0 as usize] += 1;
        }
        assert_eq!(counts[3], 0);
        assert!(counts[..3].iter().all(|&n| (850..1_150).contains(&n)), "{counts:?}");
    }
}
