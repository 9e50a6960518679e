//! Series that are read from their owner at each scrape, so that they leave with what they describe.

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;

use super::catalog::Kind;
use super::labels::Label;

/// Reads the rows of a scrape from their owner; must neither block nor await.
pub type ReadRows<R> = Box<dyn Fn() -> Vec<R> + Send + Sync>;

/// Names and values of one series' labels.
type LabelValues = Vec<(&'static str, String)>;

/// A thing with series of its own.
pub(super) trait Row: fmt::Debug + Sized + Send + Sync + 'static {
    /// Labels that all its series have.
    const LABELS: &'static [Label];
    /// Its series.
    const SERIES: &'static [Series<Self>];

    /// Values of [`Row::LABELS`].
    fn label_values(&self) -> Vec<String>;
}

/// A metric that each row has.
pub(super) struct Series<R: 'static> {
    pub(super) name: &'static str,
    pub(super) help: &'static str,
    pub(super) kind: Kind,
    pub(super) read: Read<R>,
}

/// How the values are read from a row.
pub(super) enum Read<R> {
    /// One value.
    One(fn(&R) -> u64),
    /// One value, or none where it is not a question.
    Maybe(fn(&R) -> Option<u64>),
    /// A time, or none where there is none yet.
    Seconds(fn(&R) -> Option<Duration>),
    /// One value for each value of a further label.
    By(Label, fn(&R) -> Vec<(&'static str, u64)>),
}

/// One value of a row.
#[derive(Clone, Copy)]
enum Value {
    Count(u64),
    Seconds(Duration),
}

/// The rows of one kind.
pub(super) struct Rows<R> {
    /// Set once, when the owner exists; until then there are no rows.
    read: OnceLock<ReadRows<R>>,
}

impl<R> Series<R> {
    pub(super) const fn counter(name: &'static str, help: &'static str, read: fn(&R) -> u64) -> Self {
        Self { name, help, kind: Kind::Counter, read: Read::One(read) }
    }

    pub(super) const fn gauge(name: &'static str, help: &'static str, read: fn(&R) -> u64) -> Self {
        Self { name, help, kind: Kind::Gauge, read: Read::One(read) }
    }

    /// A gauge whose name ends with its unit.
    pub(super) const fn seconds(name: &'static str, help: &'static str, read: fn(&R) -> Option<Duration>) -> Self {
        Self { name, help, kind: Kind::Gauge, read: Read::Seconds(read) }
    }

    pub(super) const fn counter_by(
        name: &'static str,
        help: &'static str,
        label: Label,
        read: fn(&R) -> Vec<(&'static str, u64)>,
    ) -> Self {
        Self { name, help, kind: Kind::Counter, read: Read::By(label, read) }
    }

    pub(super) const fn gauge_by(
        name: &'static str,
        help: &'static str,
        label: Label,
        read: fn(&R) -> Vec<(&'static str, u64)>,
    ) -> Self {
        Self { name, help, kind: Kind::Gauge, read: Read::By(label, read) }
    }
}

impl<R> Read<R> {
    /// The label that the values are told apart by.
    pub(super) fn label(&self) -> Option<Label> {
        match self {
            Self::One(_) | Self::Maybe(_) | Self::Seconds(_) => None,
            Self::By(label, _) => Some(*label),
        }
    }

    /// The values of `row`, each with its value of the further label.
    fn values(&self, row: &R) -> Vec<(Option<&'static str>, Value)> {
        let count = |value| (None, Value::Count(value));
        match self {
            Self::One(read) => vec![count(read(row))],
            Self::Maybe(read) => read(row).map(count).into_iter().collect(),
            Self::Seconds(read) => read(row).map(|time| (None, Value::Seconds(time))).into_iter().collect(),
            Self::By(_, read) => read(row).into_iter().map(|(name, value)| (Some(name), Value::Count(value))).collect(),
        }
    }
}

impl<R> Rows<R> {
    /// # Panics
    ///
    /// When called twice: the rows have one owner.
    pub(super) fn set(&self, read: ReadRows<R>) {
        assert!(self.read.set(read).is_ok(), "the owner of the rows is set once");
    }

    fn read(&self) -> Vec<R> {
        self.read.get().map_or_else(Vec::new, |read| read())
    }
}

impl<R> Default for Rows<R> {
    fn default() -> Self {
        Self { read: OnceLock::new() }
    }
}

impl<R> fmt::Debug for Rows<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rows").field("set", &self.read.get().is_some()).finish()
    }
}

impl<R: Row> Collector for Rows<R> {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let rows: Vec<(LabelValues, R)> = self.read().into_iter().map(|row| (labels_of(&row), row)).collect();
        for series in R::SERIES {
            let help = format!("{}.", series.help);
            let mut metric = encoder.encode_descriptor(series.name, &help, None, series.kind.metric_type())?;
            for (labels, row) in &rows {
                encode_values(&mut metric, series, labels, row)?;
            }
        }
        Ok(())
    }
}

fn labels_of<R: Row>(row: &R) -> LabelValues {
    R::LABELS.iter().map(|label| label.name).zip(row.label_values()).collect()
}

fn encode_values<R>(metric: &mut MetricEncoder<'_>, series: &Series<R>, labels: &LabelValues, row: &R) -> fmt::Result {
    for (further, value) in series.read.values(row) {
        let further = series.read.label().zip(further).map(|(label, value)| (label.name, value.to_owned()));
        let labels: LabelValues = labels.iter().cloned().chain(further).collect();
        if labels.is_empty() {
            encode_value(metric, series.kind, value)?;
        } else {
            encode_value(&mut metric.encode_family(&labels)?, series.kind, value)?;
        }
    }
    Ok(())
}

fn encode_value(metric: &mut MetricEncoder<'_>, kind: Kind, value: Value) -> fmt::Result {
    match (kind, value) {
        (Kind::Counter, Value::Count(value)) => metric.encode_counter::<NoLabelSet, u64, u64>(&value, None),
        (_, Value::Count(value)) => metric.encode_gauge(&value),
        (_, Value::Seconds(time)) => metric.encode_gauge(&time.as_secs_f64()),
    }
}

impl Kind {
    fn metric_type(self) -> MetricType {
        match self {
            Self::Counter => MetricType::Counter,
            Self::Gauge => MetricType::Gauge,
            Self::Histogram => MetricType::Histogram,
            Self::Info => MetricType::Info,
        }
    }
}

/// What a row without labels has as [`Row::label_values`]; a name for the reader.
pub(super) fn no_labels() -> Vec<String> {
    Vec::new()
}

/// Values of the label `model` alone.
pub(super) fn model_only(model: &Arc<str>) -> Vec<String> {
    vec![model.to_string()]
}
