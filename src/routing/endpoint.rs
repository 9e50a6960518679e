//! Endpoints and the sets that requests choose from.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::load::Load;

/// Number of an endpoint, given once by discovery and never reused within a process.
///
/// An endpoint that leaves and comes back gets a new one, so that late knowledge about the old one can
/// never be credited to the new one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EndpointId(pub u32);

/// One vLLM server, as Envoy dials it.
#[derive(Debug)]
pub struct Endpoint {
    /// Identity inside this process.
    pub id: EndpointId,
    /// IP literal and port, exactly as in Envoy's cluster.
    pub address: SocketAddr,
    /// What this router knows of its load and its recent failures.
    pub load: Load,
    /// Its data-parallel ranks whose events are followed.
    pub ranks: Ranks,
}

impl Endpoint {
    /// A new endpoint with nothing in flight.
    pub fn new(id: EndpointId, address: SocketAddr) -> Self {
        Self { id, address, load: Load::default(), ranks: Ranks::default() }
    }
}

/// A set of data-parallel ranks from 0 to 255, written by discovery and read by requests. Each word is exact by itself, which
/// is all that a reader needs who asks for one rank; none guards other memory, so all accesses are relaxed.
#[derive(Debug, Default)]
pub struct Ranks([AtomicU64; 4]);

impl Ranks {
    /// Makes these the ranks; higher ones than 255 are left out.
    pub fn set(&self, ranks: impl IntoIterator<Item = u32>) {
        let mut words = [0_u64; 4];
        for rank in ranks {
            if let Some(word) = words.get_mut(rank as usize / 64) {
                *word |= 1 << (rank % 64);
            }
        }
        self.0.iter().zip(words).for_each(|(word, bits)| word.store(bits, Ordering::Relaxed));
    }

    /// How many there are.
    pub fn count(&self) -> u32 {
        self.0.iter().map(|word| word.load(Ordering::Relaxed).count_ones()).sum()
    }

    /// Whether `rank` is one of them.
    pub fn contains(&self, rank: u32) -> bool {
        self.0.get(rank as usize / 64).is_some_and(|word| word.load(Ordering::Relaxed) & (1 << (rank % 64)) != 0)
    }
}

/// Immutable snapshot of the endpoints of one pool.
#[derive(Clone, Debug, Default)]
pub struct EndpointSet {
    /// Whether discovery has listed the pool at least once; an unsynced set says nothing about the pool.
    pub synced: bool,
    /// The endpoints, in no particular order, without duplicates.
    pub endpoints: Vec<Arc<Endpoint>>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_those_that_were_set_last() {
        let ranks = Ranks::default();
        assert_eq!((ranks.count(), ranks.contains(0)), (0, false));
        ranks.set([0, 63, 64, 255, 256, u32::MAX]);
        assert_eq!(ranks.count(), 4);
        assert!([0, 63, 64, 255].into_iter().all(|rank| ranks.contains(rank)));
        assert!([1, 65, 256, u32::MAX].into_iter().all(|rank| !ranks.contains(rank)));
        ranks.set([1]);
        assert!(ranks.count() == 1 && ranks.contains(1) && !ranks.contains(0));
    }
}
