//! Bodies that the router rewrites: report modes, as an ext_proc client sees them.

use envoy_types::pb::envoy::service::ext_proc::v3::body_mutation::Mutation;
use envoy_types::pb::envoy::service::ext_proc::v3::processing_response::Response;
use envoy_types::pb::envoy::service::ext_proc::v3::{BodyMutation, CommonResponse, ProcessingResponse};
use serde_json::json;
use warmroute::routing::endpoint::SourceKnowledge;
use warmroute::routing::hash::Scope;
use warmroute::routing::index::KeyKinds;

use crate::fakes::*;

const FULL: &str = r#""vllm_xargs":{"kv_cache_report_mode":"full"}"#;
const REQUESTED: &str = "warmroute_full_reports_requested_total{model=\"tiny\"}";

/// The new body and the `content-length` that goes with it; none when the body stays.
fn new_body(reply: &ProcessingResponse) -> Option<(String, String)> {
    let Some(Response::RequestBody(body)) = &reply.response else { panic!("expected a body reply, found {reply:?}") };
    let CommonResponse { header_mutation, body_mutation, .. } = body.response.clone().unwrap();
    let headers = header_mutation.unwrap().set_headers;
    let length = headers.into_iter().filter_map(|option| option.header).find(|header| header.key == "content-length");
    let length = length.map(|header| String::from_utf8(header.raw_value).unwrap());
    let Some(BodyMutation { mutation }) = body_mutation else {
        assert_eq!(length, None, "a length without its body");
        return None;
    };
    let Some(Mutation::Body(body)) = mutation else { panic!("expected a whole body, found {mutation:?}") };
    Some((String::from_utf8(body).unwrap(), length.unwrap()))
}

fn body_of(text: &str) -> Option<(String, String)> {
    Some((text.to_owned(), text.len().to_string()))
}

async fn sent(router: &FakeRouter, path: &str, body: &str) -> Option<(String, String)> {
    let (_stream, reply) = router.post(path, body.as_bytes()).await;
    new_body(&reply)
}

#[tokio::test]
async fn clients_report_mode_reaches_no_engine_whatever_the_path_and_model() {
    let router = FakeRouter::start(&[([127, 0, 0, 1], 1).into()]).await;
    for (path, model) in [
        ("/v1/completions", "tiny"),
        ("/v1/chat/completions", "tiny"),
        ("/v1/responses", "tiny"),
        ("/v1/completions", "nobody-configured-this"),
    ] {
        let rest = format!(r#""model":"{model}","x":[1.0,1.0], "x":2"#);
        let given = format!("{{{rest},{FULL}}}");
        assert_eq!(sent(&router, path, &given).await, body_of(&format!("{{{rest}}}")), "{path} {model}");
        assert_eq!(sent(&router, path, &format!("{{{rest}}}")).await, None, "{path} {model}");
    }
    assert_eq!(sent(&router, "/v1/completions", &format!("{{{FULL}, broken")).await, None);
}

#[tokio::test]
async fn conversation_asks_an_incomplete_endpoint_once() {
    let router = FakeRouter::start(&[([127, 0, 0, 1], 1).into()]).await;
    let mut source = SourceKnowledge::new(router.endpoints[0].knowledge.clone());
    let tokens: Vec<u32> = (0..41).collect();
    let body = |n_tokens: usize| json!({"prompt": tokens[..n_tokens]}).to_string();
    let asked = |n_tokens: usize| body_of(&format!("{{{FULL},{}", &body(n_tokens)[1..]));
    assert_eq!(sent(&router, "/v1/completions", &body(21)).await, None, "nothing is incomplete");

    source.mark_incomplete(true);
    for _ in 0..2 {
        assert_eq!(sent(&router, "/v1/completions", &body(21)).await, asked(21), "no engine has announced anything");
    }
    let slot = router.warm(0, &tokens[..8], &Scope::default(), KeyKinds::PLAIN);
    assert_eq!(sent(&router, "/v1/completions", &body(9)).await, None, "all of it is credited");
    assert_eq!(sent(&router, "/v1/completions", &body(21)).await, asked(21));
    assert_eq!(sent(&router, "/v1/completions", &body(41)).await, None, "the next turn");
    assert_eq!(router.metric(REQUESTED), 3.0);

    source.start_generation();
    assert_eq!(sent(&router, "/v1/completions", &body(41)).await, asked(41), "what was reported is forgotten");
    source.mark_incomplete(false);
    slot.retire();
    assert_eq!(sent(&router, "/v1/completions", &body(41)).await, None);
    assert_eq!(router.metric(REQUESTED), 4.0);
}

#[tokio::test]
async fn prompts_that_cannot_be_looked_up_ask_for_nothing() {
    let router = FakeRouter::start(&[([127, 0, 0, 1], 1).into()]).await;
    let mut source = SourceKnowledge::new(router.endpoints[0].knowledge.clone());
    source.mark_incomplete(true);
    let _slot = router.warm(0, &[1, 2, 3, 4], &Scope::default(), KeyKinds::PLAIN);
    for body in [
        json!({"prompt": [1, 2, 3, 4, 5, 6, 7, 8, 9], "prompt_logprobs": 1}),
        json!({"prompt": []}),
        json!({"prompt": [1, 2, 3]}),
    ] {
        assert_eq!(sent(&router, "/v1/completions", &body.to_string()).await, None, "{body}");
    }
    assert_eq!(router.metric(REQUESTED), 0.0);
}
