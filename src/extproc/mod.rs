//! Envoy's external processor: one gRPC stream per HTTP request.
//!
//! [`stream`] says what each message asks for, [`decide`] decides, [`report`] says which requests ask their engine for
//! a report, [`reply`] builds answers, [`echo`] sends bodies back, [`mod@settle`] learns from the response; this adapter
//! only carries values between them and the socket. The in-flight count lives in the stream's `Session`: however the
//! stream ends, the count ends with it.
//!
//! The port also answers `grpc.health.v1`, see [`health`].
//!
//! A panic costs its own stream, which ends with `internal`: never with OK, which would let the request pass unrouted.

pub mod decide;
pub mod echo;
pub mod explain;
pub mod health;
pub mod held;
pub mod journal;
pub mod message;
pub mod reply;
pub mod report;
pub mod rollout;
pub mod settle;
pub mod stream;

use std::convert::Infallible;
use std::io;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::service::ext_proc::v3::external_processor_server::{
    ExternalProcessor, ExternalProcessorServer,
};
use envoy_types::pb::envoy::service::ext_proc::v3::{ProcessingRequest, ProcessingResponse};
use futures_util::future::FutureExt;
use futures_util::stream::{self as futures_stream, BoxStream, Stream, StreamExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;
use tonic::transport::server::TcpIncoming;
use tonic::{Code, Request, Response, Status, Streaming};
use tracing::{Instrument, debug, error, warn};

use self::decide::{Answer, Routed, Router, Shadowed, Verdict};
use self::held::Room;
use self::journal::Record;
use self::message::{BodyMode, Modes, Served};
use self::reply::{Replies, Selection};
use self::rollout::Mode;
use self::settle::{Settled, settle};
use self::stream::{Question, Settings, Step, StreamState};
use crate::request::Api;
use crate::routing::pick::{Decision, Outcome};
use crate::telemetry::metrics::{Metrics, NotServedCause, StreamInFlight};
use crate::telemetry::trace::{RequestSpan, attribute, request_span};
use crate::tokenizer::Late;

/// A message is a body and little else: room for the protocol around it.
const MESSAGE_OVERHEAD: usize = 1 << 20;
/// Messages up to this size are taken also where bodies of that size are not read: what Envoy has buffered while it had
/// to wait comes in one piece, up to its own limit, and refusing it would fail the request.
const LEAST_MESSAGE: usize = 64 << 20;
/// Streams per connection. Envoy opens one per request in flight and holds it until the answer has ended, so that
/// hyper's default of 200 would queue requests.
const MAX_STREAMS: u32 = 1 << 20;
/// Streams that a connection may reset before we have accepted them. Envoy resets one for each client that leaves, so
/// that a crowd of them must not look like an attack and cost the connection (hyper's default is 20).
const MAX_PENDING_RESETS: usize = 1 << 16;
/// Flow-control window of a stream and of a connection, so that a large body needs few round trips.
const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 64 << 20;

/// A peer that does not answer a ping is gone, with all its streams: a lost node closes nothing, and after our last
/// reply we have nothing to write that would tell.
const PING_INTERVAL: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(5);
/// What streams may hold of bodies that are still coming, all together, in full duplex: half of what a router's memory
/// should have beyond its index. What is more is decided by its beginning.
const HELD_BYTES: usize = 256 << 20;
/// Pause after a failed accept, which mostly means that file descriptors have run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// Once all streams have ended, connections get this long to take their last bytes; one that says nothing is not waited
/// for.
const LINGER: Duration = Duration::from_secs(1);

/// Settings of the server.
#[derive(Clone, Debug)]
pub struct Config {
    /// How Envoy is told the endpoint.
    pub selection: Selection,
    /// How Envoy sends request bodies on a stream that does not tell.
    pub assumed_mode: BodyMode,
    /// Largest request body in bytes that is read. A larger one is served by load, as long as Envoy lets it through.
    pub body_bytes: usize,
}

/// The server failed.
#[derive(Debug, thiserror::Error)]
#[error("the ext_proc server failed")]
pub struct Error(#[from] tonic::transport::Error);

/// Serves ext_proc on `listener` until `shutdown`, then until the open streams have ended. The health service says what
/// `ready` does.
///
/// # Errors
/// The listener failed.
pub async fn run(
    listener: TcpListener,
    config: Config,
    router: Arc<Router>,
    ready: watch::Receiver<bool>,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    let streams = TaskTracker::new();
    let settings = Settings {
        replies: Replies::new(config.selection),
        assumed_mode: config.assumed_mode,
        body_bytes: config.body_bytes,
        room: Room::new(config.body_bytes.max(HELD_BYTES)),
    };
    let processor = Processor { router, settings, shutdown: shutdown.clone(), streams: streams.clone() };
    let (health, follow_readiness) = health::service(ready).await;
    let message_bytes = config.body_bytes.max(LEAST_MESSAGE) + MESSAGE_OVERHEAD;
    let service = ExternalProcessorServer::new(processor).max_decoding_message_size(message_bytes);
    let mut server = pin!(
        tonic::transport::Server::builder()
            .max_concurrent_streams(MAX_STREAMS)
            .http2_max_pending_accept_reset_streams(Some(MAX_PENDING_RESETS))
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .http2_keepalive_interval(Some(PING_INTERVAL))
            .http2_keepalive_timeout(Some(PING_TIMEOUT))
            .add_service(service)
            .add_service(health)
            .serve_with_incoming_shutdown(incoming(listener), shutdown.clone().cancelled_owned())
    );
    tokio::select! {
        result = &mut server => return Ok(result?),
        () = drained(&shutdown, &streams) => {}
        never = follow_readiness => match never {},
    }
    Ok(tokio::time::timeout(LINGER, server).await.unwrap_or(Ok(()))?)
}

fn incoming(listener: TcpListener) -> impl Stream<Item = io::Result<TcpStream>> {
    TcpIncoming::from(listener).with_nodelay(Some(true)).then(|accepted| async {
        if let Err(error) = &accepted {
            warn!(%error, "an ext_proc connection cannot be accepted");
            tokio::time::sleep(ACCEPT_PAUSE).await;
        }
        accepted
    })
}

/// Comes true when the process is stopping and the last stream has ended.
async fn drained(shutdown: &CancellationToken, streams: &TaskTracker) {
    shutdown.cancelled().await;
    streams.close();
    streams.wait().await;
}

struct Processor {
    router: Arc<Router>,
    settings: Settings,
    shutdown: CancellationToken,
    /// Tracks the open streams.
    streams: TaskTracker,
}

#[tonic::async_trait]
impl ExternalProcessor for Processor {
    type ProcessStream = BoxStream<'static, Result<ProcessingResponse, Status>>;

    async fn process(
        &self,
        request: Request<Streaming<ProcessingRequest>>,
    ) -> Result<Response<Self::ProcessStream>, Status> {
        let span = request_span(request.metadata());
        let state = StreamState::new(self.settings.clone());
        let session = Session {
            inbound: request.into_inner(),
            state: if self.router.is_off() { state.unread() } else { state },
            router: self.router.clone(),
            shutdown: self.shutdown.clone(),
            routed: None,
            shadowed: None,
            record: None,
            late: None,
            _counted: self.router.metrics().open_stream(),
            _tracked: self.streams.token(),
            span,
        };
        Ok(Response::new(futures_stream::unfold(Some(session), next_reply).boxed()))
    }
}

/// One stream and everything that ends with it.
struct Session {
    inbound: Streaming<ProcessingRequest>,
    state: StreamState,
    router: Arc<Router>,
    shutdown: CancellationToken,
    routed: Option<Box<Routed>>,
    /// Instead of that, where Envoy does not follow.
    shadowed: Option<Box<Shadowed>>,
    /// What is kept of the decision, for those who ask.
    record: Option<Arc<Record>>,
    /// What may still be learned for later requests; ends with the stream.
    late: Option<Late>,
    _counted: StreamInFlight,
    _tracked: TaskTrackerToken,
    span: RequestSpan,
}

/// The next answer of a stream and what is left of it; after an error nothing is.
async fn next_reply(session: Option<Session>) -> Option<(Result<ProcessingResponse, Status>, Option<Session>)> {
    let mut session = session?;
    let (span, router) = (session.span.clone(), session.router.clone());
    match contained(session.reply().instrument(span), router.metrics()).await {
        Ok(Some(reply)) => Some((Ok(reply), Some(session))),
        Ok(None) => {
            session.span.end(Code::Ok);
            None
        }
        Err(status) => {
            session.span.end(status.code());
            Some((Err(status), None))
        }
    }
}

/// Turns a panic into `internal`. What the work borrowed is dropped with its stream and seen by nobody again.
async fn contained<T>(work: impl Future<Output = Result<T, Status>>, metrics: &Metrics) -> Result<T, Status> {
    AssertUnwindSafe(work).catch_unwind().await.unwrap_or_else(|_| {
        error!("a stream panicked");
        metrics.count_stream_panic();
        Err(Status::internal("warmroute: a stream panicked"))
    })
}

impl Session {
    /// What is due, else takes messages until one wants an answer; none when the stream has ended.
    async fn reply(&mut self) -> Result<Option<ProcessingResponse>, Status> {
        if let Some(piece) = self.state.next_piece() {
            return Ok(Some(piece));
        }
        while let Some(message) = self.next_message().await? {
            let is_first = self.state.modes().is_none();
            let is_observing = message.observability_mode;
            let step = self.state.on_message(message);
            if is_first {
                self.check_mode(is_observing);
            }
            match step {
                Step::Wait => {}
                Step::Reply(reply) => return Ok(Some(*reply)),
                Step::Decide(question) => return Ok(Some(self.decide(question).await)),
                Step::Served(served, reply) => {
                    self.served(&served);
                    return Ok(Some(*reply));
                }
                Step::Unsupported(mode) => {
                    let mode = mode.as_str();
                    let expected = "expected buffered or full_duplex_streamed";
                    return Err(Status::failed_precondition(format!("request_body_mode {mode}, {expected}")));
                }
            }
        }
        Ok(None)
    }

    /// The next message; none when Envoy ended the stream, or when we are stopping and the request is on its way.
    async fn next_message(&mut self) -> Result<Option<ProcessingRequest>, Status> {
        let may_end = self.state.may_end();
        tokio::select! {
            biased;
            message = self.inbound.message() => message,
            () = self.shutdown.cancelled(), if may_end => Ok(None),
            never = finish(&mut self.late), if self.late.is_some() => match never {},
        }
    }

    fn check_mode(&self, is_observing: bool) {
        let misconfigured = self.state.modes().and_then(Modes::misconfigured);
        if let Some(mode) = if is_observing { Some("observability") } else { misconfigured } {
            self.router.metrics().count_misconfigured_stream(mode);
        }
    }

    async fn decide(&mut self, question: Question) -> ProcessingResponse {
        let Question { head, body, is_oversized } = &question;
        self.span.record(attribute::OPERATION_NAME, Api::of_path(&head.path).operation());
        let Answer { verdict, body, late } = if *is_oversized {
            self.router.decide_by_beginning(head, body)
        } else {
            self.router.decide(head, body).await
        };
        self.late = late;
        let mode = verdict.mode().or_else(|| self.router.common_mode());
        self.record = self.router.journal().keep(question.head.request_id.as_deref(), &verdict, mode);
        let reply = self.state.decided(question, &verdict, body);
        match verdict {
            Verdict::Route(routed) => {
                self.note_decision(&routed.decision, Mode::Active);
                self.routed = Some(routed);
            }
            Verdict::Shadow(shadowed) => {
                self.note_decision(&shadowed.decision, Mode::Shadow);
                self.shadowed = Some(shadowed);
            }
            Verdict::Leave(leave) => self.note_undecided("left_to_envoy", leave.as_str()),
            Verdict::Refuse(refusal) => self.note_undecided("refused", refusal.as_str()),
        }
        reply
    }

    fn note_undecided(&self, outcome: &'static str, reason: &'static str) {
        self.span.record(attribute::DECISION_OUTCOME, outcome);
        self.span.record(attribute::DECISION_FALLBACK, reason);
        debug!(outcome, reason, "no endpoint picked");
    }

    fn note_decision(&self, decision: &Decision, mode: Mode) {
        let Decision { model, policy, pick, outcome, prompt_tokens, .. } = decision;
        let fallback = if let Outcome::Fallback(fallback) = outcome { fallback.as_str() } else { "" };
        self.span.decided(decision);
        self.span.record(attribute::ROLLOUT_MODE, mode.as_str());
        debug!(
            %model, endpoint = %pick.endpoint.address, outcome = outcome.as_str(), fallback, policy = policy.as_str(),
            matched_tokens = pick.matched_tokens, offloaded_tokens = pick.offloaded_tokens, rank = pick.rank,
            prompt_tokens, mode = mode.as_str(), "endpoint picked"
        );
    }

    fn served(&mut self, served: &Served) {
        self.span.record(attribute::RESPONSE_STATUS_CODE, i64::from(served.status));
        if let Some(address) = served.address {
            self.span.record(attribute::ENDPOINT_SERVED, tracing::field::display(address));
        }
        self.span.record(attribute::ATTEMPTS, served.n_attempts.map(i64::from));
        if let Some(shadowed) = &mut self.shadowed {
            shadowed.served(served, self.router.now(), self.router.metrics());
        }
        let settled = self.routed.as_mut().map(|routed| settle(routed, served, self.router.now()));
        if let Some(record) = &self.record {
            record.served(served, settled.map(|(settled, _)| settled));
        }
        let Some((settled, is_newly_avoided)) = settled else { return };
        self.count_settled(settled, is_newly_avoided, served);
    }

    fn count_settled(&self, settled: Settled, is_newly_avoided: bool, served: &Served) {
        let Some(Routed { decision, .. }) = self.routed.as_deref() else { return };
        if settled == Settled::AsPicked {
            return;
        }
        let metrics = self.router.metrics();
        if is_newly_avoided {
            metrics.count_endpoint_avoided(&decision.model);
        }
        match settled {
            Settled::Retried => metrics.count_pick_not_served(&decision.model, NotServedCause::Retried),
            Settled::Elsewhere => metrics.count_pick_not_served(&decision.model, NotServedCause::OtherEndpoint),
            Settled::AsPicked | Settled::CannotServe | Settled::NotServed => {}
        }
        debug!(
            model = %decision.model, endpoint = %decision.pick.endpoint.address, ?settled, status = served.status,
            served_by = ?served.address, attempts = served.n_attempts, "the pick did not serve"
        );
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if self.state.may_end() {
            // Nothing is owed any more. Envoy ends a stream with the request, and rarely waits for us to end it too.
            self.span.end(Code::Ok);
        }
        if let Some(routed) = self.routed.take() {
            routed.end(self.router.now());
        }
        if let Some(record) = &self.record {
            record.ended();
        }
        if let Some(shadowed) = self.shadowed.take() {
            shadowed.end(self.router.now(), self.router.metrics());
        }
    }
}

/// Lets what is late go on; never returns, so that only something else ends the wait. A panic there is no matter of the
/// request, which has its answer.
async fn finish(late: &mut Option<Late>) -> Infallible {
    if let Some(work) = late
        && AssertUnwindSafe(work).catch_unwind().await.is_err()
    {
        error!("what was learned after the answer panicked");
    }
    *late = None;
    std::future::pending().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_ends_its_stream_with_internal_and_is_counted() {
        let metrics = Metrics::new();
        let result = contained::<()>(async { panic!("on purpose") }, &metrics).await;
        assert_eq!(result.map_err(|status| status.code()), Err(tonic::Code::Internal));
        assert!(metrics.encode().contains("warmroute_stream_panics_total 1\n"));
        assert_eq!(contained(async { Ok(1) }, &metrics).await.expect("no panic"), 1);
    }
}
