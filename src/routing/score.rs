//! Turns endpoints and overlaps into candidates.

use std::net::SocketAddr;
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
    /// The data-parallel rank that holds them; none where nothing matched.
    pub rank: Option<u32>,
    /// Requests that this router has on the way to it.
    pub in_flight: u32,
}

/// Tokens that one rank of an endpoint can reuse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenMatch {
    /// The endpoint.
    pub endpoint: EndpointId,
    /// The data-parallel rank.
    pub rank: u32,
    /// Tokens on its GPU, from the start without a gap.
    pub tokens: u32,
    /// Tokens after those on any tier, without a gap.
    pub offloaded_tokens: u32,
}

/// The candidates of a pool: all endpoints that `allowed` accepts, without those that are avoided at `now` unless
/// all of them are. An endpoint may occur several times in `matches`, its best counts.
pub fn candidates(
    set: &EndpointSet,
    matches: &[TokenMatch],
    allowed: impl Fn(&SocketAddr) -> bool,
    now: Millis,
) -> Vec<Candidate> {
    let allowed: Vec<&Arc<Endpoint>> = set.endpoints.iter().filter(|endpoint| allowed(&endpoint.address)).collect();
    let all_avoided = allowed.iter().all(|endpoint| endpoint.load.is_avoided(now));
    allowed
        .into_iter()
        .filter(|endpoint| all_avoided || !endpoint.load.is_avoided(now))
        .map(|endpoint| candidate(endpoint, matches))
        .collect()
}

fn candidate(endpoint: &Arc<Endpoint>, matches: &[TokenMatch]) -> Candidate {
    let its_own = matches.iter().filter(|found| found.endpoint == endpoint.id);
    let best = its_own.max_by_key(|found| (found.tokens, found.offloaded_tokens));
    Candidate {
        endpoint: endpoint.clone(),
        matched_tokens: best.map_or(0, |found| found.tokens),
        offloaded_tokens: best.map_or(0, |found| found.offloaded_tokens),
        rank: best.map(|found| found.rank),
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

    fn ids(candidates: &[Candidate]) -> Vec<u32> {
        candidates.iter().map(|candidate| candidate.endpoint.id.0).collect()
    }

    #[test]
    fn best_rank_of_an_endpoint_counts() {
        let found = |endpoint, rank, tokens, offloaded_tokens| {
            let endpoint = EndpointId(endpoint);
            TokenMatch { endpoint, rank, tokens, offloaded_tokens }
        };
        let matches = [found(1, 0, 32, 960), found(1, 1, 96, 0), found(1, 2, 96, 16), found(9, 0, 500, 0)];
        let found = candidates(&set(2), &matches, |_| true, Millis(0));
        let shown = found.iter().map(|found| (found.matched_tokens, found.offloaded_tokens, found.rank));
        assert_eq!(shown.collect::<Vec<_>>(), [(0, 0, None), (96, 16, Some(2))]);
    }

    #[test]
    fn avoided_endpoints_are_left_out_unless_all_are() {
        let set = set(2);
        set.endpoints[0].load.failed(Millis(0), Millis(0));
        assert_eq!(ids(&candidates(&set, &[], |_| true, Millis(1))), [1]);
        set.endpoints[1].load.failed(Millis(0), Millis(0));
        assert_eq!(ids(&candidates(&set, &[], |_| true, Millis(1))), [0, 1]);
    }

    #[test]
    fn only_allowed_endpoints_decide_whether_all_are_avoided() {
        let set = set(3);
        set.endpoints[0].load.failed(Millis(0), Millis(0));
        let only_first = |address: &SocketAddr| address.port() == 8000;
        assert_eq!(ids(&candidates(&set, &[], only_first, Millis(1))), [0]);
        assert_eq!(ids(&candidates(&set, &[], |_| false, Millis(1))), [0; 0]);
    }
}
