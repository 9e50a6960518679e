//! Real vLLM servers: `cargo test -p e2e --test vllm -- --ignored`.
//!
//! A server takes both cores to start and gigabytes to run, so the tests take turns.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod credit;
mod doctor;
mod engine;
mod quick_start;
mod render;
mod routed;
mod setup;
mod tokens;

/// Held by a test for as long as its servers run.
static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
