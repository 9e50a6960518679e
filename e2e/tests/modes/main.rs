//! One suite in every mode of compatibility, configured by our file and by AIBrix's names.
//!
//! | mode | tokens | index |
//! |---|---|---|
//! | both off | the prompt's bytes, or a tokenizer of our own | learned from picks |
//! | remote only | the engines', with one of those as stand-in | learned from picks |
//! | both on | the engines' | the engines' events |

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod files;
mod refused;
mod setup;
mod suite;

use e2e::sim::fault::TokenizeFault;
use serde_json::{Value, json};

use setup::{Given, Mode};

const SYNC: &str = "AIBRIX_KV_EVENT_SYNC_ENABLED";
const REMOTE: &str = "AIBRIX_USE_REMOTE_TOKENIZER";
const TYPE: &str = "AIBRIX_PREFIX_CACHE_TOKENIZER_TYPE";
const ENGINE: &str = "AIBRIX_REMOTE_TOKENIZER_ENGINE";
const ENDPOINT: &str = "AIBRIX_REMOTE_TOKENIZER_ENDPOINT";

/// What our file says.
fn file(sync: bool, tokenizer: Value) -> Mode {
    Mode { sync: Some(sync), tokenizer: Some(tokenizer), follows: sync, ..Mode::default() }
}

/// What AIBrix's variables say, with a file that leaves it to them.
fn env(sync: bool, variables: &[(&'static str, &str)]) -> Mode {
    let variables = variables.iter().map(|(name, value)| (*name, (*value).to_owned()));
    let env = variables.chain([(SYNC, sync.to_string())]).collect();
    Mode { env, follows: sync, ..Mode::default() }
}

impl Mode {
    /// Whether tokens are asked for; by default they are not.
    fn asking(self) -> Self {
        Self { asks: true, ..self }
    }

    /// Whoever is asked for tokens is out of order.
    fn failing(self) -> Self {
        Self { fault: TokenizeFault::Error, ..self }
    }
}

macro_rules! modes {
    ($($(#[$attribute:meta])* $test:ident: $mode:expr,)*) => {
        $(
            $(#[$attribute])*
            #[tokio::test(flavor = "multi_thread")]
            async fn $test() {
                let given = Given::new();
                #[allow(clippy::redundant_closure_call, reason = "modes that need nothing given look like the others")]
                suite::run(($mode)(&given)).await;
            }
        )*
    };
}

modes! {
    both_off_with_the_prompts_bytes: |_: &Given| file(false, json!({"kind": "text"})),
    both_off_with_the_prompts_bytes_by_aibrix_names: |_: &Given| env(false, &[(REMOTE, "false"), (TYPE, "character")]),
    both_off_with_a_local_tokenizer: |given: &Given| file(false, json!({"kind": "local", "path": given.files()})),
    both_off_with_a_local_tokenizer_by_aibrix_names: |given: &Given| Mode {
        // AIBrix brings its tokenizer along, so it has no name for a path.
        tokenizer: Some(json!({"path": given.files()})),
        ..env(false, &[(REMOTE, "false"), (TYPE, "tiktoken")])
    },
    remote_only: |_: &Given| file(false, json!({"kind": "remote"})).asking(),
    remote_only_by_aibrix_names: |_: &Given| env(false, &[(REMOTE, "true"), (TYPE, "remote"), (ENGINE, "vllm")]).asking(),
    remote_only_that_fails: |_: &Given| file(false, json!({"kind": "remote"})).asking().failing(),
    remote_only_that_fails_by_aibrix_names: |_: &Given| env(false, &[(REMOTE, "true")]).asking().failing(),
    remote_only_that_fails_with_a_local_tokenizer: |given: &Given| {
        file(false, json!({"kind": "remote", "path": given.files()})).asking().failing()
    },
    both_on: |_: &Given| file(true, json!({"kind": "remote"})).asking(),
    both_on_by_aibrix_names: |_: &Given| env(true, &[(REMOTE, "true"), (TYPE, "remote")]).asking(),
    both_on_with_an_endpoint_of_its_own: |given: &Given| {
        file(true, json!({"kind": "remote", "endpoint": given.endpoint()})).asking_endpoint(given)
    },
    both_on_with_an_endpoint_of_its_own_by_aibrix_names: |given: &Given| {
        env(true, &[(REMOTE, "true"), (ENDPOINT, &given.endpoint())]).asking_endpoint(given)
    },
}
