//! What a release of vLLM can do that the router has a use for.
//!
//! From the sources of the releases 0.9 to 0.32: `vllm/distributed/kv_events.py`, `vllm/v1/core/kv_cache_utils.py` and
//! `vllm/entrypoints/`.

/// Major and minor number of a release.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Release(u32, u32);

/// Something that came with a release.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ability {
    since: Release,
    what: &'static str,
}

/// The first release whose events the router reads: those of 0.9 have hashes of another kind.
pub(super) const EVENTS: Release = Release(0, 10);
/// Says where it publishes.
pub(super) const SOURCES: Release = Release(0, 32);
/// `sha256*` has a fixed root where `PYTHONHASHSEED` is not set.
pub(super) const FIXED_ROOT: Release = Release(0, 29);
/// Announces what a request reuses, when asked to.
pub(super) const REPORT: Release = Release(0, 26);

const ABILITIES: [Ability; 7] = [
    Ability { since: EVENTS, what: "KV events" },
    Ability { since: Release(0, 14), what: "adapter names in them" },
    Ability { since: Release(0, 17), what: "extra keys in them" },
    Ability { since: REPORT, what: "events.report" },
    Ability { since: FIXED_ROOT, what: "a known root without PYTHONHASHSEED (sha256*)" },
    Ability { since: Release(0, 31), what: "salts and adapters by the engine's own hash" },
    Ability { since: SOURCES, what: "/kv_event_sources" },
];

impl Release {
    /// Reads `0.32.0`, `0.32.1rc1`, `v0.10.2.dev3+gabc`; none for what is no such number.
    pub(super) fn parse(version: &str) -> Option<Self> {
        let mut numbers = version.trim().trim_start_matches('v').split(['.', '+', '-']);
        let major = numbers.next()?.parse().ok()?;
        let minor = numbers.next()?;
        let end = minor.find(|char: char| !char.is_ascii_digit()).unwrap_or(minor.len());
        Some(Self(major, minor[..end].parse().ok()?))
    }

    /// What it has and what it has not, in words.
    pub(super) fn abilities(self) -> String {
        let list = |has: bool| {
            let named = ABILITIES.iter().filter(|ability| (self >= ability.since) == has).map(|ability| match has {
                true => ability.what.to_owned(),
                false => format!("{} ({}.{})", ability.what, ability.since.0, ability.since.1),
            });
            named.collect::<Vec<_>>().join(", ")
        };
        match (list(true), list(false)) {
            (has, lacks) if lacks.is_empty() => format!("has {has}"),
            (has, lacks) if has.is_empty() => format!("lacks {lacks}"),
            (has, lacks) => format!("has {has}; lacks {lacks}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_read_and_ordered() {
        for (text, release) in [
            ("0.32.0", Some(Release(0, 32))),
            ("0.32.0+cpu", Some(Release(0, 32))),
            ("v0.10.2.dev3+gabc", Some(Release(0, 10))),
            ("0.9rc1", Some(Release(0, 9))),
            ("1.0", Some(Release(1, 0))),
            ("dev", None),
            ("0", None),
            ("", None),
        ] {
            assert_eq!(Release::parse(text), release, "{text}");
        }
        assert!(Release(0, 9) < EVENTS && Release(1, 0) > SOURCES);
    }

    #[test]
    fn each_release_is_told_what_it_has_and_since_when_others_have_the_rest() {
        assert!(!Release(0, 32).abilities().contains("lacks"));
        assert!(Release(0, 9).abilities().starts_with("lacks KV events (0.10), "));
        let old = Release(0, 23).abilities();
        let (has, lacks) = old.split_once("; lacks ").expect("both");
        assert!(has.ends_with("extra keys in them") && lacks.starts_with("events.report (0.26)"), "{old}");
    }
}
