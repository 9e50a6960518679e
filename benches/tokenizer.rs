//! Tokenizing one more turn of a conversation: all of it, against only what is new.
//!
//! `cargo bench --bench tokenizer`. Both ask a `LocalTokenizer` for the same kind of chat, so both include reading the
//! body and rendering it; in the first one, the first message is another one each time, so that nothing is known.

#![allow(clippy::unwrap_used, reason = "a panic is how a benchmark fails")]

mod support;

use std::cell::Cell;
use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput};
use serde_json::json;
use warmroute::tokenizer::local::LocalTokenizer;

use support::{MESSAGE, conversation, question, words, write_model};

const SIZES: [usize; 4] = [1_000, 8_000, 32_000, 100_000];
fn main() {
    let directory = tempfile::tempdir().unwrap();
    write_model(directory.path());
    let tokenizer = LocalTokenizer::load(directory.path()).unwrap();
    let mut criterion = Criterion::default().sample_size(10).configure_from_args();
    let mut group = criterion.benchmark_group("turn");
    for n_tokens in SIZES {
        let messages = conversation(&tokenizer, n_tokens);
        let nth = Cell::new(0_usize);
        let next = || nth.replace(nth.get() + 1);
        group.throughput(Throughput::Elements(n_tokens as u64));
        group.bench_function(BenchmarkId::new("whole", n_tokens), |b| {
            b.iter_batched(
                || {
                    let mut messages = messages.clone();
                    messages[0]["content"] = json!(words(MESSAGE, n_tokens + 1_000_000 + next()));
                    question(&messages)
                },
                |question| black_box(tokenizer.tokenize(&question).unwrap().ids.len()),
                criterion::BatchSize::PerIteration,
            );
        });
        tokenizer.tokenize(&question(&messages)).unwrap();
        group.bench_function(BenchmarkId::new("reused", n_tokens), |b| {
            b.iter_batched(
                || {
                    let mut messages = messages.clone();
                    messages.push(json!({"role": "user", "content": words(MESSAGE, 2_000_000 + next())}));
                    question(&messages)
                },
                |question| {
                    let tokens = tokenizer.tokenize(&question).unwrap();
                    assert!(tokens.reused * 2 > tokens.ids.len(), "{} of {}", tokens.reused, tokens.ids.len());
                    black_box(tokens.ids.len())
                },
                criterion::BatchSize::PerIteration,
            );
        });
    }
    group.finish();
    criterion.final_summary();
}
