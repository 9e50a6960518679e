//! What a scrape may have: series that are declared, with the declared labels and values out of the declared sets.

use std::collections::{BTreeMap, BTreeSet};

use warmroute::telemetry::metrics::labels::Values;
use warmroute::telemetry::metrics::{Instrument, Metrics};

/// Checks a text of `/metrics`, of either form, and says how many labels of closed sets it has.
///
/// # Panics
/// Something in it is not declared.
pub(crate) fn check(text: &str) -> usize {
    let metrics = Metrics::with_aibrix_names();
    let declared: BTreeMap<&str, &Instrument> =
        metrics.instruments().iter().map(|instrument| (instrument.name.as_str(), instrument)).collect();
    let mut n_closed = 0;
    for (name, found) in series(text) {
        let stem = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix));
        let instrument = declared.get(name.as_str()).or_else(|| declared.get(stem.unwrap_or_default()));
        let instrument = instrument.unwrap_or_else(|| panic!("{name} is not declared"));
        let expected: BTreeSet<&str> = instrument.labels.iter().map(|label| label.name).collect();
        assert_eq!(found.keys().map(String::as_str).collect::<BTreeSet<_>>(), expected, "{name}");
        for label in &instrument.labels {
            if let Values::Closed(values) = label.values {
                n_closed += 1;
                let value = found[label.name].as_str();
                assert!(values.contains(&value), "{name}: {} is {value:?}, expected one of {values:?}", label.name);
            }
        }
    }
    n_closed
}

/// Names and values of the labels of each series in a text, apart from a histogram's bounds.
fn series(text: &str) -> Vec<(String, BTreeMap<String, String>)> {
    let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines
        .map(|line| {
            let (series, _) = line.rsplit_once(' ').expect("a sample has a value");
            let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
            let labels = labels.trim_end_matches('}').split(',').filter_map(|label| label.split_once('='));
            let labels = labels.map(|(name, value)| (name.to_owned(), value.trim_matches('"').to_owned()));
            (name.to_owned(), labels.filter(|(name, _)| name != "le").collect())
        })
        .collect()
}
