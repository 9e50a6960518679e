//! The local tokenizer against what a real vLLM answered, for every model under `tests/data/tokens`.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::value::RawValue;
use warmroute::request::{Question, TokensApi};
use warmroute::tokenizer::local::{LocalTokenizer, Unsupported};

/// Kinds of tokenizers that have to be there.
const MIN_MODELS: usize = 4;
/// Of the bodies that the engine answers, at least so many in a hundred are to be answered here.
const MIN_SUPPORTED: usize = 95;

/// A recorded question, with the engine's answer.
#[derive(Deserialize)]
struct Recorded<'a> {
    name: String,
    path: String,
    #[serde(borrow)]
    request: &'a RawValue,
    status: u16,
    tokens: Option<Vec<u32>>,
}

#[test]
fn every_recorded_body_that_is_answered_here_has_the_tokens_of_vllm() {
    let models = models();
    assert!(models.len() >= MIN_MODELS, "{models:?}");
    for model in models {
        let tokenizer = LocalTokenizer::load(&model).unwrap();
        assert_eq!(tokenizer.template_fault(), None, "{}", model.display());
        let (mut n_answered, mut n_left) = (0, Vec::new());
        let corpus = fs::read_to_string(model.join("corpus.jsonl")).unwrap();
        // Twice, so that the second time finds what the first one kept.
        for line in corpus.lines().chain(corpus.lines()) {
            let recorded: Recorded<'_> = serde_json::from_str(line).unwrap();
            if recorded.path != "/tokenize" || recorded.status != 200 {
                continue;
            }
            match answer(&tokenizer, recorded.request) {
                Ok(ids) => {
                    assert_eq!(Some(&ids), recorded.tokens.as_ref(), "{}: {}", model.display(), recorded.name);
                    n_answered += 1;
                }
                Err(why) => n_left.push(format!("{}: {why}", recorded.name)),
            }
        }
        let n_asked = n_answered + n_left.len();
        assert!(n_answered * 100 >= n_asked * MIN_SUPPORTED, "{}: {n_left:#?}", model.display());
        let status = tokenizer.status().conversations;
        assert!(status.hits > 0 && !status.is_disabled, "{}: {status:?}", model.display());
    }
}

fn answer(tokenizer: &LocalTokenizer, body: &RawValue) -> Result<Vec<u32>, Unsupported> {
    let question = Question { api: TokensApi::Tokenize, body: body.get().as_bytes().to_vec() };
    tokenizer.tokenize(&question).map(|tokens| tokens.ids)
}

/// The directories with recordings, in order.
fn models() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/tokens");
    let entries = fs::read_dir(root).into_iter().flatten().map(|entry| entry.unwrap().path());
    let mut models: Vec<PathBuf> = entries.filter(|path| path.join("corpus.jsonl").is_file()).collect();
    models.sort();
    models
}
