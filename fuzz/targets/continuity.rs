//! The continuity machine on arbitrary inputs.

#![no_main]

#[path = "../bodies/continuity.rs"]
mod body;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| body::run(bytes));
