//! Turns the registry's text into OTLP's metrics: counters into cumulative sums, histograms into explicit buckets.

use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, InstrumentationScope, KeyValue};
use opentelemetry_proto::tonic::metrics::v1::metric::Data;
use opentelemetry_proto::tonic::metrics::v1::number_data_point::Value as Number;
use opentelemetry_proto::tonic::metrics::v1::{
    AggregationTemporality, Gauge, Histogram, HistogramDataPoint, Metric, NumberDataPoint, ResourceMetrics,
    ScopeMetrics, Sum,
};
use opentelemetry_proto::tonic::resource::v1::Resource;

use super::exposition::{Family, Sample, families};

/// Between which times the values were counted, in Unix time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    pub(super) start_unix_nanos: u64,
    pub(super) unix_nanos: u64,
}

/// All families of `text`, as of one service.
pub(super) fn request(text: &str, service: Vec<(String, String)>, times: Times) -> ExportMetricsServiceRequest {
    let metrics = families(text).iter().map(|family| metric(family, times)).collect();
    let scope = InstrumentationScope {
        name: env!("CARGO_PKG_NAME").to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ..InstrumentationScope::default()
    };
    let attributes = service.into_iter().map(|(key, value)| attribute(key, value)).collect();
    let scope_metrics = vec![ScopeMetrics { scope: Some(scope), metrics, ..ScopeMetrics::default() }];
    let resource = Some(Resource { attributes, ..Resource::default() });
    let resource_metrics = vec![ResourceMetrics { resource, scope_metrics, ..ResourceMetrics::default() }];
    ExportMetricsServiceRequest { resource_metrics }
}

fn metric(family: &Family<'_>, times: Times) -> Metric {
    let aggregation_temporality = AggregationTemporality::Cumulative.into();
    let numbers = || family.samples.iter().map(|sample| number(sample, times)).collect();
    let data = match family.kind {
        "counter" => Data::Sum(Sum { data_points: numbers(), aggregation_temporality, is_monotonic: true }),
        "histogram" => Data::Histogram(Histogram { data_points: histograms(family, times), aggregation_temporality }),
        _ => Data::Gauge(Gauge { data_points: numbers() }),
    };
    // OTLP has the plain name and the unit beside it; a collector that writes for Prometheus appends both again.
    let name = if family.kind == "info" { format!("{}_info", family.name) } else { family.name.to_owned() };
    Metric {
        name,
        description: family.help.to_owned(),
        unit: unit(family.name).to_owned(),
        data: Some(data),
        ..Metric::default()
    }
}

/// The unit in the notation of UCUM, which OTLP asks for.
fn unit(name: &str) -> &'static str {
    if name.ends_with("_seconds") {
        "s"
    } else if name.ends_with("_bytes") {
        "By"
    } else {
        ""
    }
}

fn number(sample: &Sample<'_>, times: Times) -> NumberDataPoint {
    let value = match sample.value.parse::<i64>() {
        Ok(value) => Number::AsInt(value),
        Err(_) => Number::AsDouble(sample.value.parse().unwrap_or(f64::NAN)),
    };
    NumberDataPoint {
        attributes: attributes(sample),
        start_time_unix_nano: times.start_unix_nanos,
        time_unix_nano: times.unix_nanos,
        value: Some(value),
        ..NumberDataPoint::default()
    }
}

/// One point for each run of samples from `_sum` to the bucket `+Inf`. Prometheus' buckets count what is below their
/// bound, OTLP's what lies between two bounds.
fn histograms(family: &Family<'_>, times: Times) -> Vec<HistogramDataPoint> {
    let mut points: Vec<HistogramDataPoint> = Vec::new();
    let mut n_below = 0;
    for sample in &family.samples {
        let suffix = &sample.name[family.name.len()..];
        if suffix == "_sum" {
            n_below = 0;
            points.push(HistogramDataPoint {
                attributes: attributes(sample),
                start_time_unix_nano: times.start_unix_nanos,
                time_unix_nano: times.unix_nanos,
                sum: sample.value.parse().ok(),
                ..HistogramDataPoint::default()
            });
            continue;
        }
        let Some(point) = points.last_mut() else { continue };
        let count: u64 = sample.value.parse().unwrap_or_default();
        if suffix == "_count" {
            point.count = count;
        } else if let Some((_, bound)) = sample.labels().into_iter().find(|(name, _)| *name == "le") {
            point.bucket_counts.push(count.saturating_sub(n_below));
            n_below = count;
            if let Some(bound) = bound.parse().ok().filter(|bound: &f64| bound.is_finite()) {
                point.explicit_bounds.push(bound);
            }
        }
    }
    points
}

fn attributes(sample: &Sample<'_>) -> Vec<KeyValue> {
    sample.labels().into_iter().map(|(name, value)| attribute(name.to_owned(), value)).collect()
}

fn attribute(key: String, value: String) -> KeyValue {
    KeyValue { key, value: Some(AnyValue { value: Some(Value::StringValue(value)) }), ..KeyValue::default() }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::telemetry::metrics::{Metrics, Stage};

    const TIMES: Times = Times { start_unix_nanos: 1, unix_nanos: 2 };

    fn metric_named(metrics: &Metrics, name: &str) -> Metric {
        let request = request(&metrics.encode(), Vec::new(), TIMES);
        let all = &request.resource_metrics[0].scope_metrics[0].metrics;
        all.iter().find(|metric| metric.name == name).unwrap_or_else(|| panic!("no {name} in {all:?}")).clone()
    }

    #[test]
    fn counters_are_cumulative_sums_with_their_labels() {
        let metrics = Metrics::new();
        metrics.count_fallback("media");
        metrics.count_fallback("media");

        let metric = metric_named(&metrics, "warmroute_fallbacks");
        let Some(Data::Sum(sum)) = metric.data else { panic!("{metric:?}") };

        assert!(sum.is_monotonic);
        assert_eq!(sum.aggregation_temporality(), AggregationTemporality::Cumulative);
        let [point] = sum.data_points.as_slice() else { panic!("{sum:?}") };
        assert_eq!(point.value, Some(Number::AsInt(2)));
        assert_eq!(point.attributes, [attribute("reason".to_owned(), "media".to_owned())]);
        assert_eq!((point.start_time_unix_nano, point.time_unix_nano), (1, 2));
    }

    #[test]
    fn histograms_count_what_lies_between_two_bounds() {
        let metrics = Metrics::new();
        for micros in [15, 30, 35, 10_000_000] {
            metrics.observe_stage(Stage::Lookup, Duration::from_micros(micros));
        }
        metrics.observe_stage(Stage::Pick, Duration::from_micros(30));

        let metric = metric_named(&metrics, "warmroute_stage_duration_seconds");
        assert_eq!(metric.unit, "s");
        let Some(Data::Histogram(histogram)) = metric.data else { panic!("{metric:?}") };

        assert_eq!(histogram.data_points.len(), 2);
        let lookup = attribute("stage".to_owned(), "lookup".to_owned());
        let point = histogram.data_points.iter().find(|point| point.attributes == [lookup.clone()]).unwrap();
        assert_eq!((point.count, &point.bucket_counts[..3]), (4, &[1, 2, 0][..]));
        assert_eq!(point.bucket_counts.iter().sum::<u64>(), 4);
        assert_eq!(point.bucket_counts.last(), Some(&1), "beyond the last bound");
        assert_eq!(point.bucket_counts.len(), point.explicit_bounds.len() + 1);
        assert_eq!(point.explicit_bounds[..2], [20e-6, 40e-6]);
    }

    #[test]
    fn gauges_and_infos_are_gauges() {
        let metrics = Metrics::new();
        let stream = metrics.open_stream();
        for (name, value) in [("warmroute_streams_in_flight", 1), ("warmroute_build_info", 1)] {
            let metric = metric_named(&metrics, name);
            let Some(Data::Gauge(gauge)) = metric.data else { panic!("{metric:?}") };
            assert_eq!(gauge.data_points[0].value, Some(Number::AsInt(value)), "{name}");
        }
        drop(stream);
    }
}
