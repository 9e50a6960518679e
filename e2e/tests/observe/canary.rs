//! What a client sends is nowhere but with the engine: a marker in everything that a client can say, sent by every way
//! that a request can go, is in no log line at any level, in no span, in no metric that is pushed, in no line of the
//! record, and in no answer of the admin port.
//!
//! No request makes the router panic, so what a panic tells is not to be seen here: what the program's hook leaves in the
//! log is tested in the router's `telemetry::panics`, and that a panic costs one stream alone in its `extproc`.

use std::path::Path;
use std::time::{Duration, Instant};

use e2e::collector::Span;
use e2e::envoy::Gateway;
use e2e::http::{client, client_with_timeout};
use e2e::router::RouterOptions;
use e2e::stack::Stack;
use reqwest::{RequestBuilder, StatusCode};
use serde_json::{Value, json};

use crate::TURN;
use crate::setup::Setup;

/// No part of it is a word of any program.
const MARKER: &str = "zqx7kanaryvw9";
/// Bodies above this are not read.
const BODY_BYTES: usize = 64 << 10;
const PATIENCE: Duration = Duration::from_secs(20);

/// All that the admin port tells; each must be there.
const ADMIN_PATHS: [&str; 5] = ["/livez", "/readyz", "/metrics", "/sources", "/snapshots"];
/// What it tells of single requests and of the caches; each must be there, too.
const EXPLAIN_PATHS: [&str; 5] = ["/overview", "/decisions", "/endpoints", "/index", "/"];

/// A way in which requests can go.
struct Way {
    gateway: Gateway,
    mode: &'static str,
    /// Whether the router tokenizes by itself, with a template that quotes a message's role in its refusal, and learns
    /// from its own picks.
    is_local: bool,
    /// Whether requests that name no model come to the only one.
    is_default: bool,
    /// Series that must have counted, so that bodies went where they are meant to go.
    reached: &'static [&'static str],
}

const WAYS: [Way; 4] = [
    Way {
        gateway: Gateway::OverrideHost,
        mode: "active",
        is_local: false,
        is_default: true,
        reached: &[
            r#"warmroute_fallbacks_total{reason="unreadable_body"}"#,
            r#"warmroute_fallbacks_total{reason="oversized_body"}"#,
            r#"warmroute_fallbacks_total{reason="invalid_prompt"}"#,
            r#"warmroute_fallbacks_total{reason="chat_template"}"#,
            r#"warmroute_fallbacks_total{reason="media"}"#,
            r#"warmroute_fallbacks_total{reason="needs_render"}"#,
            r#"warmroute_fallbacks_total{reason="other_path"}"#,
            r#"warmroute_fallbacks_total{reason="tokenizer_status"}"#,
            r#"warmroute_left_to_envoy_total{reason="unknown_model"}"#,
        ],
    },
    Way {
        gateway: Gateway::FullDuplex,
        mode: "active",
        is_local: true,
        is_default: true,
        reached: &[
            r#"warmroute_fallbacks_total{reason="unreadable_body"}"#,
            r#"warmroute_fallbacks_total{reason="oversized_body"}"#,
            r#"warmroute_fallbacks_total{reason="local_template"}"#,
            r#"warmroute_fallbacks_total{reason="chat_template"}"#,
            r#"warmroute_left_to_envoy_total{reason="unknown_model"}"#,
        ],
    },
    Way {
        gateway: Gateway::OverrideHost,
        mode: "shadow",
        is_local: false,
        is_default: false,
        reached: &[
            "warmroute_shadow_decisions_total{",
            r#"warmroute_left_to_envoy_total{reason="no_model"}"#,
            r#"warmroute_left_to_envoy_total{reason="unknown_model"}"#,
        ],
    },
    Way {
        gateway: Gateway::OverrideHost,
        mode: "off",
        is_local: false,
        is_default: false,
        reached: &[r#"warmroute_left_to_envoy_total{reason="switched_off"}"#],
    },
];

#[tokio::test]
#[ignore = "needs Envoy and the OpenTelemetry Collector: cargo e2e tools"]
async fn nothing_that_a_client_sends_is_told_to_anybody() {
    let _turn = TURN.lock().await;
    for way in WAYS {
        go(&way).await;
    }
}

/// Everything is sent one way, and looked for wherever the router writes.
async fn go(way: &Way) {
    let place = |what: &str| format!("{what} ({} {:?}, local: {})", way.mode, way.gateway, way.is_local);
    let dir = tempfile::tempdir().unwrap();
    let record = dir.path().join("record.jsonl");
    let mut setup = Setup::start(|options| way.change(options, &record)).await;
    let stack = &setup.stack;
    send_all(&setup).await;
    await_reached(stack, way).await;

    let spans = setup.collector().wait_spans(|spans| is_told(spans, way)).await.unwrap();
    assert!(way.mode == "off" || spans.iter().any(|span| span.name == "warmroute.score"));
    assert_free_of_marker(&place("spans"), &setup.collector().text_of("warmroute").unwrap());
    assert_free_of_marker(&place("pushed metrics"), &pushed_metrics(&setup).await);
    for path in ADMIN_PATHS {
        assert_free_of_marker(&place(path), &admin(stack, path).await);
    }
    if !way.is_local {
        assert_snapshots_free_of_marker(stack).await;
    }
    assert_explanations_free_of_marker(stack).await;

    let router = setup.stack.router.take().unwrap();
    let log = router.service().log().to_owned();
    router.stop().await.unwrap();
    let text = std::fs::read_to_string(&log).unwrap();
    let is_talkative = text.contains("endpoint picked") || way.mode != "active";
    assert!(is_talkative && text.contains("DEBUG"), "the log is at its most talkative: {text}");
    assert_free_of_marker(&place("log"), &text);
    let lines = std::fs::read_to_string(&record).unwrap_or_default();
    assert_eq!(lines.is_empty(), way.mode == "off", "the record has what is decided");
    assert_free_of_marker(&place("record"), &lines);
    let is_asked = !way.is_local && way.mode != "off";
    assert_eq!(setup.tokenizer.was_asked(MARKER), is_asked, "what was looked for was there to be found");
}

impl Way {
    fn change(&self, options: &mut RouterOptions, record: &Path) {
        options.gateway = self.gateway;
        options.body_bytes = Some(BODY_BYTES);
        if self.is_local {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/tokens/unigram");
            options.tokenizer = Some(json!({"kind": "local", "path": path}));
            options.sync = Some(false);
        }
        let spans = options.env.iter().find(|(name, _)| name == "WARMROUTE_TRACE_OTLP_ENDPOINT");
        let collector = spans.unwrap().1.clone();
        let settings = [
            ("WARMROUTE_LOG_FILTER", "trace"),
            ("WARMROUTE_ROLLOUT_MODE", self.mode),
            ("WARMROUTE_ROLLOUT_RECORD_PATH", record.to_str().unwrap()),
            ("WARMROUTE_METRICS_OTLP_ENDPOINT", &collector),
            ("WARMROUTE_METRICS_OTLP_INTERVAL", "1s"),
            ("WARMROUTE_MODELS_0_DEFAULT", if self.is_default { "true" } else { "false" }),
        ];
        options.env.extend(settings.map(|(name, value)| (name.to_owned(), value.to_owned())));
    }
}

/// All bodies, to a tokenizer that answers and to one that answers with what it was asked.
async fn send_all(setup: &Setup) {
    for (path, body) in bodies() {
        send(&setup.stack, path, body).await;
    }
    setup.tokenizer.echo_as_error();
    for (path, body) in bodies() {
        // Other tokens than those that are remembered.
        send(&setup.stack, path, body.replace("and then", "and then something else")).await;
    }
    send(&setup.stack, &format!("/v1/{MARKER}?key={MARKER}"), "{}".to_owned()).await;
}

async fn await_reached(stack: &Stack, way: &Way) {
    let begun = Instant::now();
    loop {
        let metrics = stack.router.as_ref().unwrap().metrics().await.unwrap();
        let has_counted = |series: &&str| {
            let mut lines = metrics.lines().filter(|line| line.starts_with(series));
            lines.any(|line| !line.ends_with(" 0"))
        };
        let missing: Vec<_> = way.reached.iter().filter(|series| !has_counted(series)).collect();
        if missing.is_empty() {
            return;
        }
        let reasons: Vec<_> =
            metrics.lines().filter(|line| line.contains("reason=") && !line.ends_with(" 0")).collect();
        assert!(begun.elapsed() < PATIENCE, "{}: nobody came by {missing:?}, but by {reasons:#?}", way.mode);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Whether the spans of the last requests are there.
fn is_told(spans: &[Span], way: &Way) -> bool {
    let failed = if way.is_local { "local_template" } else { "tokenizer_status" };
    let is_failed = |span: &Span| span.attribute("warmroute.decision.fallback").as_deref() == Some(failed);
    spans.iter().any(|span| if way.mode == "off" { span.service == "warmroute" } else { is_failed(span) })
}

/// What was pushed, once the counts of the requests are in it.
async fn pushed_metrics(setup: &Setup) -> String {
    let begun = Instant::now();
    loop {
        let text = setup.collector().metrics_text().unwrap();
        if text.contains("warmroute_left_to_envoy") {
            return text;
        }
        assert!(begun.elapsed() < PATIENCE, "no metrics are pushed: {text}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// What siblings get of each source: neither the marker nor its tokens, of which the tokenizer makes one per byte.
async fn assert_snapshots_free_of_marker(stack: &Stack) {
    let listing: Value = serde_json::from_str(&admin(stack, "/snapshots").await).unwrap();
    let sources = listing["sources"].as_array().unwrap();
    assert!(!sources.is_empty(), "engines are followed");
    let tokens: Vec<u8> = MARKER.bytes().flat_map(|byte| u32::from(byte).to_le_bytes()).collect();
    for source in sources {
        let path = format!(
            "/snapshots/{}/{}/{}",
            source["model"].as_str().unwrap(),
            source["address"].as_str().unwrap(),
            source["rank"]
        );
        let answer = client().get(admin_url(stack, &path)).send().await.unwrap();
        assert_eq!(answer.status(), 200, "{path}");
        let bytes = answer.bytes().await.unwrap();
        for form in [MARKER.as_bytes(), &tokens] {
            assert!(!bytes.windows(form.len()).any(|window| window == form), "{path} has {form:?}");
        }
    }
}

/// Requests of every kind, each with the marker wherever a client may write.
fn bodies() -> Vec<(&'static str, String)> {
    let text = format!("{MARKER} and then {MARKER}");
    let chat = json!({
        "model": "tiny", "max_tokens": 1, "user": MARKER, "cache_salt": MARKER,
        "messages": [
            {"role": "system", "content": format!("you are {MARKER}")},
            {"role": "user", "name": MARKER, "content": text},
        ],
        "tools": [{"type": "function", "function": {
            "name": MARKER, "description": MARKER, "parameters": {"type": "object", "properties": {MARKER: {}}},
        }}],
        MARKER: {"nested": MARKER},
    });
    let chat_with = |name: &str, value: Value| {
        let mut chat = json!({"model": "tiny", "max_tokens": 1, "messages": [{"role": "user", "content": text}]});
        chat[name] = value;
        chat
    };
    let media = json!([{"role": "user", "content": [
        {"type": "text", "text": text},
        {"type": "image_url", "image_url": {"url": format!("data:image/png;base64,{MARKER}"), "detail": MARKER}, "uuid": MARKER},
        {"type": "input_audio", "input_audio": {"data": MARKER, "format": MARKER}},
    ]}]);
    let turns = json!([{"role": MARKER, "content": text}, {"role": "user", "content": text}]);
    let completion = json!({"model": "tiny", "max_tokens": 1, "cache_salt": MARKER, "prompt": text.repeat(20)});
    let responses = json!({"model": "tiny", "max_output_tokens": 1, "instructions": MARKER, "metadata": {MARKER: MARKER},
                           "input": [{"role": "user", "content": [{"type": "input_text", "text": text}]}]});
    let messages = json!({"model": "tiny", "max_tokens": 1, "system": MARKER, "metadata": {"user_id": MARKER},
                          "messages": [{"role": "user", "content": [{"type": "text", "text": text}]}],
                          "tools": [{"name": MARKER, "description": MARKER, "input_schema": {"type": "object"}}]});
    let unknown = json!({"model": MARKER, "prompt": MARKER});
    let wrong_types = json!({"model": "tiny", "prompt": {MARKER: MARKER}, "messages": MARKER, "cache_salt": [MARKER]});
    let malformed = format!(r#"{{"model": "tiny", "prompt": "{MARKER} and then", {MARKER}"#);
    let oversized = json!({"model": "tiny", "max_tokens": 1, "prompt": MARKER.repeat(BODY_BYTES / MARKER.len() + 1)});
    let not_utf8 = format!("\u{fffd}{MARKER}");
    let value = |value: &Value| value.to_string();
    vec![
        ("/v1/chat/completions", value(&chat)),
        ("/v1/chat/completions", value(&chat_with("chat_template", json!(format!("{{{{ {MARKER} }}}} and then"))))),
        ("/v1/chat/completions", value(&chat_with("chat_template_kwargs", json!({MARKER: MARKER})))),
        ("/v1/chat/completions", value(&chat_with("messages", media))),
        ("/v1/chat/completions", value(&chat_with("messages", turns))),
        ("/v1/completions", value(&completion)),
        ("/v1/responses", value(&responses)),
        ("/v1/messages", value(&messages)),
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
