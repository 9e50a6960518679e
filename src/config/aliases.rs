//! AIBrix's names for settings of ours (AIBrix gateway, `pkg/utils/tokenizer` and `pkg/cache`; the shorter names are those
//! of its user guide), so that a deployment can be moved as it is.
//!
//! They hold for every model. One of ours (`WARMROUTE_MODELS_0_…`) goes first, the file comes last. Flags are what Go's
//! `strconv.ParseBool` reads; an empty value is none. AIBrix's other variables are none of our business.

use std::collections::BTreeMap;

use super::reader::Fault;

/// Value of [`KIND`] for "not the engine's tokens", from which the reader of the tokenizer makes `local` or `text`.
pub(super) const NOT_REMOTE: &str = "not remote";

/// Settings of a model that have names in AIBrix.
const SYNC: &str = "events.sync";
const KIND: &str = "tokenizer.kind";
const ENDPOINT: &str = "tokenizer.endpoint";

const SYNC_NAMES: [&str; 2] = ["AIBRIX_KV_EVENT_SYNC_ENABLED", "AIBRIX_PREFIX_CACHE_KV_EVENT_SYNC_ENABLED"];
const REMOTE_NAMES: [&str; 2] = ["AIBRIX_USE_REMOTE_TOKENIZER", "AIBRIX_PREFIX_CACHE_USE_REMOTE_TOKENIZER"];
const TYPE_NAMES: [&str; 1] = ["AIBRIX_PREFIX_CACHE_TOKENIZER_TYPE"];
const ENGINE_NAMES: [&str; 1] = ["AIBRIX_REMOTE_TOKENIZER_ENGINE"];
const ENDPOINT_NAMES: [&str; 2] = ["AIBRIX_REMOTE_TOKENIZER_ENDPOINT", "AIBRIX_PREFIX_CACHE_REMOTE_TOKENIZER_ENDPOINT"];

/// A variable of AIBrix that was taken for a setting of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Alias {
    /// The variable.
    pub name: &'static str,
    /// What the setting is called here.
    pub setting: &'static str,
}

/// The variables of AIBrix that are set.
#[derive(Debug, Default)]
pub(super) struct Aliases {
    /// By setting, relative to its model.
    values: BTreeMap<&'static str, String>,
    taken: Vec<Alias>,
}

impl Aliases {
    /// Reads the variables; those that cannot be read, or contradict each other, are faults.
    pub(super) fn read(env: &BTreeMap<String, String>) -> (Self, Vec<Fault>) {
        let mut reader = Reader { env, aliases: Self::default(), faults: Vec::new() };
        let sync = reader.flag(&SYNC_NAMES, "models[].events.sync");
        let remote = reader.flag(&REMOTE_NAMES, "models[].tokenizer.kind");
        let kind = reader.kind(remote);
        reader.engine();
        let endpoint = reader.text(&ENDPOINT_NAMES, "models[].tokenizer.endpoint");
        let Reader { mut aliases, faults, .. } = reader;
        let found = [(SYNC, sync.map(|sync| sync.to_string())), (KIND, kind), (ENDPOINT, endpoint)];
        aliases.values.extend(found.into_iter().filter_map(|(setting, value)| Some((setting, value?))));
        (aliases, faults)
    }

    /// The value for the setting at `path`, if that is one of a model's.
    pub(super) fn value(&self, path: &str) -> Option<&String> {
        let (_, setting) = path.strip_prefix("models[")?.split_once("].")?;
        self.values.get(setting)
    }

    pub(super) fn taken(self) -> Vec<Alias> {
        self.taken
    }
}

struct Reader<'a> {
    env: &'a BTreeMap<String, String>,
    aliases: Aliases,
    faults: Vec<Fault>,
}

impl Reader<'_> {
    /// The value of a variable that has several names; two different values are a fault.
    fn text(&mut self, names: &[&'static str], setting: &'static str) -> Option<String> {
        let set = |name: &&'static str| Some((*name, self.env.get(*name).filter(|value| !value.is_empty())?.clone()));
        let given: Vec<(&'static str, String)> = names.iter().filter_map(set).collect();
        let (first, value) = given.first().cloned()?;
        for (name, other) in &given[1..] {
            if *other != value {
                self.fault(name, other, format!("{value:?}, as {first} says"));
            }
        }
        self.aliases.taken.extend(given.iter().map(|(name, _)| Alias { name, setting }));
        Some(value)
    }

    fn flag(&mut self, names: &[&'static str], setting: &'static str) -> Option<bool> {
        let value = self.text(names, setting)?;
        let flag = parse_bool(&value);
        if flag.is_none() {
            self.fault(names[0], &value, "true or false");
        }
        flag
    }

    /// The kind of tokenizer that the flag and the type together mean.
    fn kind(&mut self, remote: Option<bool>) -> Option<String> {
        const EXPECTED: &str = "remote, character or tiktoken";
        let kind = self.text(&TYPE_NAMES, "models[].tokenizer.kind");
        let is_remote = match kind.as_deref() {
            None => remote?,
            Some("remote") => true,
            Some("character" | "tiktoken") => false,
            Some(other) => {
                self.fault(TYPE_NAMES[0], other, EXPECTED);
                return None;
            }
        };
        if remote.is_some_and(|remote| remote != is_remote) {
            let expected = format!("a type that agrees with {}", REMOTE_NAMES[0]);
            self.fault(TYPE_NAMES[0], kind.as_deref().unwrap_or_default(), expected);
        }
        Some(if is_remote { "remote".to_owned() } else { NOT_REMOTE.to_owned() })
    }

    fn engine(&mut self) {
        let engine = self.text(&ENGINE_NAMES, "(none: vllm is the only engine)");
        if let Some(other) = engine.filter(|engine| engine != "vllm") {
            self.fault(ENGINE_NAMES[0], &other, "vllm");
        }
    }

    fn fault(&mut self, name: &str, found: &str, expected: impl Into<String>) {
        let (path, found) = (name.to_owned(), format!("{found:?}"));
        self.faults.push(Fault { path, found, expected: expected.into() });
    }
}

fn parse_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use crate::config::{Config, Error, TokenizerKind};

    const MODEL: &str = "models: [{name: m, discovery: {static: [{address: 1.1.1.1:1}]}}]";

    fn parse(env: &[(&str, &str)]) -> Result<Config, Error> {
        Config::parse(MODEL, env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())))
    }

    fn settings(env: &[(&str, &str)]) -> (bool, TokenizerKind) {
        let config = parse(env).expect("valid");
        (config.models[0].events.sync, config.models[0].tokenizer.kind)
    }

    fn fault(env: &[(&str, &str)]) -> String {
        parse(env).expect_err("a fault").to_string()
    }

    #[test]
    fn every_name_sets_what_it_names_and_is_told_of() {
        for sync in super::SYNC_NAMES {
            assert_eq!(settings(&[(sync, "0")]), (false, TokenizerKind::Remote), "{sync}");
            assert_eq!(parse(&[(sync, "0")]).expect("valid").aliases[0].name, sync);
            for remote in super::REMOTE_NAMES {
                assert_eq!(settings(&[(sync, "false"), (remote, "F")]), (false, TokenizerKind::Text), "{remote}");
                assert_eq!(settings(&[(sync, "true"), (remote, "1")]), (true, TokenizerKind::Remote), "{remote}");
            }
            for (kind, expected) in [("remote", TokenizerKind::Remote), ("character", TokenizerKind::Text)] {
                assert_eq!(settings(&[(sync, "false"), (super::TYPE_NAMES[0], kind)]), (false, expected), "{kind}");
            }
        }
        assert_eq!(settings(&[(super::ENGINE_NAMES[0], "vllm")]), (true, TokenizerKind::Remote));
        for endpoint in super::ENDPOINT_NAMES {
            let config = parse(&[(endpoint, "http://tokenizer:8000")]).expect("valid");
            let base = config.models[0].tokenizer.endpoint.as_ref().expect("an endpoint");
            assert_eq!(base.to_string(), "http://tokenizer:8000", "{endpoint}");
        }
    }

    #[test]
    fn ours_goes_first_and_empty_is_unset() {
        let sync = super::SYNC_NAMES[0];
        assert!(settings(&[(sync, "false"), ("WARMROUTE_MODELS_0_EVENTS_SYNC", "true")]).0);
        assert!(settings(&[(sync, "")]).0);
        assert!(parse(&[("AIBRIX_SOMETHING_ELSE", "x")]).expect("valid").aliases.is_empty());
    }

    #[test]
    fn kv_sync_without_the_engines_tokens_is_refused() {
        for env in [
            &[("AIBRIX_KV_EVENT_SYNC_ENABLED", "true"), ("AIBRIX_USE_REMOTE_TOKENIZER", "false")][..],
            &[("AIBRIX_PREFIX_CACHE_TOKENIZER_TYPE", "character")],
            &[("WARMROUTE_MODELS_0_TOKENIZER_KIND", "text")],
        ] {
            let found = fault(env);
            assert!(found.contains("models[0].tokenizer.kind: found text, expected remote or auto"), "{found}");
        }
    }

    #[test]
    fn contradictions_and_unknown_values_are_faults() {
        for (env, expected) in [
            (
                &[(super::SYNC_NAMES[0], "true"), (super::SYNC_NAMES[1], "false")][..],
                "AIBRIX_PREFIX_CACHE_KV_EVENT_SYNC_ENABLED: found \"false\", expected \"true\", as AIBRIX_KV_EVENT_SYNC_ENABLED says",
            ),
            (
                &[(super::SYNC_NAMES[0], "perhaps")],
                "AIBRIX_KV_EVENT_SYNC_ENABLED: found \"perhaps\", expected true or false",
            ),
            (
                &[(super::REMOTE_NAMES[0], "true"), (super::TYPE_NAMES[0], "character")],
                "AIBRIX_PREFIX_CACHE_TOKENIZER_TYPE: found \"character\", expected a type that agrees with",
            ),
            (&[(super::TYPE_NAMES[0], "guess")], "found \"guess\", expected remote, character or tiktoken"),
            (&[(super::ENGINE_NAMES[0], "sglang")], "AIBRIX_REMOTE_TOKENIZER_ENGINE: found \"sglang\", expected vllm"),
        ] {
            let found = fault(env);
            assert!(found.contains(expected), "{expected}\nis not in\n{found}");
        }
    }
}
