//! A small deterministic tokenizer and a ChatML-like template.
//!
//! It knows no language: special tokens, single bytes, 4096 two-syllable words of one token each, and
//! everything else in pieces of up to six letters, hashed into a fixed range. What the simulated model
//! says consists of those words, so an answer that comes back in the next turn has the tokens that were
//! generated, and the blocks they filled are hit, as with a real tokenizer most of the time.

use serde_json::Value;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};

/// Begin of sequence, added to completion prompts.
pub const BOS: u32 = 1;
const SPECIALS: [&str; 7] = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|tool|>"];
const FIRST_BYTE: u32 = 7;
const FIRST_WORD: u32 = 512;
/// Number of words that are one token each.
pub const N_WORDS: u32 = 4096;
const FIRST_PIECE: u32 = FIRST_WORD + N_WORDS;
const N_PIECES: u32 = 27_000;
const MAX_PIECE: usize = 6;
const CONSONANTS: &[u8; 16] = b"bdfghjklmnprstvz";
const VOWELS: &[u8; 4] = b"aeio";

/// The `idx`-th word of the vocabulary, modulo its size.
pub fn word(idx: u32) -> String {
    let syllable = |bits: u32| {
        let consonant = CONSONANTS[(bits >> 2 & 15) as usize];
        [char::from(consonant), char::from(VOWELS[(bits & 3) as usize])]
    };
    [idx >> 6, idx].into_iter().flat_map(syllable).collect()
}

/// The token of the `idx`-th word, with the space before it.
pub fn word_token(idx: u32) -> u32 {
    FIRST_WORD + idx % N_WORDS
}

/// The text of a generated token.
pub fn text(token: u32) -> String {
    match token.checked_sub(FIRST_WORD) {
        Some(idx) if idx < N_WORDS => format!(" {}", word(idx)),
        _ => String::new(),
    }
}

/// Splits `text` into tokens, special tokens included.
pub fn encode(text: &str) -> Vec<u32> {
    let mut tokens = Vec::with_capacity(text.len() / 4);
    let mut rest = text;
    while !rest.is_empty() {
        let special = next_special(rest);
        let plain = special.map_or(rest.len(), |(at, _)| at);
        encode_plain(&rest[..plain], &mut tokens);
        let Some((at, id)) = special else { break };
        tokens.push(id);
        rest = &rest[at + SPECIALS[id as usize].len()..];
    }
    tokens
}

/// Renders `messages` as the model's prompt.
pub fn render_chat(chat: &Chat<'_>) -> String {
    let mut out = String::new();
    if !chat.tools.is_empty() {
        out.push_str("<|im_start|>system\n<|tool|>");
        for tool in chat.tools {
            out.push_str(&tool.to_string());
            out.push('\n');
        }
        out.push_str("<|im_end|>\n");
    }
    for message in chat.messages {
        let role = message["role"].as_str().unwrap_or_default();
        out.push_str(&format!("<|im_start|>{role}\n{}", content(&message["content"])));
        if let Some(calls) = message.get("tool_calls").filter(|calls| !calls.is_null()) {
            out.push_str(&calls.to_string());
        }
        out.push_str("<|im_end|>\n");
    }
    match chat.ending {
        Ending::Closed => {}
        Ending::Continue => out.truncate(out.len() - "<|im_end|>\n".len()),
        Ending::Answer { thinking: true } => out.push_str("<|im_start|>assistant\n"),
        Ending::Answer { thinking: false } => {
            out.push_str("<|im_start|>assistant\n<think></think>\n");
        }
    }
    out
}

/// What a chat prompt is made of.
#[derive(Debug)]
pub struct Chat<'a> {
    /// `messages` of the body, at least one.
    pub messages: &'a [Value],
    /// `tools` of the body.
    pub tools: &'a [Value],
    /// How the prompt ends.
    pub ending: Ending,
}

/// How a chat prompt ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// After the last message (`add_generation_prompt: false`).
    Closed,
    /// Inside the last message (`continue_final_message`).
    Continue,
    /// With the header of the answer.
    Answer {
        /// `enable_thinking`, by default true.
        thinking: bool,
    },
}

fn content(content: &Value) -> String {
    match content {
        Value::String(text) => text.clone(),
        Value::Array(parts) => {
            let texts: Vec<&str> = parts.iter().filter_map(|part| part["text"].as_str()).collect();
            texts.join("\n")
        }
        _ => String::new(),
    }
}

fn next_special(text: &str) -> Option<(usize, u32)> {
    let found = SPECIALS.iter().zip(0..).filter_map(|(special, id)| Some((text.find(special)?, id)));
    found.min()
}

fn encode_plain(mut text: &str, tokens: &mut Vec<u32>) {
    while let Some(first) = text.chars().next() {
        let space = usize::from(first == ' ');
        let letters = text[space..].find(|c: char| !c.is_alphanumeric()).unwrap_or(text.len() - space);
        if letters == 0 {
            let bytes = &text.as_bytes()[..first.len_utf8()];
            tokens.extend(bytes.iter().map(|byte| FIRST_BYTE + u32::from(*byte)));
            text = &text[first.len_utf8()..];
            continue;
        }
        encode_word(&text[..space + letters], tokens);
        text = &text[space + letters..];
    }
}

fn encode_word(word: &str, tokens: &mut Vec<u32>) {
    if let Some(idx) = word.strip_prefix(' ').and_then(word_idx) {
        tokens.push(word_token(idx));
        return;
    }
    let letters: Vec<char> = word.chars().collect();
    for piece in letters.chunks(MAX_PIECE) {
        let hash = BuildHasherDefault::<DefaultHasher>::default().hash_one(piece);
        tokens.push(FIRST_PIECE + (hash % u64::from(N_PIECES)) as u32);
    }
}

fn word_idx(word: &str) -> Option<u32> {
    let bytes: &[u8; 4] = word.as_bytes().try_into().ok()?;
    let bits = |consonant: u8, vowel: u8| {
        let consonant = CONSONANTS.iter().position(|c| *c == consonant)?;
        let vowel = VOWELS.iter().position(|v| *v == vowel)?;
        Some((consonant << 2 | vowel) as u32)
    };
    Some(bits(bytes[0], bytes[1])? << 6 | bits(bytes[2], bytes[3])?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_is_one_token_and_reads_back() {
        for idx in 0..N_WORDS {
            assert_eq!(encode(&text(word_token(idx))), [word_token(idx)], "{}", word(idx));
        }
    }

    #[test]
    fn tokens_do_not_depend_on_what_follows() {
        let whole = encode("<|im_start|>user\nhello kato, naïve 日本語<|im_end|>");
        let start = encode("<|im_start|>user\nhello kato,");
        assert_eq!(whole[..start.len()], start);
        assert_eq!((whole[0], whole[whole.len() - 1]), (4, 5));
    }
}
