//! What the engine's HTTP server says: that it is there, its release, its models and its cache.

use super::{Notes, Patient, REACHABLE};
use crate::cli::doctor::seen::{Asked, Served};
use crate::cli::doctor::versions::EVENTS;

pub(super) fn judge(patient: &Patient<'_>, notes: &mut Notes<'_>) {
    match &patient.seen.reach {
        Ok(took) => notes.ok(REACHABLE, format!("HTTP answers in {took:.1?}")),
        Err(why) => {
            let change = "check that the engine runs, its --host and --port, the scheme, and what lies between";
            return notes.fault(REACHABLE, format!("HTTP does not answer: {why}"), change);
        }
    }
    version(patient, notes);
    models(patient, notes);
    prefix_caching(patient, notes);
}

fn version(patient: &Patient<'_>, notes: &mut Notes<'_>) {
    let version = match &patient.seen.version {
        Asked::Answer(version) => version,
        other => {
            let change = "if this is no vLLM (SGLang answers without it), its blocks are credited by their token ids";
            return notes.warn("version", format!("/version: {}", other.why_not()), change);
        }
    };
    match patient.release {
        None => notes.warn("version", format!("{version:?} is no release of vLLM"), "what it can do is not known"),
        Some(release) if release < EVENTS => notes.fault(
            "version",
            format!("vLLM {version}: {}", release.abilities()),
            "upgrade vLLM to 0.10 or later, or set models[].events.sync to false: then the index is learned from picks",
        ),
        Some(release) => notes.ok("version", format!("vLLM {version}: {}", release.abilities())),
    }
}

fn models(patient: &Patient<'_>, notes: &mut Notes<'_>) {
    let models = match &patient.seen.models {
        Asked::Answer(models) => models,
        Asked::Status(status @ (401 | 403)) => {
            let change =
                "give the engine's key: --api-key-file here, models[].engine.api_key_file in the configuration";
            return notes.fault("models", format!("/v1/models: status {status}, the engine wants a key"), change);
        }
        other => {
            let change = "check that this is an OpenAI server, and that nothing in between takes /v1/models";
            return notes.fault("models", format!("/v1/models: {}", other.why_not()), change);
        }
    };
    let wanted = patient.seen.wanted.as_deref().or(patient.seen.model.as_deref());
    let listed = listed(models);
    if wanted.is_none_or(|wanted| !models.iter().any(|model| model.id == wanted)) {
        let change = match wanted {
            Some(wanted) => format!("send this engine to its own pool, or start it with --served-model-name {wanted}"),
            None => "start the engine with a model".to_owned(),
        };
        let wanted = wanted.map_or_else(|| "any model".to_owned(), |wanted| format!("{wanted:?}"));
        return notes.fault("models", format!("serves {listed}, expected {wanted}"), change);
    }
    notes.ok("models", format!("serves {listed}"));
}

fn listed(models: &[Served]) -> String {
    let base = models.iter().filter(|model| model.parent.is_none());
    let base: Vec<String> = base
        .map(|model| match model.max_model_len {
            Some(len) => format!("{:?} (max_model_len {len})", model.id),
            None => format!("{:?}", model.id),
        })
        .collect();
    let adapters = models.iter().filter(|model| model.parent.is_some());
    let adapters: Vec<String> = adapters.map(|model| format!("{:?}", model.id)).collect();
    let base = if base.is_empty() { "no model".to_owned() } else { base.join(", ") };
    if adapters.is_empty() { base } else { format!("{base}, adapters {}", adapters.join(", ")) }
}

fn prefix_caching(patient: &Patient<'_>, notes: &mut Notes<'_>) {
    const CHECK: &str = "prefix caching";
    match &patient.seen.cache {
        Asked::Answer(Some(cache)) => match cache.is_prefix_cached {
            Some(true) => notes.ok(CHECK, "on"),
            Some(false) => {
                let change = "start the engine with --enable-prefix-caching: without it nothing is cached or published";
                notes.fault(CHECK, "off", change);
            }
            None => notes.skip(CHECK, "/metrics does not say whether it is on"),
        },
        Asked::Answer(None) => notes.skip(CHECK, "/metrics does not tell of the cache"),
        other => notes.skip(CHECK, format!("/metrics: {}", other.why_not())),
    }
}
