//! A request is one trace, from Envoy down to the engine's tokenizer.

use std::collections::BTreeMap;

use e2e::collector::Span;
use e2e::envoy::SERVED_BY;
use e2e::http::client;
use serde_json::json;

use crate::TURN;
use crate::setup::Setup;

const TRACE_ID: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CLIENT: u64 = 3;
const SERVER: u64 = 2;
const OK: u64 = 1;

/// The steps of a decision, in the order in which they are taken.
const STEPS: [&str; 5] =
    ["warmroute.parse", "warmroute.tokenize", "warmroute.hash", "warmroute.lookup", "warmroute.score"];

#[tokio::test]
#[ignore = "needs the OpenTelemetry Collector: cargo e2e tools"]
async fn request_through_envoy_is_one_trace_with_the_right_parents() {
    let _turn = TURN.lock().await;
    let setup = Setup::start(|_| ()).await;
    let body = json!({"model": "tiny", "prompt": "kato lemi ".repeat(40), "max_tokens": 1});
    let request = client().post(setup.stack.url("/v1/completions")).json(&body);
    let request = request.header("traceparent", format!("00-{TRACE_ID}-00f067aa0ba902b7-01"));
    let response = request.send().await.unwrap();
    assert_eq!(response.status(), 200);
    let served_by = response.headers()[SERVED_BY].to_str().unwrap().to_owned();
    drop(response.bytes().await.unwrap());

    let is_ours = |span: &&Span| span.trace_id == TRACE_ID;
    let is_complete = |spans: &[Span]| {
        let names: Vec<_> = spans.iter().filter(is_ours).map(|span| &*span.name).collect();
        let of_envoy = spans.iter().filter(is_ours).filter(|span| span.service == "envoy").count();
        names.contains(&"warmroute.route") && of_envoy >= 2
    };
    let spans = setup.collector().wait_spans(is_complete).await.unwrap();
    let spans: Vec<_> = spans.into_iter().filter(|span| span.trace_id == TRACE_ID).collect();
    let by_id: BTreeMap<_, _> = spans.iter().map(|span| (&*span.id, span)).collect();
    let named = |name: &str| {
        let mut found = spans.iter().filter(|span| span.name == name);
        let span = found.next().unwrap_or_else(|| panic!("no span {name}: {spans:#?}"));
        assert!(found.next().is_none(), "more than one span {name}: {spans:#?}");
        span
    };

    let route = named("warmroute.route");
    assert_eq!((route.kind, route.status, &*route.service), (SERVER, OK, "warmroute"));
    let mut above = route;
    while let Some(parent) = by_id.get(&*above.parent_id) {
        assert_eq!(parent.service, "envoy");
        above = parent;
    }
    assert_eq!(above.parent_id, "00f067aa0ba902b7", "the topmost span is Envoy's, below the client's");
    assert_ne!(above.id, route.id, "Envoy's span is above ours");

    for step in STEPS {
        let span = named(step);
        assert_eq!(span.parent_id, route.id, "{step}");
        assert!(span.time.0 >= route.time.0 && span.time.1 <= route.time.1, "{step}: {:?}", span.time);
    }
    assert!(STEPS.windows(2).all(|two| named(two[0]).time.1 <= named(two[1]).time.0), "one after the other");

    let call = named("POST /tokenize");
    assert_eq!((call.kind, &call.parent_id), (CLIENT, &named("warmroute.tokenize").id));
    let told: Vec<_> = setup.tokenizer.parents().into_iter().filter(|parent| !parent.is_empty()).collect();
    assert_eq!(told, [format!("00-{TRACE_ID}-{}-01", call.id)], "the engine is told of the call's span, once");
    let tokenizer = setup.tokenizer.address;
    for (span, key, expected) in [
        (call, "http.request.method", "POST".to_owned()),
        (call, "url.full", format!("http://{tokenizer}/tokenize")),
        (call, "server.address", tokenizer.ip().to_string()),
        (call, "server.port", tokenizer.port().to_string()),
        (call, "http.response.status_code", "200".to_owned()),
        (route, "rpc.system.name", "grpc".to_owned()),
        (route, "rpc.method", "envoy.service.ext_proc.v3.ExternalProcessor/Process".to_owned()),
        (route, "rpc.response.status_code", "OK".to_owned()),
        (route, "gen_ai.operation.name", "text_completion".to_owned()),
        (route, "gen_ai.request.model", "tiny".to_owned()),
        (route, "http.response.status_code", "200".to_owned()),
        (route, "warmroute.decision.outcome", "no_match".to_owned()),
        (route, "warmroute.matched_tokens", "0".to_owned()),
        (route, "warmroute.candidates", "2".to_owned()),
        (route, "warmroute.decision.policy", "least_request".to_owned()),
        (route, "warmroute.runner_up.is_too_far_ahead", "false".to_owned()),
        (route, "warmroute.endpoint.picked", served_by.clone()),
        (route, "warmroute.endpoint.served", served_by),
    ] {
        assert_eq!(span.attribute(key), Some(expected), "{key}");
    }
    assert!(route.attribute("gen_ai.usage.input_tokens").unwrap().parse::<u64>().unwrap() > 400);
    assert_eq!(route.attribute("error.type"), None);
}

#[tokio::test]
#[ignore = "needs the OpenTelemetry Collector: cargo e2e tools"]
async fn request_that_envoy_does_not_sample_leaves_no_span_and_tells_the_engine_nothing() {
    let _turn = TURN.lock().await;
    let setup = Setup::start(|_| ()).await;
    let ask = async |flags: &str, id: &str| {
        let body = json!({"model": "tiny", "prompt": format!("kato {id}"), "max_tokens": 1});
        let request = client().post(setup.stack.url("/v1/completions")).json(&body);
        let request = request.header("traceparent", format!("00-{id}-00f067aa0ba902b7-{flags}"));
        assert_eq!(request.send().await.unwrap().status(), 200);
    };
    let unsampled = TRACE_ID.replace('4', "5");
    ask("00", &unsampled).await;
    let told = setup.tokenizer.parents();
    assert!(!told.is_empty() && told.iter().all(String::is_empty), "{told:?}");
    // Spans leave in order: when the second request's are there, the first has none.
    ask("01", TRACE_ID).await;
    let is_there = |spans: &[Span]| spans.iter().any(|span| span.name == "warmroute.route");
    let spans = setup.collector().wait_spans(is_there).await.unwrap();
    let of_router: Vec<_> = spans.iter().filter(|span| span.service == "warmroute").collect();
    assert!(of_router.iter().all(|span| span.trace_id == TRACE_ID), "{of_router:#?}");
}
