//! vLLM's own `/tokenize`, over the model's [`EngineClient`].
//!
//! `POST /tokenize` (vLLM 0.32.0, `serve/tokenize`; not under `/v1`, so `--api-key` does not guard it) takes the fields of
//! a completion or chat request and answers `{"count", "max_model_len", "tokens": [int], "token_strs"}`. One call per
//! request, one budget for all of it; dropping the future drops the call.

use std::net::SocketAddr;
use std::time::Duration;

use serde::Deserialize;

use super::Error;
use crate::engine::EngineClient;

/// Bytes of an answer per byte of the question: a token is at least a byte of text and at most a dozen digits and
/// separators. The chat template's own text comes on top ([`ANSWER_BASE`]).
const ANSWER_FACTOR: usize = 16;
/// Bytes that any answer may have, whatever was asked.
const ANSWER_BASE: usize = 1 << 20;

/// Client of the `/tokenize` of a model's endpoints.
#[derive(Clone, Debug)]
pub struct RemoteTokenizer {
    client: EngineClient,
    budget: Duration,
}

#[derive(Deserialize)]
struct Answer {
    count: usize,
    tokens: Vec<u32>,
}

impl RemoteTokenizer {
    /// Asks through `client` and gives each call `budget`.
    pub fn new(client: EngineClient, budget: Duration) -> Self {
        Self { client, budget }
    }

    /// Asks `endpoint` for the tokens of a `/tokenize` body.
    ///
    /// # Errors
    /// [`Error`], within the budget.
    pub async fn tokenize(&self, endpoint: SocketAddr, body: Vec<u8>) -> Result<Vec<u32>, Error> {
        match tokio::time::timeout(self.budget, self.ask(endpoint, body)).await {
            Ok(answer) => answer,
            Err(_) => Err(Error::Budget(self.budget)),
        }
    }

    async fn ask(&self, endpoint: SocketAddr, body: Vec<u8>) -> Result<Vec<u32>, Error> {
        let limit = ANSWER_BASE + ANSWER_FACTOR * body.len();
        parse(&self.client.post_json(endpoint, "/tokenize", body, limit).await?)
    }
}

fn parse(answer: &[u8]) -> Result<Vec<u32>, Error> {
    let Answer { count, tokens } = serde_json::from_slice(answer).map_err(|_| Error::Nonsense)?;
    if count == tokens.len() { Ok(tokens) } else { Err(Error::Nonsense) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_counted_list_of_token_ids_is_an_answer() {
        let good = br#"{"count":2,"max_model_len":2048,"tokens":[1,528],"token_strs":null}"#;
        assert_eq!(parse(good).expect("an answer"), [1, 528]);
        for bad in [
            &br#"{"count":3,"tokens":[1,2]}"#[..],
            br#"{"count":1,"tokens":[-1]}"#,
            br#"{"count":1,"tokens":[4294967296]}"#,
            br#"{"count":1,"tokens":["a"]}"#,
            br#"{"tokens":[1]}"#,
            br#"[1]"#,
            b"\xff",
            b"",
        ] {
            assert!(matches!(parse(bad), Err(Error::Nonsense)), "{}", String::from_utf8_lossy(bad));
        }
    }
}
