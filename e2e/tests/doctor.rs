//! `warmroute doctor` before simulated engines: a healthy one, and each fault that they can have.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::process::Command;

use e2e::router::binary;
use e2e::sim::engine::EngineOptions;
use e2e::sim::event::WireHash;
use e2e::sim::fault::TokenizeFault;
use e2e::sim::publisher::PublisherOptions;
use e2e::sim::{SimOptions, Simulator};
use serde_json::Value;
use warmroute::routing::hash::HashAlgorithm;

/// The findings, and the exit code.
struct Report {
    findings: Vec<Value>,
    code: Option<i32>,
}

fn doctor(arguments: &[String]) -> Report {
    let mut command = Command::new(binary().unwrap());
    let output = command.arg("doctor").arg("--json").args(arguments).output().unwrap();
    let findings = serde_json::from_slice(&output.stdout).unwrap_or_default();
    eprintln!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    Report { findings, code: output.status.code() }
}

impl Report {
    fn faults(&self) -> Vec<&str> {
        let faults = self.findings.iter().filter(|finding| finding["verdict"] == "FAULT");
        faults.map(|finding| finding["check"].as_str().unwrap()).collect()
    }

    /// What was seen by the first finding of a check, and what to change.
    fn told(&self, check: &str) -> String {
        let finding = self.findings.iter().find(|finding| finding["check"] == check).unwrap();
        format!("{} / {}", finding["seen"].as_str().unwrap(), finding["change"].as_str().unwrap_or("nothing"))
    }
}

fn engine_flags(engines: &[&Simulator]) -> Vec<String> {
    engines.iter().flat_map(|engine| ["--engine".to_owned(), format!("http://{}", engine.address())]).collect()
}

fn with(engine: EngineOptions) -> Simulator {
    Simulator::start(SimOptions { engine, ..SimOptions::default() }).unwrap()
}

#[test]
fn healthy_engines_have_nothing_to_change() {
    for wire_hash in [WireHash::Int, WireHash::Bytes] {
        for (algorithm, seed) in [(HashAlgorithm::Sha256, None), (HashAlgorithm::XxhashCbor, Some("0"))] {
            let engine = EngineOptions { algorithm, seed: seed.map(str::to_owned), ..EngineOptions::default() };
            let options = SimOptions { engine, wire_hash, ..SimOptions::default() };
            let (one, other) = (Simulator::start(options.clone()).unwrap(), Simulator::start(options).unwrap());
            let report = doctor(&engine_flags(&[&one, &other]));
            assert_eq!((report.faults(), report.code), (Vec::new(), Some(0)));
            assert!(report.told("hash").starts_with(algorithm.as_str()), "{}", report.told("hash"));
            assert!(report.told("events").contains("the request's blocks were announced"), "{}", report.told("events"));
            assert!(report.told("replay").contains("batches 0 to "), "{}", report.told("replay"));
            assert!(
                report.findings.iter().any(|finding| finding["check"] == "same hash" && finding["verdict"] == "ok")
            );
        }
    }
}

#[test]
fn another_seed_is_found_when_it_is_named() {
    let engine = with(EngineOptions { seed: Some("12345".to_owned()), ..EngineOptions::default() });
    let mut arguments = engine_flags(&[&engine]);
    let report = doctor(&arguments);
    assert_eq!((report.faults(), report.code), (vec!["hash"], Some(1)));
    assert!(report.told("hash").contains("--pythonhashseed"), "{}", report.told("hash"));
    arguments.extend(["--pythonhashseed".to_owned(), "12345".to_owned()]);
    let report = doctor(&arguments);
    assert_eq!((report.faults(), report.code), (Vec::new(), Some(0)));
    assert!(report.told("hash").contains(r#"PYTHONHASHSEED "12345""#), "{}", report.told("hash"));
}

#[test]
fn engines_that_differ_are_told_apart() {
    let one = with(EngineOptions::default());
    let other = with(EngineOptions {
        block_size: 2 * EngineOptions::default().block_size,
        algorithm: HashAlgorithm::Sha256Cbor,
        ..EngineOptions::default()
    });
    let report = doctor(&engine_flags(&[&one, &other]));
    assert_eq!((report.faults(), report.code), (vec!["same block size", "same hash"], Some(1)));
    assert!(
        report.told("same block size").contains(&other.address().to_string()),
        "{}",
        report.told("same block size")
    );
}

#[test]
fn another_model_is_named() {
    let one = with(EngineOptions::default());
    let other = Simulator::start(SimOptions { model: "other".to_owned(), ..SimOptions::default() }).unwrap();
    let report = doctor(&engine_flags(&[&one, &other]));
    assert_eq!((report.faults(), report.code), (vec!["same model"], Some(1)));
    let mut arguments = engine_flags(&[&other]);
    arguments.extend(["--model".to_owned(), "tiny".to_owned()]);
    let report = doctor(&arguments);
    assert_eq!((report.faults(), report.code), (vec!["models"], Some(1)));
    assert!(report.told("models").contains(r#"serves "other""#), "{}", report.told("models"));
}

#[test]
fn ids_of_another_vocabulary_are_a_fault() {
    let engine = with(EngineOptions::default());
    engine.tokenize().set(TokenizeFault::OtherModel);
    let report = doctor(&engine_flags(&[&engine]));
    assert_eq!((report.faults(), report.code), (vec!["tokenizer", "tokenizer"], Some(1)));
    engine.tokenize().set(TokenizeFault::Error);
    let report = doctor(&engine_flags(&[&engine]));
    assert_eq!((report.faults(), report.code), (vec!["tokenizer", "tokenizer"], Some(1)));
    assert!(report.told("tokenizer").contains("status 500"), "{}", report.told("tokenizer"));
}

#[test]
fn sockets_that_are_exchanged_closed_or_another_engines_are_named() {
    let engine = with(EngineOptions::default());
    let flags = |events: &str, replay: &str| {
        let mut arguments = engine_flags(&[&engine]);
        arguments.extend(["--events", events, "--replay", replay].map(str::to_owned));
        arguments
    };
    let report = doctor(&flags(engine.replay(), engine.events()));
    assert_eq!((report.faults(), report.code), (vec!["addresses", "events", "replay"], Some(1)));
    assert!(report.told("events").contains("not a PUB socket"), "{}", report.told("events"));
    assert!(report.told("replay").contains("not a ROUTER socket"), "{}", report.told("replay"));

    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let report = doctor(&flags(engine.events(), &format!("tcp://{closed}")));
    assert_eq!((report.faults(), report.code), (vec!["replay"], Some(1)));
    assert!(report.told("replay").contains("refused"), "{}", report.told("replay"));

    let other = with(EngineOptions::default());
    let report = doctor(&flags(other.events(), other.replay()));
    assert_eq!((report.faults(), report.code), (vec!["addresses", "events"], Some(1)));
    assert!(report.told("events").contains("belongs to this engine"), "{}", report.told("events"));
}

#[test]
fn a_short_replay_buffer_is_a_warning() {
    let events = PublisherOptions { buffer_steps: 1, ..PublisherOptions::default() };
    let engine = Simulator::start(SimOptions { events, ..SimOptions::default() }).unwrap();
    let report = doctor(&engine_flags(&[&engine]));
    assert_eq!((report.faults(), report.code), (Vec::new(), Some(0)));
    assert!(report.told("replay").contains("buffer_steps"), "{}", report.told("replay"));
}

#[test]
fn without_a_request_only_what_was_published_is_judged() {
    let engine = with(EngineOptions::default());
    let mut quietly = engine_flags(&[&engine]);
    quietly.push("--no-request".to_owned());
    let report = doctor(&quietly);
    assert_eq!((report.faults(), report.code), (Vec::new(), Some(2)), "nothing was published yet");
    assert_eq!(engine.snapshot().counters.finished, 0, "no request was sent");
    assert_eq!(doctor(&engine_flags(&[&engine])).code, Some(0));
    let report = doctor(&quietly);
    assert_eq!((report.faults(), report.code), (Vec::new(), Some(0)), "the replay has what was published before");
}

#[test]
fn an_engine_is_compared_with_the_configuration_that_lists_it() {
    let adapters = vec![("lora-a".to_owned(), "/loras/lora-a".to_owned())];
    let engine = Simulator::start(SimOptions { adapters, ..SimOptions::default() }).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.yaml");
    let config = |algorithm: &str| {
        let yaml = format!(
            "models:\n- name: tiny\n  adapters: [{{name: lora-a}}]\n  block_hash: {{algorithm: {algorithm}}}\n  \
            discovery: {{static: [{{address: \"{}\", events: \"{}\", replay: \"{}\"}}]}}\n",
            engine.address(),
            engine.events(),
            engine.replay()
        );
        std::fs::write(&file, yaml).unwrap();
        doctor(&["--config".to_owned(), file.to_str().unwrap().to_owned()])
    };
    let report = config("sha256");
    assert_eq!((report.faults(), report.code), (Vec::new(), Some(0)));
    assert!(report.told("config events").contains("as the engine tells"), "{}", report.told("config events"));
    let report = config("sha256_cbor");
    assert_eq!((report.faults(), report.code), (vec!["config hash"], Some(1)));
    assert!(report.told("config hash").contains("algorithm: sha256,"), "{}", report.told("config hash"));
}

#[test]
fn wrong_use_and_nobody_there_cannot_be_judged() {
    let engine = with(EngineOptions::default());
    let address = engine.address();
    drop(engine);
    let report = doctor(&["--engine".to_owned(), format!("http://{address}")]);
    assert_eq!(report.code, Some(2));
    assert!(report.told("reachable").contains("refused"), "{}", report.told("reachable"));
    assert_eq!(doctor(&[]).code, Some(2));
    assert_eq!(doctor(&["--events".to_owned(), "tcp://127.0.0.1:1".to_owned()]).code, Some(2));
    assert_eq!(doctor(&["--config".to_owned(), "/nowhere.yaml".to_owned()]).code, Some(2));
}
