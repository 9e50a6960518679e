//! `rollout` and `models[].rollout`: how far Envoy follows our picks, and what is written down of them.
//!
//! All of it may change while the router runs.

use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use super::reader::Node;
use super::values::Human;
use crate::extproc::reply::SelectionMode;
use crate::extproc::rollout::{Mode, Percent, Rollout as PoolRollout};
use crate::record::{self, Key};

/// `rollout`: what holds for all models.
#[derive(Clone, Debug, Serialize)]
pub struct Rollout {
    /// `active` (default): Envoy follows the picks. `shadow`: they are made and counted, and Envoy is not told. `off`:
    /// requests are left to Envoy unread. A model may be stricter.
    pub mode: Mode,
    /// What is written down of each decision.
    pub record: Record,
    /// Time between two looks at the configuration file, default 2s; 0s: it is read again upon SIGHUP alone.
    pub reload: Human,
}

/// `rollout.record`: a trace of the decisions without their content.
#[derive(Clone, Debug, Serialize)]
pub struct Record {
    /// File of JSON lines; null: nothing is written.
    pub path: Option<PathBuf>,
    /// Size at which it becomes the older file, `<path>.1`, default 64 MiB.
    pub max_bytes: u64,
    /// File with a secret of at least 16 bytes, under which a block has the same number in every file; null: blocks are
    /// numbered anew in each.
    pub key_file: Option<PathBuf>,
    /// The secret.
    #[serde(skip)]
    key: Option<Key>,
}

impl Record {
    /// What the recorder is told.
    pub fn config(&self) -> record::Config {
        record::Config { path: self.path.clone(), max_bytes: self.max_bytes, key: self.key.clone() }
    }
}

pub(super) fn read_rollout(node: &Node<'_>, selection: SelectionMode) -> Rollout {
    const RELOAD: &str = "a duration from 100ms to 1h, such as 2s, or 0s";
    let [mode, record, reload] = node.fields(["mode", "record", "reload"]);
    let interval = reload.or(Human(Duration::from_secs(2)), RELOAD);
    let is_interval = (Duration::from_millis(100)..=Duration::from_secs(3600)).contains(&interval.0);
    if !is_interval && interval.0 != Duration::ZERO {
        reload.fault(interval, RELOAD);
    }
    Rollout { mode: read_mode(&mode, selection), record: read_record(&record), reload: interval }
}

/// `models[].rollout`: `mode` as above, and the `percent` of the requests for which it is active; the others are in
/// shadow.
pub(super) fn read_model_rollout(node: &Node<'_>, selection: SelectionMode) -> PoolRollout {
    const PERCENT: &str = "a whole number from 0 to 100";
    let [mode, percent] = node.fields(["mode", "percent"]);
    let share = percent.or(Percent::ALL, PERCENT);
    if share != Percent::ALL && !selection.has_fallback() {
        percent.fault(share.get(), "100: with selection.mode original_dst Envoy cannot pick by itself");
    }
    PoolRollout { mode: read_mode(&mode, selection), percent: share }
}

fn read_mode(node: &Node<'_>, selection: SelectionMode) -> Mode {
    let mode = node.or(Mode::Active, "active, shadow or off");
    if mode != Mode::Active && !selection.has_fallback() {
        node.fault(mode.as_str(), "active: with selection.mode original_dst Envoy cannot pick by itself");
    }
    mode
}

fn read_record(node: &Node<'_>) -> Record {
    const PATH: &str = "the path of a file, or null for no record";
    const BYTES: &str = "a number of bytes from 65536 on";
    const KEY: &str = "the path of a file with a secret of at least 16 bytes, or null";
    let [path, max_bytes, key_file] = node.fields(["path", "max_bytes", "key_file"]);
    let file = path.string(PATH);
    if file.as_ref().is_some_and(String::is_empty) {
        path.fault("nothing", PATH);
    }
    let limit = max_bytes.or(record::DEFAULT_MAX_BYTES, BYTES);
    if limit < 1 << 16 {
        max_bytes.fault(limit, BYTES);
    }
    let key_path = key_file.string(KEY).map(PathBuf::from);
    let key = key_path.as_ref().and_then(|path| Key::read(path).map_err(|error| key_file.fault(error, KEY)).ok());
    Record { path: file.map(PathBuf::from), max_bytes: limit, key_file: key_path, key }
}

#[cfg(test)]
mod tests {
    use super::super::{Config, Error};
    use super::*;

    const POOL: &str = "discovery: {static: [{address: 1.1.1.1:1}]}";

    fn parse(settings: &str, of_model: &str) -> Result<Config, Vec<String>> {
        let yaml = format!("{settings}\nmodels: [{{name: m, {of_model}{POOL}}}]");
        Config::parse(&yaml, []).map_err(|error| match error {
            Error::Faults(faults) => faults.iter().map(ToString::to_string).collect(),
            other => panic!("expected faults, found {other}"),
        })
    }

    #[test]
    fn everything_is_followed_and_nothing_written_unless_told_otherwise() {
        let config = parse("", "").expect("valid");
        assert_eq!((config.rollout.mode, config.models[0].rollout), (Mode::Active, PoolRollout::default()));
        assert_eq!((config.rollout.record.path, config.rollout.reload.0), (None, Duration::from_secs(2)));
    }

    #[test]
    fn settings_are_read_and_read_back() {
        let dir = tempfile::tempdir().expect("a directory");
        let key = dir.path().join("key");
        std::fs::write(&key, "a secret of 24 bytes....").expect("written");
        let record = format!("{{path: /tmp/record.jsonl, max_bytes: 65536, key_file: {}}}", key.display());
        let settings = format!("rollout: {{mode: shadow, reload: 0s, record: {record}}}");
        let config = parse(&settings, "rollout: {mode: off, percent: 5}, ").expect("valid");
        assert_eq!((config.rollout.mode, config.models[0].rollout.mode), (Mode::Shadow, Mode::Off));
        assert_eq!(config.models[0].rollout.percent.get(), 5);
        let told = config.rollout.record.config();
        assert_eq!((told.max_bytes, told.key.is_some()), (65536, true));
        let again = Config::parse(&config.to_yaml(), []).expect("the effective configuration is valid");
        assert_eq!(again.to_yaml(), config.to_yaml());
        assert!(!config.to_yaml().contains("a secret"), "{}", config.to_yaml());
    }

    #[test]
    fn what_cannot_be_is_refused_with_its_place() {
        for (settings, of_model, expected) in [
            ("rollout: {mode: on}", "", "rollout.mode: found \"true\", expected active, shadow or off"),
            ("rollout: {mode: dark}", "", "rollout.mode: found \"dark\", expected active, shadow or off"),
            ("rollout: {reload: 10ms}", "", "rollout.reload: found 10ms, expected a duration from 100ms"),
            ("rollout: {reload: 2h}", "", "rollout.reload: found 2h, expected a duration from 100ms"),
            ("rollout: {record: {path: ''}}", "", "rollout.record.path: found nothing"),
            ("rollout: {record: {max_bytes: 1}}", "", "rollout.record.max_bytes: found 1, expected a number of bytes"),
            ("rollout: {record: {key_file: /no/key}}", "", "rollout.record.key_file: found /no/key cannot be read"),
            ("rollout: {percent: 5}", "", "rollout.percent: found an unknown setting"),
            ("", "rollout: {percent: 101}, ", "models[0].rollout.percent: found \"101\", expected a whole number"),
            ("", "rollout: {mode: maybe}, ", "models[0].rollout.mode: found \"maybe\""),
        ] {
            let found = parse(settings, of_model).expect_err("a fault");
            assert!(found.len() == 1 && found[0].starts_with(expected), "{expected}\nis not\n{found:?}");
        }
    }

    #[test]
    fn an_envoy_that_cannot_pick_has_to_follow() {
        let settings = "selection: {mode: original_dst}\nrollout: {mode: shadow}";
        let found = parse(settings, "rollout: {mode: off, percent: 50}, ").expect_err("faults").join("\n");
        for path in ["rollout.mode: found shadow", "models[0].rollout.mode: found off", "rollout.percent: found 50"] {
            assert!(found.contains(path), "{path}\nis missing in\n{found}");
        }
        parse("selection: {mode: original_dst}\nrollout: {mode: active}", "rollout: {percent: 100}, ").expect("valid");
    }
}
