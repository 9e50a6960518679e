//! Instruments of the rollout: modes, what shadow decisions would have been worth, reloads, and the record.

use std::fmt;
use std::sync::Arc;

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;

use super::catalog::Catalog;
use super::labels::{CONFIG_HASH, MODEL, RECORD_REASON, RELOAD_RESULT, ROLLOUT_MODE, SHADOW_AGREED, SHADOW_WHO};
use super::{Metrics, ModelLabels};

/// Registered with the others, in [`Metrics`].
#[derive(Debug)]
pub(super) struct Instruments {
    mode: Family<ModeLabels, Gauge>,
    percent: Family<ModelLabels, Gauge>,
    shadow_decisions: Family<AgreedLabels, Counter>,
    shadow_matched_tokens: Family<WhoLabels, Counter>,
    reloads: Family<ReloadLabels, Counter>,
    last_reload_successful: Gauge,
    config_info: Family<HashLabels, Gauge>,
    recorded: Counter,
    record_dropped: Family<DroppedLabels, Counter>,
}

/// What came of looking at a configuration file that has changed, or that we were told to look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reload {
    /// All that is different in it holds now.
    Applied,
    /// No setting is different.
    UnchangedSettings,
    /// Some of what is different holds at the next start only; the rest holds now.
    RestartNeeded,
    /// It has faults, and what was in force stays.
    Refused,
    /// It cannot be read, and what was in force stays.
    Unreadable,
}

/// Why a line is missing in the record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RecordDropped {
    /// Requests came faster than lines are written.
    QueueFull,
    /// The file cannot be written.
    WriteFailed,
    /// The line alone is longer than a file may be.
    TooLong,
}

/// Whom Envoy's own policy picked, as against a pick in shadow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Agreed {
    /// The same endpoint.
    True,
    /// Another one.
    False,
    /// Nobody told: the request was not served by an endpoint that we know.
    Unknown,
}

impl Reload {
    const ALL: [Self; 5] =
        [Self::Applied, Self::UnchangedSettings, Self::RestartNeeded, Self::Refused, Self::Unreadable];

    /// The label's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Applied => "applied",
            Self::UnchangedSettings => "unchanged_settings",
            Self::RestartNeeded => "restart_needed",
            Self::Refused => "refused",
            Self::Unreadable => "unreadable",
        }
    }

    /// Whether what can hold of the file does.
    fn is_success(self) -> bool {
        !matches!(self, Self::Refused | Self::Unreadable)
    }
}

impl RecordDropped {
    const ALL: [Self; 3] = [Self::QueueFull, Self::WriteFailed, Self::TooLong];

    /// The label's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::QueueFull => "queue_full",
            Self::WriteFailed => "write_failed",
            Self::TooLong => "too_long",
        }
    }
}

impl Agreed {
    const ALL: [Self; 3] = [Self::True, Self::False, Self::Unknown];

    /// The label's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::True => "true",
            Self::False => "false",
            Self::Unknown => "unknown",
        }
    }
}

impl EncodeLabelValue for Reload {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        self.as_str().encode(encoder)
    }
}

impl EncodeLabelValue for RecordDropped {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        self.as_str().encode(encoder)
    }
}

impl EncodeLabelValue for Agreed {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        self.as_str().encode(encoder)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ModeLabels {
    model: Arc<str>,
    mode: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AgreedLabels {
    model: Arc<str>,
    agreed: Agreed,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WhoLabels {
    model: Arc<str>,
    who: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReloadLabels {
    result: Reload,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct HashLabels {
    hash: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DroppedLabels {
    reason: RecordDropped,
}

impl Instruments {
    pub(super) fn register(catalog: &mut Catalog) -> Self {
        let c = catalog;
        let instruments = Self {
            mode: c.add(
                "rollout_mode",
                "Whether this is the mode of the model's picks: 1 or 0",
                &[MODEL, ROLLOUT_MODE],
            ),
            percent: c.add(
                "rollout_percent",
                "Configured share of the requests whose picks Envoy is told, in percent; it applies where rollout_mode is active",
                &[MODEL],
            ),
            shadow_decisions: c.add(
                "shadow_decisions",
                "Decisions that Envoy was not told, by whether its own policy picked the same endpoint",
                &[MODEL, SHADOW_AGREED],
            ),
            shadow_matched_tokens: c.add(
                "shadow_matched_tokens",
                "Prompt tokens that the pick in shadow held, and that the endpoint held which served instead",
                &[MODEL, SHADOW_WHO],
            ),
            reloads: c.add("config_reloads", "Looks at a configuration file that may have changed", &[RELOAD_RESULT]),
            last_reload_successful: c.add(
                "config_last_reload_successful",
                "Whether the configuration file could be used when it was last looked at",
                &[],
            ),
            config_info: c.add("config_info", "Digest of the settings in force", &[CONFIG_HASH]),
            recorded: c.add("record_lines", "Decisions that were written to the record", &[]),
            record_dropped: c.add("record_dropped", "Decisions that are missing in the record", &[RECORD_REASON]),
        };
        for result in Reload::ALL {
            drop(instruments.reloads.get_or_create(&ReloadLabels { result }));
        }
        for reason in RecordDropped::ALL {
            drop(instruments.record_dropped.get_or_create(&DroppedLabels { reason }));
        }
        instruments.last_reload_successful.set(1);
        instruments
    }
}

impl Metrics {
    /// Makes the series of a model exist at zero.
    pub(super) fn add_rollout(&self, model: &Arc<str>) {
        for agreed in Agreed::ALL {
            drop(self.rollout.shadow_decisions.get_or_create(&AgreedLabels { model: model.clone(), agreed }));
        }
        for who in ["pick", "served"] {
            drop(self.rollout.shadow_matched_tokens.get_or_create(&WhoLabels { model: model.clone(), who }));
        }
    }

    /// Shows how a model's picks are followed: the mode, and the share where it is active. Each mode comes with whether
    /// it is the one.
    pub fn set_rollout(&self, model: &Arc<str>, modes: impl IntoIterator<Item = (&'static str, bool)>, percent: u8) {
        for (mode, is_it) in modes {
            self.rollout.mode.get_or_create(&ModeLabels { model: model.clone(), mode }).set(i64::from(is_it));
        }
        self.rollout.percent.get_or_create(&ModelLabels { model: model.clone() }).set(i64::from(percent));
    }

    /// Counts a decision that Envoy was not told.
    pub fn count_shadow_decision(&self, model: &Arc<str>, agreed: Agreed) {
        self.rollout.shadow_decisions.get_or_create(&AgreedLabels { model: model.clone(), agreed }).inc();
    }

    /// Counts the tokens of a prompt that the pick in shadow held, and those that whoever served held.
    pub fn count_shadow_tokens(&self, model: &Arc<str>, n_pick: u64, n_served: u64) {
        for (who, n_tokens) in [("pick", n_pick), ("served", n_served)] {
            let labels = WhoLabels { model: model.clone(), who };
            self.rollout.shadow_matched_tokens.get_or_create(&labels).inc_by(n_tokens);
        }
    }

    /// Counts a look at the configuration file.
    pub fn count_reload(&self, result: Reload) {
        self.rollout.reloads.get_or_create(&ReloadLabels { result }).inc();
        self.rollout.last_reload_successful.set(i64::from(result.is_success()));
    }

    /// Shows the digest of the settings in force.
    pub fn set_config_hash(&self, hash: String) {
        self.rollout.config_info.clear();
        self.rollout.config_info.get_or_create(&HashLabels { hash }).set(1);
    }

    /// Counts lines of the record.
    pub fn count_recorded(&self, n_lines: u64) {
        self.rollout.recorded.inc_by(n_lines);
    }

    /// Counts lines that are missing in the record.
    pub fn count_record_dropped(&self, reason: RecordDropped, n_lines: u64) {
        self.rollout.record_dropped.get_or_create(&DroppedLabels { reason }).inc_by(n_lines);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn assert_lines(metrics: &Metrics, lines: &[&str]) {
        let text = metrics.encode();
        for line in lines {
            assert!(text.lines().any(|found| found == *line), "no line {line:?} in:\n{text}");
        }
    }

    #[test]
    fn a_model_has_one_mode_at_a_time() {
        let (metrics, model) = (Metrics::new(), Arc::from("m"));
        for current in ["shadow", "active"] {
            let modes = ["active", "shadow", "off"].map(|mode| (mode, mode == current));
            metrics.set_rollout(&model, modes, 20);
        }
        assert_lines(
            &metrics,
            &[
                r#"warmroute_rollout_mode{model="m",mode="active"} 1"#,
                r#"warmroute_rollout_mode{model="m",mode="shadow"} 0"#,
                r#"warmroute_rollout_mode{model="m",mode="off"} 0"#,
                r#"warmroute_rollout_percent{model="m"} 20"#,
            ],
        );
    }

    #[test]
    fn shadow_decisions_are_compared() {
        let (metrics, model) = (Metrics::new(), Arc::from("m"));
        metrics.add_model(&model);
        metrics.count_shadow_decision(&model, Agreed::False);
        metrics.count_shadow_tokens(&model, 64, 16);
        assert_lines(
            &metrics,
            &[
                r#"warmroute_shadow_decisions_total{model="m",agreed="false"} 1"#,
                r#"warmroute_shadow_decisions_total{model="m",agreed="unknown"} 0"#,
                r#"warmroute_shadow_matched_tokens_total{model="m",who="pick"} 64"#,
                r#"warmroute_shadow_matched_tokens_total{model="m",who="served"} 16"#,
            ],
        );
    }

    #[test]
    fn the_last_reload_and_the_settings_in_force_are_shown() {
        let metrics = Metrics::new();
        metrics.set_config_hash("aa".to_owned());
        assert_lines(&metrics, &["warmroute_config_last_reload_successful 1", r#"warmroute_config_info{hash="aa"} 1"#]);
        for (result, successful) in
            [(Reload::Refused, 0), (Reload::Applied, 1), (Reload::Unreadable, 0), (Reload::RestartNeeded, 1)]
        {
            metrics.count_reload(result);
            let line = format!("warmroute_config_last_reload_successful {successful}");
            assert_lines(&metrics, &[&line, r#"warmroute_config_reloads_total{result="refused"} 1"#]);
        }
        metrics.set_config_hash("bb".to_owned());
        assert_lines(&metrics, &[r#"warmroute_config_info{hash="bb"} 1"#]);
        assert!(!metrics.encode().contains("\"aa\""), "only one configuration is in force");
    }
}
