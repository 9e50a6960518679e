//! What the running router tells of itself, seen from outside: by an OpenTelemetry Collector, by Prometheus, by a
//! browser and by a terminal, and what none of them may ever see.

#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "a panic is how a test fails")]

mod canary;
mod outage;
mod prometheus;
mod setup;
mod traces;
