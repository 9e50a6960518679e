//! The lookup: real runs, continued by promised blocks.

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
    let mut promised = Vec::new();
    let Some(first) = chain.first() else { return };
    table.promised(*first, now, &mut promised);
    // Whoever does not hold the first block has a run only if that block is promised.
    let newcomers = promised.iter().filter(|endpoint| runs.iter().all(|run| run.endpoint != **endpoint));
    let newcomers: Vec<_> = newcomers.map(|endpoint| Run { endpoint: *endpoint, n_held: 0 }).collect();
    runs.extend(newcomers);
    runs.sort_unstable_by_key(|run| run.n_held);
    Walk { table, chain, now, promised, last_promised: Vec::new(), going_on: Vec::new() }.walk(&runs, out);
}

/// One run per endpoint, the longest of its ranks.
fn longest_runs(matched: impl Iterator<Item = (EndpointId, u32)>) -> Vec<Run> {
    let mut runs: Vec<Run> = matched.map(|(endpoint, n_held)| Run { endpoint, n_held }).collect();
    runs.sort_unstable_by_key(|run| (run.endpoint, std::cmp::Reverse(run.n_held)));
    runs.dedup_by_key(|run| run.endpoint);
    runs
}

struct Walk<'a> {
    table: &'a Table,
    chain: &'a [BlockHash],
    now: Millis,
    /// The endpoints that the block which is looked at is promised for, and those of the block before.
    promised: Vec<EndpointId>,
    last_promised: Vec<EndpointId>,
    /// The runs that reach the block which is looked at.
    going_on: Vec<Run>,
}

impl Walk<'_> {
    /// Follows `runs`, which are sorted by their ends, through the blocks that are promised behind them.
    fn walk(&mut self, mut runs: &[Run], out: &mut Vec<(EndpointId, u32)>) {
        let mut n_before = 0;
        while let Some(n_next) =
            if self.going_on.is_empty() { runs.first().map(|run| run.n_held) } else { Some(n_before) }
        {
            n_before = n_next;
            let (reached, rest) = runs.split_at(runs.iter().take_while(|run| run.n_held == n_before).count());
            runs = rest;
            self.going_on.extend(reached);
            let Some(hash) = self.chain.get(n_before as usize) else { break };
            std::mem::swap(&mut self.promised, &mut self.last_promised);
            self.table.promised(*hash, self.now, &mut self.promised);
            // Blocks of one chain mostly are promised together: then every run goes on as it is.
            if !reached.is_empty() || self.promised != self.last_promised {
                self.end_runs(n_before, out);
            }
            n_before += 1;
        }
        out.extend(self.going_on.iter().filter_map(|run| grown(run, n_before)));
    }

    /// Ends the runs that the block does not continue.
    fn end_runs(&mut self, n_blocks: u32, out: &mut Vec<(EndpointId, u32)>) {
        let promised = &self.promised;
        self.going_on.retain(|run| {
            let goes_on = promised.contains(&run.endpoint);
            if !goes_on {
                out.extend(grown(run, n_blocks));
            }
            goes_on
        });
    }
}

/// The run with its promised blocks, if there are any.
fn grown(run: &Run, n_blocks: u32) -> Option<(EndpointId, u32)> {
    (n_blocks > run.n_held).then_some((run.endpoint, n_blocks))
}
