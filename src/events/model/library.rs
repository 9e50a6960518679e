//! The prompts of the model: few, short, and with many common beginnings.

use std::fmt;
use std::sync::{Arc, LazyLock};

use crate::events::apply::ModelSettings;
use crate::routing::hash::own::OwnHasher;
use crate::routing::hash::{BlockHash, BlockHasher, BlockSize, Digest, HashAlgorithm, Scope};
use crate::routing::index::KeyKinds;

/// Tokens per block.
pub(super) const BLOCK_SIZE: u32 = 4;
/// Name of the one model.
pub(super) const MODEL: &str = "tiny";
/// The cheapest algorithm: what is tested does not depend on it.
const ALGORITHM: HashAlgorithm = HashAlgorithm::XxhashCbor;
const SEED: &str = "0";
const FOREIGN_SEED: &str = "1";
const ADAPTER: (&str, &str) = ("lora-a", "path/a");
/// Blocks per prompt.
const N_BLOCKS: usize = 6;
/// Token of block 0, then how many blocks a prompt has in common with the one before it.
const PLAIN: [usize; 7] = [0, 4, 2, 5, 0, 3, 1];
const SALTED: [usize; 2] = [0, 3];
const ADAPTED: [usize; 2] = [0, 2];

/// What kind of extra keys a prompt's blocks have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Plain,
    Salted,
    Adapted,
}

impl Kind {
    pub(super) const ALL: [Self; 3] = [Self::Plain, Self::Salted, Self::Adapted];

    /// What a request for such a prompt needs to be proved.
    pub(super) fn required(self) -> KeyKinds {
        match self {
            Self::Plain => KeyKinds::PLAIN,
            Self::Salted => KeyKinds::PLAIN | KeyKinds::SALT,
            Self::Adapted => KeyKinds::adapter(0).expect("the first adapter has a kind"),
        }
    }

    pub(super) fn lora_name(self) -> Option<&'static str> {
        (self == Self::Adapted).then_some(ADAPTER.0)
    }

    /// The untagged extra key of a block, as events show it.
    pub(super) fn extra_key(self, block_idx: usize) -> Option<&'static str> {
        match self {
            Self::Plain => None,
            Self::Salted => (block_idx == 0).then_some("salt"),
            Self::Adapted => Some(ADAPTER.0),
        }
    }

    fn scope(self) -> Scope {
        Scope {
            adapter: (self == Self::Adapted).then(|| (ADAPTER.0.into(), ADAPTER.1.into())),
            cache_salt: (self == Self::Salted).then(|| "salt".into()),
            mm: Vec::new(),
        }
    }
}

/// A prompt of full blocks, and what they are hashed to.
pub(super) struct Prompt {
    name: (Kind, usize),
    pub(super) kind: Kind,
    pub(super) tokens: Vec<u32>,
    /// By an engine.
    pub(super) digests: Vec<Digest>,
    pub(super) hashes: Vec<BlockHash>,
    /// By us, in the keyspace Own.
    pub(super) own_keys: Vec<BlockHash>,
}

impl fmt::Debug for Prompt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {}", self.name.0, self.name.1)
    }
}

/// The prompts as the configuration has them hashed, and as an engine with another seed hashes them.
static CONFIGURED: LazyLock<Vec<Prompt>> = LazyLock::new(|| prompts_under(SEED));
static FOREIGN: LazyLock<Vec<Prompt>> = LazyLock::new(|| prompts_under(FOREIGN_SEED));

/// Every prompt, computed once. `is_foreign`: under the seed of another engine.
pub(super) fn prompts(is_foreign: bool) -> &'static [Prompt] {
    if is_foreign { &FOREIGN } else { &CONFIGURED }
}

/// The prompts of one kind, which lie side by side.
pub(super) fn prompts_of_kind(kind: Kind, is_foreign: bool) -> &'static [Prompt] {
    let prompts = prompts(is_foreign);
    let is_wanted = |prompt: &Prompt| prompt.kind == kind;
    let first = prompts.iter().position(is_wanted).expect("there are prompts of every kind");
    let n_prompts = prompts[first..].iter().take_while(|prompt| is_wanted(prompt)).count();
    &prompts[first..first + n_prompts]
}

/// The settings of every source. `reports`: the router asks for full reports itself.
pub(super) fn settings(reports: bool) -> Arc<ModelSettings> {
    Arc::new(ModelSettings {
        model: MODEL.into(),
        algorithm: ALGORITHM,
        pythonhashseed: Some(SEED.into()),
        adapters: vec![(ADAPTER.0.into(), ADAPTER.1.into())],
        reports,
    })
}

pub(super) fn block_size() -> BlockSize {
    BlockSize::new(BLOCK_SIZE).expect("the block size is not 0")
}

fn prompts_under(seed: &str) -> Vec<Prompt> {
    let hasher = BlockHasher::new(ALGORITHM, Some(seed)).expect("the seed is given");
    let kinds = [(Kind::Plain, &PLAIN[..]), (Kind::Salted, &SALTED), (Kind::Adapted, &ADAPTED)];
    kinds.into_iter().flat_map(|(kind, n_common)| prompts_of(kind, n_common, &hasher)).collect()
}

/// One prompt per entry of `n_common`, which says how many blocks it shares with the one before.
fn prompts_of(kind: Kind, n_common: &[usize], hasher: &BlockHasher) -> Vec<Prompt> {
    let mut prompts: Vec<Prompt> = Vec::new();
    for (prompt_idx, n_common) in n_common.iter().enumerate() {
        let n_common_tokens = n_common * BLOCK_SIZE as usize;
        let own = (0..N_BLOCKS as u32 * BLOCK_SIZE).map(|token| 1000 * (1 + prompt_idx as u32) + token);
        let mut tokens = prompts.last().map_or_else(Vec::new, |before| before.tokens[..n_common_tokens].to_vec());
        tokens.extend(own.skip(tokens.len()));
        let scope = kind.scope();
        let digests =
            hasher.chain(hasher.root(), &tokens, block_size(), |block_idx| scope.keys(block_idx, block_size()));
        let hashes = digests.iter().map(Digest::low64).collect();
        let own_keys = OwnHasher::new(MODEL).scoped_chain(&tokens, block_size(), &scope);
        prompts.push(Prompt { name: (kind, prompt_idx), kind, tokens, digests, hashes, own_keys });
    }
    prompts
}
