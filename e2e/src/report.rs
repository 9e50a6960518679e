//! What the runs of the demo amount to: figures per run, medians per policy, a table and a verdict.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use crate::load::{Answered, Outcome};

/// By how many percentage points the cached-token ratio must beat the best rival.
pub const NEEDED_POINTS: f64 = 20.0;

/// The figures of one run.
#[derive(Clone, Debug, PartialEq)]
pub struct Run {
    /// Requests sent.
    pub n_requests: usize,
    /// Why requests were not answered whole, one reason per request.
    pub failures: Vec<String>,
    /// Cached tokens of all prompt tokens, in percent, as the engines reported them.
    pub cached_percent: f64,
    /// Time to first token.
    pub ttft: Ttft,
    /// Answers per engine.
    pub shares: BTreeMap<String, usize>,
}

/// Time to first token of a run, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Ttft {
    /// Arithmetic mean.
    pub mean: f64,
    /// Half of the requests were faster.
    pub p50: f64,
    /// 90 % were faster.
    pub p90: f64,
    /// 99 % were faster.
    pub p99: f64,
}

/// The runs of one policy.
#[derive(Clone, Debug)]
pub struct PolicyRuns {
    /// Name of the policy.
    pub name: &'static str,
    /// Its runs.
    pub runs: Vec<Run>,
}

/// What has to be shown for the demo to succeed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proof {
    /// More cached tokens and a lower time to first token.
    CacheAndLatency,
    /// More cached tokens; on a small machine, real engines disturb each other too much for the time to be proof.
    Cache,
}

impl Run {
    /// Sums up a run.
    pub fn of(outcomes: &[Outcome]) -> Self {
        let mut failures = Vec::new();
        let mut answers: Vec<&Answered> = Vec::new();
        for outcome in outcomes {
            match outcome {
                Outcome::Answered(answered) => answers.push(answered),
                Outcome::Failed(reason) => failures.push(reason.clone()),
            }
        }
        let n_prompt: u64 = answers.iter().map(|answered| answered.n_prompt).sum();
        let n_cached: u64 = answers.iter().map(|answered| answered.n_cached).sum();
        let mut shares = BTreeMap::new();
        for answered in &answers {
            *shares.entry(answered.engine.clone()).or_default() += 1;
        }
        Self {
            n_requests: outcomes.len(),
            failures,
            cached_percent: 100.0 * n_cached as f64 / n_prompt.max(1) as f64,
            ttft: Ttft::of(answers.iter().map(|answered| answered.ttft).collect()),
            shares,
        }
    }

    /// Percent of the answers that each engine gave, the busiest first.
    fn share_percents(&self) -> Vec<f64> {
        let n_answers = self.n_requests - self.failures.len();
        let mut percents: Vec<f64> = self.shares.values().map(|n| 100.0 * *n as f64 / n_answers as f64).collect();
        percents.sort_by(|a, b| b.total_cmp(a));
        percents
    }
}

impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { n_requests, failures, cached_percent, ttft, .. } = self;
        let n_failed = failures.len();
        write!(
            f,
            "{n_requests} requests, {n_failed} failed, {cached_percent:.1} % cached, TTFT mean {:.0} ms",
            ttft.mean
        )
    }
}

impl Ttft {
    fn of(mut times: Vec<Duration>) -> Self {
        times.sort();
        let Some(last) = times.len().checked_sub(1) else {
            return Self::default();
        };
        let ms = |time: Duration| time.as_secs_f64() * 1000.0;
        let percentile = |percent: usize| ms(times[last * percent / 100]);
        let mean = ms(times.iter().sum::<Duration>()) / times.len() as f64;
        Self { mean, p50: percentile(50), p90: percentile(90), p99: percentile(99) }
    }
}

impl PolicyRuns {
    fn median(&self, figure: impl Fn(&Run) -> f64) -> f64 {
        let mut figures: Vec<f64> = self.runs.iter().map(figure).collect();
        figures.sort_by(f64::total_cmp);
        figures.get(figures.len() / 2).copied().unwrap_or_default()
    }

    fn n_failed(&self) -> usize {
        self.runs.iter().map(|run| run.failures.len()).sum()
    }

    fn cached_percent(&self) -> f64 {
        self.median(|run| run.cached_percent)
    }

    fn mean_ttft(&self) -> f64 {
        self.median(|run| run.ttft.mean)
    }

    fn row(&self) -> String {
        let n_requests: usize = self.runs.iter().map(|run| run.n_requests).sum();
        let n_engines = self.runs.iter().map(|run| run.shares.len()).max().unwrap_or(0);
        let share = |idx: usize| self.median(|run| run.share_percents().get(idx).copied().unwrap_or_default());
        let shares: Vec<String> = (0..n_engines).map(|idx| format!("{:.0}", share(idx))).collect();
        format!(
            "{:<14} {:>8} {:>6} {:>8.1} % {:>8.0} {:>7.0} {:>7.0} {:>7.0}   {}",
            self.name,
            n_requests,
            self.n_failed(),
            self.cached_percent(),
            self.mean_ttft(),
            self.median(|run| run.ttft.p50),
            self.median(|run| run.ttft.p90),
            self.median(|run| run.ttft.p99),
            shares.join(" / "),
        )
    }
}

/// The table: one row per policy, medians over its runs.
pub fn table(policies: &[PolicyRuns]) -> String {
    let head =
        "policy         requests failed     cached  TTFT ms: mean   p50     p90     p99   % of answers per engine";
    let rows: Vec<String> = policies.iter().map(PolicyRuns::row).collect();
    format!("{head}\n{}", rows.join("\n"))
}

/// Everything that speaks against `ours`; nothing when the proof is complete.
pub fn faults(rivals: &[PolicyRuns], ours: &PolicyRuns, proof: Proof) -> Vec<String> {
    let mut faults = Vec::new();
    for policy in rivals.iter().chain([ours]) {
        if let Some(reason) = policy.runs.iter().flat_map(|run| &run.failures).next() {
            faults.push(format!(
                "{} requests failed under {}, the first one with: {reason}",
                policy.n_failed(),
                policy.name
            ));
        }
    }
    let cached = rivals.iter().map(PolicyRuns::cached_percent).fold(0.0, f64::max);
    if ours.cached_percent() < cached + NEEDED_POINTS {
        let found = ours.cached_percent();
        faults.push(format!(
            "{found:.1} % cached, expected {NEEDED_POINTS} points more than the best rival's {cached:.1} %"
        ));
    }
    let fastest = rivals.iter().map(PolicyRuns::mean_ttft).fold(f64::INFINITY, f64::min);
    if proof == Proof::CacheAndLatency && ours.mean_ttft() >= fastest {
        let found = ours.mean_ttft();
        faults.push(format!("mean TTFT {found:.0} ms, expected less than the best rival's {fastest:.0} ms"));
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(name: &'static str, cached_percent: f64, mean: f64) -> PolicyRuns {
        let ttft = Ttft { mean, ..Ttft::default() };
        let run = Run { n_requests: 1, failures: Vec::new(), cached_percent, ttft, shares: BTreeMap::new() };
        PolicyRuns { name, runs: vec![run.clone(), Run { cached_percent: 0.0, ..run.clone() }, run] }
    }

    #[test]
    fn percentiles_are_taken_from_sorted_times() {
        let ttft = Ttft::of((0..=100).rev().map(Duration::from_millis).collect());
        assert_eq!((ttft.mean, ttft.p50, ttft.p90, ttft.p99), (50.0, 50.0, 90.0, 99.0));
    }

    #[test]
    fn proof_needs_points_and_time_and_no_failures() {
        let rivals = [runs("a", 30.0, 200.0), runs("b", 40.0, 100.0)];
        let faults = |ours: &PolicyRuns, proof| faults(&rivals, ours, proof).len();
        assert_eq!(faults(&runs("w", 60.0, 90.0), Proof::CacheAndLatency), 0);
        assert_eq!(faults(&runs("w", 59.9, 90.0), Proof::CacheAndLatency), 1);
        assert_eq!(faults(&runs("w", 60.0, 100.0), Proof::CacheAndLatency), 1);
        assert_eq!(faults(&runs("w", 60.0, 100.0), Proof::Cache), 0);
        let mut failed = runs("w", 60.0, 90.0);
        failed.runs[1].failures.push("503".into());
        assert_eq!(faults(&failed, Proof::Cache), 1);
    }
}
