//! The prompt of `/v1/completions`: text, a list of texts, token ids or a list of those; the first prompt decides.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use super::fields::{Fields, JsonObject, Text, json_string};
use super::{Ask, Opaque, Prompt, Question, ReadOptions, TokensApi};

/// What a render call needs of a completion request besides its first prompt (vLLM 0.32.0,
/// `openai/completion/protocol.py`).
const RENDERED: [&str; 6] =
    ["suffix", "add_special_tokens", "truncate_prompt_tokens", "truncation_side", "max_tokens", "cache_salt"];

/// The first item of a list; the others are stepped over and cost no memory.
struct FirstItem<T>(Option<T>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for FirstItem<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Items<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for Items<T> {
            type Value = FirstItem<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self::Value, A::Error> {
                let first = items.next_element()?;
                while items.next_element::<IgnoredAny>()?.is_some() {}
                Ok(FirstItem(first))
            }
        }

        deserializer.deserialize_seq(Items(PhantomData))
    }
}

enum First<'a> {
    Text(Cow<'a, str>),
    Tokens(Vec<u32>),
}

/// The prompt, or why there is none.
pub(super) fn prompt(fields: &Fields<'_>, options: &ReadOptions) -> Result<Prompt, Opaque> {
    if fields.has("prompt_embeds") {
        return Err(Opaque::Media);
    }
    match first(fields.get("prompt").ok_or(Opaque::Invalid)?)? {
        // `/tokenize` knows nothing of a model's way to fill in the middle.
        First::Text(_) if options.ask == Ask::Tokenize && fields.has("suffix") => Err(Opaque::Inexact),
        First::Text(text) => Ok(Prompt::Text(question(fields, &text, options))),
        First::Tokens(tokens) if tokens.is_empty() => Err(Opaque::Invalid),
        First::Tokens(tokens) => Ok(Prompt::Tokens(tokens)),
    }
}

/// The first prompt. The shape is told by the first characters, so that a long list of ids is parsed only once.
fn first(prompt: &RawValue) -> Result<First<'_>, Opaque> {
    let json = prompt.get();
    let item = json.strip_prefix('[').map(str::trim_start);
    let parsed = match item.and_then(|item| item.chars().next()) {
        None => serde_json::from_str::<Text<'_>>(json).map(|text| Some(First::Text(text.0))),
        Some('"') => {
            serde_json::from_str::<FirstItem<Text<'_>>>(json).map(|item| item.0.map(|text| First::Text(text.0)))
        }
        Some('[') => serde_json::from_str::<FirstItem<Vec<u32>>>(json).map(|item| item.0.map(First::Tokens)),
        Some(_) => serde_json::from_str(json).map(|tokens| Some(First::Tokens(tokens))),
    };
    parsed.ok().flatten().ok_or(Opaque::Invalid)
}

fn question(fields: &Fields<'_>, text: &str, options: &ReadOptions) -> Question {
    let mut object = JsonObject::new(text.len() + 128);
    object.copy(fields, &["model"]);
    object.field("prompt", &json_string(text));
    let api = match options.ask {
        Ask::Tokenize => {
            object.copy(fields, &["add_special_tokens"]);
            TokensApi::Tokenize
        }
        Ask::Render => {
            object.copy_given(fields, &RENDERED);
            TokensApi::RenderCompletion
        }
    };
    Question { api, body: object.finish() }
}
