//! `/overview`: what people look at first, in one answer, so that a view that is shown live asks for one thing.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use axum::extract::State;
use axum::routing::get;
use axum::{Json, Router};
use serde_json::{Value, json};

use super::health::Readiness;
use super::sources::{SourceRow, in_order};

/// Reads a part of the answer from its owner; neither blocks nor awaits.
pub struct Read<T>(Box<dyn Fn() -> T + Send + Sync>);

/// Reads what is shown as it is.
pub type ReadPart = Read<Value>;

impl<T> Read<T> {
    /// Reads with `read`.
    pub fn new(read: impl Fn() -> T + Send + Sync + 'static) -> Self {
        Self(Box::new(read))
    }
}

impl<T> fmt::Debug for Read<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Read")
    }
}

/// What is known of the engines at one moment: the sources are read once for both.
#[derive(Debug)]
pub struct Engines {
    /// As `/endpoints`.
    pub endpoints: Value,
    /// As `/sources`, in any order.
    pub sources: Vec<SourceRow>,
}

/// Where the answer is read from.
#[derive(Debug)]
pub struct Overview {
    /// When the process started.
    pub started: Instant,
    /// Whether it should be sent requests.
    pub readiness: Readiness,
    /// Endpoints and sources.
    pub engines: Read<Engines>,
    /// `active`, `shadow` or `off` where that holds for all requests, else `mixed`.
    pub rollout: ReadPart,
    /// Sums over all decisions.
    pub totals: ReadPart,
    /// As `/index`.
    pub index: ReadPart,
    /// The newest of `/decisions`.
    pub recent: ReadPart,
}

impl Overview {
    /// The route.
    pub fn routes(self) -> Router {
        Router::new().route("/overview", get(overview)).with_state(Arc::new(self))
    }
}

async fn overview(State(overview): State<Arc<Overview>>) -> Json<Value> {
    let Overview { started, readiness, engines, rollout, totals, index, recent } = &*overview;
    let Engines { endpoints, sources } = engines.0();
    Json(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "uptime_s": started.elapsed().as_secs(),
        "ready": readiness.is_ready(),
        "not_ready": readiness.missing().map(|missing| missing.reason()).collect::<Vec<_>>(),
        "rollout": rollout.0(),
        "totals": totals.0(),
        "index": index.0(),
        "endpoints": endpoints,
        "sources": in_order(sources),
        "recent": recent.0(),
    }))
}
