//! What has to be true when everything has come to rest.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::LazyLock;

use super::library::{MODEL, prompts};
use super::program::Summary;
use super::world::{Site, World};
use crate::events::apply::SourceName;
use crate::events::continuity::Phase;
use crate::routing::hash::BlockHash;
use crate::routing::index::{KeyspaceKind, Match, Overlaps};

/// Replays that one source may ask for after the last fault.
const MAX_REPLAYS: u32 = 60;

/// Every block that any prompt has, once, as a prompt and a position in it.
static BLOCKS: LazyLock<Vec<(usize, usize)>> = LazyLock::new(|| {
    let prompts = prompts(false).iter().enumerate();
    let blocks =
        prompts.flat_map(|(idx, prompt)| prompt.hashes.iter().zip((0..).map(move |block_idx| (idx, block_idx))));
    blocks.collect::<BTreeMap<_, _>>().into_values().collect()
});

/// The index tells of every source what its engine's cache is, or less where the source is flagged.
pub(super) fn quiescent(world: &World) -> Summary {
    let mut summary = Summary::default();
    for (site_idx, site) in world.sites.iter().enumerate() {
        let is_complete = site.source.phase() == Phase::Live;
        world.trace(site_idx, || format!("ends {:?}", site.source.phase()));
        let diary = site.process.as_ref().and_then(|process| process.diary.as_ref());
        diary.into_iter().flatten().for_each(|line| println!("site {site_idx} {line}"));
        lineage(site_idx, site, is_complete);
        let n_credited = blocks(world, site_idx, is_complete);
        let n_split = chains(world, site_idx, is_complete);
        assert!(site.source.audit.n_replays <= MAX_REPLAYS, "site {site_idx}: {:?}", site.source.audit);
        summary += Summary {
            n_live: u64::from(is_complete),
            n_incomplete: u64::from(!is_complete),
            n_restored: site.source.audit.n_restored,
            n_split,
            n_credited,
        };
    }
    summary
}

/// What is applied comes from the process that is there, and from its beginning on if the source says so.
fn lineage(site_idx: usize, site: &Site, is_complete: bool) {
    let applied = site.source.audit.applied().expect("a source at rest has a generation");
    let process = site.process.as_ref().expect("a site at rest has a process");
    let is_own = applied.processes.iter().all(|applied| *applied == process.id);
    assert!(is_own, "site {site_idx}: batches of {:?}, expected {:?}", applied.processes, process.id);
    // Not even an engine that has published nothing is at rest without a batch: it shows all kinds in the end.
    assert!(
        !is_complete || applied.first == Some(0) || applied.is_cleared,
        "site {site_idx}: complete, but beginning at {:?}",
        applied.first
    );
}

/// Block by block, whether or not a chain leads there.
fn blocks(world: &World, site_idx: usize, is_complete: bool) -> u64 {
    let site = &world.sites[site_idx];
    let engine = &site.process.as_ref().expect("a site at rest has a process").engine;
    let mut n_credited = 0;
    for &(prompt_idx, block_idx) in BLOCKS.iter() {
        let found = lookup(world, site.source.name, prompt_idx, block_idx..block_idx + 1).n_blocks;
        let hash = prompts(engine.traits.is_foreign)[prompt_idx].hashes[block_idx];
        let (is_cached, is_sure) = (engine.holds(hash), is_complete && !engine.is_in_doubt(hash));
        let name = || format!("site {site_idx}: block {block_idx} of prompt {prompt_idx}");
        assert!(is_cached || found == 0, "{} is credited but not cached", name());
        assert!(found > 0 || !is_cached || !is_sure, "{} is cached but not credited", name());
        n_credited += u64::from(found);
    }
    n_credited
}

/// As requests look: from a prompt's first block on. Says how many prompts were found shorter than they are cached
/// because their blocks lie in two keyspaces.
fn chains(world: &World, site_idx: usize, is_complete: bool) -> u64 {
    let site = &world.sites[site_idx];
    let engine = &site.process.as_ref().expect("a site at rest has a process").engine;
    let mut n_split = 0;
    for (prompt_idx, prompt) in prompts(engine.traits.is_foreign).iter().enumerate() {
        let run =
            |holds: &dyn Fn(BlockHash) -> bool| prompt.hashes.iter().take_while(|hash| holds(**hash)).count() as u32;
        let n_sure = if is_complete { run(&|hash| engine.holds(hash) && !engine.is_in_doubt(hash)) } else { 0 };
        let n_cached = run(&|hash| engine.holds(hash));
        let found = lookup(world, site.source.name, prompt_idx, 0..prompt.hashes.len());
        let name = || format!("site {site_idx}: prompt {prompt_idx}");
        assert!(found.n_blocks <= n_cached, "{}: {found:?}, expected {n_cached} at most", name());
        let n_anywhere = run(&|hash| engine.holds_anywhere(hash));
        assert!(found.n_blocks + found.n_offloaded <= n_anywhere, "{}: {found:?}, expected {n_anywhere}", name());
        if found.n_blocks < n_sure {
            // Found one by one, see `blocks`: only where they are can be at fault.
            let next = found.n_blocks as usize;
            let is_split = [next - 1, next].map(|idx| keyspace_of(world, site.source.name, prompt_idx, idx));
            assert!(next > 0 && is_split[0] != is_split[1], "{}: {found:?}, expected {n_sure}", name());
            n_split += 1;
        }
    }
    n_split
}

/// The keyspace in which a block is found.
fn keyspace_of(world: &World, name: SourceName, prompt_idx: usize, block_idx: usize) -> Option<KeyspaceKind> {
    let blocks = block_idx..block_idx + 1;
    found_in_each(world, name, prompt_idx, blocks).find(|(_, found)| found.n_blocks > 0).map(|(kind, _)| kind)
}

/// What a request for these blocks of a prompt finds of the source, in whichever keyspace it finds more.
fn lookup(world: &World, name: SourceName, prompt_idx: usize, blocks: Range<usize>) -> Match {
    let found = found_in_each(world, name, prompt_idx, blocks).map(|(_, found)| found);
    let nothing = Match { endpoint: name.endpoint, rank: name.rank, n_blocks: 0, n_offloaded: 0 };
    found.max_by_key(|found| found.n_blocks).unwrap_or(nothing)
}

fn found_in_each(
    world: &World,
    name: SourceName,
    prompt_idx: usize,
    blocks: Range<usize>,
) -> impl Iterator<Item = (KeyspaceKind, Match)> {
    let prompt = &prompts(false)[prompt_idx];
    let mut overlaps = Overlaps::default();
    world.index.keyspaces_of(MODEL).into_iter().filter_map(move |(keyspace, index)| {
        let hashes = match keyspace.kind {
            KeyspaceKind::Engine { .. } => &prompt.hashes[blocks.clone()],
            KeyspaceKind::Own => &prompt.own_keys[blocks.clone()],
        };
        index.overlaps(hashes, prompt.kind.required(), &mut overlaps);
        let found = overlaps.matches().find(|found| (found.endpoint, found.rank) == (name.endpoint, name.rank));
        found.map(|found| (keyspace.kind, found))
    })
}
