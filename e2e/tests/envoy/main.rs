//! The router behind a real Envoy, in front of simulated engines.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod full_duplex;
mod original_dst;
mod override_host;
mod rollout;
mod setup;
