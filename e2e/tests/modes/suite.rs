//! What holds in every mode.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use futures_util::future::join_all;
use reqwest::StatusCode;
use serde_json::json;

use crate::setup::{Conversation, Mode, Setup, text};

/// Requests that come at once with the same new prefix.
const N_BURST: u32 = 16;
/// How many of them may be picked before the first pick is known.
const N_SCATTERED: f64 = 2.0;

/// The whole suite, one part after the other on the same stack; each has prompts of its own.
pub(crate) async fn run(mode: Mode) {
    let mut setup = Setup::start(mode).await;
    conversations_stay_where_they_are_warm(&setup, 100).await;
    different_prefixes_spread(&setup, 200).await;
    burst_with_one_new_prefix_finds_its_first_picks(&setup, 300).await;
    token_ids_are_followed_too(&setup).await;
    unknown_model_is_left_to_envoy(&setup).await;
    mode_is_what_was_configured(&setup).await;
    restarted_router_serves_at_once(&mut setup, 400).await;
    dead_engine_is_left(&mut setup, 500).await;
}

async fn conversations_stay_where_they_are_warm(setup: &Setup, number: u32) {
    for number in number..number + 3 {
        let mut conversation = Conversation::new(number);
        let first = conversation.go_on(setup).await;
        for turn in 1..4 {
            let served = conversation.go_on(setup).await;
            assert_eq!(served, first, "conversation {number}, turn {turn}\n{}", setup.decided().await);
        }
    }
}

async fn different_prefixes_spread(setup: &Setup, number: u32) {
    let served = join_all((number..number + 12).map(|number| setup.complete(text(number)))).await;
    let engines: BTreeSet<SocketAddr> = served.into_iter().collect();
    assert!(engines.len() > 1, "all went to {engines:?}");
}

/// The first picks are made beside each other, on every thread of the router; each makes its engine one that is expected
/// to hold the prefix. All the others find such an engine.
async fn burst_with_one_new_prefix_finds_its_first_picks(setup: &Setup, number: u32) {
    let nothing_found = || setup.stack.metric(r#"warmroute_decisions_total{model="tiny",outcome="no_match","#);
    let before = nothing_found().await.unwrap();
    let served = join_all((0..N_BURST).map(|idx| setup.complete(format!("{} and {idx}", text(number))))).await;
    assert_eq!(served.len(), N_BURST as usize);
    let n_scattered = nothing_found().await.unwrap() - before;
    let is_found = (1.0..=N_SCATTERED).contains(&n_scattered);
    assert!(is_found, "{n_scattered} of a burst found nothing, it went to {served:?}\n{}", setup.decided().await);
}

async fn token_ids_are_followed_too(setup: &Setup) {
    for start in [10_000_u32, 20_000, 30_000] {
        let prompt: Vec<u32> = (start..start + 330).collect();
        let first = setup.complete(prompt.clone()).await;
        for more in 1..4 {
            let longer: Vec<u32> = prompt.iter().copied().chain(0..more * 20).collect();
            let served = setup.complete(longer).await;
            assert_eq!(served, first, "ids from {start}, {more}\n{}", setup.decided().await);
        }
    }
}

async fn unknown_model_is_left_to_envoy(setup: &Setup) {
    let left = || setup.stack.metric(r#"warmroute_left_to_envoy_total{reason="unknown_model"}"#);
    let before = left().await.unwrap();
    let response = setup.post("/v1/completions", &json!({"model": "nobody's", "prompt": "kato"})).await;
    assert_eq!(response.status(), StatusCode::NOT_FOUND, "what an engine says of it");
    assert_eq!(left().await.unwrap(), before + 1.0);
}

async fn mode_is_what_was_configured(setup: &Setup) {
    let metrics = setup.stack.router.as_ref().unwrap().metrics().await.unwrap();
    assert_eq!(metrics.contains("warmroute_source_state{"), setup.mode.follows, "it follows events");
    assert_eq!(setup.n_asked() > 0, setup.mode.asks, "it asks for tokens");
    let matched = async |outcome: &str| {
        let name = format!(r#"warmroute_decisions_total{{model="tiny",outcome="{outcome}","#);
        setup.stack.metric(&name).await.unwrap()
    };
    let (announced, learned) = (matched("prefix_match").await, matched("learned_match").await);
    let counts = format!("{announced} matches by events, {learned} by picks");
    assert!(if setup.mode.follows { announced > 0.0 } else { announced == 0.0 && learned > 0.0 }, "{counts}");
    let log = setup.log();
    for (name, _) in &setup.mode.env {
        assert!(log.contains(name), "{name} is not named in\n{log}");
    }
}

async fn restarted_router_serves_at_once(setup: &mut Setup, number: u32) {
    setup.restart_router().await;
    for number in number..number + 5 {
        setup.complete(text(number)).await;
    }
    let metric = |name| setup.stack.metric(name);
    assert_eq!(metric("warmroute_left_to_envoy_total{").await.unwrap(), 0.0, "it was not ready for them");
    assert_eq!(metric("warmroute_decisions_total{").await.unwrap(), 5.0, "Envoy did not ask it");
    setup.wait_following().await;
    conversations_stay_where_they_are_warm(setup, number + 10).await;
}

async fn dead_engine_is_left(setup: &mut Setup, number: u32) {
    let mut conversation = Conversation::new(number);
    let dead = conversation.go_on(setup).await;
    assert_eq!(conversation.go_on(setup).await, dead);
    setup.engines.retain(|engine| engine.address() != dead);
    let mut served = Vec::new();
    for turn in 1..6 {
        served.push(conversation.go_on(setup).await);
        assert_ne!(setup.complete(text(number + turn)).await, dead);
    }
    assert!(!served.contains(&dead), "{dead} is dead, and has served: {served:?}");
    assert!(served[1..].iter().all(|engine| *engine == served[1]), "the conversation found no new place: {served:?}");
}
