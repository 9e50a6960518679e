//! `/snapshots` on the admin port: what siblings may have of us.
//!
//! | path | answer |
//! |---|---|
//! | `/snapshots` | [`Listing`] as JSON |
//! | `/snapshots/{model}/{address}/{rank}` | the snapshot's bytes, taken now; 404 when nothing is known of the source |
//!
//! A snapshot takes memory until its last byte is sent, so only [`MAX_SERVED`] are served at a time; the others are
//! told to come again. A reader that does not read is ended by the port's own limit on the life of a connection.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER};
use axum::http::{HeaderName, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use futures_util::stream;
use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{InstanceId, encoded, key_of};
use crate::events::snapshot::SourceKey;
use crate::events::socket::{EventPlane, SourceState, SourceStatus};
use crate::telemetry::metrics::{Metrics, SnapshotStep};

/// Header of every answer: who answers.
pub(super) const INSTANCE_HEADER: HeaderName = HeaderName::from_static("x-warmroute-instance");
/// Snapshots that are served at a time.
const MAX_SERVED: usize = 2;
/// What those who come too many are told to wait.
const RETRY_SECONDS: &str = "1";
/// Bytes that are handed to the connection at a time.
const CHUNK: usize = 64 << 10;

/// The answer to `/snapshots`.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Listing {
    pub(super) sources: Vec<Listed>,
}

/// A source whose snapshot can be had.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Listed {
    pub(super) model: Arc<str>,
    pub(super) address: SocketAddr,
    pub(super) rank: u32,
    /// Number of the last batch applied.
    pub(super) seq: u64,
    /// Whether everything since the publisher's start is known.
    pub(super) complete: bool,
    /// Digest of all that is known: replicas that are at the same number have the same one.
    pub(super) digest: String,
}

#[derive(Clone, Debug)]
struct Shelf {
    plane: Arc<EventPlane>,
    metrics: Arc<Metrics>,
    permits: Arc<Semaphore>,
}

/// The routes; see the module.
pub(super) fn routes(plane: Arc<EventPlane>, metrics: Arc<Metrics>, instance: InstanceId) -> Router {
    let shelf = Shelf { plane, metrics, permits: Arc::new(Semaphore::new(MAX_SERVED)) };
    let name_us = move |response: Response| async move { ([(INSTANCE_HEADER, instance.to_string())], response) };
    Router::new()
        .route("/snapshots", get(list))
        .route("/snapshots/{model}/{address}/{rank}", get(one))
        .layer(axum::middleware::map_response(name_us))
        .with_state(shelf)
}

async fn list(State(shelf): State<Shelf>) -> Json<Listing> {
    Json(Listing { sources: shelf.plane.status().iter().filter_map(Listed::of).collect() })
}

impl Listed {
    /// None for a source that is not followed at the moment: what is known of it may be of a process that is gone.
    fn of(status: &SourceStatus) -> Option<Self> {
        let complete = match status.state {
            SourceState::Live => true,
            SourceState::Incomplete => false,
            _ => return None,
        };
        let SourceStatus { address, rank, digest, .. } = *status;
        let digest = format!("{}-{:016x}", digest.n_blocks, digest.sum);
        Some(Self { model: status.model.clone(), address, rank, seq: status.last_seq?.0, complete, digest })
    }

    pub(super) fn key(&self) -> SourceKey {
        SourceKey { model: self.model.clone(), address: self.address, rank: self.rank }
    }
}

async fn one(State(shelf): State<Shelf>, Path((model, address, rank)): Path<(Arc<str>, SocketAddr, u32)>) -> Response {
    let key = SourceKey { model, address, rank };
    let Ok(permit) = shelf.permits.clone().try_acquire_owned() else {
        shelf.metrics.count_snapshot_failure(SnapshotStep::Serve);
        return (StatusCode::SERVICE_UNAVAILABLE, [(RETRY_AFTER, RETRY_SECONDS)]).into_response();
    };
    // Only for a source that is followed the plane has something to wait for.
    let is_followed = shelf.plane.status().iter().any(|status| key_of(status) == key);
    let encoded = if is_followed { encoded(&shelf.plane, key).await } else { None };
    let Some(encoded) = encoded else { return StatusCode::NOT_FOUND.into_response() };
    shelf.metrics.count_snapshot(SnapshotStep::Serve, encoded.len() as u64);
    let headers = [(CONTENT_TYPE, "application/octet-stream".to_owned()), (CONTENT_LENGTH, encoded.len().to_string())];
    (headers, body(encoded, permit)).into_response()
}

/// A body that keeps its permit until it is sent, or the connection is gone.
fn body(encoded: Vec<u8>, permit: OwnedSemaphorePermit) -> Body {
    let chunks = stream::unfold((Bytes::from(encoded), permit), |(mut rest, permit)| async move {
        let chunk = rest.split_to(rest.len().min(CHUNK));
        (!chunk.is_empty()).then_some((Ok::<_, Infallible>(chunk), (rest, permit)))
    });
    Body::from_stream(chunks)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::index::{IndexLimits, PrefixIndex};

    async fn permit(permits: &Arc<Semaphore>) -> OwnedSemaphorePermit {
        permits.clone().acquire_owned().await.unwrap()
    }

    #[tokio::test]
    async fn a_snapshot_counts_as_served_until_its_last_byte_is_sent_or_nobody_wants_it() {
        let permits = Arc::new(Semaphore::new(1));
        let encoded: Vec<u8> = (0..3 * CHUNK + 7).map(|at| at as u8).collect();

        let unwanted = body(encoded.clone(), permit(&permits).await);
        assert_eq!(permits.available_permits(), 0);
        drop(unwanted);
        let wanted = body(encoded.clone(), permit(&permits).await);
        let sent = axum::body::to_bytes(wanted, usize::MAX).await.unwrap();

        assert_eq!(sent, encoded);
        assert_eq!(permits.available_permits(), 1);
    }

    #[tokio::test]
    async fn those_who_come_too_many_are_told_to_come_again() {
        let plane = Arc::new(EventPlane::start(&Arc::new(PrefixIndex::new(IndexLimits::default()))));
        let shelf = Shelf { plane, metrics: Arc::default(), permits: Arc::new(Semaphore::new(1)) };
        let ask = || one(State(shelf.clone()), Path(("m".into(), ([10, 0, 0, 1], 8000).into(), 0)));
        let served = permit(&shelf.permits).await;

        let refused = ask().await;
        assert_eq!(refused.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(refused.headers()[RETRY_AFTER], RETRY_SECONDS);

        drop(served);
        assert_eq!(ask().await.status(), StatusCode::NOT_FOUND, "nothing is known of the source");
        assert_eq!(shelf.permits.available_permits(), 1);
    }
}
