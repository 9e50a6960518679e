//! What has to be true when everything has come to rest.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use super::library::{Kind, MODEL, PROMPTS, Prompt};
use super::program::Summary;
use super::world::{Site, World};
use crate::events::apply::SourceName;
use crate::events::continuity::Phase;
use crate::routing::hash::BlockHash;
use crate::routing::index::{KeyKinds, Match, Overlaps};

/// Replays that one source may ask for after the last fault.
const MAX_REPLAYS: u32 = 60;

/// Every block that any prompt has, once.
static BLOCKS: LazyLock<Vec<(BlockHash, Kind)>> = LazyLock::new(|| {
    let of_prompt = |prompt: &'static Prompt| prompt.hashes.iter().map(|hash| (*hash, prompt.kind));
    let blocks: BTreeMap<BlockHash, Kind> = PROMPTS.iter().flat_map(of_prompt).collect();
    blocks.into_iter().collect()
});

/// The index tells of every source what its engine's cache is, or less where the source is flagged.
pub(super) fn quiescent(world: &World) -> Summary {
    let mut summary = Summary::default();
    for (site_idx, site) in world.sites.iter().enumerate() {
        let is_complete = site.source.phase() == Phase::Live;
        world.trace(site_idx, || format!("ends {:?}", site.source.phase()));
        lineage(site_idx, site, is_complete);
        let n_credited = blocks(world, site_idx, is_complete);
        prompts(world, site_idx, is_complete);
        assert!(site.source.audit.n_replays <= MAX_REPLAYS, "site {site_idx}: {:?}", site.source.audit);
        summary += Summary {
            n_live: u64::from(is_complete),
            n_incomplete: u64::from(!is_complete),
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
    assert!(!is_complete || applied.first == Some(0), "site {site_idx}: complete, but beginning at {:?}", applied.first);
}

/// Block by block, whether or not a chain leads there.
fn blocks(world: &World, site_idx: usize, is_complete: bool) -> u64 {
    let site = &world.sites[site_idx];
    let engine = &site.process.as_ref().expect("a site at rest has a process").engine;
    let mut n_credited = 0;
    for (hash, kind) in BLOCKS.iter() {
        let credited = credited(world, site.source.name, &[*hash], kind.required()) > 0;
        let cached = engine.holds(*hash);
        let found = if credited { "credited" } else { "not credited" };
        assert!(cached || !credited, "site {site_idx}: {kind:?} block {hash:?} is {found} but not cached");
        let is_exact = is_complete && !engine.is_in_doubt(*hash);
        assert!(credited || !cached || !is_exact, "site {site_idx}: {kind:?} block {hash:?} is cached but {found}");
        n_credited += u64::from(credited);
    }
    n_credited
}

/// As requests look: from a prompt's first block on.
fn prompts(world: &World, site_idx: usize, is_complete: bool) {
    let site = &world.sites[site_idx];
    let engine = &site.process.as_ref().expect("a site at rest has a process").engine;
    for prompt in PROMPTS.iter() {
        let credited = credited(world, site.source.name, &prompt.hashes, prompt.kind.required());
        let n_cached = prompt.hashes.iter().take_while(|hash| engine.holds(**hash)).count();
        let is_sure = |hash: &&BlockHash| engine.holds(**hash) && !engine.is_in_doubt(**hash);
        let n_sure = if is_complete { prompt.hashes.iter().take_while(is_sure).count() } else { 0 };
        let expected = n_sure..=n_cached;
        assert!(expected.contains(&(credited as usize)), "site {site_idx}: {credited} blocks, expected {expected:?}");
    }
}

/// How many of `hashes`, from the first one on, a lookup finds on the GPU of the source.
fn credited(world: &World, name: SourceName, hashes: &[BlockHash], required: KeyKinds) -> u32 {
    let mut overlaps = Overlaps::default();
    let matched = world.index.keyspaces_of(MODEL).into_iter().filter_map(|(_, keyspace)| {
        keyspace.overlaps(hashes, required, &mut overlaps);
        let is_wanted = |found: &Match| (found.endpoint, found.rank) == (name.endpoint, name.rank);
        overlaps.matches().find(is_wanted).map(|found| found.n_blocks)
    });
    matched.max().unwrap_or(0)
}
