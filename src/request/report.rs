//! `vllm_xargs.kv_cache_report_mode`: how much of a request's cached prefix the engine announces.
//!
//! With `full` (vLLM 0.26 and later) the engine announces the blocks that a request reuses, which it otherwise keeps to
//! itself. Whether that happens is for the router to say: an announcement that the router did not ask for looks like a
//! further copy of each block (`docs/architecture.md`). A client's own field is therefore taken out of every body.
//!
//! A body is edited as text: all other bytes stay as they are, duplicates, unknown fields and odd whitespace included.
//! Cost is one walk over the body, and none where the field's name does not occur in it; deep nesting costs no stack.

use std::fmt;
use std::ops::Range;

use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

/// Field of the body in which vLLM takes engine-specific arguments.
const ARGUMENTS: &str = "vllm_xargs";
/// The argument that says what is announced.
const MODE: &str = "kv_cache_report_mode";
/// The argument as the router writes it.
const FULL: &str = r#""kv_cache_report_mode":"full""#;
/// Most bytes that [`with_full_report`] adds to a body.
pub const MAX_ADDED_BYTES: usize = r#""vllm_xargs":{},"#.len() + FULL.len();

/// The body without a client's report mode; none when it has no such field, or is not a JSON object.
pub fn without_report_mode(body: &[u8]) -> Option<Vec<u8>> {
    let body = std::str::from_utf8(body).ok()?;
    if !may_name_the_mode(body) {
        return None;
    }
    let mut cuts = Cuts::new(body);
    for arguments in members(body, ARGUMENTS)? {
        let given = &body[arguments.value.clone()];
        let Some(modes) = members(given, MODE).filter(|modes| !modes.is_empty()) else { continue };
        let mut inner = Cuts::new(given);
        modes.iter().for_each(|mode| inner.drop(mode));
        let rest = inner.finish();
        if is_empty_object(&rest) { cuts.drop(&arguments) } else { cuts.replace(&arguments.value, &rest) }
    }
    cuts.is_any().then(|| cuts.finish().into_bytes())
}

/// The body with the router's own request for a full report, instead of whatever the client wrote; none when there is
/// no place for it: the body is not a JSON object, or its `vllm_xargs` is something that the engine will refuse.
pub fn with_full_report(body: &[u8]) -> Option<Vec<u8>> {
    let stripped = without_report_mode(body);
    let body = std::str::from_utf8(stripped.as_deref().unwrap_or(body)).ok()?;
    // Of a field that is given twice, Python takes the last.
    let mut cuts = Cuts::new(body);
    match members(body, ARGUMENTS)?.pop() {
        Some(arguments) => {
            let given = &body[arguments.value.clone()];
            let extended = if given == "null" { format!("{{{FULL}}}") } else { with_first_member(given, FULL)? };
            cuts.replace(&arguments.value, &extended);
            Some(cuts.finish().into_bytes())
        }
        None => with_first_member(body, &format!(r#""{ARGUMENTS}":{{{FULL}}}"#)).map(String::into_bytes),
    }
}

/// Whether the name occurs at all: as it is, or with escapes, which for its letters all begin alike.
fn may_name_the_mode(body: &str) -> bool {
    body.contains(MODE) || body.contains("\\u00")
}

/// Where a member of an object lies in its text.
struct Member {
    key: Range<usize>,
    value: Range<usize>,
}

/// The members of a JSON object that have a name, in their order; none when `object` is not one.
fn members(object: &str, name: &str) -> Option<Vec<Member>> {
    struct Named<'a>(&'a str, &'a str);

    impl<'de> Visitor<'de> for Named<'_> {
        type Value = Vec<Member>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let Self(object, name) = self;
            let mut found = Vec::new();
            while let Some((key, value)) = map.next_entry::<&RawValue, &RawValue>()? {
                if is_named(key, name) {
                    found.push(Member { key: range_in(object, key), value: range_in(object, value) });
                }
            }
            Ok(found)
        }
    }

    let mut deserializer = serde_json::Deserializer::from_str(object);
    let found = deserializer.deserialize_map(Named(object, name)).ok()?;
    deserializer.end().ok()?;
    Some(found)
}

/// A key may spell its letters as escapes.
fn is_named(key: &RawValue, name: &str) -> bool {
    let plain = key.get().trim_matches('"');
    plain == name || plain.contains('\\') && String::deserialize(key).is_ok_and(|key| key == name)
}

/// Where a part that borrows from `text` lies in it.
fn range_in(text: &str, part: &RawValue) -> Range<usize> {
    let start = part.get().as_ptr().addr() - text.as_ptr().addr();
    start..start + part.get().len()
}

/// Puts `member` in front of an object's members; none when `object` is not one.
fn with_first_member(object: &str, member: &str) -> Option<String> {
    let (before, members) = object.split_once('{').filter(|(before, _)| before.chars().all(is_space))?;
    let comma = if members.trim_start_matches(is_space).starts_with('}') { "" } else { "," };
    Some(format!("{before}{{{member}{comma}{members}"))
}

fn is_empty_object(text: &str) -> bool {
    let inner = text.strip_prefix('{').and_then(|rest| rest.strip_suffix('}'));
    inner.is_some_and(|inner| inner.chars().all(is_space))
}

/// JSON's whitespace, which is less than Unicode's.
fn is_space(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\n' | '\r')
}

/// Writes a JSON object without some of its members, from its start to its end.
struct Cuts<'a> {
    text: &'a str,
    written: String,
    /// Up to here the text is dealt with.
    end: usize,
}

impl<'a> Cuts<'a> {
    fn new(text: &'a str) -> Self {
        Self { text, written: String::new(), end: 0 }
    }

    fn is_any(&self) -> bool {
        self.end > 0
    }

    fn replace(&mut self, part: &Range<usize>, by: &str) {
        self.written.push_str(&self.text[self.end..part.start]);
        self.written.push_str(by);
        self.end = part.end;
    }

    /// Leaves a member out, together with the comma behind it or, for the last member, the one in front.
    fn drop(&mut self, member: &Member) {
        self.replace(&(member.key.start..member.value.end), "");
        let rest = &self.text[self.end..];
        let next = rest.trim_start_matches(is_space);
        if let Some(behind) = next.strip_prefix(',') {
            self.end = self.text.len() - behind.trim_start_matches(is_space).len();
        } else {
            let kept = self.written.trim_end_matches(is_space);
            let kept = kept.strip_suffix(',').unwrap_or(kept).len();
            self.written.truncate(kept);
        }
    }

    fn finish(mut self) -> String {
        self.written.push_str(&self.text[self.end..]);
        self.written
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn stripped(body: &str) -> Option<String> {
        without_report_mode(body.as_bytes()).map(|body| String::from_utf8(body).expect("text stays text"))
    }

    fn full(body: &str) -> Option<String> {
        with_full_report(body.as_bytes()).map(|body| String::from_utf8(body).expect("text stays text"))
    }

    #[test]
    fn a_clients_mode_is_cut_out_and_nothing_else_changes() {
        for (body, expected) in [
            (r#"{"vllm_xargs":{"kv_cache_report_mode":"full"}}"#, "{}"),
            (r#"{"a":1,"vllm_xargs":{"kv_cache_report_mode":"full"}}"#, r#"{"a":1}"#),
            (r#"{"vllm_xargs":{"kv_cache_report_mode":"full"}, "a":1}"#, r#"{"a":1}"#),
            (r#"{"a" : 1.50 , "vllm_xargs" : { "kv_cache_report_mode" : 7 } , "b":[ ]}"#, r#"{"a" : 1.50 , "b":[ ]}"#),
            (r#"{"vllm_xargs":{"x":1,"kv_cache_report_mode":"full"}}"#, r#"{"vllm_xargs":{"x":1}}"#),
            (r#"{"vllm_xargs":{"kv_cache_report_mode":null,"x":"é\n"}}"#, r#"{"vllm_xargs":{"x":"é\n"}}"#),
            (r#"{"vllm_xargs":{"x":1,"kv_cache_report_mode":"full","y":2}}"#, r#"{"vllm_xargs":{"x":1,"y":2}}"#),
            // Given twice, inside and outside: all are cut, the others keep their order.
            (
                r#"{"vllm_xargs":{"kv_cache_report_mode":1,"kv_cache_report_mode":2,"x":1}}"#,
                r#"{"vllm_xargs":{"x":1}}"#,
            ),
            (
                r#"{"vllm_xargs":{"x":1,"kv_cache_report_mode":1,"kv_cache_report_mode":2}}"#,
                r#"{"vllm_xargs":{"x":1}}"#,
            ),
            (
                r#"{"a":1,"a":2,"vllm_xargs":{"kv_cache_report_mode":1},"vllm_xargs":{"kv_cache_report_mode":2}}"#,
                r#"{"a":1,"a":2}"#,
            ),
            (
                r#"{"vllm_xargs":{"kv_cache_report_mode":1},"vllm_xargs":{"x":1},"vllm_xargs":{"kv_cache_report_mode":2},"a":1}"#,
                r#"{"vllm_xargs":{"x":1},"a":1}"#,
            ),
            // Escapes are another spelling of the same name.
            (r#"{"vllm_x\u0061rgs":{"kv_cache_report_mod\u0065":"full"},"a":"\ud800"}"#, r#"{"a":"\ud800"}"#),
            (" \n{\"vllm_xargs\":{\"kv_cache_report_mode\":\"full\"},\n \"a\":1}\t", " \n{\"a\":1}\t"),
        ] {
            assert_eq!(stripped(body).as_deref(), Some(expected), "{body}");
            assert_eq!(stripped(expected), None, "{expected} has nothing more to cut");
        }
    }

    #[test]
    fn bodies_without_the_mode_are_left_alone() {
        for body in [
            "",
            "{}",
            "[]",
            "{broken",
            r#"{"vllm_xargs":{}}"#,
            r#"{"vllm_xargs":{"x":"kv_cache_report_mode"}}"#,
            r#"{"vllm_xargs":"kv_cache_report_mode"}"#,
            r#"{"vllm_xargs":["kv_cache_report_mode"]}"#,
            r#"{"kv_cache_report_mode":"full"}"#,
            r#"{"prompt":"{\"vllm_xargs\":{\"kv_cache_report_mode\":\"full\"}}"}"#,
            r#"{"messages":[{"vllm_xargs":{"kv_cache_report_mode":"full"}}]}"#,
            r#"[{"vllm_xargs":{"kv_cache_report_mode":"full"}}]"#,
            r#"{"vllm_xargs":{"kv_cache_report_mode":"full"}} {}"#,
            r#"{"vllm_xargs":{"kv_cache_report_mode":"full"}"#,
        ] {
            assert_eq!(stripped(body), None, "{body}");
        }
        assert_eq!(without_report_mode(b"{\"vllm_xargs\":{\"kv_cache_report_mode\":\"full\"},\"a\":\"\xff\"}"), None);
    }

    #[test]
    fn a_full_report_is_asked_for_wherever_the_engine_looks() {
        for (body, expected) in [
            ("{}", r#"{"vllm_xargs":{"kv_cache_report_mode":"full"}}"#),
            (" { } ", r#" {"vllm_xargs":{"kv_cache_report_mode":"full"} } "#),
            (r#"{"a":1}"#, r#"{"vllm_xargs":{"kv_cache_report_mode":"full"},"a":1}"#),
            (r#"{"a":1,"vllm_xargs":{}}"#, r#"{"a":1,"vllm_xargs":{"kv_cache_report_mode":"full"}}"#),
            (r#"{"vllm_xargs":null}"#, r#"{"vllm_xargs":{"kv_cache_report_mode":"full"}}"#),
            (r#"{"vllm_xargs": { "x":1}}"#, r#"{"vllm_xargs": {"kv_cache_report_mode":"full", "x":1}}"#),
            (
                r#"{"vllm_xargs":{"x":1},"vllm_xargs":{"kv_cache_report_mode":"incremental","y":2}}"#,
                r#"{"vllm_xargs":{"x":1},"vllm_xargs":{"kv_cache_report_mode":"full","y":2}}"#,
            ),
        ] {
            let found = full(body).expect("there is a place for it");
            assert_eq!(found, expected, "{body}");
            assert!(found.len() <= body.len() + MAX_ADDED_BYTES, "{body}");
            let value: Value = serde_json::from_str(&found).expect("still JSON");
            assert_eq!(value["vllm_xargs"]["kv_cache_report_mode"], "full", "{body}");
        }
        for body in ["", "[]", "{broken", r#"{"vllm_xargs":[1]}"#, r#"{"vllm_xargs":"x"}"#, r#"{"a":1}}"#] {
            assert_eq!(full(body), None, "{body}");
        }
    }

    #[test]
    fn long_and_deep_bodies_cost_neither_stack_nor_squares() {
        let deep = format!("{}{}", "[".repeat(200_000), "]".repeat(200_000));
        let body = format!(r#"{{"a":{deep},"vllm_xargs":{{"kv_cache_report_mode":{deep}}}}}"#);
        assert_eq!(stripped(&body), Some(format!(r#"{{"a":{deep}}}"#)));
        let many = r#""vllm_xargs":{"kv_cache_report_mode":1},"#.repeat(100_000);
        assert_eq!(stripped(&format!(r#"{{{many}"a":1}}"#)).as_deref(), Some(r#"{"a":1}"#));
    }

    proptest::proptest! {
        /// Objects of every shape: what is left is what a JSON library would leave, whatever the spelling.
        #[test]
        fn editing_text_equals_editing_values(
            others in proptest::collection::vec(("[a-c]{0,2}", proptest::prelude::any::<i8>()), 0..4),
            arguments in proptest::option::of(proptest::collection::vec("(x|y|kv_cache_report_mode)", 0..4)),
            place in 0_usize..4,
            pretty in proptest::prelude::any::<bool>(),
        ) {
            let mut object = serde_json::Map::from_iter(others.into_iter().map(|(name, value)| (name, json!(value))));
            if let Some(names) = &arguments {
                let given: Value = names.iter().map(|name| (name.clone(), json!(1))).collect();
                object.insert(ARGUMENTS.to_owned(), given);
            }
            let mut members: Vec<_> = object.iter().collect();
            let n_turns = place.min(members.len());
            members.rotate_left(n_turns);
            let space = if pretty { "\n  " } else { "" };
            let texts: Vec<String> = members.iter().map(|(name, value)| {
                let value = if pretty { serde_json::to_string_pretty(value) } else { serde_json::to_string(value) };
                format!("{space}\"{name}\"{space}:{space}{}{space}", value.expect("a value"))
            }).collect();
            let body = format!("{{{}{space}}}", texts.join(","));

            let mut expected = Value::Object(object.clone());
            let has_mode = arguments.is_some_and(|names| names.iter().any(|name| name == MODE));
            if has_mode {
                let arguments = expected[ARGUMENTS].as_object_mut().expect("it is an object");
                arguments.remove(MODE);
                if arguments.is_empty() {
                    expected.as_object_mut().expect("it is an object").remove(ARGUMENTS);
                }
            }
            let found = stripped(&body);
            proptest::prop_assert_eq!(found.is_some(), has_mode);
            let found: Value = serde_json::from_str(found.as_deref().unwrap_or(&body)).expect("still JSON");
            proptest::prop_assert_eq!(found, expected);
            let asked: Value = serde_json::from_str(&full(&body).expect("a place")).expect("still JSON");
            proptest::prop_assert_eq!(&asked[ARGUMENTS][MODE], "full");
        }
    }
}
