//! What the router credits is what the engine then reports as cached, whatever happens to the engine's cache.

use e2e::engines::Engines;
use e2e::router::RouterOptions;
use e2e::vllm::{LORA, VllmOptions};
use serde_json::json;
use warmroute::routing::hash::HashAlgorithm;

use crate::TURN;
use crate::setup::{BLOCK_SIZE, Credit, Setup, ids};

/// Seven tokens more than full blocks, so that all of these can be reused.
fn prompt(n_blocks: u32, seed: u32) -> serde_json::Value {
    json!({ "prompt": ids(n_blocks * 32 + 7, seed) })
}

fn of_blocks(n_blocks: u64) -> Credit {
    Credit { predicted: n_blocks * BLOCK_SIZE, reported: n_blocks * BLOCK_SIZE }
}

const NOTHING: Credit = Credit { predicted: 0, reported: 0 };

#[tokio::test]
#[ignore = "needs real vLLM"]
async fn after_a_reset_and_after_a_kill_nothing_of_the_old_cache_is_credited() {
    let _turn = TURN.lock().await;
    let options = VllmOptions { n_blocks: Some(512), ..VllmOptions::default() };
    let mut setup = Setup::start(1, &options, |router| router).await;
    let fill = async |setup: &Setup, time: &str| {
        for seed in 0..4 {
            let body = prompt(3 + seed, seed);
            assert_eq!(setup.complete(&format!("{time}, prompt {seed}"), &[], body.clone()).await, NOTHING);
            let again = setup.complete(&format!("{time}, prompt {seed} again"), &[], body).await;
            assert_eq!(again, of_blocks(u64::from(3 + seed)));
        }
    };
    fill(&setup, "first").await;

    // The engine tells of its reset with its next step, hence one that it is made to do.
    setup.engines.reset().await.unwrap();
    fill(&setup, "after a reset").await;

    let Engines::Vllm(servers) = std::mem::replace(&mut setup.engines, Engines::Vllm(Vec::new())) else {
        panic!("these are vLLM servers")
    };
    let mut restarted = Vec::new();
    for server in servers {
        restarted.push(server.kill_and_restart().await.unwrap());
    }
    setup.engines = Engines::Vllm(restarted);
    setup.wait_live(1).await;
    fill(&setup, "after a kill").await;
}

#[tokio::test]
#[ignore = "needs real vLLM"]
async fn under_a_small_cache_each_eviction_takes_its_credit() {
    let _turn = TURN.lock().await;
    // 70 prompts among 14 of 4 to 10 blocks: about 100 blocks for a cache of 66.
    let options = VllmOptions { n_blocks: Some(66), ..VllmOptions::default() };
    let setup = Setup::start(1, &options, |router| router).await;
    let mut random = fastrand::Rng::with_seed(7);
    let (mut n_warm, mut n_evicted) = (0, 0);
    let mut seen = std::collections::BTreeSet::new();
    for turn in 0..70 {
        let seed = random.u32(..14);
        let salt = if random.bool() { "tenant-a" } else { "" };
        let mut body = prompt(4 + seed % 7, seed);
        if !salt.is_empty() {
            body["cache_salt"] = json!(salt);
        }
        let credit = setup.complete(&format!("request {turn}: prompt {seed} {salt}"), &[], body).await;
        assert_eq!(credit.predicted, credit.reported, "request {turn}");
        n_warm += u32::from(credit.reported > 0);
        let is_whole = credit.reported == u64::from(4 + seed % 7) * BLOCK_SIZE;
        n_evicted += u32::from(!seen.insert((seed, salt)) && !is_whole);
    }
    println!("{n_warm} of 70 requests were warm, {n_evicted} found a part of what they had left there evicted");
    assert!(n_warm >= 10 && n_evicted >= 10, "the load does not show what it should");
    let n_in_part = after_others_came(&setup, 12).await + after_others_came(&setup, 15).await;
    assert!(n_in_part > 0, "neither 12 nor 15 prompts of 4 blocks evict a part of one that has 10");
}

/// A prompt of 10 blocks again, after `n_others` new ones of 4: 1 when a part of it was left. vLLM evicts it from its
/// end on, so in a cache of 66 blocks the right number of others leaves the beginning; which one depends on who gets
/// the blocks that were not full.
async fn after_others_came(setup: &Setup, n_others: u32) -> u32 {
    let body = prompt(10, 20 + n_others);
    assert_eq!(setup.complete(&format!("before {n_others} others"), &[], body.clone()).await, NOTHING);
    for other in 0..n_others {
        let body = prompt(4, 100 + 20 * n_others + other);
        assert_eq!(setup.complete(&format!("other {other}"), &[], body).await, NOTHING);
    }
    let credit = setup.complete(&format!("after {n_others} others"), &[], body).await;
    assert_eq!(credit.predicted, credit.reported, "after {n_others} others");
    u32::from(credit.reported > 0 && credit.reported < 10 * BLOCK_SIZE)
}

#[tokio::test]
#[ignore = "needs real vLLM"]
async fn two_ranks_that_the_engine_names_are_credited_and_chosen_apart() {
    let _turn = TURN.lock().await;
    let options = VllmOptions { n_ranks: 2, n_blocks: Some(256), ..VllmOptions::default() };
    let setup = Setup::start(1, &options, |router| RouterOptions { asks_for_sources: true, ..router }).await;
    setup.wait_live(2).await;
    // Where nobody holds anything vLLM balances; what it chose is then chosen again.
    for seed in 0..8 {
        let body = prompt(4, seed);
        assert_eq!(setup.complete(&format!("prompt {seed}"), &[], body.clone()).await, NOTHING);
        for _ in 0..2 {
            assert_eq!(setup.complete(&format!("prompt {seed} again"), &[], body.clone()).await, of_blocks(4));
        }
    }
    // A client that chooses gets what the chosen rank holds.
    for rank in ["0", "1"] {
        let headers = [("x-data-parallel-rank", rank)];
        let body = prompt(5, 20);
        assert_eq!(setup.complete(&format!("on rank {rank}"), &headers, body.clone()).await, NOTHING);
        assert_eq!(setup.complete(&format!("on rank {rank} again"), &headers, body).await, of_blocks(5));
    }
}

/// Prompts, some of them with a salt, each twice: the second one is warm.
async fn each_second_time_is_warm(setup: &Setup, name: &str, model: Option<&str>) {
    for (seed, salt) in [(0, None), (0, Some("tenant-a")), (0, Some("tenant-b")), (1, None), (2, Some("tenant-a"))] {
        let mut body = prompt(4, seed);
        if let Some(model) = model {
            body["model"] = json!(model);
        }
        if let Some(salt) = salt {
            body["cache_salt"] = json!(salt);
        }
        let name = format!("{name}: prompt {seed} of {}", salt.unwrap_or("nobody"));
        assert_eq!(setup.complete(&name, &[], body.clone()).await, NOTHING);
        assert_eq!(setup.complete(&format!("{name} again"), &[], body).await, of_blocks(4));
    }
}

#[tokio::test]
#[ignore = "needs real vLLM"]
async fn with_a_random_root_tokens_and_salts_are_credited() {
    let _turn = TURN.lock().await;
    let algorithm = HashAlgorithm::XxhashCbor;
    let options = VllmOptions { algorithm, n_blocks: Some(256), ..VllmOptions::default() };
    let setup = Setup::start(1, &options, |router| RouterOptions { algorithm, ..router }).await;
    each_second_time_is_warm(&setup, "random root", None).await;
}

#[tokio::test]
#[ignore = "needs real vLLM"]
async fn with_settings_and_an_adapter_path_that_are_not_the_engines_tokens_salts_and_adapter_are_credited() {
    let _turn = TURN.lock().await;
    let options = VllmOptions { lora: true, n_blocks: Some(256), ..VllmOptions::default() };
    let adapters = vec![(LORA.to_owned(), "not/where/it/is".to_owned())];
    let algorithm = HashAlgorithm::Sha256Cbor;
    let setup = Setup::start(1, &options, |router| RouterOptions { algorithm, adapters, ..router }).await;
    each_second_time_is_warm(&setup, "other algorithm", None).await;
    each_second_time_is_warm(&setup, "other algorithm, adapter", Some(LORA)).await;
}

#[tokio::test]
#[ignore = "needs real vLLM"]
async fn an_adapter_is_credited_without_its_path_beside_a_model_whose_hashes_are_known() {
    let _turn = TURN.lock().await;
    let options = VllmOptions { lora: true, n_blocks: Some(256), ..VllmOptions::default() };
    let adapters = vec![(LORA.to_owned(), String::new())];
    let setup = Setup::start(1, &options, |router| RouterOptions { adapters, ..router }).await;
    each_second_time_is_warm(&setup, "model", None).await;
    each_second_time_is_warm(&setup, "adapter without its path", Some(LORA)).await;
}
