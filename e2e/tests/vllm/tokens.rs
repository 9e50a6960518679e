//! The recorded token ids, asked for again: the router's own question, sent by its own client, must still bring the
//! same ids from a real vLLM.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use e2e::vllm::{Family, VllmOptions, VllmServer};
use serde::Deserialize;
use serde_json::value::RawValue;
use warmroute::engine::{self, Access, EngineClient};
use warmroute::request::{self, Api, Prompt, Question, ReadOptions};
use warmroute::tokenizer::remote::{RemoteConfig, RemoteTokenizer, Targets};
use warmroute::tokenizer::{Budget, Error};

use crate::TURN;

/// No request of the corpus is in a hurry, and the machine may be busy.
const BUDGET: Duration = Duration::from_secs(60);

/// A line of `corpus.jsonl`; `tests/data/tokens/README.md` says what its fields are.
#[derive(Deserialize)]
struct Line {
    name: String,
    request: Box<RawValue>,
    status: u16,
    tokens: Option<Vec<u32>>,
    engine_path: String,
    openai: Option<Box<RawValue>>,
}

impl Line {
    /// What the router asks when a client sends the recorded body; none when it does not ask.
    fn question(&self) -> Option<Question> {
        let body = self.openai.as_ref().unwrap_or(&self.request).get();
        let opened = request::open(Api::of_path(&self.engine_path), body.as_bytes()).unwrap();
        match opened.read(&ReadOptions::default()).prompt {
            Prompt::Text(question) => Some(question),
            Prompt::Tokens(_) | Prompt::Opaque(_) => None,
        }
    }
}

fn corpus(family: Family) -> Vec<Line> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/tokens").join(family.name());
    let text = fs::read_to_string(directory.join("corpus.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn tokenizer() -> Arc<RemoteTokenizer> {
    let config = RemoteConfig { budget: Budget { base: BUDGET, max: BUDGET }, endpoint: None };
    Arc::new(RemoteTokenizer::new(EngineClient::new(&Access::default()).unwrap(), config))
}

/// The ids, or the status with which the engine refuses.
async fn ask(tokenizer: &Arc<RemoteTokenizer>, engine: SocketAddr, question: Question) -> Result<Vec<u32>, u16> {
    match tokenizer.ask(Arc::new(question), Targets { first: Some(engine), hedge: None }).await {
        Ok(tokens) => Ok(tokens.ids),
        Err(Error::Engine(engine::Error::Status(status))) => Err(status),
        Err(other) => panic!("{other}"),
    }
}

/// Returns how many bodies had ids, and the same as when they were recorded.
async fn recorded_ids_come_again(family: Family) -> usize {
    let _turn = TURN.lock().await;
    // As when it was recorded; a longer prompt than the model takes would still be tokenized.
    let options = VllmOptions { family, max_model_len: 16_384, ..VllmOptions::default() };
    let server = VllmServer::start(options).await.unwrap();
    let tokenizer = tokenizer();
    let mut n_equal = 0;
    for line in corpus(family) {
        let Some(question) = line.question() else {
            assert_ne!(line.status, 200, "{} has tokens, but the router does not ask for them", line.name);
            continue;
        };
        let found = ask(&tokenizer, server.addr(), question).await;
        assert_eq!(found, line.tokens.ok_or(line.status), "{} of {}", line.name, family.name());
        n_equal += usize::from(found.is_ok());
    }
    server.stop().await.unwrap();
    println!("{}: {n_equal} bodies have the recorded ids", family.name());
    n_equal
}

#[tokio::test]
#[ignore = "needs real vLLM"]
async fn recorded_ids_of_the_tiny_model_come_again() {
    assert!(recorded_ids_come_again(Family::Tiny).await > 150);
}

#[tokio::test]
#[ignore = "needs real vLLM"]
async fn recorded_ids_of_a_qwen_like_model_come_again() {
    assert!(recorded_ids_come_again(Family::Qwen).await > 150);
}

#[tokio::test]
#[ignore = "needs real vLLM"]
async fn recorded_ids_of_a_gemma_like_model_come_again() {
    assert!(recorded_ids_come_again(Family::Unigram).await > 150);
}
