//! The debug commands, as operators run them.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::captures::{captures, frames};
use crate::wire::normalized_event;

/// `decoded` of a capture, in the form of `warmroute decode`.
fn expected(batch: &Value) -> Value {
    let events: Vec<Value> = batch[1].as_array().unwrap().iter().map(expected_event).collect();
    json!({ "ts": batch[0], "rank": batch[2], "events": events, "skipped": 0 })
}

fn expected_event(event: &Value) -> Value {
    let event = normalized_event(event);
    let mut fields = json!({ "type": event["type"] });
    if event["type"] != "AllBlocksCleared" {
        fields["block_hashes"] = event["block_hashes"].as_array().unwrap().iter().map(low64).collect();
    }
    if event["type"] == "BlockStored" {
        fields["parent"] =
            if event["parent_block_hash"].is_null() { Value::Null } else { low64(&event["parent_block_hash"]) };
        fields["n_tokens"] = event["token_ids"].as_array().unwrap().len().into();
        fields["block_size"] = event["block_size"].clone();
    }
    for name in ["medium", "lora_name", "group_idx", "extra_keys"] {
        if !event[name].is_null() {
            fields[name] = event[name].clone();
        }
    }
    fields
}

fn low64(hash: &Value) -> Value {
    match hash["hex"].as_str() {
        Some(hex) => u64::from_str_radix(&hex[hex.len() - 16..], 16).unwrap().into(),
        None => hash.clone(),
    }
}

#[test]
fn recorded_batches_are_shown_as_recorded() {
    for capture in captures() {
        let frames: Vec<_> =
            capture.scenarios.iter().flat_map(frames).filter(|(_, decoded)| !decoded.is_null()).collect();
        let question = |payload: &Vec<u8>| json!({ "payload_hex": hex::encode(payload) }).to_string();
        let input: Vec<String> = frames.iter().map(|(payload, _)| question(payload)).collect();
        let (lines, code) = run("decode", &input.join("\n"));
        assert_eq!((code, lines.len()), (Some(0), frames.len()), "{}", capture.path.display());
        for (line, (_, decoded)) in lines.iter().zip(&frames) {
            assert_eq!(*line, expected(decoded), "{}", capture.path.display());
        }
    }
}

#[test]
fn recorded_vectors_are_hashed_as_recorded() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/hash_vectors-vllm-0.32.0.json");
    let vectors: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let requests = vectors["requests"].as_array().unwrap();
    let question = |request: &Value| {
        let names = ["algo", "pythonhashseed", "block_size", "token_ids", "cache_salt", "lora"];
        let mut question: Value = names.iter().map(|name| ((*name).to_owned(), request[*name].clone())).collect();
        question["extra_keys"] = request["hash_extra_keys"].clone();
        question.to_string()
    };
    let known = requests.iter().filter(|request| {
        request["resolved_seed"] == request["pythonhashseed"] || request["pythonhashseed"].is_string()
    });
    let known: Vec<&Value> = known.collect();
    let input: Vec<String> = known.iter().map(|request| question(request)).collect();
    let (lines, code) = run("hash", &input.join("\n"));
    assert_eq!((code, lines.len()), (Some(0), known.len()));
    assert!(known.len() > 60, "only {} vectors", known.len());
    for (line, request) in lines.iter().zip(&known) {
        assert_eq!(line["block_hashes"], request["block_hashes_hex"], "{}", request["name"]);
        assert_eq!(line["low64"], request["low64"], "{}", request["name"]);
    }
}

#[test]
fn a_faulty_configuration_is_reported_whole_with_exit_code_2() {
    let directory = std::env::temp_dir().join(format!("warmroute-cli-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let (good, bad) = (directory.join("good.yaml"), directory.join("bad.yaml"));
    std::fs::write(&good, "models: [{name: tiny, discovery: {static: [{address: 127.0.0.1:8000}]}}]").unwrap();
    std::fs::write(&bad, "listen: {admin: here}\nmodels: [{discovery: {static: []}}]").unwrap();
    let check = |path: &std::path::Path, command: &str| {
        Command::new(env!("CARGO_BIN_EXE_warmroute")).arg(command).arg("--config").arg(path).output().unwrap()
    };
    let output = check(&good, "check-config");
    assert!(output.status.success());
    assert!(String::from_utf8(output.stdout).unwrap().contains("budget: 100ms"));
    for command in ["check-config", "serve"] {
        let output = check(&bad, command);
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{message}");
        for path in ["listen.admin", "models[0].name", "models[0].discovery.static"] {
            assert!(message.contains(path), "{path} is not in\n{message}");
        }
    }
    std::fs::remove_dir_all(directory).unwrap();
}

/// Runs the program on `input` and returns its output lines and exit code.
fn run(command: &str, input: &str) -> (Vec<Value>, Option<i32>) {
    let mut program = Command::new(env!("CARGO_BIN_EXE_warmroute"));
    let mut child = program.arg(command).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let output = std::thread::scope(|scope| {
        // Beside the reading: the program answers as it goes, and both pipes are shorter than a recording.
        scope.spawn(move || stdin.write_all(input.as_bytes()).unwrap());
        child.wait_with_output().unwrap()
    });
    let text = String::from_utf8(output.stdout).unwrap();
    (text.lines().map(|line| serde_json::from_str(line).unwrap()).collect(), output.status.code())
}

#[test]
fn the_program_answers_every_line_and_fails_at_the_end() {
    let good = r#"{"payload_hex":"92cb3ff80000000000009192ac426c6f636b52656d6f7665649107"}"#;
    let (lines, code) = run("decode", &format!("{good}\n{{\"payload_hex\":\"zz\"}}\n\nnot json\n{good}"));
    assert_eq!(code, Some(1));
    assert_eq!(lines.len(), 4);
    assert_eq!(lines[0]["events"], json!([{ "type": "BlockRemoved", "block_hashes": [7] }]));
    assert!(lines[1]["error"].is_string() && lines[2]["error"].is_string());
    assert_eq!(lines[3], lines[0]);
    assert_eq!(run("decode", good).1, Some(0));

    let hash = r#"{"algo":"sha256_cbor","pythonhashseed":null,"block_size":2,"token_ids":[1,2,3],"cache_salt":null,"lora":null,"extra_keys":null}"#;
    let (lines, code) = run("hash", &format!("{hash}\n{{}}\n{hash}\n"));
    assert_eq!((code, lines.len()), (Some(1), 3));
    assert_eq!(lines[0]["block_hashes"].as_array().unwrap().len(), 1);
    assert!(lines[1]["error"].as_str().unwrap().contains("algo"));
    assert_eq!(lines[2], lines[0]);
    assert_eq!(run("hash", hash).1, Some(0));
}

/// Routers in miniature: an admin port that answers `/readyz` with each of `answers`, the last of them for ever.
fn admin_port(answers: Vec<&'static str>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for (i, stream) in listener.incoming().map_while(Result::ok).enumerate() {
            let mut lines = BufReader::new(&stream).lines().map_while(Result::ok);
            assert_eq!(lines.next().as_deref(), Some("GET /readyz HTTP/1.1"));
            lines.take_while(|line| !line.is_empty()).for_each(drop);
            let (status, body) = answers[i.min(answers.len() - 1)].split_once(' ').unwrap();
            let length = body.len();
            write!(&stream, "HTTP/1.1 {status} x\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}")
                .unwrap();
        }
    });
    format!("http://{address}")
}

#[test]
fn ready_tells_what_a_router_lacks_and_waits_for_it() {
    let ready = |args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_warmroute")).arg("ready").args(args).output().unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap())
    };
    let (code, said) = ready(&[&admin_port(vec!["503 serving: not started\ndiscovery: not synced\n"])]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains(": 503 serving: not started discovery: not synced, expected every router"), "{said}");
    let becomes_ready = admin_port(vec!["503 discovery: not synced\n", "200 ok\n"]);
    let (code, said) = ready(&[&becomes_ready, "--wait", "30s"]);
    assert_eq!((code, said.trim_end()), (Some(0), &*format!("{} is ready", &becomes_ready["http://".len()..])));
    let (code, said) = ready(&["http://127.0.0.1:1"]);
    assert_eq!((code, said.contains("127.0.0.1:1: no answer")), (Some(1), true), "{said}");
    assert_eq!(ready(&["http://127.0.0.1:1/readyz"]).0, Some(2), "a path is not part of it");
}
