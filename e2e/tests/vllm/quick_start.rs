//! The command line of `envoy/vllm/quick-start.yaml`, by the vLLM that it is written for.

use std::net::TcpListener;
use std::path::Path;

use e2e::http::client;
use e2e::vllm::{VLLM_VERSION, VllmOptions, VllmServer};
use serde_json::{Value, json};

use crate::TURN;
use crate::setup::{COMPLETIONS, cached_tokens};

/// Longest prompt and answer of the model that stands in for the sample's.
const MAX_MODEL_LEN: u32 = 16_384;
/// How long the engine's events may take.
const EVENTS_DEADLINE_MS: i32 = 10_000;

#[tokio::test]
#[ignore = "needs real vLLM"]
async fn quick_start_is_a_vllm_that_publishes_its_events() {
    let _turn = TURN.lock().await;
    let container = container();
    let image = container["image"].as_str().unwrap();
    assert!(image.ends_with(&format!(":v{VLLM_VERSION}")), "{image} is not what is run here");
    assert_eq!(container["command"], json!(["vllm", "serve"]));
    let [events, replay] = free_ports();
    let args = server_args(&container, [("tcp://*:5557", events), ("tcp://*:5558", replay)]);
    let name = after(&args, "--served-model-name").to_owned();

    let server = VllmServer::start(VllmOptions { max_model_len: MAX_MODEL_LEN, args, ..VllmOptions::default() });
    let server = server.await.unwrap();
    let sources: Value = client().get(server.url("/kv_event_sources")).send().await.unwrap().json().await.unwrap();
    let subscriber = subscribe(events);
    let prompt: Vec<u32> = (0..100).map(|i| 10 + i).collect();
    let body = json!({ "model": name, "prompt": prompt, "max_tokens": 1 });
    server.post(COMPLETIONS, &body).await.unwrap();
    let again = server.post(COMPLETIONS, &body).await.unwrap();

    assert_eq!(sources["0"]["endpoint"], format!("tcp://*:{events}"), "{sources}");
    assert_eq!(sources["0"]["replay_endpoint"], format!("tcp://*:{replay}"), "{sources}");
    assert_eq!(cached_tokens(&again), 96, "answers say what was cached, {again}");
    let frames = subscriber.recv_multipart(0).expect("events before the deadline");
    assert_eq!(frames.len(), 3, "topic, number and batch");
    server.stop().await.unwrap();
}

/// vLLM's container in the sample's Deployment.
fn container() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../envoy/vllm/quick-start.yaml");
    let objects: Vec<Value> = serde_saphyr::from_multiple(&std::fs::read_to_string(path).unwrap()).unwrap();
    let deployment = objects.into_iter().find(|object| object["kind"] == "Deployment").expect("a Deployment");
    deployment["spec"]["template"]["spec"]["containers"][0].clone()
}

/// The sample's arguments without what a machine of its own decides: the model, which has to be fetched, and the ports.
fn server_args(container: &Value, ports: [(&str, u16); 2]) -> Vec<String> {
    let args = container["args"].as_array().unwrap().iter().map(|arg| arg.as_str().unwrap().to_owned());
    let mut args: Vec<String> = args.collect();
    assert!(!args.remove(0).starts_with('-'), "the model comes first");
    let port = args.iter().position(|arg| arg == "--port").expect("--port");
    assert_eq!(args.drain(port..port + 2).next_back().as_deref(), Some("8000"));
    let config = args.iter_mut().find(|arg| arg.starts_with('{')).expect("--kv-events-config");
    for (endpoint, port) in ports {
        assert_eq!(config.matches(endpoint).count(), 1, "{config}");
        *config = config.replace(endpoint, &format!("tcp://*:{port}"));
    }
    args
}

fn after<'a>(args: &'a [String], flag: &str) -> &'a str {
    let position = args.iter().position(|arg| arg == flag).unwrap_or_else(|| panic!("{flag} is not in {args:?}"));
    &args[position + 1]
}

/// Two ports that are free now; vLLM binds them half a minute later.
fn free_ports() -> [u16; 2] {
    let listeners = [(); 2].map(|()| TcpListener::bind("0.0.0.0:0").unwrap());
    listeners.map(|listener| listener.local_addr().unwrap().port())
}

fn subscribe(port: u16) -> zmq::Socket {
    let socket = zmq::Context::new().socket(zmq::SUB).unwrap();
    socket.set_rcvtimeo(EVENTS_DEADLINE_MS).unwrap();
    socket.set_subscribe(b"").unwrap();
    socket.connect(&format!("tcp://127.0.0.1:{port}")).unwrap();
    socket
}
