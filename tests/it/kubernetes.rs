//! Discovery against an API server that fails in every way that it can.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use warmroute::discovery::Update;
use warmroute::discovery::kubernetes::{Kubernetes, PodRules, Publishing, Query, SliceRules};
use warmroute::discovery::listed::EventPorts;

use crate::fake_api::{FakeApi, Mood, PODS, POOLS, SLICES};

const EVENTS: EventPorts = EventPorts { events: 5557, replay: 5558, ranks: 1 };
/// Longer than anything takes in the time of the test's clock.
const LONG: Duration = Duration::from_secs(600);

/// Discovery at work.
struct Discovery {
    updates: mpsc::UnboundedReceiver<Update>,
    shutdown: CancellationToken,
}

impl Drop for Discovery {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

fn rules() -> PodRules {
    PodRules {
        port: None,
        port_label: None,
        publishing: Publishing::Labelled { key: "kv".to_owned(), value: "true".to_owned() },
        events: EVENTS,
    }
}

fn pods() -> Query {
    Query::Pods { selector: "app=vllm".to_owned(), rules: rules() }
}

impl Discovery {
    fn start(api: &FakeApi, query: Query) -> Self {
        let (sender, updates) = mpsc::unbounded_channel();
        let shutdown = CancellationToken::new();
        let on_update = Box::new(move |update| drop(sender.send(update)));
        let client = api.client();
        let task = Kubernetes { client, namespace: None, query, on_update, model: "tiny".into() };
        tokio::spawn(task.run(shutdown.clone()));
        Self { updates, shutdown }
    }

    async fn next(&mut self) -> Update {
        timeout(LONG, self.updates.recv()).await.expect("an update").expect("discovery goes on")
    }

    /// Addresses of the next listing, whatever else is said before it.
    async fn listing(&mut self) -> Vec<String> {
        loop {
            if let Update::Listed(listed) = self.next().await {
                return listed.iter().map(|listed| listed.address.to_string()).collect();
            }
        }
    }

    /// The listing that comes next, up to and including the beginning of the watch behind it.
    async fn synced(&mut self) -> Vec<String> {
        let listing = self.listing().await;
        assert_eq!(self.next().await, Update::Confirmed);
        listing
    }

    async fn failure(&mut self) -> &'static str {
        match self.next().await {
            Update::Failed(reason) => reason,
            other => panic!("expected a failure, found {other:?}"),
        }
    }

    /// All that is said within `period`.
    async fn during(&mut self, period: Duration) -> Vec<Update> {
        tokio::time::sleep(period).await;
        std::iter::from_fn(|| self.updates.try_recv().ok()).collect()
    }
}

fn pod(name: &str, ip: &str) -> Value {
    json!({
        "metadata": {
            "name": name, "uid": name, "namespace": "models", "creationTimestamp": "2026-11-21T21:06:17Z",
            "labels": { "app": "vllm", "kv": "true" },
        },
        "spec": { "containers": [{ "name": "vllm", "env": [{ "name": "TOKEN", "value": "secret" }] }] },
        "status": {
            "phase": "Running", "podIP": ip,
            "conditions": [{ "type": "Ready", "status": "True" }],
            "containerStatuses": [{ "name": "vllm", "restartCount": 0 }],
        },
    })
}

fn with(mut pod: Value, pointer: &str, value: Value) -> Value {
    *pod.pointer_mut(pointer).unwrap() = value;
    pod
}

#[tokio::test(start_paused = true)]
async fn every_change_of_a_pod_is_listed_at_once() {
    let api = FakeApi::default();
    let unready = with(pod("a", "10.0.0.1"), "/status/conditions/0/status", "False".into());
    api.put(PODS, &unready);
    let mut discovery = Discovery::start(&api, pods());
    assert_eq!(discovery.synced().await, [] as [&str; 0]);
    let began = Instant::now();
    api.put(PODS, &pod("a", "10.0.0.1"));
    assert_eq!(discovery.listing().await, ["10.0.0.1:8000"]);
    api.put(PODS, &pod("b", "10.0.0.2"));
    assert_eq!(discovery.listing().await, ["10.0.0.1:8000", "10.0.0.2:8000"]);
    api.put(PODS, &with(pod("b", "10.0.0.2"), "/metadata/labels/app", "other".into()));
    assert_eq!(discovery.listing().await, ["10.0.0.1:8000"], "relabelled");
    api.put(PODS, &pod("a", "10.0.0.3"));
    assert_eq!(discovery.listing().await, ["10.0.0.3:8000"], "moved");
    let restarted = with(pod("a", "10.0.0.3"), "/status/containerStatuses/0/restartCount", 1.into());
    api.put(PODS, &restarted);
    let Update::Listed(listed) = discovery.next().await else { panic!("expected a listing") };
    assert_eq!((&*listed[0].identity, &*listed[0].sources[0].events), ("a/1", "tcp://10.0.0.3:5557"));
    api.put(PODS, &with(restarted, "/status/phase", "Failed".into()));
    assert_eq!(discovery.listing().await, [] as [&str; 0], "evicted");
    api.put(PODS, &pod("c", "10.0.0.4"));
    assert_eq!(discovery.listing().await, ["10.0.0.4:8000"]);
    api.delete(PODS, "c");
    assert_eq!(discovery.listing().await, [] as [&str; 0], "deleted");
    assert_eq!(began.elapsed(), Duration::ZERO, "nothing waits for a clock");
    assert_eq!(api.n_watches(), 1);
}

#[tokio::test(start_paused = true)]
async fn only_lists_and_watches_of_one_namespace_are_asked_for() {
    let api = FakeApi::default();
    let mut discovery = Discovery::start(&api, pods());
    discovery.synced().await;
    let asked = api.asked();
    assert_eq!(asked.len(), 2, "{asked:?}");
    assert!(asked.iter().all(|asked| asked.starts_with(&format!("GET {PODS}?"))), "{asked:?}");
    assert!(asked.iter().all(|asked| asked.contains("labelSelector=app%3Dvllm")), "{asked:?}");
    assert!(asked[1].contains("watch=true") && asked[1].contains("allowWatchBookmarks=true"), "{asked:?}");
}

#[tokio::test(start_paused = true)]
async fn a_lost_watch_is_followed_by_a_whole_list() {
    let api = FakeApi::default();
    for (name, ip) in [("a", "10.0.0.1"), ("b", "10.0.0.2")] {
        api.put(PODS, &pod(name, ip));
    }
    let mut discovery = Discovery::start(&api, pods());
    assert_eq!(discovery.synced().await.len(), 2);
    api.drop_watches();
    // Nobody is told of what happens between the watches.
    api.delete(PODS, "a");
    api.put(PODS, &pod("c", "10.0.0.3"));
    assert_eq!(discovery.synced().await, ["10.0.0.2:8000", "10.0.0.3:8000"]);
    api.end_watches();
    api.delete(PODS, "b");
    assert_eq!(discovery.synced().await, ["10.0.0.3:8000"], "a watch that has ended properly is no different");
    api.put(PODS, &pod("d", "10.0.0.4"));
    assert_eq!(discovery.listing().await.len(), 2, "and the new watch is followed");
}

#[tokio::test(start_paused = true)]
async fn an_expired_version_is_followed_by_a_whole_list() {
    let api = FakeApi::default();
    api.put(PODS, &pod("a", "10.0.0.1"));
    let mut discovery = Discovery::start(&api, pods());
    assert_eq!(discovery.synced().await.len(), 1);
    let gone = json!({ "type": "ERROR", "object": { "kind": "Status", "status": "Failure", "code": 410, "reason": "Expired" } });
    api.say(&gone.to_string());
    assert_eq!(discovery.failure().await, "expired");
    api.put(PODS, &pod("b", "10.0.0.2"));
    assert_eq!(discovery.synced().await.len(), 2);

    // A list that is older than what can be watched: the watch itself is refused.
    api.put(PODS, &pod("c", "10.0.0.3"));
    assert_eq!(discovery.listing().await.len(), 3);
    api.compact();
    api.put(PODS, &pod("d", "10.0.0.4"));
    api.drop_watches();
    assert_eq!(discovery.listing().await.len(), 4);
    api.set(Mood::Refuses(410));
    api.drop_watches();
    let failures: Vec<Update> = discovery.during(Duration::from_secs(5)).await;
    assert!(failures.contains(&Update::Failed("expired")), "{failures:?}");
    assert!(!failures.iter().any(|update| matches!(update, Update::Listed(listed) if listed.len() != 4)));
    api.set(Mood::Well);
    assert_eq!(discovery.synced().await.len(), 4);
}

#[tokio::test(start_paused = true)]
async fn an_api_server_that_is_away_takes_nothing_away() {
    let api = FakeApi::default();
    api.put(PODS, &pod("a", "10.0.0.1"));
    let mut discovery = Discovery::start(&api, pods());
    assert_eq!(discovery.synced().await.len(), 1);
    let n_asked = api.asked().len();
    api.set(Mood::Down);
    api.drop_watches();
    let outage = Duration::from_secs(3_600);
    let updates = discovery.during(outage).await;
    assert!(updates.iter().all(|update| matches!(update, Update::Failed(_) | Update::Confirmed)), "{updates:?}");
    let n_attempts = api.asked().len() - n_asked;
    // With full jitter up to 10 s, one per 5 s is the mean.
    assert!((500..1_000).contains(&n_attempts), "{n_attempts} attempts in {outage:?}");
    api.delete(PODS, "a");
    api.put(PODS, &pod("b", "10.0.0.2"));
    api.set(Mood::Well);
    let back = Instant::now();
    assert_eq!(discovery.synced().await, ["10.0.0.2:8000"]);
    assert!(back.elapsed() <= Duration::from_secs(10), "{:?}", back.elapsed());
}

#[tokio::test(start_paused = true)]
async fn answers_that_are_no_lists_are_failures_with_a_name() {
    for (mood, reason) in [
        (Mood::Down, "unreachable"),
        (Mood::Refuses(403), "forbidden"),
        (Mood::Refuses(401), "forbidden"),
        (Mood::Refuses(500), "refused"),
        (Mood::Refuses(429), "refused"),
        (Mood::Hangs, "no_answer"),
        (Mood::Babbles(""), "unreadable"),
        (Mood::Babbles("{oops"), "unreadable"),
        (Mood::Babbles("{}"), "unreadable"),
        (Mood::Babbles(r#"{"metadata":{"resourceVersion":"1"},"items":[7]}"#), "unreadable"),
    ] {
        let api = FakeApi::default();
        api.put(PODS, &pod("a", "10.0.0.1"));
        api.set(mood);
        let mut discovery = Discovery::start(&api, pods());
        assert_eq!(discovery.failure().await, reason, "{mood:?}");
        assert_eq!(discovery.failure().await, reason, "{mood:?}");
        api.set(Mood::Well);
        assert_eq!(discovery.synced().await, ["10.0.0.1:8000"], "{mood:?}");
        api.set(mood);
        api.drop_watches();
        let updates = discovery.during(Duration::from_secs(60)).await;
        assert!(updates.contains(&Update::Failed(reason)), "{mood:?}: {updates:?}");
        assert!(!updates.iter().any(|update| matches!(update, Update::Listed(_))), "{mood:?}: {updates:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_babbles_is_begun_anew() {
    let api = FakeApi::default();
    api.put(PODS, &pod("a", "10.0.0.1"));
    let mut discovery = Discovery::start(&api, pods());
    assert_eq!(discovery.synced().await.len(), 1);
    for event in ["oops", "{\"type\": \"ADDED\"}", "{\"type\": \"MODIFIED\", \"object\": 7}"] {
        api.say(event);
        assert_eq!(discovery.failure().await, "unreadable", "{event}");
        assert_eq!(discovery.synced().await.len(), 1, "{event}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_connection_of_which_only_our_end_is_left_is_noticed() {
    let api = FakeApi::default();
    api.put(PODS, &pod("a", "10.0.0.1"));
    let mut discovery = Discovery::start(&api, pods());
    assert_eq!(discovery.synced().await.len(), 1);
    let _muted = api.mute_watches();
    api.delete(PODS, "a");
    let since = Instant::now();
    assert_eq!(discovery.failure().await, "silent");
    assert_eq!(discovery.synced().await, [] as [&str; 0]);
    assert!(since.elapsed() < Duration::from_secs(120), "{:?}", since.elapsed());
}

#[tokio::test(start_paused = true)]
async fn bookmarks_keep_a_watch_that_has_nothing_to_say() {
    let api = FakeApi::default();
    let mut discovery = Discovery::start(&api, pods());
    discovery.synced().await;
    let n_asked = api.asked().len();
    let bookmark =
        r#"{"type":"BOOKMARK","object":{"kind":"Pod","apiVersion":"v1","metadata":{"resourceVersion":"9"}}}"#;
    for _ in 0..10 {
        assert_eq!(discovery.during(Duration::from_secs(60)).await, []);
        api.say(bookmark);
        assert_eq!(discovery.next().await, Update::Confirmed);
    }
    assert_eq!(api.asked().len(), n_asked);
}

#[tokio::test(start_paused = true)]
async fn a_list_of_several_pages_is_one_listing() {
    let api = FakeApi::default();
    for i in 1..=5 {
        api.put(PODS, &pod(&format!("p{i}"), &format!("10.0.0.{i}")));
    }
    api.set_page(2);
    let mut discovery = Discovery::start(&api, pods());
    assert_eq!(discovery.synced().await.len(), 5);
    assert_eq!(api.asked().len(), 4, "three pages and a watch");
}

#[tokio::test(start_paused = true)]
async fn a_wrong_annotation_is_told_once_and_again_when_it_comes_back() {
    let api = FakeApi::default();
    let right = pod("a", "10.0.0.1");
    let mut wrong = right.clone();
    wrong["metadata"]["annotations"] = json!({ "warmroute.io/port": "http" });
    api.put(PODS, &wrong);
    let mut discovery = Discovery::start(&api, pods());
    assert_eq!(discovery.next().await, Update::WrongHints(1));
    assert_eq!(discovery.synced().await, ["10.0.0.1:8000"]);
    for (object, n_wrong) in [(&wrong, 0), (&right, 0), (&wrong, 1)] {
        api.put(PODS, object);
        let updates = discovery.during(Duration::from_secs(1)).await;
        let n_told = updates.iter().filter(|update| matches!(update, Update::WrongHints(_))).count();
        assert_eq!((n_told, updates.len()), (n_wrong, n_wrong + 1), "{updates:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn slices_of_a_service_are_followed() {
    let api = FakeApi::default();
    let slice = |name: &str, service: &str, ips: &[&str]| {
        let endpoint = |ip| json!({ "addresses": [ip], "conditions": { "ready": true }, "targetRef": { "uid": ip } });
        json!({
            "metadata": { "name": name, "uid": name, "labels": { "kubernetes.io/service-name": service } },
            "addressType": "IPv4",
            "ports": [{ "port": 8080 }],
            "endpoints": ips.iter().map(endpoint).collect::<Vec<_>>(),
        })
    };
    api.put(SLICES, &slice("s-1", "engines", &["10.0.0.1"]));
    api.put(SLICES, &slice("s-2", "engines", &["10.0.0.2"]));
    api.put(SLICES, &slice("o-1", "others", &["10.0.0.9"]));
    let rules = SliceRules { port: None, events: EVENTS };
    let mut discovery = Discovery::start(&api, Query::Service { name: "engines".to_owned(), rules });
    assert_eq!(discovery.synced().await, ["10.0.0.1:8080", "10.0.0.2:8080"]);
    api.put(SLICES, &slice("s-2", "engines", &["10.0.0.2", "10.0.0.3"]));
    assert_eq!(discovery.listing().await.len(), 3);
    api.delete(SLICES, "s-1");
    assert_eq!(discovery.listing().await, ["10.0.0.2:8080", "10.0.0.3:8080"]);
}

fn pool(labels: &Value, ports: &[u16]) -> Value {
    let ports: Vec<Value> = ports.iter().map(|port| json!({ "number": port })).collect();
    json!({
        "metadata": { "name": "pool", "uid": "pool" },
        "spec": { "selector": { "matchLabels": labels }, "targetPorts": ports, "endpointPickerRef": { "name": "epp" } },
    })
}

#[tokio::test(start_paused = true)]
async fn an_inference_pool_says_which_pods_and_which_ports() {
    let api = FakeApi::default();
    api.put(PODS, &pod("a", "10.0.0.1"));
    api.put(PODS, &with(pod("b", "10.0.0.2"), "/metadata/labels", json!({ "app": "other" })));
    let mut discovery = Discovery::start(&api, Query::InferencePool { name: "pool".to_owned(), rules: rules() });
    assert_eq!(discovery.failure().await, "no_pool", "it is not there yet");
    assert!(!discovery.during(LONG).await.iter().any(|update| matches!(update, Update::Listed(_))));
    api.put(POOLS, &pool(&json!({ "app": "vllm" }), &[9000, 9001]));
    assert_eq!(discovery.listing().await, ["10.0.0.1:9000", "10.0.0.1:9001"]);
    api.put(POOLS, &pool(&json!({ "app": "other" }), &[9000]));
    assert_eq!(discovery.listing().await, ["10.0.0.2:9000"]);
    api.put(POOLS, &pool(&json!({}), &[9000]));
    api.delete(POOLS, "pool");
    let updates = discovery.during(Duration::from_secs(10)).await;
    assert!(!updates.iter().any(|update| matches!(update, Update::Listed(_))), "{updates:?}");
    api.put(PODS, &with(pod("c", "10.0.0.3"), "/metadata/labels", json!({ "app": "other" })));
    assert_eq!(discovery.listing().await.len(), 2, "its pods are still followed");
}

/// The pool has a status too, which its controllers write whenever they like.
#[tokio::test(start_paused = true)]
async fn a_pool_that_always_has_news_does_not_stop_the_lists_of_its_pods() {
    let api = FakeApi::default();
    api.put(PODS, &pod("a", "10.0.0.1"));
    api.put(POOLS, &pool(&json!({ "app": "other" }), &[9000]));
    let mut discovery = Discovery::start(&api, Query::InferencePool { name: "pool".to_owned(), rules: rules() });
    assert_eq!(discovery.synced().await, [] as [&str; 0]);
    let n_asked = api.asked().len();

    api.set_delay(Duration::from_secs(5));
    let news = tokio::spawn({
        let api = api.clone();
        async move {
            loop {
                api.put(POOLS, &pool(&json!({ "app": "vllm" }), &[9000]));
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    });
    assert_eq!(discovery.synced().await, ["10.0.0.1:9000"]);
    news.abort();
    let asked = &api.asked()[n_asked..];
    assert_eq!(asked.len(), 2, "one list, one watch: {asked:?}");
}

/// A kubeconfig for a server at `address`.
fn kubeconfig(address: SocketAddr) -> tempfile::NamedTempFile {
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "test",
        "clusters": [{ "name": "test", "cluster": { "server": format!("http://{address}") } }],
        "users": [{ "name": "test", "user": { "token": "t" } }],
        "contexts": [{ "name": "test", "context": { "cluster": "test", "user": "test", "namespace": "models" } }],
    });
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), config.to_string()).unwrap();
    file
}

/// Real sockets: kube's credentials, the way there, and what a broken connection looks like.
#[tokio::test(flavor = "multi_thread")]
async fn the_program_serves_before_the_api_server_does() {
    let unused = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let kubeconfig = kubeconfig(unused);
    let env = [("KUBECONFIG", kubeconfig.path().to_str().unwrap())];
    let models = "models: [{name: tiny, default: true, discovery: {kubernetes: {selector: app=vllm}}}]";
    let mut process = crate::process::Process::with_models("kubernetes", models, &env);
    let admin = process.wait_for_log("warmroute is starting")["admin"].as_str().unwrap().to_owned();
    process.wait_for_log("discovery fails: the endpoints stay as they were last listed");
    let ready = crate::process::get(&admin, "/readyz");
    assert!(ready.starts_with("HTTP/1.1 503") && ready.contains("discovery: not synced"), "{ready}");
    assert!(crate::process::get(&admin, "/livez").starts_with("HTTP/1.1 200"));

    let api = FakeApi::default();
    api.put(PODS, &pod("a", "127.0.0.1"));
    api.serve(unused).await;
    process.wait_for_log("discovery works again");
    let line = "warmroute_endpoints{model=\"tiny\"} 1".to_owned();
    let metrics = wait_for_metric(&admin, &line).await;
    assert!(metrics.contains("warmroute_discovery_synced{model=\"tiny\"} 1"), "{metrics}");
    crate::process::wait_ready(&admin);
    let sources = crate::process::get(&admin, "/sources");
    assert!(!sources.contains("127.0.0.1:8000"), "without the preset's label no events are expected: {sources}");

    api.drop_watches();
    api.put(PODS, &pod("b", "127.0.0.2"));
    wait_for_metric(&admin, &line.replace("} 1", "} 2")).await;
    api.delete(PODS, "a");
    wait_for_metric(&admin, &line).await;
    process.terminate();
    process.wait_for_log("stopped");
    assert!(process.child.wait().unwrap().success());
}

async fn wait_for_metric(admin: &str, line: &str) -> String {
    let (admin, line) = (admin.to_owned(), line.to_owned());
    tokio::task::spawn_blocking(move || crate::process::wait_for_metric(&admin, &line)).await.unwrap()
}
