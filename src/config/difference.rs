//! In which settings two configurations differ.

use std::collections::BTreeSet;

use serde::Serialize;
use serde_json::Value;

use super::Config;
use super::reader::Fault;
use crate::extproc::rollout::{Mode, Percent};

/// Paths of settings, as faults show them.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// Those that may change while the router runs.
    pub live: Vec<String>,
    /// Those that take effect at a start.
    pub at_start: Vec<String>,
}

impl Config {
    /// The settings of `other` that are not as here. Models are matched by their names, their order means nothing; they
    /// are shown at their place in `other`, and those that it has no more behind its last. Values are not shown: an
    /// address may be nobody's business.
    pub fn difference(&self, other: &Self) -> Difference {
        let mut paths = BTreeSet::new();
        compare(Some(&tree(&without_models(self))), Some(&tree(&without_models(other))), "", &mut paths);
        let of = |name: &str, config: &Self| config.models.iter().find(|model| &*model.name == name).map(tree);
        let gone = self.models.iter().map(|model| &*model.name).filter(|name| of(name, other).is_none());
        let names = other.models.iter().map(|model| &*model.name).chain(gone);
        for (idx, name) in names.enumerate() {
            compare(of(name, self).as_ref(), of(name, other).as_ref(), &format!("models[{idx}]"), &mut paths);
        }
        let (live, at_start) = paths.into_iter().partition(|path| is_live(path));
        Difference { live, at_start }
    }

    /// What of `other` may change while the router runs but would fail every request: where Envoy was started to dial
    /// whatever it is told, it cannot pick by itself before the next start, whatever `other` says of its selection.
    pub fn live_faults(&self, other: &Self) -> Vec<Fault> {
        const EXPECTED: &str = "selection.mode original_dst is in force until the next start, and with it Envoy cannot \
                                pick by itself";
        if self.selection.mode.has_fallback() {
            return Vec::new();
        }
        let mut faults = Vec::new();
        let mut check_mode = |path: String, mode: Mode| {
            if mode != Mode::Active {
                faults.push(Fault { path, found: mode.as_str().to_owned(), expected: format!("active: {EXPECTED}") });
            }
        };
        check_mode("rollout.mode".to_owned(), other.rollout.mode);
        for (idx, model) in other.models.iter().enumerate() {
            check_mode(format!("models[{idx}].rollout.mode"), model.rollout.mode);
        }
        for (idx, model) in other.models.iter().enumerate().filter(|(_, model)| model.rollout.percent != Percent::ALL) {
            let path = format!("models[{idx}].rollout.percent");
            let found = model.rollout.percent.get().to_string();
            faults.push(Fault { path, found, expected: format!("100: {EXPECTED}") });
        }
        faults
    }

    /// Takes from `other` what may change while the router runs; models are matched by their names.
    pub fn take_live(&mut self, other: &Self) {
        self.rollout = other.rollout.clone();
        self.log.filter.clone_from(&other.log.filter);
        for model in &mut self.models {
            if let Some(new) = other.models.iter().find(|new| new.name == model.name) {
                model.rollout = new.rollout;
            }
        }
    }
}

fn without_models(config: &Config) -> Config {
    Config { models: Vec::new(), ..config.clone() }
}

fn tree(settings: &impl Serialize) -> Value {
    serde_json::to_value(settings).expect("a configuration has only text keys")
}

fn is_live(path: &str) -> bool {
    let of_model = path.strip_prefix("models[").and_then(|rest| rest.split_once("].")).map(|(_, rest)| rest);
    path == "log.filter" || of_model.unwrap_or(path).starts_with("rollout.")
}

/// Collects the paths of the values that differ; what only one side has is named by itself and not by its parts.
fn compare(old: Option<&Value>, new: Option<&Value>, path: &str, paths: &mut BTreeSet<String>) {
    match (old, new) {
        (Some(Value::Object(old)), Some(Value::Object(new))) => {
            for name in old.keys().chain(new.keys()) {
                let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                compare(old.get(name), new.get(name), &path, paths);
            }
        }
        (Some(Value::Array(old)), Some(Value::Array(new))) => {
            for idx in 0..old.len().max(new.len()) {
                compare(old.get(idx), new.get(idx), &format!("{path}[{idx}]"), paths);
            }
        }
        (old, new) if old == new => {}
        _ => drop(paths.insert(path.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(yaml: &str) -> Config {
        Config::parse(yaml, []).expect("valid")
    }

    fn model(name: &str, settings: &str) -> String {
        format!("{{name: {name}, {settings}discovery: {{static: [{{address: 1.1.1.1:1}}]}}}}")
    }

    fn difference(old: &str, new: &str) -> (Vec<String>, Vec<String>) {
        let Difference { live, at_start } = parse(old).difference(&parse(new));
        (live, at_start)
    }

    #[test]
    fn settings_that_may_change_are_told_from_the_others() {
        let old = format!("models: [{}]", model("m", ""));
        assert_eq!(difference(&old, &old), (vec![], vec![]));
        let new = format!(
            "rollout: {{mode: shadow, record: {{path: /tmp/r}}}}\nlog: {{filter: debug, format: json}}\n\
             limits: {{body_bytes: 2048}}\nmodels: [{}, {}]",
            model("m", "aliases: [p], rollout: {percent: 5}, "),
            model("o", "")
        );
        let (live, at_start) = difference(&old, &new);
        assert_eq!(live, ["log.filter", "models[0].rollout.percent", "rollout.mode", "rollout.record.path"]);
        assert_eq!(at_start, ["limits.body_bytes", "log.format", "models[0].aliases[0]", "models[1]"]);
    }

    #[test]
    fn the_order_of_models_means_nothing() {
        let of = |models: &[&str]| format!("models: [{}]", models.join(", "));
        let (a, b, b_changed) = (model("a", ""), model("b", ""), model("b", "aliases: [x], rollout: {percent: 5}, "));
        assert_eq!(difference(&of(&[&a, &b]), &of(&[&b, &a])), (vec![], vec![]));
        let hash = |models: &[&str]| parse(&of(models)).hash();
        assert_eq!(hash(&[&a, &b]), hash(&[&b, &a]));
        assert_ne!(hash(&[&a, &b]), hash(&[&a, &b_changed]));
        let (live, at_start) = difference(&of(&[&a, &b]), &of(&[&b_changed, &a]));
        assert_eq!((live, at_start), (vec!["models[0].rollout.percent".into()], vec!["models[0].aliases[0]".into()]));
        assert_eq!(difference(&of(&[&a, &b]), &of(&[&b])), (vec![], vec!["models[1]".to_owned()]));
    }

    #[test]
    fn an_envoy_that_cannot_pick_yet_is_not_left_alone() {
        let with = |settings: &str, of_model: &str| parse(&format!("{settings}\nmodels: [{}]", model("m", of_model)));
        let told = with("selection: {mode: original_dst}", "");
        let free = with("", "");
        for (settings, of_model, expected) in [
            ("", "", &[][..]),
            (
                "rollout: {mode: shadow}",
                "",
                &["rollout.mode: found shadow, expected active: selection.mode original_dst"],
            ),
            ("", "rollout: {mode: off}, ", &["models[0].rollout.mode: found off, expected active: "]),
            ("", "rollout: {percent: 99}, ", &["models[0].rollout.percent: found 99, expected 100: "]),
            ("rollout: {mode: off}", "rollout: {percent: 0}, ", &["rollout.mode: ", "models[0].rollout.percent: "]),
        ] {
            let new = with(settings, of_model);
            assert_eq!(free.live_faults(&new), [], "{settings} {of_model}");
            let faults: Vec<_> = told.live_faults(&new).iter().map(ToString::to_string).collect();
            assert_eq!(faults.len(), expected.len(), "{settings} {of_model}: {faults:?}");
            for (fault, expected) in faults.iter().zip(expected) {
                assert!(fault.starts_with(expected), "{expected}\nis not\n{fault}");
            }
        }
    }

    #[test]
    fn what_may_change_is_taken_by_name_and_nothing_else_is() {
        let mut config = parse(&format!("models: [{}, {}]", model("m", ""), model("p", "")));
        let (p, m) = (model("p", "rollout: {mode: off}, "), model("m", "aliases: [x], "));
        let new = parse(&format!("log: {{filter: warn, format: json}}\nrollout: {{mode: shadow}}\nmodels: [{p}, {m}]"));
        config.take_live(&new);
        assert_eq!((config.rollout.mode, config.log.filter.as_str()), (Mode::Shadow, "warn"));
        assert_eq!((config.models[0].rollout.mode, config.models[1].rollout.mode), (Mode::Active, Mode::Off));
        assert!(config.models[0].aliases.is_empty() && config.log.format == crate::telemetry::LogFormat::Text);
    }
}
