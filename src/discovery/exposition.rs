//! What an engine's `/metrics` says about its cache that its events may not.
//!
//! vLLM publishes events from inside a step only. One that goes to sleep drops its KV cache and makes no further step
//! (0.32.0, `v1/engine/core.py`, `sleep`), so `AllBlocksCleared` may never come; and a restart shows in the events only
//! as numbers that begin anew. Two metrics tell: `vllm:engine_sleep_state` (`v1/metrics/loggers.py`) and
//! `process_start_time_seconds` (prometheus_client's process collector, absent with several API servers).

/// What one scrape says; what it does not say is none.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Exposition {
    /// Whether an engine of the endpoint sleeps deeply enough to have lost its cache.
    pub is_asleep: Option<bool>,
    /// When the process started, in Unix seconds.
    pub started_at: Option<f64>,
}

impl Exposition {
    /// Reads the text format of Prometheus, line by line; whatever is not understood is skipped.
    pub fn parse(text: &str) -> Self {
        let mut started_at = None;
        let mut states = SleepStates::default();
        for line in text.lines() {
            let Some((series, value)) = sample(line) else { continue };
            if series == "process_start_time_seconds" {
                started_at = Some(value);
            } else if let Some(labels) = series.strip_prefix("vllm:engine_sleep_state{") {
                states.take(labels, value);
            }
        }
        Self { is_asleep: states.is_asleep(), started_at }
    }
}

/// The gauges of all ranks, which vLLM sets together: one rank that sleeps is enough.
#[derive(Default)]
struct SleepStates {
    awake: Option<bool>,
    /// Levels 1 and 2, which drop the cache. Level 0 only pauses and sets none of them.
    drops_cache: Option<bool>,
}

impl SleepStates {
    fn take(&mut self, labels: &str, value: f64) {
        let is_set = value > 0.0;
        if labels.contains(r#"sleep_state="awake""#) {
            self.awake = Some(self.awake.unwrap_or(true) && is_set);
        } else if labels.contains(r#"sleep_state="weights_offloaded""#)
            || labels.contains(r#"sleep_state="discard_all""#)
        {
            self.drops_cache = Some(self.drops_cache.unwrap_or(false) || is_set);
        }
    }

    /// An engine that is not awake and does not tell how deeply it sleeps is taken to have lost its cache.
    fn is_asleep(&self) -> Option<bool> {
        self.awake.map(|awake| !awake && self.drops_cache.unwrap_or(true))
    }
}

/// `name{labels} value [timestamp]`. A label's value may hold spaces, so the value begins after the last brace.
fn sample(line: &str) -> Option<(&str, f64)> {
    let line = line.trim();
    if line.starts_with('#') {
        return None;
    }
    let end = match line.rfind('}') {
        Some(brace) => brace + 1,
        None => line.find(' ')?,
    };
    let (series, rest) = line.split_at(end);
    let value = rest.split_whitespace().next()?.parse().ok()?;
    Some((series, value))
}

/// What a change from one scrape to the next means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// The engine has dropped its cache.
    Cleared,
    /// The process is another one now.
    Restarted,
}

/// Compares each scrape of one endpoint with the one before.
#[derive(Debug, Default)]
pub struct Backstop {
    seen: Exposition,
}

impl Backstop {
    /// Takes the next scrape, and returns what has changed since the last one. A sleep is told once, at its beginning.
    pub fn observe(&mut self, now: Exposition) -> Vec<Change> {
        let mut changes = Vec::new();
        // A start that is not told keeps the last one that was: the next that is told may still be another.
        if let (Some(before), Some(after)) = (self.seen.started_at, now.started_at)
            && before.to_bits() != after.to_bits()
        {
            changes.push(Change::Restarted);
        }
        if now.is_asleep == Some(true) && self.seen.is_asleep != Some(true) {
            changes.push(Change::Cleared);
        }
        self.seen = Exposition {
            is_asleep: now.is_asleep.or(self.seen.is_asleep),
            started_at: now.started_at.or(self.seen.started_at),
        };
        changes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As vLLM 0.32.0 writes it.
    fn text(awake: u8, offloaded: u8, started_at: &str) -> String {
        let state = |engine: u8, name: &str, value: u8| {
            format!(
                "vllm:engine_sleep_state{{engine=\"{engine}\",model_name=\"a b}}\",sleep_state=\"{name}\"}} {value}.0\n"
            )
        };
        let states = state(0, "awake", 1)
            + &state(1, "awake", awake)
            + &state(1, "weights_offloaded", offloaded)
            + &state(1, "discard_all", 0);
        format!(
            "# HELP process_start_time_seconds Start time\n# TYPE process_start_time_seconds gauge\n\
             process_start_time_seconds {started_at}\n# HELP vllm:engine_sleep_state Engine sleep state; awake = 0\n{states}"
        )
    }

    fn asleep(is_asleep: bool) -> Exposition {
        Exposition { is_asleep: Some(is_asleep), started_at: None }
    }

    fn started(at: f64) -> Exposition {
        Exposition { is_asleep: None, started_at: Some(at) }
    }

    #[test]
    fn sleep_and_start_are_read_from_what_vllm_writes() {
        let read = |awake, offloaded| Exposition::parse(&text(awake, offloaded, "1.76371e+09"));
        assert_eq!(read(1, 0), Exposition { is_asleep: Some(false), started_at: Some(1.76371e9) });
        assert_eq!(read(0, 1).is_asleep, Some(true), "one rank that sleeps is enough");
        assert_eq!(read(0, 0).is_asleep, Some(false), "a pause keeps the cache");
        let old = "vllm:engine_sleep_state{sleep_state=\"awake\"} 0";
        assert_eq!(Exposition::parse(old).is_asleep, Some(true), "how deeply it sleeps is not told");
    }

    #[test]
    fn what_is_no_exposition_says_nothing() {
        for text in ["", "\0\u{1}", "{}", "process_start_time_seconds", "process_start_time_seconds x", "<html>", "} 1"]
        {
            assert_eq!(Exposition::parse(text), Exposition::default(), "{text}");
        }
    }

    #[test]
    fn each_sleep_is_told_once() {
        let mut backstop = Backstop::default();
        let scrapes = [asleep(false), asleep(true), asleep(true), Exposition::default(), asleep(true), asleep(false)];
        let told: Vec<_> = scrapes.into_iter().map(|scrape| backstop.observe(scrape)).collect();
        let once = [vec![], vec![Change::Cleared], vec![], vec![], vec![], vec![]];
        assert_eq!(told, once);
        assert_eq!(backstop.observe(asleep(true)), [Change::Cleared], "the next sleep");
        assert_eq!(Backstop::default().observe(asleep(true)), [Change::Cleared], "found asleep");
    }

    #[test]
    fn another_start_is_another_process() {
        let mut backstop = Backstop::default();
        assert_eq!(backstop.observe(started(1.5)), []);
        assert_eq!(backstop.observe(started(1.5)), []);
        assert_eq!(backstop.observe(Exposition::default()), []);
        assert_eq!(backstop.observe(started(2.5)), [Change::Restarted]);
        assert_eq!(backstop.observe(started(2.5)), []);
    }
}
