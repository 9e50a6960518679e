//! Routes each LLM request to the vLLM endpoint that already holds most of its prompt's KV blocks.
//!
//! Three flows meet in one pure core:
//!
//! - request:   [`extproc`] → [`request`] → [`tokenizer`] → [`routing`] → [`extproc`]
//! - event:     [`events`] → [`routing::index`]
//! - discovery: [`discovery`] → [`routing::endpoint`], [`events`]
//!
//! What is asked of an engine over HTTP, by the request and the discovery flow, goes through [`engine`].
//!
//! [`routing`] is plain computation: no I/O, no clock, no log. `docs/architecture.md` has the table of
//! who may import whom; `tests/layers.rs` holds it.

#![cfg_attr(test, allow(clippy::disallowed_methods, reason = "tests run fakes beside them"))]

pub mod admin;
pub mod cli;
pub mod config;
pub mod discovery;
pub mod engine;
pub mod events;
pub mod extproc;
pub mod record;
pub mod request;
pub mod routing;
pub mod snapshots;
pub mod supervisor;
pub mod telemetry;
pub mod tokenizer;
