//! How candidates stood in a decision, as it is kept for those who ask why.

use std::cmp::Ordering;
use std::net::SocketAddr;

use super::score::Candidate;

/// Most candidates whose standing a decision keeps: enough to see who else came into question, and no more than a
/// decision can afford among a thousand endpoints.
pub const MOST_STANDINGS: usize = 8;

/// What a candidate offered. It names the endpoint by its address, so that whoever keeps a decision keeps no endpoint
/// that has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// Address of the endpoint.
    pub endpoint: SocketAddr,
    /// Tokens of the prompt that it holds on a GPU or is about to hold.
    pub matched_tokens: u32,
    /// Tokens after those that it holds on any tier.
    pub offloaded_tokens: u32,
    /// How many of the matched tokens it only is about to hold.
    pub promised_tokens: u32,
    /// The data-parallel rank that holds most of them; none where nothing is known to be held.
    pub rank: Option<u32>,
    /// Requests that this router had on the way to it.
    pub in_flight: u32,
    /// Whether it had so much more to do than the least loaded candidate that what it holds did not count.
    pub is_too_far_ahead: bool,
}

impl Standing {
    /// How `candidate` stands.
    pub fn new(candidate: &Candidate, is_too_far_ahead: bool) -> Self {
        Self {
            endpoint: candidate.endpoint.address,
            matched_tokens: candidate.matched_tokens,
            offloaded_tokens: candidate.offloaded_tokens,
            promised_tokens: candidate.promised_tokens,
            rank: candidate.rank,
            in_flight: candidate.in_flight,
            is_too_far_ahead,
        }
    }
}

/// What ordered the candidates of a decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Policy {
    /// What they hold of the prompt.
    PrefixCache,
    /// The requests that they have in flight: nobody who came into question holds any of the prompt, or nobody knows.
    LeastRequest,
}

impl Policy {
    /// All values of [`Policy::as_str`].
    pub const NAMES: [&'static str; 2] = ["prefix_cache", "least_request"];

    /// Name in metrics, spans and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::PrefixCache => "prefix_cache",
            Self::LeastRequest => "least_request",
        }
    }
}

/// The `n` greatest of `items` by `cmp`, greatest first; of equals those that come first. Looks at each once and keeps
/// no more than `n`.
pub(super) fn greatest<T>(items: impl Iterator<Item = T>, n: usize, cmp: impl Fn(&T, &T) -> Ordering) -> Vec<T> {
    // A dry run keeps them all: `n` is no size to reserve then.
    let mut greatest: Vec<T> = Vec::with_capacity(n.min(MOST_STANDINGS) + 1);
    for item in items {
        let is_worse = |kept: &T| cmp(kept, &item) != Ordering::Less;
        if greatest.len() == n && greatest.last().is_none_or(is_worse) {
            continue;
        }
        let position = greatest.partition_point(is_worse);
        greatest.insert(position, item);
        greatest.truncate(n);
    }
    greatest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greatest_are_those_of_a_stable_sort() {
        let mut random = fastrand::Rng::with_seed(1);
        for n_items in 0..40 {
            let items: Vec<(u32, usize)> = (0..n_items).map(|idx| (random.u32(..6), idx)).collect();
            let mut sorted = items.clone();
            sorted.sort_by_key(|item| std::cmp::Reverse(item.0));
            for n in (0..10).chain([usize::MAX]) {
                let found = greatest(items.iter().copied(), n, |a, b| a.0.cmp(&b.0));
                assert_eq!(found, sorted[..n.min(n_items)], "{n} of {items:?}");
            }
        }
    }
}
