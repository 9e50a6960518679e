//! `admin` and `explain`: who may look at the router, and how far back.

use std::path::PathBuf;

use serde::Serialize;

use super::reader::Node;
use crate::engine::read_key;
use crate::extproc::journal::{DEFAULT_DECISIONS, MOST_DECISIONS};

/// `admin`: the port for operators.
#[derive(Clone, Debug, Serialize)]
pub struct Admin {
    /// File with a token that everything there asks for, as `authorization: Bearer …`, but metrics, health and the page
    /// itself; null: nothing does. It is read again when it changes. Replicas need the same one.
    pub token_file: Option<PathBuf>,
}

/// `explain`: what was decided.
#[derive(Clone, Debug, Serialize)]
pub struct Explain {
    /// How many of the last decisions are kept, default 1024; 0: none. Each takes about 1 KiB.
    pub decisions: usize,
}

pub(super) fn read_admin(node: &Node<'_>) -> Admin {
    const TOKEN: &str = "the path of a file with a token of printable ASCII, or null";
    let [token_file] = node.fields(["token_file"]);
    let path = token_file.string(TOKEN).map(PathBuf::from);
    if let Some(Err(error)) = path.as_deref().map(read_key) {
        token_file.fault(error, TOKEN);
    }
    Admin { token_file: path }
}

pub(super) fn read_explain(node: &Node<'_>) -> Explain {
    const DECISIONS: &str = "a number from 0 to 65536";
    let [decisions] = node.fields(["decisions"]);
    let n_decisions = decisions.or(DEFAULT_DECISIONS, DECISIONS);
    if n_decisions > MOST_DECISIONS {
        decisions.fault(n_decisions, DECISIONS);
    }
    Explain { decisions: n_decisions }
}

#[cfg(test)]
mod tests {
    use super::super::Config;

    fn parse(settings: &str) -> Result<Config, String> {
        let models = "models: [{name: m, discovery: {static: [{address: 1.1.1.1:1}]}}]";
        Config::parse(&format!("{settings}\n{models}"), []).map_err(|error| error.to_string())
    }

    #[test]
    fn nothing_is_asked_for_and_a_thousand_decisions_are_kept_unless_told_otherwise() {
        let config = parse("").expect("valid");
        assert_eq!((config.admin.token_file, config.explain.decisions), (None, 1024));
    }

    #[test]
    fn settings_are_read_and_read_back_without_the_token() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("token");
        std::fs::write(&path, "a-secret-token\n").expect("written");
        let settings = format!("admin: {{token_file: {}}}\nexplain: {{decisions: 0}}", path.display());
        let config = parse(&settings).expect("valid");
        assert_eq!((config.admin.token_file.as_deref(), config.explain.decisions), (Some(&*path), 0));
        let again = Config::parse(&config.to_yaml(), []).expect("the effective configuration is valid");
        assert_eq!(again.to_yaml(), config.to_yaml());
        assert!(!config.to_yaml().contains("a-secret-token"));
    }

    #[test]
    fn what_cannot_be_is_refused_with_its_place() {
        for (settings, expected) in [
            ("admin: {token_file: /no/token}", "admin.token_file: found /no/token cannot be read"),
            ("explain: {decisions: 65537}", "explain.decisions: found 65537, expected a number from 0 to 65536"),
            ("explain: {decisions: -1}", "explain.decisions: found \"-1\", expected a number from 0 to 65536"),
            ("explain: {ring: 1}", "explain.ring: found an unknown setting"),
        ] {
            let found = parse(settings).expect_err("a fault");
            assert!(found.contains(expected), "{expected}\nis not in\n{found}");
        }
    }
}
