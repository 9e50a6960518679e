//! What the admin port shows of requests and sources, put together from their owners.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::shown_source;
use crate::admin::health::Readiness;
use crate::admin::overview::{Engines, Overview, Read, ReadPart};
use crate::events::socket::EventPlane;
use crate::events::stats::SourceStatus;
use crate::extproc::decide::Router;
use crate::extproc::explain::{Explain, MIXED, ReadSources, SourceBrief};
use crate::extproc::rollout::Mode;

/// The routes of the admin port that show decisions.
pub(super) fn routes(
    router: &Arc<Router>,
    events: &Arc<EventPlane>,
    readiness: &Readiness,
    body_bytes: usize,
) -> axum::Router {
    let explain = Explain::new(router.clone(), read_sources(events), body_bytes);
    let part = |read: fn(&Explain) -> Value| {
        let explain = explain.clone();
        ReadPart::new(move || read(&explain))
    };
    let (rolled_out, followed, explained) = (router.clone(), events.clone(), explain.clone());
    let engines = move || {
        let status = followed.status();
        let briefs: Vec<_> = status.iter().map(brief).collect();
        Engines { endpoints: explained.endpoints(&briefs), sources: status.iter().map(shown_source).collect() }
    };
    let overview = Overview {
        started: Instant::now(),
        readiness: readiness.clone(),
        engines: Read::new(engines),
        rollout: ReadPart::new(move || rolled_out.common_mode().map_or(MIXED, Mode::as_str).into()),
        totals: part(Explain::totals),
        index: part(Explain::index),
        recent: part(Explain::recent),
    };
    explain.routes().merge(overview.routes())
}

fn read_sources(events: &Arc<EventPlane>) -> ReadSources {
    let events = events.clone();
    ReadSources::new(move || events.status().iter().map(brief).collect())
}

fn brief(status: &SourceStatus) -> SourceBrief {
    SourceBrief {
        model: status.model.clone(),
        endpoint: status.address,
        rank: status.rank,
        state: status.state.as_str(),
        last_event_ms: last_event_ms(status),
        n_blocks: status.n_blocks,
    }
}

/// Milliseconds since a source's last batch was applied.
pub(super) fn last_event_ms(status: &SourceStatus) -> Option<u64> {
    status.last_batch_age.map(millis)
}

pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
