//! Tokenizing one more turn of a conversation: all of it, against only what is new.
//!
//! `cargo bench --bench tokenizer`. Both ask a `LocalTokenizer` for the same kind of chat, so both include reading the body and
//! rendering it; in the first one, the first message is another one each time, so that nothing is known.

#![allow(clippy::unwrap_used, reason = "a panic is how a benchmark fails")]

use std::cell::Cell;
use std::fs;
use std::hint::black_box;
use std::path::Path;

use criterion::{BenchmarkId, Criterion, Throughput};
use serde_json::{Value, json};
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::models::{ModelWrapper, TrainerWrapper};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer};
use warmroute::request::{Question, TokensApi};
use warmroute::tokenizer::local::LocalTokenizer;

const TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}\
    {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
/// How GPT-4, Llama 3 and Qwen split a text.
const SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const SIZES: [usize; 4] = [1_000, 8_000, 32_000, 100_000];
/// Words of one message: a turn has some 300 tokens.
const MESSAGE: usize = 150;

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

fn question(messages: &[Value]) -> Question {
    Question { api: TokensApi::Tokenize, body: json!({"messages": messages}).to_string().into_bytes() }
}

/// A conversation of at least so many tokens.
fn conversation(tokenizer: &LocalTokenizer, n_tokens: usize) -> Vec<Value> {
    let n_per_message = {
        let one = question(&[json!({"role": "user", "content": words(MESSAGE, 0)})]);
        tokenizer.tokenize(&one).unwrap().ids.len()
    };
    let n_messages = n_tokens.div_ceil(n_per_message) | 1;
    let role = |at: usize| if at.is_multiple_of(2) { "user" } else { "assistant" };
    (0..n_messages).map(|at| json!({"role": role(at), "content": words(MESSAGE, n_tokens + at)})).collect()
}

/// `n` words, most of them from a vocabulary of some thousands, some with digits, drawn by `seed`.
fn words(n: usize, seed: usize) -> String {
    const SYLLABLES: [&str; 16] =
        ["ka", "to", "ri", "men", "sol", "ver", "an", "ist", "pro", "gra", "lu", "tion", "ed", "ing", "ca", "che"];
    let mut random = fastrand::Rng::with_seed(seed as u64);
    let mut out = String::new();
    for _ in 0..n {
        for _ in 0..random.usize(1..4) {
            out.push_str(SYLLABLES[random.usize(..SYLLABLES.len())]);
        }
        match random.u8(..12) {
            0 => out.push_str(". "),
            1 => out.push_str(",\n"),
            2 => out.push_str(&format!(" {} ", random.u16(..))),
            _ => out.push(' '),
        }
    }
    out
}

/// A byte-level BPE of a realistic kind, trained on such words.
fn write_model(directory: &Path) {
    let special = ["<|im_start|>", "<|im_end|>"].map(|token| AddedToken::from(token, true)).to_vec();
    let model: ModelWrapper = BPE::builder().build().unwrap().into();
    let mut tokenizer = Tokenizer::new(model);
    let pattern = SplitPattern::Regex(SPLIT.to_owned());
    let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false).unwrap();
    let parts: Vec<PreTokenizerWrapper> = vec![split.into(), ByteLevel::new(false, false, false).into()];
    tokenizer.with_pre_tokenizer(Some(Sequence::new(parts)));
    let trainer = BpeTrainer::builder().vocab_size(8_000).show_progress(false).special_tokens(special);
    let mut trainer: TrainerWrapper =
        trainer.initial_alphabet(ByteLevel::alphabet().into_iter().collect()).build().into();
    tokenizer.train(&mut trainer, (0..200).map(|seed| words(500, seed))).unwrap();
    tokenizer.save(directory.join("tokenizer.json"), false).unwrap();
    fs::write(directory.join("chat_template.jinja"), TEMPLATE).unwrap();
}
