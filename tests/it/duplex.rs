//! Bodies in full duplex over real gRPC sockets, as the endpoint-picker protocol has them.

use envoy_types::pb::envoy::extensions::filters::http::ext_proc::v3::processing_mode::BodySendMode;
use envoy_types::pb::envoy::service::ext_proc::v3::body_mutation::Mutation;
use envoy_types::pb::envoy::service::ext_proc::v3::processing_request::Request;
use envoy_types::pb::envoy::service::ext_proc::v3::processing_response::Response;
use envoy_types::pb::envoy::service::ext_proc::v3::{
    BodyResponse, HttpBody, HttpTrailers, ProcessingRequest, ProcessingResponse, ProtocolConfiguration,
};
use serde_json::json;
use warmroute::extproc::reply::SelectionMode;
use warmroute::routing::hash::Scope;
use warmroute::routing::index::KeyKinds;

use crate::fakes::*;

const LIMIT: usize = 100_000;

/// The first message of a stream whose bodies go both ways.
pub(crate) fn first(path: &str) -> ProcessingRequest {
    let mode = BodySendMode::FullDuplexStreamed.into();
    let config = ProtocolConfiguration { request_body_mode: mode, response_body_mode: mode, ..Default::default() };
    ProcessingRequest { protocol_config: Some(config), ..request_headers(path, false) }
}

fn body(bytes: &[u8], end_of_stream: bool) -> HttpBody {
    HttpBody { body: bytes.to_vec(), end_of_stream, ..Default::default() }
}

pub(crate) fn request_piece(bytes: &[u8], end_of_stream: bool) -> ProcessingRequest {
    ProcessingRequest { request: Some(Request::RequestBody(body(bytes, end_of_stream))), ..Default::default() }
}

fn response_piece(bytes: &[u8], end_of_stream: bool) -> ProcessingRequest {
    ProcessingRequest { request: Some(Request::ResponseBody(body(bytes, end_of_stream))), ..Default::default() }
}

fn response_headers() -> ProcessingRequest {
    let request = Some(Request::ResponseHeaders(headers(&[(":status", "200")], false)));
    ProcessingRequest { request, ..Default::default() }
}

fn streamed(body: BodyResponse) -> (Vec<u8>, bool) {
    match body.response.unwrap().body_mutation.unwrap().mutation.unwrap() {
        Mutation::StreamedResponse(piece) => (piece.body, piece.end_of_stream),
        other => panic!("expected a piece, found {other:?}"),
    }
}

/// What comes back of the request's body, up to its end or `n_bytes`.
pub(crate) async fn sent_back(stream: &mut EnvoyStream, n_bytes: usize) -> (Vec<u8>, bool) {
    let (mut sent, mut has_ended) = (Vec::new(), false);
    while !has_ended && sent.len() < n_bytes {
        let Some(Response::RequestBody(body)) = stream.next().await.unwrap().unwrap().response else {
            panic!("expected a piece of the request")
        };
        let (piece, is_last) = streamed(body);
        sent.extend(piece);
        has_ended = is_last;
    }
    (sent, has_ended)
}

/// Sends headers and a body in `n_pieces`; the answer to the headers and what comes back of the body.
pub(crate) async fn post(stream: &mut EnvoyStream, sent: &[u8], n_pieces: usize) -> (ProcessingResponse, Vec<u8>) {
    stream.send(first("/v1/completions"));
    let n_chunks = sent.chunks(sent.len().div_ceil(n_pieces)).len();
    for (idx, piece) in sent.chunks(sent.len().div_ceil(n_pieces)).enumerate() {
        stream.send(request_piece(piece, idx + 1 == n_chunks));
    }
    let reply = stream.next().await.unwrap().unwrap();
    let (got, has_ended) = sent_back(stream, usize::MAX).await;
    assert!(has_ended);
    (reply, got)
}

pub(crate) async fn exchange_response(stream: &mut EnvoyStream, bytes: &[u8], is_last: bool) {
    let Some(Response::ResponseBody(body)) = stream.exchange(response_piece(bytes, is_last)).await.response else {
        panic!("expected a piece of the response")
    };
    assert_eq!(streamed(body), (bytes.to_vec(), is_last));
}

/// Two endpoints that nobody asks for anything.
async fn router() -> FakeRouter {
    let silent = [1, 2].map(|port| ([127, 0, 0, 1], port).into());
    FakeRouter::start_with(&silent, SelectionMode::OverrideHost, LIMIT).await
}

#[tokio::test]
async fn a_body_in_pieces_is_decided_whole_and_goes_back() {
    let router = router().await;
    let tokens: Vec<u32> = (0..9).collect();
    let _slot = router.warm(1, &tokens, &Scope::default(), KeyKinds::PLAIN);
    let sent = json!({ "model": "tiny", "prompt": tokens, "padding": "x".repeat(90_000) }).to_string();
    for n_pieces in [1, 2, 7] {
        let mut stream = router.open().await;
        let (reply, got) = post(&mut stream, sent.as_bytes(), n_pieces).await;
        let (warm, other) = (router.endpoints[1].address, router.endpoints[0].address);
        assert_eq!(destination(&reply), Some(format!("{warm},{other}")));
        assert_eq!(got, sent.as_bytes(), "{n_pieces} pieces");
        assert_eq!(router.in_flight(), [0, 1]);
        stream.exchange(response_headers()).await;
        exchange_response(&mut stream, b"data: 1", false).await;
        exchange_response(&mut stream, b"", true).await;
        stream.close();
        eventually("the request is no longer counted", || router.in_flight() == [0, 0]).await;
    }
    assert_eq!(
        router.metric("warmroute_decisions_total{model=\"tiny\",outcome=\"prefix_match\",policy=\"prefix_cache\"}"),
        3.0
    );
}

#[tokio::test]
async fn trailers_end_a_body_and_follow_it() {
    let router = router().await;
    let mut stream = router.open().await;
    stream.send(first("/v1/completions"));
    stream.send(request_piece(b"{\"prompt\":[1]}", false));
    let trailers = Some(Request::RequestTrailers(HttpTrailers::default()));
    let reply = stream.exchange(ProcessingRequest { request: trailers, ..Default::default() }).await;
    assert!(destination(&reply).is_some());
    assert_eq!(sent_back(&mut stream, 14).await, (b"{\"prompt\":[1]}".to_vec(), false));
    let last = stream.next().await.unwrap().unwrap();
    assert!(matches!(last.response, Some(Response::RequestTrailers(_))), "{last:?}");
}

#[tokio::test]
async fn a_body_beyond_the_limit_is_picked_by_load_before_its_end() {
    let router = router().await;
    let mut stream = router.open().await;
    stream.send(first("/v1/completions"));
    let beginning = format!("{{\"model\":\"tiny\",\"prompt\":\"{}", "x".repeat(LIMIT));
    stream.send(request_piece(beginning.as_bytes(), false));
    let reply = stream.next().await.unwrap().unwrap();
    assert!(destination(&reply).is_some());
    assert_eq!(sent_back(&mut stream, beginning.len()).await, (beginning.into_bytes(), false));
    for (piece, is_last) in [(&b"y"[..], false), (b"\"}", true)] {
        stream.send(request_piece(piece, is_last));
        assert_eq!(sent_back(&mut stream, piece.len()).await, (piece.to_vec(), is_last));
    }
    assert_eq!(router.metric("warmroute_fallbacks_total{reason=\"oversized_body\"}"), 1.0);
    assert_eq!(router.in_flight().iter().sum::<u32>(), 1);
}

#[tokio::test]
async fn stopping_waits_for_the_answer_that_is_on_its_way_through_us() {
    let router = router().await;
    let mut uploading = router.open().await;
    uploading.send(first("/v1/completions"));
    uploading.send(request_piece(b"{\"prompt\":", false));
    let mut answering = router.open().await;
    post(&mut answering, b"{\"prompt\":[1]}", 1).await;
    answering.exchange(response_headers()).await;

    router.shutdown.cancel();
    exchange_response(&mut answering, b"data: 1", false).await;
    exchange_response(&mut answering, b"data: [DONE]", true).await;
    assert!(answering.next().await.unwrap().is_none(), "there is nothing of it that we hold");

    uploading.send(request_piece(b"[1]}", true));
    assert!(destination(&uploading.next().await.unwrap().unwrap()).is_some());
    assert_eq!(sent_back(&mut uploading, usize::MAX).await, (b"{\"prompt\":[1]}".to_vec(), true));
    uploading.close();
    tokio::time::timeout(DEADLINE, router.server).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn a_stream_that_ends_before_its_answer_is_counted_as_misconfigured() {
    let router = router().await;
    for (response, expected) in [(BodySendMode::FullDuplexStreamed, 0.0), (BodySendMode::None, 1.0)] {
        let config = ProtocolConfiguration {
            request_body_mode: BodySendMode::FullDuplexStreamed.into(),
            response_body_mode: response.into(),
            ..Default::default()
        };
        let mut stream = router.open().await;
        stream.send(ProcessingRequest { protocol_config: Some(config), ..request_headers("/v1/completions", false) });
        let reply = stream.exchange(request_piece(b"{\"prompt\":[1]}", true)).await;
        assert!(destination(&reply).is_some());
        let series = "warmroute_misconfigured_streams_total{mode=\"full_duplex_streamed_without_response\"}";
        assert_eq!(router.metric(series), expected, "{response:?}");
    }
}
