//! An `ORIGINAL_DST` cluster dials whatever single address it is told.

use e2e::envoy::Gateway;
use e2e::http::client;
use serde_json::{Value, json};

use crate::setup::*;

#[tokio::test]
async fn request_goes_to_the_engine_that_holds_its_prefix() {
    let setup = Setup::behind(Gateway::OriginalDst, Vec::new()).await;
    for (number, engine) in (1..).zip(setup.engines.http()) {
        let prompt = prompt(number);
        setup.warm(engine, &prompt, N_BLOCKS).await;
        let response = setup.complete(&prompt).await;
        assert_eq!((response.status().as_u16(), served_by(&response)), (200, engine));
        let answer: Value = response.json().await.unwrap();
        assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 16 * N_BLOCKS);
    }
    assert_eq!(setup.stack.metric("warmroute_picks_not_served_total{").await.unwrap(), 0.0);
}

#[tokio::test]
async fn forged_headers_never_decide() {
    let mut setup = Setup::behind(Gateway::OriginalDst, Vec::new()).await;
    let [warm, other, _] = setup.engines.http()[..] else { panic!("three engines") };
    setup.warm(warm, &prompt(1), N_BLOCKS).await;
    let outside = setup.stack.envoy.admin();
    let forge = async |stack: &e2e::stack::Stack, body: &Value, forged: std::net::SocketAddr| {
        let request = client().post(stack.url("/v1/completions")).json(body);
        let request = request.header("target-pod", forged.to_string());
        request.header("x-gateway-destination-endpoint", forged.to_string()).send().await.unwrap()
    };
    let ours = json!({"model": "tiny", "prompt": prompt(1), "max_tokens": 1});
    let unknown = json!({"model": "unknown", "prompt": prompt(1), "max_tokens": 1});
    for forged in [other, outside] {
        let response = forge(&setup.stack, &ours, forged).await;
        assert_eq!((response.status().as_u16(), served_by(&response)), (200, warm), "forged {forged}");
        assert_eq!(forge(&setup.stack, &unknown, forged).await.status(), 503, "forged {forged}");
        let request = client().get(setup.stack.url("/v1/models")).header("target-pod", forged.to_string());
        assert_eq!(request.send().await.unwrap().status(), 503, "forged {forged}, a request that names no model");
    }
    // The router is passed by: Envoy's own removal is all there is.
    setup.stack.kill_router().await.unwrap();
    for forged in [other, outside] {
        assert_eq!(forge(&setup.stack, &ours, forged).await.status(), 503, "forged {forged} without the router");
    }
}

#[tokio::test]
async fn without_a_pick_the_answer_is_503_and_says_why() {
    let setup = Setup::behind(Gateway::OriginalDst, Vec::new()).await;
    let body = json!({"model": "unknown", "prompt": "kato", "max_tokens": 1});
    let response = client().post(setup.stack.url("/v1/completions")).json(&body).send().await.unwrap();
    assert_eq!(response.status(), 503);
    let error: Value = response.json().await.unwrap();
    assert_eq!(error["error"]["code"], "unknown_model");
    let refused = r#"warmroute_immediate_responses_total{reason="unknown_model"}"#;
    assert_eq!(setup.stack.metric(refused).await.unwrap(), 1.0);
    assert_eq!(setup.stack.metric("warmroute_left_to_envoy_total{").await.unwrap(), 0.0);
}
