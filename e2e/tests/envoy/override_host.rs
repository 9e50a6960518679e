//! Bodies are buffered, and Envoy's `override_host` policy dials what it is told.

use std::collections::BTreeSet;

use e2e::http::client;
use futures_util::StreamExt;
use reqwest::{Body, StatusCode};
use serde_json::{Value, json};

use crate::setup::*;

#[tokio::test]
async fn request_goes_to_the_engine_that_holds_its_prefix() {
    let setup = Setup::start().await;
    for round in 0..3 {
        for (idx, engine) in (0..).zip(setup.engines.http()) {
            let prompt = prompt(1 + 3 * round + idx);
            setup.warm(engine, &prompt, N_BLOCKS * u64::from(round + 1)).await;
            let response = setup.complete(&prompt).await;
            assert_eq!(served_by(&response), engine, "round {round}");
            let answer: Value = response.json().await.unwrap();
            assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 16 * N_BLOCKS);
        }
    }
}

#[tokio::test]
async fn conversation_stays_where_its_first_turn_went() {
    let setup = Setup::start().await;
    let question = "kato lemi ".repeat(100);
    let mut messages = vec![json!({"role": "user", "content": question})];
    let mut engine = None;
    for turn in 0..4 {
        let body = json!({"model": "tiny", "messages": messages, "max_tokens": 40});
        let request = client().post(setup.stack.url("/v1/chat/completions")).json(&body);
        let response = request.send().await.unwrap();
        let served = served_by(&response);
        assert_eq!(*engine.get_or_insert(served), served, "turn {turn}");
        let answer: Value = response.json().await.unwrap();
        let n_stored = (answer["usage"]["total_tokens"].as_u64().unwrap() - 1) / 16;
        messages.push(answer["choices"][0]["message"].clone());
        messages.push(json!({"role": "user", "content": "and then"}));
        setup.stack.wait_indexed(served, n_stored).await.unwrap();
    }
}

#[tokio::test]
async fn forged_routing_headers_are_ignored() {
    let setup = Setup::start().await;
    let [warm, other, _] = setup.engines.http()[..] else { panic!("three engines") };
    setup.warm(warm, &prompt(1), N_BLOCKS).await;
    let outside = setup.stack.envoy.admin();
    for forged in [other, outside] {
        let body = json!({"model": "tiny", "prompt": prompt(1), "max_tokens": 1});
        let request = client().post(setup.stack.url("/v1/completions")).json(&body);
        let request = request.header("x-gateway-destination-endpoint", forged.to_string());
        let response = request.header("target-pod", forged.to_string()).send().await.unwrap();
        assert_eq!((response.status(), served_by(&response)), (StatusCode::OK, warm), "forged {forged}");
    }
    // Requests for which the router names nobody: Envoy must not follow the client either.
    let mut served = BTreeSet::new();
    for _ in 0..30 {
        let request = client().get(setup.stack.url("/v1/models"));
        let request = request.header("x-gateway-destination-endpoint", other.to_string());
        served.insert(served_by(&request.send().await.unwrap()));
    }
    assert!(served.len() > 1, "all went to {served:?}");
}

#[tokio::test]
async fn dead_endpoint_never_yields_an_error() {
    let dead = dead_engine();
    let setup = Setup::start_with(vec![dead.clone()]).await;
    for number in 0..40 {
        let response = setup.complete(&prompt(number)).await;
        assert_eq!(response.status(), 200, "request {number}");
        assert_ne!(served_by(&response), dead.http);
    }
}

#[tokio::test]
async fn answers_stream_token_by_token() {
    let setup = Setup::start().await;
    let body = json!({"model": "tiny", "messages": [{"role": "user", "content": "kato"}], "max_tokens": 100,
                      "stream": true, "stream_options": {"include_usage": true}});
    let request = client().post(setup.stack.url("/v1/chat/completions")).json(&body);
    let mut bytes = request.send().await.unwrap().bytes_stream();
    let mut text = String::new();
    while let Some(chunk) = bytes.next().await {
        let is_first = text.is_empty();
        text.push_str(std::str::from_utf8(&chunk.unwrap()).unwrap());
        // A hundred tokens at 5 ms: an answer that was held back would come at once, at the end.
        assert!(!is_first || !text.ends_with("data: [DONE]\n\n"), "{text}");
    }
    assert!(text.ends_with("data: [DONE]\n\n"), "{text}");
    assert!(text.contains(r#""completion_tokens":100"#), "{text}");
}

#[tokio::test]
async fn models_are_listed_through_envoy() {
    let setup = Setup::start().await;
    let response = client().get(setup.stack.url("/v1/models")).send().await.unwrap();
    assert_eq!(response.status(), 200);
    let models: Value = response.json().await.unwrap();
    assert_eq!(models["data"][0]["id"], "tiny");
}

#[tokio::test]
async fn requests_pass_when_the_router_is_gone() {
    let mut setup = Setup::start().await;
    setup.stack.stop_router();
    for number in 0..5 {
        assert_eq!(setup.complete(&prompt(number)).await.status(), 200, "request {number}");
    }
}

#[tokio::test]
async fn clients_report_mode_is_cut_out_and_the_length_fits() {
    let Echo { stack, .. } = &Echo::start().await;
    for n_words in [1, 1_000, 300_000] {
        let rest = format!(r#""model": "tiny", "odd": 1.50, "odd": [ ], "prompt": "{}""#, "kato ".repeat(n_words));
        let given = format!(r#"{{"vllm_xargs": {{"kv_cache_report_mode": "full"}}, {rest}}}"#);
        let expected = format!("{{{rest}}}");
        let chunks: Vec<_> = given.as_bytes().chunks(100_000).map(|chunk| Ok::<_, String>(chunk.to_vec())).collect();
        let chunked = Body::wrap_stream(futures_util::stream::iter(chunks));
        for (body, form) in [(Body::from(given), "with a length"), (chunked, "in chunks")] {
            let request = client().post(stack.url("/v1/completions")).body(body);
            let response = request.send().await.unwrap();
            assert_eq!(response.status(), 200, "{form}, {n_words}");
            let header = |name: &str| response.headers()[name].to_str().unwrap().to_owned();
            let told = (header("x-length"), header("x-encoding"));
            assert_eq!(told, (expected.len().to_string(), "none".to_owned()), "{form}, {n_words}");
            assert_eq!(response.bytes().await.unwrap(), expected.as_bytes(), "{form}, {n_words}");
        }
    }
}

#[tokio::test]
async fn clients_report_mode_makes_no_engine_announce_anything() {
    let setup = Setup::start().await;
    let engine = setup.engines.http()[0];
    setup.warm(engine, &prompt(1), N_BLOCKS).await;
    let n_stored = async || {
        setup.stack.wait_quiet().await.unwrap();
        setup.stack.metric(r#"warmroute_events_total{"#).await.unwrap()
    };
    let before = n_stored().await;
    let mut body = json!({"model": "tiny", "prompt": prompt(1), "max_tokens": 1});
    body["vllm_xargs"] = json!({"kv_cache_report_mode": "full"});
    let response = client().post(setup.stack.url("/v1/completions")).json(&body).send().await.unwrap();
    assert_eq!(served_by(&response), engine);
    assert_eq!(n_stored().await, before);
    // Past the router the same body does make it announce its blocks.
    let url = format!("http://{engine}/v1/completions");
    assert_eq!(client().post(url).json(&body).send().await.unwrap().status(), 200);
    assert_eq!(n_stored().await, before + 1.0);
}

#[tokio::test]
async fn hot_prefixes_of_an_incomplete_engine_are_credited_after_one_report_each() {
    let prompts = [prompt(1), prompt(2)];
    let setup = Setup::late(&prompts, true).await;
    let engine = setup.engines.http()[0];
    for (number, prompt) in (1_u32..).zip(&prompts) {
        let matched = async || setup.stack.matched_tokens().await.unwrap();
        let before = matched().await;
        assert_eq!(setup.complete(prompt).await.status(), 200);
        assert_eq!(matched().await, before, "prompt {number} is hot and unknown");
        setup.stack.wait_indexed(engine, N_BLOCKS * u64::from(number)).await.unwrap();
        for _ in 0..2 {
            let answer: Value = setup.complete(prompt).await.json().await.unwrap();
            assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 16 * N_BLOCKS);
        }
        assert_eq!(matched().await, before + 2 * 16 * N_BLOCKS, "prompt {number} is known");
        let n_requested = setup.stack.metric("warmroute_full_reports_requested_total{").await.unwrap();
        assert_eq!(n_requested, f64::from(number), "known conversations do not ask");
    }
}

#[tokio::test]
async fn hot_prefixes_of_an_incomplete_engine_are_learned_from_picks_without_reports() {
    let setup = Setup::late(&[prompt(1)], false).await;
    for _ in 0..3 {
        let answer: Value = setup.complete(&prompt(1)).await.json().await.unwrap();
        assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 16 * N_BLOCKS, "the prefix is hot");
        setup.stack.wait_quiet().await.unwrap();
    }
    let n_decided = async |outcome: &str| {
        let series = format!(r#"warmroute_decisions_total{{model="tiny",outcome="{outcome}","#);
        setup.stack.metric(&series).await.unwrap()
    };
    assert_eq!((n_decided("no_match").await, n_decided("learned_match").await), (1.0, 2.0));
    assert_eq!(setup.stack.metric("warmroute_full_reports_requested_total{").await.unwrap(), 0.0);
}

#[tokio::test]
async fn malformed_bodies_reach_an_engine_unchanged() {
    let Echo { stack, .. } = &Echo::start().await;
    let long = format!(r#"{{"model": "tiny", "prompt": "{}"#, "kato ".repeat(200_000));
    let bodies: [&[u8]; 8] = [
        b"{not json",
        b"\xff\xfe\x00\x01",
        b"",
        b"[]",
        br#"{"model": 7, "messages": "no list"}"#,
        br#"{"model": "unknown", "prompt": "kato"}"#,
        br#"{"model": "tiny", "model": "tiny", "prompt": ["kato", 1, null]}"#,
        long.as_bytes(),
    ];
    for body in bodies {
        for path in ["/v1/completions", "/v1/chat/completions"] {
            let request = client().post(stack.url(path)).header("content-type", "application/json");
            let response = request.body(body.to_vec()).send().await.unwrap();
            let shown = String::from_utf8_lossy(&body[..body.len().min(80)]).into_owned();
            assert_eq!(response.status(), 200, "{path} {shown}");
            assert_eq!(response.bytes().await.unwrap(), body, "{path} {shown}");
        }
    }
}
