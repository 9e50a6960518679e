//! Bytes in the place of tokens: a prompt's text, four bytes to a pseudo-token.
//!
//! No engine ever sees such ids, so they serve the index that is learned from our own picks and nothing else: equal
//! beginnings of two prompts' text are equal beginnings of their ids. Of a chat, the text is each message's JSON in
//! turn; what stands before the messages and between them is the same for all, and would make strangers look alike.
//! Costs a walk over the text and a copy.

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::request::Question;

/// Bytes per id: about as many as a token of English text has, so that a block of ids covers about a block of the
/// engine's tokens.
const BYTES: usize = 4;

#[derive(Deserialize)]
struct Body<'a> {
    #[serde(borrow)]
    messages: Option<Vec<Message<'a>>>,
    #[serde(borrow)]
    prompt: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Message<'a> {
    #[serde(borrow)]
    role: Option<&'a RawValue>,
    #[serde(borrow)]
    content: Option<&'a RawValue>,
    #[serde(borrow)]
    tool_calls: Option<&'a RawValue>,
}

/// The ids of a question's text; what does not fill an id is left out.
pub(super) fn ids(question: &Question) -> Vec<u32> {
    let text = text(&question.body).unwrap_or_else(|| question.body.clone());
    let (chunks, _) = text.as_chunks::<BYTES>();
    chunks.iter().map(|chunk| u32::from_le_bytes(*chunk)).collect()
}

/// The text; none of a question whose shape is another.
fn text(body: &[u8]) -> Option<Vec<u8>> {
    let body: Body<'_> = serde_json::from_slice(body).ok()?;
    if let Some(prompt) = body.prompt {
        return Some(prompt.get().as_bytes().to_vec());
    }
    let mut text = Vec::new();
    for message in body.messages? {
        for value in [message.role, message.content, message.tool_calls].into_iter().flatten() {
            text.extend_from_slice(value.get().as_bytes());
        }
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::TokensApi;

    fn ids_of(body: &str) -> Vec<u32> {
        ids(&Question { api: TokensApi::Tokenize, body: body.into() })
    }

    #[test]
    fn equal_beginnings_have_equal_ids() {
        let (short, long) = (ids_of(r#"{"prompt":"abcdefg"}"#), ids_of(r#"{"prompt":"abcdefg, and more"}"#));
        assert_eq!((short.len(), long.len()), (2, 4));
        assert_eq!(short[..1], long[..1]);
        assert_ne!(ids_of(r#"{"prompt":"abcdefg"}"#), ids_of(r#"{"prompt":"abcdefh"}"#));
    }

    #[test]
    fn chats_are_told_apart_by_what_is_said_and_go_on_as_they_began() {
        let first = r#"{"role":"user","content":"a question of some length"}"#;
        let turn = |messages: &str| ids_of(&format!(r#"{{"model":"tiny","messages":[{messages}],"tools":[]}}"#));
        let one = turn(first);
        let two = turn(&format!(r#"{first},{{"role":"assistant","content":"an answer"}}"#));
        assert_eq!(one[..], two[..one.len()]);
        assert_ne!(one[..4], turn(r#"{"role":"user","content":"something else"}"#)[..4]);
    }

    #[test]
    fn what_has_no_known_shape_is_taken_as_it_is() {
        assert_eq!(ids_of(r#"{"input":"a"}"#).len(), 3);
        assert!(ids_of("").is_empty());
    }
}
