//! `/overview`: what people look at first, in one answer, so that a view that is shown live asks for one thing.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use axum::extract::State;
use axum::routing::get;
use axum::{Json, Router};
use serde_json::{Value, json};

use super::health::Readiness;
use super::sources::ReadSources;

/// Reads a part of the answer from its owner; neither blocks nor awaits.
#[derive(Clone)]
pub struct ReadPart(Arc<dyn Fn() -> Value + Send + Sync>);

impl ReadPart {
    /// Reads with `read`.
    pub fn new(read: impl Fn() -> Value + Send + Sync + 'static) -> Self {
        Self(Arc::new(read))
    }
}

impl fmt::Debug for ReadPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ReadPart")
    }
}

/// Where the answer is read from.
#[derive(Clone, Debug)]
pub struct Overview {
    /// When the process started.
    pub started: Instant,
    /// Whether it should be sent requests.
    pub readiness: Readiness,
    /// As `/sources`.
    pub sources: ReadSources,
    /// `active`, `shadow` or `off`.
    pub rollout: ReadPart,
    /// Sums over all decisions.
    pub totals: ReadPart,
    /// As `/index`.
    pub index: ReadPart,
    /// As `/endpoints`.
    pub endpoints: ReadPart,
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
    let Overview { started, readiness, sources, rollout, totals, index, endpoints, recent } = &*overview;
    Json(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "uptime_s": started.elapsed().as_secs(),
        "ready": readiness.is_ready(),
        "not_ready": readiness.missing().map(|missing| missing.reason()).collect::<Vec<_>>(),
        "rollout": rollout.0(),
        "totals": totals.0(),
        "index": index.0(),
        "endpoints": endpoints.0(),
        "sources": sources.read(),
        "recent": recent.0(),
    }))
}
