//! Whether the local tokenizer may speak for the engines.
//!
//! For each [`Kind`] of prompt it is distrusted until it has agreed with them on a number of prompts in a row, at first
//! [`NEEDED`], and from then on a sample of one in [`AUDIT_INTERVAL`] is still compared. One difference, and all kinds
//! begin anew, with twice the number: an engine with another revision of the model, or another chat template, differs
//! on some prompts only.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use crate::request::Question;

/// Comparisons without a difference after which the local tokenizer is trusted with prompts of that kind.
const NEEDED: u32 = 64;
/// Times that the number doubles.
const MOST_DOUBLINGS: u32 = 8;
/// One in so many prompts of a trusted tokenizer is also given to the engines.
const AUDIT_INTERVAL: u64 = 100;

/// What decides which parts of the tokenizer and of the chat template a prompt needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Completion,
    Chat,
    /// A chat with tools or with arguments for the template.
    ChatWithMore,
}

impl Kind {
    const ALL: [Self; 3] = [Self::Completion, Self::Chat, Self::ChatWithMore];

    /// The kind of a question of ours, whose fields are written without spaces. A client's text has its quotes escaped;
    /// where one is taken for a field all the same, the prompt counts as another kind, which is no harm.
    pub(super) fn of(question: &Question) -> Self {
        let has = |field: &str| question.body.windows(field.len()).any(|found| found == field.as_bytes());
        if !has("\"messages\":") {
            Self::Completion
        } else if has(",\"tools\":") || has(",\"chat_template_kwargs\":") {
            Self::ChatWithMore
        } else {
            Self::Chat
        }
    }

    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Completion => "completion",
            Self::Chat => "chat",
            Self::ChatWithMore => "chat_with_tools_or_arguments",
        }
    }
}

/// See the module. The counters guard no other memory, and a moment's delay costs one comparison more: all accesses are
/// relaxed.
#[derive(Debug, Default)]
pub(super) struct Trust {
    /// By kind, comparisons without a difference in a row.
    n_agreed: [AtomicU32; Kind::ALL.len()],
    /// Times that trust was lost.
    n_lost: AtomicU32,
    n_asked: AtomicU64,
    n_equal: AtomicU64,
    n_different: AtomicU64,
}

/// What a comparison changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    Nothing,
    /// It is trusted with prompts of that kind from now on.
    Gained,
    /// It was trusted with some until now.
    Lost,
}

impl Trust {
    pub(super) fn is_trusted(&self, kind: Kind) -> bool {
        self.n_agreed[kind as usize].load(Relaxed) >= self.needed()
    }

    /// Whether it is trusted with any kind of prompt.
    pub(super) fn is_trusted_with_any(&self) -> bool {
        Kind::ALL.into_iter().any(|kind| self.is_trusted(kind))
    }

    fn needed(&self) -> u32 {
        NEEDED << self.n_lost.load(Relaxed).min(MOST_DOUBLINGS)
    }

    /// Whether this prompt is one of the sample.
    pub(super) fn is_audited(&self) -> bool {
        self.n_asked.fetch_add(1, Relaxed).is_multiple_of(AUDIT_INTERVAL)
    }

    /// Takes note of a comparison.
    pub(super) fn compared(&self, kind: Kind, is_equal: bool) -> Change {
        if !is_equal {
            return self.differed();
        }
        self.n_equal.fetch_add(1, Relaxed);
        let n_agreed = self.n_agreed[kind as usize].fetch_add(1, Relaxed).saturating_add(1);
        if n_agreed == self.needed() { Change::Gained } else { Change::Nothing }
    }

    fn differed(&self) -> Change {
        self.n_different.fetch_add(1, Relaxed);
        let was_trusted = self.is_trusted_with_any();
        self.n_agreed.iter().for_each(|n_agreed| n_agreed.store(0, Relaxed));
        if !was_trusted {
            return Change::Nothing;
        }
        self.n_lost.fetch_add(1, Relaxed);
        Change::Lost
    }

    /// Comparisons without and with a difference.
    pub(super) fn counts(&self) -> (u64, u64) {
        (self.n_equal.load(Relaxed), self.n_different.load(Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::TokensApi;

    #[test]
    fn trust_is_earned_lost_at_once_and_harder_to_earn_again() {
        let trust = Trust::default();
        for needed in [NEEDED, 2 * NEEDED] {
            for n in 1..=needed {
                assert!(!trust.is_trusted(Kind::Chat));
                let expected = if n == needed { Change::Gained } else { Change::Nothing };
                assert_eq!(trust.compared(Kind::Chat, true), expected);
            }
            assert!(trust.is_trusted(Kind::Chat) && !trust.is_trusted(Kind::Completion));
            assert_eq!(trust.compared(Kind::Chat, true), Change::Nothing);
            assert_eq!(trust.compared(Kind::Completion, false), Change::Lost, "all kinds lose it");
            assert!(!trust.is_trusted_with_any());
        }
        assert_eq!(trust.compared(Kind::Chat, false), Change::Nothing, "there was nothing to lose");
        assert_eq!(trust.counts(), (u64::from(3 * NEEDED + 2), 3));
    }

    #[test]
    fn a_sample_goes_on_being_compared() {
        let trust = Trust::default();
        let n_audited = (0..10 * AUDIT_INTERVAL).filter(|_| trust.is_audited()).count();
        assert_eq!(n_audited, 10);
    }

    #[test]
    fn prompts_that_need_other_parts_of_the_template_are_other_kinds() {
        for (body, kind) in [
            (r#"{"model":"m","prompt":"\"messages\":"}"#, Kind::Completion),
            (r#"{"messages":[{"role":"user","content":",\"tools\":"}]}"#, Kind::Chat),
            (r#"{"messages":[],"tools":[]}"#, Kind::ChatWithMore),
            (r#"{"messages":[],"chat_template_kwargs":{"a":1}}"#, Kind::ChatWithMore),
        ] {
            let question = Question { api: TokensApi::Tokenize, body: body.into() };
            assert_eq!(Kind::of(&question), kind, "{body}");
        }
    }
}
