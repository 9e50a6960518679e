//! What a simulated engine makes of `/tokenize` when it is told to be faulty.
//!
//! The fault is chosen while the engine runs and holds for the calls that come then; whatever else the engine serves
//! goes on as before. A process that is stopped, and a port that nobody listens on, need no simulation.

use std::convert::Infallible;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::Duration;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde_json::json;

use super::api::ApiError;

/// Ids of another model's vocabulary lie this far from ours.
const OTHER_VOCABULARY: u32 = 40_000;
/// Ids of an answer that is longer than any prompt here could explain.
const N_HUGE: u32 = 1_000_000;
/// An answer with so many ids, made once.
static HUGE: LazyLock<Bytes> = LazyLock::new(|| {
    let tokens: Vec<u32> = (0..N_HUGE).collect();
    json!({"count": N_HUGE, "tokens": tokens}).to_string().into()
});

/// How `/tokenize` fails.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TokenizeFault {
    /// It does not.
    #[default]
    None,
    /// Every answer takes this long.
    Slow(Duration),
    /// Calls wait for each other, and each takes this long.
    OneAtATime(Duration),
    /// 500.
    Error,
    /// The call is accepted and never answered.
    BlackHole,
    /// The connection is closed before the answer is whole.
    Cut,
    /// In turn: no JSON, other ids than are counted, no ids, and far too many of them.
    Nonsense,
    /// Ids of another vocabulary: a good answer, always the same one for a prompt, to a question about another model.
    OtherModel,
}

/// Chooses the fault of a simulated engine; clones choose for the same engine.
#[derive(Clone, Debug, Default)]
pub struct TokenizeControl(Arc<State>);

#[derive(Debug, Default)]
struct State {
    /// Written by the scenario, read by every call.
    fault: Mutex<TokenizeFault>,
    n_calls: AtomicU64,
    /// Who has it is served ([`TokenizeFault::OneAtATime`]); fair, so first come, first served.
    turn: tokio::sync::Mutex<()>,
}

impl TokenizeControl {
    /// From now on `/tokenize` fails like this.
    pub fn set(&self, fault: TokenizeFault) {
        if fault == TokenizeFault::Nonsense {
            // Here, lest the engine stand still for it.
            LazyLock::force(&HUGE);
        }
        *self.0.fault.lock().unwrap_or_else(PoisonError::into_inner) = fault;
    }

    /// Calls of `/tokenize` so far.
    pub fn n_calls(&self) -> u64 {
        self.0.n_calls.load(Ordering::Relaxed)
    }

    /// What becomes of the answer with `tokens`.
    pub(super) async fn answer(&self, tokens: Vec<u32>, max_model_len: usize) -> Result<Response, ApiError> {
        let n_earlier = self.0.n_calls.fetch_add(1, Ordering::Relaxed);
        let fault = *self.0.fault.lock().unwrap_or_else(PoisonError::into_inner);
        match fault {
            TokenizeFault::None => {}
            TokenizeFault::Slow(time) => tokio::time::sleep(time).await,
            TokenizeFault::OneAtATime(time) => {
                let _turn = self.0.turn.lock().await;
                tokio::time::sleep(time).await;
            }
            TokenizeFault::Error => return Err(ApiError::internal("the simulated tokenizer is out of order")),
            TokenizeFault::BlackHole => {
                let never: Infallible = std::future::pending().await;
                match never {}
            }
            TokenizeFault::Cut => return Ok(cut()),
            TokenizeFault::Nonsense => return Ok(nonsense(n_earlier, &tokens)),
            TokenizeFault::OtherModel => {
                let tokens: Vec<u32> = tokens.iter().map(|token| token + OTHER_VOCABULARY).collect();
                return Ok(counted(tokens.len(), &tokens, max_model_len));
            }
        }
        Ok(counted(tokens.len(), &tokens, max_model_len))
    }
}

fn counted(count: usize, tokens: &[u32], max_model_len: usize) -> Response {
    let body = json!({"count": count, "max_model_len": max_model_len, "tokens": tokens, "token_strs": null});
    Json(body).into_response()
}

/// An answer that begins well, and then the connection's end; the server may not even send the beginning.
fn cut() -> Response {
    let start = Ok(Bytes::from_static(br#"{"count": 2, "tok"#));
    let body = Body::from_stream(stream::iter([start, Err(std::io::Error::other("the simulated answer is cut"))]));
    ([("content-type", "application/json")], body).into_response()
}

fn nonsense(turn: u64, tokens: &[u32]) -> Response {
    let of_json = |body: Bytes| ([("content-type", "application/json")], body).into_response();
    match turn % 4 {
        0 => (StatusCode::OK, "<html>It works!</html>").into_response(),
        1 => counted(tokens.len() + 1, tokens, 0),
        2 => of_json(Bytes::from_static(br#"{"count": 2, "tokens": ["the", -1]}"#)),
        _ => of_json(HUGE.clone()),
    }
}
