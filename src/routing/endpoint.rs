//! Endpoints, the sets that requests choose from, and what is not known of an endpoint's cache.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

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
    /// Whether the index may lack blocks that its cache has; shared with its event sources.
    pub knowledge: Arc<Knowledge>,
    /// Its data-parallel ranks whose events are followed.
    pub ranks: Ranks,
    /// The adapters that it says it has loaded.
    pub adapters: ListedAdapters,
    /// What it was given by our picks.
    pub given: Given,
}

impl Endpoint {
    /// A new endpoint with nothing in flight.
    pub fn new(id: EndpointId, address: SocketAddr) -> Self {
        Self {
            id,
            address,
            load: Load::default(),
            knowledge: Arc::default(),
            ranks: Ranks::default(),
            adapters: ListedAdapters::default(),
            given: Given::default(),
        }
    }
}

/// Sums over the decisions that have picked an endpoint. They leave together with it. Independent counters, so all
/// accesses are relaxed.
#[derive(Debug, Default)]
pub struct Given {
    n_decisions: AtomicU64,
    matched_tokens: AtomicU64,
    prompt_tokens: AtomicU64,
}

impl Given {
    /// Counts a decision.
    pub fn count(&self, matched_tokens: u32, prompt_tokens: u32) {
        self.n_decisions.fetch_add(1, Ordering::Relaxed);
        self.matched_tokens.fetch_add(u64::from(matched_tokens), Ordering::Relaxed);
        self.prompt_tokens.fetch_add(u64::from(prompt_tokens), Ordering::Relaxed);
    }

    /// Decisions that have picked it.
    pub fn n_decisions(&self) -> u64 {
        self.n_decisions.load(Ordering::Relaxed)
    }

    /// Tokens that it was said to hold.
    pub fn matched_tokens(&self) -> u64 {
        self.matched_tokens.load(Ordering::Relaxed)
    }

    /// Tokens of all prompts.
    pub fn prompt_tokens(&self) -> u64 {
        self.prompt_tokens.load(Ordering::Relaxed)
    }
}

/// A set of data-parallel ranks from 0 to 255, written by discovery and read by requests. Each word is exact by itself,
/// which is all that a reader needs who asks for one rank; none guards other memory, so all accesses are relaxed.
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

/// What an endpoint says of the adapters that it has loaded; what it said last counts, also while it says nothing.
///
/// Written by discovery when the list changes, read by requests that name an adapter: for the moment of a comparison.
#[derive(Debug, Default)]
pub struct ListedAdapters(RwLock<Option<BTreeSet<String>>>);

/// Whether an endpoint has an adapter; what is greater is the better place for a request that names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Listing {
    /// It has listed its adapters, and this is none of them.
    Absent,
    /// It has not listed any yet.
    Unknown,
    /// It has.
    Listed,
}

impl ListedAdapters {
    /// Makes these the adapters.
    pub fn set(&self, adapters: BTreeSet<String>) {
        // What is behind the lock is replaced as a whole, so a panic elsewhere cannot have left it half done.
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Some(adapters);
    }

    /// Whether `adapter` is one of them.
    pub fn listing(&self, adapter: &str) -> Listing {
        match &*self.0.read().unwrap_or_else(PoisonError::into_inner) {
            None => Listing::Unknown,
            Some(adapters) if adapters.contains(adapter) => Listing::Listed,
            Some(_) => Listing::Absent,
        }
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

/// What the event sources of an endpoint (its data-parallel ranks) do not know of its cache.
///
/// Written by the sources, read by requests. Neither number guards other memory, and a request that reads one of them a
/// moment late asks for one report too many or too few, so all accesses are relaxed.
#[derive(Debug, Default)]
pub struct Knowledge {
    n_incomplete: AtomicU32,
    n_generations: AtomicU32,
}

impl Knowledge {
    /// Whether blocks that were stored before some source began to follow may still be cached without our knowing.
    pub fn is_incomplete(&self) -> bool {
        self.n_incomplete.load(Ordering::Relaxed) > 0
    }

    /// Changes whenever a source forgets what it knew, and with it whatever was reported to it.
    pub fn n_generations(&self) -> u32 {
        self.n_generations.load(Ordering::Relaxed)
    }
}

/// What one source says to its endpoint's [`Knowledge`]. A source that is dropped says nothing any more, and what it
/// knew is forgotten.
#[derive(Debug)]
pub struct SourceKnowledge {
    endpoint: Arc<Knowledge>,
    is_incomplete: bool,
}

impl SourceKnowledge {
    /// Of a source that is not incomplete yet.
    pub fn new(endpoint: Arc<Knowledge>) -> Self {
        Self { endpoint, is_incomplete: false }
    }

    /// The source follows its publisher, and does (not) lack what came before.
    pub fn mark_incomplete(&mut self, is_incomplete: bool) {
        match (self.is_incomplete, is_incomplete) {
            (false, true) => self.endpoint.n_incomplete.fetch_add(1, Ordering::Relaxed),
            (true, false) => self.endpoint.n_incomplete.fetch_sub(1, Ordering::Relaxed),
            (false, false) | (true, true) => return,
        };
        self.is_incomplete = is_incomplete;
    }

    /// The source has forgotten what it knew.
    pub fn start_generation(&self) {
        self.endpoint.n_generations.fetch_add(1, Ordering::Relaxed);
    }
}

impl Drop for SourceKnowledge {
    fn drop(&mut self) {
        self.mark_incomplete(false);
        self.start_generation();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoint_is_incomplete_while_one_of_its_sources_is() {
        let endpoint = Arc::<Knowledge>::default();
        let mut first = SourceKnowledge::new(endpoint.clone());
        let mut second = SourceKnowledge::new(endpoint.clone());
        assert!(!endpoint.is_incomplete());
        first.mark_incomplete(true);
        first.mark_incomplete(true);
        second.mark_incomplete(true);
        first.mark_incomplete(false);
        assert!(endpoint.is_incomplete(), "the second source still is");
        second.mark_incomplete(false);
        second.mark_incomplete(false);
        assert!(!endpoint.is_incomplete());
    }

    #[test]
    fn dropped_source_says_nothing_any_more() {
        let endpoint = Arc::<Knowledge>::default();
        let mut source = SourceKnowledge::new(endpoint.clone());
        source.mark_incomplete(true);
        drop(source);
        assert!(!endpoint.is_incomplete());
        assert_eq!(endpoint.n_generations(), 1, "what it knew is forgotten");
    }

    #[test]
    fn generations_of_all_sources_count() {
        let endpoint = Arc::<Knowledge>::default();
        let sources = [SourceKnowledge::new(endpoint.clone()), SourceKnowledge::new(endpoint.clone())];
        sources.iter().for_each(SourceKnowledge::start_generation);
        assert_eq!(endpoint.n_generations(), 2);
    }

    #[test]
    fn adapters_are_unknown_until_they_are_listed() {
        let adapters = ListedAdapters::default();
        assert_eq!(adapters.listing("a"), Listing::Unknown);
        adapters.set(["a".to_owned()].into());
        assert_eq!((adapters.listing("a"), adapters.listing("b")), (Listing::Listed, Listing::Absent));
        adapters.set(BTreeSet::new());
        assert_eq!(adapters.listing("a"), Listing::Absent);
        assert!(Listing::Listed > Listing::Unknown && Listing::Unknown > Listing::Absent);
    }

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
