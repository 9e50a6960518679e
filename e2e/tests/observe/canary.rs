//! What a client sends is nowhere but with the engine: a marker in everything that a client can say, sent by every way
//! that a request can go, is in no log line at any level, in no span, and in no answer of the admin port.
//!
//! No request makes the router panic, so what a panic tells is not to be seen here: that its message is withheld where it
//! is made of values is tested where it is reported, in the router's `telemetry::panics`, and that it costs one stream
//! alone in its `extproc`.

use std::time::Duration;

use e2e::collector::Span;
use e2e::http::{client, client_with_timeout};
use e2e::stack::Stack;
use reqwest::{RequestBuilder, StatusCode};
use serde_json::{Value, json};

use crate::TURN;
use crate::setup::Setup;

/// No part of it is a word of any program.
const MARKER: &str = "zqx7kanaryvw9";
/// Bodies above this are not read.
const BODY_BYTES: usize = 64 << 10;

/// All that the admin port tells; each must be there.
const ADMIN_PATHS: [&str; 4] = ["/livez", "/readyz", "/metrics", "/sources"];
/// What it tells of single requests and of the caches; each must be there, too.
const EXPLAIN_PATHS: [&str; 5] = ["/overview", "/decisions", "/endpoints", "/index", "/"];

#[tokio::test]
#[ignore = "needs the OpenTelemetry Collector: cargo e2e tools"]
async fn nothing_that_a_client_sends_is_told_to_anybody() {
    let _turn = TURN.lock().await;
    let mut setup = Setup::start(|options| {
        options.env.push(("WARMROUTE_LOG_FILTER".to_owned(), "trace".to_owned()));
        options.body_bytes = Some(BODY_BYTES);
    })
    .await;
    let stack = &setup.stack;
    for (path, body) in bodies() {
        send(stack, path, body).await;
    }
    setup.tokenizer.echo_as_error();
    for (path, body) in bodies() {
        // Other tokens than those that are remembered.
        send(stack, path, body.replace("and then", "and then something else")).await;
    }
    send(stack, &format!("/v1/{MARKER}?key={MARKER}"), "{}".to_owned()).await;

    let n_failed = |spans: &[Span]| {
        let reason = Some("tokenizer_status".to_owned());
        spans.iter().filter(|span| span.attribute("warmroute.decision.fallback") == reason).count()
    };
    let spans = setup.collector().wait_spans(|spans| n_failed(spans) > 0).await.unwrap();
    assert!(spans.iter().any(|span| span.name == "warmroute.score"));
    assert_free_of_marker("spans", &setup.collector().text_of("warmroute").unwrap());
    for path in ADMIN_PATHS {
        assert_free_of_marker(path, &admin(stack, path).await);
    }
    assert_explanations_free_of_marker(stack).await;

    let router = setup.stack.router.take().unwrap();
    let log = router.service().log().to_owned();
    router.stop().await.unwrap();
    let text = std::fs::read_to_string(&log).unwrap();
    assert!(text.contains("endpoint picked"), "the log is at its most talkative: {text}");
    assert_free_of_marker("log", &text);
    assert!(setup.tokenizer.was_asked(MARKER), "what was looked for was there to be found");
}

/// Requests of every kind, each with the marker wherever a client may write.
fn bodies() -> Vec<(&'static str, String)> {
    let chat = json!({
        "model": "tiny", "max_tokens": 1, "user": MARKER, "cache_salt": MARKER,
        "messages": [
            {"role": "system", "content": format!("you are {MARKER}")},
            {"role": "user", "name": MARKER, "content": format!("{MARKER} and then {MARKER}")},
        ],
        "tools": [{"type": "function", "function": {
            "name": MARKER, "description": MARKER, "parameters": {"type": "object", "properties": {MARKER: {}}},
        }}],
        MARKER: {"nested": MARKER},
    });
    let completion = json!({"model": "tiny", "max_tokens": 1, "cache_salt": MARKER,
                            "prompt": format!("{MARKER} and then {MARKER}").repeat(20)});
    let unknown = json!({"model": MARKER, "prompt": MARKER});
    let wrong_types = json!({"model": "tiny", "prompt": {MARKER: MARKER}, "messages": MARKER, "cache_salt": [MARKER]});
    let malformed = format!(r#"{{"model": "tiny", "prompt": "{MARKER} and then", {MARKER}"#);
    let oversized = json!({"model": "tiny", "max_tokens": 1, "prompt": MARKER.repeat(BODY_BYTES / MARKER.len() + 1)});
    let not_utf8 = format!("\u{fffd}{MARKER}");
    let value = |value: &Value| value.to_string();
    vec![
        ("/v1/chat/completions", value(&chat)),
        ("/v1/completions", value(&completion)),
        ("/v1/completions", value(&unknown)),
        ("/v1/completions", value(&wrong_types)),
        ("/v1/chat/completions", value(&wrong_types)),
        ("/v1/completions", malformed),
        ("/v1/completions", value(&oversized)),
        ("/v1/completions", not_utf8),
    ]
}

/// Sends a body, with the marker in all headers that are a client's; what becomes of it is the engine's matter.
async fn send(stack: &Stack, path: &str, body: String) {
    let request = client_with_timeout(Duration::from_secs(30)).post(stack.url(path)).body(body);
    let status = with_secrets(request).send().await.unwrap().status();
    assert_ne!(status, StatusCode::BAD_GATEWAY, "{path}");
}

fn with_secrets(request: RequestBuilder) -> RequestBuilder {
    let request = request.header("content-type", "application/json").bearer_auth(MARKER);
    ["x-api-key", "api-key", "cookie", "x-session-id", "user-agent", "x-gateway-destination-endpoint"]
        .into_iter()
        .fold(request, |request, header| request.header(header, MARKER))
}

/// What is told of the requests that were sent, and of what would become of them now.
async fn assert_explanations_free_of_marker(stack: &Stack) {
    for path in EXPLAIN_PATHS {
        assert_free_of_marker(path, &admin(stack, path).await);
    }
    let decisions: Value = serde_json::from_str(&admin(stack, EXPLAIN_PATHS[1]).await).unwrap();
    let decisions = decisions.as_array().unwrap();
    assert!(!decisions.is_empty(), "requests were decided");
    for decision in decisions {
        let path = format!("/explain/{}", decision["request_id"].as_str().unwrap());
        assert_free_of_marker(&path, &admin(stack, &path).await);
    }
    for (path, body) in bodies() {
        let explain = client().post(admin_url(stack, &format!("/explain?path={path}"))).body(body);
        let answer = with_secrets(explain).send().await.unwrap().text().await.unwrap();
        assert_free_of_marker("the explanation of a body", &answer);
    }
}

fn admin_url(stack: &Stack, path: &str) -> String {
    format!("http://{}{path}", stack.router.as_ref().unwrap().admin())
}

async fn admin(stack: &Stack, path: &str) -> String {
    let response = client().get(admin_url(stack, path)).send().await.unwrap();
    assert_eq!(response.status(), 200, "{path}");
    response.text().await.unwrap()
}

/// As text, in the forms in which Rust shows bytes and token ids, and in hexadecimal.
fn assert_free_of_marker(place: &str, text: &str) {
    let numbers: Vec<String> = MARKER.bytes().map(|byte| byte.to_string()).collect();
    let forms = [MARKER.to_owned(), numbers.join(", "), numbers.join(","), hex::encode(MARKER)];
    for form in forms {
        if let Some(line) = text.lines().find(|line| line.contains(&form)) {
            panic!("{place} tells {form:?}: {line}");
        }
    }
}
