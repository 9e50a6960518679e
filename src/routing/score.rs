//! Turns endpoints and overlaps into candidates.

use std::sync::Arc;

use super::endpoint::{Endpoint, EndpointId, EndpointSet};
use super::load::Millis;

/// An endpoint that a request may be sent to, with what speaks for and against it.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// The endpoint.
    pub endpoint: Arc<Endpoint>,
    /// Tokens of the prompt whose blocks the endpoint holds on a GPU, from the start without a gap.
    pub matched_tokens: u32,
    /// Tokens after those whose blocks it holds on any tier, without a gap.
    pub offloaded_tokens: u32,
    /// How many of the matched tokens it only is about to hold, because of our own picks.
    pub promised_tokens: u32,
    /// The data-parallel rank that holds most of them; none where nothing is known to be held.
    pub rank: Option<u32>,
    /// Requests that this router has on the way to it.
    pub in_flight: u32,
}

/// Tokens that one rank of an endpoint can reuse, or that an endpoint will be able to reuse on some rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenMatch {
    /// The endpoint.
    pub endpoint: EndpointId,
    /// The data-parallel rank; none where it is only promised that the endpoint will hold the blocks
    /// ([`super::index::Promises`]).
    pub rank: Option<u32>,
    /// Tokens on its GPU, from the start without a gap.
    pub tokens: u32,
    /// Tokens after those on any tier, without a gap.
    pub offloaded_tokens: u32,
}

/// The endpoints that a request may be sent to.
#[derive(Clone, Debug)]
pub struct Candidates {
    /// Each of them.
    pub all: Vec<Candidate>,
    /// Endpoints that are avoided: left out, unless there is nobody else.
    pub n_avoided: u32,
}

/// The candidates of a pool: all endpoints that `allowed` accepts, without those that are avoided at `now` unless
/// all of them are. An endpoint may occur several times in `matches`, its best counts.
pub fn candidates(
    set: &EndpointSet,
    matches: &[TokenMatch],
    allowed: impl Fn(&Endpoint) -> bool,
    now: Millis,
) -> Candidates {
    // Asked once: were it asked again, others might have come to be avoided, and nobody would be left.
    let is_avoided = |endpoint: &Arc<Endpoint>| endpoint.load.is_avoided(now);
    let allowed = set.endpoints.iter().filter(|endpoint| allowed(endpoint));
    let allowed: Vec<_> = allowed.map(|endpoint| (endpoint, is_avoided(endpoint))).collect();
    let n_avoided = allowed.iter().filter(|(_, is_avoided)| *is_avoided).count();
    let all_avoided = n_avoided == allowed.len();
    let may_be_picked = allowed.into_iter().filter(|(_, is_avoided)| all_avoided || !is_avoided);
    let all = may_be_picked.map(|(endpoint, _)| candidate(endpoint, matches)).collect();
    Candidates { all, n_avoided: u32::try_from(n_avoided).unwrap_or(u32::MAX) }
}

/// An endpoint with the best of `matches` that are its own.
pub fn candidate(endpoint: &Arc<Endpoint>, matches: &[TokenMatch]) -> Candidate {
    let its_own = || matches.iter().filter(|found| found.endpoint == endpoint.id);
    let promised_tokens = its_own().filter(|found| found.rank.is_none()).map(|found| found.tokens).max();
    let held =
        its_own().filter(|found| found.rank.is_some()).max_by_key(|found| (found.tokens, found.offloaded_tokens));
    let (held_tokens, offloaded_tokens) = held.map_or((0, 0), |found| (found.tokens, found.offloaded_tokens));
    let matched_tokens = held_tokens.max(promised_tokens.unwrap_or(0));
    Candidate {
        endpoint: endpoint.clone(),
        matched_tokens,
        // Promised blocks may be on other tiers already: no token counts twice.
        offloaded_tokens: held_tokens.saturating_add(offloaded_tokens).saturating_sub(matched_tokens),
        promised_tokens: matched_tokens - held_tokens,
        // What is promised continues what is held, so the rank that has the one is to have the other.
        rank: held.and_then(|found| found.rank),
        in_flight: endpoint.load.in_flight(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(n: u16) -> EndpointSet {
        let endpoint = |i| Arc::new(Endpoint::new(EndpointId(u32::from(i)), ([127, 0, 0, 1], 8000 + i).into()));
        EndpointSet { synced: true, endpoints: (0..n).map(endpoint).collect() }
    }

    fn ids(candidates: &Candidates) -> Vec<u32> {
        candidates.all.iter().map(|candidate| candidate.endpoint.id.0).collect()
    }

    fn held(endpoint: u32, rank: u32, tokens: u32, offloaded_tokens: u32) -> TokenMatch {
        TokenMatch { endpoint: EndpointId(endpoint), rank: Some(rank), tokens, offloaded_tokens }
    }

    fn promised(endpoint: u32, tokens: u32) -> TokenMatch {
        TokenMatch { endpoint: EndpointId(endpoint), rank: None, tokens, offloaded_tokens: 0 }
    }

    /// Of each of `n` endpoints the tokens matched and offloaded, and the rank.
    fn merged(n: u16, matches: &[TokenMatch]) -> Vec<(u32, u32, Option<u32>)> {
        let found = candidates(&set(n), matches, |_| true, Millis(0)).all;
        found.iter().map(|found| (found.matched_tokens, found.offloaded_tokens, found.rank)).collect()
    }

    #[test]
    fn best_rank_of_an_endpoint_counts() {
        let matches = [held(1, 0, 32, 960), held(1, 1, 96, 0), held(1, 2, 96, 16), held(9, 0, 500, 0)];
        assert_eq!(merged(2, &matches), [(0, 0, None), (96, 16, Some(2))]);
    }

    #[test]
    fn promise_counts_where_it_is_longer_and_leaves_the_rank_that_holds_most() {
        assert_eq!(merged(1, &[promised(0, 64)]), [(64, 0, None)]);
        assert_eq!(merged(1, &[held(0, 3, 64, 16), promised(0, 64)]), [(64, 16, Some(3))]);
        assert_eq!(merged(1, &[promised(0, 32), held(0, 3, 64, 0)]), [(64, 0, Some(3))]);
        assert_eq!(merged(1, &[held(0, 3, 64, 48), held(0, 2, 32, 0), promised(0, 96)]), [(96, 16, Some(3))]);
        assert_eq!(merged(1, &[held(0, 3, 64, 16), promised(0, 96)]), [(96, 0, Some(3))]);
    }

    #[test]
    fn tokens_are_promised_as_far_as_they_are_not_held() {
        let promised_tokens =
            |matches: &[TokenMatch]| candidates(&set(1), matches, |_| true, Millis(0)).all[0].promised_tokens;
        assert_eq!(promised_tokens(&[held(0, 3, 64, 16), promised(0, 96)]), 32);
        assert_eq!(promised_tokens(&[held(0, 3, 64, 0), promised(0, 32)]), 0);
        assert_eq!(promised_tokens(&[promised(0, 32)]), 32);
    }

    #[test]
    fn avoided_endpoints_are_left_out_unless_all_are() {
        let set = set(2);
        set.endpoints[0].load.failed(Millis(0), Millis(0));
        let one_avoided = candidates(&set, &[], |_| true, Millis(1));
        assert_eq!((ids(&one_avoided), one_avoided.n_avoided), (vec![1], 1));
        set.endpoints[1].load.failed(Millis(0), Millis(0));
        assert_eq!(ids(&candidates(&set, &[], |_| true, Millis(1))), [0, 1]);
    }

    #[test]
    fn only_allowed_endpoints_decide_whether_all_are_avoided() {
        let set = set(3);
        set.endpoints[0].load.failed(Millis(0), Millis(0));
        let only_first = |endpoint: &Endpoint| endpoint.address.port() == 8000;
        assert_eq!(ids(&candidates(&set, &[], only_first, Millis(1))), [0]);
        assert_eq!(ids(&candidates(&set, &[], |_| false, Millis(1))), [0; 0]);
    }
}
