//! The HTTP port for operators: metrics, liveness, readiness, event sources, decisions and the live page.
//!
//! | path | answer |
//! |---|---|
//! | `/metrics` | all instruments, OpenMetrics text, or the older format for a scraper that names only that |
//! | `/` | the live page, see [`page`] |
//! | `/livez` | 200 while the process serves; depends on nothing else, so that no outage restarts us |
//! | `/readyz` | 200 when ready, else 503 and one line per reason, from [`health::Readiness`] |
//! | `/sources` | every event source with what it knows, a JSON list of [`sources::SourceRow`]s |
//! | `/overview` | what the page and `warmroute top` poll, in one answer, see [`overview`]; added by the caller, as are the following |
//! | `/explain`, `/decisions`, `/endpoints`, `/index` | decisions, past ones and dry runs, and what they rest on, see [`crate::extproc::explain`] |
//! | `/snapshots` | what is known of each source, hashes of blocks included, for siblings, see [`crate::snapshots`] |
//!
//! All are under the same limits, and all but the first four behind the [`guard`].
//!
//! HTTP/1 only, and each connection has limits on its headers, its number and its life: the port is open to the
//! cluster, and whoever holds connections must not keep the kubelet's probes out.

pub mod guard;
pub mod health;
pub mod overview;
pub mod page;
pub mod sources;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::header::{ACCEPT, CONTENT_TYPE};
use axum::http::{HeaderMap, StatusCode};
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Json, Router};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

use self::guard::Guard;
use self::health::Readiness;
use self::sources::{ReadSources, SourceRow};
use crate::telemetry::metrics::{self, Metrics};

/// Longest life of a connection, and so the longest that an answer may take: that of a dry run, whose question for tokens
/// has the budget that the configuration gives it. Whoever asks for one waits as long.
pub(crate) const CONNECTION_TIMEOUT: Duration = Duration::from_secs(60);
/// Limits of one connection, and of their number. Probes and scrapes take milliseconds.
const LIMITS: Limits =
    Limits { n_connections: 256, header_timeout: Duration::from_secs(5), connection_timeout: CONNECTION_TIMEOUT };
/// Most bytes that the head of a request may have; 8 KiB is the least that hyper takes.
const MAX_HEAD_BYTES: usize = 16 * 1024;
/// Pause after a failed accept, which mostly means that file descriptors have run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// Longest that answers under way may take once the process stops.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// What the port shows.
#[derive(Clone, Debug)]
pub struct AdminState {
    /// Instruments behind `/metrics`.
    pub metrics: Arc<Metrics>,
    /// Conditions behind `/readyz`.
    pub readiness: Readiness,
    /// Where `/sources` reads from.
    pub sources: ReadSources,
    /// What a request has to show unless it asks for metrics or health; none: nothing.
    pub guard: Guard,
}

/// Serves the port until `shutdown`, then lets answers under way finish for a second. `others` are further routes.
pub async fn run(
    listener: TcpListener,
    state: AdminState,
    others: Router,
    shutdown: CancellationToken,
) -> Result<(), Infallible> {
    let guard = state.guard.clone();
    serve(listener, guard.before(routes(state).merge(page::routes()).merge(others)), LIMITS, shutdown).await;
    Ok(())
}

#[derive(Clone, Copy, Debug)]
struct Limits {
    n_connections: usize,
    header_timeout: Duration,
    connection_timeout: Duration,
}

fn routes(state: AdminState) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/sources", get(sources))
        .with_state(state)
}

async fn metrics(State(state): State<AdminState>, headers: HeaderMap) -> impl IntoResponse {
    if wants_classic(&headers) {
        return ([(CONTENT_TYPE, metrics::CLASSIC_CONTENT_TYPE)], state.metrics.encode_classic());
    }
    ([(CONTENT_TYPE, metrics::CONTENT_TYPE)], state.metrics.encode())
}

/// Whether a scraper names the older text format and not the newer one. Who names neither can read the newer.
fn wants_classic(headers: &HeaderMap) -> bool {
    let accepted = headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok());
    let accepted: Vec<&str> = accepted.collect();
    let names = |format: &str| accepted.iter().any(|value| value.contains(format));
    names("text/plain") && !names("application/openmetrics-text")
}

async fn livez() -> &'static str {
    "ok\n"
}

async fn readyz(State(state): State<AdminState>) -> (StatusCode, String) {
    let reasons: Vec<_> = state.readiness.missing().map(|missing| missing.reason()).collect();
    if reasons.is_empty() {
        return (StatusCode::OK, "ok\n".to_owned());
    }
    (StatusCode::SERVICE_UNAVAILABLE, reasons.join("\n") + "\n")
}

async fn sources(State(state): State<AdminState>) -> Json<Vec<SourceRow>> {
    Json(state.sources.read())
}

async fn serve(listener: TcpListener, routes: Router, limits: Limits, shutdown: CancellationToken) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = shutdown.cancelled() => break,
            Some(ended) = connections.join_next() => {
                if ended.is_err() {
                    // What it panicked with is not shown: it may quote a prompt.
                    error!("an admin connection panicked");
                }
            }
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) if connections.len() < limits.n_connections => {
                    let serve = serve_connection(stream, routes.clone(), limits, shutdown.clone());
                    connections.spawn(serve);
                }
                Ok((_, peer)) => warn!(%peer, "too many admin connections, closing the newest"),
                Err(error) => {
                    warn!(%error, "admin port cannot accept, pausing");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
    drop(listener);
    let all_ended = async { while connections.join_next().await.is_some() {} };
    // Whoever has not read the answer by then is left behind: dropping the set aborts what remains.
    let _ = tokio::time::timeout(DRAIN_TIMEOUT, all_ended).await;
}

async fn serve_connection(stream: TcpStream, routes: Router, limits: Limits, shutdown: CancellationToken) {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout)
        .max_buf_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(routes));
    let mut connection = std::pin::pin!(connection);
    let answered = async {
        tokio::select! {
            _ = connection.as_mut() => return,
            () = shutdown.cancelled() => connection.as_mut().graceful_shutdown(),
        }
        let _ = connection.await;
    };
    // What a peer does wrong is its own matter: it sees the status or the closed connection.
    let _ = tokio::time::timeout(limits.connection_timeout, answered).await;
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::task::JoinHandle;

    use super::health::Condition;
    use std::io;
    use std::net::SocketAddr;
    use std::sync::Mutex;

    use super::*;

    /// Longer than anything here takes; only a hang reaches it.
    const PATIENCE: Duration = Duration::from_secs(10);

    /// Lines of a log.
    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    struct Server {
        address: SocketAddr,
        state: AdminState,
        shutdown: CancellationToken,
        task: JoinHandle<()>,
    }

    fn source(port: u16) -> SourceRow {
        SourceRow {
            model: "m".into(),
            endpoint: ([127, 0, 0, 1], port).into(),
            rank: 0,
            state: "live",
            last_seq: None,
            n_blocks: 5,
            proved: Vec::new(),
            generations: 1,
            gaps: 0,
            replays: 1,
            last_event_ms: Some(5),
            lag_ms: None,
        }
    }

    async fn start(limits: Limits) -> Server {
        start_with(limits, Router::new()).await
    }

    async fn start_with(limits: Limits, others: Router) -> Server {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let sources = ReadSources::new(|| vec![source(8001), source(8000)]);
        let (metrics, readiness, guard) = (Arc::default(), Readiness::default(), Guard::default());
        let state = AdminState { metrics, readiness, sources, guard };
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(serve(listener, routes(state.clone()).merge(others), limits, shutdown.clone()));
        Server { address, state, shutdown, task }
    }

    impl Server {
        /// Sends `request` and returns all that comes back until the server closes.
        async fn send(&self, request: &str) -> String {
            let mut stream = TcpStream::connect(self.address).await.unwrap();
            stream.write_all(request.as_bytes()).await.unwrap();
            read_to_close(&mut stream).await
        }

        async fn get(&self, path: &str) -> String {
            self.send(&format!("GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")).await
        }
    }

    async fn read_to_close(stream: &mut TcpStream) -> String {
        let mut response = Vec::new();
        // A reset instead of an orderly end is a close as well.
        let _ = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut response)).await.unwrap();
        String::from_utf8(response).unwrap()
    }

    #[tokio::test]
    async fn metrics_are_openmetrics_text() {
        let server = start(LIMITS).await;
        server.state.metrics.count_stream_panic();

        let response = server.get("/metrics").await;

        assert!(response.starts_with("HTTP/1.1 200"), "{response}");
        assert!(response.contains("content-type: application/openmetrics-text"), "{response}");
        assert!(response.contains("\nwarmroute_stream_panics_total 1\n"), "{response}");
        assert!(response.ends_with("# EOF\n"), "{response}");
    }

    #[tokio::test]
    async fn ready_when_every_condition_holds_and_alive_before() {
        let server = start(LIMITS).await;
        assert!(server.get("/livez").await.starts_with("HTTP/1.1 200"));
        let response = server.get("/readyz").await;
        assert!(response.starts_with("HTTP/1.1 503"), "{response}");
        assert!(
            response.ends_with("serving: not started\ndiscovery: not synced\nwarm: event sources are catching up\n"),
            "{response}"
        );

        server.state.readiness.set(Condition::Serving, true);
        server.state.readiness.set(Condition::DiscoverySynced, true);
        server.state.readiness.set(Condition::Warm, true);
        assert!(server.get("/readyz").await.starts_with("HTTP/1.1 200"));

        server.state.readiness.set(Condition::NotDraining, false);
        assert!(server.get("/readyz").await.ends_with("\r\n\r\ndraining\n"));
        assert!(server.get("/livez").await.starts_with("HTTP/1.1 200"));
    }

    #[tokio::test]
    async fn sources_are_a_json_list() {
        let server = start(LIMITS).await;

        let response = server.get("/sources").await;

        assert!(response.starts_with("HTTP/1.1 200"), "{response}");
        assert!(response.contains("content-type: application/json"), "{response}");
        let (_, body) = response.split_once("\r\n\r\n").unwrap();
        let rows: serde_json::Value = serde_json::from_str(body).unwrap();
        assert_eq!(rows.as_array().unwrap().len(), 2);
        assert_eq!((&rows[0]["endpoint"], &rows[0]["n_blocks"]), (&"127.0.0.1:8000".into(), &5.into()));
    }

    #[tokio::test]
    async fn oversized_head_is_refused() {
        let server = start(LIMITS).await;
        let padding = "a".repeat(MAX_HEAD_BYTES);

        let response = server.send(&format!("GET /livez HTTP/1.1\r\nx: {padding}\r\n\r\n")).await;

        assert!(!response.starts_with("HTTP/1.1 200"), "{response}");
    }

    #[tokio::test]
    async fn peer_that_never_ends_its_head_is_closed() {
        let header_timeout = Duration::from_millis(50);
        let server = start(Limits { header_timeout, ..LIMITS }).await;

        let response = server.send("GET /livez HTTP/1.1\r\nx: ").await;

        assert!(!response.starts_with("HTTP/1.1 200"), "{response}");
    }

    #[tokio::test]
    async fn connection_has_an_end_even_if_its_body_has_none() {
        let connection_timeout = Duration::from_millis(50);
        let server = start(Limits { connection_timeout, ..LIMITS }).await;

        server.send("GET /livez HTTP/1.1\r\nhost: a\r\ncontent-length: 1000000\r\n\r\nbody").await;
    }

    #[tokio::test]
    async fn connection_above_the_limit_is_closed_and_room_is_reused() {
        let server = start(Limits { n_connections: 1, ..LIMITS }).await;
        let mut idle = TcpStream::connect(server.address).await.unwrap();
        idle.write_all(b"GET /livez HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        idle.read_u8().await.unwrap();

        assert_eq!(server.get("/livez").await, "");

        drop(idle);
        let room = async { while server.get("/livez").await.is_empty() {} };
        tokio::time::timeout(PATIENCE, room).await.unwrap();
    }

    #[tokio::test]
    async fn a_panic_costs_its_connection_and_is_logged_without_what_it_says() {
        let lines = Lines::default();
        let writer = lines.clone();
        let subscriber = tracing_subscriber::fmt().with_writer(move || writer.clone()).finish();
        let _guard = tracing::subscriber::set_default(subscriber);
        let panics = get(async || -> &'static str { panic!("the prompt of somebody") });
        let server = start_with(LIMITS, Router::new().route("/panics", panics)).await;

        assert_eq!(server.get("/panics").await, "");

        assert!(server.get("/livez").await.starts_with("HTTP/1.1 200"));
        let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        assert!(text.contains("an admin connection panicked") && !text.contains("somebody"), "{text}");
    }

    #[tokio::test]
    async fn shutdown_closes_idle_connections_and_ends() {
        let server = start(LIMITS).await;
        let mut idle = TcpStream::connect(server.address).await.unwrap();
        idle.write_all(b"GET /livez HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        idle.read_u8().await.unwrap();

        server.shutdown.cancel();

        read_to_close(&mut idle).await;
        tokio::time::timeout(PATIENCE, server.task).await.unwrap().unwrap();
    }
}
