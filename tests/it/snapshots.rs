//! What a router knows outlives it, and reaches its siblings, as far as the publisher confirms it.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::routing::get;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use warmroute::admin::{self, AdminState, guard::Guard, health::Readiness, sources::ReadSources};
use warmroute::engine::plain_http;
use warmroute::events::socket::{EventPlane, SourceState, SourceStatus};
use warmroute::routing::index::{IndexLimits, PrefixIndex};
use warmroute::snapshots::{Config, Sibling, Snapshots};
use warmroute::telemetry::metrics::Metrics;

use crate::events::{Router, prompt, source, stored_prompt};
use crate::fake_publisher::{Behaviour, FakePublisher};
use crate::fakes::DEADLINE;

/// The replay holds the last third of what the tests publish.
const BUFFER: usize = 10;
const N_PROMPTS: u32 = 30;

fn behaviour() -> Behaviour {
    Behaviour { buffer: BUFFER, ..Behaviour::default() }
}

/// A router's event plane with all that belongs to snapshots, the admin port included.
struct Replica {
    router: Router,
    metrics: Arc<Metrics>,
    url: String,
    shutdown: CancellationToken,
    tasks: Vec<JoinHandle<()>>,
}

impl Replica {
    /// Starts as the supervisor does: snapshots are loaded before the source is followed. A replica is its own sibling,
    /// as it is behind a headless Service.
    async fn start(publisher: &FakePublisher, dir: Option<&Path>, siblings: &[&str]) -> Self {
        Self::start_writing(publisher, dir, siblings, Duration::from_secs(3600)).await
    }

    /// As [`Self::start`], with all sources written once per `interval`.
    async fn start_writing(
        publisher: &FakePublisher,
        dir: Option<&Path>,
        siblings: &[&str],
        interval: Duration,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let siblings: Vec<Sibling> = siblings.iter().chain([&&*url]).map(|url| url.parse().unwrap()).collect();
        let config = Config { dir: dir.map(Path::to_owned), interval, siblings, token: None };
        let index = Arc::new(PrefixIndex::new(IndexLimits::default()));
        let (plane, metrics) = (Arc::new(EventPlane::start(&index)), Arc::new(Metrics::new()));
        let snapshots = Snapshots::load(config, plane.clone(), metrics.clone()).await;
        plane.add(source(publisher, Some(publisher.replay.clone())));

        let shutdown = CancellationToken::new();
        let sources = ReadSources::new(Vec::new);
        let (readiness, guard) = (Readiness::default(), Guard::default());
        let state = AdminState { metrics: metrics.clone(), readiness, sources, guard };
        let serving = admin::run(listener, state, snapshots.routes(), shutdown.clone());
        let asking = snapshots.siblings().unwrap().unwrap().run(shutdown.clone());
        let mut tasks =
            vec![tokio::spawn(async { serving.await.unwrap() }), tokio::spawn(async { asking.await.unwrap() })];
        if let Some(writer) = snapshots.writer() {
            let writing = writer.run(shutdown.clone());
            tasks.push(tokio::spawn(async { writing.await.unwrap() }));
        }
        Self { router: Router::over(index, plane), metrics, url, shutdown, tasks }
    }

    /// Stops in the supervisor's order.
    async fn stop(self) {
        self.shutdown.cancel();
        for task in self.tasks {
            tokio::time::timeout(DEADLINE, task).await.unwrap().unwrap();
        }
        self.router.plane.stop();
    }

    fn status(&self) -> SourceStatus {
        self.router.status()
    }

    /// Numbers of the prompts whose blocks are all credited.
    fn credited(&self) -> Vec<u32> {
        (0..1000).filter(|number| self.router.plain(&prompt(*number, 2)) == 2).collect()
    }

    async fn wait_for(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let started = tokio::time::Instant::now();
        while !condition(self) {
            assert!(started.elapsed() < DEADLINE, "waiting for {what}: {:?}\n{}", self.status(), self.metrics.encode());
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    async fn wait_for_state(&self, state: SourceState) {
        self.wait_for(state.as_str(), |replica| replica.status().state == state).await;
    }

    async fn wait_for_prompt(&self, number: u32) {
        self.wait_for("a prompt", |replica| replica.router.plain(&prompt(number, 2)) == 2).await;
    }

    async fn get(&self, path: &str) -> reqwest::Response {
        plain_http().build().unwrap().get(format!("{}{path}", self.url)).send().await.unwrap()
    }

    /// The snapshot of the only source, as a sibling gets it.
    async fn snapshot(&self) -> Vec<u8> {
        let response = self.get(&format!("/snapshots/tiny/{}/0", self.status().address)).await;
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "application/octet-stream");
        response.bytes().await.unwrap().to_vec()
    }

    /// A line of the metrics.
    fn count(&self, series: &str) -> u64 {
        let text = self.metrics.encode();
        let value = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        value.map_or(0, |value| value.parse().unwrap())
    }
}

/// A publisher of whose first prompts only `Replica` knows: they are in no buffer any more.
async fn published_and_followed(dir: Option<&Path>) -> (FakePublisher, Replica) {
    let publisher = FakePublisher::start(behaviour());
    let replica = Replica::start(&publisher, dir, &[]).await;
    replica.wait_for_state(SourceState::Live).await;
    publish(&publisher, 0..N_PROMPTS);
    replica.wait_for_prompt(N_PROMPTS - 1).await;
    assert_eq!(replica.credited(), (0..N_PROMPTS).collect::<Vec<_>>());
    replica.wait_for_state(SourceState::Live).await;
    (publisher, replica)
}

fn publish(publisher: &FakePublisher, numbers: std::ops::Range<u32>) {
    numbers.for_each(|number| publisher.publish(stored_prompt(number, 2)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_late_replica_learns_from_its_sibling_what_the_publisher_no_longer_repeats() {
    let (publisher, elder) = published_and_followed(None).await;
    let alone = Replica::start(&publisher, None, &[]).await;
    alone.wait_for_state(SourceState::Incomplete).await;
    assert_eq!(alone.credited(), (N_PROMPTS - BUFFER as u32..N_PROMPTS).collect::<Vec<_>>());

    let late = Replica::start(&publisher, None, &[&elder.url]).await;
    late.wait_for_state(SourceState::Live).await;
    assert_eq!(late.credited(), elder.credited());
    let known = |replica: &Replica| (replica.status().last_seq, replica.status().digest);
    assert_eq!(known(&late), known(&elder), "before anything new is published");
    publish(&publisher, N_PROMPTS..N_PROMPTS + 3);
    for replica in [&elder, &late] {
        replica.wait_for_prompt(N_PROMPTS + 2).await;
        assert_eq!(replica.credited(), (0..N_PROMPTS + 3).collect::<Vec<_>>());
    }
    let (ours, theirs) = (late.status(), elder.status());
    assert_eq!((ours.last_seq, ours.n_blocks, ours.digest), (theirs.last_seq, theirs.n_blocks, theirs.digest));
    assert_eq!((ours.n_restored, theirs.n_restored), (1, 0));
    assert_eq!(late.count("warmroute_snapshot_failures_total{step=\"fetch\"}"), 0);
    assert!(elder.count("warmroute_snapshots_total{step=\"serve\"}") > 0);
    assert_eq!(late.count("warmroute_snapshots_total{step=\"serve\"}"), 0, "nobody asks itself");
    for replica in [elder, alone, late] {
        replica.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_router_is_credited_with_blocks_that_are_in_no_buffer_any_more() {
    let dir = TempDir::new().unwrap();
    let (publisher, first) = published_and_followed(Some(dir.path())).await;
    first.stop().await;
    publish(&publisher, N_PROMPTS..N_PROMPTS + 5);

    let second = Replica::start(&publisher, Some(dir.path()), &[]).await;
    second.wait_for_prompt(N_PROMPTS + 4).await;
    second.wait_for_state(SourceState::Live).await;
    assert_eq!(second.status().n_restored, 1);
    assert_eq!(second.credited(), (0..N_PROMPTS + 5).collect::<Vec<_>>());
    assert_eq!(second.count("warmroute_snapshots_total{step=\"load\"}"), 1);
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_are_written_while_the_router_runs() {
    let dir = TempDir::new().unwrap();
    let publisher = FakePublisher::start(behaviour());
    let interval = Duration::from_millis(20);
    let first = Replica::start_writing(&publisher, Some(dir.path()), &[], interval).await;
    first.wait_for_state(SourceState::Live).await;
    publish(&publisher, 0..N_PROMPTS);
    first.wait_for_prompt(N_PROMPTS - 1).await;
    // The write that is under way may be older than the last prompt, though not by as much as the buffer holds.
    for number in N_PROMPTS..N_PROMPTS + 3 {
        let n_written = first.count("warmroute_snapshots_total{step=\"write\"}");
        publish(&publisher, number..number + 1);
        let is_written = |replica: &Replica| replica.count("warmroute_snapshots_total{step=\"write\"}") > n_written;
        first.wait_for("a write", is_written).await;
    }

    let second = Replica::start(&publisher, Some(dir.path()), &[]).await;
    assert!(second.count("warmroute_snapshot_bytes_total{step=\"load\"}") > 0);
    second.wait_for_state(SourceState::Live).await;
    assert_eq!(second.credited(), (0..N_PROMPTS + 3).collect::<Vec<_>>());
    first.stop().await;
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sibling_that_is_wrong_delays_help_and_does_not_prevent_it() {
    let (publisher, elder) = published_and_followed(None).await;
    let liar = FakeSibling::start(b"no snapshot".to_vec()).await;
    let nobody = "http://127.0.0.1:1";

    let late = Replica::start(&publisher, None, &[nobody, &liar.url, &elder.url]).await;

    late.wait_for_state(SourceState::Live).await;
    assert_eq!(late.credited(), elder.credited());
    let n_failures = late.count("warmroute_snapshot_failures_total{step=\"fetch\"}");
    assert!(n_failures > 0, "the highest number is asked for first");
    elder.stop().await;
    late.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_of_a_publisher_that_has_restarted_is_not_believed() {
    let dir = TempDir::new().unwrap();
    let (publisher, first) = published_and_followed(Some(dir.path())).await;
    let stale = first.snapshot().await;
    first.stop().await;
    let publisher = publisher.restart(behaviour());
    // The number of the snapshot has been given again, and is in the buffer.
    publish(&publisher, 100..100 + N_PROMPTS + 2);
    let sibling = FakeSibling::start(stale).await;

    let second = Replica::start(&publisher, Some(dir.path()), &[&sibling.url]).await;
    second.wait_for_state(SourceState::Incomplete).await;
    second
        .wait_for("the sibling's offer", |replica| replica.count("warmroute_snapshots_total{step=\"fetch\"}") > 0)
        .await;
    // Whatever the offer led to is over when a batch that came after it is applied.
    publish(&publisher, 200..201);
    second.wait_for_prompt(200).await;
    second.wait_for_state(SourceState::Incomplete).await;
    let first_known = 100 + N_PROMPTS + 2 - BUFFER as u32;
    let known: Vec<u32> = (first_known..100 + N_PROMPTS + 2).chain([200]).collect();
    assert_eq!(second.credited(), known);
    assert_eq!(second.status().n_restored, 0);
    assert_eq!(second.count("warmroute_snapshots_total{step=\"load\"}"), 1);
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_admin_port_lists_what_it_has_and_has_nothing_else() {
    let (_publisher, replica) = published_and_followed(None).await;
    let response = replica.get("/snapshots").await;
    let instance = response.headers()["x-warmroute-instance"].clone();
    let listing: Value = response.json().await.unwrap();
    let status = replica.status();
    let digest = format!("{}-{:016x}", status.digest.n_blocks, status.digest.sum);
    let listed = json!({
        "model": "tiny", "address": status.address, "rank": 0, "seq": N_PROMPTS - 1, "complete": true, "digest": digest,
    });
    assert_eq!(listing, json!({ "sources": [listed] }));

    for (path, status) in [
        ("/snapshots/tiny/127.0.0.1:1/0", 404),
        ("/snapshots/other%2Fmodel/127.0.0.1:8000/0", 404),
        ("/snapshots/tiny/nowhere/0", 400),
        ("/livez", 200),
    ] {
        assert_eq!(replica.get(path).await.status(), status, "{path}");
    }
    assert_eq!(replica.get("/snapshots/tiny/127.0.0.1:1/0").await.headers()["x-warmroute-instance"], instance);
    replica.stop().await;
}

/// A replica that has one snapshot and does not know that its publisher is gone.
struct FakeSibling {
    url: String,
}

impl FakeSibling {
    async fn start(snapshot: Vec<u8>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let address = crate::events::ADDRESS;
        let listed =
            json!({ "model": "tiny", "address": address, "rank": 0, "seq": 99, "complete": true, "digest": "" });
        let listing = json!({ "sources": [listed] });
        let snapshot = Arc::new(Mutex::new(snapshot));
        let name = [("x-warmroute-instance", "1")];
        let routes =
            axum::Router::new().route("/snapshots", get(move || async move { (name, axum::Json(listing)) })).route(
                "/snapshots/{model}/{address}/{rank}",
                get(move || async move { (name, snapshot.lock().unwrap().clone()) }),
            );
        tokio::spawn(async move { axum::serve(listener, routes).await });
        Self { url }
    }
}
