//! `selection`: how Envoy is told the endpoint, and how it sends bodies.

use serde::Serialize;

use super::reader::Node;
use crate::extproc::message::BodyMode;
use crate::extproc::reply::SelectionMode;

/// `selection`: how Envoy is told the endpoint, and how it sends bodies.
#[derive(Clone, Debug, Serialize)]
pub struct Selection {
    /// `override_host` (default): Envoy dials only hosts of its cluster, and picks by itself where it is told none.
    /// `original_dst`: Envoy dials whatever it is told; a request for which we pick none is refused.
    pub mode: SelectionMode,
    /// Request header, and key in the dynamic metadata `envoy.lb`; default `x-gateway-destination-endpoint`, with
    /// `original_dst` `target-pod`.
    pub header: String,
    /// `buffered` (default) or `full_duplex_streamed`: how an Envoy sends request bodies that does not say so itself,
    /// as old ones do not.
    pub body_mode: BodyMode,
}

pub(super) fn read_selection(node: &Node<'_>) -> Selection {
    let [mode, header, body_mode] = node.fields(["mode", "header", "body_mode"]);
    let selected = mode.or(SelectionMode::OverrideHost, "override_host or original_dst");
    Selection {
        mode: selected,
        header: read_header(&header, selected),
        body_mode: body_mode.or(BodyMode::Buffered, "buffered or full_duplex_streamed"),
    }
}

/// A header of HTTP's own would be overwritten in every request.
fn read_header(node: &Node<'_>, mode: SelectionMode) -> String {
    const TARGET_POD: &str = "target-pod";
    let (default, expected) = match mode {
        SelectionMode::OverrideHost => (
            "x-gateway-destination-endpoint",
            "a header name of lower-case letters, digits and hyphens that begins with x-",
        ),
        SelectionMode::OriginalDst => {
            (TARGET_POD, "target-pod, or a header name of lower-case letters, digits and hyphens that begins with x-")
        }
    };
    let name = node.or(default.to_owned(), expected);
    let token = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let is_own = name.starts_with("x-") && name.chars().all(token);
    let is_allowed = is_own || (mode == SelectionMode::OriginalDst && name == TARGET_POD);
    if !is_allowed {
        node.fault(format!("{name:?}"), expected);
    }
    name
}

#[cfg(test)]
mod tests {
    use super::super::{Config, Error};
    use super::*;

    fn parse(selection: &str) -> Result<Selection, Vec<String>> {
        let yaml =
            format!("selection: {selection}\nmodels: [{{name: m, discovery: {{static: [{{address: 1.1.1.1:1}}]}}}}]");
        match Config::parse(&yaml, []) {
            Ok(config) => Ok(config.selection),
            Err(Error::Faults(faults)) => Err(faults.iter().map(ToString::to_string).collect()),
            Err(other) => panic!("expected faults, found {other}"),
        }
    }

    #[test]
    fn each_mode_has_its_own_default_header() {
        for (given, mode, header) in [
            ("{}", SelectionMode::OverrideHost, "x-gateway-destination-endpoint"),
            ("{header: x-pod}", SelectionMode::OverrideHost, "x-pod"),
            ("{mode: original_dst}", SelectionMode::OriginalDst, "target-pod"),
            ("{mode: original_dst, header: x-pod}", SelectionMode::OriginalDst, "x-pod"),
        ] {
            let selection = parse(given).expect("valid");
            assert_eq!((selection.mode, selection.header.as_str()), (mode, header), "{given}");
            assert_eq!(selection.body_mode, BodyMode::Buffered, "{given}");
        }
        assert_eq!(parse("{body_mode: full_duplex_streamed}").expect("valid").body_mode, BodyMode::FullDuplexStreamed);
    }

    #[test]
    fn what_no_envoy_does_and_headers_that_are_not_ours_are_refused() {
        for (given, path) in [
            ("{header: target-pod}", "selection.header"),
            ("{header: content-type}", "selection.header"),
            ("{mode: original_dst, header: host}", "selection.header"),
            ("{mode: original_dst, header: X-Pod}", "selection.header"),
            ("{mode: original-dst}", "selection.mode"),
            ("{body_mode: streamed}", "selection.body_mode"),
            ("{body_mode: grpc}", "selection.body_mode"),
        ] {
            let found = parse(given).expect_err("a fault");
            assert!(found.len() == 1 && found[0].starts_with(&format!("{path}: ")), "{given}: {found:?}");
        }
    }
}
