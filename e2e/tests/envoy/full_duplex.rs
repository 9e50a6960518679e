//! Bodies go to the router in pieces and come back from it, both ways: the endpoint-picker protocol.

use std::time::{Duration, Instant};

use e2e::envoy::Gateway;
use e2e::http::client;
use e2e::router::RouterOptions;
use reqwest::Body;
use serde_json::Value;

use crate::setup::*;

const IN_FLIGHT: &str = "warmroute_endpoint_in_flight{";
const MISCONFIGURED: &str = "warmroute_misconfigured_streams_total{";
/// What the router is told to hold of a body where that is less than the default.
const BODY_BYTES: usize = 1 << 20;

fn duplex(options: RouterOptions) -> RouterOptions {
    RouterOptions { gateway: Gateway::FullDuplex, ..options }
}

/// A body of a completion for `model` with `n_bytes` of prompt; `model` is its first field.
fn completion(model: &str, n_bytes: usize) -> Vec<u8> {
    let prompt = "kato lemi ".repeat(n_bytes / 10);
    format!(r#"{{"model": "{model}", "odd": 1.50, "prompt": "{prompt}"}}"#).into_bytes()
}

/// Posts `body` once with a length and once in chunks; what comes back of it.
async fn echoed(echo: &Echo, body: &[u8]) -> Vec<(u16, Vec<u8>)> {
    let chunks: Vec<_> = body.chunks(100_000).map(|chunk| Ok::<_, String>(chunk.to_vec())).collect();
    let chunked = Body::wrap_stream(futures_util::stream::iter(chunks));
    let mut answers = Vec::new();
    for body in [Body::from(body.to_vec()), chunked] {
        let response = client().post(echo.stack.url("/v1/completions")).body(body).send().await.unwrap();
        answers.push((response.status().as_u16(), response.bytes().await.unwrap().to_vec()));
    }
    answers
}

async fn assert_unchanged(echo: &Echo, body: &[u8]) {
    for (status, got) in echoed(echo, body).await {
        assert!(status == 200 && got == body, "{status} with {} bytes, sent {}", got.len(), body.len());
    }
}

#[tokio::test]
async fn request_goes_to_the_engine_that_holds_its_prefix_and_is_counted_until_its_end() {
    let setup = Setup::behind(Gateway::FullDuplex, Vec::new()).await;
    for (number, engine) in (1..).zip(setup.engines.http()) {
        let prompt = prompt(number);
        setup.warm(engine, &prompt, N_BLOCKS).await;
        let response = setup.complete(&prompt).await;
        assert_eq!(served_by(&response), engine);
        let answer: Value = response.json().await.unwrap();
        assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 16 * N_BLOCKS);
    }
    wait_metric(&setup.stack, IN_FLIGHT, 0.0).await;
    assert_eq!(setup.stack.metric(MISCONFIGURED).await.unwrap(), 0.0);
    let models = client().get(setup.stack.url("/v1/models")).send().await.unwrap();
    assert_eq!(models.status(), 200, "a request without a body");
}

#[tokio::test]
async fn bodies_reach_an_engine_unchanged_and_answers_the_client() {
    let echo = Echo::start_with(duplex).await;
    let malformed: [&[u8]; 4] = [b"{not json", b"\xff\xfe\x00\x01", b"", b"[]"];
    for body in malformed {
        assert_unchanged(&echo, body).await;
    }
    for n_bytes in [10, 60 << 10, 1 << 20, 5 << 20] {
        for model in ["tiny", "unknown"] {
            assert_unchanged(&echo, &completion(model, n_bytes)).await;
        }
    }
}

#[tokio::test]
async fn clients_report_mode_is_cut_out() {
    let echo = Echo::start_with(duplex).await;
    for n_words in [1, 300_000] {
        let rest = format!(r#""model": "tiny", "odd": 1.50, "odd": [ ], "prompt": "{}""#, "kato ".repeat(n_words));
        let given = format!(r#"{{"vllm_xargs": {{"kv_cache_report_mode": "full"}}, {rest}}}"#);
        let expected = format!("{{{rest}}}");
        for (status, got) in echoed(&echo, given.as_bytes()).await {
            assert!(status == 200 && got == expected.as_bytes(), "{status} with {} bytes", got.len());
        }
    }
}

#[tokio::test]
async fn bodies_beyond_the_limit_are_served_by_load() {
    let echo = Echo::start_with(|options| RouterOptions { body_bytes: Some(BODY_BYTES), ..duplex(options) }).await;
    let n_oversized =
        async || echo.stack.metric(r#"warmroute_fallbacks_total{reason="oversized_body"}"#).await.unwrap();
    assert_unchanged(&echo, &completion("tiny", BODY_BYTES / 2)).await;
    assert_eq!(n_oversized().await, 0.0);
    assert_unchanged(&echo, &completion("tiny", 5 << 20)).await;
    assert_eq!(n_oversized().await, 2.0);
    assert_unchanged(&echo, &completion("unknown", 5 << 20)).await;
    let left = r#"warmroute_left_to_envoy_total{reason="unknown_model"}"#;
    assert_eq!(echo.stack.metric(left).await.unwrap(), 2.0);
    wait_metric(&echo.stack, IN_FLIGHT, 0.0).await;
}

#[tokio::test]
async fn refusals_reach_the_client_before_and_after_the_limit() {
    let strict = |options| RouterOptions {
        body_bytes: Some(BODY_BYTES),
        env: vec![("WARMROUTE_SELECTION_MODE".to_owned(), "original_dst".to_owned())],
        ..duplex(options)
    };
    let echo = Echo::start_with(strict).await;
    for n_bytes in [100, BODY_BYTES + 1000] {
        let request = client().post(echo.stack.url("/v1/completions")).body(completion("unknown", n_bytes));
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), 503, "{n_bytes} bytes");
        let error: Value = response.json().await.unwrap();
        assert_eq!(error["error"]["code"], "unknown_model", "{n_bytes} bytes");
    }
}

#[tokio::test]
async fn the_endpoint_that_served_is_known() {
    let dead = dead_engine();
    let setup = Setup::behind(Gateway::FullDuplex, vec![dead.clone()]).await;
    for number in 0..40 {
        let response = setup.complete(&prompt(number)).await;
        assert_eq!(response.status(), 200, "request {number}");
        assert_ne!(served_by(&response), dead.http);
    }
    let retried =
        setup.stack.metric(r#"warmroute_picks_not_served_total{model="tiny",cause="retried"}"#).await.unwrap();
    assert!(retried > 0.0, "the attributes of the response do not come");
}

#[tokio::test]
async fn answers_stream_token_by_token_and_count_until_the_client_leaves() {
    let setup = Setup::behind(Gateway::FullDuplex, Vec::new()).await;
    let mut answer = Streamed::ask(&setup.stack, 100).await;
    assert!(answer.next().await.unwrap());
    // A hundred tokens at 5 ms: an answer that was held back would come at once, at the end.
    assert!(!answer.is_complete(), "{}", answer.text);
    answer.read_to_end().await.unwrap();
    assert!(answer.is_complete(), "{}", answer.text);
    assert!(answer.text.contains(r#""completion_tokens":100"#), "{}", answer.text);
    wait_metric(&setup.stack, IN_FLIGHT, 0.0).await;

    let mut answer = Streamed::ask(&setup.stack, 1000).await;
    assert!(answer.next().await.unwrap());
    assert_eq!(setup.stack.metric(IN_FLIGHT).await.unwrap(), 1.0);
    drop(answer);
    wait_metric(&setup.stack, IN_FLIGHT, 0.0).await;
}

#[tokio::test]
async fn stopping_the_router_fails_nothing() {
    // Longer than the interval of Envoy's health check.
    let patient = |options| RouterOptions {
        env: vec![("WARMROUTE_SHUTDOWN_DELAY".to_owned(), "3s".to_owned())],
        ..duplex(options)
    };
    let mut setup = Setup::start_as(patient).await;
    let mut answer = Streamed::ask(&setup.stack, 1000).await;
    assert!(answer.next().await.unwrap());
    let router = setup.stack.router.take().unwrap();
    let mut stopping = std::pin::pin!(async move {
        let (stopped, read) = tokio::join!(router.stop(), answer.read_to_end());
        stopped.unwrap();
        read.unwrap();
        answer
    });
    let asked = prompt(1);
    let answer = loop {
        tokio::select! {
            answer = &mut stopping => break answer,
            response = setup.complete(&asked) => assert_eq!(response.status(), 200, "while it stops"),
        }
    };
    assert!(answer.is_complete(), "{}", answer.text);
    assert_eq!(setup.complete(&prompt(1)).await.status(), 200, "new requests pass the router by");
}

/// What is lost, and why BUFFERED is the default: an answer on its way through the router ends with it, whatever
/// `failure_mode_allow` says, and requests with a body fail until Envoy's health check has noticed.
#[tokio::test]
async fn killing_the_router_cuts_answers_under_way_and_fails_requests_until_it_is_noticed() {
    let mut setup = Setup::behind(Gateway::FullDuplex, Vec::new()).await;
    let mut answer = Streamed::ask(&setup.stack, 2000).await;
    assert!(answer.next().await.unwrap());
    setup.stack.kill_router().await.unwrap();
    let ended = answer.read_to_end().await;
    assert!(ended.is_err() || !answer.is_complete(), "the answer went on: {ended:?}");
    let deadline = Instant::now() + Duration::from_secs(10);
    while setup.complete(&prompt(0)).await.status() != 200 {
        assert!(Instant::now() < deadline, "the router is gone and no request passes");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    for number in 0..5 {
        assert_eq!(setup.complete(&prompt(number)).await.status(), 200, "request {number}");
    }
}
