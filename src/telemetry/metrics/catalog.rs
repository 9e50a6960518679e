//! What is declared about every instrument, next to the registry that encodes it.
//!
//! The registry of `prometheus-client` cannot be asked for what it holds, and says nothing of a family without
//! series. The reference of all metrics (`docs/metrics.md`) and the tests that keep labels to closed sets need both,
//! so each instrument is registered through [`Catalog`], which remembers it.

use std::sync::Arc;

use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Metric, Registry, Unit};

use super::labels::Label;
use super::process::Process;
use super::rows::{Row, Rows};

/// What every name of ours begins with.
const PREFIX: &str = "warmroute";

/// An instrument as it is declared.
#[derive(Clone, Debug)]
pub struct Instrument {
    /// Name as a query has it; a histogram's series have `_bucket`, `_sum` and `_count` after it.
    pub name: String,
    /// What it measures, as in the text format's help.
    pub help: &'static str,
    /// How it behaves.
    pub kind: Kind,
    /// Its labels, in the order of the text format.
    pub labels: Vec<Label>,
}

/// How an instrument behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows, until the process or what it belongs to ends.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts observations by size.
    Histogram,
    /// Always 1; the labels tell.
    Info,
}

/// The registry, and what is in it.
#[derive(Debug)]
pub(super) struct Catalog {
    /// What is ours, under our prefix.
    pub(super) registry: Registry,
    /// What has a name that others have settled, without the prefix.
    pub(super) foreign: Registry,
    pub(super) instruments: Vec<Instrument>,
}

impl Instrument {
    /// The unit that the name tells, as metrics of Prometheus have it; none for plain counts.
    pub fn unit(&self) -> Option<&'static str> {
        let name = self.name.trim_end_matches("_total");
        ["seconds", "bytes", "tokens", "blocks"].into_iter().find(|unit| name.ends_with(unit))
    }
}

impl Kind {
    /// The kind as the text format names it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
            Self::Info => "info",
        }
    }

    /// What the encoder appends to the name of such an instrument.
    fn suffix(self) -> &'static str {
        match self {
            Self::Counter => "_total",
            Self::Gauge | Self::Histogram => "",
            Self::Info => "_info",
        }
    }
}

impl Catalog {
    /// Adds an instrument that starts from nothing; `name` has neither prefix nor `_total`.
    pub(super) fn add<M: Metric + Clone + Default>(&mut self, name: &str, help: &'static str, labels: &[Label]) -> M {
        let metric = M::default();
        self.declare(name, help, kind_of(&metric), labels);
        self.registry.register(name, help, metric.clone());
        metric
    }

    /// Adds what is known once and for all: a series that is always 1 and whose labels tell.
    pub(super) fn add_info<M: Metric>(&mut self, name: &str, help: &'static str, labels: &[Label], metric: M) {
        self.declare(name, help, kind_of(&metric), labels);
        self.registry.register(name, help, metric);
    }

    /// Adds an instrument of durations; `name` has no unit either.
    pub(super) fn add_seconds<M: Metric + Clone>(
        &mut self,
        name: &str,
        help: &'static str,
        labels: &[Label],
        metric: M,
    ) -> M {
        self.declare(&format!("{name}_seconds"), help, kind_of(&metric), labels);
        self.registry.register_with_unit(name, help, Unit::Seconds, metric.clone());
        metric
    }

    /// Adds all series of what is read at the scrape.
    pub(super) fn add_rows<R: Row>(&mut self) -> Arc<Rows<R>> {
        for series in R::SERIES {
            let labels: Vec<_> = R::LABELS.iter().copied().chain(series.read.label()).collect();
            self.declare(series.name, series.help, series.kind, &labels);
        }
        let rows = Arc::<Rows<R>>::default();
        self.registry.register_collector(Box::new(Arc::clone(&rows)));
        rows
    }

    /// Adds an instrument with a name that others have settled; `name` has no `_total`.
    pub(super) fn add_foreign<M: Metric + Clone>(
        &mut self,
        name: &str,
        help: &'static str,
        labels: &[Label],
        metric: M,
    ) -> M {
        let kind = kind_of(&metric);
        let full_name = format!("{name}{}", kind.suffix());
        self.instruments.push(Instrument { name: full_name, help, kind, labels: labels.to_vec() });
        self.foreign.register(name, help, metric.clone());
        metric
    }

    /// Adds what the kernel knows of the process.
    pub(super) fn add_process(&mut self, process: Process) {
        self.instruments.extend(Process::instruments());
        self.foreign.register_collector(Box::new(process));
    }

    fn declare(&mut self, name: &str, help: &'static str, kind: Kind, labels: &[Label]) {
        let name = format!("{PREFIX}_{name}{}", kind.suffix());
        self.instruments.push(Instrument { name, help, kind, labels: labels.to_vec() });
    }
}

impl Default for Catalog {
    fn default() -> Self {
        Self { registry: Registry::with_prefix(PREFIX), foreign: Registry::default(), instruments: Vec::new() }
    }
}

fn kind_of(metric: &impl Metric) -> Kind {
    match metric.metric_type() {
        MetricType::Counter => Kind::Counter,
        MetricType::Histogram => Kind::Histogram,
        MetricType::Info => Kind::Info,
        _ => Kind::Gauge,
    }
}
