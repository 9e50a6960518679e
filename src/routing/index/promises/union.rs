//! The lookup: real runs, continued by promised blocks.

use super::promisers::Promisers;
use super::table::Table;
use crate::routing::endpoint::EndpointId;
use crate::routing::hash::BlockHash;
use crate::routing::load::Millis;

/// What an endpoint really holds of a chain.
#[derive(Clone, Copy, Debug)]
struct Run {
    endpoint: EndpointId,
    n_held: u32,
}

/// See [`super::Promises::extend`].
pub(super) fn extend(
    table: &Table,
    chain: &[BlockHash],
    matched: impl Iterator<Item = (EndpointId, u32)>,
    now: Millis,
    out: &mut Vec<(EndpointId, u32)>,
) {
    let mut runs = longest_runs(matched);
    let Some(first) = chain.first() else { return };
    // Whoever does not hold the first block has a run only if that block is promised.
    if let Some(promisers) = table.promisers(*first) {
        add_newcomers(&mut runs, &promisers, now);
    }
    runs.sort_by_key(|run| run.n_held);
    Walk { table, chain, now, last: None, going_on: Vec::new() }.walk(&runs, out);
}

/// One run per endpoint, the longest of its ranks.
fn longest_runs(matched: impl Iterator<Item = (EndpointId, u32)>) -> Vec<Run> {
    let mut runs: Vec<Run> = matched.map(|(endpoint, n_held)| Run { endpoint, n_held }).collect();
    runs.sort_unstable_by_key(|run| (run.endpoint, std::cmp::Reverse(run.n_held)));
    runs.dedup_by_key(|run| run.endpoint);
    runs
}

/// Adds an empty run for each endpoint that has none and is promised the first block. Runs are sorted by endpoint,
/// before and after.
fn add_newcomers(runs: &mut Vec<Run>, promisers: &Promisers, now: Millis) {
    let mut known = runs.iter().map(|run| run.endpoint).peekable();
    let mut is_new = |endpoint: EndpointId| {
        while known.next_if(|known| *known < endpoint).is_some() {}
        known.peek() != Some(&endpoint)
    };
    let alive = promisers.all().iter().filter(|promise| promise.is_alive(now)).map(|promise| promise.endpoint());
    let newcomers: Vec<_> =
        alive.filter(|endpoint| is_new(*endpoint)).map(|endpoint| Run { endpoint, n_held: 0 }).collect();
    runs.extend(newcomers);
    runs.sort_by_key(|run| run.endpoint);
}

struct Walk<'a> {
    table: &'a Table,
    chain: &'a [BlockHash],
    now: Millis,
    /// The promises of the block before the one that is looked at.
    last: Option<Promisers>,
    /// The runs that reach the block which is looked at, sorted by endpoint.
    going_on: Vec<Run>,
}

impl Walk<'_> {
    /// Follows `runs`, which are sorted by their ends and endpoints, through the blocks that are promised behind them.
    fn walk(&mut self, mut runs: &[Run], out: &mut Vec<(EndpointId, u32)>) {
        let mut n_before = 0;
        while let Some(n_next) =
            if self.going_on.is_empty() { runs.first().map(|run| run.n_held) } else { Some(n_before) }
        {
            n_before = n_next;
            let (reached, rest) = runs.split_at(runs.iter().take_while(|run| run.n_held == n_before).count());
            runs = rest;
            let Some(hash) = self.chain.get(n_before as usize) else { break };
            let promisers = self.table.promisers(*hash);
            // Blocks of one chain mostly are promised together: then every run goes on as it is.
            if !reached.is_empty() || !is_same(promisers.as_ref(), self.last.as_ref()) {
                self.going_on.extend(reached);
                // Two sorted halves, which this sort merges.
                self.going_on.sort_by_key(|run| run.endpoint);
                self.end_runs(promisers.as_ref(), n_before, out);
            }
            self.last = promisers;
            n_before += 1;
        }
        out.extend(self.going_on.iter().filter_map(|run| grown(run, n_before)));
    }

    /// Ends the runs that the block does not continue.
    fn end_runs(&mut self, promisers: Option<&Promisers>, n_blocks: u32, out: &mut Vec<(EndpointId, u32)>) {
        let mut promises = promisers.map_or(&[][..], Promisers::all).iter().peekable();
        self.going_on.retain(|run| {
            while promises.next_if(|promise| promise.endpoint() < run.endpoint).is_some() {}
            let goes_on = promises
                .next_if(|promise| promise.endpoint() == run.endpoint)
                .is_some_and(|promise| promise.is_alive(self.now));
            if !goes_on {
                out.extend(grown(run, n_blocks));
            }
            goes_on
        });
    }
}

fn is_same(promisers: Option<&Promisers>, others: Option<&Promisers>) -> bool {
    match (promisers, others) {
        (Some(promisers), Some(others)) => promisers.is_same(others),
        (None, None) => true,
        (Some(_), None) | (None, Some(_)) => false,
    }
}

/// The run with its promised blocks, if there are any.
fn grown(run: &Run, n_blocks: u32) -> Option<(EndpointId, u32)> {
    (n_blocks > run.n_held).then_some((run.endpoint, n_blocks))
}
