//! `models[].engine` and `models[].events`: how engines are asked, and what we ask them about their events.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;

use super::Human;
use super::reader::Node;
use crate::engine::{Access, FileError, Scheme, read_ca, read_key};

/// `models[].events`: what the engines are asked about their KV events, beside the events themselves.
#[derive(Clone, Debug, Serialize)]
pub struct ModelEvents {
    /// Whether the index follows the engines' KV events, default true. Otherwise nothing of theirs is read, and the
    /// index is learned from our own picks.
    pub sync: bool,
    /// Whether each endpoint is asked for its data-parallel ranks and where they publish (`GET /kv_event_sources`, vLLM
    /// 0.32 and newer), default true. The answer takes the place of what `discovery` says of an endpoint's events.
    pub discover: bool,
    /// How often each endpoint's `/metrics` is read, to learn of a sleep or a restart that its events do not tell;
    /// null: never.
    pub scrape: Option<Human>,
    /// Whether one request of each conversation has its engine announce what it reuses, where the router does not know
    /// all of the engine's cache; default false. Needs vLLM 0.26.
    pub report: bool,
}

pub(super) fn read_model_events(node: &Node<'_>) -> ModelEvents {
    const SCRAPE: &str = "a duration from 1s to 1h, such as 10s, or null";
    let [sync, discover, scrape, report] = node.fields(["sync", "discover", "scrape", "report"]);
    let interval: Option<Human> = scrape.optional(SCRAPE);
    let is_possible = |interval: &Human| (Duration::from_secs(1)..=Duration::from_secs(3600)).contains(&interval.0);
    if let Some(interval) = interval.as_ref().filter(|interval| !is_possible(interval)) {
        scrape.fault(interval, SCRAPE);
    }
    ModelEvents {
        sync: sync.or(true, "true or false"),
        discover: discover.or(true, "true or false"),
        scrape: interval,
        report: report.or(false, "true or false"),
    }
}

/// Reads the files that are named as well: one that cannot be used is a fault like any other.
pub(super) fn read_access(node: &Node<'_>) -> Access {
    const CA: &str = "the path of a file with PEM certificates";
    const KEY: &str = "the path of a file with the engines' API key";
    let [scheme, ca, api_key_file] = node.fields(["scheme", "ca", "api_key_file"]);
    let access = Access {
        scheme: scheme.or(Scheme::Http, "http or https"),
        ca: ca.string(CA).map(PathBuf::from),
        api_key_file: api_key_file.string(KEY).map(PathBuf::from),
    };
    if let Some(path) = &access.ca {
        check(&ca, CA, path, |path| read_ca(path).map(drop));
        if access.scheme == Scheme::Http {
            ca.fault("certificates for engines that are reached by http", "scheme: https as well");
        }
    }
    if let Some(path) = &access.api_key_file {
        check(&api_key_file, KEY, path, |path| read_key(path).map(drop));
    }
    access
}

fn check(node: &Node<'_>, expected: &str, path: &Path, read: impl Fn(&Path) -> Result<(), FileError>) {
    if let Err(error) = read(path) {
        node.fault(error, expected);
    }
}
