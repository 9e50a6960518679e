//! Series of the models' tokenizers, read from them at each scrape.

use std::sync::Arc;

use super::Metrics;
use super::catalog::Kind;
use super::labels::{
    BREAKER_STATE, CACHE_RESULT, CALL_REASON, CALL_RESULT, COMPARISON_RESULT, CONVERSATION_RESULT, Label, MODEL,
};
use super::rows::{Read, ReadRows, Row, Series, model_only};

/// A model's tokenizer at the time of a scrape; counts are since the start.
#[derive(Clone, Debug, Default)]
pub struct TokenizerRow {
    /// Model name, as configured.
    pub model: Arc<str>,
    /// Prompts whose tokens were remembered.
    pub n_cache_hits: u64,
    /// Prompts whose tokens were not.
    pub n_cache_misses: u64,
    /// Memory of what is remembered.
    pub cache_bytes: u64,
    /// Whether the local tokenizer speaks for the engines; none where that is not a question.
    pub is_trusted: Option<bool>,
    /// Prompts of which the local tokenizer's ids were those of the engines.
    pub n_equal: u64,
    /// Prompts of which they were not.
    pub n_different: u64,
    /// Calls to the engines and what became of them, by name.
    pub calls: Vec<(&'static str, u64)>,
    /// Failed questions to engines, by reason.
    pub failures: Vec<(&'static str, u64)>,
    /// Endpoints that are asked for tokens, by the state of their breakers.
    pub breakers: Vec<(&'static str, u64)>,
    /// Prompts of the local tokenizer, by what the conversation cache did for them.
    pub conversations: Vec<(&'static str, u64)>,
}

impl Row for TokenizerRow {
    const LABELS: &'static [Label] = &[MODEL];
    const SERIES: &'static [Series<Self>] = &[
        Series::counter_by(
            "tokenizer_cache",
            "Prompts that were looked for among those whose tokens are remembered",
            CACHE_RESULT,
            |row| vec![("hit", row.n_cache_hits), ("miss", row.n_cache_misses)],
        ),
        Series::counter_by(
            "tokenizer_comparisons",
            "Prompts tokenized both by the engines and by the local tokenizer",
            COMPARISON_RESULT,
            |row| vec![("equal", row.n_equal), ("different", row.n_different)],
        ),
        Series::counter_by(
            "tokenizer_calls",
            "Calls to the engines for tokens, and what became of them",
            CALL_RESULT,
            |row| row.calls.clone(),
        ),
        Series::counter_by(
            "tokenizer_conversations",
            "Prompts of the local tokenizer, by what the conversation cache did",
            CONVERSATION_RESULT,
            |row| row.conversations.clone(),
        ),
        Series::counter_by("tokenizer_failures", "Failed questions to engines, by reason", CALL_REASON, |row| {
            row.failures.clone()
        }),
        Series::gauge_by("tokenizer_endpoints", "Endpoints asked for tokens, by breaker state", BREAKER_STATE, |row| {
            row.breakers.clone()
        }),
        Series::gauge("tokenizer_cache_bytes", "Memory of the prompts' tokens remembered", |row| row.cache_bytes),
        Series {
            name: "tokenizer_trusted",
            help: "Whether the local tokenizer speaks for the engines; absent where that is not a question",
            kind: Kind::Gauge,
            read: Read::Maybe(|row| row.is_trusted.map(u64::from)),
        },
    ];

    fn label_values(&self) -> Vec<String> {
        model_only(&self.model)
    }
}

impl Metrics {
    /// Lets each scrape read the models' tokenizers.
    ///
    /// # Panics
    ///
    /// When called twice.
    pub fn set_tokenizer_collector(&self, read: ReadRows<TokenizerRow>) {
        self.tokenizers.set(read);
    }
}
