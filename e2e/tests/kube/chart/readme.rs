//! The tables of the chart's README, made from the comments in `values.yaml` and the descriptions in
//! `values.schema.json`.
//!
//! `UPDATE_README=1 cargo test -p e2e --test kube readme` writes them; without it the test compares.

use std::fmt::Write;
use std::fs;

use serde_json::Value;

use super::helm::chart;

const UPDATE: &str = "UPDATE_README";

/// One documented value.
struct Row {
    path: String,
    description: String,
}

/// Every key of `values.yaml` with its comment `# -- …`; a key without one must only hold such as have.
fn rows(text: &str) -> Vec<Row> {
    let mut rows = Vec::new();
    let mut parents: Vec<(usize, String)> = Vec::new();
    let mut description: Option<String> = None;
    for line in text.lines() {
        let trimmed = line.trim_start();
        let indent = line.len() - trimmed.len();
        if let Some(first) = trimmed.strip_prefix("# -- ") {
            description = Some(first.to_owned());
        } else if let Some(more) = trimmed.strip_prefix("# ") {
            if let Some(text) = &mut description {
                write!(text, " {more}").unwrap();
            }
        } else if let Some((key, _)) = trimmed.split_once(':').filter(|(key, _)| !key.contains([' ', '-', '"', '{'])) {
            parents.retain(|(outer, _)| *outer < indent);
            let outer = parents.last().map_or_else(String::new, |(_, path)| format!("{path}."));
            let path = format!("{outer}{key}");
            rows.extend(description.take().map(|description| Row { path: path.clone(), description }));
            parents.push((indent, path));
        }
    }
    rows
}

/// The value at a path, as one line of JSON.
fn default_of(values: &Value, path: &str) -> String {
    let value = path.split('.').fold(values, |value, key| &value[key]);
    serde_json::to_string(value).unwrap()
}

fn values_table(text: &str) -> String {
    let values: Value = serde_saphyr::from_str(text).unwrap();
    let rows = rows(text);
    let mut table = "| value | default | |\n|---|---|---|\n".to_owned();
    for Row { path, description } in &rows {
        let has_children = rows.iter().any(|other| other.path.starts_with(&format!("{path}.")));
        let default = if has_children { String::new() } else { format!("`{}`", default_of(&values, path)) };
        writeln!(table, "| `{path}` | {default} | {} |", cell(description)).unwrap();
    }
    table
}

/// A bar would end the cell.
fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}

fn models_table(schema: &Value) -> String {
    let mut table = "| setting | |\n|---|---|\n".to_owned();
    add_settings(&schema["definitions"]["model"], "config.models[]", &mut table);
    table
}

fn add_settings(schema: &Value, path: &str, table: &mut String) {
    for (name, setting) in schema["properties"].as_object().unwrap() {
        let path = format!("{path}.{name}");
        let description = setting["description"].as_str().unwrap_or_else(|| panic!("{path} is not described"));
        writeln!(table, "| `{path}` | {} |", cell(description)).unwrap();
        if setting["properties"].is_object() {
            add_settings(setting, &path, table);
        } else if setting["items"]["properties"].is_object() {
            add_settings(&setting["items"], &format!("{path}[]"), table);
        }
    }
}

/// `text` with `table` between the marks of `name`.
fn replaced(text: &str, name: &str, table: &str) -> String {
    let (begin, end) = (format!("<!-- {name} -->\n"), format!("<!-- end of {name} -->\n"));
    let (before, rest) = text.split_once(&begin).unwrap_or_else(|| panic!("no {begin}"));
    let (_, after) = rest.split_once(&end).unwrap_or_else(|| panic!("no {end}"));
    format!("{before}{begin}{table}{end}{after}")
}

#[test]
fn readme_has_every_value_as_it_is() {
    let read = |name: &str| fs::read_to_string(chart().join(name)).unwrap();
    let schema: Value = serde_json::from_str(&read("values.schema.json")).unwrap();
    let text = read("README.md");
    let expected = replaced(&text, "values", &values_table(&read("values.yaml")));
    let expected = replaced(&expected, "models", &models_table(&schema));
    if std::env::var_os(UPDATE).is_some() {
        fs::write(chart().join("README.md"), &expected).unwrap();
    }
    assert!(
        text == expected || std::env::var_os(UPDATE).is_some(),
        "the README is not of these values: {UPDATE}=1 writes it"
    );
}

#[test]
fn every_value_is_described() {
    let text = fs::read_to_string(chart().join("values.yaml")).unwrap();
    let values: Value = serde_saphyr::from_str(&text).unwrap();
    let described: Vec<String> = rows(&text).into_iter().map(|row| row.path).collect();
    let mut open = vec![(String::new(), &values)];
    while let Some((path, value)) = open.pop() {
        let has_described_children =
            described.iter().any(|other| path.is_empty() || other.starts_with(&format!("{path}.")));
        match value.as_object().filter(|_| has_described_children) {
            Some(fields) => {
                let dot = if path.is_empty() { "" } else { "." };
                open.extend(fields.iter().map(|(name, value)| (format!("{path}{dot}{name}"), value)));
            }
            None => assert!(described.contains(&path), "{path} has no comment that begins with # --"),
        }
    }
}

#[test]
fn schema_knows_the_values_and_no_others() {
    let values: Value = serde_saphyr::from_str(&fs::read_to_string(chart().join("values.yaml")).unwrap()).unwrap();
    let schema: Value = serde_json::from_str(&fs::read_to_string(chart().join("values.schema.json")).unwrap()).unwrap();
    let mut open = vec![("values".to_owned(), &values, &schema)];
    while let Some((path, value, schema)) = open.pop() {
        let (Some(fields), Some(known)) = (value.as_object(), schema["properties"].as_object()) else { continue };
        assert_eq!(schema["additionalProperties"], false, "{path} takes anything");
        let unknown: Vec<_> = fields.keys().filter(|name| !known.contains_key(*name)).collect();
        assert!(unknown.is_empty(), "{path}: {unknown:?} is refused by the schema");
        open.extend(fields.iter().map(|(name, value)| (format!("{path}.{name}"), value, &known[name])));
    }
}
