//! The router's parts over real sockets on port 0, against in-process fakes.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]
#![allow(clippy::disallowed_methods, reason = "fakes run beside the test")]

mod captures;
mod cli;
mod declared;
mod dial_in;
mod dns;
mod duplex;
mod endpoint_file;
mod engine;
mod events;
mod explain;
mod fake_api;
mod fake_publisher;
mod fakes;
mod fuzz_corpus;
mod hash;
mod health;
mod kubernetes;
mod local_tokens;
mod process;
mod reload;
mod remote_tokenizer;
mod report;
mod rollout;
mod router;
mod snapshots;
mod sources;
mod tail;
mod telemetry;
mod tokenizer;
mod tokenizer_stub;
mod tokens;
mod wire;
