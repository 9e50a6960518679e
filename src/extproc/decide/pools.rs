//! The models, and what is known of each.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::sync::watch;

use super::super::report::Reports;
use super::super::rollout::Switch;
use super::Leave;
use crate::request::ReadOptions;
use crate::routing::endpoint::{Endpoint, EndpointId, EndpointSet, Listing};
use crate::routing::hash::own::OwnHasher;
use crate::routing::hash::{BlockHash, BlockHasher, Scope};
use crate::routing::index::{KeyKinds, Keyspace, KeyspaceKind};
use crate::routing::index::{PredictionSums, Promises};
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
    /// How far the predictions of what endpoints hold came true.
    pub predictions: Arc<PredictionSums>,
    /// What the endpoints were given by our own picks: the index where no engine has announced anything.
    pub learned: Promises,
    /// Whether Envoy follows the picks.
    pub rollout: Switch,
}

impl Pool {
    /// The endpoint with this address, if the pool has it.
    pub(in super::super) fn endpoint_at(&self, address: SocketAddr) -> Option<Arc<Endpoint>> {
        let endpoints = self.endpoints.borrow();
        endpoints.endpoints.iter().find(|endpoint| endpoint.address == address).cloned()
    }

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
    /// The name by which it was found.
    pub(super) requested: Arc<str>,
    pub(super) adapter: Option<Adapter>,
}

/// A LoRA adapter that a request names.
#[derive(Clone, Debug)]
pub(super) enum Adapter {
    /// The one at this position of [`Pool::adapters`].
    Configured(usize),
    /// One that only endpoints list: where its blocks are is learned from picks.
    Listed(Arc<str>),
}

impl Target {
    fn base(pool: &Arc<Pool>, requested: Arc<str>) -> Self {
        Self { pool: pool.clone(), requested, adapter: None }
    }

    /// Whether the engines' events can tell where the prompt's blocks are.
    pub(super) fn follows_events(&self) -> bool {
        self.pool.sync && !matches!(self.adapter, Some(Adapter::Listed(_)))
    }

    /// The endpoints among `allowed` that can serve the request: those that list its adapter; where none does, those
    /// that have not said yet; where all have, all, since the engine is the one to refuse it.
    pub(super) fn servers<'a>(
        &'a self,
        endpoints: &EndpointSet,
        allowed: impl Fn(&Endpoint) -> bool + 'a,
    ) -> impl Fn(&Endpoint) -> bool + 'a {
        let best = self.adapter_name().map(|name| best_for(name, endpoints, &allowed));
        move |endpoint| best.as_ref().map_or_else(|| allowed(endpoint), |best| best.contains(&endpoint.id))
    }

    fn adapter_name(&self) -> Option<&str> {
        Some(match self.adapter.as_ref()? {
            Adapter::Configured(adapter_idx) => &self.pool.adapters[*adapter_idx].0,
            Adapter::Listed(name) => name,
        })
    }

    /// The kinds of extra keys in the hashes of a prompt's first `n_tokens`, which must be proved before a match may be
    /// believed.
    pub(super) fn required_kinds(&self, scope: &Scope, n_tokens: usize) -> KeyKinds {
        let adapter = match self.adapter {
            Some(Adapter::Configured(adapter_idx)) => {
                KeyKinds::adapter(adapter_idx).expect("the configuration bounds the adapters of a model")
            }
            Some(Adapter::Listed(_)) | None => KeyKinds::PLAIN,
        };
        let salt = if scope.cache_salt.is_some() { KeyKinds::SALT } else { KeyKinds::NONE };
        let mm = if scope.has_mm_in_first(n_tokens) { KeyKinds::MM } else { KeyKinds::NONE };
        adapter | salt | mm
    }

    /// Name and path of the adapter, as they are in block hashes.
    pub(super) fn adapter(&self) -> Option<(Arc<str>, Arc<str>)> {
        Some(match self.adapter.as_ref()? {
            Adapter::Configured(adapter_idx) => self.pool.adapters[*adapter_idx].clone(),
            Adapter::Listed(name) => (name.clone(), Arc::default()),
        })
    }
}

/// Those among the `allowed` endpoints that are the best place for `adapter`. Each is looked at once: lists change at any
/// time.
fn best_for(adapter: &str, endpoints: &EndpointSet, allowed: impl Fn(&Endpoint) -> bool) -> Vec<EndpointId> {
    let allowed = endpoints.endpoints.iter().filter(|endpoint| allowed(endpoint));
    let listings: Vec<_> = allowed.map(|endpoint| (endpoint.adapters.listing(adapter), endpoint.id)).collect();
    let best = listings.iter().map(|(listing, _)| *listing).max();
    listings.into_iter().filter(|(listing, _)| Some(*listing) == best).map(|(_, id)| id).collect()
}

/// Finds pools by the names that requests use.
#[derive(Debug, Default)]
pub struct Pools {
    by_name: HashMap<String, Target>,
    default: Option<Target>,
    all: Vec<Arc<Pool>>,
}

impl Pools {
    /// Adds a pool under its model's name, its aliases and its configured adapters' names.
    pub fn add(&mut self, pool: &Arc<Pool>, aliases: &[String], is_default: bool) {
        self.all.push(pool.clone());
        for name in aliases.iter().map(String::as_str).chain([&*pool.model]) {
            self.by_name.insert(name.to_owned(), Target::base(pool, name.into()));
        }
        for (adapter_idx, (name, _)) in pool.adapters.iter().enumerate() {
            let target =
                Target { pool: pool.clone(), requested: name.clone(), adapter: Some(Adapter::Configured(adapter_idx)) };
            self.by_name.insert(name.to_string(), target);
        }
        if is_default {
            self.default = Some(Target::base(pool, pool.model.clone()));
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Pool> {
        self.all.iter().map(|pool| &**pool)
    }

    pub(super) fn find(&self, model: Option<&str>) -> Result<Target, Leave> {
        match model {
            Some(name) => self.by_name.get(name).cloned().or_else(|| self.listed(name)).ok_or(Leave::UnknownModel),
            None => self.default.clone().ok_or(Leave::NoModel),
        }
    }

    /// The only model that there is.
    pub(super) fn only(&self) -> Option<Target> {
        if let [pool] = &self.all[..] { Some(Target::base(pool, pool.model.clone())) } else { None }
    }

    /// An adapter that nobody configured, in the first pool of which an endpoint lists it.
    fn listed(&self, name: &str) -> Option<Target> {
        let lists = |endpoint: &Arc<Endpoint>| endpoint.adapters.listing(name) == Listing::Listed;
        let pool = self.all.iter().find(|pool| pool.endpoints.borrow().endpoints.iter().any(lists))?;
        let name: Arc<str> = name.into();
        Some(Target { pool: pool.clone(), requested: name.clone(), adapter: Some(Adapter::Listed(name)) })
    }
}
