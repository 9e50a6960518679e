//! The second tokenizer: the model's own `tokenizer.json` and chat template, run here.
//!
//! [`LocalTokenizer::tokenize`] gives for the body of a `/tokenize` call the ids that vLLM 0.32.0 gives, or says that
//! it cannot ([`Unsupported`]) and leaves the question to the engine. Nothing is guessed: what the engine refuses, what
//! needs more than text, and what Python does in a way that is not followed here exactly is unsupported. What the files
//! cannot tell (another template on the engine's command line, its defaults for template arguments, a tokenizer class
//! that builds its own pre-tokenizer) only a comparison with the engine shows; whoever uses this module compares.
//!
//! A body goes through `request` (its fields), `messages` and `tools` (what the engine makes of them), `template` (the
//! text) and `conversation` (the tokens, reused as far as an earlier prompt began the same way). `load` reads the
//! files.
//!
//! Everything here is computation on the caller's thread: some 2 µs per token that is not reused. A text is at most
//! [`MAX_TEXT`] bytes long and a rendering at most some million steps; templates and tokenizers are the operator's, and
//! are trusted not to be slower than that.

mod clock;
mod conversation;
mod dumps;
mod exact;
mod json;
mod load;
mod messages;
mod python;
mod request;
mod syntax;
mod template;
mod tools;

#[cfg(test)]
mod tests;

use std::path::Path;

use tokenizers::Tokenizer;

pub use self::conversation::ConversationStatus;
use self::conversation::{Conversations, Tokenized};
pub use self::load::LoadError;
use self::load::Templates;
use self::request::{Ask, Chat};
use crate::request::{Question, TokensApi};

/// Longest text that is tokenized, in bytes. No model's context is longer.
pub const MAX_TEXT: usize = 32 << 20;

/// The tokens of a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalTokens {
    /// Token ids.
    pub ids: Vec<u32>,
    /// How many of them come from the conversation cache.
    pub reused: usize,
}

/// Why a question is left to the engine. No variant carries anything of the prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unsupported {
    /// Only `/tokenize` is answered here.
    #[error("{} is not answered here, only /tokenize", .0.path())]
    Api(TokensApi),
    /// This field is not as the engine takes it, or its meaning is not followed here.
    #[error("{0} is not what can be rendered here")]
    Body(&'static str),
    /// A part of a message is, or may be, no text.
    #[error("a message has parts that are no text")]
    Media,
    /// The files have no chat template.
    #[error("the model has no chat template")]
    NoTemplate,
    /// The template cannot be rendered here, or refuses the request.
    #[error("the chat template cannot be rendered here: {0}")]
    Template(&'static str),
    /// The text is longer than any that is tokenized.
    #[error("the prompt has more than {MAX_TEXT} bytes")]
    TooLong,
    /// The tokenizer failed.
    #[error("the tokenizer cannot read the prompt")]
    Tokenizer,
}

impl Unsupported {
    /// Name in metrics, spans and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Api(_) => "local_api",
            Self::Body(_) => "local_body",
            Self::Media => "local_media",
            Self::NoTemplate => "local_no_template",
            Self::Template(_) => "local_template",
            Self::TooLong => "local_too_long",
            Self::Tokenizer => "local_tokenizer",
        }
    }

    /// The kind of a template's error; its text may quote the prompt.
    fn template(error: &minijinja::Error) -> Self {
        Self::Template(match error.kind() {
            minijinja::ErrorKind::OutOfFuel => "out of fuel",
            minijinja::ErrorKind::SyntaxError => "syntax",
            minijinja::ErrorKind::UndefinedError => "undefined value",
            minijinja::ErrorKind::UnknownFilter => "unknown filter",
            minijinja::ErrorKind::UnknownFunction => "unknown function",
            minijinja::ErrorKind::UnknownMethod => "unknown method",
            minijinja::ErrorKind::UnknownTest => "unknown test",
            _ => "failed",
        })
    }
}

/// What a local tokenizer did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LocalStatus {
    /// The conversation cache.
    pub conversations: ConversationStatus,
}

/// A model's tokenizer and chat template.
pub struct LocalTokenizer {
    tokenizer: Tokenizer,
    special_tokens: Vec<(String, String)>,
    templates: Templates,
    conversations: Option<Conversations>,
    around: Option<Around>,
    unproved_class: Option<String>,
}

impl std::fmt::Debug for LocalTokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LocalTokenizer").field("status", &self.status()).finish_non_exhaustive()
    }
}

impl LocalTokenizer {
    /// Loads what lies at `path`: a directory with `tokenizer.json`, or such a file. Without a chat template only
    /// completions are answered. Blocks for as long as reading the files takes, some 100 ms for a large vocabulary.
    ///
    /// # Errors
    /// [`LoadError`], which names the file and what was expected of it.
    pub fn load(path: &Path) -> Result<Self, LoadError> {
        // One prompt has one thread, on a pool whose size someone has chosen.
        tokenizers::utils::parallelism::set_parallelism(false);
        let loaded = load::load(path)?;
        let conversations = Conversations::new(&loaded.tokenizer);
        let around = Around::of(&loaded.tokenizer);
        Ok(Self {
            tokenizer: loaded.tokenizer,
            special_tokens: loaded.special_tokens,
            templates: loaded.templates,
            conversations,
            around,
            unproved_class: loaded.unproved_class,
        })
    }

    /// The tokens that the engine would answer with.
    ///
    /// # Errors
    /// [`Unsupported`]: the engine has to be asked, and may refuse the request.
    pub fn tokenize(&self, question: &Question) -> Result<LocalTokens, Unsupported> {
        if question.api != TokensApi::Tokenize {
            return Err(Unsupported::Api(question.api));
        }
        match Ask::read(&question.body)? {
            Ask::Text { prompt, add_special_tokens } => self.encode(&prompt, add_special_tokens),
            Ask::Chat(chat) => {
                let add_special_tokens = chat.add_special_tokens;
                self.encode(&self.render(chat)?, add_special_tokens)
            }
        }
    }

    /// What was done so far.
    pub fn status(&self) -> LocalStatus {
        let conversations = self.conversations.as_ref().map(Conversations::status).unwrap_or_default();
        LocalStatus { conversations }
    }

    /// Whether an audit found reused tokens that are not those of the whole text. What was answered before may be wrong
    /// too, so whoever keeps answers forgets them. As cheap as reading a flag.
    pub fn is_doubted(&self) -> bool {
        self.conversations.as_ref().is_some_and(Conversations::is_disabled)
    }

    /// Why chats with or without tools cannot be rendered, if so: for the log when the tokenizer is loaded. The reason
    /// is about the template's source and quotes no prompt.
    pub fn template_fault(&self) -> Option<String> {
        [true, false].into_iter().find_map(|has_tools| match self.templates.choose(has_tools) {
            None => Some("there is no chat template".to_owned()),
            Some(Ok(_)) => None,
            Some(Err(error)) => Some(format!("{error:#}")),
        })
    }

    /// The class in `tokenizer_config.json`, if it may build a pre-tokenizer of its own, as `LlamaTokenizer` and
    /// `GemmaTokenizer` do in transformers 5: then the tokens here may not be the engine's, and only a comparison
    /// tells.
    pub fn unproved_class(&self) -> Option<&str> {
        self.unproved_class.as_deref()
    }

    fn render(&self, chat: Chat) -> Result<String, Unsupported> {
        let template = self.templates.choose(chat.tools.is_some()).ok_or(Unsupported::NoTemplate)?;
        let template = template.as_ref().map_err(Unsupported::template)?;
        let input = chat.into_input(template.format(), template.knows_developer())?;
        template.render(input, &self.special_tokens)
    }

    fn encode(&self, text: &str, add_special_tokens: bool) -> Result<LocalTokens, Unsupported> {
        if text.len() > MAX_TEXT {
            return Err(Unsupported::TooLong);
        }
        let known = self.around.as_ref().filter(|_| add_special_tokens);
        let tokens = match (&self.conversations, add_special_tokens, known) {
            (_, true, None) => self
                .tokenizer
                .encode_fast(text, true)
                .map(|encoding| LocalTokens { ids: encoding.get_ids().to_vec(), reused: 0 }),
            (Some(conversations), _, around) => {
                conversations.tokenize(&self.tokenizer, text).map(|tokenized| Around::put(around, tokenized))
            }
            (None, _, around) => {
                conversation::whole(&self.tokenizer, text).map(|ids| Around::put(around, Tokenized { ids, reused: 0 }))
            }
        };
        tokens.map_err(|_| Unsupported::Tokenizer)
    }
}

/// The tokens that the post-processor puts around a prompt.
#[derive(Debug, Default, PartialEq, Eq)]
struct Around {
    before: Vec<u32>,
    after: Vec<u32>,
}

impl Around {
    /// None where the post-processor does something else than to put the same tokens around every prompt.
    fn of(tokenizer: &Tokenizer) -> Option<Self> {
        let samples = ["", "x", "a longer sample, with 2 sentences. Here it ends"];
        let mut found = samples.iter().map(|sample| Self::of_sample(tokenizer, sample));
        let first = found.next()??;
        found.all(|other| other.as_ref() == Some(&first)).then_some(first)
    }

    fn of_sample(tokenizer: &Tokenizer, sample: &str) -> Option<Self> {
        // A second text tells where the first one's tokens begin: what stands before both is the same.
        let plain = tokenizer.encode_fast(sample, false).ok()?;
        let full = tokenizer.encode_fast(sample, true).ok()?;
        let empty = tokenizer.encode_fast("", true).ok()?;
        let (plain, full, empty) = (plain.get_ids(), full.get_ids(), empty.get_ids());
        let is_split = |n: &usize| {
            let (before, after) = empty.split_at(*n);
            full.len() == plain.len() + empty.len()
                && full.starts_with(before)
                && full.ends_with(after)
                && full[before.len()..].starts_with(plain)
        };
        let n_before = (0..=empty.len()).rev().find(is_split)?;
        Some(Self { before: empty[..n_before].to_vec(), after: empty[n_before..].to_vec() })
    }

    fn put(around: Option<&Self>, tokenized: Tokenized) -> LocalTokens {
        let Tokenized { mut ids, reused } = tokenized;
        if let Some(around) = around {
            ids.splice(..0, around.before.iter().copied());
            ids.extend_from_slice(&around.after);
        }
        LocalTokens { ids, reused }
    }
}
