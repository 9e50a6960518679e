//! The request path over real gRPC and HTTP sockets.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use envoy_types::pb::envoy::config::core::v3::Metadata;
use envoy_types::pb::envoy::service::ext_proc::v3::ProcessingRequest;
use envoy_types::pb::envoy::service::ext_proc::v3::external_processor_client::ExternalProcessorClient;
use envoy_types::pb::envoy::service::ext_proc::v3::processing_request::Request;
use envoy_types::pb::envoy::service::ext_proc::v3::processing_response::Response;
use envoy_types::pb::google::protobuf::{Struct, Value as ProtoValue, value::Kind};
use serde_json::json;
use tokio_util::sync::CancellationToken;
use warmroute::extproc::reply::SelectionMode;
use warmroute::routing::endpoint::EndpointSet;
use warmroute::routing::hash::Scope;
use warmroute::routing::index::KeyKinds;

use crate::fakes::*;

const PROMPT: &str = "the quick brown fox jumps over the lazy dog";

/// Addresses nobody listens on; nothing asks them.
pub(crate) fn silent(n: u16) -> Vec<SocketAddr> {
    (0..n).map(|i| SocketAddr::from(([127, 0, 0, 1], 1 + i))).collect()
}

pub(crate) fn both(first: SocketAddr, second: SocketAddr) -> Option<String> {
    Some(format!("{first},{second}"))
}

pub(crate) fn response(status: &str, address: Option<SocketAddr>, n_attempts: f64) -> ProcessingRequest {
    let mut fields = HashMap::from([(
        "upstream.request_attempt_count".to_owned(),
        ProtoValue { kind: Some(Kind::NumberValue(n_attempts)) },
    )]);
    if let Some(address) = address {
        let value = ProtoValue { kind: Some(Kind::StringValue(address.to_string())) };
        fields.insert("upstream.address".to_owned(), value);
    }
    ProcessingRequest {
        request: Some(Request::ResponseHeaders(headers(&[(":status", status)], false))),
        attributes: HashMap::from([("envoy.filters.http.ext_proc".to_owned(), Struct { fields })]),
        ..Default::default()
    }
}

#[tokio::test]
async fn the_endpoint_that_holds_the_prefix_is_picked() {
    let engines = [FakeEngine::start().await, FakeEngine::start().await];
    let addresses = [engines[0].address, engines[1].address];
    let router = FakeRouter::start(&addresses).await;
    for warm in [1, 0] {
        let slot = router.warm(warm, &characters(PROMPT), &Scope::default(), KeyKinds::PLAIN);
        let (_stream, destination) = router.complete(json!({ "model": "tiny", "prompt": PROMPT })).await;
        assert_eq!(destination, both(addresses[warm], addresses[1 - warm]));
        slot.retire();
    }
    assert_eq!(
        router.metric("warmroute_decisions_total{model=\"tiny\",outcome=\"prefix_match\",policy=\"prefix_cache\"}"),
        2.0
    );
    let n_matched = router.metric("warmroute_matched_tokens_total{model=\"tiny\"}");
    let whole_blocks_before_the_last_token = (PROMPT.len() - 1) / BLOCK_SIZE as usize * BLOCK_SIZE as usize;
    assert_eq!(n_matched, 2.0 * whole_blocks_before_the_last_token as f64);
}

#[tokio::test]
async fn token_ids_need_no_tokenizer_and_the_last_token_is_never_reused() {
    let router = FakeRouter::start(&silent(2)).await;
    let tokens: Vec<u32> = (0..8).collect();
    let _slot = router.warm(1, &tokens, &Scope::default(), KeyKinds::PLAIN);
    let (_stream, destination) = router.complete(json!({ "prompt": [tokens, [1, 2]] })).await;
    assert_eq!(destination, both(silent(2)[1], silent(2)[0]));
    assert_eq!(router.metric("warmroute_matched_tokens_total{model=\"tiny\"}"), 4.0, "one of two blocks");
    let (_stream, _) = router.complete(json!({ "prompt": tokens[..4] })).await;
    assert_eq!(
        router.metric("warmroute_decisions_total{model=\"tiny\",outcome=\"no_match\",policy=\"least_request\"}"),
        1.0
    );
}

#[tokio::test]
async fn salts_and_adapters_match_only_their_own_and_only_when_proved() {
    let tokens: Vec<u32> = (0..9).collect();
    let adapter = KeyKinds::adapter(0).unwrap();
    let salted = Scope { cache_salt: Some("s".into()), ..Scope::default() };
    let adapted = Scope { adapter: Some(("lora-a".into(), "path".into())), ..Scope::default() };
    let with_salt = json!({ "prompt": tokens, "cache_salt": "s" });
    let with_adapter = json!({ "prompt": tokens, "model": "lora-a" });
    let proved = KeyKinds::PLAIN | KeyKinds::SALT | adapter;
    // A router for each case: a request promises its blocks to the next one.
    for (held, kinds, request, expected) in [
        (&Scope::default(), proved, &with_salt, 0.0),
        (&Scope::default(), proved, &with_adapter, 0.0),
        (&salted, KeyKinds::PLAIN, &with_salt, 0.0),
        (&salted, KeyKinds::PLAIN | KeyKinds::SALT, &with_salt, 8.0),
        (&salted, proved, &json!({ "prompt": tokens, "cache_salt": "t" }), 0.0),
        (&adapted, KeyKinds::PLAIN, &with_adapter, 0.0),
        (&adapted, adapter, &with_adapter, 8.0),
    ] {
        let router = FakeRouter::start(&silent(2)).await;
        let _slot = router.warm(1, &tokens, held, kinds);
        router.complete(request.clone()).await;
        let n_matched = router.metric("warmroute_matched_tokens_total{model=\"tiny\"}");
        assert_eq!(n_matched, expected, "{held:?} with {kinds} proved, {request}");
    }
}

#[tokio::test]
async fn only_allowed_fields_reach_the_tokenizer() {
    let engine = FakeEngine::start().await;
    let router = FakeRouter::start(&[engine.address]).await;
    let _slot = router.warm(0, &[1, 2, 3, 4], &Scope::default(), KeyKinds::PLAIN);
    let messages = json!([{ "role": "user", "content": "hi" }]);
    let body = json!({ "model": "alias", "messages": messages, "stream": true, "user": "me", "tools": [] });
    router.post("/v1/chat/completions", body.to_string().as_bytes()).await;
    for secret in [
        json!({ "messages": messages, "chat_template": "{{ secret }}" }),
        json!({ "messages": [{ "role": "user", "content": [{ "type": "image_url", "image_url": { "url": "http://x" } }] }] }),
    ] {
        router.post("/v1/chat/completions", secret.to_string().as_bytes()).await;
    }
    assert_eq!(engine.asked(), [json!({ "model": "alias", "messages": messages, "tools": [] })]);
    assert_eq!(router.metric("warmroute_fallbacks_total{reason=\"chat_template\"}"), 1.0);
    assert_eq!(router.metric("warmroute_fallbacks_total{reason=\"media\"}"), 1.0);
}

#[tokio::test]
async fn a_tokenizer_fault_ends_in_a_pick_by_load() {
    let engine = FakeEngine::start().await;
    let router = FakeRouter::start(&[engine.address]).await;
    let _slot = router.warm(0, &[1, 2, 3, 4], &Scope::default(), KeyKinds::PLAIN);
    for (behaviour, reason) in [
        (Tokenize::Status(500), "tokenizer_status"),
        (Tokenize::Status(404), "tokenizer_status"),
        (Tokenize::Body("no json"), "tokenizer_nonsense"),
        (Tokenize::Body(r#"{"count":7,"tokens":[1]}"#), "tokenizer_nonsense"),
        (Tokenize::Body(r#"{"count":1,"tokens":[1e99]}"#), "tokenizer_nonsense"),
        (Tokenize::Never, "tokenizer_budget"),
    ] {
        let prompt = || json!({ "prompt": format!("{PROMPT} {behaviour:?}") });
        let series = format!("warmroute_fallbacks_total{{reason=\"{reason}\"}}");
        let before = router.metric(&series);
        engine.set(behaviour.clone());
        let started = Instant::now();
        let (_stream, destination) = router.complete(prompt()).await;
        assert_eq!(destination, Some(engine.address.to_string()), "{behaviour:?}");
        assert_eq!(router.metric(&series), before + 1.0, "{behaviour:?}");
        assert!(started.elapsed() < Duration::from_secs(10), "{behaviour:?}");
        engine.set(Tokenize::Characters);
        router.complete(prompt()).await;
    }
    engine.set(Tokenize::Status(500));
    for _ in 0..3 {
        router.complete(json!({ "prompt": PROMPT })).await;
    }
    let n_asked = engine.asked().len();
    let (_stream, destination) = router.complete(json!({ "prompt": PROMPT })).await;
    assert_eq!(destination, Some(engine.address.to_string()), "an endpoint that is not asked for tokens serves");
    assert_eq!(router.metric("warmroute_fallbacks_total{reason=\"tokenizer_open\"}"), 1.0);
    assert_eq!(engine.asked().len(), n_asked, "after three failures in a row nothing is asked");
}

#[tokio::test]
async fn a_tokenizer_that_nobody_listens_on_ends_in_a_pick_by_load() {
    let router = FakeRouter::start(&silent(1)).await;
    let _slot = router.warm(0, &[1, 2, 3, 4], &Scope::default(), KeyKinds::PLAIN);
    let (_stream, destination) = router.complete(json!({ "prompt": PROMPT })).await;
    assert_eq!(destination, Some(silent(1)[0].to_string()));
    assert_eq!(router.metric("warmroute_fallbacks_total{reason=\"tokenizer_unreachable\"}"), 1.0);
}

#[tokio::test]
async fn requests_that_cannot_be_read_are_picked_by_load_in_the_default_pool() {
    let router = FakeRouter::start(&silent(1)).await;
    let address = Some(silent(1)[0].to_string());
    let deep = format!("{{\"model\":\"tiny\",\"prompt\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
    let huge = format!("{{\"model\":\"tiny\",\"prompt\":\"{}\"}}", "x".repeat(20 << 20));
    for body in [&b"{"[..], b"", b"\xff\xfe\x00", b"[1,2]", b"{\"model\":7}", deep.as_bytes(), huge.as_bytes()] {
        let (_stream, reply) = router.post("/v1/completions", body).await;
        assert_eq!(destination(&reply), address, "{:?}", &body[..body.len().min(30)]);
    }
    let (_stream, reply) = router.post("/v1/embeddings", b"{\"input\":\"x\"}").await;
    assert_eq!(destination(&reply), address);
    let mut stream = router.open().await;
    assert_eq!(destination(&stream.exchange(request_headers("/v1/models", true)).await), address);
    assert_eq!(router.metric("warmroute_fallbacks_total{reason=\"other_path\"}"), 2.0);
}

#[tokio::test]
async fn a_model_that_is_not_ours_is_left_to_envoy_without_the_clients_headers() {
    let router = FakeRouter::start(&silent(1)).await;
    let (_stream, destination) = router.complete(json!({ "model": "other", "prompt": "x" })).await;
    assert_eq!(destination, None);
    assert_eq!(router.metric("warmroute_left_to_envoy_total{reason=\"unknown_model\"}"), 1.0);
    router.set.send_replace(EndpointSet::default().into());
    let (_stream, destination) = router.complete(json!({ "model": "tiny", "prompt": "x" })).await;
    assert_eq!(destination, None, "discovery is not synced");
}

#[tokio::test]
async fn an_endpoint_that_leaves_while_the_prompt_is_tokenized_is_not_picked() {
    let engine = FakeEngine::start().await;
    engine.set(Tokenize::After(BUDGET / 2));
    let router = FakeRouter::start(&[engine.address, silent(1)[0]]).await;
    let _slot = router.warm(0, &characters(PROMPT), &Scope::default(), KeyKinds::PLAIN);
    let leave = async {
        while engine.asked().is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let endpoints = vec![router.endpoints[1].clone()];
        router.set.send_replace(EndpointSet { synced: true, endpoints }.into());
    };
    let ((_stream, destination), ()) = tokio::join!(router.complete(json!({ "prompt": PROMPT })), leave);
    assert_eq!(destination, Some(silent(1)[0].to_string()));
}

#[tokio::test]
async fn a_synced_empty_pool_and_an_empty_subset_are_refused() {
    let router = FakeRouter::start(&silent(1)).await;
    let fields = HashMap::from([(
        "x-gateway-destination-endpoint-subset".to_owned(),
        ProtoValue { kind: Some(Kind::StringValue("10.0.0.1:80".to_owned())) },
    )]);
    let filter_metadata = HashMap::from([("envoy.lb.subset_hint".to_owned(), Struct { fields })]);
    let metadata_context = Some(Metadata { filter_metadata, ..Default::default() });
    let mut stream = router.open().await;
    let reply = stream.exchange(ProcessingRequest { metadata_context, ..request_headers("/v1/models", true) }).await;
    assert_refused(reply.response, "empty_subset");
    router.set.send_replace(EndpointSet { synced: true, endpoints: Vec::new() }.into());
    let (_stream, reply) = router.post("/v1/completions", b"{\"prompt\":\"x\"}").await;
    assert_refused(reply.response, "no_endpoint");
}

#[tokio::test]
async fn an_envoy_without_a_fallback_is_told_one_address_or_refused() {
    let router = FakeRouter::start_with(&silent(2), SelectionMode::OriginalDst, 1 << 20).await;
    let (_stream, destination) = router.complete(json!({ "model": "tiny", "prompt": "x" })).await;
    let destination = destination.unwrap();
    assert!(silent(2).iter().any(|address| address.to_string() == destination), "{destination} is not one endpoint");

    let (_stream, reply) = router.post("/v1/completions", b"{\"model\":\"other\",\"prompt\":\"x\"}").await;
    assert_refused(reply.response, "unknown_model");
    router.set.send_replace(EndpointSet::default().into());
    let (_stream, reply) = router.post("/v1/completions", b"{\"model\":\"tiny\",\"prompt\":\"x\"}").await;
    assert_refused(reply.response, "not_synced");
    for reason in ["unknown_model", "not_synced"] {
        let series = |name: &str| router.metric(&format!("warmroute_{name}_total{{reason=\"{reason}\"}}"));
        assert_eq!((series("immediate_responses"), series("left_to_envoy")), (1.0, 0.0), "{reason}");
    }
}

fn assert_refused(reply: Option<Response>, code: &str) {
    let Some(Response::ImmediateResponse(response)) = reply else { panic!("expected a refusal, found {reply:?}") };
    let body: serde_json::Value = serde_json::from_slice(&response.body).unwrap();
    assert_eq!((response.status.unwrap().code, body["error"]["code"].as_str()), (503, Some(code)));
}

#[tokio::test]
async fn a_burst_spreads_and_the_count_ends_with_the_stream() {
    let router = FakeRouter::start(&silent(4)).await;
    let mut streams = Vec::new();
    for _ in 0..40 {
        streams.push(router.complete(json!({ "prompt": "x" })).await.0);
    }
    assert_eq!(router.in_flight(), [10, 10, 10, 10]);
    streams.truncate(3);
    eventually("the dropped streams are no longer counted", || router.in_flight().iter().sum::<u32>() == 3).await;
    streams.iter_mut().for_each(EnvoyStream::close);
    eventually("the ended streams are no longer counted", || router.in_flight() == [0; 4]).await;
    eventually("the gauge follows", || router.metric("warmroute_streams_in_flight") == 0.0).await;
}

#[tokio::test]
async fn an_envoy_that_is_gone_without_a_word_is_no_longer_counted() {
    let router = FakeRouter::start(&silent(1)).await;
    let is_cut = CancellationToken::new();
    let proxy = cuttable_proxy(router.address, is_cut.clone()).await;
    let client = ExternalProcessorClient::connect(format!("http://{proxy}")).await.unwrap();
    let mut stream = EnvoyStream::open(client).await;
    stream.post("/v1/completions", b"{\"prompt\":\"x\"}").await;
    assert_eq!(router.in_flight(), [1]);
    is_cut.cancel();
    eventually("the request of the lost connection ends", || router.in_flight() == [0]).await;
}

#[tokio::test]
async fn the_endpoint_that_served_is_counted_and_the_one_that_did_not_is_avoided() {
    let addresses = silent(2);
    let router = FakeRouter::start(&addresses).await;
    let tokens: Vec<u32> = (0..9).collect();
    let _slot = router.warm(0, &tokens, &Scope::default(), KeyKinds::PLAIN);
    let (mut stream, destination) = router.complete(json!({ "prompt": tokens })).await;
    assert_eq!(destination, both(addresses[0], addresses[1]));
    stream.exchange(response("200", Some(addresses[1]), 2.0)).await;
    assert_eq!(router.in_flight(), [0, 1]);
    let (_stream, destination) = router.complete(json!({ "prompt": tokens })).await;
    assert_eq!(destination, Some(addresses[1].to_string()), "the warm endpoint did not serve and is avoided");
    let retried = "warmroute_picks_not_served_total{model=\"tiny\",cause=\"retried\"}";
    assert_eq!(router.metric(retried), 1.0, "{}", router.metrics.encode());
}

#[tokio::test]
async fn a_request_is_steered_to_the_rank_that_holds_its_prefix() {
    let router = FakeRouter::start(&silent(2)).await;
    router.endpoints.iter().for_each(|endpoint| endpoint.ranks.set([0, 1]));
    let (long, short) = ((1..=9).collect::<Vec<u32>>(), (1..=5).collect::<Vec<u32>>());
    let plain = Scope::default();
    let _slots = [
        router.warm_rank(0, 0, &short, &plain, KeyKinds::PLAIN),
        router.warm_rank(0, 1, &long, &plain, KeyKinds::PLAIN),
    ];
    let rank_of = async |prompt: &[u32]| {
        let (_, reply) = router.post("/v1/completions", json!({ "prompt": prompt }).to_string().as_bytes()).await;
        set_header(&reply, "x-data-parallel-rank")
    };
    assert_eq!(rank_of(&long).await.as_deref(), Some("1"));
    assert_eq!(rank_of(&[9, 9, 9, 9, 9]).await, None, "vLLM balances what nobody holds");
    router.endpoints[1].ranks.set([0]);
    assert_eq!(rank_of(&long).await, None, "the runner-up has no such rank, and a retry has the same headers");
    router.endpoints[1].ranks.set([0, 1]);
    router.endpoints[0].ranks.set([1]);
    assert_eq!(rank_of(&long).await, None, "there is nothing to choose from");
}

#[tokio::test]
async fn a_client_that_chooses_its_rank_is_credited_with_that_rank_only() {
    let router = FakeRouter::start(&silent(2)).await;
    router.endpoints.iter().for_each(|endpoint| endpoint.ranks.set([0, 1]));
    let long = (1..=9).collect::<Vec<u32>>();
    let plain = Scope::default();
    let _slots = [
        router.warm_rank(0, 1, &long, &plain, KeyKinds::PLAIN),
        router.warm_rank(1, 0, &long[..5], &plain, KeyKinds::PLAIN),
    ];
    for (chosen, warm) in [("0", 1), ("1", 0), (" 1 ", 0)] {
        let mut stream = router.open().await;
        let pairs = [(":path", "/v1/completions"), ("x-data-parallel-rank", chosen)];
        let request = Some(Request::RequestHeaders(headers(&pairs, false)));
        stream.exchange(ProcessingRequest { request, ..Default::default() }).await;
        let reply = stream.exchange(request_body(json!({ "prompt": long }).to_string().as_bytes())).await;
        assert_eq!(destination(&reply), both(router.endpoints[warm].address, router.endpoints[1 - warm].address));
        assert_eq!(set_header(&reply, "x-data-parallel-rank"), None, "the client's own stays as it is");
    }
}

#[tokio::test]
async fn stopping_answers_open_decisions_and_ends_the_others_with_ok() {
    let engine = FakeEngine::start().await;
    engine.set(Tokenize::Never);
    let router = FakeRouter::start(&[engine.address]).await;
    let _slot = router.warm(0, &[1, 2, 3, 4], &Scope::default(), KeyKinds::PLAIN);
    let (mut decided, _) = router.complete(json!({ "prompt": [1, 2] })).await;
    let mut deciding = router.open().await;
    deciding.exchange(request_headers("/v1/completions", false)).await;
    deciding.send(request_body(json!({ "prompt": PROMPT }).to_string().as_bytes()));
    eventually("the tokenizer is asked", || !engine.asked().is_empty()).await;
    router.shutdown.cancel();
    assert!(decided.next().await.unwrap().is_none(), "a request on its way needs us no longer");
    let reply = deciding.next().await.unwrap().expect("the decision is still answered");
    assert_eq!(destination(&reply), Some(engine.address.to_string()));
    assert!(deciding.next().await.unwrap().is_none());
    tokio::time::timeout(DEADLINE, router.server).await.unwrap().unwrap().unwrap();
}
