//! KV events without the engines' own tokens: the router does not start.

use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use e2e::router::{self, EngineAddress, RouterOptions};
use e2e::service::free_addresses;
use serde_json::{Value, json};

use crate::setup::Given;
use crate::{REMOTE, SYNC, TYPE};

const DEADLINE: Duration = Duration::from_secs(20);
const EXPECTED: &str = "expected remote or auto";

/// Runs a program that is expected to end by itself.
fn run_to_end(command: &mut Command) -> (ExitStatus, String) {
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let started = Instant::now();
    while child.try_wait().unwrap().is_none() && started.elapsed() < DEADLINE {
        std::thread::sleep(Duration::from_millis(20));
    }
    // It has ended already, unless it was not refused.
    let _ = child.kill();
    let output = child.wait_with_output().unwrap();
    (output.status, String::from_utf8(output.stderr).unwrap())
}

fn assert_refused(sync: Option<bool>, tokenizer: Option<Value>, env: &[(&str, &str)], found: &str) {
    let [http, events, replay, extproc, admin] = free_addresses().unwrap();
    let engine = EngineAddress { http, events: format!("tcp://{events}"), replay: format!("tcp://{replay}") };
    let variables = env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    let options = RouterOptions { sync, tokenizer, env: variables, ..RouterOptions::new(vec![engine]) };
    let dir = tempfile::tempdir().unwrap();
    let mut command = router::command(&router::binary().unwrap(), dir.path(), &options, [extproc, admin]).unwrap();
    let (status, message) = run_to_end(&mut command);
    assert_eq!(status.code(), Some(2), "{message}");
    // The variable that says so stands in between, where it was one.
    let fault = message.lines().find(|line| line.contains(&format!("models[0].tokenizer.kind: found {found},")));
    let fault = fault.unwrap_or_else(|| panic!("no fault of {found} in\n{message}"));
    assert!(fault.contains(EXPECTED) && env.iter().any(|(name, _)| fault.contains(name)) != env.is_empty(), "{fault}");
}

#[test]
fn kv_events_without_the_engines_tokens_are_refused() {
    let given = Given::new();
    let local = json!({"kind": "local", "path": given.files()});
    for sync in [Some(true), None] {
        assert_refused(sync, Some(json!({"kind": "text"})), &[], "text");
        assert_refused(sync, Some(local.clone()), &[], "local");
    }
    assert_refused(None, None, &[(SYNC, "true"), (REMOTE, "false")], "text");
    assert_refused(None, None, &[(TYPE, "character")], "text");
    assert_refused(None, Some(json!({"path": given.files()})), &[(SYNC, "1"), (TYPE, "tiktoken")], "local");
}
