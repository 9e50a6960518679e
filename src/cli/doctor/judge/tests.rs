//! From observations to verdicts: a healthy engine, and one change at a time.

use std::time::Duration;

use super::*;
use crate::cli::doctor::seen::{
    Asked, CacheConfig, Link, Origin, Probe, ProbeKind, RankSeen, Replayed, Served, Told, Wire,
};
use crate::cli::doctor::trial::tests::announced;
use crate::discovery::event_sources::{Answer, Refused};
use crate::routing::hash::HashAlgorithm;

const EVENTS: &str = "tcp://10.0.0.1:5557";
const REPLAY: &str = "tcp://10.0.0.1:5558";

fn tokens() -> Vec<u32> {
    (0..10).collect()
}

fn served(id: &str) -> Served {
    Served { id: id.to_owned(), parent: None, root: Some(id.to_owned()), max_model_len: Some(2048) }
}

fn source() -> RankSource {
    RankSource { rank: 0, events: EVENTS.to_owned(), replay: Some(REPLAY.to_owned()) }
}

fn healthy() -> Seen {
    let wire = Wire {
        n_live: 1,
        n_stored: 1,
        has_int_hashes: true,
        has_tokens: true,
        shows_extra_keys: true,
        block_sizes: [4].into(),
        ranks: [0].into(),
        topics: [String::new()].into(),
        ..Wire::default()
    };
    let rank = RankSeen {
        rank: 0,
        origin: Origin::Told,
        events: EVENTS.to_owned(),
        events_link: Link::Up(Duration::from_millis(1)),
        replay: Some(REPLAY.to_owned()),
        replay_link: Link::Up(Duration::from_millis(1)),
        replayed: Some(Replayed { first: Some(0), last: Some(3), n_batches: 4, has_end: true }),
        wire,
        stored: vec![announced(HashAlgorithm::Sha256, None, &tokens()[..8])],
        skew: Some(0.01),
    };
    let probe = |kind| Probe {
        kind,
        rank: 0,
        answer: Asked::Answer(Some(tokens())),
        tokenized: Asked::Answer(tokens()),
        local: None,
    };
    let answer = Answer { sources: vec![source()], refused: Vec::new() };
    let cache = CacheConfig { block_size: Some(4), algorithm: Some("sha256".to_owned()), is_prefix_cached: Some(true) };
    Seen {
        name: "http://10.0.0.1:8000".to_owned(),
        reach: Ok(Duration::from_millis(2)),
        version: Asked::Answer("0.32.0".to_owned()),
        models: Asked::Answer(vec![served("m")]),
        told: Asked::Answer(Told { answer, is_off: false, buffer_steps: Some(10_000) }),
        cache: Asked::Answer(Some(cache)),
        ranks: vec![rank],
        date_skew: Some(0.2),
        wanted: Some("m".to_owned()),
        model: Some("m".to_owned()),
        probes: vec![probe(ProbeKind::Completion), probe(ProbeKind::Chat)],
        fixed_tokens: Asked::Answer(vec![1, 2]),
    }
}

fn expected() -> Expected {
    Expected { model: None, seeds: vec![None, Some("0".to_owned())], sends: true }
}

fn configured() -> Configured {
    Configured {
        names: vec!["m".into()],
        scheme: Scheme { algorithm: HashAlgorithm::Sha256, seed: None },
        adapters: Vec::new(),
        sync: true,
        discover: true,
        report: false,
    }
}

fn judged(seen: Seen) -> Vec<Finding> {
    judge(&[(Vec::new(), seen)], &expected())
}

/// What is wrong: check, verdict, and what was seen with what to change.
fn wrong(findings: &[Finding]) -> Vec<(&'static str, Verdict, String)> {
    let is_wrong = |finding: &&Finding| matches!(finding.verdict, Verdict::Warn | Verdict::Fault);
    let told = |finding: &Finding| {
        let change = finding.change.as_deref().expect("what is wrong has something to change");
        (finding.check, finding.verdict, format!("{} / {change}", finding.seen))
    };
    findings.iter().filter(is_wrong).map(told).collect()
}

#[test]
fn a_healthy_engine_is_named_in_full_and_has_nothing_to_change() {
    let findings = judged(healthy());
    assert_eq!(wrong(&findings), []);
    let checks: Vec<&str> = findings.iter().map(|finding| finding.check).collect();
    let all = [
        "reachable",
        "version",
        "models",
        "prefix caching",
        "event sources",
        "events",
        "replay",
        "clock",
        "wire",
        "block size",
        "hash",
        "tokenizer",
        "tokenizer",
    ];
    assert_eq!(checks, all);
    assert!(findings.iter().all(|finding| finding.verdict == Verdict::Ok), "{findings:#?}");
    assert_eq!(outcome(&findings), Outcome::Good);
}

/// One change to a healthy engine, and the only thing that is wrong then.
struct Case {
    change: fn(&mut Seen),
    check: &'static str,
    verdict: Verdict,
    told: &'static str,
}

fn assert_cases(cases: &[Case]) {
    for Case { change, check, verdict, told } in cases {
        let mut seen = healthy();
        change(&mut seen);
        let found = wrong(&judged(seen));
        let is_told =
            |(found, with, text): &(&str, Verdict, String)| found == check && with == verdict && text.contains(told);
        assert!(found.len() == 1 && is_told(&found[0]), "expected {check} {told:?}, found {found:#?}");
    }
}

#[test]
fn what_the_server_says_is_judged() {
    assert_cases(&[
        Case {
            change: |seen| seen.version = Asked::Answer("0.9.2".to_owned()),
            check: "version",
            verdict: Verdict::Fault,
            told: "models[].events.sync to false",
        },
        Case {
            change: |seen| seen.version = Asked::Status(404),
            check: "version",
            verdict: Verdict::Warn,
            told: "SGLang",
        },
        Case {
            change: |seen| seen.models = Asked::Status(401),
            check: "models",
            verdict: Verdict::Fault,
            told: "--api-key-file",
        },
        Case {
            change: |seen| seen.models = Asked::Answer(vec![served("other")]),
            check: "models",
            verdict: Verdict::Fault,
            told: "serves \"other\" (max_model_len 2048), expected \"m\"",
        },
        Case {
            change: |seen| {
                seen.cache =
                    Asked::Answer(Some(CacheConfig { is_prefix_cached: Some(false), ..CacheConfig::default() }));
            },
            check: "prefix caching",
            verdict: Verdict::Fault,
            told: "--enable-prefix-caching",
        },
        Case {
            change: |seen| seen.ranks[0].skew = Some(-7.0),
            check: "clock",
            verdict: Verdict::Warn,
            told: "7.00 s ahead of ours",
        },
    ]);
}

#[test]
fn what_is_published_is_judged() {
    assert_cases(&[
        Case {
            change: |seen| {
                seen.told = Asked::Answer(Told { is_off: true, ..Told::default() });
                seen.ranks.clear();
            },
            check: "event sources",
            verdict: Verdict::Fault,
            told: "--kv-events-config",
        },
        Case {
            change: |seen| seen.ranks[0].replay = None,
            check: "replay",
            verdict: Verdict::Fault,
            told: "add \"replay_endpoint\"",
        },
        Case {
            change: |seen| seen.ranks[0].replay_link = Link::Down("Connection refused".to_owned()),
            check: "replay",
            verdict: Verdict::Fault,
            told: "Connection refused",
        },
        Case {
            change: |seen| {
                seen.ranks[0].replayed = Some(Replayed { first: Some(7), last: Some(9), n_batches: 3, has_end: true });
            },
            check: "replay",
            verdict: Verdict::Warn,
            told: "buffer_steps",
        },
        Case {
            change: |seen| seen.ranks[0].replayed = Some(Replayed::default()),
            check: "replay",
            verdict: Verdict::Fault,
            told: "no batch, then no END",
        },
        Case {
            change: |seen| seen.ranks[0].events_link = Link::Down("what listens there is not a PUB socket".to_owned()),
            check: "events",
            verdict: Verdict::Fault,
            told: "not a PUB socket",
        },
        Case {
            change: |seen| {
                let told = Answer {
                    sources: vec![source()],
                    refused: vec![Refused { rank: 1, address: "tcp://10.9.9.9:1".to_owned() }],
                };
                seen.told = Asked::Answer(Told { answer: told, ..Told::default() });
            },
            check: "event sources",
            verdict: Verdict::Fault,
            told: "10.9.9.9",
        },
        Case {
            change: |seen| {
                seen.ranks[0].origin = Origin::Given;
                seen.ranks[0].events = "tcp://10.0.0.1:6000".to_owned();
            },
            check: "addresses",
            verdict: Verdict::Warn,
            told: "given tcp://10.0.0.1:6000",
        },
        Case {
            change: |seen| seen.ranks[0].wire.ranks = [1].into(),
            check: "wire",
            verdict: Verdict::Fault,
            told: "name rank(s) {1}",
        },
        Case {
            change: |seen| {
                seen.ranks[0].wire.n_unreadable = 2;
                seen.ranks[0].wire.fault = Some("truncated".to_owned());
            },
            check: "wire",
            verdict: Verdict::Fault,
            told: "2 message(s) cannot be read: truncated",
        },
        Case {
            change: |seen| {
                seen.cache = Asked::Answer(Some(CacheConfig { block_size: Some(16), ..CacheConfig::default() }));
            },
            check: "block size",
            verdict: Verdict::Warn,
            told: "4 by events, 16 by /metrics",
        },
    ]);
}

#[test]
fn an_engine_that_announces_nothing_of_a_request_is_at_fault_and_its_hash_is_not_known() {
    let mut seen = healthy();
    seen.ranks[0].stored.clear();
    seen.ranks[0].wire = Wire::default();
    let findings = judged(seen);
    let found = wrong(&findings);
    assert_eq!(found.len(), 1, "{found:#?}");
    assert!(found[0].0 == "events" && found[0].2.contains("belongs to this engine"), "{found:#?}");
    assert_eq!(outcome(&findings), Outcome::Faults);
}

#[test]
fn hashes_and_tokens_are_judged() {
    assert_cases(&[
        Case {
            change: |seen| seen.ranks[0].stored = vec![announced(HashAlgorithm::Sha256, Some("7"), &tokens()[..8])],
            check: "hash",
            verdict: Verdict::Fault,
            told: "sha256, with a root that no PYTHONHASHSEED tried makes (not set, \"0\"): the engine has another PYTHONHASHSEED",
        },
        Case {
            change: |seen| {
                seen.version = Asked::Answer("0.23.0".to_owned());
                seen.ranks[0].stored = vec![announced(HashAlgorithm::Sha256, Some("7"), &tokens()[..8])];
            },
            check: "hash",
            verdict: Verdict::Fault,
            told: "a random root",
        },
        Case {
            change: |seen| {
                let cache = CacheConfig { algorithm: Some("xxhash".to_owned()), ..CacheConfig::default() };
                seen.cache = Asked::Answer(Some(cache));
                seen.ranks[0].stored = vec![announced(HashAlgorithm::Xxhash, Some("7"), &tokens()[..8])];
            },
            check: "hash",
            verdict: Verdict::Fault,
            told: "set PYTHONHASHSEED=0 in the engine's environment",
        },
        Case {
            change: |seen| seen.ranks[0].stored.push(announced(HashAlgorithm::Sha256, Some("7"), &[9; 8])),
            check: "hash",
            verdict: Verdict::Warn,
            told: "makes 1 of 2 chains",
        },
        Case {
            change: |seen| seen.probes[0].tokenized = Asked::Answer(vec![0, 1, 99]),
            check: "tokenizer",
            verdict: Verdict::Fault,
            told: "completion: /tokenize says 3 tokens, the engine used 10, of which the first 2 are the same",
        },
        Case {
            change: |seen| seen.probes[1].tokenized = Asked::Status(404),
            check: "tokenizer",
            verdict: Verdict::Fault,
            told: "chat: /tokenize: status 404",
        },
        Case {
            change: |seen| {
                seen.probes[0].answer = Asked::Answer(None);
                seen.probes[0].tokenized = Asked::Answer(vec![7; 10]);
            },
            check: "tokenizer",
            verdict: Verdict::Fault,
            told: "are in no event",
        },
        Case {
            change: |seen| seen.probes[0].local = Some(Ok(vec![0, 1, 2])),
            check: "local tokenizer",
            verdict: Verdict::Fault,
            told: "tokenizer.json",
        },
        Case {
            change: |seen| seen.probes[0].answer = Asked::Status(500),
            check: "request",
            verdict: Verdict::Fault,
            told: "completion: status 500",
        },
    ]);
}

#[test]
fn a_chat_that_the_model_cannot_have_is_no_fault() {
    let mut seen = healthy();
    seen.probes[1].answer = Asked::Status(400);
    let findings = judged(seen);
    assert_eq!((wrong(&findings), outcome(&findings)), (Vec::new(), Outcome::Good));
    assert!(findings.iter().any(|finding| finding.check == "request" && finding.verdict == Verdict::Skip));
}

#[test]
fn what_cannot_be_judged_is_told_apart_from_what_is_wrong() {
    let away = Seen { reach: Err("Connection refused".to_owned()), ranks: Vec::new(), probes: Vec::new(), ..healthy() };
    assert_eq!(outcome(&judged(away.clone())), Outcome::Unjudged);
    let pool = judge(&[(Vec::new(), away), (Vec::new(), healthy())], &expected());
    assert_eq!(outcome(&pool), Outcome::Faults, "one of two is away");

    let mut idle = Seen { probes: Vec::new(), ..healthy() };
    idle.ranks[0].stored.clear();
    let findings = judge(&[(Vec::new(), idle)], &Expected { sends: false, ..expected() });
    assert_eq!((wrong(&findings), outcome(&findings)), (Vec::new(), Outcome::Unjudged));
}

#[test]
fn engines_of_a_pool_that_differ_are_named() {
    let mut other = Seen { name: "http://10.0.0.2:8000".to_owned(), ..healthy() };
    other.ranks[0].wire.block_sizes = [8].into();
    other.cache = Asked::Answer(None);
    other.models = Asked::Answer(vec![served("m"), served("n")]);
    other.fixed_tokens = Asked::Answer(vec![3]);
    other.ranks[0].stored = vec![announced(HashAlgorithm::Xxhash, Some("0"), &tokens()[..8])];
    other.version = Asked::Answer("0.31.0".to_owned());
    let findings = judge(&[(Vec::new(), healthy()), (Vec::new(), other)], &expected());
    let found = wrong(&findings);
    let checks: Vec<_> = found.iter().map(|(check, verdict, _)| (*check, *verdict)).collect();
    let differ = ["same model", "same block size", "same hash", "same tokenizer"].map(|check| (check, Verdict::Fault));
    assert_eq!(checks, [&differ[..], &[("same version", Verdict::Warn)]].concat());
    assert!(found[1].2.starts_with("differs: 4 at http://10.0.0.1:8000; 8 at http://10.0.0.2:8000 / "), "{found:#?}");

    let alike = Seen { name: "http://10.0.0.2:8000".to_owned(), ..healthy() };
    let findings = judge(&[(Vec::new(), healthy()), (Vec::new(), alike)], &expected());
    assert_eq!(wrong(&findings), []);
    assert_eq!(findings.iter().filter(|finding| finding.engine.is_none()).count(), 5);
}

/// The only thing that is wrong of an engine against a configuration.
fn against(configured: Configured, sources: Vec<RankSource>, seen: Seen) -> Vec<(&'static str, Verdict, String)> {
    wrong(&judge(&[(sources, seen)], &Expected { model: Some(configured), ..expected() }))
}

#[test]
fn an_engine_is_compared_with_the_configuration() {
    let adapter = Served { parent: Some("m".to_owned()), root: Some("/loras/a".to_owned()), ..served("a") };
    let with_adapter = || Seen { models: Asked::Answer(vec![served("m"), adapter.clone()]), ..healthy() };
    let adapters = |path: &str| vec![("a".into(), Some(path.into()))];
    assert_eq!(against(configured(), vec![source()], healthy()), []);
    assert_eq!(against(Configured { adapters: adapters("/loras/a"), ..configured() }, Vec::new(), with_adapter()), []);

    let scheme = Scheme { algorithm: HashAlgorithm::Sha256Cbor, seed: Some("0".to_owned()) };
    let moved = RankSource { replay: None, ..source() };
    let old = Seen { version: Asked::Answer("0.25.1".to_owned()), ..healthy() };
    for (found, check, verdict, told) in [
        (
            against(Configured { scheme, ..configured() }, Vec::new(), healthy()),
            "config hash",
            Verdict::Fault,
            "models[].block_hash: {algorithm: sha256, pythonhashseed: null}",
        ),
        (
            against(Configured { adapters: adapters("/other"), ..configured() }, Vec::new(), with_adapter()),
            "config adapters",
            Verdict::Fault,
            "\"/loras/a\"",
        ),
        (
            against(Configured { adapters: adapters("/loras/a"), ..configured() }, Vec::new(), healthy()),
            "config adapters",
            Verdict::Warn,
            "configured and not loaded",
        ),
        (
            against(configured(), Vec::new(), with_adapter()),
            "config adapters",
            Verdict::Warn,
            "loaded and not configured",
        ),
        (
            against(
                configured(),
                Vec::new(),
                Seen { models: Asked::Answer(vec![served("m"), served("alias")]), ..healthy() },
            ),
            "config names",
            Verdict::Warn,
            "\"alias\"",
        ),
        (against(configured(), vec![moved.clone()], healthy()), "config events", Verdict::Warn, "(replay none)"),
        (
            against(Configured { discover: false, ..configured() }, vec![moved], healthy()),
            "config events",
            Verdict::Fault,
            "events.discover to true",
        ),
        (against(Configured { report: true, ..configured() }, Vec::new(), old), "config report", Verdict::Warn, "0.26"),
    ] {
        assert_eq!((found.len(), found[0].0, found[0].1), (1, check, verdict), "{found:#?}");
        assert!(found[0].2.contains(told), "{found:#?}");
    }
}
