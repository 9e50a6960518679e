//! The thoughts that a client sends back: `reasoning_content` of a message, which is the old name of `reasoning`.
//!
//! vLLM renames the field of a chat request before it reads the messages (0.32.0, `openai/chat_completion/protocol.py`,
//! `_normalize_messages_before`). `/tokenize` does not: the chat template would not see the thoughts, and the ids would
//! be those of another prompt.

use std::borrow::Cow;
use std::fmt;

use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

const OLD: &str = "reasoning_content";
const NEW: &str = "reasoning";

/// JSON text of the messages as the engine reads them in a chat request; nothing is copied where nothing changes.
pub(super) fn renamed(messages: &str) -> Cow<'_, str> {
    // A name may also be written with escapes.
    if !messages.contains(OLD) && !messages.contains(r"\u") {
        return Cow::Borrowed(messages);
    }
    // What is no list of objects the engine refuses.
    let Ok(list) = serde_json::from_str::<Vec<&RawValue>>(messages) else { return Cow::Borrowed(messages) };
    let list: Vec<Cow<'_, str>> = list.into_iter().map(|message| renamed_in(message.get())).collect();
    if list.iter().all(|message| matches!(message, Cow::Borrowed(_))) {
        return Cow::Borrowed(messages);
    }
    Cow::Owned(format!("[{}]", list.join(",")))
}

/// The new name wins when a message has both; of a name that is given twice the engine takes the last.
fn renamed_in(message: &str) -> Cow<'_, str> {
    let Ok(Members(mut members)) = serde_json::from_str(message) else { return Cow::Borrowed(message) };
    let last = |name: &str| members.iter().rev().find(|member| member.name == name).map(|member| member.value);
    let Some(old) = last(OLD) else { return Cow::Borrowed(message) };
    let is_taken = last(NEW).is_some_and(|new| new.get() != "null");
    members.retain(|member| member.name != OLD && (is_taken || member.name != NEW));
    if !is_taken {
        members.push(Member { name: NEW.into(), value: old });
    }
    let members: Vec<String> = members.iter().map(Member::json).collect();
    Cow::Owned(format!("{{{}}}", members.join(",")))
}

struct Member<'a> {
    name: Cow<'a, str>,
    value: &'a RawValue,
}

impl Member<'_> {
    fn json(&self) -> String {
        format!("{}:{}", super::fields::json_string(&self.name), self.value.get())
    }
}

/// The members of an object, in their order.
struct Members<'a>(Vec<Member<'a>>);

impl<'de> Deserialize<'de> for Members<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

        struct Object;

        impl<'de> Visitor<'de> for Object {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::new();
                while let Some((Name(name), value)) = object.next_entry()? {
                    members.push(Member { name, value });
                }
                Ok(Members(members))
            }
        }

        deserializer.deserialize_map(Object)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thoughts_get_their_new_name_and_nothing_else_changes() {
        for (messages, expected) in [
            (r#"[{"reasoning_content":"a"}]"#, r#"[{"reasoning":"a"}]"#),
            (
                r#"[ {"role":"user", "content" : "é\n"}, {"role":"assistant","reasoning_content":"a","content":1.50} ]"#,
                r#"[{"role":"user", "content" : "é\n"},{"role":"assistant","content":1.50,"reasoning":"a"}]"#,
            ),
            (r#"[{"reasoning":"n","reasoning_content":"o"}]"#, r#"[{"reasoning":"n"}]"#),
            (r#"[{"reasoning":"","reasoning_content":"o"}]"#, r#"[{"reasoning":""}]"#),
            (r#"[{"reasoning":null,"reasoning_content":"o"}]"#, r#"[{"reasoning":"o"}]"#),
            (r#"[{"reasoning_content":"o","reasoning_content":"p"}]"#, r#"[{"reasoning":"p"}]"#),
            (r#"[{"reasoning_content":null}]"#, r#"[{"reasoning":null}]"#),
            (r#"[{"reasoning\u005fcontent":"a","x\u0022":"\ud83d"}]"#, r#"[{"x\"":"\ud83d","reasoning":"a"}]"#),
        ] {
            assert_eq!(renamed(messages), expected);
        }
    }

    #[test]
    fn messages_without_thoughts_are_not_copied() {
        for messages in [
            "[]",
            r#"[ {"role" : "user","content":"reasoning_content"} ]"#,
            r#"[{"content":"\u00e9","reasoning":"n"}]"#,
            r#"["reasoning_content",1,null]"#,
            r#"{"reasoning_content":1}"#,
            r#"[{"reasoning_content":1]"#,
            "\"reasoning_content\"",
        ] {
            assert!(matches!(renamed(messages), Cow::Borrowed(same) if same == messages), "{messages}");
        }
    }
}
