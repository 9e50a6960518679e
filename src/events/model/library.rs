//! The prompts of the model: few, short, and with many common beginnings.

use std::sync::{Arc, LazyLock};

use crate::events::apply::ModelSettings;
use crate::routing::hash::{BlockHash, BlockHasher, BlockSize, Digest, HashAlgorithm, Scope};
use crate::routing::index::KeyKinds;

/// Tokens per block.
pub(super) const BLOCK_SIZE: u32 = 4;
/// Name of the one model.
pub(super) const MODEL: &str = "tiny";
/// The cheapest algorithm: what is tested does not depend on it.
const ALGORITHM: HashAlgorithm = HashAlgorithm::XxhashCbor;
const SEED: &str = "0";
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
        }
    }
}

/// A prompt of full blocks, and what any engine hashes it to.
#[derive(Debug)]
pub(super) struct Prompt {
    pub(super) kind: Kind,
    pub(super) tokens: Vec<u32>,
    pub(super) digests: Vec<Digest>,
    pub(super) hashes: Vec<BlockHash>,
}

/// Every prompt, computed once.
pub(super) static PROMPTS: LazyLock<Vec<Prompt>> = LazyLock::new(|| {
    let hasher = BlockHasher::new(ALGORITHM, Some(SEED)).expect("the seed is given");
    let mut prompts = prompts_of(Kind::Plain, &PLAIN, &hasher);
    prompts.extend(prompts_of(Kind::Salted, &SALTED, &hasher));
    prompts.extend(prompts_of(Kind::Adapted, &ADAPTED, &hasher));
    prompts
});

/// The prompts of one kind, which lie side by side.
pub(super) fn prompts_of_kind(kind: Kind) -> &'static [Prompt] {
    let is_wanted = |prompt: &Prompt| prompt.kind == kind;
    let first = PROMPTS.iter().position(is_wanted).expect("there are prompts of every kind");
    let n_prompts = PROMPTS[first..].iter().take_while(|prompt| is_wanted(prompt)).count();
    &PROMPTS[first..first + n_prompts]
}

/// The settings of every source.
pub(super) fn settings() -> Arc<ModelSettings> {
    static SETTINGS: LazyLock<Arc<ModelSettings>> = LazyLock::new(|| {
        Arc::new(ModelSettings {
            model: MODEL.into(),
            algorithm: ALGORITHM,
            pythonhashseed: Some(SEED.into()),
            adapters: vec![(ADAPTER.0.into(), ADAPTER.1.into())],
        })
    });
    Arc::clone(&SETTINGS)
}

pub(super) fn block_size() -> BlockSize {
    BlockSize::new(BLOCK_SIZE).expect("the block size is not 0")
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
        let digests = hasher.chain(hasher.root(), &tokens, block_size(), |block_idx| scope.keys(block_idx));
        let hashes = digests.iter().map(Digest::low64).collect();
        prompts.push(Prompt { kind, tokens, digests, hashes });
    }
    prompts
}
