//! Picks that Envoy is not told, or only for a share of the requests, over real sockets.

use envoy_types::pb::envoy::service::ext_proc::v3::processing_request::Request;
use envoy_types::pb::envoy::service::ext_proc::v3::processing_response::Response;
use envoy_types::pb::envoy::service::ext_proc::v3::{ProcessingRequest, ProcessingResponse};
use serde_json::{Value, json};
use warmroute::extproc::rollout::{Mode, Rollout};
use warmroute::routing::hash::Scope;
use warmroute::routing::index::KeyKinds;

use crate::duplex;
use crate::fakes::*;
use crate::router::{both, response, silent};

const SHADOW: Rollout = Rollout { mode: Mode::Shadow, percent: ALL };
const OFF: Rollout = Rollout { mode: Mode::Off, percent: ALL };
const ALL: warmroute::extproc::rollout::Percent = warmroute::extproc::rollout::Percent::ALL;

/// A router over two endpoints, the second of which holds `tokens`.
async fn warm_second(rollout: Rollout) -> (FakeRouter, Vec<u32>, impl Sized) {
    let router = FakeRouter::start(&silent(2)).await;
    let tokens: Vec<u32> = (0..17).collect();
    let slot = router.warm(1, &tokens, &Scope::default(), KeyKinds::PLAIN);
    roll_out(&router, rollout);
    (router, tokens, slot)
}

fn roll_out(router: &FakeRouter, rollout: Rollout) {
    router.router.roll_out(|_| Some(rollout));
}

fn shadowed(router: &FakeRouter, agreed: &str) -> f64 {
    router.metric(&format!("warmroute_shadow_decisions_total{{model=\"tiny\",agreed=\"{agreed}\"}}"))
}

fn matched(router: &FakeRouter, who: &str) -> f64 {
    router.metric(&format!("warmroute_shadow_matched_tokens_total{{model=\"tiny\",who=\"{who}\"}}"))
}

fn with_id(id: &str) -> ProcessingRequest {
    let forged =
        [(":path", "/v1/completions"), (HEADER, "6.6.6.6:6"), ("target-pod", "6.6.6.6:6"), ("x-request-id", id)];
    ProcessingRequest { request: Some(Request::RequestHeaders(headers(&forged, false))), ..Default::default() }
}

/// Nothing is set, neither header nor metadata, and the body is the client's.
fn assert_untold(reply: &ProcessingResponse) {
    assert_eq!(destination(reply), None, "also clears the client's headers");
    assert!(reply.dynamic_metadata.is_none(), "{reply:?}");
    let common = match reply.response.clone().unwrap() {
        Response::RequestHeaders(reply) => reply.response.unwrap(),
        Response::RequestBody(reply) => reply.response.unwrap(),
        other => panic!("expected the reply to a request step, found {other:?}"),
    };
    assert!(common.body_mutation.is_none(), "{common:?}");
    assert!(common.header_mutation.unwrap().set_headers.is_empty());
}

#[tokio::test]
async fn a_shadow_decision_is_made_and_counted_and_envoy_is_told_nothing() {
    let (router, tokens, _slot) = warm_second(SHADOW).await;
    router.endpoints.iter().for_each(|endpoint| endpoint.ranks.set([0, 1]));
    let body = json!({ "prompt": tokens }).to_string();
    let (_stream, reply) = router.post("/v1/completions", body.as_bytes()).await;
    assert_untold(&reply);
    assert_eq!(router.in_flight(), [0, 0], "nobody serves it yet");
    let decided = router.metrics.encode();
    let series = r#"warmroute_decisions_total{model="tiny",outcome="prefix_match""#;
    assert!(decided.lines().any(|line| line.starts_with(series) && line.ends_with(" 1")), "{decided}");
    roll_out(&router, Rollout::default());
    let (_stream, reply) = router.post("/v1/completions", body.as_bytes()).await;
    assert_eq!(destination(&reply), both(silent(2)[1], silent(2)[0]), "the same pick, and now it is told");
    assert_eq!(set_header(&reply, "x-data-parallel-rank").as_deref(), Some("0"));
}

#[tokio::test]
async fn in_flight_and_promises_follow_who_served_and_the_gain_is_counted() {
    let (router, tokens, _slot) = warm_second(SHADOW).await;
    let [cold, warm] = silent(2)[..] else { unreachable!() };
    let (mut stream, reply) = router.post("/v1/completions", json!({ "prompt": tokens }).to_string().as_bytes()).await;
    assert_untold(&reply);
    stream.exchange(response("200", Some(cold), 1.0)).await;
    assert_eq!(router.in_flight(), [1, 0]);
    assert_eq!((shadowed(&router, "false"), shadowed(&router, "true")), (1.0, 0.0));
    assert_eq!((matched(&router, "pick"), matched(&router, "served")), (16.0, 0.0));
    assert_eq!(router.metric("warmroute_picks_not_served_total{model=\"tiny\",cause=\"other_endpoint\"}"), 0.0);
    // The endpoint that nobody asked is not avoided, and the one that serves is about to hold the blocks.
    roll_out(&router, Rollout::default());
    let (mut second, destination) = router.complete(json!({ "prompt": tokens })).await;
    assert_eq!(destination, both(warm, cold), "it holds them as well, and has less to do");
    second.close();
    stream.close();
    eventually("the ended streams are no longer counted", || router.in_flight() == [0, 0]).await;
    roll_out(&router, SHADOW);
    let (mut third, _) = router.complete(json!({ "prompt": tokens })).await;
    third.exchange(response("200", Some(cold), 1.0)).await;
    assert_eq!(matched(&router, "served"), 16.0, "what it served before is promised there");
}

#[tokio::test]
async fn a_pick_that_nobody_follows_promises_nothing() {
    let router = FakeRouter::start(&silent(2)).await;
    let slot = router.warm(0, &[90, 91, 92, 93], &Scope::default(), KeyKinds::PLAIN);
    roll_out(&router, SHADOW);
    let tokens: Vec<u32> = (0..17).collect();
    for _ in 0..5 {
        let (mut stream, _) = router.complete(json!({ "prompt": tokens })).await;
        stream.exchange(response("503", None, 1.0)).await;
    }
    assert_eq!(shadowed(&router, "unknown"), 5.0, "Envoy answered itself");
    assert_eq!(matched(&router, "pick"), 0.0);
    let now = router.router.now();
    assert!(router.endpoints.iter().all(|endpoint| !endpoint.load.is_avoided(now)), "nobody was asked, nobody failed");
    roll_out(&router, Rollout::default());
    let (_stream, _) = router.complete(json!({ "prompt": tokens })).await;
    let no_match = r#"warmroute_decisions_total{model="tiny",outcome="no_match""#;
    let decided = router.metrics.encode();
    assert!(decided.lines().any(|line| line.starts_with(no_match) && line.ends_with(" 6")), "{decided}");
    drop(slot);
}

#[tokio::test]
async fn an_endpoint_that_envoy_picked_and_that_cannot_serve_is_avoided() {
    let (router, tokens, _slot) = warm_second(SHADOW).await;
    let (mut stream, _) = router.complete(json!({ "prompt": tokens })).await;
    stream.exchange(response("503", Some(silent(2)[0]), 1.0)).await;
    let avoided: Vec<bool> = router.endpoints.iter().map(|it| it.load.is_avoided(router.router.now())).collect();
    assert_eq!(avoided, [true, false]);
    assert_eq!(shadowed(&router, "false"), 1.0);
    let (stream, _) = router.complete(json!({ "prompt": tokens })).await;
    drop(stream);
    eventually("a stream without a response is counted", || shadowed(&router, "unknown") == 1.0).await;
}

#[tokio::test]
async fn full_duplex_in_shadow_and_off_sends_the_same_body_back() {
    let (router, tokens, _slot) = warm_second(SHADOW).await;
    let body = json!({ "prompt": tokens, "odd": "x".repeat(100_000) }).to_string();
    for (rollout, n_shadow) in [(SHADOW, 1.0), (OFF, 1.0)] {
        roll_out(&router, rollout);
        let mut stream = router.open().await;
        let (reply, sent) = duplex::post(&mut stream, body.as_bytes(), 7).await;
        assert_untold(&reply);
        assert!(sent == body.as_bytes(), "{} bytes of {}", sent.len(), body.len());
        drop(stream);
        eventually("the shadow decision is counted", || shadowed(&router, "unknown") == n_shadow).await;
    }
    assert_eq!(router.metric("warmroute_left_to_envoy_total{reason=\"switched_off\"}"), 1.0);
}

#[tokio::test]
async fn full_duplex_that_is_off_does_not_wait_for_the_body() {
    let (router, _, _slot) = warm_second(OFF).await;
    let mut stream = router.open().await;
    let reply = stream.exchange(duplex::first("/v1/completions")).await;
    assert_untold(&reply);
    for (piece, is_last) in [(&b"{\"prompt\":"[..], false), (b"\"kato\"}", true)] {
        stream.send(duplex::request_piece(piece, is_last));
        assert_eq!(duplex::sent_back(&mut stream, piece.len()).await, (piece.to_vec(), is_last));
    }
}

#[tokio::test]
async fn off_leaves_requests_unread_and_asks_no_tokenizer() {
    let engine = FakeEngine::start().await;
    let router = FakeRouter::start(&[engine.address]).await;
    let _slot = router.warm(0, &[1, 2, 3, 4], &Scope::default(), KeyKinds::PLAIN);
    roll_out(&router, OFF);
    let steered = r#"{"model":"tiny","prompt":"kato","vllm_xargs":{"kv_cache_report_mode":"full"}}"#;
    for body in [steered, "no JSON", r#"{"model":"other","prompt":"kato"}"#] {
        let (_stream, reply) = router.post("/v1/completions", body.as_bytes()).await;
        assert_untold(&reply);
    }
    assert_eq!(router.metric("warmroute_left_to_envoy_total{reason=\"switched_off\"}"), 3.0);
    assert_eq!((engine.asked(), router.in_flight()), (Vec::<Value>::new(), vec![0]));
    roll_out(&router, SHADOW);
    router.complete(json!({ "prompt": "kato" })).await;
    assert_eq!(engine.asked().len(), 1, "in shadow prompts are tokenized");
}

#[tokio::test]
async fn a_pool_without_endpoints_refuses_nobody_in_shadow() {
    let router = FakeRouter::start(&[]).await;
    roll_out(&router, SHADOW);
    let (_stream, reply) = router.post("/v1/completions", b"{\"prompt\":\"x\"}").await;
    assert_untold(&reply);
    assert_eq!(router.metric("warmroute_left_to_envoy_total{reason=\"no_endpoint\"}"), 1.0);
}

#[tokio::test]
async fn a_share_of_the_requests_follows_and_each_one_always_alike() {
    let (router, tokens, _slot) = warm_second(Rollout { mode: Mode::Active, percent: "25".parse().unwrap() }).await;
    let body = json!({ "prompt": tokens }).to_string();
    let told = async |id: &str| {
        let mut stream = router.open().await;
        stream.exchange(with_id(id)).await;
        let reply = stream.exchange(request_body(body.as_bytes())).await;
        if destination(&reply).is_none() {
            assert_untold(&reply);
        }
        destination(&reply).is_some()
    };
    let mut n_told = 0;
    for number in 0..1_000 {
        let id = format!("7d3e1f00-0000-4000-8000-{number:012x}");
        let is_told = told(&id).await;
        n_told += i32::from(is_told);
        if number % 50 == 0 {
            assert_eq!(told(&id).await, is_told, "{id} again");
        }
    }
    // Four standard deviations.
    assert!((195..=305).contains(&n_told), "{n_told} of 1,000 at 25 %");
}
