//! What the index takes of the system's memory, held against what it counts. A process of its own, so that nothing else
//! is measured.

use std::io::Write as _;
use std::sync::Arc;

use warmroute::routing::endpoint::EndpointId;
use warmroute::routing::hash::{BlockHash, BlockSize};
use warmroute::routing::index::{Holder, IndexLimits, Keyspace, KeyspaceKind, PrefixIndex, SlotWriter, Tier};

/// Blocks of one event.
const N_BLOCKS: u64 = 512;

/// A line of `/proc/self/status` in bytes; none where there is no `/proc`.
fn status(name: &str) -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: usize = line.trim_start_matches(':').trim().strip_suffix(" kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

fn slot(index: &PrefixIndex, n_tokens: u32, source: u32) -> SlotWriter {
    let block_size = BlockSize::new(n_tokens).expect("not 0");
    let keyspace = Keyspace { model: Arc::from("model"), block_size, kind: KeyspaceKind::Own };
    index.acquire(&keyspace, Holder { endpoint: EndpointId(source), rank: 0, tier: Tier::Gpu }).expect("a slot is free")
}

fn hashes(source: u64, event_idx: u64) -> Vec<BlockHash> {
    let first = (source << 40) + event_idx * N_BLOCKS;
    (first..first + N_BLOCKS).map(|number| BlockHash(number.wrapping_mul(0x9e37_79b9_7f4a_7c15))).collect()
}

/// Stores new blocks until `n_refused` are refused.
fn fill(slot: &mut SlotWriter, source: u64) {
    let n_refused: u32 = (0..64_u64 << 10)
        .map(|event_idx| slot.store(&hashes(source, event_idx)).n_refused)
        .scan(0, |sum, n_refused| {
            *sum += n_refused;
            (*sum < 100 * N_BLOCKS as u32).then_some(*sum)
        })
        .last()
        .unwrap_or(0);
    assert!(n_refused > 0, "the stream is longer than the index may hold");
}

/// Fails if the process has ever taken more than 1.2 times `cap` since it had `before`.
fn check(what: &str, index: &PrefixIndex, cap: usize, before: usize) {
    let peak = status("VmHWM").expect("it was there at the start") - before;
    let (n_blocks, n_counted) = (index.n_blocks(), index.n_bytes());
    eprintln!("{what}: {n_blocks} blocks, peak {} KiB, counted {} KiB", peak >> 10, n_counted >> 10);
    assert!(n_counted <= cap);
    assert!(peak <= cap + cap / 5, "{what}: {peak} bytes at the peak, expected at most 1.2 times {cap}");
}

/// One test, since its parts share the process whose memory is measured; the largest is last, since a peak stays.
#[test]
fn stream_that_never_removes_takes_no_more_than_the_cap_allows() {
    let (Some(before), Some(_)) = (status("VmRSS"), status("VmHWM")) else {
        // Not by `eprintln!`, whose output the test harness keeps to itself.
        let _ = writeln!(std::io::stderr(), "SKIPPED: /proc/self/status does not tell the memory of this process");
        return;
    };
    come_and_go(16 << 20, before);
    let cap = 128 << 20;
    let index = PrefixIndex::new(IndexLimits { bytes: cap, bytes_per_slot: cap, ..IndexLimits::default() });
    let mut slot = slot(&index, 16, 0);
    fill(&mut slot, 0);
    check("one source", &index, cap, before);
    assert!(index.n_blocks() > cap / 120, "the cap is for blocks, not for caution");
}

fn come_and_go(cap: usize, before: usize) {
    let index = PrefixIndex::new(IndexLimits { bytes: cap, bytes_per_slot: cap, ..IndexLimits::default() });
    let mut slots: Vec<SlotWriter> = (0..4).map(|source| slot(&index, 16, source)).collect();
    for event_idx in 0..100 {
        slots.iter_mut().for_each(|slot| {
            slot.store(&hashes(0, event_idx));
        });
    }
    check("shared blocks", &index, cap, before);
    for (slot, source) in slots.iter_mut().zip(0..) {
        slot.clear();
        fill(slot, source);
    }
    check("sources that follow each other", &index, cap, before);
    drop(slots);

    for source in 10..16 {
        let mut slot = slot(&index, source, source);
        fill(&mut slot, u64::from(source));
    }
    check("keyspaces that come and go", &index, cap, before);

    let mut emptied = Vec::new();
    for source in 20..24_u32 {
        let mut slot = slot(&index, 16, source);
        fill(&mut slot, u64::from(source));
        let held: Vec<BlockHash> = slot.iter().map(|(hash, _)| hash).collect();
        held[1..].iter().for_each(|hash| {
            slot.remove(*hash);
        });
        emptied.push(slot);
    }
    check("sources that empty themselves", &index, cap, before);
}
