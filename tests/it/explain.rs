//! What the admin port tells of decisions, over real sockets.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use warmroute::admin::{self, AdminState, guard::Guard, health::Readiness, sources};
use warmroute::engine::{ApiKey, plain_http};
use warmroute::extproc::explain::{Explain, ReadSources, SourceBrief};
use warmroute::extproc::rollout::{Mode, Rollout};
use warmroute::routing::endpoint::EndpointSet;
use warmroute::routing::hash::Scope;
use warmroute::routing::index::KeyKinds;

use crate::fakes::*;

const PROMPT: &str = "a prompt of some blocks that nobody else needs to see";
const BODY_LIMIT: usize = 4096;

/// The admin port of a router.
struct Admin {
    url: String,
    client: reqwest::Client,
    _stop: tokio_util::sync::DropGuard,
}

impl Admin {
    async fn start(router: &FakeRouter, token: Option<Arc<ApiKey>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let endpoint = router.endpoints[0].address;
        let brief = move || {
            let (model, state) = ("tiny".into(), "live");
            vec![SourceBrief { model, endpoint, rank: 0, state, last_event_ms: Some(7), n_blocks: 3 }]
        };
        let explain = Explain::new(router.router.clone(), ReadSources::new(brief), BODY_LIMIT);
        let state = AdminState {
            metrics: router.metrics.clone(),
            readiness: Readiness::default(),
            sources: sources::ReadSources::new(Vec::new),
            guard: Guard::new(token),
        };
        let stop = CancellationToken::new();
        tokio::spawn(admin::run(listener, state, explain.routes(), stop.clone()));
        Self { url, client: plain_http().build().unwrap(), _stop: stop.drop_guard() }
    }

    async fn get(&self, path: &str) -> (u16, Value) {
        let response = self.client.get(format!("{}{path}", self.url)).send().await.unwrap();
        let status = response.status().as_u16();
        let text = response.text().await.unwrap();
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    async fn explain(&self, body: Vec<u8>) -> (u16, Value) {
        let url = format!("{}/explain?path=/v1/completions", self.url);
        let response = self.client.post(url).body(body).send().await.unwrap();
        let status = response.status().as_u16();
        let text = response.text().await.unwrap();
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }
}

async fn warm_pair() -> (FakeRouter, Vec<SocketAddr>, Vec<FakeEngine>) {
    let engines = vec![FakeEngine::start().await, FakeEngine::start().await];
    let addresses = vec![engines[0].address, engines[1].address];
    (FakeRouter::start(&addresses).await, addresses, engines)
}

#[tokio::test]
async fn a_dry_run_tells_what_the_request_then_meets_and_nothing_of_its_content() {
    let (router, addresses, _engines) = warm_pair().await;
    let admin = Admin::start(&router, None).await;
    let _slot = router.warm(1, &characters(PROMPT), &Scope::default(), KeyKinds::PLAIN);
    let body = json!({ "model": "alias", "prompt": PROMPT, "cache_salt": "" });
    let (status, told) = admin.explain(body.to_string().into_bytes()).await;
    assert_eq!(status, 200, "{told}");
    assert_eq!(router.in_flight(), [0, 0]);
    assert_eq!(told["pick"], addresses[1].to_string());
    assert_eq!(told["runner_up"], addresses[0].to_string());
    assert_eq!((&told["model"], &told["requested"]), (&json!("tiny"), &json!("alias")));
    assert_eq!((&told["outcome"], &told["policy"]), (&json!("prefix_match"), &json!("prefix_cache")));
    assert_eq!((&told["verdict"], &told["reason"]), (&json!("route"), &Value::Null));
    assert_eq!(told["prompt_tokens"], PROMPT.len());
    assert_eq!(told["candidates"][0]["matched_tokens"], told["candidates"][0]["matched_blocks"].as_u64().unwrap() * 4);
    assert_eq!(told["candidates"][1]["sources"][0], json!({ "rank": 0, "state": "live", "last_event_ms": 7 }));
    assert!(told["blocks"][0]["keyspace"].as_str().unwrap().starts_with("engine sha256"), "{told}");
    let mut content = told.clone();
    content.as_object_mut().unwrap().remove("timings_us").expect("the only place for a name of a step");
    for word in ["nobody", "salt", "hash"] {
        assert!(!content.to_string().contains(word), "{word} is in {content}");
    }
    let (_stream, _) = router.complete(body).await;
    let (_, decisions) = admin.get("/decisions").await;
    let decision = &decisions[0];
    for field in ["pick", "runner_up", "rank", "prompt_tokens", "outcome", "policy", "model", "requested", "why"] {
        assert_eq!(decision[field], told[field], "{field}");
    }
    assert_eq!(decision["matched_tokens"], told["candidates"][0]["matched_tokens"]);
    assert!(decision.get("standings").is_none(), "{decision}");
    let id = decision["request_id"].as_str().unwrap();
    let (status, whole) = admin.get(&format!("/explain/{id}")).await;
    assert_eq!((status, whole["standings"].as_array().unwrap().len()), (200, 2));
    // The pool asks its engines for reports, and such a pool is not watched.
    assert_eq!(whole["outcome_later"]["blocks_stored_again"], Value::Null);
    let (_, endpoints) = admin.get("/endpoints").await;
    let given = endpoints.as_array().unwrap().iter().find(|it| it["endpoint"] == addresses[1].to_string()).unwrap();
    assert_eq!((&given["decisions"], &given["in_flight"]), (&json!(1), &json!(1)));
    let (_, index) = admin.get("/index").await;
    assert!(index["keyspaces"][0]["n_blocks"].as_u64().unwrap() > 0, "{index}");
}

#[tokio::test]
async fn what_envoy_is_not_told_does_not_read_as_if_it_were() {
    let (router, addresses, _engines) = warm_pair().await;
    let admin = Admin::start(&router, None).await;
    let _slot = router.warm(1, &characters(PROMPT), &Scope::default(), KeyKinds::PLAIN);
    let body = json!({ "model": "tiny", "prompt": PROMPT });
    let roll_out = |mode, percent: &str| {
        let rollout = Rollout { mode, percent: percent.parse().unwrap() };
        router.router.roll_out(|_| Some(rollout));
    };
    let leave = "leave_to_envoy";
    for (mode, percent, told) in [
        (Mode::Active, "100", ("active", "route", Value::Null)),
        (Mode::Active, "0", ("shadow", leave, Value::Null)),
        (Mode::Shadow, "100", ("shadow", leave, Value::Null)),
        (Mode::Off, "100", ("off", leave, json!("switched_off"))),
    ] {
        roll_out(mode, percent);
        let (_, dry) = admin.explain(body.to_string().into_bytes()).await;
        let (_stream, _) = router.complete(body.clone()).await;
        let (_, decisions) = admin.get("/decisions?limit=1").await;
        let id = decisions[0]["request_id"].as_str().unwrap();
        let (_, whole) = admin.get(&format!("/explain/{id}")).await;
        for answer in [&dry, &decisions[0], &whole] {
            let found =
                (answer["mode"].as_str().unwrap(), answer["verdict"].as_str().unwrap(), answer["reason"].clone());
            assert_eq!(found, told, "{mode:?} {percent}: {answer}");
            let pick = if mode == Mode::Off { Value::Null } else { json!(addresses[1].to_string()) };
            assert_eq!(answer["pick"], pick, "{mode:?} {percent}: {answer}");
        }
        let shown = if mode == Mode::Off { Value::Null } else { json!(percent.parse::<u8>().unwrap()) };
        assert_eq!(dry["percent"], shown, "{dry}");
    }
    roll_out(Mode::Shadow, "100");
    router.set.send_replace(Arc::new(EndpointSet { synced: true, endpoints: Vec::new() }));
    let (_, dry) = admin.explain(body.to_string().into_bytes()).await;
    let (_stream, _) = router.complete(body.clone()).await;
    let (_, decisions) = admin.get("/decisions?limit=1").await;
    for answer in [&dry, &decisions[0]] {
        assert_eq!((&answer["mode"], &answer["verdict"]), (&json!("shadow"), &json!(leave)), "{answer}");
        assert_eq!((&answer["reason"], &answer["pick"]), (&json!("no_endpoint"), &Value::Null), "{answer}");
    }
}

#[tokio::test]
async fn the_end_of_a_request_is_joined_with_its_decision() {
    let (router, addresses, _engines) = warm_pair().await;
    let admin = Admin::start(&router, None).await;
    let mut stream = router.open().await;
    stream.post("/v1/completions", json!({ "model": "tiny", "prompt": PROMPT }).to_string().as_bytes()).await;
    let (_, decisions) = admin.get("/decisions?limit=1").await;
    let pick: SocketAddr = decisions[0]["pick"].as_str().unwrap().parse().unwrap();
    let other = addresses.iter().find(|address| **address != pick).copied().unwrap();
    stream.send(crate::router::response("200", Some(other), 2.0));
    stream.next().await.unwrap();
    drop(stream);
    let id = decisions[0]["request_id"].as_str().unwrap().to_owned();
    let later = tokio::time::timeout(DEADLINE, async {
        loop {
            let later = admin.get(&format!("/explain/{id}")).await.1["outcome_later"].clone();
            if !later["ended_after_ms"].is_null() {
                return later;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .unwrap();
    assert_eq!(later["served_by"], other.to_string());
    assert_eq!((&later["status"], &later["attempts"], &later["settled"]), (&json!(200), &json!(2), &json!("retried")));
}

#[tokio::test]
async fn what_cannot_be_answered_is_refused_with_its_reason() {
    let (router, _, engines) = warm_pair().await;
    let admin = Admin::start(&router, None).await;
    let (status, sentence) = admin.get("/explain/nobody-knows").await;
    assert!(status == 404 && sentence.as_str().unwrap().contains("x-request-id"), "{status} {sentence}");
    assert_eq!(admin.get("/decisions?limit=1000000").await.0, 400);
    let (status, sentence) = admin.explain(vec![b' '; BODY_LIMIT + 1]).await;
    assert_eq!(
        (status, sentence),
        (413, json!(format!("the body is longer than the {BODY_LIMIT} bytes that are read\n")))
    );
    let (status, told) = admin.explain(json!({ "model": "other" }).to_string().into_bytes()).await;
    assert_eq!((status, &told["verdict"], &told["reason"]), (200, &json!("leave_to_envoy"), &json!("unknown_model")));
    assert_eq!(told["body_fault"], json!(null));
    let (status, told) = admin.explain(b"{\"prompt\":\n \"secret\"".to_vec()).await;
    let fault = told["body_fault"].as_str().unwrap();
    assert!(status == 200 && fault.ends_with("from line 2, column 9 on") && !fault.contains("secret"), "{told}");
    engines.iter().for_each(|engine| engine.set(Tokenize::Never));
    let body = json!({ "model": "tiny", "prompt": PROMPT }).to_string().into_bytes();
    let statuses = futures_util::future::join_all((0..6).map(|_| admin.explain(body.clone()))).await;
    let statuses: Vec<u16> = statuses.into_iter().map(|(status, _)| status).collect();
    assert!(statuses.contains(&503) && statuses.contains(&200), "{statuses:?}");
    assert_eq!(admin.explain(body).await.0, 200, "room is given back");
}

#[tokio::test]
async fn with_a_token_only_health_and_metrics_are_open() {
    let (router, ..) = warm_pair().await;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("token");
    std::fs::write(&path, "the-token\n").unwrap();
    let admin = Admin::start(&router, Some(Arc::new(ApiKey::read(&path).unwrap()))).await;
    for open in ["/metrics", "/livez", "/readyz"] {
        assert_ne!(admin.get(open).await.0, 401, "{open}");
    }
    for guarded in ["/explain/x", "/decisions", "/endpoints", "/index", "/sources", "/nothing"] {
        let url = format!("{}{guarded}", admin.url);
        for wrong in
            [None, Some("Bearer the-tokem"), Some("Bearer the-token2"), Some("Basic the-token"), Some("the-token")]
        {
            let request = admin.client.get(&url);
            let request = if let Some(wrong) = wrong { request.header("authorization", wrong) } else { request };
            let response = request.send().await.unwrap();
            assert_eq!(response.status().as_u16(), 401, "{guarded} {wrong:?}");
            assert_eq!(response.headers()["www-authenticate"], "Bearer");
        }
        let right = admin.client.get(&url).header("authorization", "bearer the-token").send().await.unwrap();
        assert_ne!(right.status().as_u16(), 401, "{guarded}");
    }
}
