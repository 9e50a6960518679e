//! A tokenizer of a realistic kind, and conversations for it.

use std::fs;
use std::path::Path;

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
/// Words of one message: a turn has some 300 tokens.
pub(crate) const MESSAGE: usize = 150;

/// What the engine would be asked.
pub(crate) fn question(messages: &[Value]) -> Question {
    Question { api: TokensApi::Tokenize, body: json!({"messages": messages}).to_string().into_bytes() }
}

/// A conversation of at least so many tokens.
pub(crate) fn conversation(tokenizer: &LocalTokenizer, n_tokens: usize) -> Vec<Value> {
    let n_per_message = {
        let one = question(&[json!({"role": "user", "content": words(MESSAGE, 0)})]);
        tokenizer.tokenize(&one).unwrap().ids.len()
    };
    let n_messages = n_tokens.div_ceil(n_per_message) | 1;
    let role = |at: usize| if at.is_multiple_of(2) { "user" } else { "assistant" };
    (0..n_messages).map(|at| json!({"role": role(at), "content": words(MESSAGE, n_tokens + at)})).collect()
}

/// `n` words, most of them from a vocabulary of some thousands, some with digits, drawn by `seed`.
pub(crate) fn words(n: usize, seed: usize) -> String {
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
pub(crate) fn write_model(directory: &Path) {
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
