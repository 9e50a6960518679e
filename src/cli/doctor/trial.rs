//! Finds by trial how an engine hashes its blocks: announced hashes are computed again from their token ids.

use super::seen::{Hash, Stored};
use crate::routing::hash::{BlockHasher, BlockSize, Digest, HashAlgorithm};

/// Chains that are tried: those of prompts of ours first, whose tokens are known from elsewhere, then those that are live,
/// since they are of the process that runs now.
const MOST_CHAINS: usize = 8;

/// How blocks are hashed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Scheme {
    pub(super) algorithm: HashAlgorithm,
    /// `PYTHONHASHSEED`; none: not set.
    pub(super) seed: Option<String>,
}

impl std::fmt::Display for Scheme {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} with PYTHONHASHSEED {}", self.algorithm, shown(self.seed.as_deref()))
    }
}

/// A seed in words.
pub(super) fn shown(seed: Option<&str>) -> String {
    seed.map_or_else(|| "not set".to_owned(), |seed| format!("{seed:?}"))
}

/// What the trial found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Trial {
    /// This scheme makes so many of the chains.
    Match { scheme: Scheme, n_equal: usize, n_chains: usize },
    /// None does. The algorithm, if hashes came whole and tell it.
    NoMatch { n_chains: usize, algorithm: Option<HashAlgorithm> },
    /// No chain begins a prompt without extra keys.
    NoMaterial,
}

impl Trial {
    pub(super) fn scheme(&self) -> Option<&Scheme> {
        match self {
            Self::Match { scheme, .. } => Some(scheme),
            Self::NoMatch { .. } | Self::NoMaterial => None,
        }
    }
}

/// Tries every algorithm with every one of `seeds`, on what is `stored` of `prompts` above all.
pub(super) fn trial(stored: &[Stored], prompts: &[&[u32]], seeds: &[Option<String>]) -> Trial {
    let is_evidence = |chain: &&Stored| chain.parent.is_none() && chain.is_plain && chain.is_dense();
    let is_ours = |chain: &&Stored| prompts.iter().any(|prompt| prompt.starts_with(&chain.tokens));
    let (ours, others): (Vec<_>, Vec<_>) = stored.iter().filter(is_evidence).partition(is_ours);
    let (live, old): (Vec<_>, Vec<_>) = others.into_iter().partition(|chain| chain.is_live);
    let chains: Vec<_> = ours.into_iter().chain(live).chain(old.into_iter().rev()).take(MOST_CHAINS).collect();
    if chains.is_empty() {
        return Trial::NoMaterial;
    }
    let n_chains = chains.len();
    let schemes = HashAlgorithm::ALL.iter().flat_map(|algorithm| seeds.iter().map(move |seed| (*algorithm, seed)));
    let counted = schemes.filter_map(|(algorithm, seed)| {
        let hasher = BlockHasher::new(algorithm, seed.as_deref()).ok()?;
        let n_equal = chains.iter().filter(|chain| chain.is_hashed_by(&hasher)).count();
        Some((n_equal, Scheme { algorithm, seed: seed.clone() }))
    });
    match counted.max_by_key(|(n_equal, _)| *n_equal) {
        Some((n_equal, scheme)) if n_equal > 0 => Trial::Match { scheme, n_equal, n_chains },
        _ => Trial::NoMatch { n_chains, algorithm: chains.iter().find_map(|chain| chain.algorithm()) },
    }
}

impl Stored {
    /// Whether its hashes can be paired with its tokens: groups with a sliding window announce fewer.
    fn is_dense(&self) -> bool {
        !self.hashes.is_empty() && self.tokens.len() == self.hashes.len() * self.block_size as usize
    }

    fn is_hashed_by(&self, hasher: &BlockHasher) -> bool {
        let Some(block_size) = BlockSize::new(self.block_size) else { return false };
        let digests = hasher.chain(hasher.root(), &self.tokens, block_size, |_| []);
        digests.len() == self.hashes.len() && digests.iter().zip(&self.hashes).all(|(digest, hash)| hash.is(digest))
    }

    /// The algorithm, told by the second block: its parent's whole hash is known, whatever the root is.
    fn algorithm(&self) -> Option<HashAlgorithm> {
        let [Hash::Whole(first), second, ..] = self.hashes.as_slice() else { return None };
        let parent = Digest::from_bytes(first)?;
        let n_tokens = self.block_size as usize;
        let block = self.tokens.get(n_tokens..2 * n_tokens)?;
        HashAlgorithm::ALL.into_iter().find(|algorithm| {
            let hasher = BlockHasher::new(*algorithm, Some("0")).expect("a seed makes a root");
            second.is(&hasher.block(&parent, block, &[]))
        })
    }
}

impl Hash {
    fn is(&self, digest: &Digest) -> bool {
        match self {
            Self::Low(hash) => *hash == digest.low64(),
            Self::Whole(bytes) => bytes == digest.as_bytes(),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// What an engine announces for `tokens`, in blocks of 4.
    pub(in crate::cli::doctor) fn announced(algorithm: HashAlgorithm, seed: Option<&str>, tokens: &[u32]) -> Stored {
        let hasher = BlockHasher::new(algorithm, seed).expect("a known root");
        let size = BlockSize::new(4).expect("not 0");
        let digests = hasher.chain(hasher.root(), tokens, size, |_| []);
        let hashes = digests.iter().map(|digest| Hash::Low(digest.low64())).collect();
        Stored { is_live: true, parent: None, hashes, tokens: tokens.to_vec(), block_size: 4, is_plain: true }
    }

    fn whole(algorithm: HashAlgorithm, seed: &str) -> Stored {
        let hasher = BlockHasher::new(algorithm, Some(seed)).expect("a known root");
        let tokens: Vec<u32> = (0..8).collect();
        let digests = hasher.chain(hasher.root(), &tokens, BlockSize::new(4).expect("not 0"), |_| []);
        let hashes = digests.iter().map(|digest| Hash::Whole(digest.as_bytes().to_vec())).collect();
        Stored { hashes, ..announced(algorithm, Some(seed), &tokens) }
    }

    fn seeds() -> Vec<Option<String>> {
        vec![None, Some("0".to_owned()), Some("42".to_owned())]
    }

    #[test]
    fn every_algorithm_and_root_that_is_tried_is_found() {
        let tokens: Vec<u32> = (100..112).collect();
        for algorithm in HashAlgorithm::ALL {
            for seed in seeds() {
                if BlockHasher::new(algorithm, seed.as_deref()).is_err() {
                    continue;
                }
                let found = trial(&[announced(algorithm, seed.as_deref(), &tokens)], &[], &seeds());
                assert_eq!(found.scheme(), Some(&Scheme { algorithm, seed: seed.clone() }), "{algorithm} {seed:?}");
            }
        }
    }

    #[test]
    fn a_root_that_is_not_tried_leaves_the_algorithm_where_hashes_come_whole() {
        for algorithm in HashAlgorithm::ALL {
            let found = trial(&[whole(algorithm, "other")], &[], &seeds());
            assert_eq!(found, Trial::NoMatch { n_chains: 1, algorithm: Some(algorithm) });
            let found = trial(&[announced(algorithm, Some("other"), &[1, 2, 3, 4, 5, 6, 7, 8])], &[], &seeds());
            assert_eq!(found, Trial::NoMatch { n_chains: 1, algorithm: None });
        }
    }

    #[test]
    fn only_whole_plain_chains_from_the_root_are_evidence() {
        let chain = announced(HashAlgorithm::Sha256, None, &[1, 2, 3, 4, 5, 6, 7, 8]);
        let parent = Some(chain.hashes[0].clone());
        let sparse = Stored { hashes: chain.hashes[1..].to_vec(), ..chain.clone() };
        let keyed = Stored { is_plain: false, ..chain.clone() };
        let later = Stored { parent, ..chain.clone() };
        let empty = Stored { hashes: Vec::new(), tokens: Vec::new(), ..chain.clone() };
        assert_eq!(trial(&[sparse, keyed, later, empty], &[], &seeds()), Trial::NoMaterial);
        let foreign = announced(HashAlgorithm::Sha256, Some("other"), &[1, 2, 3, 4]);
        let found = trial(&[foreign, chain], &[], &seeds());
        assert!(matches!(found, Trial::Match { n_equal: 1, n_chains: 2, .. }), "{found:?}");
    }

    #[test]
    fn what_was_stored_of_our_prompts_is_not_crowded_out() {
        let prompt: Vec<u32> = (0..10).collect();
        let foreign = (0..20).map(|salt| announced(HashAlgorithm::Sha256, Some("other"), &[100 + salt, 1, 2, 3]));
        let ours = announced(HashAlgorithm::Sha256, None, &prompt[..8]);
        let later = Stored { is_live: false, ..ours };
        let stored: Vec<_> = foreign.chain([later]).collect();
        assert_eq!(trial(&stored, &[], &seeds()).scheme(), None);
        let found = trial(&stored, &[&prompt], &seeds());
        assert!(matches!(found, Trial::Match { n_equal: 1, n_chains: MOST_CHAINS, .. }), "{found:?}");
    }
}
