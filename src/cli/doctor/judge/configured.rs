//! The engine against the router's configuration.

use super::{Configured, Notes, Patient};
use crate::cli::doctor::seen::Served;
use crate::cli::doctor::trial::shown;
use crate::cli::doctor::versions::REPORT;

pub(super) fn judge(patient: &Patient<'_>, model: &Configured, notes: &mut Notes<'_>) {
    hash(patient, model, notes);
    if let Some(served) = patient.seen.models.answer() {
        names(served, model, notes);
        adapters(served, model, notes);
    }
    sources(patient, model, notes);
    if model.report && patient.is_before(REPORT) {
        let seen = "models[].events.report is true, which this vLLM ignores";
        notes.warn("config report", seen, "upgrade vLLM to 0.26 or later, or set models[].events.report to false");
    }
}

fn hash(patient: &Patient<'_>, model: &Configured, notes: &mut Notes<'_>) {
    const CHECK: &str = "config hash";
    let Some(found) = patient.trial.scheme().filter(|_| model.sync) else { return };
    if *found == model.scheme {
        return notes.ok(CHECK, format!("models[].block_hash is {found}, as found"));
    }
    let seed = found.seed.as_deref().map_or_else(|| "null".to_owned(), |seed| format!("{seed:?}"));
    let seen = format!("models[].block_hash is {}, found {found}", model.scheme);
    let change = format!(
        "set models[].block_hash: {{algorithm: {}, pythonhashseed: {seed}}}, or start the engine with \
        --prefix-caching-hash-algo {} and PYTHONHASHSEED {}",
        found.algorithm,
        model.scheme.algorithm,
        shown(model.scheme.seed.as_deref()),
    );
    notes.fault(CHECK, seen, change);
}

/// Names under which the engine serves the model and of which the router does not know.
fn names(served: &[Served], model: &Configured, notes: &mut Notes<'_>) {
    const CHECK: &str = "config names";
    let is_known = |name: &str| model.names.iter().any(|known| **known == *name);
    let base = served.iter().filter(|served| served.parent.is_none());
    let unknown: Vec<String> =
        base.filter(|served| !is_known(&served.id)).map(|served| format!("{:?}", served.id)).collect();
    if unknown.is_empty() {
        return notes.ok(CHECK, "every name of the model is configured");
    }
    let seen = format!("the engine also serves {}, of which models[] does not know", unknown.join(", "));
    notes.warn(CHECK, seen, "add these to models[].aliases: requests that name them are left to Envoy");
}

fn adapters(served: &[Served], model: &Configured, notes: &mut Notes<'_>) {
    const CHECK: &str = "config adapters";
    let loaded: Vec<&Served> = served.iter().filter(|served| served.parent.is_some()).collect();
    let mut is_equal = true;
    for (name, path) in &model.adapters {
        let Some(found) = loaded.iter().find(|served| *served.id == **name) else {
            is_equal = false;
            notes.warn(
                CHECK,
                format!("{name:?} is configured and not loaded"),
                "load it there, if it is wanted on this engine",
            );
            continue;
        };
        if let (Some(path), Some(root)) = (path, &found.root)
            && **path != **root
        {
            is_equal = false;
            let seen = format!("{name:?} is loaded from {root:?}, configured is {path:?}");
            notes.fault(CHECK, seen, format!("set models[].adapters[].path to {root:?}: the path is part of the hash"));
        }
    }
    for found in loaded.iter().filter(|served| !model.adapters.iter().any(|(name, _)| **name == *served.id)) {
        is_equal = false;
        let root = found.root.as_deref().unwrap_or("the path that it was loaded from");
        let change = format!(
            "add {{name: {:?}, path: {root:?}}} to models[].adapters, or its blocks are learned from picks",
            found.id
        );
        notes.warn(CHECK, format!("{:?} is loaded and not configured", found.id), change);
    }
    if is_equal && !loaded.is_empty() {
        notes.ok(CHECK, format!("{} adapter(s), as configured", loaded.len()));
    }
}

fn sources(patient: &Patient<'_>, model: &Configured, notes: &mut Notes<'_>) {
    const CHECK: &str = "config events";
    let Some(told) = patient.seen.told.answer().filter(|told| model.sync && !told.answer.sources.is_empty()) else {
        return;
    };
    if patient.configured.is_empty() {
        if !model.discover {
            let change = "set models[].events.discover to true, or name the endpoint's events and replay";
            notes.fault(CHECK, "nothing says where this engine publishes, and it is not asked", change);
        }
        return;
    }
    if patient.configured == told.answer.sources {
        return notes.ok(CHECK, "events, replay and ranks are as the engine tells");
    }
    let ranks = |sources: &[crate::discovery::event_sources::RankSource]| {
        let named = sources.iter().map(|source| {
            format!("rank {} {} (replay {})", source.rank, source.events, source.replay.as_deref().unwrap_or("none"))
        });
        named.collect::<Vec<_>>().join(", ")
    };
    let seen = format!("configured: {}; the engine tells: {}", ranks(patient.configured), ranks(&told.answer.sources));
    if model.discover {
        return notes.warn(
            CHECK,
            seen,
            "correct the endpoint's events, replay and ranks; until then what the engine tells counts",
        );
    }
    notes.fault(
        CHECK,
        seen,
        "correct the endpoint's events, replay and ranks, or set models[].events.discover to true",
    );
}
