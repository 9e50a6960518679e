//! `models[]`: the models, and what is known of their engines.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;

use super::discovery::{Discovery, read_discovery};
use super::engine::{ModelEvents, read_access, read_model_events};
use super::reader::Node;
use super::rollout::read_model_rollout;
use super::tokenizer::{Tokenizer, read_tokenizer};
use super::{Envoy, Selection};
use crate::engine::Access;
use crate::extproc::rollout::Rollout as PoolRollout;
use crate::routing::hash::{BlockHasher, HashAlgorithm};

/// Adapters per model: each has a bit in the index's set of proved kinds of keys.
const MOST_ADAPTERS: usize = 60;

/// `models[]`: one model and the endpoints that serve it.
#[derive(Clone, Debug, Serialize)]
pub struct Model {
    /// As in the request's `model` field.
    pub name: Arc<str>,
    /// Other names for the same model (`--served-model-name` takes several).
    pub aliases: Vec<String>,
    /// Whether requests that name no model come here; at most one model has it.
    pub default: bool,
    /// LoRA adapters, with the paths they were loaded from where they are known: the path is part of vLLM's block hash.
    pub adapters: Vec<Adapter>,
    /// The engine's hash settings.
    pub block_hash: BlockHash,
    /// How the engines are reached over HTTP.
    pub engine: Access,
    /// What the engines are asked about their KV events.
    pub events: ModelEvents,
    /// Where token ids come from.
    pub tokenizer: Tokenizer,
    /// How far Envoy follows the picks; `rollout.mode` may be stricter.
    pub rollout: PoolRollout,
    /// The endpoints.
    pub discovery: Discovery,
}

/// `models[].adapters[]`
#[derive(Clone, Debug, Serialize)]
pub struct Adapter {
    /// As in the request's `model` field.
    pub name: Arc<str>,
    /// `lora_path` as it was given to vLLM; null where it is not known: then the adapter's blocks are credited by their
    /// tokens.
    pub path: Option<Arc<str>>,
}

/// `models[].block_hash`: what the engines were started with.
#[derive(Clone, Debug, Serialize)]
pub struct BlockHash {
    /// `--prefix-caching-hash-algo`, default `sha256` (vLLM's default).
    pub algorithm: HashAlgorithm,
    /// `PYTHONHASHSEED` of the engine process; null = unset.
    pub pythonhashseed: Option<String>,
}

impl BlockHash {
    /// The hasher; none when the engine draws a random root (xxhash without a seed).
    pub fn hasher(&self) -> Option<BlockHasher> {
        BlockHasher::new(self.algorithm, self.pythonhashseed.as_deref()).ok()
    }
}

pub(super) fn read_model(node: &Node<'_>, envoy: &Envoy, selection: &Selection) -> Option<Model> {
    let [name, aliases, default, adapters, block_hash, engine, events, tokenizer, rollout, discovery] = node.fields([
        "name",
        "aliases",
        "default",
        "adapters",
        "block_hash",
        "engine",
        "events",
        "tokenizer",
        "rollout",
        "discovery",
    ]);
    let name = name.name("the model's name");
    let aliases = each(&aliases.items(), |alias| alias.name("a model name"));
    let default = default.or(false, "true or false");
    let n_adapters = adapters.items().len();
    if n_adapters > MOST_ADAPTERS {
        adapters.fault(format!("{n_adapters} adapters"), format!("at most {MOST_ADAPTERS}"));
    }
    let adapters = each(&adapters.items(), read_adapter);
    let block_hash = read_block_hash(&block_hash);
    let (engine, events) = (read_access(&engine), read_model_events(&events));
    let tokenizer = read_tokenizer(&tokenizer, envoy.message_timeout.0, &events);
    let discovery = read_discovery(&discovery, name.as_deref());
    Some(Model {
        name: name?.into(),
        aliases: aliases?,
        default,
        adapters: adapters?,
        block_hash,
        engine,
        events,
        tokenizer,
        rollout: read_model_rollout(&rollout, selection.mode),
        discovery: discovery?,
    })
}

/// Reads every item, so that the faults of all of them are found, before it says whether one was wrong.
pub(super) fn each<T>(nodes: &[Node<'_>], read: impl Fn(&Node<'_>) -> Option<T>) -> Option<Vec<T>> {
    let items: Vec<Option<T>> = nodes.iter().map(read).collect();
    items.into_iter().collect()
}

fn read_adapter(node: &Node<'_>) -> Option<Adapter> {
    let [name, path] = node.fields(["name", "path"]);
    const PATH: &str = "the adapter's lora_path, or null where it is not known";
    let (name, lora_path) = (name.name("the adapter's name"), path.string(PATH));
    if lora_path.as_deref() == Some("") {
        path.fault("nothing", PATH);
    }
    Some(Adapter { name: name?.into(), path: lora_path.map(Into::into) })
}

fn read_block_hash(node: &Node<'_>) -> BlockHash {
    let [algorithm, pythonhashseed] = node.fields(["algorithm", "pythonhashseed"]);
    BlockHash {
        algorithm: algorithm.or(HashAlgorithm::Sha256, "sha256, sha256_cbor, xxhash or xxhash_cbor"),
        pythonhashseed: pythonhashseed.string("the engine's PYTHONHASHSEED, or null where it is not set"),
    }
}

/// A name in a request must lead to one model.
pub(super) fn check_names(nodes: &[Node<'_>], models: &[Option<Model>]) {
    let mut owner: BTreeMap<&str, &str> = BTreeMap::new();
    let mut default: Option<&str> = None;
    for (node, model) in nodes.iter().zip(models).filter_map(|(node, model)| Some((node, model.as_ref()?))) {
        let names = std::iter::once(&*model.name)
            .chain(model.aliases.iter().map(String::as_str))
            .chain(model.adapters.iter().map(|adapter| &*adapter.name));
        for name in names {
            if let Some(other) = owner.insert(name, &model.name) {
                node.fault(format!("the name {name:?}, which model {other:?} has too"), "names that lead to one model");
            }
        }
        if let Some(other) = default.filter(|_| model.default) {
            node.fault(format!("default: true, which model {other:?} has too"), "one default model");
        }
        default = default.or(model.default.then_some(&*model.name));
    }
}
