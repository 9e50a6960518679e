//! What was decided, what would be, and why: the routes of the admin port that show the request path.
//!
//! | path | answer |
//! |---|---|
//! | `POST /explain` | what would become of a request with this body; `?path=` says where a client would send it |
//! | `/explain/{request-id}` | what was decided on a request, and what became of it |
//! | `/decisions?limit=n` | the newest decisions, without the standings of the candidates |
//! | `/endpoints` | every endpoint with its load and what it was given |
//! | `/index` | the keyspaces of the prefix index |
//!
//! Answers have counts, addresses and the configured names: nothing of a prompt, no token ids, hashes or salts. A dry run
//! costs what a decision costs, so few run at a time; the rest of the port is not kept waiting.

mod view;
mod why;

use std::collections::HashMap;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, FromRequest as _, Path, Query, Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router as Routes};
use serde_json::Value;
use tokio::sync::Semaphore;

use self::view::{DecisionView, EndpointView, ExplanationView, IndexView};
use super::decide::Router;
use super::message::{RANK_HEADER, REQUEST_ID_HEADER, RequestHead};
use crate::request::{self, Api};

/// Dry runs at a time: each may ask an engine for tokens, as a request does.
const MOST_DRY_RUNS: usize = 4;
/// Where clients send what has no `path`.
const DEFAULT_PATH: &str = "/v1/chat/completions";
/// Decisions in a list, unless told otherwise.
const DEFAULT_LIMIT: usize = 100;
/// Decisions in [`Explain::recent`].
const N_RECENT: usize = 20;

/// Most decisions in a list: an answer of 1 MiB.
const MOST_LIMIT: usize = 1000;
/// How long a client may take to send the body of a dry run: it keeps one of the few places.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// Instead of a mode, where it is not the same for all requests of all pools.
pub const MIXED: &str = "mixed";

/// What is shown of an event source.
#[derive(Clone, Debug)]
pub struct SourceBrief {
    /// Model of the endpoint's pool.
    pub model: Arc<str>,
    /// Address that Envoy dials.
    pub endpoint: SocketAddr,
    /// Data-parallel rank.
    pub rank: u32,
    /// Name of its state.
    pub state: &'static str,
    /// Time since its last batch was applied; none before the first.
    pub last_event_ms: Option<u64>,
    /// Blocks that the index holds for it.
    pub n_blocks: u64,
}

/// Reads the event sources from their owner; neither blocks nor awaits.
#[derive(Clone)]
pub struct ReadSources(Arc<dyn Fn() -> Vec<SourceBrief> + Send + Sync>);

impl ReadSources {
    /// Reads with `read`.
    pub fn new(read: impl Fn() -> Vec<SourceBrief> + Send + Sync + 'static) -> Self {
        Self(Arc::new(read))
    }
}

impl fmt::Debug for ReadSources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ReadSources")
    }
}

/// Shows the request path. See the module.
#[derive(Clone, Debug)]
pub struct Explain {
    router: Arc<Router>,
    sources: ReadSources,
    body_bytes: usize,
    permits: Arc<Semaphore>,
}

impl Explain {
    /// Shows `router`, with dry runs of bodies up to `body_bytes`.
    pub fn new(router: Arc<Router>, sources: ReadSources, body_bytes: usize) -> Self {
        Self { router, sources, body_bytes, permits: Arc::new(Semaphore::new(MOST_DRY_RUNS)) }
    }

    /// The routes.
    pub fn routes(&self) -> Routes {
        Routes::new()
            .route("/explain", post(dry_run).layer(DefaultBodyLimit::max(self.body_bytes)))
            .route("/explain/{request_id}", get(decided))
            .route("/decisions", get(decisions))
            .route("/endpoints", get(endpoints))
            .route("/index", get(index))
            .with_state(self.clone())
    }

    /// As `/index`.
    pub fn index(&self) -> Value {
        to_value(&IndexView::of(&self.router))
    }

    /// As `/endpoints`, with sources that the caller has read.
    pub fn endpoints(&self, sources: &[SourceBrief]) -> Value {
        to_value(&EndpointView::all(&self.router, sources))
    }

    /// The newest of `/decisions`.
    pub fn recent(&self) -> Value {
        to_value(&self.newest(N_RECENT))
    }

    /// What has been decided so far.
    pub fn totals(&self) -> Value {
        to_value(&self.router.totals())
    }

    async fn read_body(&self, request: Request) -> Result<Bytes, Response> {
        match tokio::time::timeout(BODY_TIMEOUT, Bytes::from_request(request, &())).await {
            Ok(Ok(body)) => Ok(body),
            Ok(Err(error)) if error.status() == StatusCode::PAYLOAD_TOO_LARGE => {
                let sentence = format!("the body is longer than the {} bytes that are read", self.body_bytes);
                Err(refused(StatusCode::PAYLOAD_TOO_LARGE, &sentence))
            }
            Ok(Err(_)) => Err(refused(StatusCode::BAD_REQUEST, "the body has not come whole")),
            Err(_) => Err(refused(StatusCode::REQUEST_TIMEOUT, "the body has not come in time")),
        }
    }

    fn newest(&self, limit: usize) -> Vec<DecisionView> {
        self.router.journal().newest().take(limit).map(|record| DecisionView::brief(&record)).collect()
    }
}

fn to_value(view: &impl serde::Serialize) -> Value {
    serde_json::to_value(view).expect("views have only text keys")
}

/// What is wrong with a question, in a sentence.
fn refused(status: StatusCode, sentence: &str) -> Response {
    (status, format!("{sentence}\n")).into_response()
}

async fn dry_run(
    State(explain): State<Explain>,
    Query(query): Query<HashMap<String, String>>,
    request: Request,
) -> Response {
    // Before the body is read: what waits for a place holds no memory.
    let Ok(_permit) = explain.permits.clone().try_acquire_owned() else {
        return refused(StatusCode::SERVICE_UNAVAILABLE, "as many dry runs as are allowed at a time are under way");
    };
    let head = RequestHead {
        path: query.get("path").map_or(DEFAULT_PATH, String::as_str).to_owned(),
        rank: header(request.headers(), RANK_HEADER).and_then(|rank| rank.parse().ok()),
        request_id: header(request.headers(), REQUEST_ID_HEADER).map(str::to_owned),
        ..RequestHead::default()
    };
    let body = match explain.read_body(request).await {
        Ok(body) => body,
        Err(refused) => return refused,
    };
    let found = explain.router.dry_run(&head, &body, &mut fastrand::Rng::new()).await;
    // A decision only needs to know that there is nothing to read; who asks wants to know what is wrong.
    let body_fault = request::open(Api::of_path(&head.path), &body).err();
    Json(ExplanationView::of(&found, body_fault, &explain.sources.0())).into_response()
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok().map(str::trim)
}

async fn decided(State(explain): State<Explain>, Path(request_id): Path<String>) -> Response {
    match explain.router.journal().find(&request_id) {
        Some(record) => Json(DecisionView::whole(&record)).into_response(),
        None => refused(
            StatusCode::NOT_FOUND,
            "no decision on a request with this x-request-id is kept: it is another router's, or older than the last ones \
             (explain.decisions)",
        ),
    }
}

async fn decisions(State(explain): State<Explain>, Query(query): Query<HashMap<String, String>>) -> Response {
    let most = explain.router.journal().capacity().min(MOST_LIMIT);
    let limit = query.get("limit").map_or(Ok(DEFAULT_LIMIT.min(most)), |limit| limit.parse());
    match limit {
        Ok(limit) if limit <= most => Json(explain.newest(limit)).into_response(),
        _ => refused(StatusCode::BAD_REQUEST, &format!("limit is not a number from 0 to {most}")),
    }
}

async fn endpoints(State(explain): State<Explain>) -> Json<Value> {
    Json(explain.endpoints(&explain.sources.0()))
}

async fn index(State(explain): State<Explain>) -> Json<Value> {
    Json(explain.index())
}
