//! Discovery by the real API server, with the rights that the chart gives: pods come and go by API calls, and their
//! addresses are simulated engines' on loopback addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use e2e::cache::Cache;
use e2e::envoy::{Balancing, Envoy, Gateway};
use e2e::kube::{Cluster, ClusterOptions, chart};
use e2e::router::{self, Router, RouterOptions};
use e2e::sim::publisher::PublisherOptions;
use e2e::sim::{SimOptions, Simulator};
use e2e::{fetch, http};
use reqwest::Method;
use serde_json::{Value, json};
use tempfile::TempDir;

const NAMESPACE: &str = "models";
const MODEL: &str = "tiny";
/// How soon a change has to be followed.
const SOON: Duration = Duration::from_secs(1);
/// Longest that anything else may take.
const DEADLINE: Duration = Duration::from_secs(60);

/// A cluster with the chart's service account, and a router with its token.
struct Stage {
    cluster: Cluster,
    router: Router,
    account: String,
    dir: TempDir,
    /// `127.77.n.0/24` belongs to this test.
    network: u8,
    http: reqwest::Client,
}

impl Stage {
    async fn start(network: u8, options: ClusterOptions) -> Self {
        let cluster = cluster(options).await;
        Self::of(cluster, network, json!({ "preset": "aibrix" }), &[("", "pods")]).await
    }

    /// A router that discovers in this way, for which it needs to watch these resources (group and name).
    async fn of(cluster: Cluster, network: u8, discovery: Value, resources: &[(&str, &str)]) -> Self {
        let discovery = json!({ "kubernetes": discovery });
        let account = install_rights(&cluster, &discovery).await;
        for (group, resource) in resources {
            wait_for_right(&cluster, &account, group, resource).await;
        }
        let kubeconfig = cluster.kubeconfig_for(NAMESPACE, &account).await.unwrap();
        let options = RouterOptions {
            model: MODEL.to_owned(),
            discovery: Some(discovery),
            env: vec![("KUBECONFIG".to_owned(), kubeconfig.display().to_string())],
            ..RouterOptions::new(Vec::new())
        };
        let dir = TempDir::new().unwrap();
        let binary = tokio::task::spawn_blocking(router::binary).await.unwrap().unwrap();
        let router = Router::start(&binary, dir.path(), &options).await.unwrap();
        Self { cluster, router, account, dir, network, http: http::client() }
    }

    fn ip(&self, host: u8) -> IpAddr {
        Ipv4Addr::new(127, 77, self.network, host).into()
    }

    fn engine(&self, host: u8) -> Simulator {
        let ip = self.ip(host);
        let events = PublisherOptions {
            endpoint: format!("tcp://{ip}:5557"),
            replay_endpoint: format!("tcp://{ip}:5558"),
            ..PublisherOptions::default()
        };
        Simulator::start(SimOptions { listen: SocketAddr::new(ip, 8000), events, ..SimOptions::default() }).unwrap()
    }

    /// Creates a pod on a node, as the scheduler leaves it.
    async fn create(&self, name: &str) {
        let labels = json!({ "model.aibrix.ai/name": MODEL, "model.aibrix.ai/kv-events-enabled": "true" });
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": { "name": name, "namespace": NAMESPACE, "labels": labels },
            "spec": { "nodeName": "node", "containers": [{ "name": "vllm", "image": "vllm" }] },
        });
        self.cluster.create_pod(&pod.to_string()).await.unwrap();
    }

    /// Writes what a kubelet would of a pod that runs at an address.
    async fn runs(&self, name: &str, host: u8, is_ready: bool, restarts: u32) {
        let ip = self.ip(host).to_string();
        let ready = if is_ready { "True" } else { "False" };
        let container =
            json!({ "name": "vllm", "image": "vllm", "imageID": "", "ready": is_ready, "restartCount": restarts });
        let status = json!({
            "phase": "Running", "podIP": ip, "podIPs": [{ "ip": ip }],
            "conditions": [{ "type": "Ready", "status": ready }],
            "containerStatuses": [container],
        });
        self.cluster.set_pod_status(NAMESPACE, name, &status).await.unwrap();
    }

    /// Addresses that the router may pick.
    async fn endpoints(&self) -> BTreeSet<IpAddr> {
        let metrics = self.metrics().await;
        let rows = metrics.lines().filter_map(|line| line.strip_prefix("warmroute_endpoint_in_flight{"));
        let address = |row: &str| row.split("endpoint=\"").nth(1)?.split('"').next()?.parse::<SocketAddr>().ok();
        rows.filter_map(address).map(|address| address.ip()).collect()
    }

    async fn metrics(&self) -> String {
        let url = format!("http://{}/metrics", self.router.admin());
        self.http.get(url).send().await.unwrap().text().await.unwrap()
    }

    /// Sum of a metric's samples.
    async fn metric(&self, name: &str) -> f64 {
        let metrics = self.metrics().await;
        let samples = metrics.lines().filter(|line| line.starts_with(name));
        samples.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }

    /// Waits until the router may pick `hosts` and nobody else; how long that took.
    async fn wait_for(&self, hosts: &[u8], deadline: Duration) -> Duration {
        let wanted: BTreeSet<IpAddr> = hosts.iter().map(|host| self.ip(*host)).collect();
        let since = Instant::now();
        loop {
            let found = self.endpoints().await;
            if found == wanted {
                return since.elapsed();
            }
            assert!(since.elapsed() < deadline, "{found:?} and not {wanted:?} after {deadline:?}");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// The step has just been taken: the router has to follow within a second.
    async fn followed(&self, step: &str, hosts: &[u8]) {
        let took = self.wait_for(hosts, SOON).await;
        println!("{step}: followed after {took:?}");
    }

    /// The step has just been taken, and there is nothing to follow.
    async fn unmoved(&self, hosts: &[u8]) {
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert_eq!(self.endpoints().await, hosts.iter().map(|host| self.ip(*host)).collect());
    }
}

async fn cluster(options: ClusterOptions) -> Cluster {
    let cluster = Cluster::start(&Cache::from_env().unwrap(), options).await.unwrap();
    cluster.create_namespace(NAMESPACE).await.unwrap();
    cluster
}

/// Applies the service account and the roles of the chart, as it makes them for this discovery; the account's name.
async fn install_rights(cluster: &Cluster, discovery: &Value) -> String {
    let values = json!({ "config": { "models": [{ "name": MODEL, "default": true, "discovery": discovery }] } });
    let render = move || chart::render(&Cache::from_env()?, "router", NAMESPACE, &values);
    let objects = tokio::task::spawn_blocking(render).await.unwrap().unwrap();
    let is_right = |object: &&str| {
        ["ServiceAccount", "Role", "RoleBinding"].iter().any(|kind| object.contains(&format!("\nkind: {kind}\n")))
    };
    let rights: Vec<&str> = objects.split("\n---").filter(is_right).collect();
    assert_eq!(rights.len(), 3, "{objects}");
    cluster.apply(&rights.join("\n---\n")).await.unwrap();
    let accounts = format!("/api/v1/namespaces/{NAMESPACE}/serviceaccounts");
    let accounts = cluster.request(Method::GET, &accounts, None).await.unwrap();
    let names =
        accounts["items"].as_array().unwrap().iter().map(|account| account["metadata"]["name"].as_str().unwrap());
    let mut names = names.filter(|name| *name != "default");
    names.next().unwrap().to_owned()
}

/// The API server's authorizer hears of a new role a moment later.
async fn wait_for_right(cluster: &Cluster, account: &str, group: &str, resource: &str) {
    let review = json!({
        "apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview",
        "spec": {
            "user": format!("system:serviceaccount:{NAMESPACE}:{account}"),
            "resourceAttributes": { "namespace": NAMESPACE, "verb": "watch", "group": group, "resource": resource },
        },
    });
    let since = Instant::now();
    loop {
        let path = "/apis/authorization.k8s.io/v1/subjectaccessreviews";
        let answer = cluster.request(Method::POST, path, Some(&review)).await.unwrap();
        if answer["status"]["allowed"] == true {
            return;
        }
        assert!(since.elapsed() < DEADLINE, "the chart's role does not let its account watch {resource}: {answer}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Writes every request of every user to a file.
struct Audit {
    dir: TempDir,
}

impl Audit {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let policy = json!({
            "apiVersion": "audit.k8s.io/v1", "kind": "Policy",
            "omitStages": ["RequestReceived"], "rules": [{ "level": "Metadata" }],
        });
        std::fs::write(dir.path().join("policy.yaml"), policy.to_string()).unwrap();
        Self { dir }
    }

    fn api_server_args(&self) -> Vec<String> {
        let path = |name: &str| self.dir.path().join(name).display().to_string();
        vec![
            format!("--audit-policy-file={}", path("policy.yaml")),
            format!("--audit-log-path={}", path("audit.log")),
            "--audit-log-mode=blocking".to_owned(),
        ]
    }

    fn events(&self, account: &str) -> Vec<Value> {
        let text = std::fs::read_to_string(self.dir.path().join("audit.log")).unwrap();
        let user = format!("system:serviceaccount:{NAMESPACE}:{account}");
        // The last line may be half of one.
        let lines = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
        let events = lines.map(|line| serde_json::from_str::<Value>(line).unwrap());
        events.filter(|event| event["user"]["username"] == user).collect()
    }

    /// Waits until pods are watched by this label.
    async fn wait_for_watch(&self, account: &str, label: &str) {
        let selector = format!("labelSelector={}", label.replace('/', "%2F").replace('=', "%3D"));
        let is_it = |event: &Value| {
            event["verb"] == "watch" && event["requestURI"].as_str().is_some_and(|uri| uri.contains(&selector))
        };
        let since = Instant::now();
        while !self.events(account).iter().any(is_it) {
            assert!(since.elapsed() < DEADLINE, "no watch of {selector}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// What the account has asked for, by verb, resource and status.
    fn asked_by(&self, account: &str) -> BTreeMap<(String, String, u64), usize> {
        let mut asked = BTreeMap::new();
        for event in self.events(account) {
            let of = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            let resource = format!("{}/{}", of(&event["objectRef"]["namespace"]), of(&event["objectRef"]["resource"]));
            let status = event["responseStatus"]["code"].as_u64().unwrap_or(0);
            *asked.entry((of(&event["verb"]), resource, status)).or_insert(0) += 1;
        }
        asked
    }
}

#[tokio::test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
async fn every_change_of_a_pod_is_followed_within_a_second_with_the_charts_rights_alone() {
    let audit = Audit::new();
    let options = ClusterOptions { api_server_args: audit.api_server_args(), ..ClusterOptions::default() };
    let stage = Stage::start(1, options).await;
    let _engines = [1, 2, 3].map(|host| stage.engine(host));
    stage.followed("nothing there", &[]).await;

    stage.create("a").await;
    stage.unmoved(&[]).await;
    stage.runs("a", 1, false, 0).await;
    stage.unmoved(&[]).await;
    stage.runs("a", 1, true, 0).await;
    stage.followed("ready", &[1]).await;
    wait_for_source(&stage, 1).await;
    stage.create("b").await;
    stage.runs("b", 2, true, 0).await;
    stage.followed("a second one", &[1, 2]).await;

    let relabel = |model: &str| json!({ "metadata": { "labels": { "model.aibrix.ai/name": model } } });
    stage.cluster.patch_pod(NAMESPACE, "a", &relabel("other")).await.unwrap();
    stage.followed("relabelled", &[2]).await;
    stage.cluster.patch_pod(NAMESPACE, "a", &relabel(MODEL)).await.unwrap();
    stage.followed("labelled again", &[1, 2]).await;

    stage.runs("b", 3, true, 0).await;
    stage.followed("moved to another address", &[1, 3]).await;
    stage.runs("b", 3, false, 0).await;
    stage.followed("not ready", &[1]).await;
    stage.runs("b", 3, true, 0).await;
    stage.followed("ready again", &[1, 3]).await;

    // The address stays; what says that it is another endpoint now is that it has come anew.
    let n_added = stage.metric("warmroute_discovery_changes_total{model=\"tiny\",change=\"added\"}").await;
    stage.runs("a", 1, true, 1).await;
    let since = Instant::now();
    while stage.metric("warmroute_discovery_changes_total{model=\"tiny\",change=\"added\"}").await == n_added {
        assert!(since.elapsed() < SOON, "a restarted container is the same endpoint after {SOON:?}");
    }
    println!("restarted: followed after {:?}", since.elapsed());
    wait_for_source(&stage, 1).await;

    stage.cluster.set_pod_status(NAMESPACE, "b", &json!({ "phase": "Failed", "reason": "Evicted" })).await.unwrap();
    stage.followed("evicted", &[1]).await;
    stage.cluster.delete_pod(NAMESPACE, "a").await.unwrap();
    stage.followed("deleted, and still terminating", &[]).await;
    stage.cluster.force_delete_pod(NAMESPACE, "a").await.unwrap();
    stage.unmoved(&[]).await;

    let asked = audit.asked_by(&stage.account);
    println!("asked of the API server: {asked:?}");
    let kinds: BTreeSet<(&str, &str)> = asked.keys().map(|(verb, resource, _)| (&**verb, &**resource)).collect();
    assert_eq!(kinds, BTreeSet::from([("list", "models/pods"), ("watch", "models/pods")]));
    assert!(asked.keys().all(|(_, _, status)| *status == 200), "{asked:?}");
}

/// Waits until the router follows the events of a host.
async fn wait_for_source(stage: &Stage, host: u8) {
    let label = format!("endpoint=\"{}:8000\"", stage.ip(host));
    let since = Instant::now();
    loop {
        let metrics = stage.metrics().await;
        let mut states = metrics.lines().filter(|line| line.starts_with("warmroute_source_state{"));
        if states.any(|line| line.contains(&label) && (line.contains("\"live\"") || line.contains("\"incomplete\""))) {
            return;
        }
        assert!(since.elapsed() < DEADLINE, "{label} is not followed in\n{metrics}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Asks for completions behind Envoy until it is told to stop.
struct Load {
    stop: Arc<AtomicBool>,
    n_answered: Arc<AtomicUsize>,
    users: tokio::task::JoinSet<Vec<String>>,
}

impl Load {
    fn start(url: &str) -> Self {
        let (stop, n_answered) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
        let mut users = tokio::task::JoinSet::new();
        for user in 0..4 {
            let (stop, n_answered, url) = (stop.clone(), n_answered.clone(), url.to_owned());
            users.spawn(async move {
                let client = http::client_with_timeout(Duration::from_secs(20));
                let mut failures = Vec::new();
                for turn in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let prompt = format!("user {user} says the same thing again and again, this time {turn}");
                    let body = json!({ "model": MODEL, "prompt": prompt, "max_tokens": 2 });
                    match client.post(&url).json(&body).send().await.and_then(reqwest::Response::error_for_status) {
                        Ok(_) => drop(n_answered.fetch_add(1, Ordering::Relaxed)),
                        Err(error) => failures.push(format!("{error:?}")),
                    }
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                failures
            });
        }
        Self { stop, n_answered, users }
    }

    /// How many were answered, and why the others were not.
    async fn end(self) -> (usize, Vec<String>) {
        self.stop.store(true, Ordering::Relaxed);
        let failures = self.users.join_all().await.concat();
        (self.n_answered.load(Ordering::Relaxed), failures)
    }
}

/// `E2E_API_OUTAGE_SECONDS` makes the outage longer than the 20 seconds of a CI run.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
async fn an_api_server_that_is_away_costs_no_request() {
    let outage = std::env::var("E2E_API_OUTAGE_SECONDS").map_or(20, |seconds| seconds.parse().unwrap());
    let mut stage = Stage::start(2, ClusterOptions::default()).await;
    let engines = [1, 2, 3].map(|host| stage.engine(host));
    for (name, host) in [("a", 1), ("b", 2), ("c", 3)] {
        stage.create(name).await;
        stage.runs(name, host, true, 0).await;
    }
    stage.wait_for(&[1, 2, 3], DEADLINE).await;
    let addresses = engines.each_ref().map(Simulator::address);
    let fetch_envoy = || fetch::envoy(&Cache::from_env().unwrap()).unwrap();
    let envoy = tokio::task::spawn_blocking(fetch_envoy).await.unwrap();
    let balancing = Balancing::Warmroute(stage.router.extproc(), Gateway::default());
    let envoy = Envoy::start(&envoy, stage.dir.path(), balancing, &addresses).await.unwrap();
    let load = Load::start(&format!("http://{}/v1/completions", envoy.address()));

    stage.cluster.stop_api_server().await.unwrap();
    let ended = Instant::now() + Duration::from_secs(outage);
    while Instant::now() < ended {
        assert_eq!(stage.endpoints().await.len(), 3);
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert!(stage.metric("warmroute_discovery_errors_total{").await > 0.0, "the outage was not noticed");
    let (n_answered, failures) = load.end().await;
    let n_picked = stage.metric("warmroute_decisions_total{").await;
    println!("{n_answered} requests in {outage} s without an API server, {} failures", failures.len());
    assert!(failures.is_empty(), "{failures:#?}");
    assert!(n_answered > 10 && n_picked >= n_answered as f64, "{n_picked} picks for {n_answered} requests");
    assert_eq!(stage.metric("warmroute_left_to_envoy_total{").await, 0.0);

    stage.cluster.start_api_server().await.unwrap();
    stage.cluster.delete_pod(NAMESPACE, "a").await.unwrap();
    let took = stage.wait_for(&[2, 3], Duration::from_secs(20)).await;
    println!("the first change after the outage: followed after {took:?}");
    stage.cluster.delete_pod(NAMESPACE, "b").await.unwrap();
    stage.followed("the next one", &[3]).await;
}

/// etcd forgets what the router has seen, and the API server begins anew, so that it cannot remember it either.
#[tokio::test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
async fn a_history_that_is_gone_is_made_up_for_by_a_list() {
    let mut stage = Stage::start(3, ClusterOptions::default()).await;
    stage.create("a").await;
    stage.runs("a", 1, true, 0).await;
    stage.wait_for(&[1], DEADLINE).await;
    let pods = format!("/api/v1/namespaces/{NAMESPACE}/pods");
    let list = stage.cluster.request(Method::GET, &pods, None).await.unwrap();
    let version = list["metadata"]["resourceVersion"].as_str().unwrap().to_owned();
    stage.create("b").await;
    stage.runs("b", 2, true, 0).await;
    stage.cluster.compact_etcd().await.unwrap();
    stage.cluster.stop_api_server().await.unwrap();
    stage.cluster.start_api_server().await.unwrap();
    stage.cluster.delete_pod(NAMESPACE, "a").await.unwrap();

    // What a watch from then is told, which is what the fake API server of `tests/it` says.
    let watch = format!("{pods}?watch=true&timeoutSeconds=5&resourceVersion={version}");
    let told = stage.cluster.request(Method::GET, &watch, None).await;
    let told = told.map_or_else(|error| format!("{error:#}"), |event| event.to_string());
    assert!(told.contains("410") && told.contains("Expired"), "{told}");

    let took = stage.wait_for(&[2], Duration::from_secs(20)).await;
    println!("after the compaction: followed after {took:?}");
    stage.runs("b", 3, true, 0).await;
    stage.followed("the next change", &[3]).await;
}

#[tokio::test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
async fn the_slices_of_a_service_are_followed_with_the_charts_rights_alone() {
    let audit = Audit::new();
    let options = ClusterOptions { api_server_args: audit.api_server_args(), ..ClusterOptions::default() };
    let resources = [("discovery.k8s.io", "endpointslices")];
    let stage = Stage::of(cluster(options).await, 4, json!({ "service": "engines" }), &resources).await;
    let slice = |ready: bool| {
        let endpoint = |ip: &str, ready: bool| json!({ "addresses": [ip], "conditions": { "ready": ready } });
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {
                "name": "engines-1", "namespace": NAMESPACE, "labels": { "kubernetes.io/service-name": "engines" },
            },
            // The API server takes no loopback addresses here, and nobody dials these.
            "endpoints": [endpoint("192.0.2.1", true), endpoint("192.0.2.2", ready)],
            "ports": [{ "name": "http", "port": 8000, "protocol": "TCP" }],
        })
    };
    for (ready, n_endpoints) in [(false, 1), (true, 2), (false, 1)] {
        stage.cluster.apply(&slice(ready).to_string()).await.unwrap();
        let since = Instant::now();
        while stage.endpoints().await.len() != n_endpoints {
            assert!(since.elapsed() < SOON, "{:?} after {SOON:?}", stage.endpoints().await);
        }
        println!("{n_endpoints} ready in the slice: followed after {:?}", since.elapsed());
    }
    let asked = audit.asked_by(&stage.account);
    let kinds: BTreeSet<(&str, &str)> = asked.keys().map(|(verb, resource, _)| (&**verb, &**resource)).collect();
    assert_eq!(kinds, BTreeSet::from([("list", "models/endpointslices"), ("watch", "models/endpointslices")]));
    assert!(asked.keys().all(|(_, _, status)| *status == 200), "{asked:?}");
}

#[tokio::test]
#[ignore = "needs the Kubernetes tools: cargo e2e tools"]
async fn an_inference_pool_is_followed_with_the_charts_rights_alone() {
    let audit = Audit::new();
    let options = ClusterOptions { api_server_args: audit.api_server_args(), crds: true };
    let cluster = cluster(options).await;
    let pool = |model: &str| {
        json!({
            "apiVersion": "inference.networking.k8s.io/v1", "kind": "InferencePool",
            "metadata": { "name": "engines", "namespace": NAMESPACE },
            "spec": {
                "selector": { "matchLabels": { "model.aibrix.ai/name": model } },
                "targetPorts": [{ "number": 8000 }],
                "endpointPickerRef": { "name": "router", "port": { "number": 9002 } },
            },
        })
    };
    cluster.apply(&pool("other").to_string()).await.unwrap();
    let resources = [("", "pods"), ("inference.networking.k8s.io", "inferencepools")];
    let stage = Stage::of(cluster, 5, json!({ "inference_pool": "engines" }), &resources).await;
    let _engine = stage.engine(1);
    stage.create("a").await;
    stage.runs("a", 1, true, 0).await;
    stage.unmoved(&[]).await;
    // What is under way for a selector that changes is given up, and the API server calls that an error of its own.
    audit.wait_for_watch(&stage.account, "model.aibrix.ai/name=other").await;
    stage.cluster.apply(&pool(MODEL).to_string()).await.unwrap();
    stage.followed("its selector", &[1]).await;
    wait_for_source(&stage, 1).await;
    audit.wait_for_watch(&stage.account, &format!("model.aibrix.ai/name={MODEL}")).await;
    stage.cluster.apply(&pool("other").to_string()).await.unwrap();
    stage.followed("another selector", &[]).await;
    let asked = audit.asked_by(&stage.account);
    let kinds: BTreeSet<(&str, &str)> = asked.keys().map(|(verb, resource, _)| (&**verb, &**resource)).collect();
    let verbs_of = |resource| [("list", resource), ("watch", resource)];
    assert_eq!(kinds, BTreeSet::from_iter([verbs_of("models/inferencepools"), verbs_of("models/pods")].concat()));
    assert!(asked.keys().all(|(_, _, status)| *status == 200), "{asked:?}");
}
