//! Questions for tokens, against recordings of a real vLLM: what the router asks is what was asked when the ids were
//! recorded, and those were the ids that the engine computed.

use std::fs;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;
use warmroute::request::{self, Api, Prompt, Question, ReadOptions};

const FAMILIES: [&str; 6] = ["tiny", "llama3", "qwen", "mistral", "unigram", "wordpiece"];

/// A line of `corpus.jsonl`; `tests/data/tokens/README.md` says what its fields are.
#[derive(Deserialize)]
struct Line {
    name: String,
    request: Box<RawValue>,
    status: u16,
    tokens: Option<Vec<u32>>,
    engine_path: String,
    openai: Option<Box<RawValue>>,
}

impl Line {
    /// The bytes that the client sends.
    fn client_body(&self) -> &str {
        self.openai.as_ref().unwrap_or(&self.request).get()
    }
}

fn corpus(family: &str) -> Vec<Line> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/tokens").join(family).join("corpus.jsonl");
    fs::read_to_string(&path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn question(path: &str, body: &str) -> Option<Question> {
    match request::open(Api::of_path(path), body.as_bytes()).unwrap().read(&ReadOptions::default()).prompt {
        Prompt::Text(question) => Some(question),
        Prompt::Tokens(_) | Prompt::Opaque(_) => None,
    }
}

#[test]
fn questions_equal_those_whose_answers_were_recorded() {
    for family in FAMILIES {
        for line in corpus(family) {
            let name = &line.name;
            let Some(question) = question(&line.engine_path, line.client_body()) else {
                assert_ne!(line.status, 200, "{family} {name} has tokens, but the router does not ask for them");
                continue;
            };
            let asked: Value = serde_json::from_slice(&question.body).unwrap();
            let recorded: Value = serde_json::from_str(line.request.get()).unwrap();
            assert_eq!(asked, recorded, "{family} {name}");
        }
    }
}

#[test]
fn recordings_hold_ids_of_many_bodies_in_every_family() {
    for family in FAMILIES {
        let lines = corpus(family);
        assert!(lines.iter().all(|line| (line.status == 200) == line.tokens.is_some()), "{family}");
        let n_tokenized = lines.iter().filter(|line| line.tokens.is_some()).count();
        let n_rewritten = lines.iter().filter(|line| line.openai.is_some()).count();
        assert!(n_tokenized >= 150 && n_rewritten >= 5, "{family}: {n_tokenized} tokenized, {n_rewritten} rewritten");
    }
}
