//! `models[].tokenizer`: where token ids come from.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde::Serialize;

use super::aliases::SYNC_NAMES;
use super::reader::Node;
use super::{Human, ModelEvents};
use crate::engine::{Base, BaseError};

/// Longest budget as a multiple of the ordinary one, unless the configuration says otherwise: a prompt of 400 KB.
const BUDGET_MAX_FACTOR: u32 = 5;
/// Longest default of the budget.
const BUDGET: Duration = Duration::from_millis(100);
/// Share of Envoy's timeout between the end of the longest budget and that of the timeout, in which the pick is made
/// and answered: a deployment that needs a longer timeout needs longer for this as well.
const MARGIN: u32 = 10;
/// Default of [`Tokenizer::cache_bytes`].
const CACHE_BYTES: usize = 64 << 20;

/// `models[].tokenizer`
#[derive(Clone, Debug, Serialize)]
pub struct Tokenizer {
    /// `remote`, `local`, `auto` or `text`; default `remote`.
    pub kind: TokenizerKind,
    /// Directory with `tokenizer.json`, `tokenizer_config.json` and the chat template, as in the model's repository, or
    /// a `tokenizer.json` alone; needed by `local` and `auto`. With `remote` and without KV events it stands in when
    /// the engines do not answer.
    pub path: Option<PathBuf>,
    /// URL of a server that is asked in the place of the model's own endpoints, such as `http://tokenizer:8000`, with
    /// the engines' API key; null: those are asked.
    pub endpoint: Option<Base>,
    /// The engines' API: `tokenize` (default), or `render`, which needs vLLM's `--enable-scale-out` and the engines'
    /// API key, and also reads `/v1/responses`, `/v1/messages` and, if allowed, media.
    pub api: TokenizerApi,
    /// Longest that a request may wait for its tokens before it is picked by load; 1µs is added for each byte of the
    /// prompt. Default 100ms, or with a short `envoy.message_timeout` half of what that leaves.
    pub budget: Human,
    /// Bound of what is added, default five times the budget. Must end a tenth of `envoy.message_timeout` before that
    /// does.
    pub budget_max: Human,
    /// Memory for the tokens of prompts that were seen before, in bytes, default 64 MiB; 0 remembers none.
    pub cache_bytes: usize,
    /// Whether a client's own `chat_template` is sent to the engines (which need `--trust-request-chat-template`),
    /// default false: such requests are picked by load.
    pub allow_chat_template: bool,
    /// Whether requests with images, audio or video are sent to the engines' `render`, which fetches what their URLs
    /// name, default false: such requests are picked by load.
    pub allow_media: bool,
    /// Whether the engines run with `--exclude-tools-when-tool-choice-none`, default false.
    pub exclude_tools_when_none: bool,
}

/// `models[].tokenizer.kind`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TokenizerKind {
    /// The engines say which tokens a prompt has.
    Remote,
    /// The model's tokenizer runs in this process. Not with KV events: nobody has compared it with the engines.
    Local,
    /// Local as soon as it has agreed with the engines often enough; they go on checking it on a sample.
    Auto,
    /// The bytes of the prompt stand for its tokens. Not with KV events.
    Text,
}

/// `models[].tokenizer.api`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TokenizerApi {
    /// `/tokenize`
    Tokenize,
    /// `/v1/…/render`
    Render,
}

impl FromStr for TokenizerKind {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "remote" => Ok(Self::Remote),
            "local" => Ok(Self::Local),
            "auto" => Ok(Self::Auto),
            "text" => Ok(Self::Text),
            _ => Err(()),
        }
    }
}

impl FromStr for TokenizerApi {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "tokenize" => Ok(Self::Tokenize),
            "render" => Ok(Self::Render),
            _ => Err(()),
        }
    }
}

/// Kinds that tell the engines' own ids.
impl TokenizerKind {
    fn is_exact(self) -> bool {
        matches!(self, Self::Remote | Self::Auto)
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::Remote => "remote",
            Self::Local => "local",
            Self::Auto => "auto",
            Self::Text => "text",
        }
    }
}

pub(super) fn read_tokenizer(node: &Node<'_>, message_timeout: Duration, events: &ModelEvents) -> Tokenizer {
    const CACHE: &str = "a number of bytes from 0 to 1099511627776";
    const FLAG: &str = "true or false";
    const ENDPOINT: &str = "a URL such as http://tokenizer:8000, without user, password or query";
    let [kind, path, endpoint, api, budget, budget_max, cache, template, media, exclude] = node.fields([
        "kind",
        "path",
        "endpoint",
        "api",
        "budget",
        "budget_max",
        "cache_bytes",
        "allow_chat_template",
        "allow_media",
        "exclude_tools_when_none",
    ]);
    let files = read_path(&path);
    let chosen = read_kind(&kind, files.is_some(), events);
    if matches!(chosen, TokenizerKind::Local | TokenizerKind::Auto) && files.is_none() {
        path.fault("nothing", format!("the directory of the model's tokenizer, which kind: {} needs", chosen.as_str()));
    }
    if files.is_some() && chosen == TokenizerKind::Remote && events.sync {
        path.fault(
            "a tokenizer that is not used",
            "kind: auto, or nothing: with KV events only the engines' own tokens count",
        );
    }
    let chosen_api = api.or(TokenizerApi::Tokenize, "tokenize or render");
    if chosen_api == TokenizerApi::Render && chosen != TokenizerKind::Remote {
        api.fault(
            "render",
            format!("tokenize, or kind: remote: a local tokenizer does not render, as {} has it", chosen.as_str()),
        );
    }
    let allow_media = media.or(false, FLAG);
    if allow_media && chosen_api == TokenizerApi::Tokenize {
        media.fault("true", "false, or api: render: /tokenize does not say which image is where");
    }
    let cache_bytes = cache.or(CACHE_BYTES, CACHE);
    if cache_bytes > 1 << 40 {
        cache.fault(cache_bytes, CACHE);
    }
    let base = endpoint.secret(ENDPOINT, |error: BaseError| error.found);
    let (allow_chat_template, exclude_tools_when_none) = (template.or(false, FLAG), exclude.or(false, FLAG));
    let unused = [
        (&endpoint, base.is_some(), "a server that is not asked"),
        (&template, allow_chat_template, "true"),
        (&exclude, exclude_tools_when_none, "true"),
    ];
    refuse_unused(unused, chosen);
    let (budget, budget_max) = read_budgets(&budget, &budget_max, message_timeout);
    Tokenizer {
        kind: chosen,
        path: files,
        endpoint: base,
        api: chosen_api,
        budget,
        budget_max,
        cache_bytes,
        allow_chat_template,
        allow_media,
        exclude_tools_when_none,
    }
}

/// A setting of what the engines are asked is a mistake where they are not.
fn refuse_unused(settings: [(&Node<'_>, bool, &'static str); 3], kind: TokenizerKind) {
    if matches!(kind, TokenizerKind::Remote | TokenizerKind::Auto) {
        return;
    }
    for (node, _, found) in settings.into_iter().filter(|(_, is_set, _)| *is_set) {
        node.fault(found, format!("nothing, or kind: remote or auto: {} does not ask the engines", kind.as_str()));
    }
}

fn read_kind(node: &Node<'_>, has_files: bool, events: &ModelEvents) -> TokenizerKind {
    use TokenizerKind::{Auto, Local, Remote, Text};
    const EXACT: &str = "remote or auto: KV events are matched by the engines' own tokens (or events.sync: false, for an \
                         index that is learned from our own picks";
    let (alias, given) = (node.kind_alias(), node.optional("remote, local, auto or text"));
    let kind = match (alias.map(|alias| alias.is_remote), given) {
        (None, given) => given.unwrap_or(Remote),
        (Some(true), Some(Auto)) => Auto,
        (Some(true), _) => Remote,
        (Some(false), Some(kind @ (Local | Text))) => kind,
        (Some(false), _) if has_files => Local,
        (Some(false), _) => Text,
    };
    if events.sync && !kind.is_exact() {
        let (mut found, mut expected) = (kind.as_str().to_owned(), EXACT.to_owned());
        if let Some(alias) = alias {
            found += &format!(", as {} has it", alias.name);
            expected += &format!("; {}=false says so", SYNC_NAMES[0]);
        }
        node.fault(found, expected + ")");
    }
    kind
}

/// The path, if something is there that may be a tokenizer; whether it is one shows when it is loaded.
fn read_path(node: &Node<'_>) -> Option<PathBuf> {
    const EXPECTED: &str = "a directory with tokenizer.json, or such a file";
    let path = PathBuf::from(node.string(EXPECTED)?);
    if !is_tokenizer(&path) {
        node.fault(path.display(), EXPECTED);
    }
    Some(path)
}

fn is_tokenizer(path: &Path) -> bool {
    path.is_file() || path.join("tokenizer.json").is_file()
}

fn read_budgets(budget: &Node<'_>, budget_max: &Node<'_>, message_timeout: Duration) -> (Human, Human) {
    const EXPECTED: &str = "a duration from 1ms to 1m, such as 100ms";
    let last = message_timeout - message_timeout / MARGIN;
    let base = budget.or(Human(BUDGET.min(last / 2)), EXPECTED);
    if !(Duration::from_millis(1)..=Duration::from_secs(60)).contains(&base.0) {
        budget.fault(base, EXPECTED);
    }
    let too_late =
        || format!("at most {}, a tenth less than envoy.message_timeout, {}", Human(last), Human(message_timeout));
    if base.0 > last {
        budget.fault(base, too_late());
    }
    let longest = budget_max.or(Human((base.0 * BUDGET_MAX_FACTOR).min(last.max(base.0))), EXPECTED);
    if longest.0 < base.0 {
        budget_max.fault(longest, format!("at least the budget, {base}"));
    }
    if longest.0 > last && base.0 <= last {
        budget_max.fault(longest, too_late());
    }
    (base, longest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn parse(settings: &str, more: &str) -> Result<Tokenizer, String> {
        parse_within("1s", settings, more)
    }

    fn parse_within(timeout: &str, settings: &str, more: &str) -> Result<Tokenizer, String> {
        let model =
            format!("name: m, tokenizer: {{{settings}}}, discovery: {{static: [{{address: 1.1.1.1:1}}]}}{more}");
        let config = Config::parse(&format!("models: [{{{model}}}]\nenvoy: {{message_timeout: {timeout}}}"), []);
        config.map(|config| config.models[0].tokenizer.clone()).map_err(|error| error.to_string())
    }

    #[test]
    fn longest_budget_follows_the_budget_and_ends_before_envoy_does() {
        let budgets = |settings| {
            let tokenizer = parse(settings, "").expect("valid");
            (tokenizer.budget.0.as_millis(), tokenizer.budget_max.0.as_millis())
        };
        assert_eq!(budgets(""), (100, 500));
        assert_eq!(budgets("budget: 400ms"), (400, 900));
        assert_eq!(budgets("budget: 400ms, budget_max: 400ms"), (400, 400));
        for (timeout, expected) in [("20ms", (9, 18)), ("200ms", (90, 180)), ("220ms", (99, 198)), ("10m", (100, 500))]
        {
            let tokenizer = parse_within(timeout, "", "").expect("defaults suit any timeout");
            assert_eq!((tokenizer.budget.0.as_millis(), tokenizer.budget_max.0.as_millis()), expected, "{timeout}");
        }
    }

    #[test]
    fn settings_that_cannot_work_are_refused() {
        for (settings, expected) in [
            (
                "budget: 2s",
                "tokenizer.budget: found 2s, expected at most 900ms, a tenth less than envoy.message_timeout, 1s",
            ),
            ("budget_max: 901ms", "tokenizer.budget_max: found 901ms, expected at most 900ms, a tenth less than"),
            ("budget_max: 50ms", "tokenizer.budget_max: found 50ms, expected at least the budget, 100ms"),
            ("kind: tiktoken", "tokenizer.kind: found \"tiktoken\", expected remote, local, auto or text"),
            ("kind: auto", "tokenizer.path: found nothing, expected the directory of the model's tokenizer"),
            (
                "kind: auto, path: /no/tokenizer",
                "tokenizer.path: found /no/tokenizer, expected a directory with tokenizer.json",
            ),
            ("kind: text", "tokenizer.kind: found text, expected remote or auto"),
            ("allow_media: true", "tokenizer.allow_media: found true, expected false, or api: render"),
            ("api: grpc", "tokenizer.api: found \"grpc\", expected tokenize or render"),
            ("cache_bytes: -1", "tokenizer.cache_bytes: found \"-1\""),
        ] {
            let found = parse(settings, "").expect_err(settings);
            assert!(found.starts_with("1 fault(s)") && found.contains(expected), "{expected}\nis not\n{found}");
        }
    }

    #[test]
    fn without_kv_events_any_kind_will_do() {
        let without = ", events: {sync: false}";
        assert_eq!(parse("kind: text", without).expect("valid").kind, TokenizerKind::Text);
        assert!(parse("kind: local", without).expect_err("no path").contains("which kind: local needs"));
        let found = parse("kind: text, api: render", without).expect_err("text does not render");
        assert!(found.contains("tokenizer.api: found render, expected tokenize, or kind: remote"), "{found}");
    }

    #[test]
    fn settings_of_what_the_engines_are_asked_are_not_left_unused() {
        let without = ", events: {sync: false}";
        let path = concat!("path: ", env!("CARGO_MANIFEST_DIR"), "/tests/data/tokens/qwen");
        for (setting, expected) in [
            (
                "endpoint: 'http://t:1'",
                "tokenizer.endpoint: found a server that is not asked, expected nothing, or kind: remote",
            ),
            (
                "allow_chat_template: true",
                "tokenizer.allow_chat_template: found true, expected nothing, or kind: remote",
            ),
            (
                "exclude_tools_when_none: true",
                "tokenizer.exclude_tools_when_none: found true, expected nothing, or kind",
            ),
        ] {
            for kind in ["kind: text", "kind: local"] {
                let found = parse(&format!("{kind}, {path}, {setting}"), without).expect_err("not used");
                assert!(found.starts_with("1 fault(s)") && found.contains(expected), "{expected}\nis not\n{found}");
            }
            for kind in ["kind: remote", "kind: auto"] {
                assert!(parse(&format!("{kind}, {path}, {setting}"), without).is_ok(), "{kind}, {setting}");
            }
        }
        let unset = "endpoint: null, allow_chat_template: false, exclude_tools_when_none: false";
        assert!(parse(&format!("kind: text, {unset}"), without).is_ok());
    }

    #[test]
    fn a_tokenizer_of_ours_is_not_left_unused() {
        let path = concat!("path: ", env!("CARGO_MANIFEST_DIR"), "/tests/data/tokens/qwen");
        assert!(parse(path, "").expect_err("not used").contains("tokenizer.path: found a tokenizer that is not used"));
        assert!(parse(path, ", events: {sync: false}").is_ok());
        assert_eq!(parse(&format!("kind: auto, {path}"), "").expect("valid").kind, TokenizerKind::Auto);
    }
}
