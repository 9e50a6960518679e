//! `/metrics` with the names and labels of vLLM 0.32.

use std::fmt::Display;

use super::driver::Snapshot;
use super::engine::EngineOptions;

/// The text exposition of one engine.
pub(super) fn render(model: &str, options: &EngineOptions, snapshot: &Snapshot) -> String {
    let mut text = Text { model, out: String::new() };
    let counters = snapshot.counters;
    text.metric("gauge", "num_requests_running", snapshot.n_running);
    text.metric("gauge", "num_requests_waiting", snapshot.n_waiting);
    text.metric("gauge", "kv_cache_usage_perc", snapshot.usage);
    text.metric("counter", "prefix_cache_queries", counters.prefix_cache_queries);
    text.metric("counter", "prefix_cache_hits", counters.prefix_cache_hits);
    text.metric("counter", "prompt_tokens", counters.prompt_tokens);
    text.metric("counter", "generation_tokens", counters.generation_tokens);
    text.metric("counter", "num_preemptions", counters.preemptions);
    text.metric("counter", "request_success", counters.finished);
    text.cache_config(options);
    text.out
}

struct Text<'a> {
    model: &'a str,
    out: String,
}

impl Text<'_> {
    fn metric(&mut self, kind: &str, name: &str, value: impl Display) {
        let suffix = if kind == "counter" { "_total" } else { "" };
        self.out.push_str(&format!("# TYPE vllm:{name}{suffix} {kind}\n"));
        self.out.push_str(&format!("vllm:{name}{suffix}{{engine=\"0\",model_name=\"{}\"}} {value}\n", self.model));
    }

    fn cache_config(&mut self, options: &EngineOptions) {
        self.out.push_str("# TYPE vllm:cache_config_info gauge\n");
        self.out.push_str(&format!(
            "vllm:cache_config_info{{block_size=\"{}\",engine=\"0\",num_gpu_blocks=\"{}\"}} 1\n",
            options.block_size, options.n_blocks
        ));
    }
}
