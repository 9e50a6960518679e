//! Proves that a source's block hashes are those that the configuration makes us compute.
//!
//! Evidence is a live `BlockStored` that begins a prompt (no parent): its token ids and extra keys are hashed again
//! from the root. What a match proves is said per [kind of extra key](KeyKinds):
//!
//! - `PLAIN`: blocks hashed without extra keys behind the root. A chain without extra keys shows it, and so does the
//!   second block of a chain that is only salted, since a salt is in block 0 alone.
//! - `SALT`: the form of the salt. A chain whose block 0 has a salt, with or without an adapter.
//! - an adapter's bit: the form, the name and the path of this adapter. A chain in which each block has it, with or
//!   without a salt: vLLM writes each extra key by itself, so the form of one does not depend on its neighbour.
//! - `MM`: the form of a multimodal item. A chain in which some block has one, with or without the others.
//!
//! A request needs `PLAIN`, or its adapter's bit instead, `SALT` if it is salted, and `MM` if it has multimodal items.
//! Blocks from the first one with a prompt embedding on, and chains of adapters that are not configured, are no
//! evidence. Nor are blocks with one item twice where the hash depends on whether the engine has its name once or twice
//! (`routing::hash`).
//!
//! A mismatch disproves what the chain would have proved, for the rest of the generation; if the blocks before the
//! first multimodal item match, that is `MM` alone. Exception: publishers before vLLM 0.17 do not show extra keys, so a
//! mismatch may only mean a salt that we cannot see.

use std::fmt;

use crate::routing::hash::{BlockHasher, HashAlgorithm};
use crate::routing::index::KeyKinds;

use super::chain::{Chain, Form};

/// Once the question is settled, one chain in so many is still checked.
const SAMPLE_EVERY: u64 = 1000;
/// Mismatches without extra keys to explain them after which only samples are checked, and the operator is told.
const MANY_UNEXPLAINED: u64 = 16;

/// What is known of a generation's hashes.
#[derive(Debug, Default)]
pub(super) struct Proof {
    pub(super) proved: KeyKinds,
    pub(super) disproved: KeyKinds,
    /// Chains seen that could have been checked but need not.
    pub(super) n_passed: u64,
    pub(super) n_unexplained: u64,
}

/// Something new that a chain showed.
#[derive(Debug, PartialEq)]
pub(super) enum Finding {
    /// These kinds are proved now.
    Proved(KeyKinds),
    /// These kinds are disproved now, and this may be why.
    Disproved(KeyKinds, Suspect),
}

/// Why hashes may differ from ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Suspect {
    Algorithm(HashAlgorithm),
    Seed(Option<&'static str>),
    AlgorithmAndSeed(HashAlgorithm, Option<&'static str>),
    UntaggedKeys,
    ItemKeys,
    AdapterPath,
    HiddenKeys,
    Unknown,
}

impl fmt::Display for Suspect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Algorithm(algorithm) => write!(f, "block_hash.algorithm looks like {algorithm}"),
            Self::Seed(seed) => write!(f, "block_hash.pythonhashseed looks like {}", shown(*seed)),
            Self::AlgorithmAndSeed(algorithm, seed) => {
                write!(f, "block_hash looks like algorithm {algorithm} and pythonhashseed {}", shown(*seed))
            }
            Self::UntaggedKeys => f.write_str("the engine hashes extra keys untagged, as vLLM before 0.31 does"),
            Self::ItemKeys => f.write_str("the engine hashes multimodal items in a way that is not known"),
            Self::AdapterPath => f.write_str("adapters[].path is probably not the path that the engine loaded"),
            Self::HiddenKeys => {
                f.write_str("block_hash is wrong, or all prompts are salted and this vLLM does not show it")
            }
            Self::Unknown => f.write_str("block_hash.pythonhashseed is probably not what the engine was started with"),
        }
    }
}

fn shown(seed: Option<&str>) -> String {
    seed.map_or_else(|| "null".to_owned(), |seed| format!("{seed:?}"))
}

impl Proof {
    /// Looks at a chain and updates what is known.
    pub(super) fn examine(&mut self, chain: &Chain<'_>, hasher: &BlockHasher) -> Vec<Finding> {
        if !chain.is_whole() {
            return Vec::new();
        }
        let Some(n_blocks) = self.usable(chain).filter(|n_blocks| self.is_wanted(chain.shows(*n_blocks))) else {
            return Vec::new();
        };
        let n_equal = chain.n_equal(n_blocks, hasher, Form::Tagged);
        if n_equal == n_blocks {
            return self.prove(chain.shows(n_blocks)).into_iter().collect();
        }
        let n_text = chain.n_text();
        if n_equal < n_text {
            return self.mismatch(chain, n_text, chain.kinds(n_text), hasher).into_iter().collect();
        }
        // What comes before the first item is as it should be.
        let proved = if n_text > 0 { self.prove(chain.shows(n_text)) } else { None };
        let at_fault = if n_text > 0 { KeyKinds::MM } else { chain.kinds(n_blocks) };
        let disproved = self.mismatch(chain, n_blocks, at_fault, hasher);
        proved.into_iter().chain(disproved).collect()
    }

    /// The part of a chain of which nothing is disproved yet; none: there is none.
    fn usable(&self, chain: &Chain<'_>) -> Option<usize> {
        let is_open = |n_blocks: usize| !self.disproved.intersects(chain.kinds(n_blocks));
        let (n_text, n_blocks) = (chain.n_text(), chain.n_blocks());
        match n_text {
            0 => is_open(n_blocks).then_some(n_blocks),
            _ if !is_open(n_text) => None,
            _ => Some(if is_open(n_blocks) { n_blocks } else { n_text }),
        }
    }

    fn is_wanted(&mut self, shows: KeyKinds) -> bool {
        if !self.proved.contains(shows.without(self.disproved)) && self.n_unexplained < MANY_UNEXPLAINED {
            return true;
        }
        self.n_passed += 1;
        self.n_passed.is_multiple_of(SAMPLE_EVERY)
    }

    fn prove(&mut self, kinds: KeyKinds) -> Option<Finding> {
        let new = kinds.without(self.proved).without(self.disproved);
        self.proved = self.proved | new;
        (!new.is_empty()).then_some(Finding::Proved(new))
    }

    /// The first `n_blocks` of a chain are not as they should be, and these kinds may be why.
    fn mismatch(
        &mut self,
        chain: &Chain<'_>,
        n_blocks: usize,
        kinds: KeyKinds,
        hasher: &BlockHasher,
    ) -> Option<Finding> {
        if chain.hides_extra_keys() {
            return self.leave_unexplained(kinds);
        }
        // Of several kinds in one chain, the one that was proved by others is not at fault.
        let doubtful = kinds.without(self.proved);
        let kinds = if doubtful.is_empty() { kinds } else { doubtful };
        Some(self.disprove(kinds, chain.suspect(n_blocks, kinds, hasher)))
    }

    fn disprove(&mut self, kinds: KeyKinds, suspect: Suspect) -> Finding {
        self.disproved = self.disproved | kinds;
        self.proved = self.proved.without(kinds);
        Finding::Disproved(kinds, suspect)
    }

    fn leave_unexplained(&mut self, kinds: KeyKinds) -> Option<Finding> {
        self.n_unexplained += 1;
        let is_hopeless = self.n_unexplained == MANY_UNEXPLAINED && !self.proved.contains(kinds);
        is_hopeless.then(|| self.disprove(kinds, Suspect::HiddenKeys))
    }
}
