//! What settings there are, what they may be and what they are by default: asked of the program itself.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::LazyLock;

use serde_json::{Map, Value, json};
use warmroute::config::{Config, Difference, Error, Fault};

/// One value of the configuration.
pub(super) struct Setting {
    /// Its path; `[]` stands for a position in a list.
    pub(super) path: String,
    /// What the program expects there.
    pub(super) expected: String,
    /// What holds where nothing is said.
    pub(super) default: String,
    /// Whether a change is taken while the program runs.
    pub(super) is_reloadable: bool,
}

impl Setting {
    /// The path of the mapping that it is in.
    pub(super) fn parent(&self) -> &str {
        self.path.rsplit_once('.').map_or("", |(parent, _)| parent)
    }
}

/// The ways to find endpoints: no configuration has two of them.
const DISCOVERIES: [&str; 4] = [
    "{static: [{address: '10.0.0.1:8000'}]}",
    "{kubernetes: {}}",
    "{dns: {name: engines.example.}}",
    "{file: {path: /etc/warmroute/endpoints.yaml}}",
];

/// The smallest configurations that have everything that must be given.
fn smallest() -> Vec<Value> {
    let model = |discovery| format!("{{models: [{{name: m, adapters: [{{name: a}}], discovery: {discovery}}}]}}");
    DISCOVERIES.iter().map(|discovery| serde_saphyr::from_str(&model(discovery)).unwrap()).collect()
}

fn parse(document: &Value) -> Result<Config, Vec<Fault>> {
    match Config::parse(&document.to_string(), []) {
        Ok(config) => Ok(config),
        Err(Error::Faults(faults)) => Err(faults),
        Err(error) => panic!("JSON is YAML, and yet: {error}"),
    }
}

fn effective(document: &Value) -> Value {
    let config = parse(document).unwrap_or_else(|faults| panic!("{document}: {faults:?}"));
    serde_saphyr::from_str(&config.to_yaml()).unwrap()
}

/// All settings, by the mapping that they are in.
pub(super) fn settings() -> Vec<Setting> {
    let mut settings: Vec<Setting> = Vec::new();
    let mut unknown = Vec::new();
    for smallest in smallest() {
        let mut given = Vec::new();
        leaves(&smallest, "", &mut given);
        let given: BTreeMap<String, Value> = given.into_iter().collect();
        let mut found = Vec::new();
        leaves(&effective(&smallest), "", &mut found);
        for (path, default) in found {
            if settings.iter().all(|setting| setting.path != path) {
                let default = if given.contains_key(&path) { "(must be given)".to_owned() } else { shown(&default) };
                let expected = expected(&smallest, &path);
                // Certificates would have to be made for it.
                let is_known =
                    is_reloadable(&smallest, &path).or_else(|| (path == "models[].engine.ca").then_some(false));
                unknown.extend(is_known.is_none().then(|| path.clone()));
                let is_reloadable = is_known.unwrap_or_default();
                settings.push(Setting { path, expected, default, is_reloadable });
            }
        }
    }
    assert!(unknown.is_empty(), "no value is known that these settings may have and do not have: {unknown:#?}");
    settings.sort_by(|a, b| (a.parent(), &a.path).cmp(&(b.parent(), &b.path)));
    settings
}

fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => format!("`{text}`"),
        other => format!("`{other}`"),
    }
}

/// What some settings need beside them: nothing, or another setting.
const COMPANIONS: [Option<(&str, &str)>; 9] = [
    None,
    Some(("models[].discovery.static[].events", "tcp://10.0.0.1:5557")),
    Some(("models[].discovery.kubernetes.replay_port", "6000")),
    Some(("models[].discovery.dns.replay_port", "6000")),
    Some(("models[].tokenizer.path", "README.md")),
    Some(("models[].tokenizer.api", "render")),
    Some(("models[].events.sync", "false")),
    Some(("metrics.otlp_endpoint", "http://other:1")),
    Some(("models[].engine.scheme", "https")),
];

/// Whether a change of the file is taken without a restart: what the program says of a file in which the setting has
/// another value. None: no value is known that it may have and does not have.
fn is_reloadable(document: &Value, path: &str) -> Option<bool> {
    let concrete = path.replace("[]", "[0]");
    let is_it = |found: &String| found.starts_with(&concrete) || concrete.starts_with(found.as_str());
    COMPANIONS.iter().find_map(|companion| {
        let mut document = document.clone();
        if let Some((companion, value)) = companion {
            *place(&mut document, companion) = json!(value);
        }
        let now = parse(&document).ok()?;
        OTHERS.iter().find_map(|other| {
            *place(&mut document, path) = other.clone();
            let Difference { live, at_start } = now.difference(&parse(&document).ok()?);
            let is_live = live.iter().any(is_it);
            (is_live || at_start.iter().any(is_it)).then_some(is_live)
        })
    })
}

/// Values, of which each setting may have one that is not its default.
static OTHERS: LazyLock<Vec<Value>> = LazyLock::new(|| {
    let secret = std::env::temp_dir().join(format!("warmroute-settings-{}", std::process::id()));
    std::fs::write(&secret, "a-secret-of-thirty-two-characters").unwrap();
    let texts = [
        "x-other",
        "m/other",
        "other.example.",
        "a=b",
        "3s",
        "90ms",
        "700ms",
        "text",
        "debug",
        "json",
        "https",
        "10.0.0.9:9",
        "tcp://10.0.0.9:99",
        "http://other:1",
        "original_dst",
        "full_duplex_streamed",
        "shadow",
        "xxhash",
        "render",
        "auto",
        "srv",
        "llm-d",
        "README.md",
        secret.to_str().unwrap(),
    ];
    let texts = texts.map(|text| json!(text));
    let others = [json!(true), json!(false), json!(7), json!(0.5), json!(100_000), json!(3_000_000), json!(["other"])];
    others.into_iter().chain([json!(["http://other:1"])]).chain(texts).collect()
});

/// All that is no mapping, by path.
fn leaves(value: &Value, path: &str, found: &mut Vec<(String, Value)>) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                leaves(value, &path, found);
            }
        }
        Value::Array(items) if items.iter().any(Value::is_object) => leaves(&items[0], &format!("{path}[]"), found),
        _ => found.push((path.to_owned(), value.clone())),
    }
}

/// What the program says that it expects, when it finds a mapping in the place of the setting.
fn expected(document: &Value, path: &str) -> String {
    let said = |path: &str, value: Value| {
        let mut document = document.clone();
        *place(&mut document, path) = value;
        let concrete = path.replace("[]", "[0]");
        let faults = parse(&document).err().unwrap_or_else(|| panic!("{path} may be anything"));
        let fault = faults.iter().find(|fault| fault.path == concrete);
        fault.unwrap_or_else(|| panic!("{path} is not at fault: {faults:?}")).expected.clone()
    };
    match said(path, json!({})).as_str() {
        "a list" => format!("a list; each {}", said(&format!("{path}[]"), json!({}))),
        other => other.to_owned(),
    }
}

/// The place of a setting in a document, made if it is not there; lists have one item.
fn place<'a>(document: &'a mut Value, path: &str) -> &'a mut Value {
    path.split('.').fold(document, |value, name| {
        if !value.is_object() {
            *value = Value::Object(Map::new());
        }
        let list = name.strip_suffix("[]");
        let field = value.as_object_mut().unwrap().entry(list.unwrap_or(name)).or_insert(Value::Null);
        if list.is_none() {
            return field;
        }
        if !field.is_array() {
            *field = json!([null]);
        }
        &mut field[0]
    })
}

/// The variable that overrides a setting of the first model, or of the first item of whatever list; none for lists,
/// which no variable has.
pub(super) fn environment(path: &str) -> Option<String> {
    let is_list = smallest().iter().any(|document| {
        let mut document = document.clone();
        *place(&mut document, path) = json!({});
        let concrete = path.replace("[]", "[0]");
        let faults = parse(&document).err().unwrap_or_default();
        faults.iter().any(|fault| fault.path == concrete && fault.expected == "a list")
    });
    let capital = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' };
    let name: String = path.replace("[]", "_0").chars().map(capital).collect();
    (!is_list).then(|| format!("WARMROUTE_{name}"))
}

/// Whether the program reads the variable in some configuration: what nobody asks for is a fault.
pub(super) fn is_read(variable: &str) -> bool {
    smallest().iter().any(|document| {
        match Config::parse(&document.to_string(), [(variable.to_owned(), "\u{1}".to_owned())]) {
            Err(Error::Faults(faults)) => faults.iter().all(|fault| fault.path != variable),
            other => other.is_ok(),
        }
    })
}

/// All names that the program takes, by path without `[]` at the end: what it offers when it finds one that it does
/// not know.
pub(super) fn unknown_names() -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for document in smallest() {
        let mut mappings = BTreeSet::from([String::new()]);
        let mut found = Vec::new();
        leaves(&effective(&document), "", &mut found);
        for (path, _) in &found {
            let mut path = path.as_str();
            while let Some((parent, _)) = path.rsplit_once('.') {
                mappings.insert(parent.to_owned());
                path = parent;
            }
        }
        for mapping in mappings {
            let separator = if mapping.is_empty() { "" } else { "." };
            names.extend(offered(&document, &mapping).into_iter().map(|name| format!("{mapping}{separator}{name}")));
        }
    }
    names
}

/// The names that the program offers in a mapping.
fn offered(document: &Value, mapping: &str) -> Vec<String> {
    const UNKNOWN: &str = "no_such_setting";
    let path = if mapping.is_empty() { UNKNOWN.to_owned() } else { format!("{mapping}.{UNKNOWN}") };
    let mut document = document.clone();
    *place(&mut document, &path) = json!(1);
    let concrete = path.replace("[]", "[0]");
    let faults = parse(&document).expect_err("a name that is not known is a fault");
    let fault = faults.iter().find(|fault| fault.path == concrete);
    let fault = fault.unwrap_or_else(|| panic!("{path} is taken: {faults:?}"));
    let names = fault.expected.strip_prefix("one of ").unwrap_or_else(|| panic!("{path}: {}", fault.expected));
    names.split(", ").map(str::to_owned).collect()
}

/// The words before a colon in the YAML blocks of a document.
pub(super) fn names_in(markdown: &str) -> BTreeSet<String> {
    let blocks = markdown.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next());
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut names = BTreeSet::new();
    for block in blocks {
        for (end, _) in block.match_indices(':') {
            let before = &block[..end];
            let start = before.rfind(|c| !is_part(c)).map_or(0, |i| i + 1);
            names.insert(before[start..].to_owned());
        }
    }
    names
}
