//! The two small requests that make an engine publish events, and what their prompts are as tokens.
//!
//! Their text is ours and fixed, but for a number at its beginning: without it, the engine would find the blocks in its
//! cache and announce nothing.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::http::{Http, answered, from_json};
use crate::cli::doctor::seen::{Asked, Probe, ProbeKind};
use crate::engine::Question;
use crate::request::{self, Api, Prompt, ReadOptions};
use crate::tokenizer::local::LocalTokenizer;
use crate::tokenizer::render;

/// What a prompt is made of.
const WORDS: [&str; 16] = [
    "the", "router", "sends", "each", "request", "to", "the", "engine", "that", "already", "holds", "most", "of",
    "its", "prompt", ".",
];
/// Room for what a chat template adds, for the answer, and for a guess that is a little too long.
const RESERVE: usize = 64;

/// How long a prompt has to be, in tokens: two full blocks, since only full ones are announced and only a second one
/// shows how they are chained.
#[derive(Clone, Copy, Debug)]
pub(super) struct Length {
    pub(super) block_size: usize,
    pub(super) max_model_len: Option<usize>,
}

impl Length {
    fn wanted(self) -> usize {
        let most = self.max_model_len.map_or(usize::MAX, |most| most.saturating_sub(RESERVE));
        (2 * self.block_size + 1).min(most)
    }
}

impl Probe {
    /// The body, and the question that the router would ask for it.
    fn body(kind: ProbeKind, model: &str, text: &str) -> (&'static str, Value) {
        match kind {
            ProbeKind::Completion => (
                "/v1/completions",
                json!({"model": model, "prompt": text, "max_tokens": 1, "temperature": 0, "return_token_ids": true}),
            ),
            ProbeKind::Chat => (
                "/v1/chat/completions",
                json!({"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 1,
                    "temperature": 0, "return_token_ids": true}),
            ),
        }
    }
}

/// Sends a request to a rank, and asks for the tokens of its prompt as the router would.
pub(super) async fn send(
    http: &Http,
    (kind, rank, n_ranks): (ProbeKind, u32, usize),
    model: &str,
    length: Length,
    local: Option<&LocalTokenizer>,
) -> Probe {
    let number = fastrand::u64(..);
    let mut n_words = length.wanted();
    let mut tokenized = tokens(http, kind, model, &text(number, n_words)).await;
    if let Some(n_tokens) = tokenized.answer().map(Vec::len).filter(|n_tokens| *n_tokens > 0) {
        // Words are rarely one token each.
        n_words = (n_words * length.wanted()).div_ceil(n_tokens) + 1;
        tokenized = tokens(http, kind, model, &text(number, n_words)).await;
    }
    let (path, body) = Probe::body(kind, model, &text(number, n_words));
    // The header that chooses a rank (vLLM 0.32.0, `entrypoints/openai`); an engine with one rank refuses none but 0.
    let headers = if n_ranks > 1 { vec![("x-data-parallel-rank", rank.to_string())] } else { Vec::new() };
    let question = Question { json: body.to_string().into_bytes(), headers };
    let answer = answered(http.ask(path, Some(question)).await, |body| Ok(used_tokens(&from_json(body)?)));
    let local = local.map(|local| said_by(local, path, &body));
    Probe { kind, rank, answer, tokenized, local }
}

/// The tokens of a text that is the same for every engine.
pub(super) async fn fixed_tokens(http: &Http, model: &str) -> Asked<Vec<u32>> {
    tokens(http, ProbeKind::Completion, model, &text(0, 64)).await
}

async fn tokens(http: &Http, kind: ProbeKind, model: &str, text: &str) -> Asked<Vec<u32>> {
    let (path, body) = Probe::body(kind, model, text);
    let question = question(path, &body);
    let asked = Question { json: question.body, headers: Vec::new() };
    let read =
        |body: &[u8]| render::parse(question.api, body).map(|tokens| tokens.ids).map_err(|error| error.to_string());
    answered(http.ask(question.api.path(), Some(asked)).await, read)
}

fn question(path: &str, body: &Value) -> request::Question {
    let body = body.to_string().into_bytes();
    let opened = request::open(Api::of_path(path), &body).expect("the body is an object with a model");
    match opened.read(&ReadOptions::default()).prompt {
        Prompt::Text(question) => question,
        Prompt::Tokens(_) | Prompt::Opaque(_) => unreachable!("the prompt is a text and nothing else"),
    }
}

fn said_by(local: &LocalTokenizer, path: &str, body: &Value) -> Result<Vec<u32>, String> {
    local.tokenize(&question(path, body)).map(|tokens| tokens.ids).map_err(|reason| reason.as_str().to_owned())
}

/// The tokens of the prompt where the answer has them: `return_token_ids`, which old engines ignore.
fn used_tokens(answer: &Value) -> Option<Vec<u32>> {
    let found = [answer.get("prompt_token_ids"), answer.pointer("/choices/0/prompt_token_ids")];
    let tokens = found.into_iter().flatten().find(|tokens| tokens.is_array())?;
    serde_json::from_value(tokens.clone()).ok()
}

fn text(number: u64, n_words: usize) -> String {
    let mut text = format!("{number:016x} warmroute doctor:");
    for word in WORDS.iter().cycle().take(n_words) {
        let _ = write!(text, " {word}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_begins_with_its_number_and_has_its_words() {
        let text = text(0xab, 17);
        assert!(text.starts_with("00000000000000ab warmroute doctor: the router "), "{text}");
        assert!(text.ends_with(" prompt . the"), "{text}");
    }

    #[test]
    fn a_prompt_fills_two_blocks_where_the_model_allows_it() {
        let wanted = |block_size, max_model_len| Length { block_size, max_model_len }.wanted();
        assert_eq!(wanted(16, None), 33);
        assert_eq!(wanted(32, Some(4096)), 65);
        assert_eq!(wanted(1024, Some(2048)), 1984);
    }

    #[test]
    fn the_question_is_what_the_router_asks() {
        for (kind, field) in [(ProbeKind::Completion, "prompt"), (ProbeKind::Chat, "messages")] {
            let (path, body) = Probe::body(kind, "m", "t");
            let asked: Value = serde_json::from_slice(&question(path, &body).body).expect("JSON");
            assert_eq!(asked[field], body[field]);
        }
        assert_eq!(used_tokens(&json!({"choices": [{"prompt_token_ids": [1, 2]}]})), Some(vec![1, 2]));
        assert_eq!(used_tokens(&json!({"prompt_token_ids": [3], "choices": [{}]})), Some(vec![3]));
        assert_eq!(used_tokens(&json!({"prompt_token_ids": null})), None);
    }
}
