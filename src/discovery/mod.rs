//! Where endpoints come from, and what they say of themselves.
//!
//! A source of endpoints (the configuration's list, [`mod@file`], [`dns`] or [`kubernetes`]) hands over full listings of
//! [`Listed`]s as [`Update`]s, and a [`registry`] turns them into immutable
//! [`EndpointSet`](crate::routing::endpoint::EndpointSet)s for a `watch` channel: they change rarely and every request
//! reads the newest one without a lock that anybody holds for long. A source that fails says so and lists nothing, so
//! that the last set goes on serving; before its first listing a pool is not synced, and its requests are left to Envoy.
//!
//! The endpoints of such a set are then asked, each on its own and in the background: which adapters they have
//! ([`adapters`]), where their ranks publish ([`ask`] with [`event_sources`]) and, if configured, whether they have
//! dropped their cache ([`scrape`] with [`exposition`]). Nobody waits for what comes of it: it is noted in the endpoint
//! or handed over as a [`Finding`].

pub mod adapters;
pub mod ask;
pub mod dns;
pub mod event_sources;
pub mod exposition;
pub mod file;
pub mod kubernetes;
pub mod listed;
pub(crate) mod outage;
mod pause;
pub mod registry;
mod rounds;
pub mod scrape;

use std::sync::Arc;

use crate::routing::endpoint::Endpoint;
use event_sources::RankSource;
use listed::Listed;

/// What a source of endpoints has to say of its pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Update {
    /// These are all of its endpoints.
    Listed(Vec<Listed>),
    /// They still are.
    Confirmed,
    /// It cannot be said now which they are; the name of the reason. The source has logged it.
    Failed(&'static str),
    /// So many things that endpoints say of themselves cannot be, and the defaults were taken. Logged, too.
    WrongHints(usize),
}

/// Takes the updates of a pool, in their order.
pub type OnUpdate = Box<dyn FnMut(Update) + Send + Sync>;

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
