//! What a conversation is made of: text, or media that an engine would have to fetch, decode or tell apart.
//!
//! Only what is known to be text passes for text. vLLM 0.32.0 (`renderers/chat_utils.py`) takes a part for media by its
//! `type` or, where that is absent or a `uuid` is given, by the key that it has, so a part is text only if neither says
//! otherwise: an image's address in a part that calls itself text must never reach an engine on our behalf.

use std::borrow::Cow;
use std::fmt;

use serde::de::{Error as _, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use super::fields::Text;

/// Parts of chat messages that vLLM renders as text.
const TEXT_PARTS: [&str; 6] = ["text", "input_text", "output_text", "refusal", "thinking", "tool_reference"];
/// Items of a Responses input that are turned into text messages (vLLM 0.32.0, `openai/responses/utils.py`), and the
/// parts that they have besides those of messages.
const TEXT_ITEMS: [&str; 6] =
    ["message", "reasoning", "function_call", "function_call_output", "custom_tool_call", "custom_tool_call_output"];
const TEXT_ITEM_PARTS: [&str; 2] = ["reasoning_text", "summary_text"];
/// Blocks of Anthropic messages that are turned into text (vLLM 0.32.0, `anthropic/serving.py`).
const TEXT_BLOCKS: [&str; 8] = [
    "text",
    "tool_use",
    "tool_result",
    "tool_reference",
    "thinking",
    "redacted_thinking",
    "tool_addition",
    "tool_removal",
];
/// Keys that make media of a part, whatever its type.
const MEDIA_KEYS: [&str; 11] = [
    "image_url",
    "input_image",
    "image_pil",
    "image_embeds",
    "audio_url",
    "input_audio",
    "audio_embeds",
    "video_url",
    "input_video",
    "video_embeds",
    "uuid",
];
const PROMPT_EMBEDS: &str = "prompt_embeds";

/// The least textual thing in a conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Content {
    /// Nothing but text.
    Text,
    /// Images, audio or video: known to the engine's cache by identifiers that a render API tells.
    Media,
    /// Embeddings in place of tokens: no API tells what the engine's cache knows them by.
    Embeddings,
}

impl Content {
    /// Of chat messages.
    pub(super) fn of_messages(messages: &RawValue) -> serde_json::Result<Self> {
        list(messages, |message| {
            let message: Part<'_> = serde_json::from_str(message.get())?;
            Ok(message.keys.max(body(message.content, chat_part)?))
        })
    }

    /// Of the `input` of a Responses request.
    pub(super) fn of_input(input: &RawValue) -> serde_json::Result<Self> {
        body(Some(input), |item| {
            let item: Part<'_> = serde_json::from_str(item.get())?;
            let mut nested = [item.content, item.output, item.summary].into_iter();
            nested.try_fold(item.of_kind(&TEXT_ITEMS, Self::Text), |found, nested| {
                Ok(found.max(body(nested, item_part)?))
            })
        })
    }

    /// Of Anthropic messages.
    pub(super) fn of_anthropic_messages(messages: &RawValue) -> serde_json::Result<Self> {
        list(messages, |message| {
            let message: Part<'_> = serde_json::from_str(message.get())?;
            Ok(message.keys.max(Self::of_blocks(message.content)?))
        })
    }

    /// Of Anthropic content blocks; the result of a tool has blocks of its own.
    pub(super) fn of_blocks(blocks: Option<&RawValue>) -> serde_json::Result<Self> {
        body(blocks, |block| {
            let block: Part<'_> = serde_json::from_str(block.get())?;
            let inner = |inner: &RawValue| {
                let inner: Part<'_> = serde_json::from_str(inner.get())?;
                Ok(inner.of_kind(&TEXT_BLOCKS, Self::Media))
            };
            Ok(block.of_kind(&TEXT_BLOCKS, Self::Media).max(body(block.content, inner)?))
        })
    }
}

fn chat_part(part: &RawValue) -> serde_json::Result<Content> {
    if part.get().starts_with('"') {
        return Ok(Content::Text);
    }
    let part: Part<'_> = serde_json::from_str(part.get())?;
    Ok(part.of_kind(&TEXT_PARTS, Content::Media))
}

fn item_part(part: &RawValue) -> serde_json::Result<Content> {
    let found: Part<'_> = serde_json::from_str(part.get())?;
    let is_items_own = found.kind.as_deref().is_some_and(|kind| TEXT_ITEM_PARTS.contains(&kind));
    if is_items_own { Ok(found.keys) } else { chat_part(part) }
}

/// A text, or a list of parts. The engine takes nothing else; what it makes of anything else we do not want to ask.
fn body(
    body: Option<&RawValue>,
    part: impl FnMut(&RawValue) -> serde_json::Result<Content>,
) -> serde_json::Result<Content> {
    let Some(body) = body else { return Ok(Content::Text) };
    match body.get().as_bytes().first() {
        Some(b'"' | b'n') => Ok(Content::Text),
        Some(b'[') => list(body, part),
        _ => Ok(Content::Media),
    }
}

fn list(
    items: &RawValue,
    mut content: impl FnMut(&RawValue) -> serde_json::Result<Content>,
) -> serde_json::Result<Content> {
    let items: Vec<&RawValue> = serde_json::from_str(items.get())?;
    items.into_iter().try_fold(Content::Text, |found, item| Ok(found.max(content(item)?)))
}

/// A message, an item of an input, or a part of one.
struct Part<'a> {
    kind: Option<Cow<'a, str>>,
    /// What the keys say, whatever the type.
    keys: Content,
    content: Option<&'a RawValue>,
    output: Option<&'a RawValue>,
    summary: Option<&'a RawValue>,
}

impl Part<'_> {
    /// What it is if `text` are the kinds of text, and one without a kind is `otherwise`.
    fn of_kind(&self, text: &[&str], otherwise: Content) -> Content {
        let of_kind = match self.kind.as_deref() {
            Some(PROMPT_EMBEDS) => Content::Embeddings,
            Some(kind) if text.contains(&kind) => Content::Text,
            Some(_) => Content::Media,
            None => otherwise,
        };
        of_kind.max(self.keys)
    }
}

impl<'de> Deserialize<'de> for Part<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(PartVisitor)
    }
}

struct PartVisitor;

impl<'de> Visitor<'de> for PartVisitor {
    type Value = Part<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a message or a part of one")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Part<'de>, A::Error> {
        let mut part = Part { kind: None, keys: Content::Text, content: None, output: None, summary: None };
        let mut has_kind = false;
        while let Some(Text(key)) = map.next_key()? {
            match &*key {
                "type" if has_kind => return Err(A::Error::duplicate_field("type")),
                "type" => {
                    has_kind = true;
                    part.kind = map.next_value::<Option<Text<'de>>>()?.map(|Text(kind)| kind);
                }
                "content" => put(&mut part.content, "content", &mut map)?,
                "output" => put(&mut part.output, "output", &mut map)?,
                "summary" => put(&mut part.summary, "summary", &mut map)?,
                PROMPT_EMBEDS => part.keys = part.keys.max(of_key(Content::Embeddings, &mut map)?),
                key if MEDIA_KEYS.contains(&key) => part.keys = part.keys.max(of_key(Content::Media, &mut map)?),
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(part)
    }
}

/// Of a key that is given twice Python takes the last, which we do not care to find out.
fn put<'de, A: MapAccess<'de>>(
    place: &mut Option<&'de RawValue>,
    name: &'static str,
    map: &mut A,
) -> Result<(), A::Error> {
    match place.replace(map.next_value()?) {
        Some(_) => Err(A::Error::duplicate_field(name)),
        None => Ok(()),
    }
}

/// A key without a value, as some clients write every key that they know, says nothing.
fn of_key<'de, A: MapAccess<'de>>(content: Content, map: &mut A) -> Result<Content, A::Error> {
    let value: &RawValue = map.next_value()?;
    Ok(if value.get() == "null" { Content::Text } else { content })
}
