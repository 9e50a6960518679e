//! Answers as they are written in JSON.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use super::SourceBrief;
use crate::extproc::decide::{Considering, DryRun, KeyspaceBlocks, KeyspaceRow, Router, Verdict};
use crate::extproc::journal::{Later, Picked, Record, Told};
use crate::routing::endpoint::Endpoint;
use crate::routing::pick::{MOST_AHEAD, Outcome, Standing, Timings};

/// Answer to `POST /explain`.
#[derive(Debug, Serialize)]
pub(super) struct ExplanationView {
    model: Option<Arc<str>>,
    requested: Option<Arc<str>>,
    outcome: Option<&'static str>,
    fallback: Option<&'static str>,
    policy: Option<&'static str>,
    prompt_tokens: u32,
    blocks: Vec<KeyspaceBlocks>,
    pick: Option<SocketAddr>,
    rank: Option<u32>,
    runner_up: Option<SocketAddr>,
    why: String,
    candidates: Vec<CandidateView>,
    timings_us: TimingsView,
    verdict: &'static str,
    reason: Option<&'static str>,
}

impl ExplanationView {
    pub(super) fn of(found: &DryRun, sources: &[SourceBrief]) -> Self {
        let picked = found.verdict.as_ref().ok();
        let (verdict, reason) = match &found.verdict {
            Ok(_) => ("route", None),
            Err(verdict) => verdict_names(verdict),
        };
        let model = found.model.as_ref().map(|(model, _)| model.clone());
        let candidates =
            found.endpoints.iter().map(|it| CandidateView::of(it, model.as_deref().unwrap_or_default(), sources));
        Self {
            requested: found.model.as_ref().map(|(_, requested)| requested.clone()),
            outcome: picked.map(|picked| picked.outcome.as_str()),
            fallback: picked.and_then(|picked| fallback(picked.outcome)),
            policy: picked.map(|picked| picked.policy.as_str()),
            prompt_tokens: picked.map_or(0, |picked| picked.prompt_tokens),
            blocks: found.blocks.clone(),
            pick: picked.map(|picked| picked.endpoint),
            rank: picked.and_then(|picked| picked.rank),
            runner_up: picked.and_then(runner_up),
            why: picked.map_or_else(String::new, |picked| why(&picked.standings)),
            candidates: candidates.collect(),
            timings_us: TimingsView::of(&picked.map(|picked| picked.timings).unwrap_or_default()),
            verdict,
            reason,
            model,
        }
    }
}

#[derive(Debug, Serialize)]
struct CandidateView {
    endpoint: SocketAddr,
    matched_tokens: u32,
    matched_blocks: u32,
    promised_tokens: u32,
    offloaded_tokens: u32,
    in_flight: u32,
    ahead_of_least: u32,
    avoided_ms: Option<u64>,
    is_candidate: bool,
    not_because: Option<&'static str>,
    sources: Vec<SourceView>,
}

impl CandidateView {
    fn of(considering: &Considering, model: &str, sources: &[SourceBrief]) -> Self {
        let Considering { standing, matched_blocks, ahead_of_least, avoided_ms, not_because } = *considering;
        Self {
            endpoint: standing.endpoint,
            matched_tokens: standing.matched_tokens,
            matched_blocks,
            promised_tokens: standing.promised_tokens,
            offloaded_tokens: standing.offloaded_tokens,
            in_flight: standing.in_flight,
            ahead_of_least,
            avoided_ms,
            is_candidate: not_because.is_none(),
            not_because,
            sources: SourceView::of(sources, model, standing.endpoint),
        }
    }
}

#[derive(Debug, Serialize)]
struct SourceView {
    rank: u32,
    state: &'static str,
    last_event_ms: Option<u64>,
}

impl SourceView {
    /// The sources of an endpoint, by rank.
    fn of(sources: &[SourceBrief], model: &str, endpoint: SocketAddr) -> Vec<Self> {
        let its_own = sources.iter().filter(|source| source.endpoint == endpoint && &*source.model == model);
        let view = |source: &SourceBrief| {
            let SourceBrief { rank, state, last_event_ms, .. } = *source;
            Self { rank, state, last_event_ms }
        };
        let mut views: Vec<_> = its_own.map(view).collect();
        views.sort_by_key(|view| view.rank);
        views
    }
}

/// Microseconds.
#[derive(Debug, Serialize)]
struct TimingsView {
    parse: u64,
    tokenize: u64,
    hash: u64,
    lookup: u64,
    pick: u64,
    total: u64,
}

impl TimingsView {
    fn of(timings: &Timings) -> Self {
        let micros = |duration: Duration| u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        Self {
            parse: micros(timings.parse),
            tokenize: micros(timings.tokenize),
            hash: micros(timings.hash),
            lookup: micros(timings.lookup),
            pick: micros(timings.pick),
            total: micros(timings.total),
        }
    }
}

/// Answer to `/explain/{request-id}` and, without standings, an item of `/decisions`.
#[derive(Debug, Serialize)]
pub(super) struct DecisionView {
    request_id: String,
    at: String,
    age_ms: u64,
    model: Option<Arc<str>>,
    requested: Option<Arc<str>>,
    policy: Option<&'static str>,
    outcome: Option<&'static str>,
    fallback: Option<&'static str>,
    verdict: &'static str,
    reason: Option<&'static str>,
    prompt_tokens: u32,
    matched_tokens: u32,
    pick: Option<SocketAddr>,
    rank: Option<u32>,
    runner_up: Option<SocketAddr>,
    why: String,
    n_candidates: u32,
    n_avoided: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    standings: Option<Vec<StandingView>>,
    timings_us: TimingsView,
    mode: &'static str,
    outcome_later: LaterView,
}

#[derive(Debug, Serialize)]
struct StandingView {
    endpoint: SocketAddr,
    matched_tokens: u32,
    promised_tokens: u32,
    offloaded_tokens: u32,
    in_flight: u32,
    is_too_far_ahead: bool,
}

#[derive(Debug, Serialize)]
struct LaterView {
    served_by: Option<SocketAddr>,
    status: Option<u16>,
    attempts: Option<u32>,
    settled: Option<&'static str>,
    ended_after_ms: Option<u64>,
    blocks_stored_again: Option<u32>,
    first_block_after_ms: Option<u64>,
}

impl DecisionView {
    /// Everything.
    pub(super) fn whole(record: &Record) -> Self {
        let standings = match &record.told {
            Told::Picked(picked) => picked.standings.iter().map(StandingView::of).collect(),
            Told::Left(_) | Told::Refused(_) => Vec::new(),
        };
        Self { standings: Some(standings), ..Self::brief(record) }
    }

    /// Without the standings.
    pub(super) fn brief(record: &Record) -> Self {
        let (verdict, reason, picked) = match &record.told {
            Told::Picked(picked) => ("route", None, Some(picked)),
            Told::Left(reason) => ("leave_to_envoy", Some(*reason), None),
            Told::Refused(reason) => ("refuse", Some(*reason), None),
        };
        Self {
            request_id: record.request_id.clone(),
            at: humantime::format_rfc3339_millis(record.at).to_string(),
            age_ms: millis(record.decided.elapsed()),
            model: picked.map(|picked| picked.model.clone()),
            requested: picked.map(|picked| picked.requested.clone()),
            policy: picked.map(|picked| picked.policy.as_str()),
            outcome: picked.map(|picked| picked.outcome.as_str()),
            fallback: picked.and_then(|picked| fallback(picked.outcome)),
            verdict,
            reason,
            prompt_tokens: picked.map_or(0, |picked| picked.prompt_tokens),
            matched_tokens: picked.map_or(0, |picked| picked.matched_tokens),
            pick: picked.map(|picked| picked.endpoint),
            rank: picked.and_then(|picked| picked.rank),
            runner_up: picked.and_then(runner_up),
            why: picked.map_or_else(String::new, |picked| why(&picked.standings)),
            n_candidates: picked.map_or(0, |picked| picked.n_candidates),
            n_avoided: picked.map_or(0, |picked| picked.n_avoided),
            standings: None,
            timings_us: TimingsView::of(&picked.map(|picked| picked.timings).unwrap_or_default()),
            mode: record.mode,
            outcome_later: LaterView::of(record),
        }
    }
}

impl StandingView {
    fn of(standing: &Standing) -> Self {
        Self {
            endpoint: standing.endpoint,
            matched_tokens: standing.matched_tokens,
            promised_tokens: standing.promised_tokens,
            offloaded_tokens: standing.offloaded_tokens,
            in_flight: standing.in_flight,
            is_too_far_ahead: standing.is_too_far_ahead,
        }
    }
}

impl LaterView {
    fn of(record: &Record) -> Self {
        let Later { served_by, status, n_attempts, settled, ended_after } = record.later();
        Self {
            served_by,
            status,
            attempts: n_attempts,
            settled: settled.map(|settled| settled.as_str()),
            ended_after_ms: ended_after.map(millis),
            blocks_stored_again: record.seen.as_ref().map(|seen| seen.n_stored_again()),
            first_block_after_ms: record.seen.as_ref().and_then(|seen| seen.first_new_after()).map(|after| after.0),
        }
    }
}

/// An item of `/endpoints`.
#[derive(Debug, Serialize)]
pub(super) struct EndpointView {
    model: Arc<str>,
    endpoint: SocketAddr,
    in_flight: u32,
    avoided_ms: Option<u64>,
    ranks: u32,
    n_blocks: u64,
    decisions: u64,
    matched_tokens: u64,
    prompt_tokens: u64,
    sources: Vec<SourceView>,
}

impl EndpointView {
    /// All endpoints of all pools, by model and address.
    pub(super) fn all(router: &Router, sources: &[SourceBrief]) -> Vec<Self> {
        let view = |(model, endpoint): (Arc<str>, Arc<Endpoint>)| {
            let its_own = sources.iter().filter(|it| it.endpoint == endpoint.address && it.model == model);
            Self {
                endpoint: endpoint.address,
                in_flight: endpoint.load.in_flight(),
                avoided_ms: endpoint.load.avoided_for(router.now()).map(|rest| rest.0),
                ranks: endpoint.ranks.count(),
                n_blocks: its_own.map(|source| source.n_blocks).sum(),
                decisions: endpoint.given.n_decisions(),
                matched_tokens: endpoint.given.matched_tokens(),
                prompt_tokens: endpoint.given.prompt_tokens(),
                sources: SourceView::of(sources, &model, endpoint.address),
                model,
            }
        };
        let mut views: Vec<_> = router.endpoints().into_iter().map(view).collect();
        views.sort_by(|a, b| (&a.model, a.endpoint).cmp(&(&b.model, b.endpoint)));
        views
    }
}

/// Answer to `/index`.
#[derive(Debug, Serialize)]
pub(super) struct IndexView {
    bytes: usize,
    limit_bytes: usize,
    keyspaces: Vec<KeyspaceRow>,
}

impl IndexView {
    pub(super) fn of(router: &Router) -> Self {
        let (bytes, limit_bytes) = router.index_bytes();
        Self { bytes, limit_bytes, keyspaces: router.keyspace_rows() }
    }
}

fn verdict_names(verdict: &Verdict) -> (&'static str, Option<&'static str>) {
    match verdict {
        Verdict::Route(_) => ("route", None),
        Verdict::Shadow(_) => ("leave_to_envoy", None),
        Verdict::Leave(leave) => ("leave_to_envoy", Some(leave.as_str())),
        Verdict::Refuse(refusal) => ("refuse", Some(refusal.as_str())),
    }
}

fn fallback(outcome: Outcome) -> Option<&'static str> {
    if let Outcome::Fallback(fallback) = outcome { Some(fallback.as_str()) } else { None }
}

fn runner_up(picked: &Picked) -> Option<SocketAddr> {
    picked.standings.get(1).map(|standing| standing.endpoint)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Why the first of the candidates was picked and not the second.
fn why(standings: &[Standing]) -> String {
    let (first, second) = match standings {
        [] => return String::new(),
        [_] => return "it was the only candidate".to_owned(),
        [first, second, ..] => (first, second),
    };
    if second.is_too_far_ahead {
        let (held, n) = (second.matched_tokens, second.in_flight);
        return format!(
            "the runner-up has {n} requests in flight, more than {MOST_AHEAD} beyond the least loaded, so that the {held} \
             tokens that it holds do not count"
        );
    }
    let terms = |it: &Standing| (it.matched_tokens, it.offloaded_tokens, it.in_flight);
    match (terms(first), terms(second)) {
        ((a, ..), (b, ..)) if a != b => format!("it holds {a} tokens of the prompt, the runner-up {b}"),
        ((_, a, _), (_, b, _)) if a != b => {
            format!("both hold as much on their GPUs; in other tiers it holds {a} tokens more, the runner-up {b}")
        }
        ((held, _, a), (.., b)) if a != b => {
            format!("both hold {held} tokens of the prompt; it has {a} requests in flight, the runner-up {b}")
        }
        ((held, _, n), _) => {
            format!("both hold {held} tokens of the prompt and have {n} requests in flight; chance decided")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn standing(matched_tokens: u32, offloaded_tokens: u32, in_flight: u32) -> Standing {
        Standing {
            endpoint: ([127, 0, 0, 1], 1).into(),
            matched_tokens,
            offloaded_tokens,
            promised_tokens: 0,
            rank: None,
            in_flight,
            is_too_far_ahead: in_flight > 16,
        }
    }

    #[test]
    fn the_first_term_that_differs_is_why() {
        for (second, expected) in [
            (standing(32, 0, 1), "it holds 64 tokens of the prompt, the runner-up 32"),
            (standing(64, 8, 1), "in other tiers it holds 16 tokens more, the runner-up 8"),
            (standing(64, 16, 3), "both hold 64 tokens of the prompt; it has 1 requests in flight, the runner-up 3"),
            (standing(64, 16, 1), "chance decided"),
            (standing(640, 16, 17), "so that the 640 tokens that it holds do not count"),
        ] {
            let found = why(&[standing(64, 16, 1), second]);
            assert!(found.contains(expected), "{expected}\nis not in\n{found}");
        }
        assert_eq!((why(&[standing(1, 0, 0)]).as_str(), why(&[]).as_str()), ("it was the only candidate", ""));
    }
}
