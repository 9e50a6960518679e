//! What the running router tells of itself, seen from outside: by an OpenTelemetry Collector, by Prometheus, by a
//! browser and by a terminal, and what none of them may ever see.

#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "a panic is how a test fails")]

mod browser;
mod canary;
#[path = "../../../tests/it/declared.rs"]
mod declared;
mod live;
mod outage;
mod page;
mod prometheus;
mod setup;
mod top;
mod traces;

/// Held by every test of this binary for as long as its processes run: one of them compares how long requests take, and
/// all of them load the machine.
pub(crate) static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
