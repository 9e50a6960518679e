use std::net::SocketAddr;
use std::time::Duration;

use super::*;
use crate::routing::pick::{Outcome, Policy};

fn model() -> Arc<str> {
    Arc::from("llama")
}

fn endpoint_row(port: u16, n_in_flight: u64) -> EndpointRow {
    EndpointRow { model: model(), endpoint: SocketAddr::from(([10, 0, 0, 1], port)), n_in_flight }
}

fn source_row() -> SourceRow {
    SourceRow {
        model: model(),
        endpoint: SocketAddr::from(([10, 0, 0, 1], 8000)),
        rank: 1,
        state: "live",
        proved: true,
        disproved: false,
        n_blocks: 7,
        n_batches: 6,
        n_stored: 5,
        n_removed: 4,
        n_cleared: 3,
        n_gaps: 2,
        n_replays: 1,
        decode_failures: vec![("truncated", 8)],
        n_skipped: 9,
        n_refused: 10,
        n_quarantines: 11,
        n_panics: 12,
        n_generations: 13,
        lag: None,
    }
}

#[track_caller]
fn assert_line(text: &str, line: &str) {
    assert!(text.lines().any(|found| found == line), "no line {line:?} in:\n{text}");
}

#[test]
fn counts_appear_under_their_labels() {
    let metrics = Metrics::new();
    metrics.count_decision(&model(), &Outcome::PrefixMatch, Policy::PrefixCache);
    metrics.count_decision(&model(), &Outcome::PrefixMatch, Policy::PrefixCache);
    metrics.count_fallback("tokenizer_timeout");
    metrics.count_tokens(&model(), 100, 64);
    metrics.count_left_to_envoy("unknown_model");
    metrics.count_immediate_response("no_endpoint");
    metrics.count_stream_panic();
    metrics.count_misconfigured_stream("streamed");
    metrics.count_pick_not_served(&model(), NotServedCause::OtherEndpoint);
    metrics.count_endpoint_avoided(&model());
    metrics.count_event_sources_refused(&model(), 2);
    metrics.count_listing(&model(), 3, [("added", 3), ("left", 0), ("moved", 0)]);
    metrics.count_snapshot(SnapshotStep::Write, 100);
    metrics.count_snapshot_failure(SnapshotStep::Fetch);

    let text = metrics.encode();
    for line in [
        r#"warmroute_decisions_total{model="llama",outcome="prefix_match",policy="prefix_cache"} 2"#,
        r#"warmroute_fallbacks_total{reason="tokenizer_timeout"} 1"#,
        r#"warmroute_prompt_tokens_total{model="llama"} 100"#,
        r#"warmroute_matched_tokens_total{model="llama"} 64"#,
        r#"warmroute_left_to_envoy_total{reason="unknown_model"} 1"#,
        r#"warmroute_immediate_responses_total{reason="no_endpoint"} 1"#,
        "warmroute_stream_panics_total 1",
        r#"warmroute_misconfigured_streams_total{mode="streamed"} 1"#,
        r#"warmroute_picks_not_served_total{model="llama",cause="other_endpoint"} 1"#,
        r#"warmroute_endpoint_avoided_total{model="llama"} 1"#,
        r#"warmroute_event_sources_refused_total{model="llama"} 2"#,
        r#"warmroute_endpoints{model="llama"} 3"#,
        r#"warmroute_snapshots_total{step="write"} 1"#,
        r#"warmroute_snapshot_bytes_total{step="write"} 100"#,
        r#"warmroute_snapshot_failures_total{step="fetch"} 1"#,
        concat!(r#"warmroute_build_info{version=""#, env!("CARGO_PKG_VERSION"), r#""} 1"#),
        "# EOF",
    ] {
        assert_line(&text, line);
    }
}

#[test]
fn durations_fall_into_buckets_from_20_microseconds_to_2_seconds() {
    let metrics = Metrics::new();
    metrics.observe_decision(Duration::from_micros(15));
    metrics.observe_decision(Duration::from_millis(2500));
    metrics.observe_stage(Stage::Lookup, Duration::from_micros(30));

    let text = metrics.encode();
    assert_line(&text, r#"warmroute_decision_duration_seconds_bucket{le="0.00002"} 1"#);
    assert_line(&text, r#"warmroute_decision_duration_seconds_bucket{le="2.62144"} 2"#);
    assert_line(&text, r#"warmroute_stage_duration_seconds_count{stage="lookup"} 1"#);
}

#[test]
fn added_model_has_its_series_at_zero() {
    let metrics = Metrics::new();
    metrics.add_model(&model());

    let text = metrics.encode();
    assert_line(&text, r#"warmroute_decisions_total{model="llama",outcome="no_match",policy="least_request"} 0"#);
    assert_line(&text, r#"warmroute_endpoints{model="llama"} 0"#);
}

#[test]
fn open_stream_is_in_flight_until_it_is_dropped() {
    let metrics = Metrics::new();
    let stream = metrics.open_stream();
    assert_line(&metrics.encode(), "warmroute_streams_in_flight 1");

    drop(stream);

    let text = metrics.encode();
    assert_line(&text, "warmroute_streams_in_flight 0");
    assert_line(&text, "warmroute_streams_total 1");
}

#[test]
fn series_of_an_endpoint_leave_with_it() {
    let metrics = Metrics::new();
    let rows = Arc::new(std::sync::Mutex::new(vec![endpoint_row(8000, 2), endpoint_row(8001, 0)]));
    let reader = Arc::clone(&rows);
    metrics.set_endpoint_collector(Box::new(move || reader.lock().unwrap().clone()));
    assert_line(&metrics.encode(), r#"warmroute_endpoint_in_flight{model="llama",endpoint="10.0.0.1:8000"} 2"#);

    rows.lock().unwrap().remove(0);

    let text = metrics.encode();
    assert!(!text.contains("10.0.0.1:8000"), "{text}");
    assert_line(&text, r#"warmroute_endpoint_in_flight{model="llama",endpoint="10.0.0.1:8001"} 0"#);
}

#[test]
fn the_lag_of_a_source_is_in_seconds_and_leaves_with_it() {
    let metrics = Metrics::new();
    let lag = Arc::new(std::sync::Mutex::new(vec![Some(Duration::from_millis(250)), None]));
    let reader = Arc::clone(&lag);
    let row = |(lag, rank): (&Option<Duration>, u32)| SourceRow { rank, lag: *lag, ..source_row() };
    let rows = move || reader.lock().unwrap().iter().zip(0..).map(row).collect();
    metrics.set_source_collector(Box::new(rows));
    let lags = || {
        let text = metrics.encode();
        let lines = text.lines().filter(|line| line.starts_with("warmroute_event_source_lag_seconds{"));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    let series = r#"warmroute_event_source_lag_seconds{model="llama",endpoint="10.0.0.1:8000",rank="0"} 0.25"#;
    assert_eq!(lags(), [series], "a source that has sent nothing live has none");

    lag.lock().unwrap().clear();
    assert!(lags().is_empty());
}

#[test]
fn event_plane_has_its_series_without_labels() {
    let metrics = Metrics::new();
    metrics.set_event_plane_collector(Box::new(|| vec![EventPlaneRow { n_foreign_messages: 3, n_replays: 2 }]));

    let text = metrics.encode();
    assert_line(&text, "warmroute_event_foreign_messages_total 3");
    assert_line(&text, "warmroute_event_replays_in_flight 2");
}

#[test]
fn what_is_promised_has_its_series() {
    let metrics = Metrics::new();
    let row = PredictionRow { model: "m".into(), n_predicted: 5, n_stored_again: 4 };
    metrics.set_prediction_collector(Box::new(move || vec![row.clone()]));
    assert_line(&metrics.encode(), r#"warmroute_predicted_blocks_total{model="m"} 5"#);
    assert_line(&metrics.encode(), r#"warmroute_overpredicted_blocks_total{model="m"} 4"#);
    let row = PromiseRow { model: "m".into(), n_blocks: 3, n_evicted: 2 };
    metrics.set_promise_collector(Box::new(move || vec![row.clone()]));
    let text = metrics.encode();
    assert_line(&text, r#"warmroute_promised_blocks{model="m"} 3"#);
    assert_line(&text, r#"warmroute_promised_blocks_evicted_total{model="m"} 2"#);
}

#[test]
fn tokenizers_have_their_series() {
    let metrics = Metrics::new();
    let row = TokenizerRow {
        model: "m".into(),
        n_cache_hits: 1,
        n_cache_misses: 2,
        cache_bytes: 3,
        is_trusted: Some(true),
        n_equal: 4,
        n_different: 5,
        calls: vec![("asked", 6)],
        failures: vec![("overdue", 7)],
        breakers: vec![("open", 8)],
        conversations: vec![("reused", 9)],
    };
    metrics.set_tokenizer_collector(Box::new(move || vec![row.clone()]));
    let text = metrics.encode();
    for line in [
        r#"warmroute_tokenizer_cache_total{model="m",result="hit"} 1"#,
        r#"warmroute_tokenizer_cache_total{model="m",result="miss"} 2"#,
        r#"warmroute_tokenizer_cache_bytes{model="m"} 3"#,
        r#"warmroute_tokenizer_trusted{model="m"} 1"#,
        r#"warmroute_tokenizer_comparisons_total{model="m",result="equal"} 4"#,
        r#"warmroute_tokenizer_comparisons_total{model="m",result="different"} 5"#,
        r#"warmroute_tokenizer_calls_total{model="m",result="asked"} 6"#,
        r#"warmroute_tokenizer_failures_total{model="m",reason="overdue"} 7"#,
        r#"warmroute_tokenizer_endpoints{model="m",state="open"} 8"#,
        r#"warmroute_tokenizer_conversations_total{model="m",result="reused"} 9"#,
    ] {
        assert_line(&text, line);
    }
}

#[test]
fn every_count_of_a_source_has_a_series() {
    let metrics = Metrics::new();
    metrics.set_source_collector(Box::new(|| vec![source_row()]));

    let text = metrics.encode();
    let labels = r#"model="llama",endpoint="10.0.0.1:8000",rank="1""#;
    assert_line(&text, &format!(r#"warmroute_event_decode_failures_total{{{labels},kind="truncated"}} 8"#));
    assert_line(&text, &format!(r#"warmroute_source_state{{{labels},state="live"}} 1"#));
    for (kind, n) in [("stored", 5), ("removed", 4), ("cleared", 3)] {
        assert_line(&text, &format!(r#"warmroute_events_total{{{labels},kind="{kind}"}} {n}"#));
    }
    for (name, value) in [
        ("index_blocks", 7),
        ("index_source_proved", 1),
        ("event_batches_total", 6),
        ("event_gaps_total", 2),
        ("event_replays_total", 1),
        ("event_skipped_total", 9),
        ("index_refused_blocks_total", 10),
        ("index_source_disproved", 0),
    ] {
        assert_line(&text, &format!("warmroute_{name}{{{labels}}} {value}"));
    }
}
