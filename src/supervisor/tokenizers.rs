//! Puts together where each model's token ids come from.

use std::path::Path;
use std::sync::Arc;

use tracing::warn;

use super::Error;
use crate::config::{self, TokenizerApi, TokenizerKind};
use crate::engine::EngineClient;
use crate::request::{Ask, ReadOptions};
use crate::telemetry::metrics::{Metrics, TokenizerRow};
use crate::tokenizer::local::{LocalStatus, LocalTokenizer};
use crate::tokenizer::remote::{BreakerState, RemoteConfig, RemoteStatus, RemoteTokenizer};
use crate::tokenizer::{Budget, Config, Source, StandIn, Tokenizer, TokenizerStatus};

/// Builds the tokenizer of a model; loads the files of a local one.
pub(super) fn build(model: &config::Model, client: EngineClient) -> Result<Tokenizer, Error> {
    let settings = &model.tokenizer;
    let budget = Budget { base: settings.budget.0, max: settings.budget_max.0 };
    let local = || settings.path.as_deref().map(|path| load(&model.name, path)).transpose();
    let remote = || {
        let client = match &settings.endpoint {
            Some(base) => EngineClient::new(&model.engine.of_base(base)).map_err(Error::Engine)?,
            None => client,
        };
        let config = RemoteConfig { budget, endpoint: settings.endpoint.clone() };
        Ok::<_, Error>(Arc::new(RemoteTokenizer::new(client, config)))
    };
    const CHECKED: &str = "the configuration has a path for these kinds";
    let source = match settings.kind {
        TokenizerKind::Remote if model.events.sync => Source::Remote { remote: remote()?, stand_in: None },
        TokenizerKind::Remote => {
            let stand_in = local()?.map_or(StandIn::Text, StandIn::Local);
            Source::Remote { remote: remote()?, stand_in: Some(stand_in) }
        }
        TokenizerKind::Local => Source::Local(local()?.expect(CHECKED)),
        TokenizerKind::Auto => {
            Source::Auto { local: local()?.expect(CHECKED), remote: remote()?, stands_in: !model.events.sync }
        }
        TokenizerKind::Text => Source::Text,
    };
    Ok(Tokenizer::new(model.name.clone(), source, &Config { budget, cache_bytes: settings.cache_bytes }))
}

/// Loads a local tokenizer, and says what it may not be able to do.
fn load(model: &Arc<str>, path: &Path) -> Result<Arc<LocalTokenizer>, Error> {
    let local = LocalTokenizer::load(path).map_err(|source| Error::Tokenizer { model: model.clone(), source })?;
    if let Some(fault) = local.template_fault() {
        warn!(%model, fault, "chats of the model are not tokenized here");
    }
    if let Some(class) = local.unproved_class() {
        warn!(%model, class, "tokenizers of this class may split a text otherwise in the engines: only kind: auto finds out");
    }
    Ok(Arc::new(local))
}

/// How requests to a model are read.
pub(super) fn reading(settings: &config::Tokenizer) -> ReadOptions {
    let ask = match settings.api {
        TokenizerApi::Tokenize => Ask::Tokenize,
        TokenizerApi::Render => Ask::Render,
    };
    ReadOptions {
        ask,
        allow_chat_template: settings.allow_chat_template,
        allow_media: settings.allow_media,
        exclude_tools_when_none: settings.exclude_tools_when_none,
    }
}

/// Lets a scrape read how the tokenizers stand.
pub(super) fn observe(metrics: &Metrics, tokenizers: Vec<(Arc<str>, Arc<Tokenizer>)>) {
    let rows = move || tokenizers.iter().map(|(model, tokenizer)| row(model, &tokenizer.status())).collect();
    metrics.set_tokenizer_collector(Box::new(rows));
}

fn row(model: &Arc<str>, status: &TokenizerStatus) -> TokenizerRow {
    TokenizerRow {
        model: model.clone(),
        n_cache_hits: status.n_cache_hits,
        n_cache_misses: status.n_cache_misses,
        cache_bytes: status.cache_bytes,
        is_trusted: status.is_trusted,
        n_equal: status.n_equal,
        n_different: status.n_different,
        calls: status.remote.as_ref().map(|remote| calls(remote, status.n_stood_in)).unwrap_or_default(),
        failures: status.remote.as_ref().map(failures).unwrap_or_default(),
        breakers: status.remote.as_ref().map(breakers).unwrap_or_default(),
        conversations: status.local.as_ref().map(conversations).unwrap_or_default(),
    }
}

fn calls(remote: &RemoteStatus, n_stood_in: u64) -> Vec<(&'static str, u64)> {
    vec![
        ("asked", remote.n_calls),
        ("hedged", remote.n_hedges),
        ("won_by_hedge", remote.n_hedge_wins),
        ("late", remote.n_late),
        ("cancelled", remote.n_cancelled),
        ("busy", remote.n_busy),
        ("checked", remote.n_checks),
        ("check_failed", remote.n_failed_checks),
        ("stood_in_for", n_stood_in),
    ]
}

fn failures(remote: &RemoteStatus) -> Vec<(&'static str, u64)> {
    remote.failures.iter().map(|(failure, n)| (failure.as_str(), *n)).collect()
}

fn breakers(remote: &RemoteStatus) -> Vec<(&'static str, u64)> {
    let n_in = |state| remote.endpoints.iter().filter(|endpoint| endpoint.state == state).count() as u64;
    BreakerState::ALL.map(|state| (state.as_str(), n_in(state))).to_vec()
}

fn conversations(local: &LocalStatus) -> Vec<(&'static str, u64)> {
    let conversations = local.conversations;
    vec![
        ("reused", conversations.hits),
        ("whole", conversations.misses),
        ("audited", conversations.audits),
        ("disabled", u64::from(conversations.is_disabled)),
    ]
}
