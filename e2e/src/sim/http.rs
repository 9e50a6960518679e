//! The HTTP server of a simulated engine: OpenAI's endpoints and vLLM's own.

use std::convert::Infallible;
use std::sync::Arc;

use axum::Json;
use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures_util::stream::{self, Stream, StreamExt};
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::wrappers::UnboundedReceiverStream;

use super::answer::{Answer, Choice};
use super::api::{ApiError, Endpoint, Served};
use super::driver::{Command, Snapshot};
use super::engine::EngineOptions;
use super::fault::TokenizeControl;
use super::{exposition, publisher};

/// What the handlers share.
pub(super) struct Api {
    pub(super) served: Served,
    pub(super) options: EngineOptions,
    pub(super) commands: mpsc::Sender<Command>,
    pub(super) snapshot: watch::Receiver<Snapshot>,
    pub(super) endpoint: String,
    pub(super) replay_endpoint: String,
    pub(super) topic: String,
    pub(super) buffer_steps: usize,
    pub(super) tokenize: TokenizeControl,
}

/// All routes.
pub(super) fn router(api: Api) -> Router {
    Router::new()
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chat_completions))
        .route("/tokenize", post(tokenize))
        .route("/v1/models", get(models))
        .route("/health", get(|| async {}))
        .route("/version", get(|| async { Json(json!({"version": "0.32.0"})) }))
        .route("/metrics", get(metrics))
        .route("/kv_event_sources", get(kv_event_sources))
        .route("/reset_prefix_cache", post(reset_prefix_cache))
        // vLLM has no limit.
        .layer(DefaultBodyLimit::disable())
        .with_state(Arc::new(api))
}

async fn completions(State(api): State<Arc<Api>>, headers: HeaderMap, body: Bytes) -> Response {
    respond(generate(&api, Endpoint::Completions, &headers, &body).await)
}

async fn chat_completions(State(api): State<Arc<Api>>, headers: HeaderMap, body: Bytes) -> Response {
    respond(generate(&api, Endpoint::Chat, &headers, &body).await)
}

async fn generate(api: &Api, endpoint: Endpoint, headers: &HeaderMap, body: &[u8]) -> Result<Response, ApiError> {
    let body = read(headers, body)?;
    let session = headers.get("x-session-id").and_then(|value| value.to_str().ok());
    let request = api.served.generate(endpoint, &body, session)?;
    let mut choices = Vec::with_capacity(request.requests.len());
    let mut tokens = Vec::with_capacity(request.requests.len());
    for (idx, new) in request.requests.iter().enumerate() {
        // Unbounded, but it holds no more than the answer's tokens, whose number is limited.
        let (sender, receiver) = mpsc::unbounded_channel();
        tokens.push(UnboundedReceiverStream::new(receiver).map(move |sampled| (idx, sampled)));
        choices.push(Choice::new(&new.prompt));
        let command = Command::Submit { request: new.clone(), tokens: sender };
        api.commands.send(command).await.map_err(|_| stopped())?;
    }
    let answer = Answer::new(endpoint, &request, choices);
    // select_all polls in turn and ends when every choice has its last token.
    let tokens = stream::select_all(tokens);
    if request.stream {
        Ok(Sse::new(stream_answer(answer, tokens)).into_response())
    } else {
        whole(answer, tokens).await
    }
}

async fn whole(mut answer: Answer, mut tokens: impl Stream<Item = Token> + Unpin) -> Result<Response, ApiError> {
    while let Some((idx, sampled)) = tokens.next().await {
        answer.push(idx, &sampled);
    }
    if !answer.is_complete() {
        return Err(stopped());
    }
    Ok(Json(answer.whole()).into_response())
}

type Token = (usize, super::engine::Sampled);

fn stream_answer(
    answer: Answer,
    tokens: impl Stream<Item = Token> + Unpin,
) -> impl Stream<Item = Result<Event, Infallible>> {
    let state = (answer, tokens);
    let chunks = stream::unfold(Some(state), |state| async move {
        let (mut answer, mut tokens) = state?;
        match tokens.next().await {
            Some((idx, sampled)) => Some((answer.chunks(idx, &sampled), Some((answer, tokens)))),
            None => Some((answer.last_chunks(), None)),
        }
    });
    chunks.flat_map(stream::iter).map(|data| Ok(Event::default().data(data)))
}

async fn tokenize(State(api): State<Arc<Api>>, headers: HeaderMap, body: Bytes) -> Response {
    respond(match read(&headers, &body).and_then(|body| api.served.tokenize(&body)) {
        Ok(tokens) => api.tokenize.answer(tokens, api.served.max_model_len).await,
        Err(error) => Err(error),
    })
}

async fn models(State(api): State<Arc<Api>>) -> Json<Value> {
    let model = |id: &str, parent: Option<&str>| json!({"id": id, "object": "model", "owned_by": "vllm", "root": id, "parent": parent, "max_model_len": api.served.max_model_len});
    let base = std::iter::once(model(&api.served.model, None));
    let adapters = api.served.adapters.iter().map(|adapter| model(&adapter.name, Some(&api.served.model)));
    Json(json!({"object": "list", "data": base.chain(adapters).collect::<Vec<_>>()}))
}

async fn metrics(State(api): State<Arc<Api>>) -> impl IntoResponse {
    let text = exposition::render(&api.served.model, &api.options, &api.snapshot.borrow());
    ([("content-type", "text/plain; version=0.0.4; charset=utf-8")], text)
}

async fn kv_event_sources(State(api): State<Arc<Api>>) -> Json<Value> {
    Json(json!({"0": {
        "enable_kv_cache_events": true, "publisher": "zmq", "endpoint": api.endpoint,
        "replay_endpoint": api.replay_endpoint, "buffer_steps": api.buffer_steps, "hwm": publisher::PUB_HWM,
        "max_queue_size": publisher::MAX_QUEUE, "topic": api.topic,
    }}))
}

async fn reset_prefix_cache(State(api): State<Arc<Api>>) -> Response {
    let (sender, answer) = oneshot::channel();
    let sent = api.commands.send(Command::Reset(sender)).await;
    let done = if sent.is_ok() { answer.await.ok() } else { None };
    respond(done.map(|success| Json(json!({"success": success})).into_response()).ok_or_else(stopped))
}

fn read(headers: &HeaderMap, body: &[u8]) -> Result<Value, ApiError> {
    let content_type = headers.get("content-type").and_then(|value| value.to_str().ok()).unwrap_or_default();
    if content_type.split(';').next().map(str::trim) != Some("application/json") {
        let message = "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed";
        return Err(ApiError::malformed(message, None));
    }
    serde_json::from_slice(body)
        .map_err(|error| ApiError::malformed(format!("JSON decode error: {error}"), Some("body")))
}

fn respond(result: Result<Response, ApiError>) -> Response {
    result.unwrap_or_else(|error| {
        let status = StatusCode::from_u16(error.status).expect("every ApiError has a valid status");
        (status, Json(error.body())).into_response()
    })
}

fn stopped() -> ApiError {
    ApiError::unavailable("the engine has stopped")
}
