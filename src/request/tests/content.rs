//! What passes for text.

use super::*;

fn of_chat(messages: &Value) -> Result<Content, Opaque> {
    let raw = serde_json::value::to_raw_value(messages).expect("JSON");
    Content::of_messages(&raw).map_err(|_| Opaque::Invalid)
}

fn of_input(input: &Value) -> Result<Content, Opaque> {
    let raw = serde_json::value::to_raw_value(input).expect("JSON");
    Content::of_input(&raw).map_err(|_| Opaque::Invalid)
}

fn of_anthropic(content: &Value) -> Result<Content, Opaque> {
    let raw = serde_json::value::to_raw_value(&json!([{"role": "user", "content": content}])).expect("JSON");
    Content::of_anthropic_messages(&raw).map_err(|_| Opaque::Invalid)
}

#[test]
fn a_media_key_makes_media_of_whatever_calls_itself_text() {
    for key in [
        "image_url",
        "input_image",
        "image_pil",
        "image_embeds",
        "audio_url",
        "input_audio",
        "audio_embeds",
        "video_url",
        "input_video",
        "video_embeds",
        "uuid",
    ] {
        let mut part = json!({"type": "text", "text": "x"});
        part[key] = json!("u");
        let message = json!([{"role": "user", "content": ["a", part]}]);
        assert_eq!(of_chat(&message), Ok(Content::Media), "{key} in a part");
        part[key] = Value::Null;
        let message = json!([{"role": "user", "content": [part]}]);
        assert_eq!(of_chat(&message), Ok(Content::Text), "{key} without a value");
        let mut message = json!({"role": "user", "content": "x"});
        message[key] = json!({"url": "u"});
        assert_eq!(of_chat(&json!([message])), Ok(Content::Media), "{key} in a message");
        let mut item = json!({"type": "message", "role": "user", "content": [{"type": "input_text", "text": "x"}]});
        item["content"][0][key] = json!("u");
        assert_eq!(of_input(&json!([item])), Ok(Content::Media), "{key} in an item");
    }
    // Another spelling of the same key is the same key.
    let body = br#"{"messages":[{"role":"user","content":[{"type":"text","text":"x","\u0069mage_url":"u"}]}]}"#;
    assert_eq!(read(Api::ChatCompletions, body).expect("readable").prompt, Prompt::Opaque(Opaque::Media));
}

#[test]
fn keys_that_are_given_twice_are_not_guessed_at() {
    for part in [r#"{"type":"text","type":"image_url"}"#, r#"{"type":null,"type":"text"}"#, r#"{"type":5}"#, "5"] {
        let body = format!(r#"{{"messages":[{{"role":"user","content":[{part}]}}]}}"#);
        let found = read(Api::ChatCompletions, body.as_bytes()).expect("readable").prompt;
        assert_eq!(found, Prompt::Opaque(Opaque::Invalid), "{part}");
    }
    let twice = br#"{"messages":[{"role":"user","content":"x","content":[{"type":"image_url"}]}]}"#;
    assert_eq!(read(Api::ChatCompletions, twice).expect("readable").prompt, Prompt::Opaque(Opaque::Invalid));
}

#[test]
fn items_of_a_response_are_text_if_all_their_parts_are() {
    let text = json!([
        {"role": "user", "content": "a"},
        {"type": "message", "role": "assistant", "status": "completed", "content": [{"type": "output_text", "text": "b"}]},
        {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "c"}],
            "content": [{"type": "reasoning_text", "text": "d"}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "e"},
        {"type": "custom_tool_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "g"}]},
    ]);
    assert_eq!(of_input(&text), Ok(Content::Text));
    for item in [
        json!({"type": "computer_call_output", "output": {}}),
        json!({"type": "item_reference", "id": "x"}),
        json!({"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}),
        json!({"role": "user", "content": [{"text": "no type"}]}),
        json!({"role": "user", "content": {"type": "input_text"}}),
        json!({"type": "function_call_output", "output": {"image_url": "u"}}),
    ] {
        assert_eq!(of_input(&json!([item])), Ok(Content::Media), "{item}");
    }
    let embeds = json!([{"role": "user", "content": [{"type": "prompt_embeds", "data": "AA"}]}]);
    assert_eq!(of_input(&embeds), Ok(Content::Embeddings));
}

#[test]
fn blocks_of_a_message_are_text_if_all_within_them_are() {
    let text = json!([
        {"type": "text", "text": "a"},
        {"type": "thinking", "thinking": "b", "signature": "s"},
        {"type": "redacted_thinking", "data": "x"},
        {"type": "tool_use", "id": "1", "name": "f", "input": {"image_url": "an argument"}},
        {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "c"}, {"type": "tool_reference"}]},
        {"type": "tool_result", "tool_use_id": "1", "content": "d"},
        {"type": "tool_result", "tool_use_id": "1"},
    ]);
    assert_eq!(of_anthropic(&text), Ok(Content::Text));
    assert_eq!(of_anthropic(&json!("a")), Ok(Content::Text));
    for block in [
        json!({"type": "image", "source": {"type": "base64", "data": "AA"}}),
        json!({"type": "document", "source": {}}),
        json!({"type": "tool_result", "content": [{"type": "image", "source": {}}]}),
        json!({"type": "tool_result", "content": {"type": "image"}}),
        json!({"text": "no type"}),
    ] {
        assert_eq!(of_anthropic(&json!([block])), Ok(Content::Media), "{block}");
    }
}

#[test]
fn depth_costs_no_stack() {
    let deep = format!("{}{}", "[".repeat(200_000), "]".repeat(200_000));
    for body in [
        format!(r#"{{"messages":[{{"role":"user","content":[{{"type":"text","text":{deep}}}]}}]}}"#),
        format!(r#"{{"messages":[{{"role":"user","content":[{deep}]}}]}}"#),
        format!(r#"{{"messages":{deep},"input":{deep},"chat_template_kwargs":{{"a":{deep}}}}}"#),
    ] {
        for api in [Api::ChatCompletions, Api::Responses, Api::Messages] {
            let opened = open(api, body.as_bytes()).expect("readable");
            opened.read(&ReadOptions { ask: Ask::Render, ..ReadOptions::default() });
            opened.read(&ReadOptions::default());
        }
    }
}
