//! Answers of the generating endpoints, whole or as a stream of chunks.

use serde_json::{Value, json};

use super::api::{Endpoint, Generate};
use super::engine::Sampled;
use super::tokenizer;

/// An answer that grows token by token.
#[derive(Debug)]
pub(super) struct Answer {
    endpoint: Endpoint,
    model: String,
    finish_reason: &'static str,
    return_token_ids: bool,
    include_usage: bool,
    n_choices: usize,
    choices: Vec<Choice>,
}

/// One choice of an answer.
#[derive(Debug)]
pub(super) struct Choice {
    prompt: Vec<u32>,
    output: Vec<u32>,
    n_cached: usize,
    complete: bool,
}

impl Choice {
    pub(super) fn new(prompt: &[u32]) -> Self {
        Self { prompt: prompt.to_vec(), output: Vec::new(), n_cached: 0, complete: false }
    }
}

impl Answer {
    pub(super) fn new(endpoint: Endpoint, request: &Generate, choices: Vec<Choice>) -> Self {
        Self {
            endpoint,
            model: request.model.clone(),
            finish_reason: request.finish_reason,
            return_token_ids: request.return_token_ids,
            include_usage: request.include_usage,
            n_choices: request.n_choices,
            choices,
        }
    }

    /// Adds a token to a choice.
    pub(super) fn push(&mut self, idx: usize, sampled: &Sampled) {
        let choice = &mut self.choices[idx];
        choice.output.push(sampled.token);
        choice.n_cached = sampled.n_cached;
        choice.complete = sampled.last;
    }

    /// Whether every choice has its last token.
    pub(super) fn is_complete(&self) -> bool {
        self.choices.iter().all(|choice| choice.complete)
    }

    /// The answer as one body.
    pub(super) fn whole(&self) -> Value {
        let choices: Vec<Value> = (0..self.choices.len()).map(|idx| self.whole_choice(idx)).collect();
        let mut body = self.envelope(&choices, "");
        body["usage"] = self.usage();
        if self.return_token_ids && self.endpoint == Endpoint::Chat {
            body["prompt_token_ids"] = json!(self.choices[0].prompt);
        }
        body
    }

    /// Adds a token and returns the chunks that it makes.
    pub(super) fn chunks(&mut self, idx: usize, sampled: &Sampled) -> Vec<String> {
        let first = self.choices[idx].output.is_empty();
        self.push(idx, sampled);
        let mut chunks = Vec::new();
        if first && self.endpoint == Endpoint::Chat {
            let opening = json!({"index": idx, "delta": {"role": "assistant", "content": ""}, "finish_reason": null});
            chunks.push(self.envelope(&[opening], ".chunk").to_string());
        }
        let mut choice = match self.endpoint {
            Endpoint::Chat => {
                json!({"index": idx, "delta": {"content": tokenizer::text(sampled.token)}})
            }
            Endpoint::Completions => json!({"index": idx, "text": tokenizer::text(sampled.token)}),
        };
        choice["finish_reason"] = if sampled.last { json!(self.finish_reason) } else { Value::Null };
        if self.return_token_ids {
            choice["token_ids"] = json!([sampled.token]);
        }
        chunks.push(self.envelope(&[choice], ".chunk").to_string());
        chunks
    }

    /// What ends the stream; an answer that was cut off gets neither usage nor `[DONE]`.
    pub(super) fn last_chunks(&self) -> Vec<String> {
        if !self.is_complete() {
            return Vec::new();
        }
        let mut chunks = Vec::new();
        if self.include_usage {
            let mut usage = self.envelope(&[], ".chunk");
            usage["usage"] = self.usage();
            chunks.push(usage.to_string());
        }
        chunks.push("[DONE]".to_owned());
        chunks
    }

    fn whole_choice(&self, idx: usize) -> Value {
        let choice = &self.choices[idx];
        let text: String = choice.output.iter().map(|token| tokenizer::text(*token)).collect();
        let mut body = match self.endpoint {
            Endpoint::Chat => {
                json!({"index": idx, "message": {"role": "assistant", "content": text}})
            }
            Endpoint::Completions => json!({"index": idx, "text": text}),
        };
        body["finish_reason"] = json!(self.finish_reason);
        if self.return_token_ids {
            body["token_ids"] = json!(choice.output);
            if self.endpoint == Endpoint::Completions {
                body["prompt_token_ids"] = json!(choice.prompt);
            }
        }
        body
    }

    fn envelope(&self, choices: &[Value], chunk: &str) -> Value {
        let (id, object) = match self.endpoint {
            Endpoint::Chat => ("chatcmpl-sim", format!("chat.completion{chunk}")),
            Endpoint::Completions => ("cmpl-sim", "text_completion".to_owned()),
        };
        json!({"id": id, "object": object, "created": 0, "model": self.model, "choices": choices})
    }

    /// Prompts count once, whatever `n` is; the reused tokens are those of each prompt's last choice, which
    /// is what vLLM 0.32 reports.
    fn usage(&self) -> Value {
        let prompts = || self.choices.chunks(self.n_choices);
        let n_prompt: usize = prompts().map(|choices| choices[0].prompt.len()).sum();
        let n_cached: usize = prompts().filter_map(|choices| choices.last()).map(|choice| choice.n_cached).sum();
        let n_output: usize = self.choices.iter().map(|choice| choice.output.len()).sum();
        json!({
            "prompt_tokens": n_prompt, "completion_tokens": n_output, "total_tokens": n_prompt + n_output,
            "prompt_tokens_details": {"cached_tokens": n_cached},
        })
    }
}
