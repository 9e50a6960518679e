//! The pick and the [`Decision`] that records it.
//!
//! Rule: most tokens matched on a GPU, then most that other tiers add, then fewest in flight, then at random. Where
//! nothing matched this is least-request. What an endpoint holds speaks for it only while it is not too far ahead of
//! the least loaded one ([`MOST_AHEAD`]): prompts of all conversations begin alike, and would otherwise all go where
//! the first one went.

use std::cmp::{Ordering, Reverse};
use std::sync::Arc;

use super::endpoint::Endpoint;
use super::score::Candidate;

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

/// Picks among `candidates`; none when there are none. `random` breaks ties.
pub fn pick(candidates: &[Candidate], random: &mut fastrand::Rng) -> Option<Pick> {
    let fewest = candidates.iter().map(|candidate| candidate.in_flight).min()?;
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
    if in_flight - fewest_in_flight > MOST_AHEAD {
        return (0, 0, Reverse(in_flight));
    }
    (matched_tokens, offloaded_tokens, Reverse(in_flight))
}

/// Why a request was picked by load although its prefix might be cached somewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fallback {
    /// The prompt's tokens are not asked for; the reason is that of the request.
    Opaque(&'static str),
    /// The body is not a request we can read.
    UnreadableBody,
    /// The body is larger than what is read.
    OversizedBody,
    /// The prompt's tokens are not known; the reason is that of the tokenizer.
    Tokenizer(&'static str),
}

impl Fallback {
    /// Name in metrics, spans and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Opaque(reason) | Self::Tokenizer(reason) => reason,
            Self::UnreadableBody => "unreadable_body",
            Self::OversizedBody => "oversized_body",
        }
    }
}

/// What came of the prefix lookup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The picked endpoint holds a prefix of the prompt, by its events, or is about to.
    PrefixMatch,
    /// The picked endpoint was given a prefix of the prompt before; whether it still holds it nobody says.
    LearnedMatch,
    /// The prompt was looked up and the picked endpoint holds nothing of it.
    NoMatch,
    /// The prompt was not looked up.
    Fallback(Fallback),
}

impl Outcome {
    /// All values of [`Outcome::as_str`].
    pub const NAMES: [&'static str; 4] = ["prefix_match", "learned_match", "no_match", "fallback"];

    /// Name in metrics, spans and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::PrefixMatch => "prefix_match",
            Self::LearnedMatch => "learned_match",
            Self::NoMatch => "no_match",
            Self::Fallback(_) => "fallback",
        }
    }
}

/// One routing decision with everything that led to it: metrics, spans and logs are views of this value.
#[derive(Clone, Debug)]
pub struct Decision {
    /// Name of the pool's model.
    pub model: Arc<str>,
    /// Where the request goes.
    pub pick: Pick,
    /// What came of the lookup.
    pub outcome: Outcome,
    /// Tokens of the prompt; 0 when it was not tokenized.
    pub prompt_tokens: u32,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::endpoint::EndpointId;

    fn candidate(id: u32, matched_tokens: u32, in_flight: u32) -> Candidate {
        let endpoint = Arc::new(Endpoint::new(EndpointId(id), ([127, 0, 0, 1], 8000).into()));
        Candidate { endpoint, matched_tokens, offloaded_tokens: 0, rank: None, in_flight }
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
