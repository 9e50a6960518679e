//! What the engine's APIs answer when they are asked for the tokens of a prompt.
//!
//! `/tokenize` answers `{"count", "tokens": [int], …}`. The render APIs answer the request that another engine would
//! generate from (vLLM 0.32.0, `scale_out/token_in_token_out/protocol.py`, `GenerateRequest`): `token_ids`,
//! `cache_salt`, and for a prompt with media `features`, which tells by modality each item's hash and where its
//! placeholder tokens lie. That of completions is a list, one per prompt, of which the first counts.
//!
//! Whatever is not understood is an error: a multimodal prompt whose items are not known must not be taken for its
//! placeholder tokens alone, which are the same for every image.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::{Error, Tokens};
use crate::request::TokensApi;
use crate::routing::hash::MmItem;

#[derive(Deserialize)]
struct Tokenized {
    count: usize,
    tokens: Vec<u32>,
}

#[derive(Deserialize)]
struct Rendered {
    token_ids: Vec<u32>,
    cache_salt: Option<String>,
    features: Option<Features>,
    /// Media that the engine has yet to fetch; none in any answer of vLLM 0.32.0.
    content_parts: Option<Vec<IgnoredAny>>,
}

/// By modality, such as `image`.
#[derive(Deserialize)]
struct Features {
    mm_hashes: BTreeMap<String, Vec<Arc<str>>>,
    mm_placeholders: BTreeMap<String, Vec<Placeholder>>,
}

#[derive(Deserialize)]
struct Placeholder {
    offset: u32,
    length: u32,
}

/// Reads an answer of `api`.
///
/// # Errors
/// [`Error::Nonsense`] when it is not what that API answers, or tells of media in a way that is not understood.
pub fn parse(api: TokensApi, answer: &[u8]) -> Result<Tokens, Error> {
    match api {
        TokensApi::Tokenize => tokenized(answer),
        TokensApi::RenderCompletion => {
            let rendered: Vec<Rendered> = from_json(answer)?;
            tokens(rendered.into_iter().next().ok_or(Error::Nonsense)?)
        }
        TokensApi::RenderChat | TokensApi::RenderResponses | TokensApi::RenderMessages => tokens(from_json(answer)?),
    }
}

fn from_json<'a, T: Deserialize<'a>>(answer: &'a [u8]) -> Result<T, Error> {
    serde_json::from_slice(answer).map_err(|_| Error::Nonsense)
}

fn tokenized(answer: &[u8]) -> Result<Tokens, Error> {
    let Tokenized { count, tokens } = from_json(answer)?;
    if count == tokens.len() { Ok(Tokens { ids: tokens, ..Tokens::default() }) } else { Err(Error::Nonsense) }
}

fn tokens(rendered: Rendered) -> Result<Tokens, Error> {
    let Rendered { token_ids: ids, cache_salt, features, content_parts } = rendered;
    let has_unknown_media = content_parts.is_some_and(|parts| !parts.is_empty());
    if ids.is_empty() || has_unknown_media {
        return Err(Error::Nonsense);
    }
    let mm = features.map_or(Ok(Vec::new()), |features| items(features, ids.len()))?;
    Ok(Tokens { ids, cache_salt, mm })
}

/// The items in the order of their placeholders, each within the prompt and none within another.
fn items(features: Features, n_tokens: usize) -> Result<Vec<MmItem>, Error> {
    let Features { mm_hashes, mut mm_placeholders } = features;
    let mut items = Vec::new();
    for (modality, hashes) in mm_hashes {
        let placeholders = mm_placeholders.remove(&modality).ok_or(Error::Nonsense)?;
        if placeholders.len() != hashes.len() {
            return Err(Error::Nonsense);
        }
        let of_modality = hashes.into_iter().zip(placeholders);
        items.extend(of_modality.map(|(identifier, Placeholder { offset, length })| MmItem {
            identifier,
            offset,
            n_tokens: length,
        }));
    }
    items.sort_by_key(|item| item.offset);
    let is_within = |item: &MmItem| item.n_tokens > 0 && item.end() <= n_tokens as u64;
    let is_apart = |pair: &[MmItem]| pair[0].end() <= u64::from(pair[1].offset);
    let is_understood = mm_placeholders.is_empty() && items.iter().all(is_within) && items.windows(2).all(is_apart);
    if is_understood { Ok(items) } else { Err(Error::Nonsense) }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// `/tokenize` and `/v1/…/render` of vLLM 0.32.0 with `--enable-scale-out`.
    const RECORDED: &str = include_str!("../../tests/data/render-vllm-0.32.0.json");

    fn api_of(path: &str) -> TokensApi {
        let apis = [
            TokensApi::Tokenize,
            TokensApi::RenderChat,
            TokensApi::RenderCompletion,
            TokensApi::RenderResponses,
            TokensApi::RenderMessages,
        ];
        apis.into_iter().find(|api| api.path() == path).expect("one of the APIs")
    }

    fn rendered(features: &Value) -> Result<Tokens, Error> {
        let answer = json!({"token_ids": [1, 2, 3, 4, 5, 6, 7, 8], "cache_salt": null, "features": features});
        parse(TokensApi::RenderChat, answer.to_string().as_bytes())
    }

    fn item(identifier: &str, offset: u32, n_tokens: u32) -> MmItem {
        MmItem { identifier: identifier.into(), offset, n_tokens }
    }

    #[test]
    fn recorded_answers_are_understood() {
        let mut n_salted = 0;
        let all: Vec<Value> = serde_json::from_str(RECORDED).expect("a list");
        for recorded in &all {
            let response = &recorded["response"];
            let first = if response.is_array() { &response[0] } else { response };
            let ids = if first["tokens"].is_array() { &first["tokens"] } else { &first["token_ids"] };
            let api = api_of(recorded["path"].as_str().expect("a path"));
            let found = parse(api, response.to_string().as_bytes()).expect("an answer");
            assert_eq!(json!(found.ids), *ids, "{}", recorded["name"]);
            assert_eq!(json!(found.cache_salt), first["cache_salt"], "{}", recorded["name"]);
            assert!(found.mm.is_empty());
            n_salted += usize::from(found.cache_salt.is_some());
        }
        assert!(n_salted >= 2 && all.len() >= 7);
    }

    #[test]
    fn items_of_all_modalities_are_told_in_the_order_of_the_prompt() {
        let features = json!({
            "mm_hashes": {"video": ["v"], "image": ["b", "a"], "audio": []},
            "mm_placeholders": {
                "image": [{"offset": 6, "length": 2}, {"offset": 0, "length": 2}],
                "video": [{"offset": 2, "length": 1}],
                "audio": [],
            },
            "kwargs_data": null, "mm_metadata": null,
        });
        let found = rendered(&features).expect("an answer");
        assert_eq!(found.mm, [item("a", 0, 2), item("v", 2, 1), item("b", 6, 2)]);
        assert_eq!(rendered(&Value::Null).expect("an answer").mm, []);
    }

    #[test]
    fn media_that_are_not_understood_are_nonsense() {
        let one =
            |placeholder: Value| json!({"mm_hashes": {"image": ["a"]}, "mm_placeholders": {"image": [placeholder]}});
        for features in [
            json!({}),
            json!([]),
            json!({"mm_hashes": {"image": ["a"]}}),
            json!({"mm_hashes": {"image": ["a"]}, "mm_placeholders": {}}),
            json!({"mm_hashes": {}, "mm_placeholders": {"image": [{"offset": 0, "length": 1}]}}),
            json!({"mm_hashes": {"image": ["a", "b"]}, "mm_placeholders": {"image": [{"offset": 0, "length": 1}]}}),
            json!({"mm_hashes": {"image": [null]}, "mm_placeholders": {"image": [{"offset": 0, "length": 1}]}}),
            one(json!({"offset": 0})),
            one(json!({"offset": 0, "length": 0})),
            one(json!({"offset": -1, "length": 1})),
            one(json!({"offset": 7, "length": 2})),
            one(json!({"offset": 4_294_967_295_u32, "length": 4_294_967_295_u32})),
            json!({
                "mm_hashes": {"image": ["a"], "audio": ["b"]},
                "mm_placeholders": {"image": [{"offset": 0, "length": 3}], "audio": [{"offset": 2, "length": 1}]},
            }),
        ] {
            assert!(matches!(rendered(&features), Err(Error::Nonsense)), "{features}");
        }
        let parts = br#"{"token_ids":[1],"content_parts":[{"type":"image_url"}]}"#;
        assert!(matches!(parse(TokensApi::RenderChat, parts), Err(Error::Nonsense)));
    }

    #[test]
    fn only_a_counted_list_of_token_ids_is_an_answer() {
        let good = br#"{"count":2,"max_model_len":2048,"tokens":[1,528],"token_strs":null}"#;
        let tokens = parse(TokensApi::Tokenize, good).expect("an answer");
        assert_eq!(tokens, Tokens { ids: vec![1, 528], ..Tokens::default() });
        for bad in [
            &br#"{"count":3,"tokens":[1,2]}"#[..],
            br#"{"count":1,"tokens":[-1]}"#,
            br#"{"count":1,"tokens":[4294967296]}"#,
            br#"{"count":1,"tokens":["a"]}"#,
            br#"{"tokens":[1]}"#,
            br#"{"token_ids":[1]}"#,
            br#"[1]"#,
            b"\xff",
            b"",
        ] {
            assert!(
                matches!(parse(TokensApi::Tokenize, bad), Err(Error::Nonsense)),
                "{}",
                String::from_utf8_lossy(bad)
            );
        }
        for (api, bad) in [
            (TokensApi::RenderChat, &br#"{"count":1,"tokens":[1]}"#[..]),
            (TokensApi::RenderChat, br#"{"token_ids":[]}"#),
            (TokensApi::RenderMessages, br#"{"token_ids":[-1]}"#),
            (TokensApi::RenderResponses, br#"[{"token_ids":[1]}]"#),
            (TokensApi::RenderResponses, br#"{"token_ids":[1],"cache_salt":5}"#),
            (TokensApi::RenderCompletion, br#"{"token_ids":[1]}"#),
            (TokensApi::RenderCompletion, b"[]"),
        ] {
            assert!(matches!(parse(api, bad), Err(Error::Nonsense)), "{api:?} {}", String::from_utf8_lossy(bad));
        }
    }

    proptest::proptest! {
        /// Whatever an endpoint answers, nothing panics, and what is understood keeps to its promises.
        #[test]
        fn any_layout_is_refused_or_in_order(
            n_tokens in 1_usize..40,
            ranges in proptest::collection::vec((0_u32..40, 0_u32..8, proptest::prelude::any::<bool>()), 0..5),
        ) {
            let of = |is_image: bool| ranges.iter().filter(move |(.., image)| *image == is_image);
            let hashes = |is_image| of(is_image).map(|(offset, ..)| offset.to_string()).collect::<Vec<_>>();
            let places = |is_image| {
                of(is_image).map(|(offset, length, _)| json!({"offset": offset, "length": length})).collect::<Vec<_>>()
            };
            let answer = json!({
                "token_ids": vec![1; n_tokens],
                "features": {
                    "mm_hashes": {"image": hashes(true), "audio": hashes(false)},
                    "mm_placeholders": {"image": places(true), "audio": places(false)},
                },
            });
            let mut covered = vec![0; 80];
            ranges.iter().for_each(|(offset, length, _)| {
                covered[*offset as usize..(offset + length) as usize].iter_mut().for_each(|n| *n += 1);
            });
            let is_sound = ranges.iter().all(|(_, length, _)| *length > 0)
                && covered.iter().enumerate().all(|(token, n)| *n == 0 || *n == 1 && token < n_tokens);
            let found = parse(TokensApi::RenderChat, answer.to_string().as_bytes());
            proptest::prop_assert_eq!(found.is_ok(), is_sound);
            for pair in found.unwrap_or_default().mm.windows(2) {
                proptest::prop_assert!(pair[0].end() <= u64::from(pair[1].offset));
            }
        }
    }
}
