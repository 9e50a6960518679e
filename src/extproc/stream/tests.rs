use std::collections::HashMap;

use envoy_types::pb::envoy::config::core::v3::{HeaderMap, HeaderValue, Metadata};
use envoy_types::pb::envoy::extensions::filters::http::ext_proc::v3::processing_mode::BodySendMode;
use envoy_types::pb::envoy::service::ext_proc::v3::body_mutation::Mutation;
use envoy_types::pb::envoy::service::ext_proc::v3::processing_response::Response;
use envoy_types::pb::envoy::service::ext_proc::v3::{
    BodyMutation, HeaderMutation, HttpBody, HttpTrailers, ImmediateResponse, ProtocolConfiguration,
};
use envoy_types::pb::google::protobuf::{ListValue, Struct, Value, value::Kind};

use super::super::decide::{Leave, Refusal};
use super::super::reply::{Selection, SelectionMode};
use super::*;

mod duplex;

fn state() -> StreamState {
    state_of(BodyMode::Buffered, 1 << 20)
}

/// Bytes of all streams' bodies that are held.
const ROOM: usize = 1 << 20;

fn state_of(assumed_mode: BodyMode, body_bytes: usize) -> StreamState {
    let header = "x-gateway-destination-endpoint".to_owned();
    let replies = Replies::new(Selection { mode: SelectionMode::OverrideHost, header });
    StreamState::new(Settings { replies, assumed_mode, body_bytes, room: Room::new(ROOM) })
}

/// A question that nobody has asked.
fn question() -> Question {
    Question { head: RequestHead::default(), body: Vec::new(), is_oversized: false }
}

fn asked(step: Step) -> Question {
    match step {
        Step::Decide(question) => question,
        other => panic!("expected to decide, found {other:?}"),
    }
}

fn headers(pairs: &[(&str, &str)], end_of_stream: bool) -> HttpHeaders {
    let header = |(key, value): &(&str, &str)| HeaderValue {
        key: (*key).to_owned(),
        raw_value: value.as_bytes().to_vec(),
        ..Default::default()
    };
    let headers = Some(HeaderMap { headers: pairs.iter().map(header).collect() });
    HttpHeaders { headers, end_of_stream, ..Default::default() }
}

fn message(request: Request) -> ProcessingRequest {
    ProcessingRequest { request: Some(request), ..Default::default() }
}

fn request_headers(end_of_stream: bool) -> ProcessingRequest {
    message(Request::RequestHeaders(headers(&[(":path", "/v1/completions")], end_of_stream)))
}

fn with_mode(mode: BodySendMode) -> ProcessingRequest {
    let protocol_config = ProtocolConfiguration { request_body_mode: mode.into(), ..Default::default() };
    ProcessingRequest { protocol_config: Some(protocol_config), ..request_headers(false) }
}

fn request_body(body: &[u8]) -> ProcessingRequest {
    message(Request::RequestBody(HttpBody { body: body.to_vec(), end_of_stream: true, ..Default::default() }))
}

fn response_headers(status: &str) -> ProcessingRequest {
    message(Request::ResponseHeaders(headers(&[(":status", status)], false)))
}

fn replied(step: Step) -> Response {
    match step {
        Step::Reply(reply) => reply.response.expect("a reply has a response"),
        other => panic!("expected a reply, found {other:?}"),
    }
}

fn mutation(response: Response) -> HeaderMutation {
    match response {
        Response::RequestHeaders(reply) => reply.response.and_then(|common| common.header_mutation),
        Response::RequestBody(reply) => reply.response.and_then(|common| common.header_mutation),
        other => panic!("expected a request step, found {other:?}"),
    }
    .expect("a request step always mutates headers")
}

fn assert_clears_routing_headers(response: Response) {
    let removed = mutation(response).remove_headers;
    assert_eq!(removed, ["x-gateway-destination-endpoint", "target-pod"]);
}

#[test]
fn buffered_request_is_decided_at_its_body() {
    let mut state = state();
    assert_clears_routing_headers(replied(state.on_message(request_headers(false))));
    let question = asked(state.on_message(request_body(b"{}")));
    assert_eq!((question.head.path.as_str(), question.body.as_slice()), ("/v1/completions", &b"{}"[..]));
    assert!(!state.may_end(), "Envoy would pass the request on unrouted");
    let reply = state.decided(question, &Verdict::Leave(Leave::UnknownModel), None);
    assert_clears_routing_headers(reply.response.expect("a reply has a response"));
    assert!(state.may_end());
}

#[test]
fn buffered_body_beyond_the_limit_is_not_read() {
    for (len, is_oversized) in [(10, false), (11, true)] {
        let mut state = state_of(BodyMode::Buffered, 10);
        state.on_message(request_headers(false));
        assert_eq!(asked(state.on_message(request_body(&vec![b'x'; len]))).is_oversized, is_oversized, "{len} bytes");
    }
}

#[test]
fn bodyless_request_is_decided_at_its_headers() {
    let mut state = state();
    let question = asked(state.on_message(request_headers(true)));
    assert!(question.body.is_empty(), "{question:?}");
    let reply =
        state.decided(question, &Verdict::Leave(Leave::NoModel), None).response.expect("a reply has a response");
    assert!(matches!(reply, Response::RequestHeaders(_)));
    assert_clears_routing_headers(reply);
}

#[test]
fn modes_that_send_no_body_in_time_are_decided_at_the_headers() {
    for (mode, expected) in [(BodySendMode::None, BodyMode::None), (BodySendMode::Streamed, BodyMode::Streamed)] {
        let mut state = state();
        let question = asked(state.on_message(with_mode(mode)));
        assert_eq!(state.modes().map(|modes| modes.request), Some(expected));
        state.decided(question, &Verdict::Leave(Leave::NoModel), None);
        let Response::RequestBody(reply) = replied(state.on_message(request_body(b"x"))) else { panic!("in kind") };
        assert_eq!(reply.response, None, "a later piece does not undo the decision");
    }
}

#[test]
fn grpc_is_refused_rather_than_answered_wrongly() {
    let step = state().on_message(with_mode(BodySendMode::Grpc));
    assert!(matches!(step, Step::Unsupported(BodyMode::Grpc)), "{step:?}");
}

#[test]
fn body_is_replaced_with_its_length_and_only_where_it_is_whole_and_has_not_gone_ahead() {
    let new_body = |mode| {
        let mut state = state();
        if let Some(mode) = mode {
            state.on_message(with_mode(mode));
        } else {
            state.on_message(request_headers(false));
        }
        if matches!(mode, None | Some(BodySendMode::Buffered | BodySendMode::BufferedPartial)) {
            state.on_message(request_body(b"{}"));
        }
        let reply = state.decided(question(), &Verdict::Leave(Leave::NoModel), Some(b"{ }".to_vec())).response;
        let common = match reply {
            Some(Response::RequestBody(body)) => body.response,
            Some(Response::RequestHeaders(headers)) => headers.response,
            other => panic!("expected a request step, found {other:?}"),
        }
        .expect("a request step always mutates headers");
        let headers = common.header_mutation.expect("a request step always mutates headers");
        assert_eq!(headers.remove_headers, ["x-gateway-destination-endpoint", "target-pod"]);
        let set = headers.set_headers.into_iter().filter_map(|option| option.header);
        (common.body_mutation, set.map(|header| (header.key, header.raw_value)).collect::<Vec<_>>())
    };
    for mode in [None, Some(BodySendMode::Buffered)] {
        let (body, set) = new_body(mode);
        assert_eq!(body, Some(BodyMutation { mutation: Some(Mutation::Body(b"{ }".to_vec())) }), "{mode:?}");
        assert_eq!(set, [("content-length".to_owned(), b"3".to_vec())], "{mode:?}");
    }
    for mode in [BodySendMode::None, BodySendMode::Streamed, BodySendMode::BufferedPartial] {
        assert_eq!(new_body(Some(mode)), (None, vec![]), "{mode:?}");
    }
}

#[test]
fn refusal_is_an_openai_error() {
    let mut state = state();
    state.on_message(request_headers(true));
    let reply = state.decided(question(), &Verdict::Refuse(Refusal::NoEndpoint), None).response;
    let Some(Response::ImmediateResponse(ImmediateResponse { status, body, details, .. })) = reply else {
        panic!("expected an immediate response, found {reply:?}")
    };
    let error: serde_json::Value = serde_json::from_slice(&body).expect("the body is JSON");
    assert_eq!(status.expect("a status").code, 503);
    assert_eq!(details, "warmroute_no_endpoint");
    assert_eq!(error["error"]["code"], "no_endpoint");
    assert!(error["error"]["message"].is_string() && error["error"]["type"].is_string());
}

#[test]
fn response_headers_tell_who_served() {
    let attributes = HashMap::from([
        ("upstream.address".to_owned(), Value { kind: Some(Kind::StringValue("127.0.0.1:8001".to_owned())) }),
        ("upstream.request_attempt_count".to_owned(), Value { kind: Some(Kind::NumberValue(2.0)) }),
    ]);
    let filter = "envoy.filters.http.ext_proc".to_owned();
    let message = ProcessingRequest {
        attributes: HashMap::from([(filter, Struct { fields: attributes })]),
        ..response_headers("200")
    };
    let Step::Served(served, _) = state().on_message(message) else { panic!("expected to learn who served") };
    let address = "127.0.0.1:8001".parse().ok();
    assert_eq!(served, Served { status: 200, address, n_attempts: Some(2) });
}

#[test]
fn subset_of_the_gateway_is_read_from_metadata() {
    let text = |text: &str| Value { kind: Some(Kind::StringValue(text.to_owned())) };
    let list = |values| Value { kind: Some(Kind::ListValue(ListValue { values })) };
    let port = |port| std::net::SocketAddr::from(([10, 0, 0, 1], port));
    for (value, expected) in [
        (text("10.0.0.1:1, 10.0.0.1:2"), vec![port(1), port(2)]),
        (list(vec![text("10.0.0.1:1"), text("no address")]), vec![port(1)]),
        (list(vec![]), vec![]),
        (Value { kind: None }, vec![]),
    ] {
        let fields = HashMap::from([("x-gateway-destination-endpoint-subset".to_owned(), value)]);
        let filter_metadata = HashMap::from([("envoy.lb.subset_hint".to_owned(), Struct { fields })]);
        let metadata = Metadata { filter_metadata, ..Default::default() };
        let message = ProcessingRequest { metadata_context: Some(metadata), ..request_headers(true) };
        let head = asked(state().on_message(message)).head;
        assert_eq!(head.subset, Some(expected));
    }
    let head = asked(state().on_message(request_headers(true))).head;
    assert_eq!(head.subset, None);
}

fn is_in_kind(message: &ProcessingRequest, step: &Step) -> bool {
    let reply = match step {
        Step::Reply(reply) | Step::Served(_, reply) => reply.response.as_ref(),
        Step::Decide(_) => {
            return matches!(message.request, Some(Request::RequestHeaders(_) | Request::RequestBody(_)));
        }
        Step::Wait => return message.request.is_none(),
        Step::Unsupported(_) => return false,
    };
    matches!(
        (message.request.as_ref(), reply),
        (Some(Request::RequestHeaders(_)), Some(Response::RequestHeaders(_)))
            | (Some(Request::RequestBody(_)), Some(Response::RequestBody(_)))
            | (Some(Request::RequestTrailers(_)), Some(Response::RequestTrailers(_)))
            | (Some(Request::ResponseHeaders(_)), Some(Response::ResponseHeaders(_)))
            | (Some(Request::ResponseBody(_)), Some(Response::ResponseBody(_)))
            | (Some(Request::ResponseTrailers(_)), Some(Response::ResponseTrailers(_)))
    )
}

/// All messages in all orders of length 4: every one is answered in kind, or asks for a decision at most once.
#[test]
fn any_message_order_survives() {
    type Build = fn() -> ProcessingRequest;
    let builders: [Build; 8] = [
        || request_headers(false),
        || request_headers(true),
        || request_body(b"x"),
        || message(Request::RequestTrailers(HttpTrailers::default())),
        || response_headers("200"),
        || message(Request::ResponseBody(HttpBody::default())),
        || message(Request::ResponseTrailers(HttpTrailers::default())),
        ProcessingRequest::default,
    ];
    for order in 0..builders.len().pow(4) {
        let mut state = state();
        let mut n_decided = 0;
        for position in 0..4 {
            let build = builders[order / builders.len().pow(position) % builders.len()];
            let message = build();
            let step = state.on_message(message.clone());
            assert!(is_in_kind(&message, &step), "order {order}: {message:?} {step:?}");
            if let Step::Decide(_) = step {
                n_decided += 1;
                state.decided(question(), &Verdict::Leave(Leave::NoModel), None);
            }
        }
        assert!(n_decided <= 1, "order {order}");
    }
}
