//! How long the steps of a decision take, and their spans.

use std::time::{Duration, Instant};

use crate::routing::pick::Timings;
use crate::telemetry::metrics::{Metrics, Stage};
use crate::telemetry::trace::StageSpan;

/// Times the steps of one decision, for the instruments and for the decision itself.
#[derive(Debug)]
pub(super) struct Timer<'a> {
    /// None in a dry run, which is not counted.
    metrics: Option<&'a Metrics>,
    started: Instant,
    timings: Timings,
}

impl<'a> Timer<'a> {
    /// Starts now, and tells the instruments of every step.
    pub(super) fn counting(metrics: &'a Metrics) -> Self {
        Self { metrics: Some(metrics), ..Self::silent() }
    }

    /// Starts now, and tells nobody.
    pub(super) fn silent() -> Self {
        Self { metrics: None, started: Instant::now(), timings: Timings::default() }
    }

    /// Takes a step.
    pub(super) fn timed<T>(&mut self, stage: Stage, step: impl FnOnce() -> T) -> T {
        let started = Instant::now();
        let value = StageSpan::open(stage).within(step);
        self.note(stage, started.elapsed());
        value
    }

    /// Takes a step that waits.
    pub(super) async fn timed_wait<T>(&mut self, stage: Stage, step: impl Future<Output = T>) -> T {
        let started = Instant::now();
        let value = StageSpan::open(stage).during(step).await;
        self.note(stage, started.elapsed());
        value
    }

    /// Somebody is picked. What is left or refused is dropped instead: it often takes a fraction of the time, and would
    /// hide what decisions take.
    pub(super) fn picked(mut self) -> Timings {
        self.timings.total = self.started.elapsed();
        if let Some(metrics) = self.metrics {
            metrics.observe_decision(self.timings.total);
            for (stage, elapsed) in self.stages().into_iter().filter(|(_, elapsed)| !elapsed.is_zero()) {
                metrics.observe_stage(stage, elapsed);
            }
        }
        self.timings
    }

    fn note(&mut self, stage: Stage, elapsed: Duration) {
        let timing = match stage {
            Stage::Parse => &mut self.timings.parse,
            Stage::Tokenize => &mut self.timings.tokenize,
            Stage::Hash => &mut self.timings.hash,
            Stage::Lookup => &mut self.timings.lookup,
            Stage::Pick => &mut self.timings.pick,
        };
        // Hashing and looking up are done once for each keyspace.
        *timing += elapsed;
    }

    /// The steps, with nothing for those that were not taken.
    fn stages(&self) -> [(Stage, Duration); 5] {
        let Timings { parse, tokenize, hash, lookup, pick, total: _ } = self.timings;
        [
            (Stage::Parse, parse),
            (Stage::Tokenize, tokenize),
            (Stage::Hash, hash),
            (Stage::Lookup, lookup),
            (Stage::Pick, pick),
        ]
    }
}
