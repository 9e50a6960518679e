//! Answers as they are written in JSON.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use super::why::why;
use super::{MIXED, SourceBrief};
use crate::extproc::decide::{Considering, DryRun, KeyspaceBlocks, KeyspaceRow, Router, Verdict};
use crate::extproc::journal::{Later, Picked, Record, Told};
use crate::extproc::rollout::Mode;
use crate::request::UnreadableBody;
use crate::routing::endpoint::Endpoint;
use crate::routing::pick::{Outcome, Standing, Timings};

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
    /// Where the body stops being one that can be read: a line and a column, nothing that stands there.
    body_fault: Option<String>,
    /// Of this request.
    mode: &'static str,
    /// Of the pool's requests that are active, where its mode is.
    percent: Option<u8>,
}

impl ExplanationView {
    pub(super) fn of(found: &DryRun, body_fault: Option<UnreadableBody>, sources: &[SourceBrief]) -> Self {
        let picked = found.verdict.as_ref().ok();
        let (verdict, reason) = match &found.verdict {
            Ok(_) => (verdict_of_pick(found.mode), None),
            Err(verdict) => verdict_names(verdict),
        };
        let model = found.model.as_ref().map(|(model, _)| model.clone());
        let sources = Sources::by_endpoint(sources);
        let candidates = found.endpoints.iter().zip(model.iter().cycle());
        let candidates = candidates.map(|(it, model)| CandidateView::of(it, model, &sources));
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
            body_fault: body_fault.map(|fault| fault.to_string()),
            mode: mode_name(found.mode),
            percent: found.percent,
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
    fn of(considering: &Considering, model: &Arc<str>, sources: &Sources<'_>) -> Self {
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
            sources: sources.views(model, standing.endpoint),
        }
    }
}

#[derive(Debug, Serialize)]
struct SourceView {
    rank: u32,
    state: &'static str,
    last_event_ms: Option<u64>,
}

/// The sources, grouped once for all endpoints of an answer.
struct Sources<'a>(HashMap<(&'a str, SocketAddr), Vec<&'a SourceBrief>>);

impl<'a> Sources<'a> {
    /// The sources of each endpoint by rank.
    fn by_endpoint(sources: &'a [SourceBrief]) -> Self {
        let mut groups = HashMap::<_, Vec<&SourceBrief>>::new();
        for source in sources {
            groups.entry((&*source.model, source.endpoint)).or_default().push(source);
        }
        groups.values_mut().for_each(|group| group.sort_by_key(|source| source.rank));
        Self(groups)
    }

    fn of<'b>(&'b self, model: &'b str, endpoint: SocketAddr) -> &'b [&'a SourceBrief] {
        self.0.get(&(model, endpoint)).map_or(&[], Vec::as_slice)
    }

    fn views(&self, model: &str, endpoint: SocketAddr) -> Vec<SourceView> {
        let view = |source: &&SourceBrief| {
            let SourceBrief { rank, state, last_event_ms, .. } = **source;
            SourceView { rank, state, last_event_ms }
        };
        self.of(model, endpoint).iter().map(view).collect()
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
            Told::Picked(picked) => (verdict_of_pick(record.mode), None, Some(picked)),
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
            mode: mode_name(record.mode),
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
            blocks_stored_again: record.seen.as_ref().filter(|seen| seen.is_known()).map(|seen| seen.n_stored_again()),
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
        let sources = Sources::by_endpoint(sources);
        let view = |(model, endpoint): (Arc<str>, Arc<Endpoint>)| {
            let its_own = sources.of(&model, endpoint.address).iter();
            Self {
                endpoint: endpoint.address,
                in_flight: endpoint.load.in_flight(),
                avoided_ms: endpoint.load.avoided_for(router.now()).map(|rest| rest.0),
                ranks: endpoint.ranks.count(),
                n_blocks: its_own.map(|source| source.n_blocks).sum(),
                decisions: endpoint.given.n_decisions(),
                matched_tokens: endpoint.given.matched_tokens(),
                prompt_tokens: endpoint.given.prompt_tokens(),
                sources: sources.views(&model, endpoint.address),
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

/// What becomes of a request for which somebody is picked: in shadow Envoy is not told.
fn verdict_of_pick(mode: Option<Mode>) -> &'static str {
    if mode == Some(Mode::Active) { "route" } else { "leave_to_envoy" }
}

fn mode_name(mode: Option<Mode>) -> &'static str {
    mode.map_or(MIXED, Mode::as_str)
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
