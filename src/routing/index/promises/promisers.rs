//! A promise, and the list of those that a block has.

use std::ptr;
use std::slice;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::routing::endpoint::{Endpoint, EndpointId, Knowledge};
use crate::routing::load::Millis;

/// What all blocks of one pick have in common.
#[derive(Debug)]
pub(super) struct Promise {
    endpoint: EndpointId,
    knowledge: Arc<Knowledge>,
    /// The endpoint's [`Knowledge::n_generations`] at the pick: the promise is about the cache of that time.
    n_generations: u32,
    /// How many blocks the table had been given when it was made: its age as the order of eviction counts it.
    born: u64,
    /// When it is over. Only ever lowered. Relaxed: it guards no other memory, and a reader may be a moment late.
    until: AtomicU64,
}

impl Promise {
    pub(super) fn new(endpoint: &Endpoint, until: Millis, born: u64) -> Arc<Self> {
        Arc::new(Self {
            endpoint: endpoint.id,
            knowledge: Arc::clone(&endpoint.knowledge),
            n_generations: endpoint.knowledge.n_generations(),
            born,
            until: AtomicU64::new(until.0),
        })
    }

    pub(super) fn endpoint(&self) -> EndpointId {
        self.endpoint
    }

    pub(super) fn born(&self) -> u64 {
        self.born
    }

    /// It counts until then at the latest.
    pub(super) fn end_at(&self, until: Millis) {
        self.until.fetch_min(until.0, Relaxed);
    }

    pub(super) fn void(&self) {
        self.until.store(0, Relaxed);
    }

    pub(super) fn is_alive(&self, now: Millis) -> bool {
        self.remaining(now) > 0
    }

    /// Milliseconds that it counts on, if nothing shortens it.
    pub(super) fn remaining(&self, now: Millis) -> u64 {
        if self.knowledge.n_generations() != self.n_generations {
            return 0;
        }
        self.until.load(Relaxed).saturating_sub(now.0)
    }
}

/// The promises of one block, one per endpoint and sorted by it. Most blocks have one, which needs no list.
///
/// A list never changes, so a lookup copies a pointer to it; and the blocks of a chain have it in common as long as
/// they are promised together, as those of a system prompt are, which may be promised for a thousand endpoints.
#[derive(Clone, Debug)]
pub(super) enum Promisers {
    One(Arc<Promise>),
    Many(Arc<[Arc<Promise>]>),
}

impl Promisers {
    pub(super) fn all(&self) -> &[Arc<Promise>] {
        match self {
            Self::One(promise) => slice::from_ref(promise),
            Self::Many(promises) => promises,
        }
    }

    /// Whether the same promises are in both.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        let (ours, theirs) = (self.all(), other.all());
        let is_equal = |(our, their): (&Arc<Promise>, &Arc<Promise>)| Arc::ptr_eq(our, their);
        ptr::eq(ours, theirs) || (ours.len() == theirs.len() && ours.iter().zip(theirs).all(is_equal))
    }

    pub(super) fn of(&self, endpoint: EndpointId) -> Option<&Arc<Promise>> {
        self.place_of(endpoint).ok().map(|place| &self.all()[place])
    }

    /// With this promise, in place of the one for the same endpoint if there is one.
    pub(super) fn with(&self, promise: &Arc<Promise>) -> Self {
        let (before, after) = match self.place_of(promise.endpoint) {
            Ok(place) => (&self.all()[..place], &self.all()[place + 1..]),
            Err(place) => self.all().split_at(place),
        };
        Self::joined(&[before, slice::from_ref(promise), after]).expect("one is in it at least")
    }

    /// Without the promise for the endpoint, and without those that are over, so that a list which dies is copied once
    /// rather than once per promise; none: no other is left.
    pub(super) fn without(&self, endpoint: EndpointId, now: Millis) -> Option<Self> {
        let is_left = |promise: &&Arc<Promise>| promise.endpoint != endpoint && promise.is_alive(now);
        let left: Vec<_> = self.all().iter().filter(is_left).cloned().collect();
        Self::joined(&[&left])
    }

    fn joined(parts: &[&[Arc<Promise>]]) -> Option<Self> {
        let promises = parts.concat();
        match promises.as_slice() {
            [] => None,
            [only] => Some(Self::One(Arc::clone(only))),
            _ => Some(Self::Many(promises.into())),
        }
    }

    fn place_of(&self, endpoint: EndpointId) -> Result<usize, usize> {
        self.all().binary_search_by_key(&endpoint, |promise| promise.endpoint)
    }
}

/// What became of the list of the block before: neighbours mostly have the same, and share what comes of it.
#[derive(Debug, Default)]
pub(super) struct LastChange(Option<(Promisers, Option<Promisers>)>);

impl LastChange {
    /// The changed list; `change` has to say the same of equal lists.
    pub(super) fn apply(
        &mut self,
        list: &Promisers,
        change: impl FnOnce(&Promisers) -> Option<Promisers>,
    ) -> Option<Promisers> {
        match &self.0 {
            Some((from, to)) if from.is_same(list) => to.clone(),
            _ => {
                let changed = change(list);
                self.0 = Some((list.clone(), changed.clone()));
                changed
            }
        }
    }
}
