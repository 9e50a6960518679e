//! JSON as Python's `json.loads` reads it.
//!
//! A chat template prints tools and arguments, so each key's place and each number's digits end up as tokens. Objects
//! keep the client's order (a repeated key keeps its first place and its last value, as in a `dict`). Numbers that
//! Python holds and we do not (integers beyond 64 bits) fail where they are used.

use std::collections::HashMap;
use std::fmt;

use minijinja::Value;
use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

/// From here on a float may have been an integer of more than 64 bits, which Python would print in full.
const FLOAT_LIMIT: f64 = 9_007_199_254_740_992.0;

/// A JSON value.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Json {
    Null,
    Bool(bool),
    Int(i64),
    Uint(u64),
    Float(f64),
    /// A number of more than 64 bits, or one that may have been one.
    Big,
    Str(String),
    List(Vec<Json>),
    Object(Object),
}

/// An object whose keys keep their order.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Object(pub(super) Vec<(String, Json)>);

impl Object {
    /// Objects with more keys than this look a repeated key up in an index instead of walking over all others.
    const FEW: usize = 16;

    pub(super) fn get(&self, key: &str) -> Option<&Json> {
        self.0.iter().find(|(name, _)| name == key).map(|(_, value)| value)
    }

    /// Takes a field out.
    pub(super) fn take(&mut self, key: &str) -> Option<Json> {
        let at = self.0.iter().position(|(name, _)| name == key)?;
        Some(self.0.remove(at).1)
    }

    /// The object with these fields before its own.
    pub(super) fn behind<const N: usize>(self, first: [(&str, Json); N]) -> Self {
        let first = first.into_iter().map(|(name, value)| (name.to_owned(), value));
        Self(first.chain(self.0).collect())
    }

    pub(super) fn push(&mut self, key: &str, value: Json) {
        self.0.push((key.to_owned(), value));
    }
}

impl Json {
    pub(super) fn text(text: impl Into<String>) -> Self {
        Self::Str(text.into())
    }

    pub(super) fn is_null(&self) -> bool {
        matches!(self, Self::Null)
    }

    fn has_big(&self) -> bool {
        match self {
            Self::Big => true,
            Self::List(items) => items.iter().any(Self::has_big),
            Self::Object(object) => object.0.iter().any(|(_, value)| value.has_big()),
            _ => false,
        }
    }

    /// The value as a chat template sees it.
    pub(super) fn into_value(self) -> Value {
        match self {
            Self::Null => Value::from(()),
            Self::Bool(flag) => Value::from(flag),
            Self::Int(number) => Value::from(number),
            Self::Uint(number) => Value::from(number),
            Self::Float(number) => Value::from(number),
            Self::Big => Value::from(super::dumps::not_json("a number of more than 64 bits")),
            Self::Str(text) => Value::from(text),
            Self::List(items) => items.into_iter().map(Self::into_value).collect(),
            Self::Object(object) => {
                Value::from_pairs(object.0.into_iter().map(|(key, value)| (key, value.into_value())))
            }
        }
    }
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(JsonVisitor)
    }
}

struct JsonVisitor;

impl<'de> Visitor<'de> for JsonVisitor {
    type Value = Json;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Json, E> {
        Ok(Json::Null)
    }

    fn visit_bool<E>(self, flag: bool) -> Result<Json, E> {
        Ok(Json::Bool(flag))
    }

    fn visit_i64<E>(self, number: i64) -> Result<Json, E> {
        Ok(Json::Int(number))
    }

    fn visit_u64<E>(self, number: u64) -> Result<Json, E> {
        Ok(Json::Uint(number))
    }

    fn visit_f64<E>(self, number: f64) -> Result<Json, E> {
        let is_negative_zero = number == 0.0 && number.is_sign_negative();
        Ok(if number.abs() < FLOAT_LIMIT && !is_negative_zero { Json::Float(number) } else { Json::Big })
    }

    fn visit_str<E>(self, text: &str) -> Result<Json, E> {
        Ok(Json::Str(text.to_owned()))
    }

    fn visit_string<E>(self, text: String) -> Result<Json, E> {
        Ok(Json::Str(text))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Json, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            items.push(item);
        }
        Ok(Json::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Json, A::Error> {
        let mut fields: Vec<(String, Json)> = Vec::new();
        let mut index = HashMap::new();
        while let Some((key, value)) = map.next_entry::<String, Json>()? {
            if fields.len() == Object::FEW {
                index = fields.iter().enumerate().map(|(at, (name, _))| (name.clone(), at)).collect();
            }
            let known = match fields.len() {
                n if n < Object::FEW => fields.iter().position(|(name, _)| *name == key),
                _ => index.get(&key).copied(),
            };
            match known {
                Some(at) => fields[at].1 = value,
                None => {
                    if fields.len() >= Object::FEW {
                        index.insert(key.clone(), fields.len());
                    }
                    fields.push((key, value));
                }
            }
        }
        Ok(Json::Object(Object(fields)))
    }
}

/// Longest text that is read number by number, which takes as many passes as there are levels of nesting.
const MAX_EXACT: usize = 256 << 10;

/// Reads a text. Only where a number may have lost digits, it is read again, slower, with an eye on how each number is
/// written. In a long text such a number stays [`Json::Big`], which no template can use.
pub(super) fn read(text: &str) -> serde_json::Result<Json> {
    let json: Json = serde_json::from_str(text)?;
    if json.has_big() && text.len() <= MAX_EXACT { exact(serde_json::from_str(text)?) } else { Ok(json) }
}

/// Reads every number by its text: with a point or an exponent it is a float for Python, otherwise an integer of any
/// length.
fn exact(raw: &RawValue) -> serde_json::Result<Json> {
    let text = raw.get();
    match text.as_bytes().first() {
        Some(b'[') => {
            let items: Vec<&RawValue> = serde_json::from_str(text)?;
            Ok(Json::List(items.into_iter().map(exact).collect::<Result<_, _>>()?))
        }
        Some(b'{') => {
            let Json::Object(mut object) = serde_json::from_str(text)? else { return Ok(Json::Big) };
            let mut fields: HashMap<String, &RawValue> = serde_json::from_str(text)?;
            for (name, value) in &mut object.0 {
                if let Some(raw) = fields.remove(name) {
                    *value = exact(raw)?;
                }
            }
            Ok(Json::Object(object))
        }
        Some(b'-' | b'0'..=b'9') if text.contains(['.', 'e', 'E']) => {
            Ok(text.parse().ok().filter(|number: &f64| number.is_finite()).map_or(Json::Big, Json::Float))
        }
        Some(b'-' | b'0'..=b'9') => {
            Ok(text.parse().map(Json::Uint).or_else(|_| text.parse().map(Json::Int)).unwrap_or(Json::Big))
        }
        _ => serde_json::from_str(text),
    }
}

/// What Python's `json.loads` makes of the arguments of a tool call (vLLM 0.32.0 `_postprocess_messages`): an object as
/// it is; any other value, and text that is no JSON, become an empty object. None where Python would go on and we
/// cannot.
pub(super) fn arguments(text: &str) -> Option<Object> {
    match read(text) {
        Ok(Json::Object(object)) => Some(object),
        Ok(_) => Some(Object::default()),
        Err(error) if reads_in_python_alone(text, &error) => None,
        Err(_) => Some(Object::default()),
    }
}

/// Python reads NaN, infinities, lone surrogates, any number of digits and deeper nesting.
fn reads_in_python_alone(text: &str, error: &serde_json::Error) -> bool {
    let lower = text.to_ascii_lowercase();
    ["nan", "infinity", "\\ud"].iter().any(|word| lower.contains(word))
        || ["number out of range", "recursion limit"].iter().any(|cause| error.to_string().contains(cause))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_keys_keep_their_order_and_their_last_value() {
        let fields: Vec<String> =
            (0..40).chain([3, 30]).enumerate().map(|(at, key)| format!("\"k{key}\":{at}")).collect();
        let Ok(Json::Object(object)) = serde_json::from_str(&format!("{{{}}}", fields.join(","))) else {
            panic!("an object")
        };
        let names: Vec<&str> = object.0.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, (0..40).map(|key| format!("k{key}")).collect::<Vec<_>>());
        assert_eq!((object.get("k3"), object.get("k30")), (Some(&Json::Uint(40)), Some(&Json::Uint(41))));
    }

    #[test]
    fn long_texts_are_read_once() {
        let padded = |n: usize| format!("{{\"pad\":\"{}\",\"n\":1e22}}", "x".repeat(n));
        let number = |text: &str| match read(text) {
            Ok(Json::Object(object)) => object.get("n").cloned(),
            _ => None,
        };
        assert_eq!(number(&padded(10)), Some(Json::Float(1e22)));
        assert_eq!(number(&padded(MAX_EXACT)), Some(Json::Big));
    }

    #[test]
    fn arguments_that_are_no_object_become_an_empty_one_unless_python_reads_more() {
        let object = |text: &str| arguments(text).map(|object| object.0.len());
        assert_eq!(object(r#"{"a": 1}"#), Some(1));
        for coerced in ["[]", "42", "{", "not json", r#"{"a": 01}"#] {
            assert_eq!(object(coerced), Some(0), "{coerced}");
        }
        let deep = format!("{{\"a\":{}{}}}", "[".repeat(200), "]".repeat(200));
        for unsure in [r#"{"a": NaN}"#, r#"{"a": -Infinity}"#, r#"{"a": "\ud800"}"#, r#"{"a": 1e999}"#, &deep] {
            assert_eq!(object(unsure), None, "{unsure}");
        }
    }
}
