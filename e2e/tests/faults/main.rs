//! Faults on real sockets: the proxy that makes them, and what the event plane makes of them.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod counts;
mod proxy;
mod publisher;
mod scenarios;
