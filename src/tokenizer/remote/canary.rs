//! The fixed text that every endpoint is asked for off the request path, and what its tokens tell.
//!
//! The question names no model (vLLM 0.32.0 takes that for its own, `serve/tokenize/protocol.py`), so that names do not
//! matter, and is a completion, so that chat templates do not. Its text has what tokenizers treat differently: case,
//! digits, white space, punctuation, accents, scripts and an emoji. Endpoints of one pool must make the same tokens of
//! it, whatever those are. One that does not answers for another model or has another tokenizer: its tokens would be
//! wrong for the rest.

use std::collections::HashMap;

use xxhash_rust::xxh3::xxh3_64;

use crate::request::{Question, TokensApi};

/// JSON text of the question.
const BODY: &str = "{\"prompt\":\"The Quick brown fox's 3 cubs ate 1,234.5 kg  of\\tna\u{ef}ve caf\u{e9}\\n\\n\u{6f22}\u{5b57} \u{43c}\u{438}\u{440} \u{1f642} if (x!=0) { return ~y; }\"}";

/// What is asked: of the render APIs where requests ask those, since an engine may lack them or guard them with a key
/// that `/tokenize` does not need. The tokens are the same.
pub(super) fn question(renders: bool) -> Question {
    let api = if renders { TokensApi::RenderCompletion } else { TokensApi::Tokenize };
    Question { api, body: BODY.into() }
}

/// A hash of the tokens that were made of the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Fingerprint(u64);

impl Fingerprint {
    pub(super) fn of(ids: &[u32]) -> Self {
        let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        Self(xxh3_64(&bytes))
    }
}

/// What the fingerprints of a pool say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// They are all the same, or there are none.
    Agreed,
    /// More than half of them are this one; the others are excluded.
    Majority(Fingerprint),
    /// None has more than half of them, so nobody can be told to be wrong.
    Split,
}

/// What the fingerprints of those of a pool's endpoints say that vote.
pub(super) fn judge(fingerprints: &[Fingerprint]) -> Verdict {
    let mut counts: HashMap<Fingerprint, usize> = HashMap::new();
    for fingerprint in fingerprints {
        *counts.entry(*fingerprint).or_default() += 1;
    }
    match counts.into_iter().max_by_key(|(_, n)| *n) {
        None => Verdict::Agreed,
        Some((_, n)) if n == fingerprints.len() => Verdict::Agreed,
        Some((fingerprint, n)) if 2 * n > fingerprints.len() => Verdict::Majority(fingerprint),
        Some(_) => Verdict::Split,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_majority_decides_who_differs() {
        let [a, b, c] = [1, 2, 3].map(|id| Fingerprint::of(&[id]));
        for (fingerprints, verdict) in [
            (&[][..], Verdict::Agreed),
            (&[a], Verdict::Agreed),
            (&[a, a, a], Verdict::Agreed),
            (&[a, b], Verdict::Split),
            (&[a, b, b], Verdict::Majority(b)),
            (&[a, a, b, b], Verdict::Split),
            (&[a, a, b, c], Verdict::Split),
            (&[c, a, a, b, a], Verdict::Majority(a)),
        ] {
            assert_eq!(judge(fingerprints), verdict, "{fingerprints:?}");
        }
    }

    #[test]
    fn fingerprints_tell_tokens_and_their_order_apart() {
        let all = [&[][..], &[1], &[2], &[1, 2], &[2, 1], &[258]].map(Fingerprint::of);
        for (i, one) in all.iter().enumerate() {
            assert_eq!(all.iter().position(|other| other == one), Some(i));
        }
    }

    #[test]
    fn the_question_is_json_without_a_model() {
        let body: serde_json::Value = serde_json::from_slice(&question(false).body).expect("JSON");
        let fields: Vec<_> = body.as_object().expect("an object").keys().collect();
        assert_eq!(fields, ["prompt"]);
    }
}
