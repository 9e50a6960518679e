//! Walks a parsed YAML document and collects every fault instead of stopping at the first.
//!
//! Each node knows its path (`models[0].tokenizer.budget`). A scalar may come from the environment instead, under the
//! path in capitals with `_` for every other character (`WARMROUTE_MODELS_0_TOKENIZER_BUDGET`), or under a name of
//! AIBrix (`aliases`). What nobody asked for, in the document or in the environment, is a fault as well.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Display};
use std::str::FromStr;

use serde_json::Value;

use super::aliases::{Alias, Aliases, KindAlias};

/// Prefix of the environment variables that override settings.
const ENV_PREFIX: &str = "WARMROUTE_";

/// One thing that is wrong with the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Path of the setting, or name of the environment variable.
    pub path: String,
    /// What is there.
    pub found: String,
    /// What should be there.
    pub expected: String,
}

impl Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { path, found, expected } = self;
        write!(f, "{path}: found {found}, expected {expected}")
    }
}

/// Where values come from and faults go to.
pub(super) struct Source {
    env: BTreeMap<String, String>,
    aliases: Aliases,
    used: RefCell<BTreeSet<String>>,
    faults: RefCell<Vec<Fault>>,
}

impl Source {
    /// Keeps the variables that are ours to read.
    pub(super) fn new(env: impl IntoIterator<Item = (String, String)>) -> Self {
        let ours = |name: &str, value: &str| name.starts_with(ENV_PREFIX) && !is_service_link(name, value);
        let env: BTreeMap<String, String> = env.into_iter().collect();
        let (aliases, faults) = Aliases::read(&env);
        Self {
            env: env.into_iter().filter(|(name, value)| ours(name, value)).collect(),
            aliases,
            used: RefCell::default(),
            faults: RefCell::new(faults),
        }
    }

    /// All faults, those of unread variables included, and the aliases that were taken.
    pub(super) fn into_faults(self) -> (Vec<Fault>, Vec<Alias>) {
        let mut faults = self.faults.into_inner();
        let used = self.used.into_inner();
        let unread = self.env.into_iter().filter(|(name, _)| !used.contains(name));
        faults.extend(unread.map(|(name, value)| Fault {
            path: name,
            found: shown(&value),
            expected: "the name of a setting that the configuration has".to_owned(),
        }));
        (faults, self.aliases.taken())
    }

    fn variable(&self, path: &str) -> Option<&String> {
        let capital = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' };
        let name: String = path.replace(']', "").chars().map(capital).collect();
        let Some((name, value)) = self.env.get_key_value(&format!("{ENV_PREFIX}{name}")) else {
            return self.aliases.value(path);
        };
        self.used.borrow_mut().insert(name.clone());
        Some(value)
    }

    fn fault(&self, path: &str, found: impl Display, expected: impl Display) {
        let path = if path.is_empty() { "configuration".to_owned() } else { path.to_owned() };
        self.faults.borrow_mut().push(Fault { path, found: found.to_string(), expected: expected.to_string() });
    }
}

/// A value as a fault shows it: URLs may hold passwords.
pub(super) fn shown(value: &str) -> String {
    if value.contains('@') && value.contains("://") {
        "a URL with a user or a password".to_owned()
    } else {
        format!("{value:?}")
    }
}

/// Kubernetes sets variables for every Service; one that is called `warmroute…` would look like ours.
fn is_service_link(name: &str, value: &str) -> bool {
    let numbered_port =
        name.split_once("_PORT_").is_some_and(|(_, rest)| rest.starts_with(|c: char| c.is_ascii_digit()));
    let port = name.ends_with("_PORT") && value.contains("://");
    numbered_port || port || name.contains("_SERVICE_HOST") || name.contains("_SERVICE_PORT")
}

/// A place in the document, present or not.
#[derive(Clone)]
pub(super) struct Node<'a> {
    source: &'a Source,
    path: String,
    value: Option<&'a Value>,
}

impl<'a> Node<'a> {
    pub(super) fn root(source: &'a Source, value: &'a Value) -> Self {
        Self { source, path: String::new(), value: Some(value).filter(|value| !value.is_null()) }
    }

    /// Reports a fault at this place.
    pub(super) fn fault(&self, found: impl Display, expected: impl Display) {
        self.source.fault(&self.path, found, expected);
    }

    /// The fields of a mapping; an absent one is empty. Any other field than `names` is a fault.
    pub(super) fn fields<const N: usize>(&self, names: [&str; N]) -> [Node<'a>; N] {
        let map = match self.value {
            None => None,
            Some(Value::Object(map)) => Some(map),
            Some(other) => {
                self.fault(describe(other), format!("a mapping with {}", list(&names)));
                None
            }
        };
        for unknown in map.into_iter().flatten().map(|(name, _)| name).filter(|name| !names.contains(&name.as_str())) {
            self.source.fault(&self.child_path(unknown), "an unknown setting", format!("one of {}", list(&names)));
        }
        names.map(|name| Node {
            source: self.source,
            path: self.child_path(name),
            value: map.and_then(|map| map.get(name)).filter(|value| !value.is_null()),
        })
    }

    /// Whether the document or the environment has something here itself; a mapping counts, whatever is in it.
    pub(super) fn is_given(&self) -> bool {
        self.value.is_some() || self.source.variable(&self.path).is_some()
    }

    /// The items of a list; an absent one is empty.
    pub(super) fn items(&self) -> Vec<Node<'a>> {
        match self.value {
            None => Vec::new(),
            Some(Value::Array(items)) => items.iter().enumerate().map(|(i, value)| self.item(i, value)).collect(),
            Some(other) => {
                self.fault(describe(other), "a list");
                Vec::new()
            }
        }
    }

    fn item(&self, i: usize, value: &'a Value) -> Node<'a> {
        Node { source: self.source, path: format!("{}[{i}]", self.path), value: Some(value).filter(|v| !v.is_null()) }
    }

    /// A scalar, parsed from its text; none when it is absent or wrong.
    pub(super) fn optional<T: FromStr>(&self, expected: &str) -> Option<T> {
        self.parsed(expected, |text, _| shown(text))
    }

    /// The same of what a fault must not show; `found` says what is wrong with it.
    pub(super) fn secret<T: FromStr>(&self, expected: &str, found: impl Fn(T::Err) -> &'static str) -> Option<T> {
        self.parsed(expected, |_, error| found(error).to_owned())
    }

    fn parsed<T: FromStr>(&self, expected: &str, found: impl Fn(&str, T::Err) -> String) -> Option<T> {
        let text = self.text(expected)?;
        text.parse().map_err(|error| self.fault(found(&text, error), expected)).ok()
    }

    /// What AIBrix's variables say of this kind of tokenizer, unless a variable of ours says more.
    pub(super) fn kind_alias(&self) -> Option<KindAlias> {
        let alias = self.source.aliases.kind(&self.path);
        alias.filter(|_| self.source.variable(&self.path).is_none())
    }

    /// A scalar that must be there; none (with a fault) when it is not.
    pub(super) fn required<T: FromStr>(&self, expected: &str) -> Option<T> {
        if self.value.is_none() && self.source.variable(&self.path).is_none() {
            self.fault("nothing", expected);
            return None;
        }
        self.optional(expected)
    }

    /// A scalar with a default.
    pub(super) fn or<T: FromStr>(&self, default: T, expected: &str) -> T {
        self.optional(expected).unwrap_or(default)
    }

    /// Text that YAML must not have read as something else: `1.10`, `042` and `yes` would silently become `1.1`, `42.0`
    /// and `true`. A whole number is what it looks like.
    pub(super) fn string(&self, expected: &str) -> Option<String> {
        let is_altered = match self.value {
            Some(Value::Bool(_)) => true,
            Some(Value::Number(number)) => !number.is_u64() && !number.is_i64(),
            _ => false,
        };
        if is_altered && self.source.variable(&self.path).is_none() {
            self.fault("a value that YAML reads as a number or as true or false", format!("{expected}, in quotes"));
            return None;
        }
        self.optional(expected)
    }

    /// [`Node::string`] that must be there and not be empty.
    pub(super) fn name(&self, expected: &str) -> Option<String> {
        let is_absent = self.value.is_none() && self.source.variable(&self.path).is_none();
        let name = if is_absent { Some(String::new()) } else { self.string(expected) }?;
        if name.is_empty() {
            self.fault("nothing", expected);
            return None;
        }
        Some(name)
    }

    fn text(&self, expected: &str) -> Option<String> {
        if let Some(value) = self.source.variable(&self.path) {
            return Some(value.clone());
        }
        match self.value? {
            Value::String(text) => Some(text.clone()),
            Value::Number(number) => Some(number.to_string()),
            Value::Bool(flag) => Some(flag.to_string()),
            other => {
                self.fault(describe(other), expected);
                None
            }
        }
    }

    fn child_path(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }
}

fn describe(value: &Value) -> &'static str {
    match value {
        Value::Null => "nothing",
        Value::Array(_) => "a list",
        Value::Object(_) => "a mapping",
        Value::Bool(_) | Value::Number(_) | Value::String(_) => "a single value",
    }
}

fn list(names: &[&str]) -> String {
    names.join(", ")
}
