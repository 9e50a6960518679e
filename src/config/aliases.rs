//! AIBrix's names for settings of ours (AIBrix gateway, `pkg/utils/tokenizer` and `pkg/cache`; the shorter names are
//! those of its user guide), for those who come from there.
//!
//! They hold for every model. One of ours (`WARMROUTE_MODELS_0_…`) goes first, the file comes last. Flags are what Go's
//! `strconv.ParseBool` reads; an empty value is none. AIBrix's other variables are none of our business.
//!
//! A deployment cannot always be moved as it is, for the defaults are not the same: KV events are on here and off
//! there. With them only the engines' own tokens count, so a variable that asks for others is refused unless
//! `AIBRIX_KV_EVENT_SYNC_ENABLED=false` is set as well.

use std::collections::BTreeMap;

use super::reader::{Fault, shown};
use crate::engine::Base;

/// Settings of a model that have names in AIBrix.
const SYNC: &str = "events.sync";
const KIND: &str = "tokenizer.kind";
const ENDPOINT: &str = "tokenizer.endpoint";

pub(super) const SYNC_NAMES: [&str; 2] = ["AIBRIX_KV_EVENT_SYNC_ENABLED", "AIBRIX_PREFIX_CACHE_KV_EVENT_SYNC_ENABLED"];
const REMOTE_NAMES: [&str; 2] = ["AIBRIX_USE_REMOTE_TOKENIZER", "AIBRIX_PREFIX_CACHE_USE_REMOTE_TOKENIZER"];
const TYPE_NAMES: [&str; 1] = ["AIBRIX_PREFIX_CACHE_TOKENIZER_TYPE"];
const ENGINE_NAMES: [&str; 1] = ["AIBRIX_REMOTE_TOKENIZER_ENGINE"];
const ENDPOINT_NAMES: [&str; 2] = ["AIBRIX_REMOTE_TOKENIZER_ENDPOINT", "AIBRIX_PREFIX_CACHE_REMOTE_TOKENIZER_ENDPOINT"];

/// What AIBrix's variables say of the tokenizer's kind. It is less than a kind of ours, so the file has its say as
/// well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct KindAlias {
    /// The variable that says it.
    pub(super) name: &'static str,
    /// Whether the engines make the tokens.
    pub(super) is_remote: bool,
}

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
    kind: Option<KindAlias>,
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
        let endpoint = reader.endpoint();
        let Reader { mut aliases, faults, .. } = reader;
        aliases.kind = kind;
        let found = [(SYNC, sync.map(|(_, sync)| sync.to_string())), (ENDPOINT, endpoint)];
        aliases.values.extend(found.into_iter().filter_map(|(setting, value)| Some((setting, value?))));
        (aliases, faults)
    }

    /// The value for the setting at `path`, if that is one of a model's.
    pub(super) fn value(&self, path: &str) -> Option<&String> {
        self.values.get(of_model(path)?)
    }

    /// What is said of the kind, if `path` is that of a model's.
    pub(super) fn kind(&self, path: &str) -> Option<KindAlias> {
        self.kind.filter(|_| of_model(path) == Some(KIND))
    }

    pub(super) fn taken(self) -> Vec<Alias> {
        self.taken
    }
}

/// The setting's path within its model.
fn of_model(path: &str) -> Option<&str> {
    Some(path.strip_prefix("models[")?.split_once("].")?.1)
}

struct Reader<'a> {
    env: &'a BTreeMap<String, String>,
    aliases: Aliases,
    faults: Vec<Fault>,
}

impl Reader<'_> {
    /// The names of a setting that are set, with their values.
    fn given(&mut self, names: &[&'static str], setting: &'static str) -> Vec<(&'static str, String)> {
        let set = |name: &&'static str| Some((*name, self.env.get(*name).filter(|value| !value.is_empty())?.clone()));
        let given: Vec<(&'static str, String)> = names.iter().filter_map(set).collect();
        self.aliases.taken.extend(given.iter().map(|(name, _)| Alias { name, setting }));
        given
    }

    /// A flag, and the first of its names that is set; two that say different things are a fault.
    fn flag(&mut self, names: &[&'static str], setting: &'static str) -> Option<(&'static str, bool)> {
        let mut flag = None;
        for (name, value) in self.given(names, setting) {
            match (parse_bool(&value), flag) {
                (None, _) => self.fault(name, &shown(&value), "true or false"),
                (Some(one), None) => flag = Some((name, one)),
                (Some(one), Some((first, other))) if one != other => {
                    self.fault(name, &shown(&value), format!("{other}, as {first} says"));
                }
                (Some(_), Some(_)) => {}
            }
        }
        flag
    }

    /// The URL; two that lead to different servers are a fault, which shows neither: they may hold passwords.
    fn endpoint(&mut self) -> Option<String> {
        let given = self.given(&ENDPOINT_NAMES, "models[].tokenizer.endpoint");
        let (first, value) = given.first().cloned()?;
        let are_same = |one: &str, other: &str| match (one.parse::<Base>(), other.parse::<Base>()) {
            (Ok(one), Ok(other)) => one == other,
            _ => one == other,
        };
        for (name, other) in &given[1..] {
            if !are_same(&value, other) {
                self.fault(name, "another URL", format!("the one that {first} has"));
            }
        }
        Some(value)
    }

    /// What the flag and the type together mean.
    fn kind(&mut self, remote: Option<(&'static str, bool)>) -> Option<KindAlias> {
        const EXPECTED: &str = "remote, character or tiktoken";
        let Some((name, kind)) = self.given(&TYPE_NAMES, "models[].tokenizer.kind").pop() else {
            return remote.map(|(name, is_remote)| KindAlias { name, is_remote });
        };
        let is_remote = match kind.as_str() {
            "remote" => true,
            "character" | "tiktoken" => false,
            other => {
                self.fault(name, &shown(other), EXPECTED);
                return None;
            }
        };
        if let Some((flag, _)) = remote.filter(|(_, remote)| *remote != is_remote) {
            self.fault(name, &shown(&kind), format!("a type that agrees with {flag}"));
        }
        Some(KindAlias { name, is_remote })
    }

    fn engine(&mut self) {
        for (name, engine) in self.given(&ENGINE_NAMES, "(none: vllm is the only engine)") {
            if engine != "vllm" {
                self.fault(name, &shown(&engine), "vllm");
            }
        }
    }

    fn fault(&mut self, name: &str, found: &str, expected: impl Into<String>) {
        let (path, found) = (name.to_owned(), found.to_owned());
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
        parse_with(MODEL, env)
    }

    fn parse_with(yaml: &str, env: &[(&str, &str)]) -> Result<Config, Error> {
        Config::parse(yaml, env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())))
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
        for (env, from) in [
            (
                &[("AIBRIX_KV_EVENT_SYNC_ENABLED", "true"), ("AIBRIX_USE_REMOTE_TOKENIZER", "false")][..],
                Some("AIBRIX_USE_REMOTE_TOKENIZER"),
            ),
            (&[("AIBRIX_PREFIX_CACHE_TOKENIZER_TYPE", "character")], Some("AIBRIX_PREFIX_CACHE_TOKENIZER_TYPE")),
            (&[("WARMROUTE_MODELS_0_TOKENIZER_KIND", "text")], None),
            (&[("WARMROUTE_MODELS_0_TOKENIZER_KIND", "text"), ("AIBRIX_USE_REMOTE_TOKENIZER", "0")], None),
        ] {
            let found = fault(env);
            let from_where = from.map(|name| format!(", as {name} has it")).unwrap_or_default();
            let expected = format!("models[0].tokenizer.kind: found text{from_where}, expected remote or auto");
            assert!(found.contains(&expected), "{expected}\nis not in\n{found}");
            assert_eq!(found.contains("AIBRIX_KV_EVENT_SYNC_ENABLED=false"), from.is_some(), "{found}");
        }
    }

    #[test]
    fn flags_that_are_written_differently_may_say_the_same() {
        for (one, other) in [("true", "1"), ("T", "TRUE")] {
            assert!(settings(&[(super::SYNC_NAMES[0], one), (super::SYNC_NAMES[1], other)]).0, "{one}, {other}");
        }
        let [short, long] = super::ENDPOINT_NAMES;
        assert!(
            parse(&[(short, "http://t:8000"), (long, "http://t:8000/")]).is_ok(),
            "nor do URLs contradict each other"
        );
    }

    #[test]
    fn the_file_says_which_of_the_kinds_that_aibrix_leaves_open() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tokens/qwen");
        let (remote, not_remote) = (("AIBRIX_USE_REMOTE_TOKENIZER", "1"), ("AIBRIX_USE_REMOTE_TOKENIZER", "0"));
        for (kind, path, env, expected) in [
            ("auto", Some(path), remote, TokenizerKind::Auto),
            ("remote", None, remote, TokenizerKind::Remote),
            ("text", None, remote, TokenizerKind::Remote),
            ("local", Some(path), remote, TokenizerKind::Remote),
            ("text", Some(path), not_remote, TokenizerKind::Text),
            ("text", None, not_remote, TokenizerKind::Text),
            ("local", Some(path), not_remote, TokenizerKind::Local),
            ("auto", Some(path), not_remote, TokenizerKind::Local),
            ("remote", Some(path), not_remote, TokenizerKind::Local),
            ("remote", None, not_remote, TokenizerKind::Text),
        ] {
            let path = path.map(|path| format!(", path: {path}")).unwrap_or_default();
            let tokenizer = format!("tokenizer: {{kind: {kind}{path}}}, events: {{sync: false}}");
            let yaml = MODEL.replace("name: m", &format!("name: m, {tokenizer}"));
            let config = parse_with(&yaml, &[env]).expect("valid");
            assert_eq!(config.models[0].tokenizer.kind, expected, "{tokenizer} {env:?}");
            let ours = [env, ("WARMROUTE_MODELS_0_TOKENIZER_KIND", "remote")];
            let config = parse_with(&yaml, &ours).expect("valid");
            assert_eq!(config.models[0].tokenizer.kind, TokenizerKind::Remote, "ours goes first");
        }
    }

    #[test]
    fn a_url_that_may_hold_a_password_is_not_shown() {
        let [short, long] = super::ENDPOINT_NAMES;
        for env in [
            &[(short, "http://user:hunter2@t")][..],
            &[(short, "http://t?key=hunter2")],
            &[(short, "user:hunter2@t")],
            &[(short, "http://t"), (long, "http://user:hunter2@t")],
            &[(short, "http://user:hunter2@t"), (long, "http://t")],
            &[("WARMROUTE_MODELS_0_TOKENIZER_ENDPOINT", "http://user:hunter2@t")],
            &[("WARMROUTE_MODELS_0_TOKENIZER_ENDPIONT", "http://user:hunter2@t")],
            &[("WARMROUTE_TRACE_OTLP_ENDPOINT", "https://user:hunter2@t")],
            &[(super::SYNC_NAMES[0], "http://user:hunter2@t")],
        ] {
            let found = fault(env);
            assert!(!found.contains("hunter2"), "{found}");
        }
        let found = fault(&[(short, "http://user:hunter2@t")]);
        assert!(found.contains("models[0].tokenizer.endpoint: found a URL with a user or a password"), "{found}");
        let found = fault(&[(short, "http://t"), (long, "http://u")]);
        assert!(found.contains(&format!("{long}: found another URL, expected the one that {short} has")), "{found}");
    }

    #[test]
    fn contradictions_and_unknown_values_are_faults() {
        for (env, expected) in [
            (
                &[(super::SYNC_NAMES[0], "true"), (super::SYNC_NAMES[1], "false")][..],
                "AIBRIX_PREFIX_CACHE_KV_EVENT_SYNC_ENABLED: found \"false\", expected true, as AIBRIX_KV_EVENT_SYNC_ENABLED says",
            ),
            (
                &[(super::SYNC_NAMES[0], "perhaps")],
                "AIBRIX_KV_EVENT_SYNC_ENABLED: found \"perhaps\", expected true or false",
            ),
            (
                &[(super::REMOTE_NAMES[0], "true"), (super::TYPE_NAMES[0], "character")],
                "AIBRIX_PREFIX_CACHE_TOKENIZER_TYPE: found \"character\", expected a type that agrees with",
            ),
            (
                &[(super::REMOTE_NAMES[1], "1"), (super::TYPE_NAMES[0], "character")],
                "a type that agrees with AIBRIX_PREFIX_CACHE_USE_REMOTE_TOKENIZER",
            ),
            (
                &[(super::SYNC_NAMES[0], "true"), (super::SYNC_NAMES[1], "perhaps")],
                "AIBRIX_PREFIX_CACHE_KV_EVENT_SYNC_ENABLED: found \"perhaps\", expected true or false",
            ),
            (&[(super::TYPE_NAMES[0], "guess")], "found \"guess\", expected remote, character or tiktoken"),
            (&[(super::ENGINE_NAMES[0], "sglang")], "AIBRIX_REMOTE_TOKENIZER_ENGINE: found \"sglang\", expected vllm"),
        ] {
            let found = fault(env);
            assert!(found.contains(expected), "{expected}\nis not in\n{found}");
        }
    }
}
