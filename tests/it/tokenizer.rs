//! Where a request's tokens come from, and what becomes of those that are late.

use std::path::Path;
use std::sync::Arc;

use serde_json::json;
use warmroute::engine::Access;
use warmroute::request::{Question, TokensApi};
use warmroute::routing::hash::Scope;
use warmroute::routing::index::KeyKinds;
use warmroute::tokenizer::local::LocalTokenizer;
use warmroute::tokenizer::remote::Targets;
use warmroute::tokenizer::{Asked, Error, Source, Space, StandIn, Tokenizer};

use crate::fakes::{
    BUDGET, FakeEngine, FakeRouter, Tokenize, characters, eventually, remote_tokenizer, request_body, request_headers,
    tokenizer_of,
};

const PROMPT: &str = "the quick brown fox jumps over the lazy dog";

fn local() -> Arc<LocalTokenizer> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/tokens/qwen");
    Arc::new(LocalTokenizer::load(&path).unwrap())
}

async fn ask(tokenizer: &Arc<Tokenizer>, engine: &FakeEngine, prompt: &str) -> Asked {
    let body = json!({ "prompt": prompt }).to_string().into_bytes();
    let targets = Targets { first: Some(engine.address), hedge: None };
    tokenizer.tokens(Question { api: TokensApi::Tokenize, body }, |_| targets).await
}

/// Asks until `condition` holds, each time with another prompt, and lets what is late go on.
async fn ask_until(tokenizer: &Arc<Tokenizer>, engine: &FakeEngine, condition: impl Fn() -> bool) {
    for n in 0..10_000 {
        if condition() {
            return;
        }
        if let Some(late) = ask(tokenizer, engine, &format!("{PROMPT} {n}")).await.late {
            late.await;
        }
    }
    panic!("asked 10,000 times: {:?}", tokenizer.status());
}

#[tokio::test]
async fn a_prompt_that_was_tokenized_before_is_remembered() {
    let engine = FakeEngine::start().await;
    let router = FakeRouter::start(&[engine.address]).await;
    let _slot = router.warm(0, &characters(PROMPT), &Scope::default(), KeyKinds::PLAIN);
    for n_matched in [40.0, 80.0] {
        router.complete(json!({ "prompt": PROMPT, "max_tokens": n_matched })).await;
        assert_eq!(router.metric("warmroute_matched_tokens_total{model=\"tiny\"}"), n_matched);
    }
    assert_eq!(engine.asked().len(), 1);
}

#[tokio::test]
async fn a_late_answer_is_kept_while_its_request_is_on_its_way() {
    let engine = FakeEngine::start().await;
    let router = FakeRouter::start(&[engine.address]).await;
    engine.set(Tokenize::After(BUDGET * 2));
    let (_stream, destination) = router.complete(json!({ "prompt": PROMPT })).await;
    assert_eq!(destination, Some(engine.address.to_string()));
    assert_eq!(router.metric("warmroute_fallbacks_total{reason=\"tokenizer_budget\"}"), 1.0);
    eventually("the late answer", || router.tokenizer.status().remote.unwrap().n_late == 1).await;
    eventually("its place in the cache", || router.tokenizer.status().cache_bytes > 0).await;
    router.complete(json!({ "prompt": PROMPT })).await;
    assert_eq!(engine.asked().len(), 1, "the second request needs no engine");
}

#[tokio::test]
async fn a_client_that_is_gone_takes_its_call_along() {
    let engine = FakeEngine::start().await;
    let router = FakeRouter::start(&[engine.address]).await;
    engine.set(Tokenize::Never);
    let n_cancelled = || router.tokenizer.status().remote.unwrap().n_cancelled;
    // On a busy machine the budget may end before the client leaves: then the call is late and not cancelled.
    for n in 1..=20 {
        let mut stream = router.open().await;
        stream.exchange(request_headers("/v1/completions", false)).await;
        stream.send(request_body(json!({ "prompt": format!("{PROMPT} {n}") }).to_string().as_bytes()));
        eventually("the call or its refusal", || engine.asked().len() == n || n_cancelled() > 0).await;
        drop(stream);
        tokio::time::sleep(BUDGET / 10).await;
        if n_cancelled() > 0 {
            return;
        }
    }
    panic!("no call ended with its client: {:?}", router.tokenizer.status());
}

#[tokio::test]
async fn a_local_tokenizer_is_trusted_once_it_agrees_and_no_more_once_it_differs() {
    let (engine, local) = (FakeEngine::start().await, local());
    engine.set(Tokenize::Local(local.clone()));
    let tokenizer =
        tokenizer_of(Source::Auto { remote: remote_tokenizer(&Access::default(), BUDGET), local, stands_in: false });
    assert_eq!(tokenizer.status().is_trusted, Some(false));
    ask_until(&tokenizer, &engine, || tokenizer.status().is_trusted == Some(true)).await;

    let n_asked = engine.asked().len();
    for n in 0..50 {
        assert!(ask(&tokenizer, &engine, &format!("trusted {n}")).await.tokens.is_ok());
    }
    assert!(engine.asked().len() <= n_asked + 1, "the engines see a sample");

    engine.set(Tokenize::Characters);
    ask_until(&tokenizer, &engine, || tokenizer.status().is_trusted == Some(false)).await;
    assert!(tokenizer.status().n_different >= 1);
    let (tokens, space) = ask(&tokenizer, &engine, PROMPT).await.tokens.unwrap();
    assert_eq!((&tokens.ids, space), (&characters(PROMPT), Space::Model), "the engines' word counts again");
}

#[tokio::test]
async fn something_stands_in_for_engines_that_fail() {
    let (engine, local) = (FakeEngine::start().await, local());
    engine.set(Tokenize::Status(500));
    let expected = local
        .tokenize(&Question { api: TokensApi::Tokenize, body: json!({ "prompt": PROMPT }).to_string().into_bytes() });
    for (stand_in, expected_space) in [(StandIn::Local(local), Space::Model), (StandIn::Text, Space::Text)] {
        let remote = remote_tokenizer(&Access::default(), BUDGET);
        let tokenizer = tokenizer_of(Source::Remote { remote, stand_in: Some(stand_in) });
        let (tokens, space) = ask(&tokenizer, &engine, PROMPT).await.tokens.unwrap();
        assert_eq!(space, expected_space);
        assert_eq!(tokens.ids == expected.as_ref().unwrap().ids, space == Space::Model);
        engine.set(Tokenize::Characters);
        let (tokens, space) = ask(&tokenizer, &engine, PROMPT).await.tokens.unwrap();
        assert_eq!((&tokens.ids, space), (&characters(PROMPT), Space::Model), "what stood in is not remembered");
        assert_eq!(tokenizer.status().n_stood_in, 1);
        engine.set(Tokenize::Never);
        let asked = ask(&tokenizer, &engine, "another prompt").await;
        assert_eq!(asked.tokens.unwrap().1, expected_space, "within the same budget");
        assert!(asked.late.is_some(), "what the engine may still say is waited for");
        engine.set(Tokenize::Status(500));
    }
    let alone = tokenizer_of(Source::Remote { remote: remote_tokenizer(&Access::default(), BUDGET), stand_in: None });
    assert!(matches!(ask(&alone, &engine, PROMPT).await.tokens, Err(Error::Engine(_))));
}
