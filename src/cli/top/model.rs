//! What two answers of `/overview` say together: rates, ratios and rows. Pure; time comes with each answer.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use serde::Deserialize;

const MINUTE: Duration = Duration::from_secs(60);

/// The part of `/overview` that is shown. What is absent is 0 or empty: another version may say less.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Overview {
    pub(super) version: String,
    pub(super) ready: bool,
    pub(super) not_ready: Vec<String>,
    pub(super) rollout: String,
    pub(super) totals: Totals,
    pub(super) index: Index,
    pub(super) endpoints: Vec<Endpoint>,
    pub(super) recent: Vec<Recent>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Totals {
    pub(super) decisions: u64,
    pub(super) fallbacks: BTreeMap<String, u64>,
    pub(super) prompt_tokens: u64,
    pub(super) matched_tokens: u64,
    pub(super) left_to_envoy: u64,
    pub(super) refused: u64,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Index {
    pub(super) bytes: u64,
    pub(super) limit_bytes: u64,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Endpoint {
    pub(super) model: String,
    pub(super) endpoint: String,
    pub(super) in_flight: u64,
    pub(super) avoided_ms: Option<u64>,
    pub(super) n_blocks: u64,
    pub(super) decisions: u64,
    pub(super) matched_tokens: u64,
    pub(super) prompt_tokens: u64,
    pub(super) sources: Vec<Source>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Source {
    pub(super) state: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Recent {
    pub(super) request_id: Option<String>,
    pub(super) age_ms: u64,
    pub(super) model: Option<String>,
    pub(super) outcome: Option<String>,
    pub(super) verdict: Option<String>,
    pub(super) prompt_tokens: Option<u64>,
    pub(super) matched_tokens: Option<u64>,
    pub(super) pick: Option<String>,
}

/// The answers of the last minute, oldest first.
#[derive(Debug, Default)]
pub(super) struct History(VecDeque<(Instant, Overview)>);

/// A line of the table of endpoints.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Row {
    pub(super) endpoint: String,
    pub(super) model: String,
    pub(super) state: String,
    pub(super) n_blocks: u64,
    pub(super) in_flight: u64,
    pub(super) rate: f64,
    /// Of the last minute; none where no prompt was looked up.
    pub(super) hit: Option<f64>,
    pub(super) avoided_ms: Option<u64>,
}

/// What the table is sorted by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Column {
    Endpoint,
    Model,
    Blocks,
    InFlight,
    Rate,
    Hit,
}

impl Column {
    pub(super) fn next(self) -> Self {
        match self {
            Self::Endpoint => Self::Model,
            Self::Model => Self::Blocks,
            Self::Blocks => Self::InFlight,
            Self::InFlight => Self::Rate,
            Self::Rate => Self::Hit,
            Self::Hit => Self::Endpoint,
        }
    }
}

impl History {
    /// Takes an answer. Counters that fall are another process's, with which nothing can be compared.
    pub(super) fn take(&mut self, at: Instant, overview: Overview) {
        if self.newest().is_some_and(|last| overview.totals.decisions < last.totals.decisions) {
            self.0.clear();
        }
        self.0.push_back((at, overview));
        // The one that is a minute old or older stays, to compare with.
        while self.0.get(1).is_some_and(|(taken, _)| at.duration_since(*taken) >= MINUTE) {
            self.0.pop_front();
        }
    }

    pub(super) fn newest(&self) -> Option<&Overview> {
        self.0.back().map(|(_, overview)| overview)
    }

    /// Growth per second over the last interval.
    pub(super) fn rate(&self, read: impl Fn(&Overview) -> u64) -> f64 {
        let n = self.0.len();
        if n < 2 {
            return 0.0;
        }
        let ((from, before), (to, now)) = (&self.0[n - 2], &self.0[n - 1]);
        let seconds = to.duration_since(*from).as_secs_f64();
        if seconds > 0.0 { read(now).saturating_sub(read(before)) as f64 / seconds } else { 0.0 }
    }

    /// Matched of all prompt tokens over the last interval.
    pub(super) fn hit_now(&self) -> Option<f64> {
        let from = &self.0.get(self.0.len().checked_sub(2)?)?.1;
        share(&from.totals, &self.newest()?.totals)
    }

    /// The same over the last minute, or what there is of it.
    pub(super) fn hit_minute(&self) -> Option<f64> {
        share(&self.0.front()?.1.totals, &self.newest()?.totals)
    }

    /// The endpoints whose name or model contains `filter`, sorted.
    pub(super) fn rows(&self, filter: &str, by: Column, is_reversed: bool) -> Vec<Row> {
        let Some(newest) = self.newest() else { return Vec::new() };
        let is_wanted = |one: &&Endpoint| one.endpoint.contains(filter) || one.model.contains(filter);
        let mut rows: Vec<Row> = newest.endpoints.iter().filter(is_wanted).map(|one| self.row(one)).collect();
        rows.sort_by(|a, b| {
            let order = match by {
                Column::Endpoint => a.endpoint.cmp(&b.endpoint),
                Column::Model => a.model.cmp(&b.model),
                Column::Blocks => a.n_blocks.cmp(&b.n_blocks),
                Column::InFlight => a.in_flight.cmp(&b.in_flight),
                Column::Rate => a.rate.total_cmp(&b.rate),
                Column::Hit => a.hit.unwrap_or(-1.0).total_cmp(&b.hit.unwrap_or(-1.0)),
            };
            let order = if is_reversed { order.reverse() } else { order };
            order.then_with(|| (&a.model, &a.endpoint).cmp(&(&b.model, &b.endpoint)))
        });
        rows
    }

    fn row(&self, now: &Endpoint) -> Row {
        let find = |overview: &Overview| {
            let is_same = |one: &&Endpoint| one.endpoint == now.endpoint && one.model == now.model;
            overview.endpoints.iter().find(is_same).cloned().unwrap_or_default()
        };
        let before = self.0.front().map(|(_, overview)| find(overview)).unwrap_or_default();
        Row {
            endpoint: now.endpoint.clone(),
            model: now.model.clone(),
            state: states(&now.sources),
            n_blocks: now.n_blocks,
            in_flight: now.in_flight,
            rate: self.rate(|overview| find(overview).decisions),
            hit: ratio(
                now.matched_tokens.saturating_sub(before.matched_tokens),
                now.prompt_tokens.saturating_sub(before.prompt_tokens),
            ),
            avoided_ms: now.avoided_ms,
        }
    }
}

/// The states of an endpoint's ranks, each once, with their number where there are several.
fn states(sources: &[Source]) -> String {
    let mut counts = BTreeMap::new();
    for source in sources {
        *counts.entry(source.state.as_str()).or_insert(0) += 1;
    }
    match (sources.len(), counts.len()) {
        (0, _) => "no events".to_owned(),
        (_, 1) => sources[0].state.clone(),
        _ => counts.iter().map(|(state, n)| format!("{n} {state}")).collect::<Vec<_>>().join(" "),
    }
}

fn share(from: &Totals, to: &Totals) -> Option<f64> {
    ratio(to.matched_tokens.saturating_sub(from.matched_tokens), to.prompt_tokens.saturating_sub(from.prompt_tokens))
}

fn ratio(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::json;

    use super::*;

    pub(in super::super) fn overview(decisions: u64) -> Overview {
        let endpoint = |port: u16, n: u64| {
            json!({"model": "m", "endpoint": format!("10.0.0.1:{port}"), "in_flight": 2, "avoided_ms": null,
                   "n_blocks": n * 10, "decisions": n, "matched_tokens": n * 50, "prompt_tokens": n * 100,
                   "sources": [{"rank": 0, "state": "live"}]})
        };
        let value = json!({
            "version": "0.1.0", "ready": true, "rollout": "active",
            "totals": {"decisions": decisions, "prompt_tokens": decisions * 100, "matched_tokens": decisions * 50,
                       "fallbacks": {"over_budget": 3}},
            "index": {"bytes": 1024, "limit_bytes": 4096, "keyspaces": []},
            "endpoints": [endpoint(8000, decisions), endpoint(8001, 0)],
            "recent": [{"request_id": "abc", "age_ms": 5, "model": "m", "outcome": "prefix_match",
                        "prompt_tokens": 100, "matched_tokens": 50, "pick": "10.0.0.1:8000"}],
        });
        serde_json::from_value(value).expect("an overview")
    }

    fn after(seconds: u64, history: &mut History, start: Instant, decisions: u64) {
        history.take(start + Duration::from_secs(seconds), overview(decisions));
    }

    #[test]
    fn rates_are_of_the_last_interval_and_ratios_of_growth() {
        let (start, mut history) = (Instant::now(), History::default());
        after(0, &mut history, start, 10);
        assert_eq!((history.rate(|o| o.totals.decisions), history.hit_now()), (0.0, None));
        after(2, &mut history, start, 30);
        assert_eq!(history.rate(|o| o.totals.decisions), 10.0);
        assert_eq!((history.hit_now(), history.hit_minute()), (Some(0.5), Some(0.5)));
        let rows = history.rows("", Column::Rate, true);
        assert_eq!((rows[0].endpoint.as_str(), rows[0].rate, rows[0].hit), ("10.0.0.1:8000", 10.0, Some(0.5)));
        assert_eq!((rows[1].rate, rows[1].hit), (0.0, None));
        assert_eq!(history.rows("8001", Column::Endpoint, false).len(), 1);
    }

    #[test]
    fn another_process_begins_anew_and_a_minute_is_kept() {
        let (start, mut history) = (Instant::now(), History::default());
        for second in 0..100 {
            after(second, &mut history, start, second);
        }
        assert_eq!(history.0.len(), 61);
        after(100, &mut history, start, 3);
        assert_eq!(history.0.len(), 1);
    }

    #[test]
    fn states_of_several_ranks_are_counted() {
        let source = |state: &str| Source { state: state.to_owned() };
        assert_eq!(states(&[]), "no events");
        assert_eq!(states(&[source("live"), source("live")]), "live");
        assert_eq!(states(&[source("live"), source("stale")]), "1 live 1 stale");
    }
}
