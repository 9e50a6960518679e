//! The findings, as people and as programs read them.

use std::io::{self, Write};

use super::judge::{Finding, Outcome, Verdict};

/// One line per finding under the name of its engine, and under a fault what to change.
pub(super) fn text(findings: &[Finding], outcome: Outcome, sends: bool, output: &mut impl Write) -> io::Result<()> {
    let mut subject = None;
    for finding in findings {
        if subject != Some(&finding.engine) {
            writeln!(output, "{}", finding.engine.as_deref().unwrap_or("all engines"))?;
            subject = Some(&finding.engine);
        }
        writeln!(output, "  {:<5} {:<16} {}", finding.verdict.as_str(), finding.check, one_line(&finding.seen))?;
        if let Some(change) = &finding.change {
            writeln!(output, "        change: {}", one_line(change))?;
        }
    }
    let count = |verdict| findings.iter().filter(|finding| finding.verdict == verdict).count();
    let (n_faults, n_warnings) = (count(Verdict::Fault), count(Verdict::Warn));
    if !sends {
        writeln!(
            output,
            "no request was sent (--no-request): only what was published before, or by chance, is judged"
        )?;
    }
    let summary = match outcome {
        Outcome::Good => "nothing has to change",
        Outcome::Faults => "something has to change",
        Outcome::Unjudged => "it cannot be said whether the router can use this",
    };
    writeln!(output, "{summary}: {n_faults} fault(s), {n_warnings} warning(s)")?;
    output.flush()
}

/// A list of objects, one per line.
pub(super) fn json(findings: &[Finding], output: &mut impl Write) -> io::Result<()> {
    let lines: Vec<String> =
        findings.iter().map(|finding| serde_json::to_string(finding).expect("texts and names are JSON")).collect();
    writeln!(output, "[{}]", lines.join(",\n "))?;
    output.flush()
}

/// What an engine says of itself goes to a terminal: nothing of it may begin a line or control it.
fn one_line(text: &str) -> String {
    text.chars().map(|char| if char.is_control() { ' ' } else { char }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_is_followed_by_what_to_change_and_nothing_controls_the_terminal() {
        let finding = |engine: Option<&str>, verdict, seen: &str, change: Option<&str>| Finding {
            engine: engine.map(str::to_owned),
            check: "replay",
            verdict,
            seen: seen.to_owned(),
            change: change.map(str::to_owned),
        };
        let findings = [
            finding(Some("http://a"), Verdict::Ok, "a\u{1b}[2J\nb", None),
            finding(Some("http://a"), Verdict::Fault, "it is off", Some("switch it on")),
            finding(None, Verdict::Skip, "one engine", None),
        ];
        let mut output = Vec::new();
        text(&findings, Outcome::Faults, false, &mut output).expect("a vector takes all");
        let expected = "http://a\n  ok    replay           a [2J b\n  FAULT replay           it is off\n        \
            change: switch it on\nall engines\n  skip  replay           one engine\n\
            no request was sent (--no-request): only what was published before, or by chance, is judged\n\
            something has to change: 1 fault(s), 0 warning(s)\n";
        assert_eq!(String::from_utf8(output).expect("text"), expected);

        let mut output = Vec::new();
        json(&findings, &mut output).expect("a vector takes all");
        let list: serde_json::Value = serde_json::from_slice(&output).expect("JSON");
        assert_eq!(list[1]["verdict"], "FAULT");
        assert_eq!((&list[1]["engine"], &list[2]["engine"]), (&"http://a".into(), &serde_json::Value::Null));
        assert_eq!(list[1]["change"], "switch it on");
    }
}
