//! Reads back the text that the registry writes.
//!
//! `prometheus-client` gives what it holds away only as text. The push over OTLP and the classic text format need it in
//! parts, so our own text is read again: its shape is known, nothing foreign is ever parsed, and once per push or old
//! scraper that costs less than a second registry would on every request.

use std::fmt::Write as _;

/// A metric with all its series.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Family<'a> {
    /// Name without `_total`, `_bucket` and the like.
    pub(super) name: &'a str,
    pub(super) help: &'a str,
    /// `counter`, `gauge`, `histogram` or `info`.
    pub(super) kind: &'a str,
    pub(super) samples: Vec<Sample<'a>>,
}

/// A line with a value.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Sample<'a> {
    /// The whole name, suffix included.
    pub(super) name: &'a str,
    /// Labels as they stand between the braces.
    pub(super) labels: &'a str,
    pub(super) value: &'a str,
}

impl Sample<'_> {
    /// Names and values of the labels.
    pub(super) fn labels(&self) -> Vec<(&str, String)> {
        let mut labels = Vec::new();
        let mut rest = self.labels;
        while let Some((name, after)) = rest.split_once("=\"") {
            let (value, after) = unquoted(after);
            labels.push((name.trim_start_matches(','), value));
            rest = after;
        }
        labels
    }
}

/// The families of a text in the OpenMetrics format.
pub(super) fn families(text: &str) -> Vec<Family<'_>> {
    let mut families: Vec<Family<'_>> = Vec::new();
    for line in text.lines() {
        if let Some(comment) = line.strip_prefix("# ") {
            let mut words = comment.splitn(3, ' ');
            match (words.next(), words.next(), words.next()) {
                (Some("HELP"), Some(name), help) => {
                    let help = help.unwrap_or_default();
                    families.push(Family { name, help, kind: "", samples: Vec::new() });
                }
                (Some("TYPE"), Some(_), Some(kind)) => {
                    if let Some(family) = families.last_mut() {
                        family.kind = kind;
                    }
                }
                _ => {}
            }
        } else if let (Some(family), Some(sample)) = (families.last_mut(), sample(line)) {
            family.samples.push(sample);
        }
    }
    families
}

/// The text in the classic format of Prometheus (0.0.4), for scrapers that know no OpenMetrics: a counter's descriptor
/// has the name of its series, and what that format does not know is a gauge, or left out.
pub(super) fn classic(text: &str) -> String {
    let mut classic = String::with_capacity(text.len());
    for family in families(text) {
        let (suffix, kind) = match family.kind {
            "counter" => ("_total", "counter"),
            "info" => ("_info", "gauge"),
            kind => ("", kind),
        };
        let (name, help) = (family.name, family.help);
        let _ = writeln!(classic, "# HELP {name}{suffix} {help}\n# TYPE {name}{suffix} {kind}");
        for Sample { name, labels, value } in family.samples {
            let _ = if labels.is_empty() {
                writeln!(classic, "{name} {value}")
            } else {
                writeln!(classic, "{name}{{{labels}}} {value}")
            };
        }
    }
    classic
}

fn sample(line: &str) -> Option<Sample<'_>> {
    match line.split_once('{') {
        Some((name, _)) => {
            // A value has neither braces nor quotes, so the last brace ends the labels, whatever stands in them.
            let (labels, value) = line[name.len() + 1..].rsplit_once("} ")?;
            Some(Sample { name, labels, value })
        }
        None => {
            let (name, value) = line.split_once(' ')?;
            Some(Sample { name, labels: "", value })
        }
    }
}

/// A label's value up to its closing quote, without the escapes, and what follows the quote.
fn unquoted(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((idx, c)) = chars.next() {
        match c {
            '"' => return (value, &text[idx + 1..]),
            '\\' => match chars.next() {
                Some((_, 'n')) => value.push('\n'),
                Some((_, escaped)) => value.push(escaped),
                None => break,
            },
            c => value.push(c),
        }
    }
    (value, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"# HELP w_streams Streams.
# TYPE w_streams counter
w_streams_total 3
# HELP w_lag_seconds Lag.
# TYPE w_lag_seconds histogram
# UNIT w_lag_seconds seconds
w_lag_seconds_sum 0.5
w_lag_seconds_count 2
w_lag_seconds_bucket{le="0.1"} 1
w_lag_seconds_bucket{le="+Inf"} 2
# HELP w_build Version.
# TYPE w_build info
w_build_info{version="0.1"} 1
# HELP w_blocks Blocks.
# TYPE w_blocks gauge
w_blocks{model="a\"b,c=\"}d\\",rank="1"} 7
# EOF
"#;

    #[test]
    fn families_have_their_samples_and_labels() {
        let families = families(TEXT);
        let shapes: Vec<_> = families.iter().map(|f| (f.name, f.kind, f.help, f.samples.len())).collect();
        assert_eq!(
            shapes,
            [
                ("w_streams", "counter", "Streams.", 1),
                ("w_lag_seconds", "histogram", "Lag.", 4),
                ("w_build", "info", "Version.", 1),
                ("w_blocks", "gauge", "Blocks.", 1),
            ]
        );
        let sample = &families[3].samples[0];
        assert_eq!((sample.name, sample.value), ("w_blocks", "7"));
        assert_eq!(sample.labels(), [("model", "a\"b,c=\"}d\\".to_owned()), ("rank", "1".to_owned())]);
    }

    #[test]
    fn classic_format_names_counters_in_full_and_has_no_unit_and_no_end() {
        let text = classic(TEXT);
        for line in [
            "# TYPE w_streams_total counter",
            "w_streams_total 3",
            "# TYPE w_build_info gauge",
            "w_lag_seconds_bucket{le=\"+Inf\"} 2",
            "w_blocks{model=\"a\\\"b,c=\\\"}d\\\\\",rank=\"1\"} 7",
        ] {
            assert!(text.lines().any(|found| found == line), "no line {line:?} in:\n{text}");
        }
        assert!(!text.contains("# UNIT") && !text.contains("# EOF"), "{text}");
    }
}
