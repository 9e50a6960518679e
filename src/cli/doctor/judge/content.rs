//! Whether what we would compute is what the engine computes: its block hashes and its tokens.

use super::{Expected, HASH, Notes, Patient};
use crate::cli::doctor::observe::announced;
use crate::cli::doctor::seen::{Asked, Link, Probe, ProbeKind};
use crate::cli::doctor::trial::{Trial, shown};
use crate::cli::doctor::versions::FIXED_ROOT;
use crate::routing::hash::HashAlgorithm;

pub(super) fn judge(patient: &Patient<'_>, expected: &Expected, notes: &mut Notes<'_>) {
    if expected.model.as_ref().is_none_or(|model| model.sync) {
        hash(patient, expected, notes);
    }
    tokenizer(patient, expected, notes);
}

fn hash(patient: &Patient<'_>, expected: &Expected, notes: &mut Notes<'_>) {
    match &patient.trial {
        Trial::Match { scheme, n_equal, n_chains } if n_equal == n_chains => {
            notes.ok(HASH, format!("{scheme}: {n_equal} chain(s) recomputed from their token ids are equal"));
        }
        Trial::Match { scheme, n_equal, n_chains } => {
            let change = "nothing, if prompts are salted and this vLLM (before 0.17) does not show it, or if the engine was \
                restarted with other settings a moment ago";
            notes.warn(HASH, format!("{scheme} makes {n_equal} of {n_chains} chains"), change);
        }
        Trial::NoMaterial => {
            let why =
                if expected.sends { "no chain from a prompt's beginning was seen" } else { "no request was sent" };
            notes.skip(HASH, format!("{why}: nothing to recompute"));
        }
        Trial::NoMatch { algorithm, .. } => random_root(patient, expected, *algorithm, notes),
    }
}

fn random_root(patient: &Patient<'_>, expected: &Expected, algorithm: Option<HashAlgorithm>, notes: &mut Notes<'_>) {
    let said = patient.seen.cache.answer().and_then(Option::as_ref).and_then(|cache| cache.algorithm.as_deref());
    let algorithm = algorithm.or_else(|| said?.parse().ok());
    let tried: Vec<String> = expected.seeds.iter().map(|seed| shown(seed.as_deref())).collect();
    let tried = tried.join(", ");
    let name = algorithm.map_or_else(|| "an algorithm that is not told".to_owned(), |algorithm| algorithm.to_string());
    let needs_seed = match algorithm {
        Some(HashAlgorithm::Xxhash | HashAlgorithm::XxhashCbor) => true,
        Some(HashAlgorithm::Sha256 | HashAlgorithm::Sha256Cbor) | None => patient.is_before(FIXED_ROOT),
    };
    let seen = format!("{name}, with a root that no PYTHONHASHSEED tried makes ({tried})");
    if needs_seed {
        notes.fault(
            HASH,
            format!("{seen}: a random root, PYTHONHASHSEED is not set and the engine draws one at each start"),
            "set PYTHONHASHSEED=0 in the engine's environment and models[].block_hash.pythonhashseed: \"0\" in the \
                configuration, or start the engine with --prefix-caching-hash-algo sha256 (vLLM 0.29 and later); until \
                then blocks are credited by their token ids",
        );
    } else {
        notes.fault(
            HASH,
            format!("{seen}: the engine has another PYTHONHASHSEED, or another way to hash"),
            "find PYTHONHASHSEED in the engine's environment and try it with --pythonhashseed; it belongs in \
                models[].block_hash.pythonhashseed; until then blocks are credited by their token ids",
        );
    }
}

fn tokenizer(patient: &Patient<'_>, expected: &Expected, notes: &mut Notes<'_>) {
    const CHECK: &str = "tokenizer";
    if !expected.sends {
        match &patient.seen.fixed_tokens {
            Asked::Answer(tokens) => notes.ok(CHECK, format!("/tokenize answers, {} tokens", tokens.len())),
            Asked::Unasked => {}
            other => no_tokens(ProbeKind::Completion, &other.why_not(), notes),
        }
        return;
    }
    let first_rank = patient.seen.probes.first().map(|probe| probe.rank);
    for probe in patient.seen.probes.iter().filter(|probe| Some(probe.rank) == first_rank) {
        if is_answered(probe, notes) {
            same_tokens(patient, probe, notes);
            local(probe, notes);
        }
    }
}

/// Whether the engine has answered the request; notes why not.
fn is_answered(probe: &Probe, notes: &mut Notes<'_>) -> bool {
    const CHECK: &str = "request";
    let kind = probe.kind.as_str();
    let seen = format!("{kind}: {}", probe.answer.why_not());
    match &probe.answer {
        Asked::Answer(_) => return true,
        Asked::Status(400 | 404 | 405) if probe.kind == ProbeKind::Chat => {
            notes.skip(CHECK, format!("{seen}: the model has no chat template, or its server no chats"));
        }
        Asked::Status(401 | 403) => notes.fault(CHECK, seen, "give the engine's key with --api-key-file"),
        Asked::Status(404) => notes.fault(CHECK, seen, "give the name of a model that it serves with --model"),
        _ => notes.fault(CHECK, seen, "see the engine's log: it does not serve a request of a few tokens"),
    }
    false
}

/// `/tokenize` against what the engine used, by its answer or by its events.
fn same_tokens(patient: &Patient<'_>, probe: &Probe, notes: &mut Notes<'_>) {
    const CHECK: &str = "tokenizer";
    let kind = probe.kind.as_str();
    let Asked::Answer(tokenized) = &probe.tokenized else {
        return no_tokens(probe.kind, &probe.tokenized.why_not(), notes);
    };
    let n_tokens = tokenized.len();
    let change = "the router asks /tokenize as it is: start all engines of the pool with one tokenizer and chat template, \
        or take the tokens from --enable-scale-out's render APIs (models[].tokenizer.api: render)";
    if let Some(used) = probe.answer.answer().and_then(Option::as_ref)
        && used != tokenized
    {
        let seen = format!(
            "{kind}: /tokenize says {n_tokens} tokens, the engine used {}, {}",
            used.len(),
            difference(used, tokenized)
        );
        return notes.fault(CHECK, seen, change);
    }
    let rank = patient.seen.ranks.iter().find(|rank| rank.rank == probe.rank);
    let Some(rank) = rank.filter(|rank| matches!(rank.events_link, Link::Up(_))) else {
        return notes.ok(CHECK, format!("{kind}: the {n_tokens} tokens of /tokenize are those that the engine used"));
    };
    match announced(&rank.stored, tokenized) {
        Some(n_announced) => {
            let seen =
                format!("{kind}: of {n_tokens} tokens by /tokenize, the events announce the same first {n_announced}");
            notes.ok(CHECK, seen);
        }
        // Nothing of any request came: then the events are at fault, and that is said there.
        None if rank.wire.n_live == 0 => {}
        None => notes.fault(CHECK, format!("{kind}: the {n_tokens} tokens of /tokenize are in no event"), change),
    }
}

fn no_tokens(kind: ProbeKind, why: &str, notes: &mut Notes<'_>) {
    let change =
        "let the router reach /tokenize, or give it the model's tokenizer (models[].tokenizer: {kind: local, path: …})";
    notes.fault("tokenizer", format!("{}: /tokenize: {why}", kind.as_str()), change);
}

fn local(probe: &Probe, notes: &mut Notes<'_>) {
    const CHECK: &str = "local tokenizer";
    let kind = probe.kind.as_str();
    match (&probe.local, probe.tokens()) {
        (None, _) | (Some(Ok(_)), None) => {}
        (Some(Err(reason)), _) => {
            notes.warn(
                CHECK,
                format!("{kind}: cannot tell the tokens ({reason})"),
                "keep models[].tokenizer.kind remote",
            );
        }
        (Some(Ok(said)), Some(used)) if said == used => {
            notes.ok(CHECK, format!("{kind}: the same {} tokens", said.len()));
        }
        (Some(Ok(said)), Some(used)) => {
            let change = "take the tokenizer.json and the chat template that the engine has loaded";
            let seen =
                format!("{kind}: {} tokens, the engine has {}, {}", said.len(), used.len(), difference(said, used));
            notes.fault(CHECK, seen, change);
        }
    }
}

fn difference(one: &[u32], other: &[u32]) -> String {
    let n_equal = one.iter().zip(other).take_while(|(one, other)| one == other).count();
    format!("of which the first {n_equal} are the same")
}
