//! Full duplex: bodies that Envoy gives away in pieces.

use proptest::prelude::*;

use super::super::super::echo::PIECE_BYTES;
use super::super::super::reply::tests::{request_piece, response_piece};
use super::*;

const LIMIT: usize = 1000;

fn duplex() -> StreamState {
    state_of(BodyMode::FullDuplexStreamed, LIMIT)
}

fn piece(body: &[u8], end_of_stream: bool) -> HttpBody {
    HttpBody { body: body.to_vec(), end_of_stream, ..Default::default() }
}

fn request_message(body: &[u8], end_of_stream: bool) -> ProcessingRequest {
    message(Request::RequestBody(piece(body, end_of_stream)))
}

fn response_message(body: &[u8], end_of_stream: bool) -> ProcessingRequest {
    message(Request::ResponseBody(piece(body, end_of_stream)))
}

fn request_trailers() -> ProcessingRequest {
    message(Request::RequestTrailers(HttpTrailers::default()))
}

const LEAVE: Verdict = Verdict::Leave(Leave::UnknownModel);

/// All that comes in answer to a message, the decision on it included; also what was asked.
fn answers(
    state: &mut StreamState,
    message: ProcessingRequest,
    verdict: &Verdict,
    new_body: Option<&[u8]>,
) -> (Vec<ProcessingResponse>, Option<(Vec<u8>, bool)>) {
    let (first, asked) = match state.on_message(message) {
        Step::Reply(reply) | Step::Served(_, reply) => (Some(*reply), None),
        Step::Wait => (None, None),
        Step::Decide(question) => {
            let asked = (question.body.clone(), question.is_oversized);
            (Some(state.decided(question, verdict, new_body.map(<[u8]>::to_vec))), Some(asked))
        }
        Step::Unsupported(mode) => panic!("unsupported: {mode:?}"),
    };
    let mut replies: Vec<_> = first.into_iter().collect();
    replies.extend(std::iter::from_fn(|| state.next_piece()));
    (replies, asked)
}

/// What a whole request was answered with.
#[derive(Debug, Default)]
struct Answered {
    /// The kinds of the replies, neighbours that are equal taken together.
    kinds: Vec<&'static str>,
    body: Vec<u8>,
    n_ends: usize,
    set: Vec<(String, Vec<u8>)>,
    asked: Option<(Vec<u8>, bool)>,
}

impl Answered {
    fn take(&mut self, reply: &ProcessingResponse) {
        let kind = match reply.response.as_ref().expect("a reply has a response") {
            Response::RequestHeaders(_) => "headers",
            Response::RequestBody(_) => "body",
            Response::RequestTrailers(_) => "trailers",
            Response::ImmediateResponse(_) => "immediate",
            other => panic!("no answer to a request: {other:?}"),
        };
        if self.kinds.last() != Some(&kind) {
            self.kinds.push(kind);
        }
        if kind == "headers" {
            let headers = mutation(reply.response.clone().expect("a reply has a response"));
            assert_eq!(headers.remove_headers, ["x-gateway-destination-endpoint", "target-pod"]);
            let set = headers.set_headers.into_iter().filter_map(|option| option.header);
            self.set = set.map(|header| (header.key, header.raw_value)).collect();
        }
        if let Some((piece, is_last)) = request_piece(reply) {
            assert!(piece.len() <= PIECE_BYTES, "{} bytes in one piece", piece.len());
            assert_eq!(self.n_ends, 0, "a piece after the last");
            self.body.extend_from_slice(piece);
            self.n_ends += usize::from(is_last);
        }
    }
}

/// Sends headers and these messages, and decides as `verdict`.
fn answered(messages: Vec<ProcessingRequest>, verdict: &Verdict, new_body: Option<&[u8]>) -> (Answered, StreamState) {
    let (mut state, mut found) = (duplex(), Answered::default());
    for message in std::iter::once(request_headers(false)).chain(messages) {
        assert!(!state.may_end(), "what is held would be missing in the body");
        let (replies, asked) = answers(&mut state, message, verdict, new_body);
        found.asked = found.asked.or(asked);
        replies.iter().for_each(|reply| found.take(reply));
    }
    (found, state)
}

#[test]
fn every_end_of_a_request_is_answered_in_order() {
    let (part, rest) = (b"{\"a\":".as_slice(), b"1}".as_slice());
    let large = vec![b'x'; LIMIT];
    let cases = [
        (vec![request_message(part, false), request_message(rest, true)], vec!["headers", "body"], 1, false),
        (vec![request_message(part, false), request_message(b"", true)], vec!["headers", "body"], 1, false),
        (vec![request_message(b"", true)], vec!["headers", "body"], 1, false),
        (vec![request_message(part, false), request_trailers()], vec!["headers", "body", "trailers"], 0, false),
        (vec![request_trailers()], vec!["headers", "trailers"], 0, false),
        (vec![request_message(&large, true)], vec!["headers", "body"], 1, false),
        (vec![request_message(&large, false), request_message(rest, true)], vec!["headers", "body"], 1, true),
        (
            vec![request_message(&large, false), request_message(part, false), request_message(rest, true)],
            vec!["headers", "body"],
            1,
            true,
        ),
        (
            vec![request_message(&large, false), request_message(part, false), request_trailers()],
            vec!["headers", "body", "trailers"],
            0,
            true,
        ),
    ];
    for (messages, kinds, n_ends, is_oversized) in cases {
        let sent: Vec<u8> = messages.iter().flat_map(bytes_of).collect();
        let shown = format!("{messages:?}");
        let (found, _) = answered(messages, &LEAVE, None);
        assert_eq!((found.kinds, found.n_ends, &found.body), (kinds, n_ends, &sent), "{shown}");
        let asked = found.asked.expect("a decision was asked for");
        assert_eq!(asked.1, is_oversized, "{shown}");
        assert!(asked.0.len() <= LIMIT + part.len(), "{} bytes were held", asked.0.len());
        assert!(is_oversized || asked.0 == sent, "{shown}");
    }
}

fn bytes_of(message: &ProcessingRequest) -> Vec<u8> {
    match &message.request {
        Some(Request::RequestBody(body)) => body.body.clone(),
        _ => Vec::new(),
    }
}

#[test]
fn a_body_is_replaced_with_its_length_when_it_was_held_whole() {
    let ended = || vec![request_message(b"{}", true)];
    let (found, _) = answered(ended(), &LEAVE, Some(b"{ }"));
    assert_eq!(found.body, b"{ }");
    assert_eq!(found.set, [("content-length".to_owned(), b"3".to_vec())]);
    let (found, _) = answered(ended(), &LEAVE, None);
    assert_eq!(found.set, [], "Envoy keeps the client's length, or drops it");
}

#[test]
fn a_refused_request_gets_one_answer_and_no_body() {
    for messages in [
        vec![request_message(b"{}", true)],
        vec![request_message(b"{}", false), request_trailers()],
        vec![request_message(&[0; LIMIT + 1], false), request_message(b"more", true)],
    ] {
        let (found, _) = answered(messages, &Verdict::Refuse(Refusal::NoEndpoint), None);
        assert_eq!((found.kinds, found.body), (vec!["immediate"], vec![]));
    }
}

#[test]
fn a_last_piece_that_comes_twice_is_taken_once() {
    let mut state = duplex();
    state.on_message(request_headers(false));
    let (replies, _) = answers(&mut state, request_message(b"{}", true), &LEAVE, None);
    assert_eq!(replies.len(), 2);
    let (replies, asked) = answers(&mut state, request_message(b"{}", true), &LEAVE, None);
    assert_eq!((replies, asked), (vec![], None));
}

#[test]
fn a_request_without_a_body_is_answered_at_its_headers() {
    let mut state = duplex();
    let question = asked(state.on_message(request_headers(true)));
    let reply = state.decided(question, &LEAVE, None);
    assert!(matches!(reply.response, Some(Response::RequestHeaders(_))));
    assert_eq!(state.next_piece(), None);
}

#[test]
fn where_headers_are_not_sent_the_body_still_goes_back() {
    let mut state = duplex();
    let (replies, asked) = answers(&mut state, request_message(b"{}", true), &LEAVE, None);
    assert_eq!(asked, Some((b"{}".to_vec(), false)));
    assert_eq!(replies.iter().map(request_piece).collect::<Vec<_>>(), [Some((&b"{}"[..], true))]);
}

#[test]
fn a_body_whose_response_came_first_goes_back_undecided() {
    let mut state = duplex();
    state.on_message(response_headers("200"));
    let first = replied(state.on_message(request_headers(false)));
    assert!(matches!(first, Response::RequestHeaders(_)));
    for (bytes, is_last) in [(&b"a"[..], false), (b"b", true)] {
        let (replies, asked) = answers(&mut state, request_message(bytes, is_last), &LEAVE, None);
        assert_eq!(replies.iter().map(request_piece).collect::<Vec<_>>(), [Some((bytes, is_last))]);
        assert_eq!(asked, None);
    }
}

#[test]
fn the_stream_may_end_once_all_of_the_response_has_gone_back() {
    type Build = fn() -> ProcessingRequest;
    let trailers: Build = || message(Request::ResponseTrailers(HttpTrailers::default()));
    let ends: [Build; 2] = [|| response_message(b"c", true), trailers];
    for end in ends {
        let (_, mut state) = answered(vec![request_message(b"{}", true)], &LEAVE, None);
        assert!(!state.may_end(), "the response may be under way to us");
        for message in [response_headers("200"), response_message(b"a", false), response_message(b"b", false)] {
            state.on_message(message);
            assert_eq!(state.next_piece(), None);
            assert!(!state.may_end());
        }
        state.on_message(end());
        assert_eq!(state.next_piece(), None);
        assert!(state.may_end());
    }
    let (_, mut state) = answered(vec![request_message(b"{}", true)], &LEAVE, None);
    state.on_message(message(Request::ResponseHeaders(headers(&[(":status", "204")], true))));
    assert!(state.may_end(), "there is no body");
}

#[test]
fn a_response_that_envoy_keeps_is_passed_and_does_not_hold_the_stream() {
    let mut state = state();
    let config = ProtocolConfiguration {
        request_body_mode: BodySendMode::FullDuplexStreamed.into(),
        response_body_mode: BodySendMode::Streamed.into(),
        ..Default::default()
    };
    state.on_message(ProcessingRequest { protocol_config: Some(config), ..request_headers(false) });
    answers(&mut state, request_message(b"{}", true), &LEAVE, None);
    assert!(state.may_end());
    let Response::ResponseBody(reply) = replied(state.on_message(response_message(b"a", false))) else {
        panic!("expected an answer in kind")
    };
    assert_eq!(reply.response, None);
}

#[test]
fn what_an_endpoint_answers_early_does_not_stop_the_request() {
    let mut state = duplex();
    state.on_message(request_headers(false));
    answers(&mut state, request_message(&[0; LIMIT + 1], false), &LEAVE, None);
    state.on_message(response_headers("413"));
    let (replies, _) = answers(&mut state, request_message(b"rest", true), &LEAVE, None);
    assert_eq!(replies.iter().map(request_piece).collect::<Vec<_>>(), [Some((&b"rest"[..], true))]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// However Envoy cuts a request and a response, the endpoint and the client get what was sent.
    #[test]
    fn any_cut_gives_the_same_bodies(
        pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..700), 0..8),
        scale in prop_oneof![Just(1_usize), Just(200)],
        has_trailers in any::<bool>(),
    ) {
        let pieces: Vec<Vec<u8>> = pieces.iter().map(|piece| piece.repeat(scale)).collect();
        let sent = pieces.concat();
        let last = pieces.len().saturating_sub(1);
        let is_end = |idx: usize| !has_trailers && idx == last;
        let mut messages: Vec<_> =
            pieces.iter().enumerate().map(|(idx, piece)| request_message(piece, is_end(idx))).collect();
        if has_trailers {
            messages.push(request_trailers());
        } else if pieces.is_empty() {
            messages.push(request_message(b"", true));
        }
        let (found, mut state) = answered(messages, &LEAVE, None);
        prop_assert_eq!(&found.body, &sent);
        prop_assert_eq!(found.n_ends, usize::from(!has_trailers));
        prop_assert!(found.asked.is_some_and(|(body, is_oversized)| is_oversized || body == sent));

        state.on_message(response_headers("200"));
        let (mut got, mut n_ends) = (Vec::new(), 0);
        for (idx, piece) in pieces.iter().enumerate() {
            for reply in answers(&mut state, response_message(piece, is_end(idx)), &LEAVE, None).0 {
                let (piece, is_last) = response_piece(&reply).expect("a piece of the response");
                got.extend_from_slice(piece);
                n_ends += usize::from(is_last);
            }
        }
        prop_assert_eq!(got, sent);
        prop_assert_eq!(n_ends, usize::from(!has_trailers && !pieces.is_empty()));
    }
}
