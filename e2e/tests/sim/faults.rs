//! A simulated `/tokenize` fails as it is told to, and nothing else does.

use std::time::Duration;

use e2e::http::client_with_timeout;
use e2e::sim::fault::TokenizeFault;
use e2e::sim::{SimOptions, Simulator};
use reqwest::{Response, Result, StatusCode};
use serde_json::{Value, json};

/// More than an answer takes, less than one that is late.
const PATIENCE: Duration = Duration::from_secs(2);

async fn tokenize(engine: &Simulator) -> Result<Response> {
    let url = format!("http://{}/tokenize", engine.address());
    client_with_timeout(PATIENCE).post(url).json(&json!({"prompt": "kato lemi"})).send().await
}

async fn ids(engine: &Simulator) -> Vec<u64> {
    let answer: Value = tokenize(engine).await.unwrap().json().await.unwrap();
    answer["tokens"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect()
}

#[tokio::test]
async fn faulty_tokenizer_recovers_and_serves_completions_all_the_time() {
    let engine = Simulator::start(SimOptions::default()).unwrap();
    let control = engine.tokenize();
    let good = ids(&engine).await;
    for fault in [TokenizeFault::Slow(10 * PATIENCE), TokenizeFault::BlackHole] {
        control.set(fault);
        assert!(tokenize(&engine).await.unwrap_err().is_timeout(), "{fault:?}");
    }
    control.set(TokenizeFault::Error);
    assert_eq!(tokenize(&engine).await.unwrap().status(), StatusCode::INTERNAL_SERVER_ERROR);
    control.set(TokenizeFault::Cut);
    let cut = async { tokenize(&engine).await?.bytes().await };
    assert!(cut.await.is_err());
    control.set(TokenizeFault::OtherModel);
    let other = ids(&engine).await;
    assert!(other.len() == good.len() && other.iter().zip(&good).all(|(other, good)| other != good), "{other:?}");
    assert_eq!(ids(&engine).await, other);

    let url = format!("http://{}/v1/completions", engine.address());
    let body = json!({"prompt": "kato lemi", "max_tokens": 1});
    assert_eq!(client_with_timeout(PATIENCE).post(url).json(&body).send().await.unwrap().status(), StatusCode::OK);
    control.set(TokenizeFault::None);
    assert_eq!(ids(&engine).await, good);
    assert_eq!(control.n_calls(), 8);
}

#[tokio::test]
async fn nonsense_is_no_list_of_as_many_ids_as_it_counts_or_a_huge_one() {
    let engine = Simulator::start(SimOptions::default()).unwrap();
    engine.tokenize().set(TokenizeFault::Nonsense);
    for turn in 0..8 {
        let answer = tokenize(&engine).await.unwrap().bytes().await.unwrap();
        let answer: Value = serde_json::from_slice(&answer).unwrap_or_default();
        let tokens = answer["tokens"].as_array().map_or(&[][..], Vec::as_slice);
        let is_counted = answer["count"] == tokens.len() && tokens.iter().all(Value::is_u64);
        assert!(!is_counted || tokens.len() > 100_000, "answer {turn} makes sense");
    }
}

#[tokio::test]
async fn calls_that_are_served_one_at_a_time_wait_for_each_other() {
    let engine = Simulator::start(SimOptions::default()).unwrap();
    engine.tokenize().set(TokenizeFault::OneAtATime(Duration::from_millis(50)));
    let start = std::time::Instant::now();
    futures_util::future::try_join_all((0..6).map(|_| tokenize(&engine))).await.unwrap();
    assert!(start.elapsed() >= Duration::from_millis(300), "{:?}", start.elapsed());
}
