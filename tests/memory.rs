//! What the index takes of the system's memory, held against what it counts. A process of its own, so that nothing else is
//! measured.

use std::sync::Arc;

use warmroute::routing::endpoint::EndpointId;
use warmroute::routing::hash::{BlockHash, BlockSize};
use warmroute::routing::index::{Holder, IndexLimits, Keyspace, KeyspaceKind, PrefixIndex, SlotWriter, Tier};

const CAP: usize = 128 << 20;
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
    let block_size = BlockSize::new(n_tokens).unwrap();
    let keyspace = Keyspace { model: Arc::from("model"), block_size, kind: KeyspaceKind::Own };
    index.acquire(&keyspace, Holder { endpoint: EndpointId(source), rank: 0, tier: Tier::Gpu }).unwrap()
}

fn hashes(source: u64, event_idx: u64) -> Vec<BlockHash> {
    let first = source << 40 | event_idx * N_BLOCKS;
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

/// One test, since its parts share the process whose memory is measured.
#[test]
fn stream_that_never_removes_takes_no_more_than_the_cap_allows() {
    let (Some(before), Some(_)) = (status("VmRSS"), status("VmHWM")) else {
        eprintln!("skipped: /proc/self/status does not tell the memory of this process");
        return;
    };
    let limits = IndexLimits { bytes: CAP, bytes_per_slot: CAP, ..IndexLimits::default() };
    let check = |what: &str, index: &PrefixIndex| {
        let (peak, now) = (status("VmHWM").unwrap() - before, status("VmRSS").unwrap() - before);
        eprintln!(
            "{what}: {} blocks, now {} KiB, peak {} KiB, counted {} KiB",
            index.n_blocks(),
            now >> 10,
            peak >> 10,
            index.n_bytes() >> 10
        );
        assert!(index.n_bytes() <= CAP);
        assert!(peak <= CAP + CAP / 5, "{what}: {peak} bytes at the peak, expected at most 1.2 times {CAP}");
    };

    let index = PrefixIndex::new(limits);
    let mut first = slot(&index, 16, 0);
    fill(&mut first, 0);
    check("one source", &index);
    assert!(index.n_blocks() > CAP / 200, "the cap is for blocks, not for caution");

    // Others store the same blocks, then what the first one leaves.
    let mut others: Vec<SlotWriter> = (1..4).map(|source| slot(&index, 16, source)).collect();
    others.iter_mut().for_each(|slot| assert_eq!(slot.store(&hashes(0, 0)).n_new, 0));
    first.clear();
    for slot in &mut others {
        (0..500).for_each(|event_idx| {
            slot.store(&hashes(0, event_idx));
        });
    }
    check("shared blocks", &index);
    for (slot, source) in others.iter_mut().zip(1..) {
        fill(slot, source);
    }
    check("several sources", &index);

    // Sources that come and go, each with a keyspace of its own.
    drop(others);
    drop(first);
    for source in 10..16 {
        let mut slot = slot(&index, source, source);
        fill(&mut slot, u64::from(source));
    }
    check("keyspaces that come and go", &index);

    // Sources that fill the index, and empty it block by block but for one.
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
    check("sources that empty themselves", &index);
}
