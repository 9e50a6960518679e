//! The simulated engine behaves as the real one where the router can see it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "sim/captures.rs"]
mod captures;
#[path = "sim/faults.rs"]
mod faults;
#[path = "sim/http.rs"]
mod http;
#[path = "sim/replay.rs"]
mod replay;
