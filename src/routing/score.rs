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
    /// Tokens of the prompt whose blocks the endpoint holds, from the start without a gap.
    pub matched_tokens: u32,
    /// Requests that this router has on the way to it.
    pub in_flight: u32,
}

/// Tokens that an endpoint can reuse, per endpoint; an endpoint may occur several times, its best counts.
pub type Matches = [(EndpointId, u32)];

/// The candidates of a pool: all endpoints that `allowed` accepts, without those that are avoided at `now` unless
/// all of them are.
pub fn candidates(
    set: &EndpointSet,
    matches: &Matches,
    allowed: impl Fn(&SocketAddr) -> bool,
    now: Millis,
) -> Vec<Candidate> {
    let allowed: Vec<&Arc<Endpoint>> = set.endpoints.iter().filter(|endpoint| allowed(&endpoint.address)).collect();
    let all_avoided = allowed.iter().all(|endpoint| endpoint.load.is_avoided(now));
    allowed
        .into_iter()
        .filter(|endpoint| all_avoided || !endpoint.load.is_avoided(now))
        .map(|endpoint| Candidate {
            endpoint: endpoint.clone(),
            matched_tokens: matched_tokens(endpoint.id, matches),
            in_flight: endpoint.load.in_flight(),
        })
        .collect()
}

fn matched_tokens(endpoint: EndpointId, matches: &Matches) -> u32 {
    matches.iter().filter(|(id, _)| *id == endpoint).map(|(_, tokens)| *tokens).max().unwrap_or(0)
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
    fn best_match_of_an_endpoint_counts() {
        let matches = [(EndpointId(1), 32), (EndpointId(1), 96), (EndpointId(9), 500)];
        let found = candidates(&set(2), &matches, |_| true, Millis(0));
        assert_eq!(found.iter().map(|candidate| candidate.matched_tokens).collect::<Vec<_>>(), [0, 96]);
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
