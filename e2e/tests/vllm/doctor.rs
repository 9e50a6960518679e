//! `warmroute doctor` before real engines: a healthy one, and the wrong configurations that operators have.

use std::process::Command;

use e2e::router::binary;
use e2e::vllm::{Family, VllmOptions, VllmServer};
use serde_json::Value;
use warmroute::routing::hash::HashAlgorithm;

use crate::TURN;

/// Publishes on a port that the kernel chooses, which only the engine itself can tell.
const NO_REPLAY: &str = r#"{"enable_kv_cache_events":true,"publisher":"zmq","endpoint":"tcp://*:0"}"#;

/// What the doctor said of some engines.
struct Report {
    findings: Vec<Value>,
    text: String,
    code: Option<i32>,
}

async fn doctor(engines: &[&VllmServer]) -> Report {
    let urls: Vec<String> = engines.iter().map(|engine| engine.url("")).collect();
    let run = move |json: bool| {
        let mut command = Command::new(binary().unwrap());
        command.args(["doctor", "--timeout", "60s"]).args(json.then_some("--json"));
        command.args(urls.iter().flat_map(|url| ["--engine", url]));
        command.output().unwrap()
    };
    tokio::task::spawn_blocking(move || {
        let (json, text) = (run(true), run(false));
        let text = String::from_utf8(text.stdout).unwrap();
        println!("{text}");
        Report { findings: serde_json::from_slice(&json.stdout).unwrap(), text, code: json.status.code() }
    })
    .await
    .unwrap()
}

impl Report {
    fn with(&self, verdict: &str) -> Vec<&str> {
        let findings = self.findings.iter().filter(|finding| finding["verdict"] == verdict);
        findings.map(|finding| finding["check"].as_str().unwrap()).collect()
    }

    /// Asserts that these checks are faults, that no other is, and that the text shows each with its change.
    fn assert_faults(&self, expected: &[(&str, &str)]) {
        let checks: Vec<&str> = expected.iter().map(|(check, _)| *check).collect();
        assert_eq!((self.with("FAULT"), self.code), (checks, Some(i32::from(!expected.is_empty()))), "{}", self.text);
        for (check, change) in expected {
            let mut lines = self.text.lines().skip_while(|line| !line.contains(&format!("FAULT {check}")));
            let (fault, change_line) = (lines.next(), lines.next());
            let is_shown = change_line.is_some_and(|line| line.contains("change: ") && line.contains(change));
            assert!(fault.is_some() && is_shown, "expected {check} with {change:?}\n{}", self.text);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs real vLLM"]
async fn a_healthy_engine_is_good_and_others_beside_it_are_told_apart() {
    let _turn = TURN.lock().await;
    let options = VllmOptions::default();
    let larger = VllmOptions { block_size: 64, ..VllmOptions::default() };
    let (healthy, larger) = tokio::try_join!(VllmServer::start(options), VllmServer::start(larger)).unwrap();

    let report = doctor(&[&healthy]).await;
    report.assert_faults(&[]);
    assert_eq!(report.with("warn"), Vec::<&str>::new());
    let checks =
        ["reachable", "version", "models", "prefix caching", "event sources", "events", "replay", "clock", "wire"];
    let named = report.with("ok");
    for check in checks.into_iter().chain(["block size", "hash", "tokenizer"]) {
        assert!(named.contains(&check), "{check} is not ok\n{}", report.text);
    }
    assert!(report.text.contains("sha256 with PYTHONHASHSEED not set"), "{}", report.text);

    doctor(&[&healthy, &larger]).await.assert_faults(&[("same block size", "--block-size")]);
    larger.stop().await.unwrap();

    let args = ["--served-model-name", "other", "--kv-events-config", NO_REPLAY].map(str::to_owned).to_vec();
    let other = VllmServer::start(VllmOptions { family: Family::Qwen, args, ..VllmOptions::default() }).await.unwrap();
    doctor(&[&other]).await.assert_faults(&[("replay", "replay_endpoint")]);
    let beside = doctor(&[&healthy, &other]).await;
    beside.assert_faults(&[("replay", "replay_endpoint"), ("same model", "pool"), ("same tokenizer", "tokenizer")]);
    other.stop().await.unwrap();
    healthy.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs real vLLM"]
async fn a_random_root_and_events_that_are_off_are_named() {
    let _turn = TURN.lock().await;
    let random = VllmOptions { algorithm: HashAlgorithm::Xxhash, ..VllmOptions::default() };
    let args = ["--kv-events-config", r#"{"enable_kv_cache_events":false}"#].map(str::to_owned).to_vec();
    let silent = VllmOptions { args, ..VllmOptions::default() };
    let (random, silent) = tokio::try_join!(VllmServer::start(random), VllmServer::start(silent)).unwrap();
    doctor(&[&random]).await.assert_faults(&[("hash", "PYTHONHASHSEED=0")]);
    doctor(&[&silent]).await.assert_faults(&[("event sources", "--kv-events-config")]);
    random.stop().await.unwrap();
    silent.stop().await.unwrap();
}
