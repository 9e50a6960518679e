//! Picks are switched off and on again by the configuration file, in front of a real Envoy and under load.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use e2e::envoy::Gateway;
use e2e::http::client;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::setup::*;

/// Fewer than an endpoint may be ahead of the least loaded one, so that a warm endpoint is picked whatever the load.
const N_USERS: usize = 8;

/// Users that ask one prompt again and again until they are stopped.
struct Load {
    users: JoinSet<usize>,
    is_over: Arc<AtomicBool>,
}

impl Load {
    fn start(setup: &Setup) -> Self {
        let is_over = Arc::<AtomicBool>::default();
        let mut users = JoinSet::new();
        for _ in 0..N_USERS {
            let (url, is_over) = (setup.stack.url("/v1/completions"), is_over.clone());
            users.spawn(async move {
                let mut n_answers = 0;
                while !is_over.load(Ordering::Relaxed) {
                    let body = json!({"model": "tiny", "prompt": prompt(1), "max_tokens": 4});
                    let response = client().post(&url).json(&body).send().await.unwrap();
                    assert_eq!(response.status(), 200, "after {n_answers} answers");
                    let answer: Value = response.json().await.unwrap();
                    assert_eq!(answer["usage"]["completion_tokens"], 4, "{answer}");
                    n_answers += 1;
                }
                n_answers
            });
        }
        Self { users, is_over }
    }

    /// How many requests were answered, each of them whole.
    async fn stop(self) -> usize {
        self.is_over.store(true, Ordering::Relaxed);
        self.users.join_all().await.into_iter().sum()
    }
}

/// Writes the mode into the configuration file and waits until it holds.
async fn switch(setup: &Setup, mode: &str) {
    let file = setup.dir.path().join("warmroute.yaml");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    config["rollout"] = json!({"mode": mode, "reload": "100ms"});
    std::fs::write(&file, serde_json::to_vec(&config).unwrap()).unwrap();
    wait_metric(&setup.stack, &format!("warmroute_rollout_mode{{model=\"tiny\",mode=\"{mode}\"}}"), 1.0).await;
}

/// Which engines serve a prompt that only `engine` holds before.
async fn servers(setup: &Setup, number: u32, engine: SocketAddr) -> BTreeSet<SocketAddr> {
    compute(engine, &prompt(number)).await;
    setup.stack.wait_quiet().await.unwrap();
    let mut servers = BTreeSet::new();
    for _ in 0..12 {
        servers.insert(served_by(&setup.complete(&prompt(number)).await));
    }
    servers
}

async fn kill_switch(gateway: Gateway) {
    let setup = Setup::behind(gateway, Vec::new()).await;
    let [first, _, last] = setup.engines.http()[..] else { panic!("three engines") };
    assert_eq!(servers(&setup, 2, last).await, BTreeSet::from([last]), "the router picks");
    setup.warm(first, &prompt(1), N_BLOCKS).await;
    let load = Load::start(&setup);
    for round in 0..2 {
        for mode in ["off", "shadow", "active"] {
            switch(&setup, mode).await;
            tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        }
        assert!(setup.stack.metric("warmroute_left_to_envoy_total{").await.unwrap() > 0.0, "round {round}");
    }
    switch(&setup, "off").await;
    let n_answers = load.stop().await;
    assert!(n_answers > 10 * N_USERS, "{n_answers} answers are no load");
    let envoys = servers(&setup, 3, last).await;
    assert!(envoys.len() > 1, "Envoy's own policy picks, and all went to {envoys:?}");
    switch(&setup, "active").await;
    assert_eq!(servers(&setup, 4, last).await, BTreeSet::from([last]), "the router picks again");
    let refused = setup.stack.metric("warmroute_immediate_responses_total{").await.unwrap();
    assert_eq!(refused, 0.0);
}

#[tokio::test]
async fn the_kill_switch_under_load_fails_no_request() {
    kill_switch(Gateway::OverrideHost).await;
}

#[tokio::test]
async fn the_kill_switch_under_load_fails_no_request_in_full_duplex() {
    kill_switch(Gateway::FullDuplex).await;
}

#[tokio::test]
async fn shadow_decisions_are_compared_with_envoys_own() {
    let setup = Setup::start().await;
    switch(&setup, "shadow").await;
    let engine = setup.engines.http()[0];
    setup.warm(engine, &prompt(1), N_BLOCKS).await;
    for _ in 0..12 {
        assert_eq!(setup.complete(&prompt(1)).await.status(), 200);
    }
    let of = async |name: &str| setup.stack.metric(name).await.unwrap();
    let decided = async |agreed: &str| {
        of(&format!("warmroute_shadow_decisions_total{{model=\"tiny\",agreed=\"{agreed}\"}}")).await
    };
    let (same, other, unknown) = (decided("true").await, decided("false").await, decided("unknown").await);
    assert_eq!((same + other, unknown), (12.0, 0.0), "{same} and {other}: Envoy tells who served each");
    assert!(other > 0.0, "Envoy knows nothing of caches");
    let matched =
        async |who: &str| of(&format!("warmroute_shadow_matched_tokens_total{{model=\"tiny\",who=\"{who}\"}}")).await;
    let (pick, served) = (matched("pick").await, matched("served").await);
    assert_eq!(pick, 12.0 * 16.0 * N_BLOCKS as f64);
    assert!(served < pick, "{served} of {pick}");
}
