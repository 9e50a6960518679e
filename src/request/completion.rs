//! The prompt of `/v1/completions`: text, a list of texts, token ids or a list of those; the first prompt decides.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use super::{Body, JsonObject, Opaque, Prompt, Question, TokensApi, json_string};

/// A text that is borrowed from the body where it has no escapes.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

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
pub(super) fn prompt(body: &Body<'_>) -> Prompt {
    if body.prompt_embeds.is_some() {
        return Prompt::Opaque(Opaque::Media);
    }
    match body.prompt.map(first) {
        Some(Ok(First::Text(text))) => Prompt::Text(question(body, &text)),
        Some(Ok(First::Tokens(tokens))) if !tokens.is_empty() => Prompt::Tokens(tokens),
        _ => Prompt::Opaque(Opaque::Invalid),
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

fn question(body: &Body<'_>, text: &str) -> Question {
    let mut object = JsonObject::new(text.len() + 128);
    if let Some(model) = &body.model {
        object.field("model", &json_string(model));
    }
    object.field("prompt", &json_string(text));
    object.optional("add_special_tokens", body.add_special_tokens);
    Question { api: TokensApi::Tokenize, body: object.finish() }
}
