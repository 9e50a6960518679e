//! What engines are asked over HTTP, against fakes on real ports: where their ranks publish, their metrics, TLS and
//! keys.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use rcgen::{CertificateParams, KeyPair, SanType};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde_json::Value;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use warmroute::config::Config;
use warmroute::discovery::ask::Ask;
use warmroute::discovery::event_sources::RankSource;
use warmroute::discovery::scrape::Scrape;
use warmroute::discovery::{Finding, OnFinding};
use warmroute::engine::{Access, BuildError, EngineClient, Error, Scheme, install_tls};
use warmroute::request::{Question, TokensApi};
use warmroute::routing::endpoint::{Endpoint, EndpointId, EndpointSet};
use warmroute::tokenizer::remote::Targets;

use crate::fakes::{DEADLINE, eventually, remote_tokenizer};

/// Pause between two questions, instead of half a minute.
const INTERVAL: Duration = Duration::from_millis(10);

/// An engine that gives one answer to whatever it is asked, until it is told another.
struct Engine {
    address: SocketAddr,
    answer: Arc<Mutex<(u16, String)>>,
    n_asked: Arc<Mutex<u32>>,
}

type EngineState = (Arc<Mutex<(u16, String)>>, Arc<Mutex<u32>>);

impl Engine {
    async fn start(status: u16, body: &str) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (answer, n_asked) = (Arc::new(Mutex::new((status, body.to_owned()))), Arc::new(Mutex::new(0)));
        let state: EngineState = (answer.clone(), n_asked.clone());
        let app = Router::new().route("/{path}", get(say)).with_state(state);
        tokio::spawn(async move { axum::serve(listener, app).await });
        Self { address, answer, n_asked }
    }

    /// Gives another answer, and waits until it was given at least once and taken.
    async fn say(&self, status: u16, body: &str) {
        *self.answer.lock().unwrap() = (status, body.to_owned());
        let before = *self.n_asked.lock().unwrap();
        // One question may have been answered before; when the third comes, the second answer has been taken.
        eventually("the engine is asked again", || *self.n_asked.lock().unwrap() >= before + 3).await;
    }
}

async fn say(State((answer, n_asked)): State<EngineState>) -> (StatusCode, String) {
    *n_asked.lock().unwrap() += 1;
    let (status, body) = answer.lock().unwrap().clone();
    (StatusCode::from_u16(status).unwrap(), body)
}

/// A pool of one endpoint, and what was found out about it.
struct Pool {
    endpoints: watch::Receiver<Arc<EndpointSet>>,
    findings: Arc<Mutex<Vec<Finding>>>,
    shutdown: CancellationToken,
    _set: watch::Sender<Arc<EndpointSet>>,
}

impl Pool {
    fn of(address: SocketAddr) -> Self {
        let endpoint = Arc::new(Endpoint::new(EndpointId(7), address));
        let (sender, endpoints) = watch::channel(Arc::new(EndpointSet { synced: true, endpoints: vec![endpoint] }));
        Self { endpoints, findings: Arc::default(), shutdown: CancellationToken::new(), _set: sender }
    }

    fn on_finding(&self) -> OnFinding {
        let findings = self.findings.clone();
        Arc::new(move |endpoint, finding| {
            assert_eq!(endpoint.id, EndpointId(7));
            findings.lock().unwrap().push(finding);
        })
    }

    fn ask(&self) {
        let client = EngineClient::new(&Access::default()).unwrap();
        let ask = Ask { endpoints: self.endpoints.clone(), client, interval: INTERVAL, on_finding: self.on_finding() };
        tokio::spawn(ask.run(self.shutdown.clone()));
    }

    fn scrape(&self) {
        let client = EngineClient::new(&Access::default()).unwrap();
        let scrape =
            Scrape { endpoints: self.endpoints.clone(), client, interval: INTERVAL, on_finding: self.on_finding() };
        tokio::spawn(scrape.run(self.shutdown.clone()));
    }

    fn found(&self) -> Vec<Finding> {
        self.findings.lock().unwrap().clone()
    }
}

fn sources(ports: &[u16]) -> Finding {
    let source =
        |(rank, port): (u32, &u16)| RankSource { rank, events: format!("tcp://127.0.0.1:{port}"), replay: None };
    Finding::Sources((0..).zip(ports).map(source).collect())
}

#[tokio::test]
async fn ranks_follow_what_the_engine_says_through_upgrades_failures_and_nonsense() {
    let engine = Engine::start(404, "").await;
    let pool = Pool::of(engine.address);
    pool.ask();
    engine.say(404, "").await;
    assert_eq!(pool.found(), [], "an older engine: what is configured stays");

    let two = r#"{"0":{"endpoint":"tcp://*:5557"},"1":{"endpoint":"tcp://*:5558"}}"#;
    engine.say(200, two).await;
    assert_eq!(pool.found(), [sources(&[5557, 5558])], "told once");
    engine.say(500, "").await;
    engine.say(200, "garbage").await;
    engine.say(200, &format!(r#"{{"0":{{"endpoint":"{}"}}}}"#, "x".repeat(1 << 20))).await;
    engine.say(200, "{}").await;
    engine.say(404, "").await;
    assert_eq!(pool.found(), [sources(&[5557, 5558])], "what was told stays");

    let moved = r#"{"0":{"endpoint":"tcp://*:5559"},"1":{"endpoint":"tcp://10.9.9.9:5558"}}"#;
    engine.say(200, moved).await;
    assert_eq!(pool.found()[1..], [Finding::Refused(1), sources(&[5559])]);
    pool.shutdown.cancel();
}

#[tokio::test]
async fn a_sleep_and_a_restart_are_read_from_the_metrics() {
    let awake = |awake: u8, started: &str| {
        format!("vllm:engine_sleep_state{{sleep_state=\"awake\"}} {awake}\nprocess_start_time_seconds {started}\n")
    };
    let engine = Engine::start(200, &awake(1, "1.5")).await;
    let pool = Pool::of(engine.address);
    pool.scrape();
    engine.say(200, &awake(1, "1.5")).await;
    assert_eq!(pool.found(), []);
    engine.say(200, &awake(0, "1.5")).await;
    engine.say(503, "").await;
    engine.say(200, &awake(1, "2.5")).await;
    assert_eq!(pool.found(), [Finding::Cleared, Finding::Restarted]);
    pool.shutdown.cancel();
}

/// A server with a certificate of its own that answers every request with two tokens, and notes what it was sent.
struct TlsEngine {
    address: SocketAddr,
    certificate: String,
    requests: Arc<Mutex<Vec<String>>>,
}

impl TlsEngine {
    fn start() -> Self {
        install_tls();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::IpAddress([127, 0, 0, 1].into())];
        let certificate = params.self_signed(&key).unwrap();
        let private = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let config = ServerConfig::builder().with_no_client_auth();
        let config = Arc::new(config.with_single_cert(vec![certificate.der().clone()], private).unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let noted = requests.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = StreamOwned::new(ServerConnection::new(config.clone()).unwrap(), stream.unwrap());
                let noted = noted.clone();
                std::thread::spawn(move || {
                    // A client that refuses the certificate breaks off, and so does the conversation.
                    while let Some(request) = read_request(&mut stream) {
                        noted.lock().unwrap().push(request);
                        let answer = "HTTP/1.1 200 OK\r\ncontent-length: 26\r\n\r\n{\"count\":2,\"tokens\":[1,2]}";
                        stream.write_all(answer.as_bytes()).unwrap();
                        stream.flush().unwrap();
                    }
                });
            }
        });
        Self { address, certificate: certificate.pem(), requests }
    }
}

/// Head and body of a request whose body is `{}`, or that has none.
fn read_request(stream: &mut impl Read) -> Option<String> {
    let mut request = Vec::new();
    let end: &[u8] = b"\r\n\r\n";
    while !(request.ends_with(end) && request.starts_with(b"GET ") || request.ends_with(&[end, b"{}"].concat())) {
        let mut byte = [0];
        stream.read_exact(&mut byte).ok()?;
        request.push(byte[0]);
    }
    Some(String::from_utf8(request).unwrap().to_lowercase())
}

/// A file that lives as long as this value.
struct File(PathBuf);

impl File {
    fn with(name: &str, content: &str) -> Self {
        let path = std::env::temp_dir().join(format!("warmroute-it-{}-{name}", std::process::id()));
        std::fs::write(&path, content).unwrap();
        Self(path)
    }
}

impl Drop for File {
    fn drop(&mut self) {
        std::fs::remove_file(&self.0).unwrap();
    }
}

#[tokio::test]
async fn tokens_come_over_tls_with_the_key_of_the_file() {
    let engine = TlsEngine::start();
    let (ca, key) = (File::with("ca", &engine.certificate), File::with("key", "the-key\n"));
    let access = Access { scheme: Scheme::Https, ca: Some(ca.0.clone()), api_key_file: Some(key.0.clone()) };
    let tokenizer = remote_tokenizer(&access, DEADLINE);
    let question = Arc::new(Question { api: TokensApi::Tokenize, body: b"{}".to_vec() });
    let targets = Targets { first: Some(engine.address), hedge: None };
    assert_eq!(tokenizer.ask(question.clone(), targets).await.unwrap().ids, [1, 2]);
    std::fs::write(&key.0, "another-key").unwrap();
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    assert_eq!(tokenizer.ask(question.clone(), targets).await.unwrap().ids, [1, 2]);
    let requests = engine.requests.lock().unwrap().clone();
    assert!(requests[0].starts_with("post /tokenize http/1.1\r\n"), "{requests:?}");
    assert!(requests[0].contains("authorization: bearer the-key\r\n"), "{requests:?}");
    assert!(requests[1].contains("authorization: bearer another-key\r\n"), "{requests:?}");
}

#[tokio::test]
async fn a_certificate_that_nobody_vouches_for_is_refused() {
    let (engine, other) = (TlsEngine::start(), TlsEngine::start());
    let ca = File::with("other-ca", &other.certificate);
    let access = Access { scheme: Scheme::Https, ca: Some(ca.0.clone()), api_key_file: None };
    let client = EngineClient::new(&access).unwrap();
    let refused = client.post_json(&engine.address.into(), "/tokenize", b"{}".to_vec(), 100).await;
    assert!(matches!(refused, Err(Error::Unreachable(_))), "{refused:?}");
    assert!(engine.requests.lock().unwrap().is_empty(), "nothing may be sent to a stranger");
    let plain = EngineClient::new(&Access::default()).unwrap();
    assert!(
        plain.post_json(&engine.address.into(), "/tokenize", b"{}".to_vec(), 100).await.is_err(),
        "not a word of TLS"
    );
}

/// Whether `warmroute doctor` reaches the engine, without a configuration that says how.
fn is_reached_by_doctor(engine: &TlsEngine, more: &[&str]) -> bool {
    let mut command = Command::new(env!("CARGO_BIN_EXE_warmroute"));
    command.args(["doctor", "--json", "--no-request", "--timeout", "2s", "--events", "tcp://127.0.0.1:1"]);
    let output = command.args(["--engine", &format!("https://{}", engine.address)]).args(more).output().unwrap();
    let findings: Value = serde_json::from_slice(&output.stdout).unwrap();
    let reachable = findings.as_array().unwrap().iter().find(|finding| finding["check"] == "reachable").unwrap();
    reachable["verdict"] == "ok"
}

#[test]
fn doctor_asks_an_engine_over_the_scheme_of_its_url() {
    let (engine, other) = (TlsEngine::start(), TlsEngine::start());
    let ca = File::with("doctor-ca", &engine.certificate);
    let trusting = ["--ca", ca.0.to_str().unwrap()];
    assert!(is_reached_by_doctor(&engine, &trusting));
    assert!(engine.requests.lock().unwrap().iter().any(|request| request.starts_with("get /version http/1.1\r\n")));
    assert!(!is_reached_by_doctor(&other, &trusting), "nobody vouches for it");
}

#[tokio::test]
async fn an_answer_has_a_limit() {
    let engine = Engine::start(200, "0123456789").await;
    let client = EngineClient::new(&Access::default()).unwrap();
    assert_eq!(client.get(engine.address, "/metrics", 10).await.unwrap(), b"0123456789");
    assert!(matches!(client.get(engine.address, "/metrics", 9).await, Err(Error::TooLarge(9))));
}

#[test]
fn files_of_the_configuration_are_read_before_serving() {
    let (ca, key) = (File::with("config-ca", &TlsEngine::start().certificate), File::with("config-key", "k"));
    let yaml = |ca: &PathBuf, key: &PathBuf| {
        let engine = format!("{{scheme: https, ca: {:?}, api_key_file: {:?}}}", ca.display(), key.display());
        format!("models: [{{name: m, engine: {engine}, discovery: {{static: [{{address: '1.1.1.1:1'}}]}}}}]")
    };
    let config = Config::parse(&yaml(&ca.0, &key.0), []).unwrap();
    let again = Config::parse(&config.to_yaml(), []).unwrap();
    assert_eq!(again.models[0].engine, config.models[0].engine);
    assert_eq!(config.models[0].engine.ca.as_ref(), Some(&ca.0));
    let swapped = Config::parse(&yaml(&key.0, &ca.0), []).unwrap_err().to_string();
    for expected in ["models[0].engine.ca: found", "models[0].engine.api_key_file: found"] {
        assert!(swapped.contains(expected), "{swapped}");
    }
    let missing = Access { api_key_file: Some("/no/key".into()), ..Access::default() };
    assert!(matches!(EngineClient::new(&missing), Err(BuildError::File(_))));
}
