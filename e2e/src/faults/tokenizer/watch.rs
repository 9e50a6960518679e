//! What the router's metrics show while a scenario runs.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tokio::task::JoinHandle;

const INTERVAL: Duration = Duration::from_millis(100);

/// Counters at one moment, and in a difference of two what was counted between them.
#[derive(Clone, Debug)]
pub(super) struct Sample {
    pub(super) at: Instant,
    /// Decisions by outcome.
    pub(super) decisions: BTreeMap<String, f64>,
    /// Fallbacks by reason.
    pub(super) fallbacks: BTreeMap<String, f64>,
    /// Decisions that took no longer than a bound in seconds, by ascending bound.
    durations: Vec<(f64, f64)>,
    /// Endpoints that requests do not ask for tokens: their breakers are open, or their tokens differ from the others'.
    pub(super) n_excluded: f64,
}

impl Sample {
    fn read(at: Instant, metrics: &str) -> Self {
        let mut sample = Self {
            at,
            decisions: labelled(metrics, "warmroute_decisions_total", "outcome"),
            fallbacks: labelled(metrics, "warmroute_fallbacks_total", "reason"),
            durations: Vec::new(),
            n_excluded: 0.0,
        };
        let breakers = labelled(metrics, "warmroute_tokenizer_endpoints", "state");
        sample.n_excluded = breakers.iter().filter(|(state, _)| *state != "closed").map(|(_, n)| n).sum();
        let buckets = labelled(metrics, "warmroute_decision_duration_seconds_bucket", "le");
        sample.durations = buckets.into_iter().map(|(bound, n)| (bound.parse().unwrap_or(f64::INFINITY), n)).collect();
        sample.durations.sort_by(|a, b| a.0.total_cmp(&b.0));
        sample
    }

    /// What was counted since `earlier`.
    pub(super) fn since(&self, earlier: &Self) -> Self {
        let differences = |now: &BTreeMap<String, f64>, then: &BTreeMap<String, f64>| {
            let difference = |(name, n): (&String, &f64)| (name.clone(), n - then.get(name).unwrap_or(&0.0));
            now.iter().map(difference).collect()
        };
        let durations = self.durations.iter().zip(&earlier.durations);
        Self {
            at: self.at,
            decisions: differences(&self.decisions, &earlier.decisions),
            fallbacks: differences(&self.fallbacks, &earlier.fallbacks),
            durations: durations.map(|((bound, n), (_, then))| (*bound, n - then)).collect(),
            n_excluded: self.n_excluded,
        }
    }

    pub(super) fn n_decisions(&self) -> f64 {
        self.decisions.values().sum()
    }

    /// Share of the decisions that rest on a prefix.
    pub(super) fn matched(&self) -> f64 {
        self.decisions.get("prefix_match").unwrap_or(&0.0) / self.n_decisions().max(1.0)
    }

    /// A bound that the share `quantile` of the decisions kept, the lowest that the histogram knows; zero without
    /// decisions.
    pub(super) fn duration(&self, quantile: f64) -> Duration {
        let n = self.durations.last().map_or(0.0, |(_, n)| *n);
        let within = self.durations.iter().find(|(_, within)| n > 0.0 && *within >= quantile * n);
        within.map_or(Duration::ZERO, |(bound, _)| Duration::try_from_secs_f64(*bound).unwrap_or(Duration::MAX))
    }
}

/// Samples of a router, taken until it is dropped.
pub(super) struct Watch {
    samples: Arc<Mutex<Vec<Sample>>>,
    task: JoinHandle<()>,
}

impl Watch {
    /// Watches the router with this admin address.
    pub(super) fn start(admin: SocketAddr) -> Self {
        let samples = Arc::<Mutex<Vec<Sample>>>::default();
        let task = tokio::spawn(take_samples(format!("http://{admin}/metrics"), samples.clone()));
        Self { samples, task }
    }

    /// The samples from the last one before `start` on.
    ///
    /// # Errors
    /// When there are none.
    pub(super) fn since(&self, start: Instant) -> Result<Vec<Sample>> {
        let samples = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
        let first = samples.iter().rposition(|sample| sample.at <= start).unwrap_or(0);
        ensure!(first < samples.len(), "the router shows no metrics");
        Ok(samples[first..].to_vec())
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn take_samples(url: String, samples: Arc<Mutex<Vec<Sample>>>) {
    let client = crate::http::client_with_timeout(Duration::from_secs(2));
    let mut ticks = tokio::time::interval(INTERVAL);
    loop {
        ticks.tick().await;
        let at = Instant::now();
        let Ok(answer) = client.get(&url).send().await else { continue };
        let Ok(metrics) = answer.text().await else { continue };
        let sample = Sample::read(at, &metrics);
        samples.lock().unwrap_or_else(PoisonError::into_inner).push(sample);
    }
}

/// The values of a metric by one of its labels, series that differ in others added up.
fn labelled(metrics: &str, name: &str, label: &str) -> BTreeMap<String, f64> {
    let mut values = BTreeMap::new();
    for line in metrics.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix('{')) {
        let Some((labels, value)) = line.rsplit_once("} ") else { continue };
        let of_label = |pair: &str| Some(pair.strip_prefix(label)?.strip_prefix("=\"")?.strip_suffix('"')?.to_owned());
        let Some(key) = labels.split(',').find_map(of_label) else { continue };
        *values.entry(key).or_default() += value.parse::<f64>().unwrap_or(0.0);
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(metrics: &str) -> Sample {
        Sample::read(Instant::now(), metrics)
    }

    #[test]
    fn difference_of_two_samples_tells_what_happened_between_them() {
        let metrics = |matched: u32, open: u32, within: u32| {
            sample(&format!(
                "warmroute_decisions_total{{model=\"m\",outcome=\"prefix_match\",policy=\"prefix_cache\"}} {matched}\n\
                 warmroute_decisions_total{{model=\"m\",outcome=\"fallback\",policy=\"least_request\"}} {open}\n\
                 warmroute_fallbacks_total{{reason=\"tokenizer_open\"}} {open}\n\
                 warmroute_decision_duration_seconds_bucket{{le=\"0.1\"}} {within}\n\
                 warmroute_decision_duration_seconds_bucket{{le=\"0.00002\"}} 0\n\
                 warmroute_decision_duration_seconds_bucket{{le=\"+Inf\"}} {}\n",
                matched + open
            ))
        };
        let between = metrics(40, 20, 55).since(&metrics(10, 10, 15));
        assert_eq!((between.n_decisions(), between.matched()), (40.0, 0.75));
        assert_eq!(between.fallbacks["tokenizer_open"], 10.0);
        assert_eq!(
            (between.duration(0.5), between.duration(1.0)),
            (Duration::from_millis(100), Duration::from_millis(100))
        );
    }
}
