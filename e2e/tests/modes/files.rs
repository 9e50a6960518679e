//! The files of a small tokenizer, one token per byte, for the modes that have one of their own.

use std::path::Path;

use serde_json::{Map, Value, json};

const TEMPLATE: &str = "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n\
                        {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// Writes them into `dir`, as a model's repository has them.
pub(crate) fn write(dir: &Path) {
    let write = |name: &str, value: &Value| std::fs::write(dir.join(name), value.to_string()).unwrap();
    write("tokenizer.json", &tokenizer());
    write("tokenizer_config.json", &json!({"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}));
}

fn tokenizer() -> Value {
    let vocab: Map<String, Value> = (0..256).map(|byte| (format!("<0x{byte:02X}>"), byte.into())).collect();
    let added = ["<|im_start|>", "<|im_end|>"].into_iter().zip(256..).map(|(content, id)| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    });
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": null,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": true, "vocab": vocab, "merges": [],
        },
    })
}
