//! The harness' vLLM against its own promises, before anything of ours stands in front of it.

use anyhow::Result;
use e2e::vllm::{LORA, MODEL, VllmOptions, VllmServer};
use serde_json::json;
use warmroute::routing::hash::HashAlgorithm;

use crate::TURN;

#[tokio::test]
#[ignore = "needs real vLLM"]
async fn repeated_prompt_is_served_from_cache() -> Result<()> {
    let _turn = TURN.lock().await;
    let server = VllmServer::start(VllmOptions::default()).await?;
    let prompt: Vec<u32> = (0..100).map(|i| 10 + i).collect();
    let body = json!({ "model": MODEL, "prompt": prompt, "max_tokens": 1 });

    let first = server.post("/v1/completions", &body).await?;
    let second = server.post("/v1/completions", &body).await?;
    server.reset_prefix_cache().await?;
    let after_reset = server.post("/v1/completions", &body).await?;

    // 100 tokens are 3 full blocks of 32.
    let cached = "/usage/prompt_tokens_details/cached_tokens";
    assert_eq!(first.pointer(cached), Some(&json!(0)), "{first}");
    assert_eq!(second.pointer(cached), Some(&json!(96)), "{second}");
    assert_eq!(after_reset.pointer(cached), Some(&json!(0)), "{after_reset}");
    server.stop().await?;
    Ok(())
}

#[tokio::test]
#[ignore = "needs real vLLM"]
async fn tokenize_gives_the_ids_that_the_engine_uses() -> Result<()> {
    let _turn = TURN.lock().await;
    let options = VllmOptions { algorithm: HashAlgorithm::XxhashCbor, lora: true, ..VllmOptions::default() };
    let server = VllmServer::start(options).await?;
    let tool = json!({ "type": "function", "function": { "name": "get_weather", "parameters": { "type": "object" } } });
    let messages = json!([
        { "role": "system", "content": "answer the question" },
        { "role": "user", "content": "what is the weather in Zürich?" },
    ]);

    for model in [MODEL, LORA] {
        let body = json!({
            "model": model,
            "messages": messages,
            "tools": [tool],
            "tool_choice": "none",
            "chat_template_kwargs": { "enable_thinking": false },
            "max_tokens": 1,
            "return_token_ids": true,
        });
        let tokenized = server.post("/tokenize", &body).await?;
        let answer = server.post("/v1/chat/completions", &body).await?;
        assert!(tokenized["count"].as_u64() > Some(32), "{tokenized}");
        assert_eq!(tokenized["tokens"], answer["prompt_token_ids"], "{model}");
    }
    server.stop().await?;
    Ok(())
}
