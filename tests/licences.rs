//! Holds the licences of all dependencies against the list in `deny.toml`.
//!
//! The same rule as `cargo deny check licenses`, for machines that have only cargo. Sources that a crate bundles under
//! another licence are not seen here: libzmq, for one, is named in the README.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

#[test]
fn every_dependency_has_an_allowed_licence_and_every_allowed_one_is_used() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let deny = std::fs::read_to_string(root.join("deny.toml")).unwrap();
    let allowed = allowed_licences(&deny);
    let metadata = metadata(root);
    let mut used = BTreeSet::new();
    let mut refused = Vec::new();

    for package in metadata["packages"].as_array().unwrap() {
        let licence = package["license"].as_str().unwrap_or("none");
        match evaluate(licence, &allowed) {
            Some(names) => used.extend(names),
            None => refused.push(format!("{} {}: {licence}", package["name"], package["version"])),
        }
    }

    assert!(refused.is_empty(), "licences outside deny.toml:\n{}", refused.join("\n"));
    let unused: Vec<_> = allowed.difference(&used).collect();
    assert!(unused.is_empty(), "licences in deny.toml that no dependency needs: {unused:?}");
}

/// The quoted names of `allow = [...]` below `[licenses]`.
fn allowed_licences(deny: &str) -> BTreeSet<String> {
    let (_, section) = deny.split_once("[licenses]").unwrap();
    let (_, list) = section.split_once("allow = [").unwrap();
    let (list, _) = list.split_once(']').unwrap();
    list.split('"').skip(1).step_by(2).map(str::to_owned).collect()
}

/// Every package that a build for this machine takes part in.
fn metadata(root: &Path) -> Value {
    let rustc = Command::new("rustc").arg("-vV").output().unwrap();
    let version = String::from_utf8(rustc.stdout).unwrap();
    let host = version.lines().find_map(|line| line.strip_prefix("host: ")).unwrap();
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--locked", "--filter-platform", host])
        .current_dir(root)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The allowed licences that satisfy an SPDX expression; none when it cannot be satisfied.
///
/// `/` is the old way to write `OR`. `AND` binds tighter than `OR`, `WITH` belongs to the name before it.
fn evaluate(expression: &str, allowed: &BTreeSet<String>) -> Option<BTreeSet<String>> {
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let words: Vec<_> = spaced.split_whitespace().collect();
    let mut parser = Parser { words: &words, allowed };
    let satisfied = parser.alternatives();
    assert!(parser.words.is_empty(), "cannot read the licence {expression:?}");
    satisfied
}

struct Parser<'a> {
    words: &'a [&'a str],
    allowed: &'a BTreeSet<String>,
}

impl Parser<'_> {
    fn alternatives(&mut self) -> Option<BTreeSet<String>> {
        let mut satisfied = self.conjunction();
        while self.takes("OR") {
            let next = self.conjunction();
            satisfied = satisfied.or(next);
        }
        satisfied
    }

    fn conjunction(&mut self) -> Option<BTreeSet<String>> {
        let mut satisfied = self.term();
        while self.takes("AND") {
            let next = self.term();
            satisfied = satisfied.zip(next).map(|(left, right)| &left | &right);
        }
        satisfied
    }

    fn term(&mut self) -> Option<BTreeSet<String>> {
        if self.takes("(") {
            let satisfied = self.alternatives();
            assert!(self.takes(")"), "a parenthesis is not closed");
            return satisfied;
        }
        let mut name = self.word();
        if self.takes("WITH") {
            name = format!("{name} WITH {}", self.word());
        }
        self.allowed.contains(&name).then(|| BTreeSet::from([name]))
    }

    fn takes(&mut self, word: &str) -> bool {
        let found = self.words.first() == Some(&word);
        if found {
            self.words = &self.words[1..];
        }
        found
    }

    fn word(&mut self) -> String {
        let (first, rest) = self.words.split_first().expect("an expression does not end in an operator");
        self.words = rest;
        (*first).to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_are_read_as_spdx_says() {
        let allowed = ["MIT", "BSD-3-Clause", "Apache-2.0 WITH LLVM-exception"].map(str::to_owned).into();
        for (expression, is_allowed) in [
            ("MIT", true),
            ("GPL-3.0-only", false),
            ("GPL-3.0-only OR MIT", true),
            ("GPL-3.0-only/MIT", true),
            ("GPL-3.0-only AND MIT", false),
            ("(GPL-3.0-only OR MIT) AND BSD-3-Clause", true),
            ("GPL-3.0-only OR MIT AND Unlicense", false),
            ("Apache-2.0 WITH LLVM-exception", true),
            ("Apache-2.0", false),
            ("none", false),
        ] {
            assert_eq!(evaluate(expression, &allowed).is_some(), is_allowed, "{expression}");
        }
    }
}
