//! Instruments of what is known of the caches beyond single sources.

use std::sync::Arc;

use super::Metrics;
use super::labels::{Label, MODEL};
use super::rows::{ReadRows, Row, Series, model_only, no_labels};

/// The index of all models at the time of a scrape.
#[derive(Clone, Copy, Debug)]
pub struct IndexRow {
    /// Memory that is accounted to it.
    pub n_bytes: u64,
    /// Memory that it may have.
    pub limit_bytes: u64,
    /// Spaces of hashes, one for each model, block size and kind of hash in use.
    pub n_keyspaces: u64,
}

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

impl Row for IndexRow {
    const LABELS: &'static [Label] = &[];
    const SERIES: &'static [Series<Self>] = &[
        Series::gauge("index_bytes", "Memory of the index of all models", |row| row.n_bytes),
        Series::gauge("index_limit_bytes", "Memory that the index may have; beyond it blocks are refused", |row| {
            row.limit_bytes
        }),
        Series::gauge(
            "index_keyspaces",
            "Spaces of hashes in the index: one for each model, block size and kind of hash in use",
            |row| row.n_keyspaces,
        ),
    ];

    fn label_values(&self) -> Vec<String> {
        no_labels()
    }
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

/// How far the predictions of cached blocks came true in one pool, at the time of a scrape.
#[derive(Clone, Debug)]
pub struct PredictionRow {
    /// Model name, as configured.
    pub model: Arc<str>,
    /// Blocks that picked endpoints were said to hold, of requests that were served there and have ended.
    pub n_predicted: u64,
    /// Those of them that were stored again.
    pub n_stored_again: u64,
}

impl Row for PredictionRow {
    const LABELS: &'static [Label] = &[MODEL];
    const SERIES: &'static [Series<Self>] = &[
        Series::counter(
            "predicted_blocks",
            "Blocks that picked endpoints were said to hold, of requests that were served there and have ended",
            |row| row.n_predicted,
        ),
        Series::counter(
            "overpredicted_blocks",
            "Blocks that picked endpoints were said to hold, and have stored again; at least half of them are counted",
            |row| row.n_stored_again,
        ),
    ];

    fn label_values(&self) -> Vec<String> {
        model_only(&self.model)
    }
}

impl Metrics {
    /// Lets each scrape read the index as a whole: one row.
    ///
    /// # Panics
    ///
    /// When called twice: there is one index.
    pub fn set_index_collector(&self, read: ReadRows<IndexRow>) {
        self.index.set(read);
    }

    /// Lets each scrape read how far the predictions came true.
    ///
    /// # Panics
    ///
    /// When called twice.
    pub fn set_prediction_collector(&self, read: ReadRows<PredictionRow>) {
        self.predictions.set(read);
    }

    /// Lets each scrape read what is promised.
    ///
    /// # Panics
    ///
    /// When called twice.
    pub fn set_promise_collector(&self, read: ReadRows<PromiseRow>) {
        self.promises.set(read);
    }
}
