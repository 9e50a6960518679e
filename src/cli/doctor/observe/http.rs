//! What an engine says over HTTP.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant, SystemTime};

use serde::Deserialize;

use crate::cli::doctor::seen::{Asked, CacheConfig, Served, Told};
use crate::discovery::event_sources::Answer;
use crate::engine::{EngineClient, Examined, Question, Target};

/// An exposition of many ranks and adapters has some MiB; the other answers are small.
const MOST_BYTES: usize = 8 << 20;

/// Asks one engine.
pub(super) struct Http {
    pub(super) client: EngineClient,
    pub(super) target: Target,
    /// Longest wait for one answer.
    pub(super) timeout: Duration,
}

#[derive(Deserialize)]
struct Version {
    version: String,
}

#[derive(Deserialize)]
struct Models {
    data: Vec<Model>,
}

#[derive(Deserialize)]
struct Model {
    id: String,
    parent: Option<String>,
    root: Option<String>,
    max_model_len: Option<u64>,
}

/// The settings of a rank's publisher, beside the addresses.
#[derive(Deserialize)]
struct Settings {
    enable_kv_cache_events: Option<bool>,
    publisher: Option<String>,
    buffer_steps: Option<u64>,
}

impl Http {
    /// The answer to a question, whatever its status is; otherwise the error and its causes.
    pub(super) async fn ask(&self, path: &str, question: Option<Question>) -> Result<Examined, String> {
        let asking = self.client.examine(&self.target, path, question, MOST_BYTES);
        match tokio::time::timeout(self.timeout, asking).await {
            Ok(Ok(examined)) => Ok(examined),
            Ok(Err(error)) => Err(chain(&error)),
            Err(_) => Err(format!("no answer within {:?}", self.timeout)),
        }
    }

    async fn get<T>(&self, path: &str, read: impl FnOnce(&[u8]) -> Result<T, String>) -> Asked<T> {
        answered(self.ask(path, None).await, read)
    }

    /// How long the first answer takes, and how far the engine's clock is before ours.
    pub(super) async fn reach(&self) -> (Result<Duration, String>, Option<f64>) {
        let start = Instant::now();
        let answer = self.ask("/version", None).await;
        let took = start.elapsed();
        let skew = answer.as_ref().ok().and_then(|examined| skew(examined.date.as_deref()?, SystemTime::now()));
        (answer.map(|_| took), skew)
    }

    pub(super) async fn version(&self) -> Asked<String> {
        self.get("/version", |body| from_json::<Version>(body).map(|answer| answer.version)).await
    }

    pub(super) async fn models(&self) -> Asked<Vec<Served>> {
        let read = |body: &[u8]| Ok(from_json::<Models>(body)?.data.into_iter().map(served).collect());
        self.get("/v1/models", read).await
    }

    pub(super) async fn told(&self, ip: IpAddr) -> Asked<Told> {
        self.get("/kv_event_sources", |body| told(body, ip)).await
    }

    pub(super) async fn cache(&self) -> Asked<Option<CacheConfig>> {
        self.get("/metrics", |body| Ok(cache_config(&String::from_utf8_lossy(body)))).await
    }
}

/// Reads an answer with status 200.
pub(super) fn answered<T>(answer: Result<Examined, String>, read: impl FnOnce(&[u8]) -> Result<T, String>) -> Asked<T> {
    match answer {
        Ok(Examined { status: 200, body, .. }) => read(&body).map_or_else(Asked::Failed, Asked::Answer),
        Ok(Examined { status, .. }) => Asked::Status(status),
        Err(why) => Asked::Failed(why),
    }
}

pub(super) fn from_json<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, String> {
    serde_json::from_slice(body).map_err(|_| "the answer is not the JSON that was expected".to_owned())
}

fn served(Model { id, parent, root, max_model_len }: Model) -> Served {
    Served { id, parent, root, max_model_len }
}

fn told(body: &[u8], ip: IpAddr) -> Result<Told, String> {
    let answer = Answer::parse(body, ip).map_err(|error| error.to_string())?;
    let settings: BTreeMap<String, Settings> = from_json(body)?;
    let is_off = settings.values().all(|rank| {
        rank.enable_kv_cache_events == Some(false) || rank.publisher.as_deref().is_some_and(|kind| kind != "zmq")
    });
    Ok(Told { answer, is_off, buffer_steps: settings.values().find_map(|rank| rank.buffer_steps) })
}

/// The labels of `vllm:cache_config_info` that matter (0.32.0, `config/cache.py`, `metrics_info`).
fn cache_config(text: &str) -> Option<CacheConfig> {
    let labels = text.lines().find_map(|line| line.strip_prefix("vllm:cache_config_info{"))?;
    Some(CacheConfig {
        block_size: label(labels, "block_size").and_then(|size| size.parse().ok()),
        algorithm: label(labels, "prefix_caching_hash_algo").map(str::to_owned),
        is_prefix_cached: label(labels, "enable_prefix_caching").map(|is_on| is_on == "True"),
    })
}

/// The value of a label; of none of these has it a quote within.
fn label<'a>(labels: &'a str, name: &str) -> Option<&'a str> {
    let is_start = |at: usize| at == 0 || labels[..at].ends_with(',');
    let (at, _) =
        labels.match_indices(name).find(|(at, _)| is_start(*at) && labels[at + name.len()..].starts_with("=\""))?;
    labels[at + name.len() + 2..].split('"').next()
}

/// How far the clock that wrote a `date` header is before `now`, in seconds. The header has whole seconds, so half of
/// one is the best guess at what was cut off.
fn skew(date: &str, now: SystemTime) -> Option<f64> {
    let since_epoch = |time: SystemTime| Some(time.duration_since(SystemTime::UNIX_EPOCH).ok()?.as_secs_f64());
    Some(since_epoch(now)? - since_epoch(httpdate::parse_http_date(date).ok()?)? - 0.5)
}

/// An error and its causes in one line.
pub(in crate::cli::doctor) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.ends_with(&said) {
            text = format!("{text}: {said}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_is_read_from_what_vllm_writes() {
        // vLLM 0.32.0, shortened.
        let text = "# TYPE vllm:cache_config_info gauge\n\
            vllm:cache_config_info{_block_size_resolved=\"True\",block_size=\"32\",cache_dtype=\"auto\",\
            enable_prefix_caching=\"True\",engine=\"0\",mamba_block_size=\"None\",prefix_caching_hash_algo=\"sha256\"} 1.0\n";
        let expected =
            CacheConfig { block_size: Some(32), algorithm: Some("sha256".to_owned()), is_prefix_cached: Some(true) };
        assert_eq!(cache_config(text), Some(expected));
        assert_eq!(cache_config("vllm:cache_config_info{} 1"), Some(CacheConfig::default()));
        assert_eq!(cache_config("vllm:num_requests_running 1"), None);
    }

    #[test]
    fn an_engine_without_events_says_so() {
        let ip = "10.0.0.1".parse().expect("an address");
        for (body, is_off, n_ranks) in [
            ("{}", true, 0),
            (r#"{"0":{"endpoint":"tcp://*:1","enable_kv_cache_events":false,"publisher":"null"}}"#, true, 1),
            (r#"{"0":{"endpoint":"tcp://*:1","enable_kv_cache_events":true,"publisher":"null"}}"#, true, 1),
            (r#"{"0":{"endpoint":"tcp://*:1","enable_kv_cache_events":true,"publisher":"zmq"}}"#, false, 1),
            (r#"{"0":{"endpoint":"tcp://*:1"}}"#, false, 1),
        ] {
            let told = told(body.as_bytes(), ip).expect("an answer");
            assert_eq!((told.is_off, told.answer.sources.len()), (is_off, n_ranks), "{body}");
        }
        assert!(told(b"[]", ip).is_err());
    }

    #[test]
    fn a_date_shows_the_clock_that_wrote_it() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_millis(784_111_787_500);
        assert_eq!(skew("Sun, 06 Nov 1994 08:49:37 GMT", now), Some(10.0 - 0.0));
        assert_eq!(skew("today", now), None);
    }
}
