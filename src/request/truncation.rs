//! How the engine cuts a prompt: `truncate_prompt_tokens` with `truncation_side`, of chats and completions.
//!
//! vLLM 0.32.0 (`renderers/params.py`, `renderers/base.py`) cuts the list of tokens, from the left unless the request
//! names a side (`tokenizers/registry.py`), and so do we. But where the request names none and the prompt is text, it
//! has the tokenizer do it, which puts its special tokens around what is left of the text: nobody who sees only the
//! list can tell them apart. And a limit of -1 is the engine's own, which we do not know.

use super::fields::{Fields, Text};
use super::{Api, Ask, Opaque, Prompt};

/// How the engine cuts the tokens of a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Truncation {
    /// The engine keeps the last tokens (its default side).
    KeepLast(usize),
    /// The engine keeps the first tokens.
    KeepFirst(usize),
}

impl Truncation {
    /// Cuts `tokens` as the engine does.
    pub fn apply(self, tokens: &mut Vec<u32>) {
        match self {
            Self::KeepLast(n) if n < tokens.len() => drop(tokens.drain(..tokens.len() - n)),
            Self::KeepFirst(n) => tokens.truncate(n),
            Self::KeepLast(_) => {}
        }
    }
}

/// What a request says of it.
pub(super) struct Wish {
    /// None: the engine's own.
    limit: Option<usize>,
    side: Option<Side>,
    adds_special_tokens: bool,
}

#[derive(Clone, Copy)]
enum Side {
    Left,
    Right,
}

impl Wish {
    /// None when the engine does not cut.
    pub(super) fn of(api: Api, fields: &Fields<'_>) -> Result<Option<Self>, Opaque> {
        let adds_by_default = match api {
            Api::ChatCompletions => false,
            Api::Completions => true,
            Api::Responses | Api::Messages | Api::Other => return Ok(None),
        };
        let side = side(fields)?;
        let Some(given) = fields.get("truncate_prompt_tokens") else { return Ok(None) };
        let adds_special_tokens =
            fields.get("add_special_tokens").map_or(adds_by_default, |adds| adds.get() != "false");
        Ok(Some(Self { limit: limit(given.get())?, side, adds_special_tokens }))
    }

    /// How we cut what `prompt` gets for tokens; none where that is cut already.
    pub(super) fn of_prompt(&self, prompt: &Prompt, ask: Ask) -> Result<Option<Truncation>, Opaque> {
        match (prompt, ask) {
            (Prompt::Opaque(_), _) | (Prompt::Text(_), Ask::Render) => return Ok(None),
            (Prompt::Text(_), Ask::Tokenize) if self.side.is_none() && self.adds_special_tokens => {
                return Err(Opaque::Inexact);
            }
            (Prompt::Text(_), Ask::Tokenize) | (Prompt::Tokens(_), _) => {}
        }
        let limit = self.limit.ok_or(Opaque::Inexact)?;
        Ok(Some(match self.side {
            Some(Side::Right) => Truncation::KeepFirst(limit),
            Some(Side::Left) | None => Truncation::KeepLast(limit),
        }))
    }
}

fn side(fields: &Fields<'_>) -> Result<Option<Side>, Opaque> {
    let Some(side) = fields.get("truncation_side") else { return Ok(None) };
    let Text(side) = serde_json::from_str(side.get()).map_err(|_| Opaque::Invalid)?;
    match &*side {
        "left" => Ok(Some(Side::Left)),
        "right" => Ok(Some(Side::Right)),
        _ => Err(Opaque::Invalid),
    }
}

/// The engine takes a whole number from -1 on, also as text.
fn limit(json: &str) -> Result<Option<usize>, Opaque> {
    let n: f64 = json.trim_matches('"').parse().map_err(|_| Opaque::Invalid)?;
    match n {
        -1.0 => Ok(None),
        n if n >= 0.0 && n.fract() == 0.0 => Ok(Some(n as usize)),
        _ => Err(Opaque::Invalid),
    }
}
