//! The state of one ext_proc stream, which is one HTTP request: a pure machine that maps messages to steps.
//!
//! Envoy sends request headers, then the body (unless the headers end the stream), then response headers. The machine
//! takes messages in any order, because filters before us may answer locally and modes may be overridden: what it does
//! not expect it lets pass. It asks for a decision at most once.
//!
//! In full duplex (the endpoint-picker protocol) Envoy gives bodies away in pieces, and the request's headers wait for
//! our answer. The machine holds the pieces up to a limit, asks for the decision when the last has come, answers the
//! headers, and sends the body back. What is larger is decided by its beginning and then passed on as it comes. The
//! response's body is sent back piece by piece.

use envoy_types::pb::envoy::service::ext_proc::v3::processing_request::Request;
use envoy_types::pb::envoy::service::ext_proc::v3::{HttpBody, HttpHeaders, ProcessingRequest, ProcessingResponse};

use super::decide::Verdict;
use super::echo::{Echo, End, Side};
use super::held::{Room, Share};
use super::message::{BodyMode, Modes, RequestHead, Served};
use super::reply::{self, Replies, RequestStep};

/// What the adapter has to do next. Before it takes the next message it has to send all that
/// [`StreamState::next_piece`] has.
#[derive(Debug)]
pub enum Step {
    /// Send this and wait for the next message.
    Reply(Box<ProcessingResponse>),
    /// Decide on this request, then send what [`StreamState::decided`] returns.
    Decide(Question),
    /// Take note of who served, then send this.
    Served(Served, Box<ProcessingResponse>),
    /// Wait for the next message: this one wants no answer.
    Wait,
    /// End the stream with an error: Envoy sends bodies in a way that we cannot answer.
    Unsupported(BodyMode),
}

/// A request that wants a decision.
#[derive(Debug)]
pub struct Question {
    /// From the headers step.
    pub head: RequestHead,
    /// The body; empty when there is none.
    pub body: Vec<u8>,
    /// Whether the body is too large to be read; in full duplex it is only the beginning of one.
    pub is_oversized: bool,
}

/// What streams have in common.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Builds the replies.
    pub replies: Replies,
    /// How Envoy sends request bodies on a stream that does not tell.
    pub assumed_mode: BodyMode,
    /// Most bytes of a body that are read or, in full duplex, held, apart from the piece that goes beyond.
    pub body_bytes: usize,
    /// For what is held of all streams' bodies while they come.
    pub room: Room,
}

/// Where a stream stands.
#[derive(Debug)]
pub struct StreamState {
    settings: Settings,
    /// As the first message told them.
    modes: Option<Modes>,
    phase: Phase,
    /// Whether the request's body is passed on as it comes, in full duplex.
    is_unread: bool,
    /// What is to be sent before the next message is taken.
    echo: Option<Echo>,
    /// Whether the last of the response has come.
    has_response_ended: bool,
}

#[derive(Debug)]
enum Phase {
    /// Nothing of the request has come.
    Start,
    /// The headers have come, the body is still to come.
    AwaitingBody(RequestHead),
    /// Full duplex: pieces of the body are held until the last one has come.
    Collecting(Collected),
    /// A decision was asked for and is not there yet.
    Deciding(Owed),
    /// Full duplex: the headers are answered, and each piece of the body goes back as it comes.
    PassingOn,
    /// The request is on its way, or was answered.
    Past,
}

#[derive(Debug)]
struct Collected {
    /// None: the headers were not sent to us, so that none are answered.
    head: Option<RequestHead>,
    body: Vec<u8>,
    share: Share,
}

/// What Envoy waits for during a decision.
#[derive(Clone, Copy, Debug)]
enum Owed {
    /// The answer to this step.
    Step(RequestStep),
    /// The answer to the headers, if they were sent, then the body.
    Body { has_headers: bool, end: End },
}

impl StreamState {
    /// A stream on which nothing has happened.
    pub fn new(settings: Settings) -> Self {
        Self { settings, modes: None, phase: Phase::Start, is_unread: false, echo: None, has_response_ended: false }
    }

    /// The same where nobody wants to know the request's body: where the headers wait for it, they do no longer.
    #[must_use]
    pub fn unread(self) -> Self {
        Self { is_unread: true, ..self }
    }

    /// How Envoy sends bodies on this stream; none before the first message.
    pub fn modes(&self) -> Option<Modes> {
        self.modes
    }

    /// Whether the stream may end with OK. Before the decision, Envoy would take that as "pass the request on unrouted",
    /// even where it is told to fail closed; in full duplex, what has been sent to us and not yet sent back would be
    /// missing in the body, and nobody would know.
    pub fn may_end(&self) -> bool {
        let is_response_ours = self.modes.is_some_and(|modes| modes.response == BodyMode::FullDuplexStreamed);
        matches!(self.phase, Phase::Past) && self.echo.is_none() && (!is_response_ours || self.has_response_ended)
    }

    /// The next message that is due without another one of Envoy's.
    pub fn next_piece(&mut self) -> Option<ProcessingResponse> {
        let piece = self.echo.as_mut()?.next();
        if piece.is_none() {
            self.echo = None;
        }
        piece
    }

    /// Moves the machine by one message.
    pub fn on_message(&mut self, mut message: ProcessingRequest) -> Step {
        let assumed = self.settings.assumed_mode;
        let modes = *self.modes.get_or_insert_with(|| Modes::of(&message, assumed));
        if message.observability_mode {
            return Step::Wait;
        }
        match message.request.take() {
            Some(Request::RequestHeaders(headers)) => self.on_request_headers(modes.request, &message, &headers),
            Some(Request::RequestBody(body)) if modes.request == BodyMode::FullDuplexStreamed => self.on_piece(body),
            Some(Request::RequestBody(body)) => self.on_request_body(body.body),
            Some(Request::RequestTrailers(_)) => self.on_request_trailers(),
            Some(Request::ResponseHeaders(headers)) => self.on_response_headers(&message, &headers),
            Some(Request::ResponseBody(body)) if modes.response == BodyMode::FullDuplexStreamed => {
                self.on_response_piece(body)
            }
            Some(Request::ResponseBody(_)) => send(reply::response_body()),
            Some(Request::ResponseTrailers(_)) => {
                self.has_response_ended = true;
                send(reply::trailers(Side::Response))
            }
            None => Step::Wait,
        }
    }

    /// The decision on `question`, and the request's body if it is to be another one.
    pub fn decided(&mut self, question: Question, verdict: &Verdict, body: Option<Vec<u8>>) -> ProcessingResponse {
        let step = match std::mem::replace(&mut self.phase, Phase::Past) {
            Phase::Deciding(Owed::Body { has_headers, end }) => {
                let reply = self.settings.replies.verdict(RequestStep::Headers, verdict);
                return match (verdict, body) {
                    (Verdict::Refuse(_), _) => reply,
                    (_, Some(body)) => {
                        let reply = reply::with_length(reply, body.len());
                        self.send_back(reply, has_headers, body, end)
                    }
                    (_, None) => self.send_back(reply, has_headers, question.body, end),
                };
            }
            Phase::Deciding(Owed::Step(step)) => step,
            _ => RequestStep::Body,
        };
        let reply = self.settings.replies.verdict(step, verdict);
        // In all other modes the length, or the rest of a body that did not fit, goes to the endpoint whatever we say.
        let may_replace = self.modes.is_some_and(|modes| modes.request == BodyMode::Buffered);
        match body {
            Some(body) if may_replace => reply::with_body(reply, body),
            Some(_) | None => reply,
        }
    }

    /// Answers the headers with `reply`, then sends `body` back. Where no headers were sent, only the metadata can tell
    /// the endpoint: they go with the first piece.
    fn send_back(
        &mut self,
        reply: ProcessingResponse,
        has_headers: bool,
        body: Vec<u8>,
        end: End,
    ) -> ProcessingResponse {
        if end == End::Open {
            self.phase = Phase::PassingOn;
        }
        let mut echo = Echo::new(Side::Request, body, end);
        let first = if has_headers { None } else { echo.next() };
        self.echo = Some(echo);
        match first {
            Some(piece) => ProcessingResponse { dynamic_metadata: reply.dynamic_metadata, ..piece },
            None => reply,
        }
    }

    fn on_request_headers(&mut self, mode: BodyMode, message: &ProcessingRequest, headers: &HttpHeaders) -> Step {
        if !matches!(self.phase, Phase::Start) {
            if mode == BodyMode::FullDuplexStreamed && matches!(self.phase, Phase::Past) && !headers.end_of_stream {
                // The response came first: nobody waits for a decision, but the body has to go back.
                self.phase = Phase::PassingOn;
            }
            return send(reply::untouched(RequestStep::Headers));
        }
        let head = RequestHead::of(headers, message.metadata_context.as_ref());
        match mode {
            _ if headers.end_of_stream => self.decide_at(RequestStep::Headers, head, Vec::new()),
            // The endpoint is chosen when the headers are answered, so that is when we must choose.
            BodyMode::None | BodyMode::Streamed => self.decide_at(RequestStep::Headers, head, Vec::new()),
            BodyMode::Buffered | BodyMode::BufferedPartial => {
                self.phase = Phase::AwaitingBody(head);
                send(self.settings.replies.pass(RequestStep::Headers))
            }
            BodyMode::FullDuplexStreamed if self.is_unread => {
                self.decide_on(self.nothing_collected(Some(head)), End::Open)
            }
            BodyMode::FullDuplexStreamed => {
                self.phase = Phase::Collecting(self.nothing_collected(Some(head)));
                Step::Wait
            }
            BodyMode::Grpc => Step::Unsupported(mode),
        }
    }

    fn on_request_body(&mut self, body: Vec<u8>) -> Step {
        match std::mem::replace(&mut self.phase, Phase::Past) {
            Phase::AwaitingBody(head) => self.decide_at(RequestStep::Body, head, body),
            // The headers were not sent to us: the body alone still names its model.
            Phase::Start => self.decide_at(RequestStep::Body, RequestHead::default(), body),
            other => {
                // The decision stands: taking the routing headers away again would undo it.
                self.phase = other;
                send(reply::untouched(RequestStep::Body))
            }
        }
    }

    /// A piece of the request's body, in full duplex.
    fn on_piece(&mut self, piece: HttpBody) -> Step {
        match std::mem::replace(&mut self.phase, Phase::Past) {
            Phase::Start => self.collect(self.nothing_collected(None), piece),
            Phase::Collecting(collected) => self.collect(collected, piece),
            Phase::PassingOn => {
                if !piece.end_of_stream {
                    self.phase = Phase::PassingOn;
                }
                self.pass_on(Side::Request, piece)
            }
            other => {
                // Envoy 1.35 and later may send the last piece of a large body twice (envoyproxy/envoy#46237).
                self.phase = other;
                Step::Wait
            }
        }
    }

    fn nothing_collected(&self, head: Option<RequestHead>) -> Collected {
        Collected { head, body: Vec::new(), share: self.settings.room.share() }
    }

    fn collect(&mut self, mut collected: Collected, piece: HttpBody) -> Step {
        let has_room = collected.share.take(piece.body.len());
        if collected.body.is_empty() {
            collected.body = piece.body;
        } else {
            collected.body.extend_from_slice(&piece.body);
        }
        if piece.end_of_stream {
            return self.decide_on(collected, End::Body);
        }
        if collected.body.len() > self.settings.body_bytes || !has_room {
            return self.decide_on(collected, End::Open);
        }
        self.phase = Phase::Collecting(collected);
        Step::Wait
    }

    fn on_request_trailers(&mut self) -> Step {
        match std::mem::replace(&mut self.phase, Phase::Past) {
            Phase::Collecting(collected) => return self.decide_on(collected, End::Trailers),
            Phase::PassingOn => {}
            other => self.phase = other,
        }
        send(reply::trailers(Side::Request))
    }

    fn on_response_headers(&mut self, message: &ProcessingRequest, headers: &HttpHeaders) -> Step {
        // An endpoint may answer before it has the whole body, which has to go on all the same.
        if !matches!(self.phase, Phase::PassingOn) {
            self.phase = Phase::Past;
        }
        self.has_response_ended |= headers.end_of_stream;
        Step::Served(Served::of(message, headers), Box::new(reply::response_headers()))
    }

    /// A piece of the response's body, in full duplex.
    fn on_response_piece(&mut self, piece: HttpBody) -> Step {
        if self.has_response_ended {
            return Step::Wait;
        }
        self.has_response_ended = piece.end_of_stream;
        self.pass_on(Side::Response, piece)
    }

    fn pass_on(&mut self, side: Side, piece: HttpBody) -> Step {
        let end = if piece.end_of_stream { End::Body } else { End::Open };
        self.echo = Some(Echo::new(side, piece.body, end));
        self.next_piece().map_or(Step::Wait, send)
    }

    fn decide_at(&mut self, step: RequestStep, head: RequestHead, body: Vec<u8>) -> Step {
        self.phase = Phase::Deciding(Owed::Step(step));
        let is_oversized = body.len() > self.settings.body_bytes;
        Step::Decide(Question { head, body, is_oversized })
    }

    fn decide_on(&mut self, Collected { head, body, .. }: Collected, end: End) -> Step {
        self.phase = Phase::Deciding(Owed::Body { has_headers: head.is_some(), end });
        let is_oversized = end == End::Open || body.len() > self.settings.body_bytes;
        Step::Decide(Question { head: head.unwrap_or_default(), body, is_oversized })
    }
}

fn send(response: ProcessingResponse) -> Step {
    Step::Reply(Box::new(response))
}

#[cfg(test)]
mod tests;
