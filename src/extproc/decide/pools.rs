//! The models, and what is known of each.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::sync::watch;

use super::super::report::Reports;
use super::Leave;
use crate::request::ReadOptions;
use crate::routing::endpoint::EndpointSet;
use crate::routing::hash::own::OwnHasher;
use crate::routing::hash::{BlockHash, BlockHasher, Scope};
use crate::routing::index::Promises;
use crate::routing::index::{KeyKinds, Keyspace, KeyspaceKind};
use crate::tokenizer::Tokenizer;

/// One model and the endpoints that serve it.
#[derive(Debug)]
pub struct Pool {
    /// The model's name, as configured.
    pub model: Arc<str>,
    /// Adapters of the model with the paths they were loaded from.
    pub adapters: Vec<(Arc<str>, Arc<str>)>,
    /// Hashes as the engines do; none when their root cannot be known: then only our own hashes are looked up.
    pub hasher: Option<BlockHasher>,
    /// How a request is read for the sake of its tokens.
    pub reading: ReadOptions,
    /// Knows the tokens of prompts.
    pub tokenizer: Arc<Tokenizer>,
    /// The newest endpoint set: written by discovery, read by every request.
    pub endpoints: watch::Receiver<Arc<EndpointSet>>,
    /// Chooses the requests that have their engine announce what it reuses; none where the model is not set to.
    pub reports: Option<Reports>,
    /// Whether the engines' KV events feed the index.
    pub sync: bool,
    /// What the endpoints were given by our own picks: the index where no engine has announced anything.
    pub learned: Promises,
}

impl Pool {
    /// Hashes of a prompt's full blocks in a keyspace of the model; none where they cannot be computed.
    pub(super) fn chain(&self, keyspace: &Keyspace, tokens: &[u32], scope: &Scope) -> Vec<BlockHash> {
        match (&keyspace.kind, &self.hasher) {
            (KeyspaceKind::Own, _) => OwnHasher::new(&self.model).scoped_chain(tokens, keyspace.block_size, scope),
            (KeyspaceKind::Engine { algorithm, root }, Some(hasher))
                if hasher.algorithm() == *algorithm && hasher.root() == *root =>
            {
                hasher.scoped_chain(tokens, keyspace.block_size, scope)
            }
            (KeyspaceKind::Engine { .. }, _) => Vec::new(),
        }
    }
}

/// What the client's model name stands for.
#[derive(Clone, Debug)]
pub(super) struct Target {
    pub(super) pool: Arc<Pool>,
    /// Position in [`Pool::adapters`].
    pub(super) adapter_idx: Option<usize>,
}

impl Target {
    /// The kinds of extra keys in the hashes of a prompt's first `n_tokens`, which must be proved before a match may be
    /// believed.
    pub(super) fn required_kinds(&self, scope: &Scope, n_tokens: usize) -> KeyKinds {
        let adapter = match self.adapter_idx {
            Some(adapter_idx) => {
                KeyKinds::adapter(adapter_idx).expect("the configuration bounds the adapters of a model")
            }
            None => KeyKinds::PLAIN,
        };
        let salt = if scope.cache_salt.is_some() { KeyKinds::SALT } else { KeyKinds::NONE };
        let mm = if scope.has_mm_in_first(n_tokens) { KeyKinds::MM } else { KeyKinds::NONE };
        adapter | salt | mm
    }

    pub(super) fn adapter(&self) -> Option<(Arc<str>, Arc<str>)> {
        self.adapter_idx.map(|adapter_idx| self.pool.adapters[adapter_idx].clone())
    }
}

/// Finds pools by the names that requests use.
#[derive(Debug, Default)]
pub struct Pools {
    by_name: HashMap<String, Target>,
    default: Option<Target>,
    all: Vec<Arc<Pool>>,
}

impl Pools {
    /// Adds a pool under its model's name, its aliases and its adapters' names.
    pub fn add(&mut self, pool: &Arc<Pool>, aliases: &[String], is_default: bool) {
        self.all.push(pool.clone());
        let target = |adapter_idx| Target { pool: pool.clone(), adapter_idx };
        for name in aliases.iter().map(String::as_str).chain([&*pool.model]) {
            self.by_name.insert(name.to_owned(), target(None));
        }
        for (adapter_idx, (name, _)) in pool.adapters.iter().enumerate() {
            self.by_name.insert(name.to_string(), target(Some(adapter_idx)));
        }
        if is_default {
            self.default = Some(target(None));
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Pool> {
        self.all.iter().map(|pool| &**pool)
    }

    pub(super) fn find(&self, model: Option<&str>) -> Result<&Target, Leave> {
        match model {
            Some(name) => self.by_name.get(name).ok_or(Leave::UnknownModel),
            None => self.default.as_ref().ok_or(Leave::NoModel),
        }
    }
}
