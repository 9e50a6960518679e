//! Counters of spans, read from the export at each scrape.

use std::sync::Arc;

use super::Metrics;
use super::labels::{Label, SPAN_DROP_REASON};
use super::rows::{Row, Series, no_labels};
use crate::telemetry::trace::export::SpanCounts;

/// What the process has counted of its spans.
#[derive(Clone, Debug)]
pub(super) struct SpanRow {
    n_exported: u64,
    n_dropped: Vec<(&'static str, u64)>,
}

impl Row for SpanRow {
    const LABELS: &'static [Label] = &[];
    const SERIES: &'static [Series<Self>] = &[
        Series::counter("spans_exported", "Spans that the collector has taken", |row| row.n_exported),
        Series::counter_by("spans_dropped", "Spans that were dropped, by reason", SPAN_DROP_REASON, |row| {
            row.n_dropped.clone()
        }),
    ];

    fn label_values(&self) -> Vec<String> {
        no_labels()
    }
}

impl Metrics {
    /// Sets where the counters of spans are.
    ///
    /// # Panics
    ///
    /// When called twice: the process has one export.
    pub fn set_span_counts(&self, counts: Arc<SpanCounts>) {
        let row = move || {
            vec![SpanRow { n_exported: counts.n_exported(), n_dropped: counts.n_dropped().into_iter().collect() }]
        };
        self.spans.set(Box::new(row));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_there_before_any_span() {
        let metrics = Metrics::new();
        metrics.set_span_counts(Arc::default());
        let text = metrics.encode();
        for line in [
            "warmroute_spans_exported_total 0\n",
            "warmroute_spans_dropped_total{reason=\"queue_full\"} 0\n",
            "warmroute_spans_dropped_total{reason=\"export_failed\"} 0\n",
        ] {
            assert!(text.contains(line), "{line} is not in {text}");
        }
    }
}
