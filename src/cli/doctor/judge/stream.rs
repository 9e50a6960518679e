//! What the engine publishes: where, whether it can be replayed, in what shape, and by which clock.

use super::{EVENTS_FLAG, Expected, Notes, Patient, Verdict};
use crate::cli::doctor::observe::announced;
use crate::cli::doctor::seen::{Asked, Link, Origin, RankSeen, Told, Wire};
use crate::cli::doctor::versions::SOURCES;

/// Clocks that differ by more make the lag of events look like minutes, or like nothing.
const MOST_SKEW: f64 = 2.0;

pub(super) fn judge(patient: &Patient<'_>, expected: &Expected, notes: &mut Notes<'_>) {
    if expected.model.as_ref().is_some_and(|model| !model.sync) {
        return notes.skip("events", "models[].events.sync is false: the index is learned from picks");
    }
    sources(patient, notes);
    for rank in &patient.seen.ranks {
        events(patient, rank, notes);
        replay(patient, rank, notes);
    }
    clock(patient, notes);
    wire(patient, notes);
    block_size(patient, notes);
}

fn sources(patient: &Patient<'_>, notes: &mut Notes<'_>) {
    const CHECK: &str = "event sources";
    let told = match &patient.seen.told {
        Asked::Answer(told) => told,
        Asked::Status(404) if patient.is_before(SOURCES) => {
            return notes.skip(CHECK, "/kv_event_sources came with vLLM 0.32: addresses have to be given");
        }
        other => return notes.skip(CHECK, format!("/kv_event_sources: {}", other.why_not())),
    };
    if told.is_off {
        return notes.fault(CHECK, "the engine says that it publishes no KV events", EVENTS_FLAG);
    }
    for refused in &told.answer.refused {
        let change = "let the engine bind that socket: an \"endpoint\" of tcp://*:PORT in --kv-events-config";
        let seen =
            format!("rank {} names {:?}, which is not at the engine's own address", refused.rank, refused.address);
        notes.fault(CHECK, seen, change);
    }
    let ranks: Vec<String> =
        told.answer.sources.iter().map(|source| format!("rank {} at {}", source.rank, source.events)).collect();
    if !ranks.is_empty() {
        notes.ok(CHECK, format!("{} rank(s): {}", ranks.len(), ranks.join(", ")));
    }
    addresses(patient, told, notes);
}

/// Addresses that were given or are configured against those that the engine tells.
fn addresses(patient: &Patient<'_>, told: &Told, notes: &mut Notes<'_>) {
    const CHECK: &str = "addresses";
    for rank in patient.seen.ranks.iter().filter(|rank| rank.origin == Origin::Given) {
        let Some(source) = told.answer.sources.iter().find(|source| source.rank == rank.rank) else { continue };
        if source.events != rank.events {
            let seen = format!("rank {} publishes at {}, given {}", rank.rank, source.events, rank.events);
            let change = format!("give --events {}, unless something in between translates addresses", source.events);
            // Where the request's own events came, the address is right all the same.
            let verdict = if hears(patient, rank) { Verdict::Warn } else { Verdict::Fault };
            notes.note(CHECK, verdict, seen, Some(change));
        }
    }
}

/// Whether a request's events came from a rank.
fn hears(patient: &Patient<'_>, rank: &RankSeen) -> bool {
    let tokens = patient.seen.probes.iter().filter_map(|probe| probe.tokens());
    tokens.into_iter().any(|tokens| announced(&rank.stored, tokens).is_some())
}

fn events(patient: &Patient<'_>, rank: &RankSeen, notes: &mut Notes<'_>) {
    const CHECK: &str = "events";
    let address = &rank.events;
    let took = match &rank.events_link {
        Link::Up(took) => took,
        Link::NotDialled(why) => return notes.skip(CHECK, format!("{address}: {why}")),
        Link::Down(why) => {
            let change = match rank.origin {
                Origin::Assumed => format!("{EVENTS_FLAG}, or name the address with --events"),
                Origin::Told => {
                    "open that port (firewall, NetworkPolicy, the container's ports); an \"endpoint\" without * in \
                    --kv-events-config is connected to and not bound: make it tcp://*:PORT"
                        .to_owned()
                }
                Origin::Given | Origin::Configured => format!("check that address; {EVENTS_FLAG}"),
            };
            return notes.fault(CHECK, format!("rank {} at {address}: {why}", rank.rank), change);
        }
    };
    let seen = format!("rank {} at {address} stands in {took:.1?}", rank.rank);
    let is_answered =
        |probe: &&crate::cli::doctor::seen::Probe| probe.rank == rank.rank && probe.answer.answer().is_some();
    if !patient.seen.probes.iter().any(|probe| is_answered(&probe)) {
        let n_live = rank.wire.n_live;
        return notes.ok(CHECK, format!("{seen}; {n_live} batch(es) came meanwhile"));
    }
    if hears(patient, rank) {
        return notes.ok(CHECK, format!("{seen}; the request's blocks were announced"));
    }
    let others = patient.seen.ranks.iter().filter(|other| other.rank != rank.rank);
    let elsewhere = others.into_iter().find(|other| hears(patient, other));
    let change = match elsewhere {
        Some(other) => format!("rank {} is at {address}, too: check the order of ranks and ports", other.rank),
        None => format!(
            "check that {address} belongs to this engine and that its prefix cache is on (--enable-prefix-caching); \
            {EVENTS_FLAG}"
        ),
    };
    notes.fault(CHECK, format!("{seen}, but nothing of an answered request was announced"), change);
}

fn replay(patient: &Patient<'_>, rank: &RankSeen, notes: &mut Notes<'_>) {
    const CHECK: &str = "replay";
    if matches!(rank.events_link, Link::NotDialled(_)) {
        return notes.skip(CHECK, "the engine dials the router, which cannot ask it");
    }
    const OFF: &str = "add \"replay_endpoint\":\"tcp://*:5558\" to the engine's --kv-events-config: without it the router \
        knows nothing of the cache after each reconnection";
    let Some(address) = &rank.replay else {
        let seen = match rank.origin {
            Origin::Told => format!("off: the engine names no replay endpoint for rank {}", rank.rank),
            _ => format!("no address is given for rank {}", rank.rank),
        };
        let change = match rank.origin {
            Origin::Told => OFF.to_owned(),
            _ => format!("name it (--replay, or replay in the configuration), or if there is none, {OFF}"),
        };
        return notes.fault(CHECK, seen, change);
    };
    match (&rank.replay_link, rank.replayed) {
        (Link::Down(why), _) => {
            let change = match rank.origin {
                Origin::Told => {
                    "open that port: firewall, NetworkPolicy, the pod's or container's ports; the engine has \
                    to bind it to more than the loopback address"
                        .to_owned()
                }
                _ => format!("check that address; if replay is off, {OFF}"),
            };
            notes.fault(CHECK, format!("rank {} at {address}: {why}", rank.rank), change);
        }
        (Link::Up(took), Some(replayed)) => {
            let depth = match (replayed.first, replayed.last) {
                (Some(first), Some(last)) => format!("batches {first} to {last} ({} came)", replayed.n_batches),
                _ => "no batch".to_owned(),
            };
            let end = if replayed.has_end { "END" } else { "no END" };
            let kept = patient.seen.told.answer().and_then(|told| told.buffer_steps);
            let kept = kept.map(|steps| format!(", keeps {steps}")).unwrap_or_default();
            let seen = format!("rank {} at {address} stands in {took:.1?}: {depth}, then {end}{kept}", rank.rank);
            if !replayed.has_end && replayed.n_batches == 0 {
                let change = "check that the address is the engine's replay_endpoint and not its events";
                return notes.fault(CHECK, seen, change);
            }
            if replayed.first.is_some_and(|first| first > 0) {
                let change = "raise \"buffer_steps\" in --kv-events-config: what was cached earlier is known to a \
                    restarted router only by its snapshots (events.snapshots) or siblings";
                return notes.warn(CHECK, seen, change);
            }
            notes.ok(CHECK, seen);
        }
        (Link::Up(_) | Link::NotDialled(_), _) => notes.skip(CHECK, format!("rank {} was not asked", rank.rank)),
    }
}

fn clock(patient: &Patient<'_>, notes: &mut Notes<'_>) {
    const CHECK: &str = "clock";
    let least = |one: f64, other: f64| if one.abs() < other.abs() { one } else { other };
    let live = patient.seen.ranks.iter().filter_map(|rank| rank.skew).reduce(least);
    let Some((skew, by)) =
        live.map(|skew| (skew, "events")).or(patient.seen.date_skew.map(|skew| (skew, "the date header, to a second")))
    else {
        return notes.skip(CHECK, "nothing that came has a time");
    };
    let side = if skew < 0.0 { "ahead of" } else { "behind" };
    let seen = format!("the engine's is {:.2} s {side} ours, by {by}", skew.abs());
    if skew.abs() > MOST_SKEW {
        let change = "synchronize the clocks (NTP): the lag of events is measured with both";
        return notes.warn(CHECK, seen, change);
    }
    notes.ok(CHECK, seen);
}

fn wire(patient: &Patient<'_>, notes: &mut Notes<'_>) {
    const CHECK: &str = "wire";
    for rank in &patient.seen.ranks {
        let wire = &rank.wire;
        if wire.n_unreadable > 0 {
            let why = wire.fault.as_deref().unwrap_or("nothing more is known");
            let change = "report this with the engine's version: the router would take it for a gap";
            notes.fault(
                CHECK,
                format!("rank {}: {} message(s) cannot be read: {why}", rank.rank, wire.n_unreadable),
                change,
            );
        } else if wire.n_stored == 0 {
            notes.skip(CHECK, format!("rank {}: no BlockStored was seen", rank.rank));
        } else if !wire.has_tokens {
            let change = "nothing can be proved of hashes without token ids: check what publishes there";
            notes.fault(CHECK, format!("rank {}: {}", rank.rank, shape(wire)), change);
        } else if wire.n_skipped > 0 {
            let change = "upgrade the router: events that it does not know are skipped";
            notes.warn(
                CHECK,
                format!("rank {}: {}, {} not understood", rank.rank, shape(wire), wire.n_skipped),
                change,
            );
        } else {
            notes.ok(CHECK, format!("rank {}: {}", rank.rank, shape(wire)));
        }
        if wire.ranks.iter().any(|named| *named != rank.rank) {
            let seen = format!("batches at rank {}'s address name rank(s) {:?}", rank.rank, wire.ranks);
            notes.fault(CHECK, seen, "check the order of ranks and ports: rank r publishes on the first port plus r");
        }
    }
}

fn shape(wire: &Wire) -> String {
    let mut parts = Vec::new();
    if wire.has_int_hashes {
        parts.push("hashes as 64-bit integers".to_owned());
    }
    parts.extend(wire.hash_bytes.iter().map(|n_bytes| format!("hashes of {n_bytes} bytes")));
    parts.push(if wire.has_tokens { "token ids" } else { "no token ids" }.to_owned());
    parts.push(if wire.shows_extra_keys { "extra keys" } else { "no extra keys" }.to_owned());
    if !wire.media.is_empty() {
        parts.push(format!("medium {}", joined(wire.media.iter())));
    }
    if !wire.kinds.is_empty() {
        parts.push(format!("cache {}", joined(wire.kinds.iter())));
    }
    parts.extend(wire.topics.iter().map(|topic| format!("topic {topic:?}")));
    parts.push(format!("{} stored, {} removed, {} cleared", wire.n_stored, wire.n_removed, wire.n_cleared));
    parts.join(", ")
}

fn joined(names: impl Iterator<Item = impl AsRef<str>>) -> String {
    names.map(|name| name.as_ref().to_owned()).collect::<Vec<_>>().join("+")
}

fn block_size(patient: &Patient<'_>, notes: &mut Notes<'_>) {
    const CHECK: &str = "block size";
    let said = patient.seen.cache.answer().and_then(Option::as_ref).and_then(|cache| cache.block_size);
    let sizes = block_sizes(patient);
    match (sizes.as_slice(), said) {
        ([], None) => notes.skip(CHECK, "neither events nor /metrics tell it"),
        ([], Some(said)) => notes.ok(CHECK, format!("{said} by /metrics; no event was seen")),
        ([size], Some(said)) if *size != said => {
            let change = "nothing, if the model has several cache groups: the events count";
            notes.warn(CHECK, format!("{size} by events, {said} by /metrics"), change);
        }
        ([size], _) => notes.ok(CHECK, format!("{size} tokens")),
        (sizes, _) => {
            let change =
                "nothing, if the model has several cache groups; otherwise start all ranks with one --block-size";
            notes.warn(CHECK, format!("several: {sizes:?}"), change);
        }
    }
}

/// The block sizes that an engine's events announce.
pub(super) fn block_sizes(patient: &Patient<'_>) -> Vec<u32> {
    let mut sizes: Vec<u32> =
        patient.seen.ranks.iter().flat_map(|rank| rank.wire.block_sizes.iter().copied()).collect();
    sizes.sort_unstable();
    sizes.dedup();
    sizes
}
