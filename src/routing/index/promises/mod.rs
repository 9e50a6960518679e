//! What our own picks will make endpoints hold: blocks that count for an endpoint because a request with them was sent
//! there.
//!
//! Two uses of one table. Beside the index of a keyspace ([`PromiseLimits::SPECULATIVE`]) it bridges the time from a
//! pick to the event of its blocks, so that a burst of requests with one prefix does not scatter. Where engines send no
//! events ([`PromiseLimits::LEARNED`]) it is the index: blocks count for a time after the last pick that contained
//! them.
//!
//! A promise is made at a pick ([`Promises::promise`]) for the blocks that the endpoint lacks, and its guard
//! [`Promised`] lives as long as the request. A block is promised until [`PromiseLimits::cap`] after the pick or
//! [`PromiseLimits::linger`] after the request's end, whichever comes first; until the endpoint's [`Knowledge`] begins
//! a new generation, for then the cache that would have held it is gone; and until a source of the endpoint stores it:
//! what counts from then on is what the engine says.
//!
//! Guarantees: a promise that is over never counts, for each read asks it. A block has one promise per endpoint: a
//! later pick renews it once half of its life is over, and otherwise relies on it. What is in doubt is counted too low.
//! Only where the event of a block comes between the lookup and the promise nobody confirms the promise any more:
//! should the engine remove the block, it counts until the promise ends by time. A request that turns out to be served
//! elsewhere, or where nobody was told our pick, mostly is that case, so there its blocks count for the time to linger
//! at most.
//!
//! Newer promises always find room: while the table is full, the oldest end, in the order of their picks. Blocks that
//! are still in use stay, for a pick also renews those whose promises are in the older half of what the table can hold.
//!
//! A promise knows no data-parallel rank, and only the rank that serves the request will have its blocks. So an
//! endpoint with several is promised nothing, rather than credited for blocks that the next request's rank lacks.
//!
//! Cost: nothing is looked up while the table is empty, which storing events see by one atomic load. A lookup makes one
//! access per distinct length of a real run and per block that is promised behind it, and compares the endpoints of a
//! block only if its promises are not those of the block before.
//!
//! Memory: the table is bounded by [`PromiseLimits::n_blocks`], and the order of promises by twice as many blocks.
//! Promises that are over are swept by promises to come, in proportion to their blocks, or by [`Promises::sweep`]. Each
//! guard holds its request's chain besides, 8 bytes per block: that is bounded by the requests in flight.
//!
//! [`Knowledge`]: crate::routing::endpoint::Knowledge

mod order;
mod promisers;
mod table;
#[cfg(test)]
mod tests;
mod union;

use std::sync::Arc;

use self::promisers::Promise;
use self::table::Table;
use super::BlockHash;
use crate::routing::endpoint::{Endpoint, EndpointId};
use crate::routing::load::Millis;

/// How long promises count, and how many blocks may be promised.
#[derive(Clone, Copy, Debug)]
pub struct PromiseLimits {
    /// Longest that a promise counts, from its pick.
    pub cap: Millis,
    /// Longest that it counts after its request's end.
    pub linger: Millis,
    /// Most blocks in the table; one that is promised for two endpoints is two.
    pub n_blocks: usize,
}

impl PromiseLimits {
    /// For a keyspace whose sources tell what is really stored. An engine that has not announced a block of a running
    /// request after a minute has it in a queue too long to be worth joining; 2 s after the end its last events have
    /// arrived or are lost. The blocks are those of 8 M tokens in blocks of 16. They take about 40 MB, and 100 MB if
    /// each promise has only one.
    pub const SPECULATIVE: Self = Self { cap: Millis(60_000), linger: Millis(2_000), n_blocks: 1 << 19 };

    /// For engines that announce nothing: a block counts for 10 to 20 minutes after the last pick that contained it,
    /// for a pick renews what is in the second half of its life, or until newer blocks need the room. The request's end
    /// changes nothing. The blocks take about 80 MB, and 200 MB if each promise has only one.
    pub const LEARNED: Self = Self { cap: Millis(1_200_000), linger: Millis(1_200_000), n_blocks: 1 << 20 };

    /// Longest that a promise counts that is made when the request is being served.
    fn served_life(self) -> Millis {
        self.cap.min(self.linger)
    }
}

/// Blocks that endpoints are expected to hold. See the module.
#[derive(Debug)]
pub struct Promises {
    /// Shared with the guards, which may outlive the index of a keyspace.
    table: Arc<Table>,
}

impl Promises {
    /// An empty table.
    pub fn new(limits: PromiseLimits) -> Self {
        Self { table: Arc::new(Table::new(limits)) }
    }

    /// Promises the blocks of `chain` for the endpoint that a request with them was just picked for, apart from the
    /// first `n_held`, which it is known to hold. Where promises of others may be relied on they are among those; to
    /// have them renewed, they are not. A learned index has no other knowledge, so there `n_held` is 0.
    ///
    /// None when nothing was to be promised, the endpoint has several ranks, or the table has no room for the first of
    /// the blocks.
    pub fn promise(&self, chain: &[BlockHash], n_held: u32, endpoint: &Arc<Endpoint>, now: Millis) -> Option<Promised> {
        self.promise_for(self.table.limits().cap, chain, n_held, endpoint, now)
    }

    /// The same for a request that turns out to be served by an endpoint that nobody picked. Events of its blocks came
    /// before, unless the answer is streamed, and will not come again to confirm anything, so it counts for no longer than
    /// after a request's end.
    pub fn promise_served(
        &self,
        chain: &[BlockHash],
        n_held: u32,
        endpoint: &Arc<Endpoint>,
        now: Millis,
    ) -> Option<Promised> {
        self.promise_for(self.table.limits().served_life(), chain, n_held, endpoint, now)
    }

    fn promise_for(
        &self,
        life: Millis,
        chain: &[BlockHash],
        n_held: u32,
        endpoint: &Arc<Endpoint>,
        now: Millis,
    ) -> Option<Promised> {
        let may_promise = |lacking: &&[BlockHash]| !lacking.is_empty() && has_one_cache(endpoint);
        let lacking = chain.get(n_held as usize..).filter(may_promise)?;
        let promise = self.table.new_promise(endpoint, now, life);
        let n_promised = self.table.insert(lacking, &promise, now);
        (n_promised > 0).then(|| {
            self.table.count_promise();
            Promised { table: Arc::clone(&self.table), chain: chain.into(), promise, is_over: false }
        })
    }

    /// Writes to `out`, whose former content is lost, each endpoint for which more of `chain` counts than it really
    /// holds, with the number of blocks from the first one on, held or promised, without a hole. An endpoint may occur
    /// several times in `matched`, once per rank: its longest run counts.
    pub fn extend(
        &self,
        chain: &[BlockHash],
        matched: impl Iterator<Item = (EndpointId, u32)>,
        now: Millis,
        out: &mut Vec<(EndpointId, u32)>,
    ) {
        out.clear();
        self.table.see(now);
        if self.table.n_blocks() > 0 {
            union::extend(&self.table, chain, matched, now, out);
        }
    }

    /// Frees the memory of promises that are over. What counts is the same before and after.
    ///
    /// It is for a slow tick, so that memory is given back when traffic ends. A call looks at each promise, which takes
    /// some 10 ns, and removes 32,768 blocks and those of one more promise at most, which takes some 10 ms; the next
    /// goes on there. Locks are held for a few promises or for one of 64 parts of the table at a time, so requests and
    /// events go on meanwhile.
    pub fn sweep(&self, now: Millis) {
        self.table.sweep(now);
    }

    /// A source of the endpoint stores the blocks: whether it holds them is its business from now on. Blocks are stored
    /// first and confirmed then, so that a lookup in between finds them twice rather than not at all.
    pub(super) fn confirm(&self, hashes: &[BlockHash], endpoint: EndpointId) {
        if self.table.n_blocks() > 0 {
            self.table.remove(hashes, endpoint);
        }
    }

    /// Blocks in the table, those of promises that are over and not swept included.
    pub fn n_blocks(&self) -> usize {
        self.table.n_blocks()
    }

    /// Requests on their way whose promises have not ended.
    pub fn n_promises(&self) -> usize {
        self.table.n_promises()
    }

    /// Blocks that were not promised because the table was full and nothing older could make room, since it was made:
    /// those of chains that are longer than the table.
    pub fn n_refused(&self) -> u64 {
        self.table.n_refused()
    }

    /// Promised blocks that made room for newer ones before their time was over, since the table was made.
    pub fn n_evicted(&self) -> u64 {
        self.table.n_evicted()
    }
}

/// The promise of a request on its way. To live beside the request's [`InFlight`]: dropping it is the request's end.
///
/// A drop has no clock. It counts as an end at the latest time that the table was given by anyone: on a busy router
/// that is now, on an idle one the promise ends early. Where the time is at hand use [`Self::end`].
///
/// [`InFlight`]: crate::routing::load::InFlight
#[derive(Debug)]
pub struct Promised {
    table: Arc<Table>,
    /// The whole chain of the request: another endpoint lacks other blocks of it.
    chain: Arc<[BlockHash]>,
    promise: Arc<Promise>,
    is_over: bool,
}

impl Promised {
    /// The request has ended.
    pub fn end(mut self, now: Millis) {
        self.table.see(now);
        self.finish(|promise, limits| promise.end_at(end(now, limits)));
    }

    /// The request did not reach the endpoint, or was refused by it: its blocks count no more.
    pub fn void(mut self) {
        self.finish(|promise, _| promise.void());
    }

    /// The request was served by `endpoint` instead: there its whole chain is promised from now on, because nobody has
    /// looked what that endpoint holds. Events of it came before, unless the answer is streamed, and will not come again
    /// to confirm anything, so this counts for no longer than after a request's end.
    pub fn move_to(&mut self, endpoint: &Arc<Endpoint>, now: Millis) {
        if endpoint.id == self.promise.endpoint() {
            return;
        }
        self.promise.void();
        self.promise = self.table.new_promise(endpoint, now, self.table.limits().served_life());
        if has_one_cache(endpoint) {
            self.table.insert(&self.chain, &self.promise, now);
        }
    }

    fn finish(&mut self, finish: impl FnOnce(&Promise, PromiseLimits)) {
        if !self.is_over {
            self.is_over = true;
            finish(&self.promise, self.table.limits());
            self.table.uncount_promise();
        }
    }
}

impl Drop for Promised {
    fn drop(&mut self) {
        let seen = self.table.seen();
        self.finish(|promise, limits| promise.end_at(end(seen, limits)));
    }
}

/// When a promise is over whose request ended at this time.
fn end(at: Millis, limits: PromiseLimits) -> Millis {
    Millis(at.0.saturating_add(limits.linger.0))
}

/// Whether what one request makes the endpoint hold is of use to each other request.
fn has_one_cache(endpoint: &Endpoint) -> bool {
    endpoint.ranks.count() <= 1
}
