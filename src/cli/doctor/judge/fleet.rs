//! What has to be the same at all engines of a pool, and who differs.

use super::stream::block_sizes;
use super::{Notes, Patient};

pub(super) fn judge(patients: &[Patient<'_>], notes: &mut Notes<'_>) {
    if patients.len() < 2 {
        return;
    }
    let models = |patient: &Patient<'_>| {
        let models = patient.seen.models.answer()?.iter().filter(|model| model.parent.is_none());
        let mut names: Vec<String> = models.map(|model| format!("{:?}", model.id)).collect();
        names.sort_unstable();
        Some(names.join("+"))
    };
    let change = "one pool (models[]) is for engines of one model: give those that differ a pool of their own";
    same(patients, "same model", models, Some(change), notes);

    let sizes = |patient: &Patient<'_>| {
        let said = || patient.seen.cache.answer()?.as_ref()?.block_size.map(|size| vec![size]);
        let sizes = Some(block_sizes(patient)).filter(|sizes| !sizes.is_empty()).or_else(said)?;
        Some(sizes.iter().map(u32::to_string).collect::<Vec<_>>().join("+"))
    };
    let change = "start all engines of a pool with one --block-size: a match is counted in whole blocks, and each size \
        costs every request a chain of hashes of its own";
    same(patients, "same block size", sizes, Some(change), notes);

    let scheme = |patient: &Patient<'_>| patient.trial.scheme().map(ToString::to_string);
    let change = "start all engines of a pool with one --prefix-caching-hash-algo and one PYTHONHASHSEED: \
        models[].block_hash describes them all";
    same(patients, "same hash", scheme, Some(change), notes);

    // The first engine with the same tokens names them: ids say nothing to people.
    let tokens = |patient: &Patient<'_>| {
        let tokens = patient.seen.fixed_tokens.answer()?;
        let first = patients.iter().position(|other| other.seen.fixed_tokens.answer() == Some(tokens))?;
        Some(format!("ids as of engine {} ({} tokens)", first + 1, tokens.len()))
    };
    let change =
        "start all engines of a pool with one model and tokenizer: the tokens of one are taken for those of all";
    same(patients, "same tokenizer", tokens, Some(change), notes);

    let version = |patient: &Patient<'_>| patient.seen.version.answer().map(|version| format!("vLLM {version}"));
    same(patients, "same version", version, None, notes);
}

/// Notes who differs; that is a fault where there is something to change.
fn same(
    patients: &[Patient<'_>],
    check: &'static str,
    value: impl Fn(&Patient<'_>) -> Option<String>,
    change: Option<&str>,
    notes: &mut Notes<'_>,
) {
    let mut groups: Vec<(String, Vec<&str>)> = Vec::new();
    for (value, name) in patients.iter().filter_map(|patient| Some((value(patient)?, patient.seen.name.as_str()))) {
        match groups.iter_mut().find(|(known, _)| *known == value) {
            Some((_, names)) => names.push(name),
            None => groups.push((value, vec![name])),
        }
    }
    let n_known: usize = groups.iter().map(|(_, names)| names.len()).sum();
    match groups.as_slice() {
        [] => notes.skip(check, "not known of any engine"),
        [_] if n_known == 1 => notes.skip(check, "known of one engine only"),
        [(value, _)] => notes.ok(check, format!("{value} at {n_known} engines")),
        _ => {
            let listed: Vec<String> =
                groups.iter().map(|(value, names)| format!("{value} at {}", names.join(", "))).collect();
            let seen = format!("differs: {}", listed.join("; "));
            match change {
                Some(change) => notes.fault(check, seen, change),
                None => notes.warn(check, seen, "nothing, while an upgrade rolls"),
            }
        }
    }
}
