//! Series of the models' tokenizers, read from them at each scrape.

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet};

use super::rows::{Rows, counter, encode_count, gauge};

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

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ModelLabels {
    model: Arc<str>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabels {
    model: Arc<str>,
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabels {
    model: Arc<str>,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabels {
    model: Arc<str>,
    state: &'static str,
}

impl TokenizerRow {
    fn labels(&self) -> ModelLabels {
        ModelLabels { model: self.model.clone() }
    }

    fn result(&self, result: &'static str) -> ResultLabels {
        ResultLabels { model: self.model.clone(), result }
    }
}

/// Name, description and values of a counter with the label `result`.
type ResultSeries = (&'static str, &'static str, fn(&TokenizerRow) -> Vec<(&'static str, u64)>);

const RESULTS: [ResultSeries; 4] = [
    ("tokenizer_cache", "Prompts that were looked for among those whose tokens are remembered", |row| {
        vec![("hit", row.n_cache_hits), ("miss", row.n_cache_misses)]
    }),
    ("tokenizer_comparisons", "Prompts tokenized both by the engines and by the local tokenizer", |row| {
        vec![("equal", row.n_equal), ("different", row.n_different)]
    }),
    ("tokenizer_calls", "Calls to the engines for tokens, and what became of them", |row| row.calls.clone()),
    ("tokenizer_conversations", "Prompts of the local tokenizer, by what the conversation cache did", |row| {
        row.conversations.clone()
    }),
];

impl Collector for Rows<TokenizerRow> {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let rows = self.read();
        for (name, help, values) in RESULTS {
            let mut results = counter(&mut encoder, name, help)?;
            for row in &rows {
                for (result, n) in values(row) {
                    encode_count(&mut results.encode_family(&row.result(result))?, n)?;
                }
            }
        }
        let mut failures = counter(&mut encoder, "tokenizer_failures", "Failed questions to engines, by reason")?;
        for row in &rows {
            for (reason, n) in &row.failures {
                let labels = ReasonLabels { model: row.model.clone(), reason };
                encode_count(&mut failures.encode_family(&labels)?, *n)?;
            }
        }
        let mut breakers = gauge(&mut encoder, "tokenizer_endpoints", "Endpoints asked for tokens, by breaker state")?;
        for row in &rows {
            for (state, n) in &row.breakers {
                let labels = StateLabels { model: row.model.clone(), state };
                breakers.encode_family(&labels)?.encode_gauge(n)?;
            }
        }
        let mut bytes = gauge(&mut encoder, "tokenizer_cache_bytes", "Memory of the prompts' tokens remembered")?;
        for row in &rows {
            bytes.encode_family(&row.labels())?.encode_gauge(&row.cache_bytes)?;
        }
        let help = "Whether the local tokenizer speaks for the engines; absent where that is not a question";
        let mut trusted = gauge(&mut encoder, "tokenizer_trusted", help)?;
        for (row, is_trusted) in rows.iter().filter_map(|row| Some((row, row.is_trusted?))) {
            trusted.encode_family(&row.labels())?.encode_gauge(&u64::from(is_trusted))?;
        }
        Ok(())
    }
}
