//! Instruments of the export of spans.

use std::sync::Arc;

use super::Metrics;
use super::labels::{Label, SPAN_DROPPED_REASON};
use super::rows::{Row, Series};
use crate::telemetry::trace::export::SpanCounts;

/// What became of the process's spans, at the time of a scrape.
#[derive(Clone, Debug)]
pub(super) struct SpanRow(Arc<SpanCounts>);

impl Row for SpanRow {
    const LABELS: &'static [Label] = &[];
    const SERIES: &'static [Series<Self>] = &[
        Series::counter("spans_exported", "Spans that the collector has taken", |row| row.0.n_exported()),
        Series::counter_by(
            "spans_dropped",
            "Spans that no collector has seen, by what became of them",
            SPAN_DROPPED_REASON,
            |row| row.0.n_dropped().to_vec(),
        ),
    ];

    fn label_values(&self) -> Vec<String> {
        Vec::new()
    }
}

impl Metrics {
    /// Lets each scrape read what became of the spans.
    ///
    /// # Panics
    ///
    /// When called twice.
    pub fn set_span_counts(&self, counts: Arc<SpanCounts>) {
        self.spans.set(Box::new(move || vec![SpanRow(counts.clone())]));
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
