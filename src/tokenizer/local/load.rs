//! Reads a model's tokenizer from a directory, as vLLM 0.32.0 with transformers 5.19 loads it (`TokenizersBackend`).
//!
//! `tokenizer.json` is the tokenizer. The other files add special tokens to it that it does not know as such, and name
//! them for the template: `tokenizer_config.json` and, where that lists no `added_tokens_decoder`,
//! `special_tokens_map.json` and `added_tokens.json`. Truncation and padding are switched off, as the engine does for
//! every call.
//!
//! Templates come from `chat_template.jinja` and `additional_chat_templates/*.jinja`, which hide those of
//! `tokenizer_config.json`. A processor's `chat_template.json` goes before them where a request has no tools.
//!
//! Some tokenizer classes of transformers build their own normalizer and pre-tokenizer and take only the vocabulary
//! from the file. Whether that comes to the same is for the comparison with the engine to say.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use tokenizers::{AddedToken, Tokenizer};

use super::json::{Json, Object};
use super::template::ChatTemplate;

/// A file that is larger than this is no tokenizer's.
const MAX_FILE: u64 = 256 << 20;
/// The special tokens that transformers knows by name.
const NAMED: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Classes that take `tokenizer.json` as it is, or build the same again: their tokens were compared.
const PROVED_CLASSES: [&str; 4] = ["PreTrainedTokenizer", "TokenizersBackend", "Qwen2Tokenizer", "BertTokenizer"];

/// Why a tokenizer cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The path is neither a directory nor a file.
    #[error("{path} is neither a directory with a tokenizer.json nor such a file")]
    NoPath {
        /// What was configured.
        path: PathBuf,
        /// Why it could not be looked at.
        #[source]
        source: io::Error,
    },
    /// A file cannot be read.
    #[error("{path} cannot be read")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file is larger than any tokenizer's.
    #[error("{path} has {size} bytes, expected at most {MAX_FILE}")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        size: u64,
    },
    /// A file is no JSON object.
    #[error("{path} is not a JSON object")]
    NotJson {
        /// The file.
        path: PathBuf,
        /// Why; none where it is JSON, but no object.
        #[source]
        source: Option<serde_json::Error>,
    },
    /// A file is JSON, and a field is not what it should be.
    #[error("{path}: {field} is not {expected}")]
    Field {
        /// The file.
        path: PathBuf,
        /// The field.
        field: String,
        /// What it should be.
        expected: &'static str,
    },
    /// `tokenizer.json` is not one that the tokenizers library reads.
    #[error("{path} is not a tokenizer of the tokenizers library")]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: tokenizers::Error,
    },
}

/// What the files say.
pub(super) struct Loaded {
    pub(super) tokenizer: Tokenizer,
    /// Names and texts of special tokens, for templates.
    pub(super) special_tokens: Vec<(String, String)>,
    pub(super) templates: Templates,
    /// The class that transformers may load it with, unless it is one of [`PROVED_CLASSES`].
    pub(super) unproved_class: Option<String>,
}

/// The chat templates of a model.
#[derive(Debug, Default)]
pub(super) struct Templates {
    /// Goes first where a request has no tools.
    processor: Option<Slot>,
    /// The only one, or the one named `default`.
    default: Option<Slot>,
    tool_use: Option<Slot>,
}

/// A template, or why it cannot be rendered here.
pub(super) type Slot = Result<ChatTemplate, minijinja::Error>;

impl Templates {
    /// The template for a request (vLLM `resolve_chat_template`, transformers `get_chat_template`).
    pub(super) fn choose(&self, has_tools: bool) -> Option<&Slot> {
        let processor = self.processor.as_ref().filter(|_| !has_tools);
        let tool_use = self.tool_use.as_ref().filter(|_| has_tools);
        processor.or(tool_use).or(self.default.as_ref())
    }
}

/// Loads what lies at `path`: a directory, or a `tokenizer.json` with its neighbours.
pub(super) fn load(path: &Path) -> Result<Loaded, LoadError> {
    let meta = fs::metadata(path).map_err(|source| LoadError::NoPath { path: path.to_owned(), source })?;
    let (file, directory) = match path.parent() {
        _ if meta.is_dir() => (path.join("tokenizer.json"), path),
        Some(parent) if parent != Path::new("") => (path.to_owned(), parent),
        _ => (path.to_owned(), Path::new(".")),
    };
    let mut tokenizer = read_tokenizer(&file)?;
    let config = read_object(&directory.join("tokenizer_config.json"))?.unwrap_or_default();
    let special = SpecialTokens::read(directory, &file, &config, &tokenizer)?;
    let missing = special.missing(&tokenizer);
    tokenizer.add_tokens(missing).map_err(|source| LoadError::Tokenizer { path: file.clone(), source })?;
    tokenizer.set_encode_special_tokens(matches!(config.get("split_special_tokens"), Some(Json::Bool(true))));
    let unproved_class = match config.get("tokenizer_class") {
        Some(Json::Str(class)) if !PROVED_CLASSES.contains(&class.trim_end_matches("Fast")) => Some(class.clone()),
        _ => None,
    };
    let templates = read_templates(directory, &config)?;
    Ok(Loaded { tokenizer, special_tokens: special.named(), templates, unproved_class })
}

fn read_tokenizer(file: &Path) -> Result<Tokenizer, LoadError> {
    let bytes = read(file)?.ok_or_else(|| LoadError::Unreadable {
        path: file.to_owned(),
        source: io::Error::from(io::ErrorKind::NotFound),
    })?;
    let at = |source| LoadError::Tokenizer { path: file.to_owned(), source };
    let mut tokenizer = Tokenizer::from_bytes(bytes).map_err(at)?;
    tokenizer.with_truncation(None).map_err(at)?.with_padding(None);
    Ok(tokenizer)
}

/// The bytes of a file, none when there is no such file.
fn read(path: &Path) -> Result<Option<Vec<u8>>, LoadError> {
    let unreadable = |source| LoadError::Unreadable { path: path.to_owned(), source };
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(unreadable(error)),
        Ok(meta) if meta.len() > MAX_FILE => {
            return Err(LoadError::TooLarge { path: path.to_owned(), size: meta.len() });
        }
        Ok(_) => {}
    }
    fs::read(path).map(Some).map_err(unreadable)
}

fn read_object(path: &Path) -> Result<Option<Object>, LoadError> {
    let Some(bytes) = read(path)? else { return Ok(None) };
    match serde_json::from_slice(&bytes) {
        Ok(Json::Object(object)) => Ok(Some(object)),
        Ok(_) => Err(LoadError::NotJson { path: path.to_owned(), source: None }),
        Err(source) => Err(LoadError::NotJson { path: path.to_owned(), source: Some(source) }),
    }
}

fn read_text(path: &Path) -> Result<Option<String>, LoadError> {
    let Some(bytes) = read(path)? else { return Ok(None) };
    let not_text = |_| LoadError::Field { path: path.to_owned(), field: "the file".into(), expected: "UTF-8 text" };
    // Python opens the file in text mode, which reads every kind of line break as one.
    let text = String::from_utf8(bytes).map_err(not_text)?;
    Ok(Some(text.replace("\r\n", "\n").replace('\r', "\n")))
}

/// The special tokens that the files name.
struct SpecialTokens {
    /// By name, in the order of transformers.
    named: Vec<(String, AddedToken)>,
    /// Without a name.
    extra: Vec<AddedToken>,
    /// What `added_tokens_decoder` (or, without it, `added_tokens.json`) lists.
    listed: Vec<AddedToken>,
}

impl SpecialTokens {
    fn read(directory: &Path, file: &Path, config: &Object, tokenizer: &Tokenizer) -> Result<Self, LoadError> {
        let config_path = directory.join("tokenizer_config.json");
        let mut fields = config.clone();
        let listed = match config.get("added_tokens_decoder") {
            Some(Json::Object(decoder)) => listed(decoder, &config_path)?,
            Some(_) => return Err(field(&config_path, "added_tokens_decoder", "an object")),
            None => {
                if let Some(map) = read_object(&directory.join("special_tokens_map.json"))? {
                    for (name, value) in map.0 {
                        fields.take(&name);
                        fields.0.push((name, value));
                    }
                }
                added(directory, &fields)?
            }
        };
        // Listed tokens come later, and win.
        let mut by_content = by_content(tokenizer);
        by_content.extend(listed.iter().rev().map(|token| (token.content.clone(), token.clone())));
        let known = |token: AddedToken| by_content.get(&token.content).cloned().unwrap_or(token);
        let mut named = Vec::new();
        if let Some(padding) = padding_token(file)?.filter(|_| fields.get("pad_token").is_none()) {
            fields.push("pad_token", Json::Str(padding));
        }
        for name in NAMED {
            if let Some(token) = fields.get(name).filter(|token| !token.is_null()) {
                let token = token_of(token).ok_or_else(|| field(&config_path, name, "a token"))?;
                named.push((name.to_owned(), known(token)));
            }
        }
        let is_named = |name: &str, value: &Json| {
            name.ends_with("_token") && !NAMED.contains(&name) && matches!(value, Json::Str(_))
        };
        for (name, value) in fields.0.iter().filter(|(name, value)| is_named(name, value)) {
            named.extend(token_of(value).map(|token| (name.clone(), token)));
        }
        let mut extra = Vec::new();
        match fields
            .get("extra_special_tokens")
            .filter(|extra| !extra.is_null())
            .or(fields.get("additional_special_tokens"))
        {
            Some(Json::List(tokens)) => extra.extend(tokens.iter().filter_map(token_of).map(known)),
            Some(Json::Object(tokens)) => {
                let tokens = tokens.0.iter().filter_map(|(name, value)| Some((name.clone(), token_of(value)?)));
                named.extend(tokens);
            }
            _ => {}
        }
        Ok(Self { named, extra, listed })
    }

    /// Names and texts.
    fn named(&self) -> Vec<(String, String)> {
        self.named.iter().map(|(name, token)| (name.clone(), token.content.clone())).collect()
    }

    /// What transformers adds to the tokenizer: the listed tokens that it knows in another way or not at all, and the
    /// special ones that it does not know as added tokens.
    fn missing(&self, tokenizer: &Tokenizer) -> Vec<AddedToken> {
        let added = by_content(tokenizer);
        let special: HashSet<&str> = self.named.iter().map(|(_, token)| token.content.as_str()).collect();
        let is_same = |token: &&AddedToken| added.get(&token.content) == Some(*token);
        let mut missing: Vec<AddedToken> = self.listed.iter().filter(|token| !is_same(token)).cloned().collect();
        let mut seen: HashSet<String> = missing.iter().map(|token| token.content.clone()).collect();
        let named = self.named.iter().map(|(_, token)| token);
        for token in named.chain(&self.extra) {
            if !added.contains_key(&token.content) && seen.insert(token.content.clone()) {
                missing.push(token.clone());
            }
        }
        for token in &mut missing {
            token.special |= special.contains(token.content.as_str());
        }
        missing
    }
}

fn field(path: &Path, name: &str, expected: &'static str) -> LoadError {
    LoadError::Field { path: path.to_owned(), field: name.to_owned(), expected }
}

/// How the tokenizer itself knows its added tokens, by their texts.
fn by_content(tokenizer: &Tokenizer) -> HashMap<String, AddedToken> {
    let added = tokenizer.get_added_tokens_decoder().into_values();
    added.map(|token| (token.content.clone(), token)).collect()
}

/// A token as text, or as an object whose flags Python fills with its defaults; a named one is special.
fn token_of(value: &Json) -> Option<AddedToken> {
    match value {
        Json::Str(content) => Some(AddedToken::from(content.clone(), true)),
        Json::Object(fields) => added_token(fields, true),
        _ => None,
    }
}

fn added_token(fields: &Object, special: bool) -> Option<AddedToken> {
    let Some(Json::Str(content)) = fields.get("content") else { return None };
    let flag = |name: &str| match fields.get(name) {
        Some(Json::Bool(flag)) => Some(*flag),
        _ => None,
    };
    let special = flag("special").unwrap_or(special);
    Some(AddedToken {
        content: content.clone(),
        single_word: flag("single_word").unwrap_or(false),
        lstrip: flag("lstrip").unwrap_or(false),
        rstrip: flag("rstrip").unwrap_or(false),
        normalized: flag("normalized").unwrap_or(!special),
        special,
    })
}

fn listed(decoder: &Object, path: &Path) -> Result<Vec<AddedToken>, LoadError> {
    let mut tokens = Vec::new();
    for (id, token) in &decoder.0 {
        let wrong = || field(path, "added_tokens_decoder", "an object of ids and tokens");
        let id: u32 = id.parse().map_err(|_| wrong())?;
        let Json::Object(token) = token else { return Err(wrong()) };
        tokens.push((id, added_token(token, false).ok_or_else(wrong)?));
    }
    tokens.sort_by_key(|(id, _)| *id);
    Ok(tokens.into_iter().map(|(_, token)| token).collect())
}

/// `added_tokens.json`, an older way to list them.
fn added(directory: &Path, fields: &Object) -> Result<Vec<AddedToken>, LoadError> {
    let path = directory.join("added_tokens.json");
    let Some(object) = read_object(&path)? else { return Ok(Vec::new()) };
    let special: Vec<String> =
        NAMED.iter().filter_map(|name| token_of(fields.get(name)?)).map(|token| token.content).collect();
    let mut tokens = Vec::new();
    for (content, id) in object.0 {
        let Json::Uint(id) = id else { return Err(field(&path, &content, "an id")) };
        let is_special = special.contains(&content);
        tokens.push((id, AddedToken::from(content, is_special)));
    }
    tokens.sort_by_key(|(id, _)| *id);
    Ok(tokens.into_iter().map(|(_, token)| token).collect())
}

/// The padding token of `tokenizer.json`, which transformers takes where the configuration names none.
fn padding_token(file: &Path) -> Result<Option<String>, LoadError> {
    #[derive(serde::Deserialize)]
    struct Padded {
        padding: Option<Padding>,
    }
    #[derive(serde::Deserialize)]
    struct Padding {
        pad_token: String,
    }
    let Some(bytes) = read(file)? else { return Ok(None) };
    let padded: Result<Padded, _> = serde_json::from_slice(&bytes);
    let padded = padded.map_err(|source| LoadError::NotJson { path: file.to_owned(), source: Some(source) })?;
    Ok(padded.padding.map(|padding| padding.pad_token))
}

fn read_templates(directory: &Path, config: &Object) -> Result<Templates, LoadError> {
    let slot = |source: String| ChatTemplate::new(&source);
    let mut templates = Templates::default();
    let processor_path = directory.join("chat_template.json");
    if let Some(mut object) = read_object(&processor_path)? {
        let Some(Json::Str(source)) = object.take("chat_template") else {
            return Err(field(&processor_path, "chat_template", "text"));
        };
        templates.processor = Some(slot(source));
    }
    let named = directory.join("additional_chat_templates");
    let file = read_text(&directory.join("chat_template.jinja"))?;
    let default = read_text(&named.join("default.jinja"))?;
    let tool_use = read_text(&named.join("tool_use.jinja"))?;
    if file.is_some() || default.is_some() || tool_use.is_some() {
        templates.default = default.or(file).map(slot);
        templates.tool_use = tool_use.map(slot);
        return Ok(templates);
    }
    let config_path = directory.join("tokenizer_config.json");
    match config.get("chat_template") {
        None | Some(Json::Null) => {}
        Some(Json::Str(source)) => templates.default = Some(slot(source.clone())),
        Some(Json::List(entries)) => {
            for entry in entries {
                let Json::Object(entry) = entry else {
                    return Err(field(&config_path, "chat_template", "a list of objects"));
                };
                match (entry.get("name"), entry.get("template")) {
                    (Some(Json::Str(name)), Some(Json::Str(source))) => match name.as_str() {
                        "default" => templates.default = Some(slot(source.clone())),
                        "tool_use" => templates.tool_use = Some(slot(source.clone())),
                        _ => {}
                    },
                    _ => return Err(field(&config_path, "chat_template", "a list of names and templates")),
                }
            }
        }
        Some(_) => return Err(field(&config_path, "chat_template", "text or a list of names and templates")),
    }
    Ok(templates)
}
