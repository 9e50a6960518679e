//! `warmroute explain`: why a request goes, or went, where it does.
//!
//! With a body the router makes a dry run of it; with a request's id it says what was decided then, and what became
//! known of it later.

use std::fmt::Write as _;
use std::io::{self, Read, Write};
use std::path::PathBuf;

use clap::Args;
use serde_json::Value;

use super::admin_port::{self, AdminPort};
use super::columns::{Align, Columns, printable};

/// What is said of a decision that was made: as it is written, and where it is.
const FACTS_OF_PICK: [(&str, &str); 9] = [
    ("outcome", "outcome"),
    ("fallback", "fallback"),
    ("policy", "policy"),
    ("prompt tokens", "prompt_tokens"),
    ("matched tokens", "matched_tokens"),
    ("rank", "rank"),
    ("runner-up", "runner_up"),
    ("candidates", "n_candidates"),
    ("avoided", "n_avoided"),
];

/// Which request.
#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    router: admin_port::Options,
    /// The x-request-id of a request that was decided.
    #[arg(required_unless_present = "body", conflicts_with = "body")]
    request_id: Option<String>,
    /// File with the body of a request, as a client sends it; - is standard input.
    #[arg(long, value_name = "FILE")]
    body: Option<PathBuf>,
    /// API that the body is for.
    #[arg(long, default_value = "/v1/chat/completions", requires = "body")]
    path: String,
    /// Write the router's answer as it is.
    #[arg(long)]
    json: bool,
}

/// There is no explanation.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The router does not give it.
    #[error(transparent)]
    Router(#[from] admin_port::Error),
    /// The body cannot be read.
    #[error("cannot read the body {path:?}")]
    Body {
        /// Where it should be.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is no JSON.
    #[error("the router's answer is not JSON")]
    Answer(#[source] serde_json::Error),
    /// The output is closed.
    #[error("cannot write to standard output")]
    Output(#[source] io::Error),
}

/// Runs the command.
///
/// # Errors
/// [`Error`] when the router does not explain it.
pub fn run(options: Options, mut output: impl Write) -> Result<(), Error> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| admin_port::Error::Setup(error.into()))?;
    let port = AdminPort::new(options.router)?;
    let text = match (options.body, options.request_id) {
        (Some(path), _) => {
            let body = read_body(&path)?;
            let path: String = reqwest::Url::parse_with_params("http://a/explain", [("path", &options.path)])
                .map(|url| format!("/explain?{}", url.query().unwrap_or_default()))
                .expect("a URL with a query is one");
            runtime.block_on(port.post(&path, body))?
        }
        (None, id) => runtime.block_on(port.get(&format!("/explain/{}", encoded(&id.unwrap_or_default()))))?,
    };
    if options.json {
        return writeln!(output, "{}", text.trim_end()).map_err(Error::Output);
    }
    let answer = serde_json::from_str(&text).map_err(Error::Answer)?;
    output.write_all(shown(&answer).as_bytes()).map_err(Error::Output)
}

fn read_body(path: &PathBuf) -> Result<Vec<u8>, Error> {
    let mut body = Vec::new();
    let read = match path.as_os_str() == "-" {
        true => io::stdin().read_to_end(&mut body).map(drop),
        false => std::fs::read(path).map(|bytes| body = bytes),
    };
    read.map_err(|source| Error::Body { path: path.clone(), source })?;
    Ok(body)
}

/// An id as one segment of a path: clients may choose any text.
fn encoded(id: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    id.bytes().fold(String::new(), |mut text, byte| {
        match is_plain(byte) {
            true => text.push(char::from(byte)),
            false => write!(text, "%{byte:02X}").expect("a string takes everything"),
        }
        text
    })
}

/// The answer for people. What is absent or null in it is left out.
fn shown(answer: &Value) -> String {
    let mut text = lead(answer);
    push_facts(&mut text, answer, &[("request", "request_id"), ("decided at", "at"), ("model", "model")]);
    if answer["requested"] != answer["model"] {
        push_facts(&mut text, answer, &[("asked for", "requested")]);
    }
    // What is left to Envoy or refused has none of these; its zeros would say that they were counted.
    if !answer["pick"].is_null() {
        push_facts(&mut text, answer, &FACTS_OF_PICK);
        push_fact(&mut text, "took", &timings(&answer["timings_us"]));
    }
    let blocks = answer["blocks"].as_array().into_iter().flatten();
    let blocks: Vec<String> =
        blocks.map(|one| format!("{} ({})", plain(&one["n_blocks"]), plain(&one["keyspace"]))).collect();
    if !blocks.is_empty() {
        push_fact(&mut text, "blocks looked up", &blocks.join(", "));
    }
    let candidates = answer["candidates"].as_array().or_else(|| answer["standings"].as_array());
    if let Some(candidates) = candidates.filter(|candidates| !candidates.is_empty()) {
        text.push('\n');
        text.push_str(&candidate_table(answer, candidates));
    }
    push_later(&mut text, &answer["outcome_later"]);
    text
}

fn lead(answer: &Value) -> String {
    let verdict = match (answer["verdict"].as_str(), answer["pick"].as_str()) {
        (Some("leave_to_envoy"), Some(pick)) if answer["mode"] == "shadow" => {
            format!("left to Envoy's own policy (shadow: would go to {})", printable(pick))
        }
        (Some("leave_to_envoy"), _) => "left to Envoy's own policy".to_owned(),
        (Some("refuse"), _) => "refused".to_owned(),
        (_, Some(pick)) => format!("goes to {}", printable(pick)),
        (_, None) => "goes nowhere".to_owned(),
    };
    let why = match (answer["reason"].as_str(), answer["why"].as_str()) {
        // A body that cannot be read names no model, which is not what is wrong with it.
        (Some("no_model"), _) if answer["body_fault"].is_string() => {
            format!(": the body cannot be read: {}", plain(&answer["body_fault"]))
        }
        (Some(reason), _) => format!(": {}", words(reason)),
        (None, Some(why)) if !why.is_empty() => format!(": {}", printable(why)),
        (None, _) => String::new(),
    };
    format!("{verdict}{why}\n\n")
}

fn push_facts(text: &mut String, from: &Value, facts: &[(&str, &str)]) {
    for (name, key) in facts.iter().filter(|(_, key)| !from[*key].is_null()) {
        push_fact(text, name, &plain(&from[*key]));
    }
}

fn push_fact(text: &mut String, name: &str, value: &str) {
    if !value.is_empty() {
        writeln!(text, "{name:<17} {value}").expect("a string takes everything");
    }
}

fn push_later(text: &mut String, later: &Value) {
    if !later.is_object() {
        return;
    }
    text.push_str("\nwhat became known later\n");
    let facts = [
        ("served by", "served_by"),
        ("status", "status"),
        ("attempts", "attempts"),
        ("settled", "settled"),
        ("ended after ms", "ended_after_ms"),
        ("first block, ms", "first_block_after_ms"),
        ("stored again", "blocks_stored_again"),
    ];
    push_facts(text, later, &facts);
}

fn timings(stages: &Value) -> String {
    let stage = |name: &str| stages[name].as_f64().map(|micros| format!("{name} {micros:.0}"));
    let stages: Vec<String> =
        ["total", "parse", "tokenize", "hash", "lookup", "pick"].into_iter().filter_map(stage).collect();
    if stages.is_empty() { String::new() } else { format!("{} (µs)", stages.join(", ")) }
}

fn candidate_table(answer: &Value, candidates: &[Value]) -> String {
    let mut columns = Columns::new(&[
        ("endpoint", Align::Left),
        ("matched tokens", Align::Right),
        ("blocks", Align::Right),
        ("promised", Align::Right),
        ("offloaded", Align::Right),
        ("in flight", Align::Right),
        ("events", Align::Left),
        ("", Align::Left),
    ]);
    for row in candidates {
        let states = row["sources"].as_array().into_iter().flatten().map(|source| plain(&source["state"]));
        columns.push(&[
            plain(&row["endpoint"]),
            plain(&row["matched_tokens"]),
            plain(&row["matched_blocks"]),
            plain(&row["promised_tokens"]),
            plain(&row["offloaded_tokens"]),
            plain(&row["in_flight"]),
            states.collect::<Vec<_>>().join(","),
            standing(answer, row),
        ]);
    }
    columns.to_string()
}

fn standing(answer: &Value, row: &Value) -> String {
    let is = |key: &str| !answer[key].is_null() && answer[key] == row["endpoint"];
    let avoided = || row["avoided_ms"].as_u64().map(|ms| format!("avoided for {ms} ms"));
    match row["not_because"].as_str() {
        _ if is("pick") => "pick".to_owned(),
        _ if row["is_too_far_ahead"] == true => "too far ahead in load".to_owned(),
        _ if is("runner_up") => "runner-up".to_owned(),
        Some(reason) => words(reason),
        None => avoided().unwrap_or_default(),
    }
}

/// A name of a closed set as people write it.
fn words(name: &str) -> String {
    printable(name).replace('_', " ")
}

/// A value without quotation marks; nothing for null.
fn plain(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => printable(text),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn dry_run_is_a_verdict_facts_and_candidates() {
        let answer = json!({
            "model": "m", "requested": "alias", "outcome": "prefix_match", "fallback": null, "policy": "prefix_cache",
            "prompt_tokens": 100, "blocks": [{"keyspace": "engine sha256 / 16", "n_blocks": 6}],
            "pick": "10.0.0.1:80", "rank": null, "runner_up": "10.0.0.2:80", "why": "it holds more",
            "candidates": [
                {"endpoint": "10.0.0.1:80", "matched_tokens": 96, "matched_blocks": 6, "in_flight": 1,
                 "sources": [{"rank": 0, "state": "live"}]},
                {"endpoint": "10.0.0.2:80", "matched_tokens": 0, "matched_blocks": 0, "in_flight": 0},
                {"endpoint": "10.0.0.3:80", "matched_tokens": 0, "not_because": "avoided after a failure"},
            ],
            "timings_us": {"parse": 10, "total": 900}, "verdict": "route", "reason": null,
        });
        let text = shown(&answer);
        assert!(text.starts_with("goes to 10.0.0.1:80: it holds more\n"), "{text}");
        assert!(text.contains("blocks looked up  6 (engine sha256 / 16)\n"), "{text}");
        assert!(text.contains("took              total 900, parse 10 (µs)\n"), "{text}");
        assert!(!text.contains("fallback"), "{text}");
        let row = |endpoint| text.lines().find(|line| line.starts_with(endpoint)).expect("a row");
        assert!(row("10.0.0.1:80").ends_with("live    pick"), "{text}");
        assert!(row("10.0.0.2:80").ends_with("runner-up"), "{text}");
        assert!(row("10.0.0.3:80").ends_with("avoided after a failure"), "{text}");
    }

    #[test]
    fn decided_request_says_what_became_known() {
        let later = json!({"served_by": "10.0.0.1:80", "status": 200, "settled": "as_picked", "attempts": null});
        let text = shown(&json!({"verdict": "leave_to_envoy", "reason": "unknown model", "outcome_later": later}));
        assert!(text.starts_with("left to Envoy's own policy: unknown model\n"), "{text}");
        assert!(text.contains("settled           as_picked\n") && !text.contains("attempts"), "{text}");
    }

    #[test]
    fn a_pick_that_envoy_was_not_told_is_named() {
        let answer =
            json!({"verdict": "leave_to_envoy", "mode": "shadow", "pick": "10.0.0.1:80", "why": "it holds more"});
        let text = shown(&answer);
        assert!(
            text.starts_with("left to Envoy's own policy (shadow: would go to 10.0.0.1:80): it holds more\n"),
            "{text}"
        );
    }

    #[test]
    fn what_is_wrong_with_a_body_is_said_in_place_of_the_model_that_it_lacks() {
        let answer = json!({"verdict": "leave_to_envoy", "reason": "no_model", "body_fault": "found no JSON object"});
        let text = shown(&answer);
        assert!(
            text.starts_with("left to Envoy's own policy: the body cannot be read: found no JSON object\n"),
            "{text}"
        );
        let text = shown(&json!({"verdict": "leave_to_envoy", "reason": "no_model", "body_fault": null}));
        assert!(text.starts_with("left to Envoy's own policy: no model\n"), "{text}");
    }

    #[test]
    fn ids_and_names_cannot_break_out() {
        assert_eq!(encoded("a/../b?c"), "a%2F..%2Fb%3Fc");
        assert_eq!(plain(&json!("a\u{1b}[2Jb")), "a[2Jb");
    }
}
