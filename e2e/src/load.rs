//! Runs a [`Workload`] against an OpenAI-compatible address and records what each request saw.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use futures_util::StreamExt;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::envoy::SERVED_BY;
use crate::workload::{Conversation, Workload};

/// A request that takes longer has failed.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);

/// Where a load goes.
#[derive(Clone, Debug)]
pub struct Target {
    /// `http://host:port`.
    pub url: String,
    /// `model` of every request.
    pub model: String,
}

/// What became of one request.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// It was answered whole.
    Answered(Answered),
    /// It was not; with the reason.
    Failed(String),
}

/// What one request saw.
#[derive(Clone, Debug)]
pub struct Answered {
    /// When it was sent.
    pub asked_at: Instant,
    /// Sending to first content.
    pub ttft: Duration,
    /// `usage.prompt_tokens`.
    pub n_prompt: u64,
    /// `usage.prompt_tokens_details.cached_tokens`.
    pub n_cached: u64,
    /// The engine that Envoy says has served; empty without Envoy.
    pub engine: String,
    /// What the model said.
    pub text: String,
}

/// Runs the whole load; `n_done` counts while it runs.
///
/// # Errors
/// When the HTTP client cannot be built. A request that fails is an [`Outcome`].
pub async fn run(target: Target, workload: Arc<Workload>, n_done: Arc<AtomicUsize>) -> Result<Vec<Outcome>> {
    play(target, workload, n_done, None).await
}

/// As [`run`], but nobody asks anything after `deadline`.
///
/// # Errors
/// As [`run`].
pub async fn run_until(
    target: Target,
    workload: Arc<Workload>,
    n_done: Arc<AtomicUsize>,
    deadline: Instant,
) -> Result<Vec<Outcome>> {
    play(target, workload, n_done, Some(deadline)).await
}

async fn play(
    target: Target,
    workload: Arc<Workload>,
    n_done: Arc<AtomicUsize>,
    deadline: Option<Instant>,
) -> Result<Vec<Outcome>> {
    let client = crate::http::client_with_timeout(REQUEST_TIMEOUT);
    let next = Arc::new(AtomicUsize::new(0));
    let mut users = JoinSet::new();
    for _ in 0..workload.options.n_users {
        let (client, target, n_answer) = (client.clone(), target.clone(), workload.options.answer_tokens);
        let user = User { asker: Asker { client, target, n_answer }, deadline };
        users.spawn(user.run(workload.clone(), next.clone(), n_done.clone()));
    }
    Ok(users.join_all().await.into_iter().flatten().collect())
}

struct User {
    asker: Asker,
    deadline: Option<Instant>,
}

impl User {
    async fn run(self, workload: Arc<Workload>, next: Arc<AtomicUsize>, n_done: Arc<AtomicUsize>) -> Vec<Outcome> {
        let mut outcomes = Vec::new();
        while let Some(conversation) = workload.conversations.get(next.fetch_add(1, Ordering::Relaxed)) {
            if self.is_over() {
                break;
            }
            self.converse(conversation, &n_done, &mut outcomes).await;
        }
        outcomes
    }

    fn is_over(&self) -> bool {
        self.deadline.is_some_and(|deadline| Instant::now() >= deadline)
    }

    async fn converse(&self, conversation: &Conversation, n_done: &AtomicUsize, outcomes: &mut Vec<Outcome>) {
        let mut messages = vec![json!({"role": "system", "content": conversation.system})];
        for turn in &conversation.turns {
            tokio::time::sleep(turn.think).await;
            if self.is_over() {
                return;
            }
            messages.push(json!({"role": "user", "content": turn.question}));
            let outcome = self.asker.ask(&messages).await;
            let text = match &outcome {
                Outcome::Answered(answered) => answered.text.clone(),
                Outcome::Failed(_) => String::new(),
            };
            messages.push(json!({"role": "assistant", "content": text}));
            outcomes.push(outcome);
            n_done.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Asks one model for answers of one length.
#[derive(Clone, Debug)]
pub(crate) struct Asker {
    client: reqwest::Client,
    target: Target,
    n_answer: usize,
}

impl Asker {
    /// Asks `target`.
    pub(crate) fn new(target: Target, n_answer: usize) -> Self {
        Self { client: crate::http::client_with_timeout(REQUEST_TIMEOUT), target, n_answer }
    }

    /// Has the conversation of `messages` answered.
    pub(crate) async fn ask(&self, messages: &[Value]) -> Outcome {
        match self.try_ask(messages).await {
            Ok(answered) => Outcome::Answered(answered),
            Err(error) => Outcome::Failed(format!("{error:#}")),
        }
    }

    async fn try_ask(&self, messages: &[Value]) -> Result<Answered> {
        let body = json!({
            "model": self.target.model, "messages": messages, "max_tokens": self.n_answer, "temperature": 0,
            "ignore_eos": true, "stream": true, "stream_options": {"include_usage": true},
        });
        let start = Instant::now();
        let request = self.client.post(format!("{}/v1/chat/completions", self.target.url)).json(&body);
        let response = request.send().await.context("no answer")?;
        let status = response.status();
        if !status.is_success() {
            bail!("{status}: {}", response.text().await.unwrap_or_default());
        }
        let engine = response.headers().get(SERVED_BY).and_then(|engine| engine.to_str().ok()).unwrap_or_default();
        let mut answer = Stream { start, engine: engine.to_owned(), ..Stream::default() };
        let mut bytes = response.bytes_stream();
        let mut buffer = Vec::new();
        while let Some(chunk) = bytes.next().await {
            buffer.extend_from_slice(&chunk.context("answer was cut")?);
            while let Some(end) = buffer.windows(2).position(|pair| pair == b"\n\n") {
                let event: Vec<u8> = buffer.drain(..end + 2).collect();
                answer.event(&event)?;
            }
        }
        answer.finish()
    }
}

/// An answer while it streams in.
struct Stream {
    start: Instant,
    engine: String,
    ttft: Option<Duration>,
    text: String,
    usage: Value,
    done: bool,
}

impl Default for Stream {
    fn default() -> Self {
        let (engine, text) = Default::default();
        Self { start: Instant::now(), engine, ttft: None, text, usage: Value::Null, done: false }
    }
}

impl Stream {
    fn event(&mut self, event: &[u8]) -> Result<()> {
        let Some(data) = event.strip_prefix(b"data: ") else {
            return Ok(());
        };
        if data.starts_with(b"[DONE]") {
            self.done = true;
            return Ok(());
        }
        let chunk: Value = serde_json::from_slice(data).context("a chunk is not JSON")?;
        if let Some(error) = chunk.get("error") {
            bail!("error inside the stream: {error}");
        }
        if let Some(content) = chunk["choices"][0]["delta"]["content"].as_str().filter(|content| !content.is_empty()) {
            self.ttft.get_or_insert(self.start.elapsed());
            self.text.push_str(content);
        }
        if chunk["usage"].is_object() {
            self.usage = chunk["usage"].clone();
        }
        Ok(())
    }

    fn finish(self) -> Result<Answered> {
        ensure!(self.done, "answer ended without [DONE]");
        Ok(Answered {
            asked_at: self.start,
            ttft: self.ttft.context("answer had no content")?,
            n_prompt: self.usage["prompt_tokens"].as_u64().context("answer had no usage")?,
            // Old engines leave the details out when nothing was cached.
            n_cached: self.usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or(0),
            engine: self.engine,
            text: self.text,
        })
    }
}
