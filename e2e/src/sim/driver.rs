//! Runs an [`Engine`] in real time: takes requests, spends the time each step costs, publishes its
//! events and hands out its tokens.
//!
//! One loop per engine, as in vLLM's engine core: a long prefill delays the next token of everyone else,
//! and requests that arrive meanwhile wait for the next step.

use std::collections::HashMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::engine::{Counters, Engine, Sampled, Step};
use super::event::{KvEvent, WireHash, encode_batch};
use super::publisher::Publisher;
use super::sequence::{NewRequest, RequestId};

/// How long a step takes: a fixed part per step and a part per prefilled token.
#[derive(Clone, Copy, Debug)]
pub struct TimeModel {
    /// Tokens of prompts that are computed per second.
    pub prefill_tokens_per_second: f64,
    /// What each step costs besides, and so the time between two tokens of one answer.
    pub decode_step: Duration,
}

impl TimeModel {
    fn duration(&self, step: &Step) -> Duration {
        self.decode_step + Duration::from_secs_f64(step.n_prefill_tokens as f64 / self.prefill_tokens_per_second)
    }
}

impl Default for TimeModel {
    /// About an 8B model on one data-centre GPU.
    fn default() -> Self {
        Self { prefill_tokens_per_second: 8000.0, decode_step: Duration::from_millis(12) }
    }
}

/// What the HTTP side asks of the loop.
#[derive(Debug)]
pub(super) enum Command {
    /// Compute this; its tokens go to `tokens`, and a closed receiver aborts the request.
    Submit {
        /// The request.
        request: NewRequest,
        /// Where its tokens go.
        tokens: mpsc::UnboundedSender<Sampled>,
    },
    /// Drop the cache; answers whether it was done.
    Reset(oneshot::Sender<bool>),
}

/// What the engine's metrics show.
#[derive(Clone, Copy, Debug, Default)]
pub struct Snapshot {
    /// Requests that hold blocks.
    pub n_running: usize,
    /// Requests in the queue.
    pub n_waiting: usize,
    /// Fraction of the cache in use, 0 to 1.
    pub usage: f64,
    /// Totals since the start.
    pub counters: Counters,
}

/// The loop and what it owns.
pub(super) struct Driver {
    pub(super) engine: Engine,
    pub(super) time: TimeModel,
    pub(super) publisher: Publisher,
    pub(super) wire_hash: WireHash,
    pub(super) commands: mpsc::Receiver<Command>,
    /// One writer, the loop; read by `/metrics`.
    pub(super) snapshot: watch::Sender<Snapshot>,
    pub(super) clients: HashMap<RequestId, mpsc::UnboundedSender<Sampled>>,
}

impl Driver {
    /// Runs until `shutdown`, then drops what is unfinished and closes the event sockets.
    pub(super) async fn run(mut self, shutdown: CancellationToken) {
        loop {
            let step_start = Instant::now();
            self.take_commands();
            self.abort_abandoned();
            let step = self.engine.schedule();
            self.show();
            let Some(step) = step else {
                tokio::select! {
                    () = shutdown.cancelled() => return,
                    command = self.commands.recv() => match command {
                        Some(command) => self.obey(command),
                        None => return,
                    },
                }
                continue;
            };
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep_until(step_start + self.time.duration(&step)) => {}
            }
            self.publish(&step.events);
            self.complete();
        }
    }

    fn take_commands(&mut self) {
        while let Ok(command) = self.commands.try_recv() {
            self.obey(command);
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit { request, tokens } => {
                let id = self.engine.submit(request);
                self.clients.insert(id, tokens);
            }
            Command::Reset(answer) => {
                let done = self.engine.reset_prefix_cache();
                // A caller that has gone does not need the answer.
                let _ = answer.send(done);
            }
        }
    }

    fn abort_abandoned(&mut self) {
        let engine = &mut self.engine;
        self.clients.retain(|id, tokens| {
            if tokens.is_closed() {
                engine.abort(*id);
            }
            !tokens.is_closed()
        });
    }

    fn publish(&self, events: &[KvEvent]) {
        if events.is_empty() {
            return;
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.publisher.publish(encode_batch(now.as_secs_f64(), events, 0, self.wire_hash));
    }

    fn complete(&mut self) {
        for sampled in self.engine.complete() {
            if let Some(tokens) = self.clients.get(&sampled.id) {
                // A closed receiver is noticed, and the request aborted, before the next step.
                let _ = tokens.send(sampled);
            }
            if sampled.last {
                self.clients.remove(&sampled.id);
            }
        }
    }

    fn show(&self) {
        self.snapshot.send_replace(Snapshot {
            n_running: self.engine.n_running(),
            n_waiting: self.engine.n_waiting(),
            usage: self.engine.usage(),
            counters: self.engine.counters(),
        });
    }
}
