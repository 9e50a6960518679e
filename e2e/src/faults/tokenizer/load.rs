//! A steady load: requests come at their time, whatever became of the ones before.
//!
//! The conversations are all there from the start and take turns, so that after the first round every prompt begins
//! with what an engine has computed, and a decision that finds nothing has lost something.

use std::collections::VecDeque;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::load::{Answered, Asker, Outcome, Target};
use crate::sim::tokenizer;

/// Time between two requests.
const INTERVAL: Duration = Duration::from_millis(50);
/// Conversations that take turns: each is back after two seconds.
const N_CONVERSATIONS: usize = 40;
const N_OPENING_WORDS: usize = 300;
const N_QUESTION_WORDS: usize = 20;
const N_ANSWER: usize = 4;
const SEED: u64 = 20_261_121;

/// The time that the load takes to ask every conversation's first question.
pub(super) const FIRST_ROUND: Duration = INTERVAL.saturating_mul(N_CONVERSATIONS as u32);

/// A load that is running; it ends when it is stopped, or with the runtime.
pub(super) struct SteadyLoad {
    stop: CancellationToken,
    running: JoinHandle<Vec<Outcome>>,
}

impl SteadyLoad {
    /// Starts it.
    pub(super) fn start(target: Target) -> Self {
        let stop = CancellationToken::new();
        Self { running: tokio::spawn(play(Asker::new(target, N_ANSWER), stop.clone())), stop }
    }

    /// Asks nothing more and waits for what was asked.
    ///
    /// # Errors
    /// When a request failed.
    pub(super) async fn stop(self) -> Result<Vec<Answered>> {
        self.stop.cancel();
        let outcomes = self.running.await.context("the load panicked")?;
        let n_asked = outcomes.len();
        let (mut answers, mut failures) = (Vec::new(), Vec::new());
        for outcome in outcomes {
            match outcome {
                Outcome::Answered(answered) => answers.push(answered),
                Outcome::Failed(reason) => failures.push(reason),
            }
        }
        let first = failures.first();
        anyhow::ensure!(first.is_none(), "{} of {n_asked} requests failed, the first with: {first:?}", failures.len());
        answers.sort_by_key(|answer| answer.asked_at);
        Ok(answers)
    }
}

async fn play(asker: Asker, stop: CancellationToken) -> Vec<Outcome> {
    let mut random = fastrand::Rng::with_seed(SEED);
    let mut idle: VecDeque<Conversation> = (0..N_CONVERSATIONS).map(|_| Conversation::new(&mut random)).collect();
    let (mut asking, mut outcomes) = (JoinSet::new(), Vec::new());
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            Some(asked) = asking.join_next() => {
                let (conversation, outcome) = asked.expect("asking does not panic and is not aborted");
                idle.push_back(conversation);
                outcomes.push(outcome);
            }
            _ = ticks.tick() => {
                let conversation = idle.pop_front().unwrap_or_else(|| Conversation::new(&mut random));
                asking.spawn(conversation.go_on(asker.clone()));
            }
        }
    }
    outcomes.extend(asking.join_all().await.into_iter().map(|(_, outcome)| outcome));
    outcomes
}

struct Conversation {
    random: fastrand::Rng,
    messages: Vec<Value>,
}

impl Conversation {
    fn new(random: &mut fastrand::Rng) -> Self {
        Self { random: random.fork(), messages: Vec::new() }
    }

    /// Asks the next question and takes in the answer.
    async fn go_on(mut self, asker: Asker) -> (Self, Outcome) {
        let n_words = if self.messages.is_empty() { N_OPENING_WORDS } else { N_QUESTION_WORDS };
        let words: Vec<String> = (0..n_words).map(|_| tokenizer::word(self.random.u32(..tokenizer::N_WORDS))).collect();
        self.messages.push(json!({"role": "user", "content": words.join(" ")}));
        let outcome = asker.ask(&self.messages).await;
        if let Outcome::Answered(answered) = &outcome {
            self.messages.push(json!({"role": "assistant", "content": answered.text}));
        }
        (self, outcome)
    }
}
