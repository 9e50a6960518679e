//! Requests through an Envoy that Envoy Gateway has configured from the chart's resources, with no cluster.
//!
//! The chart is rendered by Helm for engines and a router that are no pods (`engineBackends`, `extProcBackendRefs`);
//! what Envoy Gateway reads of it is given to its file provider as it is. Beside it stand the Gateway and the Backend of
//! the router, as an operator would have them, and a patch by which answers name the engine that gave them.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use e2e::cache::Cache;
use e2e::engines::Engines;
use e2e::envoy::SERVED_BY;
use e2e::http::{client, post_http2};
use e2e::kube::chart;
use e2e::kube::gateway::{Standalone, gateway_objects};
use e2e::router::{Router, RouterOptions, binary};
use e2e::sim::SimOptions;
use e2e::sim::driver::TimeModel;
use e2e::stack::wait_indexed;
use futures_util::StreamExt;
use reqwest::{RequestBuilder, Response, StatusCode};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

/// Tokens of a prompt that fills [`N_BLOCKS`] blocks of 16 and a bit.
const N_TOKENS: u32 = 330;
const N_BLOCKS: u64 = 20;
/// Both headers that a router may be told to name its endpoint in.
const ROUTING_HEADERS: [&str; 2] = ["x-gateway-destination-endpoint", "target-pod"];

struct Setup {
    gateway: Standalone,
    router: Option<Router>,
    engines: Engines,
    _dir: TempDir,
}

impl Setup {
    async fn start() -> Self {
        let cache = Cache::from_env().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let time = TimeModel { prefill_tokens_per_second: 1e6, decode_step: Duration::from_millis(20) };
        let engines = Engines::simulated(3, &SimOptions { time, ..SimOptions::default() }).unwrap();
        let binary = tokio::task::spawn_blocking(binary).await.unwrap().unwrap();
        let router =
            Router::start(&binary, dir.path(), &RouterOptions::new(engines.addresses()).patient()).await.unwrap();
        let values = values(&engines.http());
        let render = {
            let cache = cache.clone();
            move || chart::render(&cache, "warmroute", "default", &values)
        };
        let rendered = tokio::task::spawn_blocking(render).await.unwrap().unwrap();
        let mut objects = gateway_objects(&rendered).unwrap();
        objects.extend(surroundings(router.extproc()));
        let gateway = Standalone::start(&cache, dir.path(), &objects).await.unwrap();
        Self { gateway, router: Some(router), engines, _dir: dir }
    }
}

/// The chart for these engines, with everything else at its default.
fn values(engines: &[SocketAddr]) -> Value {
    let listed: Vec<_> = engines.iter().map(|engine| json!({"address": engine})).collect();
    let endpoints: Vec<_> = engines.iter().map(|engine| json!({"ip": engine.ip(), "port": engine.port()})).collect();
    json!({
        "config": {"models": [{"name": "tiny", "discovery": {"static": listed}}]},
        "envoyGateway": {
            "gateway": {"name": "llm"},
            "routes": [{"name": "tiny", "backends": [{"kind": "Backend", "name": "engines"}]}],
            "extProcBackendRefs": [{"group": "gateway.envoyproxy.io", "kind": "Backend", "name": "router"}],
        },
        "engineBackends": [{"name": "engines", "endpoints": endpoints}],
    })
}

/// The router's Backend, which is a Service in a cluster, and the header by which the tests see who served.
fn surroundings(router: SocketAddr) -> [Value; 2] {
    let api = "gateway.envoyproxy.io/v1alpha1";
    let endpoint = json!({"ip": {"address": router.ip(), "port": router.port()}});
    let header = json!([{"header": {"key": SERVED_BY, "value": "%UPSTREAM_REMOTE_ADDRESS%"}}]);
    [
        json!({"apiVersion": api, "kind": "Backend", "metadata": {"name": "router", "namespace": "default"},
               "spec": {"endpoints": [endpoint]}}),
        json!({"apiVersion": api, "kind": "EnvoyPatchPolicy", "metadata": {"name": "served-by", "namespace": "default"},
        "spec": {
            "targetRef": {"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "llm"},
            "type": "JSONPatch",
            "jsonPatches": [{
                "type": "type.googleapis.com/envoy.config.route.v3.RouteConfiguration",
                "name": "default/llm/http",
                "operation": {"op": "add", "path": "/response_headers_to_add", "value": header},
            }],
        }}),
    ]
}

/// A prompt that shares no block with another `number`'s.
fn prompt(number: u32) -> Vec<u32> {
    (0..N_TOKENS).map(|idx| 1000 * number + idx).collect()
}

fn served_by(response: &Response) -> SocketAddr {
    response.headers()[SERVED_BY].to_str().unwrap().parse().unwrap()
}

impl Setup {
    /// Makes `engine` compute a prompt, past Envoy, and waits until the router knows.
    async fn warm(&self, engine: SocketAddr, number: u32, n_blocks: u64) {
        let url = format!("http://{engine}/v1/completions");
        let body = json!({"prompt": prompt(number), "max_tokens": 1});
        assert_eq!(client().post(url).json(&body).send().await.unwrap().status(), 200);
        wait_indexed(self.router.as_ref().unwrap(), engine, n_blocks).await.unwrap();
    }

    fn completion(&self, number: u32, n_tokens: u32) -> RequestBuilder {
        let body = json!({"model": "tiny", "prompt": prompt(number), "max_tokens": n_tokens, "stream": n_tokens > 1});
        client().post(self.gateway.url("/v1/completions")).json(&body)
    }

    async fn kill_router(&mut self) {
        self.router.take().unwrap().kill().await.unwrap();
    }
}

#[tokio::test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
async fn request_goes_to_the_engine_that_holds_its_prefix() {
    let setup = Setup::start().await;
    for round in 0..3 {
        for (idx, engine) in (0..).zip(setup.engines.http()) {
            let number = 1 + 3 * round + idx;
            setup.warm(engine, number, N_BLOCKS * u64::from(round + 1)).await;
            let response = setup.completion(number, 1).send().await.unwrap();
            assert_eq!(served_by(&response), engine, "round {round}");
            let answer: Value = response.json().await.unwrap();
            assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 16 * N_BLOCKS);
        }
    }
}

#[tokio::test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
async fn killed_router_cuts_no_answer_and_fails_no_request() {
    let mut setup = Setup::start().await;
    // A hundred tokens at 20 ms: they go on for long after the kill.
    let mut streams = JoinSet::new();
    for number in 0..12 {
        let mut bytes = setup.completion(number, 100).send().await.unwrap().bytes_stream();
        let first = bytes.next().await.unwrap().unwrap();
        streams.spawn(async move {
            let mut text = String::from_utf8(first.to_vec()).unwrap();
            while let Some(chunk) = bytes.next().await {
                text.push_str(
                    std::str::from_utf8(&chunk.unwrap_or_else(|error| panic!("{error} after {text}"))).unwrap(),
                );
            }
            text
        });
    }
    // Requests that come at every moment of it.
    let (url, end) = (setup.gateway.url("/v1/completions"), Instant::now() + Duration::from_secs(3));
    let mut load = JoinSet::new();
    for worker in 0..4 {
        let url = url.clone();
        load.spawn(async move {
            let mut statuses = Vec::new();
            while Instant::now() < end {
                let body = json!({"model": "tiny", "prompt": prompt(100 + worker), "max_tokens": 1});
                statuses.push(client().post(&url).json(&body).send().await.unwrap().status());
            }
            statuses
        });
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    setup.kill_router().await;
    assert_eq!(streams.len(), 12);
    for text in streams.join_all().await {
        assert!(text.ends_with("data: [DONE]\n\n"), "an answer was cut: {text}");
    }
    let statuses = load.join_all().await.concat();
    assert!(statuses.len() > 20 && statuses.iter().all(StatusCode::is_success), "{statuses:?}");
    // Envoy's own policy spreads them now.
    let mut served = BTreeSet::new();
    for number in 200..230 {
        let response = setup.completion(number, 1).send().await.unwrap();
        assert_eq!(response.status(), 200);
        served.insert(served_by(&response));
    }
    assert!(served.len() > 1, "all went to {served:?}");
}

/// An address outside the set, and whether anybody has dialled it.
async fn outside() -> (SocketAddr, Arc<AtomicBool>, JoinSet<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, dialled) = (listener.local_addr().unwrap(), Arc::new(AtomicBool::new(false)));
    let mut task = JoinSet::new();
    let seen = dialled.clone();
    task.spawn(async move {
        while listener.accept().await.is_ok() {
            seen.store(true, Ordering::SeqCst);
        }
    });
    (address, dialled, task)
}

#[tokio::test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
async fn forged_routing_headers_reach_no_host_outside_the_set() {
    let mut setup = Setup::start().await;
    let [warm, other, _] = setup.engines.http()[..] else { panic!("three engines") };
    setup.warm(warm, 1, N_BLOCKS).await;
    let (outside, dialled, _task) = outside().await;
    for forged in [outside.to_string(), format!("{outside},{other}"), other.to_string()] {
        for header in ROUTING_HEADERS {
            let response = setup.completion(1, 1).header(header, &forged).send().await.unwrap();
            assert_eq!((response.status(), served_by(&response)), (StatusCode::OK, warm), "{header}: {forged}");
            // The router names nobody for this one.
            let models = client().get(setup.gateway.url("/v1/models")).header(header, &forged);
            assert_eq!(models.send().await.unwrap().status(), 200, "{header}: {forged}");
        }
    }
    setup.kill_router().await;
    let mut served = BTreeSet::new();
    for number in 0..30 {
        for header in ROUTING_HEADERS {
            let response =
                setup.completion(number, 1).header(header, format!("{outside},{other}")).send().await.unwrap();
            assert_eq!(response.status(), 200, "{header}, without the router");
            served.insert(served_by(&response));
        }
    }
    assert!(served.len() > 1, "the client chose {served:?}");
    assert!(!dialled.load(Ordering::SeqCst), "Envoy dialled an address of the client's");
}

#[tokio::test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
async fn large_bodies_pass_up_to_the_limit() {
    let setup = Setup::start().await;
    let warm = setup.engines.http()[0];
    setup.warm(warm, 1, N_BLOCKS).await;
    // The chart's default limit is 32 MiB, where Envoy Gateway's own is 32 KiB.
    for (n_bytes, status) in [(1 << 20, 200), (20 << 20, 200), (40 << 20, 413)] {
        let body = json!({"model": "tiny", "prompt": prompt(1), "max_tokens": 1, "user": "k".repeat(n_bytes)});
        let url = setup.gateway.url("/v1/completions");
        let response = client().post(&url).json(&body).send().await.unwrap();
        assert_eq!(response.status().as_u16(), status, "{n_bytes} bytes");
        if status == 200 {
            assert_eq!(served_by(&response), warm, "{n_bytes} bytes were read");
            // There the limit is the stream's window, which Envoy Gateway sets to 64 KiB by itself.
            let answer = post_http2(&url, body.to_string()).await.unwrap();
            assert_eq!(answer.status.as_u16(), status, "{n_bytes} bytes over HTTP/2");
            assert_eq!(answer.headers[SERVED_BY], warm.to_string(), "{n_bytes} bytes over HTTP/2 were read");
        }
    }
}
