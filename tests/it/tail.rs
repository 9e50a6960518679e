//! `warmroute events tail` against a publisher on real sockets.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::fake_publisher::{Behaviour, FakePublisher, batch, removed};
use crate::fakes::DEADLINE;

/// The running program; killed when a test gives up on it.
struct Tail {
    child: Child,
    lines: Receiver<String>,
}

impl Tail {
    fn start(arguments: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_warmroute"));
        let mut child = command.args(["events", "tail"]).args(arguments).stdout(Stdio::piped()).spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap()).lines();
        let (sender, lines) = channel();
        let forward = move || output.map_while(Result::ok).try_for_each(|line| sender.send(line));
        std::thread::Builder::new().spawn(forward).unwrap();
        Self { child, lines }
    }

    fn line(&self) -> String {
        self.lines.recv_timeout(DEADLINE).expect("a further line")
    }

    /// Publishes until a live line comes: a subscription takes a moment to reach the publisher. Returns the number in
    /// it.
    fn join(&self, publisher: &FakePublisher) -> u64 {
        let started = Instant::now();
        loop {
            assert!(started.elapsed() < DEADLINE, "no live line");
            publisher.publish(batch(&[removed(1)]));
            match self.lines.recv_timeout(Duration::from_millis(20)) {
                Ok(line) => return seq_of(&line),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => panic!("the program has ended"),
            }
        }
    }

    fn terminate(&mut self, signal: &str) -> ExitStatus {
        let status = Command::new("kill").arg(signal).arg(self.child.id().to_string()).status().unwrap();
        assert!(status.success());
        self.ended()
    }

    fn ended(&mut self) -> ExitStatus {
        let started = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(started.elapsed() < DEADLINE, "the program goes on");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Tail {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The number in a line about an event, in both forms.
fn seq_of(line: &str) -> u64 {
    if let Ok(line) = serde_json::from_str::<Value>(line) {
        return line["seq"].as_u64().unwrap();
    }
    let seq = line.split(' ').find_map(|field| field.strip_prefix("seq="));
    seq.unwrap_or_else(|| panic!("{line:?} has no number")).parse().unwrap()
}

#[test]
fn buffer_is_replayed_then_live_batches_and_gaps_are_shown() {
    let publisher = FakePublisher::start(Behaviour::default());
    for hash in [7, 8, 9] {
        publisher.publish(batch(&[removed(hash)]));
    }
    let mut tail = Tail::start(&[&publisher.events, "--replay", &publisher.replay, "--from", "1"]);
    assert_eq!(tail.line(), format!("-- connecting to {} --", publisher.events));
    assert_eq!(tail.line(), "-- connected --");
    assert_eq!(tail.line(), "-- replay from 1 --");
    for (seq, hash) in [(1, 8), (2, 9)] {
        let expected =
            format!("replay seq={seq} ts=1.500000 rank=0 BlockRemoved medium=GPU blocks=1 first={hash:016x}");
        let line = tail.line();
        assert!(line.starts_with(&expected), "{line}");
    }
    assert_eq!(tail.line(), "-- replay END --");

    let first = tail.join(&publisher);
    publisher.publish(batch(&[]));
    // Those that were published while the subscription was on its way may still come.
    let mut line = tail.line();
    let mut last = first;
    while line.contains("BlockRemoved") {
        last = seq_of(&line);
        line = tail.line();
    }
    assert_eq!(line, format!("-- empty: batch {} has no events --", last + 1));
    publisher.lose(batch(&[removed(2)]));
    publisher.lose(batch(&[removed(3)]));
    publisher.publish(vec![0xc1]);
    assert_eq!(tail.line(), format!("-- gap: expected {}, received {} --", last + 2, last + 4));
    let unreadable = tail.line();
    assert!(unreadable.starts_with(&format!("-- unreadable: batch {} of 1 bytes: ", last + 4)), "{unreadable}");
    assert_eq!(tail.terminate("-TERM").code(), Some(0));
}

#[test]
fn a_reader_that_pauses_does_not_keep_it_from_ending() {
    let publisher = FakePublisher::start(Behaviour::default());
    // Far more than a pipe holds.
    publisher.publish(batch(&(0..20_000).map(removed).collect::<Vec<_>>()));
    let mut command = Command::new(env!("CARGO_BIN_EXE_warmroute"));
    let arguments = ["events", "tail", &publisher.events, "--replay", &publisher.replay];
    let mut child = command.args(arguments).stdout(Stdio::piped()).spawn().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
    let (_sender, lines) = channel();
    let mut tail = Tail { child, lines };
    assert!(output.any(|line| line.starts_with("replay seq=0 ")), "no event is shown");

    assert_eq!(tail.terminate("-TERM").code(), Some(0));
}

#[test]
fn restart_is_marked_in_json_too() {
    let publisher = FakePublisher::start(Behaviour::default());
    let mut tail = Tail::start(&[&publisher.events, "--json", "--topic", "k"]);
    for expected in [json!({"mark": "connecting", "endpoint": publisher.events}), json!({"mark": "connected"})] {
        assert_eq!(serde_json::from_str::<Value>(&tail.line()).unwrap(), expected);
    }
    let first = tail.join(&publisher);
    publisher.publish(batch(&[json!({"type": "AllBlocksCleared"})]));
    let cleared = loop {
        let line: Value = serde_json::from_str(&tail.line()).unwrap();
        if line["kind"] == "AllBlocksCleared" {
            break line;
        }
    };
    let last = cleared["seq"].as_u64().unwrap();
    assert!(last > first);
    assert_eq!(cleared, json!({"via": "live", "seq": last, "ts": 1.5, "rank": 0, "kind": "AllBlocksCleared"}));

    let publisher = publisher.restart(Behaviour::default());
    for expected in [json!({"mark": "disconnected"}), json!({"mark": "connected"})] {
        assert_eq!(serde_json::from_str::<Value>(&tail.line()).unwrap(), expected);
    }
    publisher.publish(batch(&[removed(1)]));
    let mark: Value = loop {
        match tail.lines.recv_timeout(Duration::from_millis(20)) {
            Ok(line) => break serde_json::from_str(&line).unwrap(),
            // The new subscription was not there yet.
            Err(_) => publisher.publish(batch(&[removed(1)])),
        }
    };
    // A number that has not been passed yet is a restart, one beyond looks like a gap: the number alone cannot tell.
    let kind = if mark["received"].as_u64() > Some(last) { "gap" } else { "restart" };
    assert_eq!((&mark["mark"], &mark["expected"]), (&json!(kind), &json!(last + 1)));
    assert_eq!(tail.terminate("-INT").code(), Some(0));
}

#[test]
fn ends_well_when_nobody_reads_any_more() {
    let publisher = FakePublisher::start(Behaviour::default());
    let mut command = Command::new(env!("CARGO_BIN_EXE_warmroute"));
    let mut child = command.args(["events", "tail", &publisher.events]).stdout(Stdio::piped()).spawn().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    assert!(line.starts_with("-- connecting"), "{line}");
    drop(output);
    let mut tail = Tail { child, lines: channel().1 };
    let started = Instant::now();
    while tail.child.try_wait().unwrap().is_none() {
        assert!(started.elapsed() < DEADLINE, "the program writes to nobody");
        publisher.publish(batch(&[removed(1)]));
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(tail.ended().code(), Some(0));
}

#[test]
fn wrong_arguments_are_refused() {
    for arguments in [&["127.0.0.1:5557"][..], &["tcp://*:5557"], &["tcp://127.0.0.1:5557", "--from", "3"], &[]] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_warmroute"));
        let output = command.args(["events", "tail"]).args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(!output.stderr.is_empty(), "{arguments:?}");
    }
}
