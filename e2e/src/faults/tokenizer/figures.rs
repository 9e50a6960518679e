//! What a run with a faulty tokenizer showed.

use std::fmt;
use std::time::{Duration, Instant};

use super::watch::Sample;
use crate::load::Answered;

/// Decisions that are looked at together to say which share of them rests on a prefix: 20 of them.
const WINDOW: Duration = Duration::from_secs(1);
/// Share of the decisions that rest on a prefix again when a fault is over.
const MATCHED: f64 = 0.95;

/// Times of one span of the load.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Times {
    /// Requests.
    pub n: usize,
    /// Median time to the first token.
    pub p50: Duration,
    /// 99th percentile; with fewer than 100 requests, the longest.
    pub p99: Duration,
    /// What half of the router's decisions took at most: a bound of its histogram, as is the next.
    pub decision_p50: Duration,
    /// What 99 of 100 decisions took at most.
    pub decision_p99: Duration,
    /// Cached tokens per prompt token, in percent.
    pub cached_percent: u32,
}

/// What a scenario showed.
#[derive(Clone, Debug)]
pub struct TokenizerFigures {
    /// Without the fault.
    pub control: Times,
    /// With it, until the breakers were open; all of its time if they never were.
    pub first: Times,
    /// With it and the breakers open.
    pub open: Option<Times>,
    /// From the beginning of the fault until the breakers of all that fail were open.
    pub opened: Option<Duration>,
    /// Picks by load during the fault, by reason, in percent of all.
    pub fallbacks: Vec<(String, f64)>,
    /// From the end of the fault to the first decision that rests on a prefix.
    pub first_match: Option<Duration>,
    /// From the end of the fault until 95 % of them do.
    pub matched_again: Option<Duration>,
}

/// One run, in which no request failed.
pub(super) struct Run {
    pub(super) control: Instant,
    pub(super) fault: Instant,
    pub(super) end: Instant,
    pub(super) answers: Vec<Answered>,
    /// From the control on.
    pub(super) samples: Vec<Sample>,
    /// Breakers that have to open.
    pub(super) n_faulty: usize,
}

impl Run {
    pub(super) fn figures(&self) -> TokenizerFigures {
        let with_fault = |sample: &&Sample| (self.fault..self.end).contains(&sample.at);
        let mut faulty = self.samples.iter().filter(with_fault);
        let opened = faulty.find(|sample| sample.n_excluded >= self.n_faulty as f64).map(|sample| sample.at);
        let n_before = self.samples.partition_point(|sample| sample.at <= self.end);
        let after = &self.samples[n_before.saturating_sub(1)..];
        let since_end = |at: Instant| at.saturating_duration_since(self.end);
        TokenizerFigures {
            control: self.times(self.control, self.fault),
            first: self.times(self.fault, opened.unwrap_or(self.end)),
            open: opened.map(|opened| self.times(opened, self.end)),
            opened: opened.map(|opened| opened - self.fault),
            fallbacks: self.fallbacks(),
            first_match: first_match(after).map(since_end),
            matched_again: matched_again(after).map(since_end),
        }
    }

    /// What the requests saw that were asked from `start` until `end`.
    fn times(&self, start: Instant, end: Instant) -> Times {
        let asked = |answer: &&Answered| (start..end).contains(&answer.asked_at);
        let answers: Vec<&Answered> = self.answers.iter().filter(asked).collect();
        let mut ttfts: Vec<Duration> = answers.iter().map(|answer| answer.ttft).collect();
        ttfts.sort();
        let quantile = |quantile: f64| ttfts.get((ttfts.len() as f64 * quantile) as usize).copied().unwrap_or_default();
        let sum = |n_tokens: fn(&Answered) -> u64| answers.iter().map(|answer| n_tokens(answer)).sum::<u64>();
        let (n_prompt, n_cached) = (sum(|answer| answer.n_prompt), sum(|answer| answer.n_cached));
        let decisions = self.counted(start, end);
        Times {
            n: ttfts.len(),
            p50: quantile(0.5),
            p99: quantile(0.99),
            decision_p50: decisions.duration(0.5),
            decision_p99: decisions.duration(0.99),
            cached_percent: (n_cached * 100 / n_prompt.max(1)) as u32,
        }
    }

    /// What the router counted from `start` until `end`.
    fn counted(&self, start: Instant, end: Instant) -> Sample {
        let before = |at: Instant| {
            let n_before = self.samples.partition_point(|sample| sample.at <= at);
            &self.samples[n_before.saturating_sub(1)]
        };
        before(end).since(before(start))
    }

    fn fallbacks(&self) -> Vec<(String, f64)> {
        let counted = self.counted(self.fault, self.end);
        let n_decisions = counted.n_decisions().max(1.0);
        let share = |(reason, n): (String, f64)| (reason, n * 100.0 / n_decisions);
        counted.fallbacks.into_iter().filter(|(_, n)| *n > 0.0).map(share).collect()
    }
}

/// When the first decision was seen, of those after the first of `samples`, that rests on a prefix.
fn first_match(samples: &[Sample]) -> Option<Instant> {
    let start = samples.first()?;
    Some(samples.iter().find(|sample| sample.since(start).matched() > 0.0)?.at)
}

/// The start of the first [`WINDOW`] in `samples` in which the decisions rest on prefixes.
pub(super) fn matched_again(samples: &[Sample]) -> Option<Instant> {
    let is_good = |start: &&Sample| {
        let end = samples.iter().find(|sample| sample.at >= start.at + WINDOW);
        end.is_some_and(|end| end.since(start).matched() >= MATCHED)
    };
    Some(samples.iter().find(is_good)?.at)
}

impl TokenizerFigures {
    /// The names of the columns. `TTFT` is p50/p99 of the time to the first token, `decision` the same of the router's
    /// part, in milliseconds.
    pub(in crate::faults) fn header() -> String {
        row(&[
            "scenario",
            "phase",
            "requests",
            "TTFT",
            "decision",
            "cached",
            "opened",
            "matched",
            "95 %",
            "picks by load during the fault",
        ])
    }

    /// A line for each phase.
    pub(in crate::faults) fn rows(&self, name: &str) -> String {
        let time =
            |time: Option<Duration>| time.map_or_else(|| "-".to_owned(), |time| format!("{:.1} s", time.as_secs_f64()));
        let fallbacks: Vec<String> =
            self.fallbacks.iter().map(|(reason, percent)| format!("{reason} {percent:.0} %")).collect();
        let first = self.first.cells();
        let mut lines = vec![
            self.control.row(name, "control"),
            row(&[
                "",
                if self.open.is_some() { "at first" } else { "fault" },
                &first[0],
                &first[1],
                &first[2],
                &first[3],
                &time(self.opened),
                &time(self.first_match),
                &time(self.matched_again),
                &fallbacks.join(", "),
            ]),
        ];
        lines.extend(self.open.map(|open| open.row("", "open")));
        lines.join("\n")
    }
}

impl fmt::Display for TokenizerFigures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\n{}\n{}", Self::header(), self.rows(""))
    }
}

impl Times {
    /// Requests, time to the first token, decision, cached.
    fn cells(&self) -> [String; 4] {
        let millis = |time: Duration| format!("{:.1}", time.as_secs_f64() * 1e3);
        [
            self.n.to_string(),
            format!("{}/{}", millis(self.p50), millis(self.p99)),
            format!("≤ {}/{}", millis(self.decision_p50), millis(self.decision_p99)),
            format!("{} %", self.cached_percent),
        ]
    }

    fn row(&self, name: &str, phase: &str) -> String {
        let [n, ttft, decision, cached] = self.cells();
        row(&[name, phase, &n, &ttft, &decision, &cached, "", "", "", ""])
    }
}

fn row(cells: &[&str; 10]) -> String {
    let [name, phase, n, ttft, decision, cached, opened, matched, again, fallbacks] = cells;
    let line = format!(
        "{name:<26} {phase:<8} {n:>8} {ttft:>13} {decision:>15} {cached:>6} {opened:>7} {matched:>7} {again:>7}  {fallbacks}"
    );
    line.trim_end().to_owned()
}
