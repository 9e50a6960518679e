//! What follows from what was seen: a pure function from observations to findings.

mod configured;
mod content;
mod fleet;
mod server;
mod stream;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use serde::{Serialize, Serializer};

use super::seen::Seen;
use super::trial::{Scheme, Trial, trial};
use super::versions::Release;
use crate::config::Model;
use crate::discovery::event_sources::RankSource;

/// How an engine that publishes events is started.
const EVENTS_FLAG: &str = "start the engine with --kv-events-config '{\"enable_kv_cache_events\":true,\
    \"publisher\":\"zmq\",\"endpoint\":\"tcp://*:5557\",\"replay_endpoint\":\"tcp://*:5558\"}'";

/// The checks that decide whether anything can be said.
const REACHABLE: &str = "reachable";
const HASH: &str = "hash";

/// One line of the report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Finding {
    /// The engine's URL; none: all of them together.
    pub(super) engine: Option<String>,
    pub(super) check: &'static str,
    pub(super) verdict: Verdict,
    /// What was seen.
    pub(super) seen: String,
    /// What to change.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) change: Option<String>,
}

/// What a finding means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Ok,
    /// Works, but not as well as it could, or not for everything.
    Warn,
    /// The router cannot follow this engine, or not as it is configured.
    Fault,
    /// Not looked at.
    Skip,
}

impl Verdict {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fault => "FAULT",
            Self::Skip => "skip",
        }
    }
}

impl Serialize for Verdict {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

/// What all findings together mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Good,
    Faults,
    Unjudged,
}

/// What the engines are held against, beside each other.
#[derive(Clone, Debug, Default)]
pub(super) struct Expected {
    pub(super) model: Option<Configured>,
    /// What is tried as `PYTHONHASHSEED`; none: not set.
    pub(super) seeds: Vec<Option<String>>,
    /// Whether requests were sent.
    pub(super) sends: bool,
}

/// What the configuration says of the model.
#[derive(Clone, Debug)]
pub(super) struct Configured {
    pub(super) names: Vec<Arc<str>>,
    pub(super) scheme: Scheme,
    /// Names, and paths where they are known.
    pub(super) adapters: Vec<(Arc<str>, Option<Arc<str>>)>,
    pub(super) sync: bool,
    pub(super) discover: bool,
    pub(super) report: bool,
}

impl Configured {
    pub(super) fn of(model: &Model) -> Self {
        let aliases = model.aliases.iter().map(|alias| Arc::from(alias.as_str()));
        Self {
            names: std::iter::once(model.name.clone()).chain(aliases).collect(),
            scheme: Scheme { algorithm: model.block_hash.algorithm, seed: model.block_hash.pythonhashseed.clone() },
            adapters: model.adapters.iter().map(|adapter| (adapter.name.clone(), adapter.path.clone())).collect(),
            sync: model.events.sync,
            discover: model.events.discover,
            report: model.events.report,
        }
    }
}

/// An engine, with what is computed from what was seen of it once.
struct Patient<'a> {
    seen: &'a Seen,
    release: Option<Release>,
    trial: Trial,
    /// What the configuration says of its ranks.
    configured: &'a [RankSource],
}

/// The findings on engines, each with what the configuration says of its ranks.
pub(super) fn judge(seen: &[(Vec<RankSource>, Seen)], expected: &Expected) -> Vec<Finding> {
    let patients: Vec<Patient<'_>> =
        seen.iter().map(|(configured, seen)| Patient::of(seen, configured, expected)).collect();
    let mut findings = Vec::new();
    for patient in &patients {
        let mut notes = Notes { engine: Some(patient.seen.name.clone()), findings: &mut findings };
        server::judge(patient, &mut notes);
        stream::judge(patient, expected, &mut notes);
        content::judge(patient, expected, &mut notes);
        if let Some(model) = &expected.model {
            configured::judge(patient, model, &mut notes);
        }
    }
    fleet::judge(&patients, &mut Notes { engine: None, findings: &mut findings });
    findings
}

/// Where nobody answers, or where it is not known how an engine hashes, nothing can be promised.
pub(super) fn outcome(findings: &[Finding]) -> Outcome {
    let of = |check| findings.iter().filter(move |finding| finding.check == check);
    if of(REACHABLE).all(|finding| finding.verdict == Verdict::Fault) {
        return Outcome::Unjudged;
    }
    if findings.iter().any(|finding| finding.verdict == Verdict::Fault) {
        return Outcome::Faults;
    }
    if of(HASH).any(|finding| finding.verdict == Verdict::Skip) { Outcome::Unjudged } else { Outcome::Good }
}

impl<'a> Patient<'a> {
    fn of(seen: &'a Seen, configured: &'a [RankSource], expected: &Expected) -> Self {
        let release = seen.version.answer().and_then(|version| Release::parse(version));
        let stored: Vec<_> = seen.ranks.iter().flat_map(|rank| rank.stored.iter().cloned()).collect();
        let prompts: Vec<_> = seen.probes.iter().filter_map(|probe| probe.tokens()).collect();
        Self { seen, release, trial: trial(&stored, &prompts, &expected.seeds), configured }
    }

    /// Whether its release is known to be older than `release`.
    fn is_before(&self, release: Release) -> bool {
        self.release.is_some_and(|this| this < release)
    }
}

/// Takes the findings on one engine, or on all.
struct Notes<'a> {
    engine: Option<String>,
    findings: &'a mut Vec<Finding>,
}

impl Notes<'_> {
    fn note(&mut self, check: &'static str, verdict: Verdict, seen: impl Into<String>, change: Option<String>) {
        self.findings.push(Finding { engine: self.engine.clone(), check, verdict, seen: seen.into(), change });
    }

    fn ok(&mut self, check: &'static str, seen: impl Into<String>) {
        self.note(check, Verdict::Ok, seen, None);
    }

    fn skip(&mut self, check: &'static str, seen: impl Into<String>) {
        self.note(check, Verdict::Skip, seen, None);
    }

    fn warn(&mut self, check: &'static str, seen: impl Into<String>, change: impl Into<String>) {
        self.note(check, Verdict::Warn, seen, Some(change.into()));
    }

    fn fault(&mut self, check: &'static str, seen: impl Into<String>, change: impl Into<String>) {
        self.note(check, Verdict::Fault, seen, Some(change.into()));
    }
}
