//! The fields of a request body that are read, found in one walk, and the writer of the JSON objects that are made of
//! them.

use std::borrow::Cow;
use std::fmt;

use serde::de::{DeserializeSeed, Error as _, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use serde_json::value::RawValue;

use super::Opaque;

/// The fields that are kept, of all APIs together. Everything else in a body is skipped.
const KEPT: [&str; 37] = [
    "add_generation_prompt",
    "add_special_tokens",
    "cache_salt",
    "chat_template",
    "chat_template_kwargs",
    "continue_final_message",
    "documents",
    "echo",
    "input",
    "instructions",
    "kv_transfer_params",
    "logprobs",
    "max_completion_tokens",
    "max_output_tokens",
    "max_tokens",
    "media_io_kwargs",
    "messages",
    "mm_processor_kwargs",
    MODEL,
    "output_config",
    "previous_input_messages",
    "previous_response_id",
    "prompt",
    "prompt_embeds",
    "prompt_logprobs",
    "reasoning",
    "reasoning_effort",
    "response_format",
    "suffix",
    "system",
    "text",
    "thinking",
    "tool_choice",
    "tools",
    "truncate_prompt_tokens",
    "truncation",
    "truncation_side",
];
const MODEL: &str = "model";

/// A text that is borrowed from the body where it has no escapes.
#[derive(Deserialize)]
pub(super) struct Text<'a>(#[serde(borrow)] pub(super) Cow<'a, str>);

/// The kept fields of a body, as they stand there.
#[derive(Default)]
pub(super) struct Fields<'a>(Vec<(&'static str, &'a RawValue)>);

/// What stands in them is the client's: their names and lengths have to do.
impl fmt::Debug for Fields<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.0.iter().map(|(name, value)| (name, value.get().len()))).finish()
    }
}

impl<'a> Fields<'a> {
    /// The field as it is given, `null` included.
    pub(super) fn given(&self, name: &str) -> Option<&'a RawValue> {
        debug_assert!(KEPT.contains(&name), "{name} is not kept");
        self.0.iter().find(|(kept, _)| *kept == name).map(|(_, value)| *value)
    }

    /// The field's value; `null` is none, as it is for the engine wherever that has no meaning of its own.
    pub(super) fn get(&self, name: &str) -> Option<&'a RawValue> {
        self.given(name).filter(|value| value.get() != "null")
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    pub(super) fn cache_salt(&self) -> Result<Option<String>, Opaque> {
        let parse = |salt: &RawValue| serde_json::from_str(salt.get()).map_err(|_| Opaque::Invalid);
        self.get("cache_salt").map(parse).transpose()
    }

    /// Whether the client forwards the tokens of another engine, which this one then takes for the prompt's
    /// (vLLM 0.32.0, `online_renderer.py`, for disaggregated serving).
    pub(super) fn brings_tokens(&self) -> bool {
        const NAME: &str = "prompt_token_ids";
        self.get("kv_transfer_params").map(RawValue::get).is_some_and(|params| {
            // A name may also be written with escapes; what is nested too deep to be read may be anything.
            let is_escaped =
                || serde_json::from_str(params).map_or(true, |params: Value| params.to_string().contains(NAME));
            params.contains(NAME) || params.contains(r"\u") && is_escaped()
        })
    }
}

/// What a walk over a body finds.
pub(super) struct Found<'a> {
    pub(super) model: Option<Cow<'a, str>>,
    /// None: a field is given twice.
    pub(super) fields: Option<Fields<'a>>,
}

/// Walks over a body. `keeps` says whether any field but the model's name is of use.
pub(super) fn walk(body: &[u8], keeps: bool) -> serde_json::Result<Found<'_>> {
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    let found = Walk { keeps }.deserialize(&mut deserializer)?;
    deserializer.end()?;
    Ok(found)
}

struct Walk {
    keeps: bool,
}

impl Walk {
    fn kept(&self, key: &str) -> Option<&'static str> {
        let is_of_use = |name: &&&str| **name == key && (self.keeps || key == MODEL);
        KEPT.iter().find(is_of_use).copied()
    }
}

impl<'de> DeserializeSeed<'de> for Walk {
    type Value = Found<'de>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Found<'de>, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Walk {
    type Value = Found<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Found<'de>, A::Error> {
        let (mut fields, mut is_repeated) = (Fields::default(), false);
        while let Some(Text(key)) = map.next_key()? {
            let Some(name) = self.kept(&key) else {
                map.next_value::<IgnoredAny>()?;
                continue;
            };
            let value = map.next_value()?;
            if fields.given(name).is_none() {
                fields.0.push((name, value));
            } else if name == MODEL {
                return Err(A::Error::duplicate_field(MODEL));
            } else {
                is_repeated = true;
            }
        }
        let model: Option<Text<'de>> = match fields.given(MODEL) {
            Some(model) => serde_json::from_str(model.get()).map_err(A::Error::custom)?,
            None => None,
        };
        Ok(Found { model: model.map(|Text(model)| model), fields: (!is_repeated).then_some(fields) })
    }
}

/// The model's name in the beginning of a body; none where it does not stand there. It walks no further than that.
pub(super) fn model_in_beginning(body: &[u8]) -> Option<String> {
    let mut model = None;
    // An error is the usual end: the object is cut off, or nothing after the name is of use.
    let _ = serde_json::Deserializer::from_slice(body).deserialize_map(Beginning(&mut model));
    model
}

struct Beginning<'m>(&'m mut Option<String>);

impl<'de> Visitor<'de> for Beginning<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(Text(key)) = map.next_key()? {
            if key == MODEL {
                *self.0 = map.next_value()?;
                return Ok(());
            }
            map.next_value::<IgnoredAny>()?;
        }
        Ok(())
    }
}

/// Writes a JSON object of fields whose values are already JSON text.
pub(super) struct JsonObject(Vec<u8>);

impl JsonObject {
    pub(super) fn new(capacity: usize) -> Self {
        Self(Vec::with_capacity(capacity))
    }

    /// Adds a field; `name` needs no escaping.
    pub(super) fn field(&mut self, name: &str, json: &str) {
        self.0.push(if self.0.is_empty() { b'{' } else { b',' });
        self.0.extend_from_slice(b"\"");
        self.0.extend_from_slice(name.as_bytes());
        self.0.extend_from_slice(b"\":");
        self.0.extend_from_slice(json.as_bytes());
    }

    /// Copies fields that have a value, byte for byte.
    pub(super) fn copy(&mut self, fields: &Fields<'_>, names: &[&str]) {
        for name in names {
            if let Some(value) = fields.get(name) {
                self.field(name, value.get());
            }
        }
    }

    /// Copies fields byte for byte, `null` included: to the engine's APIs it is not always the same as no field.
    pub(super) fn copy_given(&mut self, fields: &Fields<'_>, names: &[&str]) {
        for name in names {
            if let Some(value) = fields.given(name) {
                self.field(name, value.get());
            }
        }
    }

    pub(super) fn finish(mut self) -> Vec<u8> {
        if self.0.is_empty() {
            self.0.push(b'{');
        }
        self.0.push(b'}');
        self.0
    }
}

/// JSON text of a string.
pub(super) fn json_string(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}
