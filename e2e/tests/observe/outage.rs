//! A collector that is gone, or that takes connections and answers nothing, costs requests nothing and little memory.
//!
//! The machine may be busy with other things, so windows with and without the collector alternate, and what they differ
//! by without any reason, among the good windows but the best and the worst, is what they may differ by beyond the 5 %
//! that are asked for. A request that waits for an export waits seconds, which no such noise hides.

use std::time::{Duration, Instant};

use e2e::collector::Collector;
use e2e::http::client_with_timeout;
use e2e::stack::Stack;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::TURN;
use crate::setup::Setup;

/// One of each kind per round, with a good one before each bad one.
const N_ROUNDS: usize = 5;
const WINDOW: Duration = Duration::from_secs(2);
const N_CLIENTS: usize = 4;
/// Prompts that are asked again and again, so that neither the index nor the tokens that are remembered grow.
const N_PROMPTS: usize = 32;
/// Spans that may wait; as low as this so that a silent collector makes the queue run over in one window.
const QUEUE: usize = 256;
/// What the router may grow by meanwhile: the queue and one batch need a fifth of it, the allocator wants some.
const MAX_GROWTH: u64 = 12 << 20;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs the OpenTelemetry Collector: cargo e2e tools"]
async fn requests_do_not_feel_that_the_collector_is_killed_or_silent() {
    let _turn = TURN.lock().await;
    let queue = ("OTEL_BSP_MAX_QUEUE_SIZE".to_owned(), QUEUE.to_string());
    let mut setup = Setup::start(|options| options.env.push(queue)).await;
    window(&setup.stack).await;
    let before = resident(&setup.stack);

    let [mut good, mut killed, mut silent] = [const { Vec::new() }; 3];
    for _ in 0..N_ROUNDS {
        good.push(window(&setup.stack).await);
        setup.collector.take().unwrap().kill().await.unwrap();
        killed.push(window(&setup.stack).await);
        restart(&mut setup).await;

        good.push(window(&setup.stack).await);
        setup.collector.take().unwrap().kill().await.unwrap();
        let hole = black_hole(&setup).await;
        silent.push(window(&setup.stack).await);
        drop(hole);
        restart(&mut setup).await;
    }
    let after = resident(&setup.stack);

    let usual = median(&good);
    let noise = noise(&good);
    let bound = usual.mul_f64(1.05) + noise;
    println!("p99 in windows with the collector: {good:?}, median {usual:?}, noise {noise:?}");
    println!("killed: {killed:?}, median {:?}; silent: {silent:?}, median {:?}", median(&killed), median(&silent));
    println!("resident: {} KiB before, {} KiB after", before >> 10, after >> 10);
    for (what, windows) in [("killed", &killed), ("silent", &silent)] {
        assert!(median(windows) <= bound, "{what}: p99 {:?}, expected at most {bound:?}", median(windows));
    }
    assert!(after.saturating_sub(before) <= MAX_GROWTH, "grown from {before} to {after} bytes");

    let count = async |name: &str| setup.stack.metric(name).await.unwrap();
    assert!(count("warmroute_spans_exported_total").await > 0.0);
    assert!(count(r#"warmroute_spans_dropped_total{reason="export_failed"}"#).await > 0.0, "the collector was killed");
    assert!(count(r#"warmroute_spans_dropped_total{reason="queue_full"}"#).await > 0.0, "the collector was silent");

    // At the end nobody waits for a collector that is silent.
    setup.collector.take().unwrap().kill().await.unwrap();
    let _hole = black_hole(&setup).await;
    ask(&setup.stack, 0).await;
    let started = Instant::now();
    setup.stack.router.take().unwrap().stop().await.unwrap();
    // Two seconds for the spans, and what the rest of a router takes on a busy machine.
    assert!(started.elapsed() < Duration::from_secs(6), "{:?}", started.elapsed());
}

/// The 99th percentile of what requests take for the length of a window.
async fn window(stack: &Stack) -> Duration {
    let until = Instant::now() + WINDOW;
    let mut clients = JoinSet::new();
    for nth in 0..N_CLIENTS {
        let url = stack.url("/v1/completions");
        clients.spawn(async move {
            let client = client_with_timeout(Duration::from_secs(30));
            let mut took = Vec::new();
            while Instant::now() < until {
                let body = body(nth * N_PROMPTS + took.len());
                let asked = Instant::now();
                let response = client.post(&url).json(&body).send().await.unwrap();
                assert_eq!(response.status(), 200);
                response.bytes().await.unwrap();
                took.push(asked.elapsed());
            }
            took
        });
    }
    let mut took = clients.join_all().await.concat();
    took.sort_unstable();
    took[took.len() * 99 / 100]
}

async fn ask(stack: &Stack, nth: usize) {
    let request = client_with_timeout(Duration::from_secs(30)).post(stack.url("/v1/completions")).json(&body(nth));
    assert_eq!(request.send().await.unwrap().status(), 200);
}

fn body(nth: usize) -> serde_json::Value {
    json!({"model": "tiny", "prompt": format!("{} kato lemi", nth % N_PROMPTS).repeat(20), "max_tokens": 1})
}

/// Takes the collector's place, takes connections, and answers nothing for as long as it is held.
async fn black_hole(setup: &Setup) -> JoinSet<()> {
    let listener = TcpListener::bind(setup.collector_address).await.unwrap();
    let mut hole = JoinSet::new();
    hole.spawn(async move {
        let mut held = Vec::new();
        loop {
            held.push(listener.accept().await.unwrap());
        }
    });
    hole
}

async fn restart(setup: &mut Setup) {
    // Its file is one that spans of earlier windows are not looked for in.
    let started = Collector::start(&setup.binary, setup.dir.path(), setup.collector_address).await;
    setup.collector = Some(started.unwrap());
}

fn median(windows: &[Duration]) -> Duration {
    let mut sorted = windows.to_vec();
    sorted.sort_unstable();
    sorted[sorted.len() / 2]
}

/// How far windows of one kind lie apart. One that had the machine against it, or for itself, says nothing of the others.
fn noise(windows: &[Duration]) -> Duration {
    let mut sorted = windows.to_vec();
    sorted.sort_unstable();
    sorted[sorted.len() - 2] - sorted[1]
}

fn resident(stack: &Stack) -> u64 {
    stack.router.as_ref().unwrap().service().resident_bytes().unwrap()
}
