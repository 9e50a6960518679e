//! Instruments of what is known of the caches beyond single sources.

use std::sync::Arc;

use super::Metrics;
use super::labels::{Label, MODEL};
use super::rows::{ReadRows, Row, Series, model_only};

/// What our own picks have promised in one pool, at the time of a scrape.
#[derive(Clone, Debug)]
pub struct PromiseRow {
    /// Model name, as configured.
    pub model: Arc<str>,
    /// Blocks that endpoints are expected to hold because requests with them were sent there.
    pub n_blocks: u64,
    /// Promised blocks that made room for others.
    pub n_evicted: u64,
}

impl Row for PromiseRow {
    const LABELS: &'static [Label] = &[MODEL];
    const SERIES: &'static [Series<Self>] = &[
        Series::gauge(
            "promised_blocks",
            "Blocks that endpoints are expected to hold because requests with them were sent there",
            |row| row.n_blocks,
        ),
        Series::counter(
            "promised_blocks_evicted",
            "Promised blocks that made room for others before their time",
            |row| row.n_evicted,
        ),
    ];

    fn label_values(&self) -> Vec<String> {
        model_only(&self.model)
    }
}

impl Metrics {
    /// Lets each scrape read what is promised.
    ///
    /// # Panics
    ///
    /// When called twice.
    pub fn set_promise_collector(&self, read: ReadRows<PromiseRow>) {
        self.promises.set(read);
    }
}
