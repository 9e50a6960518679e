//! Holds the table "Who may import whom" of `docs/architecture.md` against the source.
//!
//! The source is read as text: comments, literals and test code are blanked, `use` trees are flattened, and what
//! remains is a list of paths with their lines. No build and no network is needed.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

/// Heading of the table in `docs/architecture.md`.
const HEADING: &str = "## Who may import whom";

/// What the pure core must not use, as path prefixes, and why.
const IMPURE: [(&str, &str); 16] = [
    ("tokio", "routing never awaits"),
    ("tokio_stream", "routing never awaits"),
    ("tokio_util", "routing never awaits"),
    ("futures_util", "routing never awaits"),
    ("tonic", "routing does no I/O"),
    ("reqwest", "routing does no I/O"),
    ("hyper", "routing does no I/O"),
    ("axum", "routing does no I/O"),
    ("zmq", "routing does no I/O"),
    ("std::fs", "routing does no I/O"),
    ("std::net::TcpStream", "routing does no I/O"),
    ("std::net::UdpSocket", "routing does no I/O"),
    ("tracing", "routing does not log"),
    ("std::env", "routing reads no environment"),
    ("std::thread", "routing starts no thread"),
    ("std::time::SystemTime", "time is an argument of routing"),
];

#[test]
fn every_import_is_in_the_table() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let document = fs::read_to_string(root.join("docs/architecture.md")).unwrap();
    let table = parse_table(&document);
    let mut broken = table_faults(&table, &modules(&root.join("src")));

    for file in source_files(&root.join("src")) {
        let shown = file.strip_prefix(root).unwrap().display().to_string();
        let Some(module) = module_path(file.strip_prefix(root.join("src")).unwrap()) else {
            continue;
        };
        let source = fs::read_to_string(&file).unwrap();
        broken.extend(violations(&source, &module, &table).iter().map(|v| format!("{shown}:{v}")));
    }

    assert!(broken.is_empty(), "{} broken rules:\n{}", broken.len(), broken.join("\n"));
}

/// What a module may import.
#[derive(Debug, PartialEq)]
enum Allowed {
    Everything,
    Only(Vec<String>),
}

type Table = BTreeMap<String, Allowed>;

/// A path in the source that breaks a rule.
#[derive(Debug, PartialEq)]
struct Violation {
    line: usize,
    rule: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.line, self.rule)
    }
}

/// The rows below [`HEADING`]: names in backticks, or `everything`, or `nothing`.
fn parse_table(document: &str) -> Table {
    let (_, section) = document.split_once(HEADING).expect("the document has the heading");
    let rows = section.lines().skip_while(|line| !line.starts_with('|'));
    let rows = rows.take_while(|line| line.starts_with('|')).skip(2);
    rows.map(|row| {
        let mut cells = row.trim_matches('|').split('|').map(str::trim);
        let module = cells.next().unwrap().trim_matches('`').to_owned();
        let allowed = match cells.next().unwrap() {
            "everything" => Allowed::Everything,
            "nothing" => Allowed::Only(Vec::new()),
            names => Allowed::Only(names.split(',').map(|name| name.trim().trim_matches('`').to_owned()).collect()),
        };
        (module, allowed)
    })
    .collect()
}

/// Modules that the table lacks, and names in it that are no modules.
fn table_faults(table: &Table, modules: &[String]) -> Vec<String> {
    let mut faults = Vec::new();
    for module in modules {
        if !table.contains_key(module) {
            faults.push(format!("docs/architecture.md: module {module} is missing in the table"));
        }
    }
    let named = table.iter().flat_map(|(module, allowed)| match allowed {
        Allowed::Everything => vec![module],
        Allowed::Only(names) => names.iter().chain([module]).collect(),
    });
    for name in named {
        if !modules.contains(name) {
            faults.push(format!("docs/architecture.md: the table names {name}, which is no module"));
        }
    }
    faults
}

/// What `source`, the text of `module`, names without being allowed to.
fn violations(source: &str, module: &[String], table: &Table) -> Vec<Violation> {
    let top = &module[0];
    // A module that is missing in the table is reported once, as such.
    let Some(allowed) = table.get(top) else {
        return Vec::new();
    };
    let mut violations = Vec::new();
    for (line, path) in paths(&tokens(&without_tests(&blank_literals(source)))) {
        if let Some(target) = crate_module(&path, module, table) {
            let may = match allowed {
                Allowed::Everything => true,
                Allowed::Only(names) => target == *top || names.contains(&target),
            };
            if !may {
                let rule = format!("{top} may not import {target} (docs/architecture.md)");
                violations.push(Violation { line, rule });
            }
        }
        if top == "routing"
            && let Some(reason) = impurity(&path)
        {
            let rule = format!("{}: {reason}", path.join("::"));
            violations.push(Violation { line, rule });
        }
    }
    violations
}

/// The module at the crate's root that `path`, found inside `module`, leads to.
fn crate_module(path: &[String], module: &[String], table: &Table) -> Option<String> {
    if path[0] == "crate" {
        return path.get(1).cloned();
    }
    let n_supers = path.iter().take_while(|name| *name == "super").count();
    // An inline module is one level deeper than its file, hence the look at the name.
    let target = path.get(n_supers).filter(|target| table.contains_key(*target))?;
    (n_supers > 0 && n_supers >= module.len()).then(|| target.clone())
}

fn impurity(path: &[String]) -> Option<&'static str> {
    let joined = path.join("::");
    // A crate's name alone may be that of a variable.
    let is_below = |prefix: &str| match joined.strip_prefix(prefix) {
        Some("") => prefix.contains("::"),
        Some(rest) => rest.starts_with("::"),
        None => false,
    };
    if let Some((_, reason)) = IMPURE.iter().find(|(prefix, _)| is_below(prefix)) {
        return Some(reason);
    }
    if joined.ends_with("Instant::now") {
        return Some("time is an argument of routing");
    }
    if path[0] == "fastrand" && path.get(1).is_some_and(|name| name != "Rng") {
        return Some("randomness is an argument of routing");
    }
    None
}

/// Names of the modules at the crate's root.
fn modules(src: &Path) -> Vec<String> {
    let entries = fs::read_dir(src).unwrap().map(|entry| entry.unwrap().path());
    let mut modules: Vec<_> = entries
        .map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned())
        .filter(|name| name != "lib" && name != "main")
        .collect();
    modules.sort();
    modules.dedup();
    modules
}

fn source_files(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(source_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") && !path.ends_with("tests.rs") {
            // A file of tests is declared under `#[cfg(test)]` and exempt like a module of tests.
            files.push(path);
        }
    }
    files.sort();
    files
}

/// `routing/hash.rs` is `[routing, hash]`; the crate's root has no module to hold to a rule.
fn module_path(relative: &Path) -> Option<Vec<String>> {
    let without_extension = relative.with_extension("");
    let mut names: Vec<_> =
        without_extension.components().map(|name| name.as_os_str().to_str().unwrap().to_owned()).collect();
    if names.last().is_some_and(|name| name == "mod") {
        names.pop();
    }
    (names != ["lib"] && names != ["main"]).then_some(names)
}

/// `source` with comments and the insides of literals replaced by spaces; lines stay where they are.
fn blank_literals(source: &str) -> String {
    let mut rest = source;
    let mut blanked = String::with_capacity(source.len());
    while let Some(first) = rest.chars().next() {
        let after_identifier = blanked.chars().next_back().is_some_and(|c| c.is_alphanumeric() || c == '_');
        let n_bytes = match first {
            '/' if rest.starts_with("//") => rest.find('\n').unwrap_or(rest.len()),
            '/' if rest.starts_with("/*") => block_comment_len(rest),
            '"' => string_len(rest),
            'r' if !after_identifier && is_raw_string(&rest[1..]) => 1 + raw_string_len(&rest[1..]),
            'b' if !after_identifier && rest[1..].starts_with('r') && is_raw_string(&rest[2..]) => {
                2 + raw_string_len(&rest[2..])
            }
            '\'' => char_len(rest),
            _ => 0,
        };
        if n_bytes == 0 {
            blanked.push(first);
            rest = &rest[first.len_utf8()..];
        } else {
            let blanks = rest[..n_bytes].chars().map(|c| if c == '\n' { '\n' } else { ' ' });
            blanked.extend(blanks);
            rest = &rest[n_bytes..];
        }
    }
    blanked
}

fn block_comment_len(text: &str) -> usize {
    let mut depth = 0;
    let mut position = 0;
    while position < text.len() {
        let rest = &text[position..];
        if rest.starts_with("/*") {
            depth += 1;
            position += 2;
        } else if rest.starts_with("*/") {
            depth -= 1;
            position += 2;
        } else {
            position += rest.chars().next().map_or(1, char::len_utf8);
        }
        if depth == 0 {
            return position;
        }
    }
    text.len()
}

fn string_len(text: &str) -> usize {
    let mut escaped = false;
    for (position, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return position + 1,
            _ => {}
        }
    }
    text.len()
}

/// Whether `text`, which follows an `r`, is the rest of a raw string.
fn is_raw_string(text: &str) -> bool {
    text.trim_start_matches('#').starts_with('"')
}

fn raw_string_len(text: &str) -> usize {
    let n_hashes = text.len() - text.trim_start_matches('#').len();
    let end = format!("\"{}", "#".repeat(n_hashes));
    let inside = n_hashes + 1;
    text[inside..].find(&end).map_or(text.len(), |position| inside + position + end.len())
}

/// Length of a character literal, 0 for a lifetime.
fn char_len(text: &str) -> usize {
    let mut chars = text.char_indices().skip(1);
    match chars.next() {
        Some((_, '\\')) => {
            // The escaped character itself may be a quote.
            let end = chars.skip(1).find(|(_, c)| *c == '\'');
            end.map_or(0, |(position, _)| position + 1)
        }
        Some(_) => match chars.next() {
            Some((position, '\'')) => position + 1,
            _ => 0,
        },
        None => 0,
    }
}

/// `source` with every item behind `#[cfg(test)]` replaced by spaces; literals are blank already.
fn without_tests(source: &str) -> String {
    const MARK: &str = "#[cfg(test)]";
    let mut kept = source.to_owned();
    let mut from = 0;
    while let Some(position) = kept[from..].find(MARK) {
        let start = from + position;
        let end = start + MARK.len() + item_len(&kept[start + MARK.len()..]);
        let blank: String = kept[start..end].chars().map(|c| if c == '\n' { '\n' } else { ' ' }).collect();
        from = start + blank.len();
        kept.replace_range(start..end, &blank);
    }
    kept
}

/// Length of the item at the start of `text`: up to its `;`, or to the end of its braces.
fn item_len(text: &str) -> usize {
    let mut depth = 0_usize;
    for (position, c) in text.char_indices() {
        match c {
            ';' if depth == 0 => return position + 1,
            '{' => depth += 1,
            '}' => {
                depth = depth.saturating_sub(1);
                if depth == 0 {
                    return position + 1;
                }
            }
            _ => {}
        }
    }
    text.len()
}

#[derive(Clone, Debug, PartialEq)]
enum Token {
    Name(String),
    /// `::`
    Separator,
    Other(char),
}

/// The tokens of `source` with their lines, which count from 1.
fn tokens(source: &str) -> Vec<(usize, Token)> {
    let mut tokens = Vec::new();
    for (line_idx, line) in source.lines().enumerate() {
        let mut rest = line.trim_start();
        while let Some(first) = rest.chars().next() {
            let is_name = |c: char| c.is_alphanumeric() || c == '_';
            let (token, n_bytes) = if is_name(first) {
                let n_bytes = rest.find(|c| !is_name(c)).unwrap_or(rest.len());
                (Token::Name(rest[..n_bytes].to_owned()), n_bytes)
            } else if rest.starts_with("::") {
                (Token::Separator, 2)
            } else {
                (Token::Other(first), first.len_utf8())
            };
            tokens.push((line_idx + 1, token));
            rest = rest[n_bytes..].trim_start();
        }
    }
    tokens
}

/// All paths with their lines; the groups of `use` trees are multiplied out.
fn paths(tokens: &[(usize, Token)]) -> Vec<(usize, Vec<String>)> {
    let mut paths = Vec::new();
    let mut position = 0;
    while position < tokens.len() {
        match &tokens[position].1 {
            Token::Name(_) => position = path(tokens, position, &[], &mut paths),
            _ => position += 1,
        }
    }
    paths
}

/// Adds the paths that begin at `position` below `prefix`, and returns the position behind them.
fn path(
    tokens: &[(usize, Token)],
    mut position: usize,
    prefix: &[String],
    paths: &mut Vec<(usize, Vec<String>)>,
) -> usize {
    let mut names = prefix.to_vec();
    let line = tokens[position].0;
    while let Some((_, Token::Name(name))) = tokens.get(position) {
        names.push(name.clone());
        position += 1;
        if tokens.get(position).map(|(_, token)| token) != Some(&Token::Separator) {
            break;
        }
        position += 1;
        if tokens.get(position).map(|(_, token)| token) == Some(&Token::Other('{')) {
            return group(tokens, position + 1, &names, paths);
        }
    }
    paths.push((line, names));
    position
}

/// Adds the paths of a `use` group whose first token is at `position`, and returns the position behind it.
fn group(
    tokens: &[(usize, Token)],
    mut position: usize,
    prefix: &[String],
    paths: &mut Vec<(usize, Vec<String>)>,
) -> usize {
    while let Some((_, token)) = tokens.get(position) {
        match token {
            Token::Name(name) if name == "as" => position += 2,
            Token::Name(_) => position = path(tokens, position, prefix, paths),
            Token::Other('}') => return position + 1,
            _ => position += 1,
        }
    }
    position
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOCUMENT: &str = "\
text
## Who may import whom
| module | may import | therefore |
|---|---|---|
| `supervisor` | everything | |
| `events` | `routing` | |
| `routing` | nothing | the core |
";

    fn check(module: &[&str], source: &str) -> Vec<(usize, String)> {
        let module: Vec<_> = module.iter().map(|name| (*name).to_owned()).collect();
        let violations = violations(source, &module, &parse_table(DOCUMENT));
        violations.into_iter().map(|violation| (violation.line, violation.rule)).collect()
    }

    #[test]
    fn imports_in_every_form_are_found() {
        for source in [
            "use crate::events::Config;",
            "use crate::{routing::index, events::{self, wire}};",
            "fn f(config: &crate::events::Config) {}",
            "use super::super::events;",
            "use crate::events as e;",
            "fn f() { 'x': for c in ['\\'', '\"'] { crate::events::run(c) } }",
        ] {
            let found = check(&["routing", "hash"], source);
            assert!(!found.is_empty(), "{source}");
            for (line, rule) in found {
                assert_eq!(line, 1);
                assert_eq!(rule, "routing may not import events (docs/architecture.md)", "{source}");
            }
        }
    }

    #[test]
    fn allowed_imports_pass() {
        assert_eq!(check(&["events"], "use crate::routing::index; use super::routing;"), []);
        assert_eq!(check(&["supervisor"], "use crate::{events, routing};"), []);
        assert_eq!(check(&["routing", "pick"], "use super::index; use crate::routing::load;"), []);
    }

    #[test]
    fn comments_literals_and_tests_do_not_count() {
        let source = r####"
//! [`crate::events`]
/* crate::events /* nested */ crate::events */
const A: &str = "crate::events \" crate::events";
const B: &str = r#"" crate::events"#;
const C: (u8, char) = (b'"', '"');
#[cfg(test)]
mod tests {
    use crate::events;
    const BRACE: char = '}';
    use crate::events;
}
fn last() { crate::events::run() }
"####;
        let found: Vec<_> = check(&["routing"], source).into_iter().map(|(line, _)| line).collect();
        assert_eq!(found, [13]);
    }

    #[test]
    fn the_core_uses_no_clock_no_io_no_log_and_no_randomness_of_its_own() {
        for source in [
            "use tokio::sync::watch;",
            "use std::time::{Duration, SystemTime};",
            "let now = Instant::now();",
            "let now = std::time::Instant::now();",
            "tracing::info!(\"x\");",
            "let n = fastrand::usize(..n);",
            "let home = std::env::var(NAME);",
        ] {
            assert_eq!(check(&["routing", "pick"], source).len(), 1, "{source}");
        }
        for source in [
            "use std::time::{Duration, Instant};",
            "fn f(rng: &mut fastrand::Rng, tokio: u8) { self.tracing }",
            "let ip = std::net::IpAddr::V4(ip);",
        ] {
            assert_eq!(check(&["routing", "pick"], source), [], "{source}");
        }
    }

    #[test]
    fn table_and_modules_must_agree() {
        let modules = ["events", "routing", "request"].map(str::to_owned);
        let faults = table_faults(&parse_table(DOCUMENT), &modules);
        assert_eq!(
            faults,
            [
                "docs/architecture.md: module request is missing in the table",
                "docs/architecture.md: the table names supervisor, which is no module",
            ]
        );
    }
}
