//! The program as a process: start, readiness, SIGTERM.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use envoy_types::pb::envoy::service::ext_proc::v3::external_processor_client::ExternalProcessorClient;
use serde_json::{Value, json};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;

use crate::events::stored_prompt;
use crate::fake_publisher::{Behaviour, FakePublisher};
use crate::fakes::{DEADLINE, EnvoyStream, health_client};

/// A running router; killed when a test gives up on it.
pub(crate) struct Process {
    pub(crate) child: Child,
    /// Lines of the log; it ends with the process.
    log: Receiver<String>,
    config: PathBuf,
}

impl Process {
    /// Starts `serve` with ext_proc at `extproc`, one endpoint that nobody is, and a source of events that never comes.
    pub(crate) fn start(name: &str, extproc: SocketAddr, settings: &str) -> Self {
        Self::following(name, extproc, settings, ["tcp://127.0.0.1:1"; 2])
    }

    /// As [`Self::start`], with a publisher and its replay.
    fn following(name: &str, extproc: SocketAddr, settings: &str, [events, replay]: [&str; 2]) -> Self {
        let models = format!(
            "models: [{{name: tiny, default: true, discovery: \
             {{static: [{{address: '127.0.0.1:1', events: '{events}', replay: '{replay}'}}]}}}}]"
        );
        Self::run(name, extproc, &format!("{settings}\n{models}"), &[])
    }

    /// Starts `serve` with these models, any ports, and these variables.
    pub(crate) fn with_models(name: &str, models: &str, env: &[(&str, &str)]) -> Self {
        Self::run(name, ([127, 0, 0, 1], 0).into(), &format!("log: {{format: json}}\n{models}"), env)
    }

    fn run(name: &str, extproc: SocketAddr, settings: &str, env: &[(&str, &str)]) -> Self {
        let config = std::env::temp_dir().join(format!("warmroute-{name}-{}.yaml", std::process::id()));
        let yaml = format!("listen: {{extproc: '{extproc}', admin: '127.0.0.1:0'}}\n{settings}");
        std::fs::write(&config, yaml).unwrap();
        Self::serve(config, env)
    }

    /// Starts `serve` with this file, which is removed at the end.
    pub(crate) fn serve(config: PathBuf, env: &[(&str, &str)]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_warmroute"));
        // An image may have no certificates, and nothing here needs any.
        command.envs([("SSL_CERT_FILE", "/dev/null"), ("SSL_CERT_DIR", "/nonexistent")]);
        command.envs(env.iter().copied());
        let mut child = command.args(["serve", "--config"]).arg(&config).stderr(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let (sender, log) = channel();
        let forward = move || lines.map_while(Result::ok).try_for_each(|line| sender.send(line));
        std::thread::Builder::new().spawn(forward).unwrap();
        Self { child, log, config }
    }

    /// Reads the log up to the line with `message`, which is returned.
    pub(crate) fn wait_for_log(&mut self, message: &str) -> Value {
        loop {
            let line = self.log.recv_timeout(DEADLINE).unwrap_or_else(|_| panic!("the log goes without {message:?}"));
            let event: Value = serde_json::from_str(&line).unwrap();
            if event["message"] == message {
                return event;
            }
        }
    }

    /// The rest of the log, once the process has ended.
    pub(crate) fn rest_of_log(&self) -> String {
        self.log.iter().collect::<Vec<_>>().join("\n")
    }

    pub(crate) fn terminate(&self) {
        self.signal("-TERM");
    }

    pub(crate) fn signal(&self, signal: &str) {
        let status = Command::new("kill").arg(signal).arg(self.child.id().to_string()).status().unwrap();
        assert!(status.success());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.config);
    }
}

pub(crate) fn get(address: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    if path == "/metrics" {
        // Whatever the process has met by now.
        crate::declared::check(answer.split_once("\r\n\r\n").unwrap().1);
    }
    answer
}

#[test]
fn serves_until_sigterm_and_exits_with_0() {
    let mut process =
        Process::start("sigterm", ([127, 0, 0, 1], 0).into(), "log: {format: json}\nreadiness: {warm_deadline: 500ms}");
    let addresses = process.wait_for_log("warmroute is starting");
    let admin = addresses["admin"].as_str().unwrap();
    wait_ready(admin);
    assert!(get(admin, "/livez").starts_with("HTTP/1.1 200"));
    let metrics = get(admin, "/metrics");
    assert!(metrics.contains("warmroute_endpoints{model=\"tiny\"} 1"), "{metrics}");
    let sources = get(admin, "/sources");
    let (_, sources) = sources.split_once("\r\n\r\n").unwrap();
    let sources: Value = serde_json::from_str(sources).unwrap();
    assert_eq!(sources.as_array().unwrap().len(), 1, "{sources}");
    assert_eq!((&sources[0]["model"], &sources[0]["endpoint"]), (&json!("tiny"), &json!("127.0.0.1:1")));
    // Connections that say nothing are no reason to stay.
    let _silent = TcpStream::connect(addresses["extproc"].as_str().unwrap()).unwrap();
    let asked = Instant::now();
    process.terminate();
    process.wait_for_log("stopped");
    assert!(process.child.wait().unwrap().success());
    assert!(
        asked.elapsed() < Duration::from_secs(15),
        "the grace period of 25 s is for streams: {:?}",
        asked.elapsed()
    );
}

/// Between "not ready" and the end there is time in which whoever has not heard yet is served.
#[tokio::test(flavor = "multi_thread")]
async fn sigterm_is_told_before_the_port_closes() {
    let settings = "log: {format: json}\nreadiness: {warm_deadline: 0s}\nshutdown: {delay: 10s}";
    let mut process = Process::start("delay", ([127, 0, 0, 1], 0).into(), settings);
    let addresses = process.wait_for_log("warmroute is starting");
    let (admin, extproc) = (addresses["admin"].as_str().unwrap(), addresses["extproc"].as_str().unwrap());
    wait_for_metric(admin, "warmroute_endpoints{model=\"tiny\"} 1");
    let url = format!("http://{extproc}");
    let mut health = health_client(extproc).await;
    let mut watch = health.watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    let mut next = async || watch.message().await.unwrap().unwrap().status();
    while next().await != ServingStatus::Serving {}
    process.terminate();
    assert_eq!(next().await, ServingStatus::NotServing);
    assert!(get(admin, "/readyz").ends_with("draining\n"));
    assert!(get(admin, "/livez").starts_with("HTTP/1.1 200"));
    let client = ExternalProcessorClient::connect(url).await.expect("the port is open for the delay");
    EnvoyStream::open(client).await.post("/v1/completions", b"{\"prompt\":[1]}").await;
    process.wait_for_log("stopped");
    assert!(process.child.wait().unwrap().success());
}

/// Waits until the process says that it is ready.
pub(crate) fn wait_ready(admin: &str) {
    let deadline = Instant::now() + DEADLINE;
    while !get(admin, "/readyz").starts_with("HTTP/1.1 200") {
        assert!(Instant::now() < deadline, "not ready: {}", get(admin, "/readyz"));
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Waits until the metrics have `line`, and returns them all.
pub(crate) fn wait_for_metric(admin: &str, line: &str) -> String {
    let deadline = Instant::now() + DEADLINE;
    loop {
        let metrics = get(admin, "/metrics");
        if metrics.lines().any(|found| found == line) {
            return metrics;
        }
        assert!(Instant::now() < deadline, "no {line:?} in\n{metrics}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn sigterm_leaves_snapshots_that_the_next_process_starts_from() {
    let publisher = FakePublisher::start(Behaviour { buffer: 3, ..Behaviour::default() });
    let dir = tempfile::TempDir::new().unwrap();
    let settings =
        format!("log: {{format: json}}\nevents: {{snapshots: {{dir: '{}', interval: 1h}}}}", dir.path().display());
    let start = |name| {
        let sockets = [&*publisher.events, &*publisher.replay];
        let mut process = Process::following(name, ([127, 0, 0, 1], 0).into(), &settings, sockets);
        let admin = process.wait_for_log("warmroute is starting")["admin"].as_str().unwrap().to_owned();
        (process, admin)
    };
    let labels = "model=\"tiny\",endpoint=\"127.0.0.1:1\",rank=\"0\"";
    let all_blocks = format!("warmroute_index_blocks{{{labels}}} 10");
    let (mut first, admin) = start("snapshots-1");
    wait_for_metric(&admin, &format!("warmroute_source_state{{{labels},state=\"live\"}} 1"));
    (0..5).for_each(|number| publisher.publish(stored_prompt(number, 2)));
    wait_for_metric(&admin, &all_blocks);
    first.terminate();
    first.wait_for_log("stopped");
    assert!(first.child.wait().unwrap().success());

    let (_second, admin) = start("snapshots-2");
    let metrics = wait_for_metric(&admin, &all_blocks);
    assert!(metrics.contains("warmroute_snapshots_total{step=\"load\"} 1\n"), "{metrics}");
}

/// Every process of these tests lacks them; this one has all that asks anybody over HTTP.
#[test]
fn a_router_with_siblings_starts_in_an_image_without_certificates() {
    let settings = "log: {format: json}\nevents: {siblings: ['http://127.0.0.1:1']}";
    let mut process = Process::start("no-certificates", ([127, 0, 0, 1], 0).into(), settings);
    let admin = process.wait_for_log("warmroute is starting")["admin"].as_str().unwrap().to_owned();
    wait_for_metric(&admin, "warmroute_endpoints{model=\"tiny\"} 1");
    process.terminate();
    process.wait_for_log("stopped");
    assert!(process.child.wait().unwrap().success());
}

#[test]
fn a_port_that_is_taken_ends_the_start_with_its_setting() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut process = Process::start("taken", taken.local_addr().unwrap(), "log: {format: json}");
    let status = process.child.wait().unwrap();
    let log = process.rest_of_log();
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(log.contains("listen.extproc") && log.contains("in use"), "{log}");
}

/// The whole request path logs at its most talkative; nothing of what a client sends may be in it.
#[tokio::test(flavor = "multi_thread")]
async fn prompts_and_salts_are_in_no_log_and_no_metric() {
    const CANARY: &str = "canary-7f3a";
    let mut process = Process::start("canary", ([127, 0, 0, 1], 0).into(), "log: {format: json, filter: trace}");
    let addresses = process.wait_for_log("warmroute is starting");
    let url = format!("http://{}", addresses["extproc"].as_str().unwrap());
    let client = ExternalProcessorClient::connect(url).await.unwrap();
    for body in [
        json!({ "model": "tiny", "prompt": CANARY, "cache_salt": CANARY }).to_string(),
        json!({ "messages": [{ "role": "user", "content": CANARY }], "tools": [{ "name": CANARY }] }).to_string(),
        format!("{{\"prompt\": \"{CANARY}\", broken"),
        json!({ "model": CANARY, "prompt": CANARY }).to_string(),
    ] {
        let mut stream = EnvoyStream::open(client.clone()).await;
        stream.post("/v1/completions", body.as_bytes()).await;
    }
    let metrics = get(addresses["admin"].as_str().unwrap(), "/metrics");
    process.terminate();
    assert!(process.child.wait().unwrap().success());
    let log = process.rest_of_log();
    assert!(log.contains("endpoint picked"), "the log is not talkative");
    assert!(metrics.contains("warmroute_decisions_total"), "{metrics}");
    for (place, text) in [("log", log), ("metrics", metrics)] {
        let leak = text.lines().find(|line| line.contains(CANARY));
        assert_eq!(leak, None, "in the {place}");
    }
}
