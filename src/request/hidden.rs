//! How what holds a prompt is shown: by its length. A log line or a failed assertion must not tell what a client said.

use std::fmt;

use super::{LlmRequest, Prompt, Question};

impl fmt::Debug for Question {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Question").field("api", &self.api).field("n_bytes", &self.body.len()).finish()
    }
}

impl fmt::Debug for Prompt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tokens(ids) => f.debug_struct("Tokens").field("n_tokens", &ids.len()).finish(),
            Self::Text(question) => f.debug_tuple("Text").field(question).finish(),
            Self::Opaque(opaque) => f.debug_tuple("Opaque").field(opaque).finish(),
        }
    }
}

impl fmt::Debug for LlmRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { model, prompt, cache_salt, truncation } = self;
        f.debug_struct("LlmRequest")
            .field("model", model)
            .field("prompt", prompt)
            .field("cache_salt_bytes", &cache_salt.as_ref().map(String::len))
            .field("truncation", truncation)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use crate::request::{Api, ReadOptions, open};

    #[test]
    fn only_lengths_of_what_a_client_said_are_shown() {
        for prompt in ["[\"SECRET\"]", "\"SECRET\"", "[8675309]", "{\"SECRET\":1}"] {
            let body = format!(
                "{{\"model\":\"m\",\"prompt\":{prompt},\"messages\":[{{\"role\":\"user\",\"content\":\"SECRET\"}}],\
                 \"cache_salt\":\"SECRET\"}}"
            );
            for api in [Api::Completions, Api::ChatCompletions] {
                let opened = open(api, body.as_bytes()).expect("readable");
                let shown = format!("{opened:?} {:?}", opened.read(&ReadOptions::default()));
                assert!(!shown.contains("SECRET") && !shown.contains("8675309"), "{shown}");
                assert!(shown.contains("cache_salt_bytes: Some(6)"), "{shown}");
            }
        }
    }

    #[test]
    fn what_is_wrong_with_a_body_does_not_quote_it() {
        for body in ["\"SECRET\"", "{\"model\":8675309}", "{\"model\":\"m\",\"a\":SECRET}"] {
            let error = open(Api::Completions, body.as_bytes()).expect_err("unreadable");
            let shown = format!("{error} {error:?}");
            assert!(!shown.contains("SECRET") && !shown.contains("8675309"), "{shown}");
        }
    }
}
