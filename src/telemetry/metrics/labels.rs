//! The labels of all instruments and the values that they may have.
//!
//! Many of these values are the names of another module's enum, which this module must not know (see the table of
//! imports in `docs/architecture.md`); the lists are held against those enums by `tests/metrics.rs`.

use crate::routing::pick::{Outcome, Policy};

/// A label and what may stand in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label {
    /// Name of the label.
    pub name: &'static str,
    /// What may stand in it.
    pub values: Values,
}

/// What may stand in a label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Values {
    /// One of these.
    Closed(&'static [&'static str]),
    /// As many as the configuration or the cluster has; the text says of what.
    Bounded(&'static str),
}

/// The pool.
pub const MODEL: Label = Label { name: "model", values: Values::Bounded("name of a configured model") };
/// The engine's address.
pub const ENDPOINT: Label = Label { name: "endpoint", values: Values::Bounded("`ip:port` of a listed endpoint") };
/// The data-parallel rank.
pub const RANK: Label = Label { name: "rank", values: Values::Bounded("data-parallel rank of the endpoint") };
/// The running program's version.
pub const VERSION: Label = Label { name: "version", values: Values::Bounded("version of the program") };
/// What a decision rested on.
pub const OUTCOME: Label = closed("outcome", &Outcome::NAMES);
/// Why a span was dropped.
pub const SPAN_DROPPED_REASON: Label = closed("reason", &["queue_full", "export_failed"]);
/// What ordered the candidates.
pub const POLICY: Label = closed("policy", &Policy::NAMES);
/// A step of the request path.
pub const STAGE: Label = closed("stage", &["parse", "tokenize", "hash", "lookup", "pick"]);
/// Why a pick was made by load alone: reasons of the request, of the body and of the tokenizer.
pub const FALLBACK_REASON: Label = closed(
    "reason",
    &[
        "other_path",
        "media",
        "chat_template",
        "cache_not_read",
        "needs_render",
        "stateful",
        "inexact",
        "invalid_prompt",
        "unreadable_body",
        "oversized_body",
        "tokenizer_no_endpoint",
        "tokenizer_budget",
        "tokenizer_unreachable",
        "tokenizer_status",
        "tokenizer_too_large",
        "tokenizer_busy",
        "tokenizer_open",
        "tokenizer_differs",
        "tokenizer_nonsense",
        "tokenizer_too_long",
        "tokenizer_panicked",
        "local_api",
        "local_body",
        "local_media",
        "local_no_template",
        "local_template",
        "local_too_long",
        "local_tokenizer",
    ],
);
/// Why nobody was picked. Where Envoy has a policy to fall back to, the request is left to it (without an endpoint: in shadow
/// only), else it is refused.
const NO_PICK: &[&str] =
    &["no_model", "unknown_model", "not_synced", "model_beyond_limit", "switched_off", "no_endpoint", "empty_subset"];
/// Why a request was left to Envoy's own policy.
pub const LEAVE_REASON: Label = closed("reason", NO_PICK);
/// Why a request was answered with an error.
pub const REFUSAL_REASON: Label = closed("reason", NO_PICK);
/// What is wrong with the modes of a stream.
pub const STREAM_MODE: Label = closed(
    "mode",
    &["none", "streamed", "buffered_partial", "grpc", "full_duplex_streamed_without_response", "observability"],
);
/// Why another endpoint served.
pub const NOT_SERVED_CAUSE: Label = closed("cause", &["retried", "other_endpoint"]);
/// What was done with a snapshot.
pub const SNAPSHOT_STEP: Label = closed("step", &["write", "load", "fetch", "serve"]);
/// What a listing changed.
pub const DISCOVERY_CHANGE: Label = closed("change", &["added", "left", "moved"]);
/// Why the endpoints could not be listed.
pub const DISCOVERY_REASON: Label = closed(
    "reason",
    &[
        "unresolved",
        "empty",
        "unreadable",
        "too_large",
        "nonsense",
        "no_answer",
        "forbidden",
        "refused",
        "unreachable",
        "expired",
        "silent",
        "no_pool",
    ],
);
/// What is known of an event source.
pub const SOURCE_STATE: Label =
    closed("state", &["connecting", "catching_up", "live", "incomplete", "stale", "quarantined", "failed"]);
/// Kind of a KV event.
pub const EVENT_KIND: Label = closed("kind", &["stored", "removed", "cleared"]);
/// What is wrong with a message of a source that cannot be decoded.
pub const DECODE_KIND: Label =
    closed("kind", &["frames", "truncated", "length", "depth", "unexpected", "missing", "items", "trailing"]);
/// How the decisions of a model are followed.
pub const ROLLOUT_MODE: Label = closed("mode", &["active", "shadow", "off"]);
/// Whether Envoy's own policy picked the same endpoint.
pub const SHADOW_AGREED: Label = closed("agreed", &["true", "false", "unknown"]);
/// Whose tokens they were.
pub const SHADOW_WHO: Label = closed("who", &["pick", "served"]);
/// What came of a look at the configuration file.
pub const RELOAD_RESULT: Label =
    closed("result", &["applied", "unchanged_settings", "restart_needed", "refused", "unreadable"]);
/// Why a decision is missing in the record.
pub const RECORD_REASON: Label = closed("reason", &["queue_full", "write_failed", "too_long"]);
/// The settings in force: one value at a time.
pub const CONFIG_HASH: Label = Label { name: "hash", values: Values::Bounded("digest of the settings in force") };
/// What came of a push of these metrics.
pub const PUSH_RESULT: Label = closed("result", &["sent", "failed"]);
/// AIBrix's classes of the matched share of a prompt.
pub const AIBRIX_PERCENT: Label = closed("match_percent_bucket", &["0", "1-25", "26-50", "51-75", "76-100"]);
/// Whether the engines' events were known, as AIBrix calls it.
pub const AIBRIX_SYNC: Label = closed("using_kv_sync", &["true", "false"]);
/// How AIBrix calls what a pick rested on.
pub const AIBRIX_SELECTION: Label = closed("selection", &["prefix_match", "least_request_fallback"]);
/// How AIBrix calls why a prompt was not looked up.
pub const AIBRIX_REASON: Label = closed("reason", &["tokenize_failed"]);
/// AIBrix's kinds of indexes.
pub const AIBRIX_INDEXER: Label = closed("indexer_type", &["sync", "local"]);
/// Whether something was remembered.
pub const CACHE_RESULT: Label = closed("result", &["hit", "miss"]);
/// What a comparison of two tokenizers showed.
pub const COMPARISON_RESULT: Label = closed("result", &["equal", "different"]);
/// What became of calls to engines for tokens.
pub const CALL_RESULT: Label = closed(
    "result",
    &["asked", "hedged", "won_by_hedge", "late", "cancelled", "busy", "checked", "check_failed", "stood_in_for"],
);
/// What the conversation cache did.
pub const CONVERSATION_RESULT: Label = closed("result", &["reused", "whole", "audited", "disabled"]);
/// Why a question to an engine failed.
pub const CALL_REASON: Label =
    closed("reason", &["overdue", "outrun", "unreachable", "status", "refused", "too_large", "nonsense", "differs"]);
/// State of a breaker.
pub const BREAKER_STATE: Label = closed("state", &["closed", "open", "half_open", "differs"]);

const fn closed(name: &'static str, values: &'static [&'static str]) -> Label {
    Label { name, values: Values::Closed(values) }
}
