//! Where endpoints come from, and what they say of themselves.
//!
//! A source of endpoints publishes immutable [`EndpointSet`](crate::routing::endpoint::EndpointSet)s in a `watch`
//! channel: they change rarely and every request reads the newest one without a lock that anybody holds for long.
//!
//! The endpoints of such a set are then asked, each on its own and in the background: which adapters they have
//! ([`adapters`]), where their ranks publish ([`ask`] with [`event_sources`]) and, if configured, whether they have
//! dropped their cache ([`scrape`] with [`exposition`]). Nobody waits for what comes of it: it is noted in the endpoint
//! or handed over as a [`Finding`].

pub mod adapters;
pub mod ask;
pub mod event_sources;
pub mod exposition;
pub mod fixed;
mod rounds;
pub mod scrape;

use std::sync::Arc;

use crate::routing::endpoint::Endpoint;
use event_sources::RankSource;

/// What an endpoint has told of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// Its data-parallel ranks and where they publish: all of them, never empty.
    Sources(Vec<RankSource>),
    /// It names this many addresses that are not its own, and hence not dialled.
    Refused(usize),
    /// It has dropped its cache.
    Cleared,
    /// Its process is another one now.
    Restarted,
}

/// Takes the findings about the endpoints of a pool, on a thread of the runtime: it must not block.
pub type OnFinding = Arc<dyn Fn(&Endpoint, Finding) + Send + Sync>;
