//! The tokenizers and chat templates that a server's model can have: its own, or one of each kind that real models
//! have.
//!
//! The files and what was recorded with them lie in `tests/data/tokens`, which also says what the families stand for.

/// A kind of tokenizer, with a chat template.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Family {
    /// The harness' own: byte-level BPE, trained when the model is made.
    #[default]
    Tiny,
    /// Byte-level BPE in the style of Llama 3.
    Llama3,
    /// Byte-level BPE in the style of Qwen 3.
    Qwen,
    /// SentencePiece's BPE with byte fallback, in the style of Mistral.
    Mistral,
    /// Unigram, in the style of T5 and Gemma 3.
    Unigram,
    /// WordPiece, in the style of BERT.
    WordPiece,
}

/// The files of a tokenizer, by name and contents.
type TokenizerFiles = &'static [(&'static str, &'static str)];

macro_rules! files {
    ($directory:literal) => {
        &[
            ("tokenizer.json", include_str!(concat!("../../../tests/data/tokens/", $directory, "/tokenizer.json"))),
            (
                "tokenizer_config.json",
                include_str!(concat!("../../../tests/data/tokens/", $directory, "/tokenizer_config.json")),
            ),
            (
                "chat_template.jinja",
                include_str!(concat!("../../../tests/data/tokens/", $directory, "/chat_template.jinja")),
            ),
        ]
    };
}

impl Family {
    /// The name of its directory in `tests/data/tokens`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tiny => "tiny",
            Self::Llama3 => "llama3",
            Self::Qwen => "qwen",
            Self::Mistral => "mistral",
            Self::Unigram => "unigram",
            Self::WordPiece => "wordpiece",
        }
    }

    /// What the model's maker copies; nothing for the tokenizer that it trains itself.
    pub(super) fn files(self) -> TokenizerFiles {
        match self {
            Self::Tiny => &[],
            Self::Llama3 => files!("llama3"),
            Self::Qwen => files!("qwen"),
            Self::Mistral => files!("mistral"),
            Self::Unigram => files!("unigram"),
            Self::WordPiece => files!("wordpiece"),
        }
    }
}
