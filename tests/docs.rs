//! Holds the documentation against what it speaks of: links lead somewhere, each alert has its runbook, metrics that
//! are named exist, and the log lines of the event plane are listed.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

const ALERTS: &str = "charts/warmroute/files/alerts.yaml";
const RUNBOOKS: &str = "docs/runbooks";
const HEADINGS: [&str; 5] = ["## Symptom", "## Meaning", "## Commands", "## Fix", "## Over"];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Files with this extension below `dir`, which is relative to the root as they are.
fn files(dir: &str, extension: &str) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(root().join(dir)).unwrap() {
        let entry = entry.unwrap();
        let path = format!("{dir}/{}", entry.file_name().into_string().unwrap());
        if entry.path().is_dir() {
            found.extend(files(&path, extension));
        } else if Path::new(&path).extension().is_some_and(|found| found == extension) {
            found.push(path);
        }
    }
    found
}

fn pages() -> Vec<String> {
    let mut pages = vec!["README.md".to_owned(), "charts/warmroute/README.md".to_owned()];
    pages.extend(files("docs", "md"));
    pages
}

/// The text outside of code blocks, and of code within lines.
fn prose(markdown: &str) -> String {
    let blocks = markdown.split("```").step_by(2);
    blocks.map(|block| block.split('`').step_by(2).collect::<Vec<_>>().join("code")).collect()
}

/// Where the links of a page lead.
fn links(markdown: &str) -> Vec<String> {
    let prose = prose(markdown);
    let targets = prose.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    targets.map(str::to_owned).collect()
}

/// The anchors of a page's headings, as GitHub makes them.
fn anchors(markdown: &str) -> BTreeSet<String> {
    let anchor = |heading: &str| {
        let is_kept = |c: &char| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_');
        let text: String = heading.trim_start_matches('#').trim().to_lowercase().chars().filter(is_kept).collect();
        text.replace(' ', "-")
    };
    markdown.lines().filter(|line| line.starts_with('#')).map(anchor).collect()
}

#[test]
fn links_lead_to_files_and_headings_that_are_there() {
    let mut dead = Vec::new();
    let mut n_links = 0;
    for page in pages() {
        let text = read(&page);
        for link in links(&text).iter().filter(|link| !link.contains("://")) {
            n_links += 1;
            let (file, anchor) = link.split_once('#').map_or((link.as_str(), None), |(file, part)| (file, Some(part)));
            let dir = root().join(&page).parent().unwrap().to_owned();
            let target = if file.is_empty() { root().join(&page) } else { dir.join(file) };
            let is_there = match (target.exists(), anchor) {
                (false, _) => false,
                (true, None) => true,
                (true, Some(anchor)) => anchors(&fs::read_to_string(&target).unwrap()).contains(anchor),
            };
            if !is_there {
                dead.push(format!("{page}: {link}"));
            }
        }
    }
    assert!(dead.is_empty(), "links that lead nowhere: {dead:#?}");
    assert!(n_links > 50, "only {n_links} links are found: the search is broken");
}

#[test]
fn links_and_anchors_are_found_in_markdown() {
    let page = "[a](b.md#c) `[x](y)` \n```\n[d](e)\n```\n[f](g.md)";
    assert_eq!(links(page), ["b.md#c", "g.md"]);
    assert!(
        anchors("## Rollout, step by step\n### `x.y`")
            .is_superset(&BTreeSet::from(["rollout-step-by-step".to_owned()]))
    );
}

/// Names of the alerts, with the runbook each names, if any.
fn alerts() -> Vec<(String, Option<String>)> {
    let mut alerts: Vec<(String, Option<String>)> = Vec::new();
    for line in read(ALERTS).lines() {
        if let Some(name) = line.trim_start().strip_prefix("- alert: ") {
            alerts.push((name.trim().to_owned(), None));
        } else if let Some((_, url)) = line.split_once("runbook_url: ") {
            alerts.last_mut().unwrap().1 = Some(url.trim().trim_matches('"').to_owned());
        }
    }
    alerts
}

#[test]
fn each_alert_has_its_runbook_and_each_runbook_its_alert() {
    let index = read(&format!("{RUNBOOKS}/README.md"));
    let alerts = alerts();
    assert!(!alerts.is_empty(), "{ALERTS} has no alerts, as far as this test can see");
    for (alert, url) in &alerts {
        let row = index.lines().find(|line| line.starts_with(&format!("| `{alert}` |")));
        let row = row.unwrap_or_else(|| panic!("{alert} is not in {RUNBOOKS}/README.md"));
        let slug = links(row).first().cloned().unwrap_or_else(|| panic!("{alert} has no page: {row}"));
        assert!(read(&format!("{RUNBOOKS}/{slug}")).contains(&format!("`{alert}`")), "{slug} is not about {alert}");
        if let Some(url) = url {
            // The chart's template knows where the runbooks are.
            assert!(url.ends_with(&format!("/{slug}")), "{alert}: {url}");
        }
    }
    let listed: BTreeSet<String> = links(&index).into_iter().collect();
    for page in files(RUNBOOKS, "md") {
        let name = page.rsplit('/').next().unwrap();
        assert!(name == "README.md" || listed.contains(name), "{page} is not in the index");
    }
}

#[test]
fn each_runbook_has_its_parts_in_order() {
    for page in files(RUNBOOKS, "md").iter().filter(|page| !page.ends_with("README.md")) {
        let text = read(page);
        let headings: Vec<&str> = text.lines().filter(|line| line.starts_with("## ")).collect();
        assert_eq!(headings, HEADINGS, "{page}");
        let commands = text.split_once("## Commands").unwrap().1.split_once("## Fix").unwrap().0;
        assert!(commands.contains("```"), "{page} has nothing to type");
    }
}

/// The metrics of ours that a text names.
fn metrics(text: &str) -> BTreeSet<&str> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let words = text.split(|c| !is_part(c));
    words.filter(|word| word.starts_with("warmroute_") && *word != "warmroute_" && !word.ends_with('_')).collect()
}

#[test]
fn metrics_that_the_pages_name_are_in_the_reference() {
    const REFERENCE: &str = "docs/metrics.md";
    let known = read(REFERENCE);
    let known = metrics(&known);
    let is_known = |name: &str| {
        let of_histogram = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix));
        known.contains(name) || of_histogram.is_some_and(|name| known.contains(name))
    };
    let is_beginning = |name: &str| known.iter().any(|known| known.starts_with(name));
    let mut unknown = BTreeSet::new();
    for page in pages().iter().filter(|page| *page != REFERENCE) {
        for line in read(page).lines() {
            // What is searched for may be the beginning of several names.
            let is_search = line.contains("grep ");
            let is_wrong = |name: &&str| !(is_known(name) || is_search && is_beginning(name));
            unknown.extend(metrics(line).into_iter().filter(is_wrong).map(|name| format!("{page}: {name}")));
        }
    }
    assert!(unknown.is_empty(), "metrics that are not in {REFERENCE}: {unknown:#?}");
}

#[test]
fn log_lines_of_the_event_plane_are_listed() {
    let page = read("docs/operations.md");
    let mut n_lines = 0;
    for dir in ["src/events", "src/snapshots", "src/supervisor", "src/discovery"] {
        for file in files(dir, "rs") {
            let source = read(&file);
            let code = source.split("#[cfg(test)]").next().unwrap();
            for literal in code.lines().filter(|line| !line.trim_start().starts_with("//")).flat_map(literals) {
                // What is put in changes.
                let fixed = literal.split('{').next().unwrap().trim_end();
                assert!(page.contains(fixed), "{file}: {literal:?} is not in docs/operations.md");
                n_lines += 1;
            }
        }
    }
    assert!(n_lines > 40, "only {n_lines} lines are found: the search is broken");
}

/// Enums whose names in metrics, logs and answers are told to operators, each with the heading under which they are:
/// several have names in common.
const TOLD: [(&str, &str); 7] = [
    ("Outcome", "## Outcomes"),
    ("Opaque", "### Fallbacks"),
    ("Fallback", "### Fallbacks"),
    ("Unsupported", "### Fallbacks"),
    ("Error", "### Fallbacks"),
    ("Leave", "### Left to Envoy"),
    ("Refusal", "### Refused"),
];

/// What stands below a heading, up to the next one of any depth.
fn section<'a>(page: &'a str, heading: &str) -> &'a str {
    let (_, rest) = page.split_once(&format!("\n{heading}\n")).unwrap_or_else(|| panic!("no {heading:?}"));
    rest.split("\n#").next().unwrap()
}

#[test]
fn every_outcome_and_reason_is_explained() {
    let page = read("docs/routing.md");
    let mut found = BTreeSet::new();
    for file in files("src", "rs") {
        for (of, name) in names(&read(&file)) {
            let Some((told, heading)) = TOLD.iter().find(|(told, _)| *told == of) else { continue };
            // Other types that are called so are no reasons.
            if of != "Error" || name.starts_with("tokenizer_") {
                let is_told = section(&page, heading).contains(&format!("`{name}`"));
                assert!(is_told, "{file}: {of} {name:?} is not in docs/routing.md below {heading:?}");
                found.insert(*told);
            }
        }
    }
    let expected: BTreeSet<&str> = TOLD.iter().map(|(told, _)| *told).collect();
    assert_eq!(found, expected, "enums of which names were found");
}

/// What `as_str` answers in a file, with the type that it is of.
fn names(source: &str) -> Vec<(String, String)> {
    let mut names = Vec::new();
    let (mut of, mut is_as_str) = (String::new(), false);
    for line in source.lines() {
        if let Some(name) = line.strip_prefix("impl ").and_then(|rest| rest.strip_suffix(" {")) {
            name.clone_into(&mut of);
        } else if line.starts_with("    pub fn ") || line.starts_with("    fn ") {
            is_as_str = line.contains(" fn as_str(");
        } else if is_as_str && line.contains("=> \"") {
            names.extend(line.split('"').nth(1).map(|name| (of.clone(), name.to_owned())));
        }
    }
    names
}

/// The texts in a line of source that speak of KV events.
fn literals(line: &str) -> Vec<&str> {
    line.split('"').skip(1).step_by(2).filter(|text| text.contains("KV event")).collect()
}
