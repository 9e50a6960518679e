//! The secret under which blocks get the same number in every file.

use std::fmt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::routing::hash::BlockHash;

/// Fewest bytes of a key: what is shorter can be tried out.
const FEWEST_BYTES: usize = 16;
/// Bits of a number: those that a reader of JSON keeps who has only floating-point numbers.
const N_BITS: u32 = 53;

/// A secret from a file, digested to its full length.
#[derive(Clone, PartialEq, Eq)]
pub struct Key([u8; 32]);

/// A file that holds no key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// It cannot be read.
    #[error("{} cannot be read: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// It is too short.
    #[error("{} holds {n_bytes} bytes", path.display())]
    Short {
        /// The file.
        path: PathBuf,
        /// Its length without white space around it.
        n_bytes: usize,
    },
}

impl Key {
    /// The key in a file; white space around it is not part of it.
    ///
    /// # Errors
    /// [`KeyError`] when the file cannot be read, or holds less than 16 bytes.
    pub fn read(path: &Path) -> Result<Self, KeyError> {
        let bytes = std::fs::read(path).map_err(|source| KeyError::Unreadable { path: path.to_owned(), source })?;
        let secret = bytes.trim_ascii();
        if secret.len() < FEWEST_BYTES {
            return Err(KeyError::Short { path: path.to_owned(), n_bytes: secret.len() });
        }
        Ok(Self(Sha256::digest(secret).into()))
    }

    /// Numbers of a model's blocks: SHA-256 over key, model and block. Key and block have a fixed length and the name
    /// ends in a byte that no name has, so that no two inputs are one; who has no key can neither compute a number nor
    /// find a block for one.
    pub(super) fn numbers<'a>(
        &self,
        model: &str,
        blocks: impl Iterator<Item = &'a BlockHash> + 'a,
    ) -> impl Iterator<Item = u64> + 'a {
        let of_model = Sha256::new_with_prefix(self.0).chain_update(model).chain_update([0xff]);
        blocks.map(move |block| {
            let digest = of_model.clone().chain_update(block.0.to_be_bytes()).finalize();
            let first = digest.first_chunk().expect("a digest has 32 bytes");
            u64::from_be_bytes(*first) >> (u64::BITS - N_BITS)
        })
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(secret)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(secret: &str) -> Key {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("key");
        std::fs::write(&path, secret).expect("written");
        Key::read(&path).expect("a key")
    }

    fn numbers(key: &Key, model: &str) -> Vec<u64> {
        key.numbers(model, [BlockHash(1), BlockHash(2), BlockHash(u64::MAX)].iter()).collect()
    }

    #[test]
    fn numbers_depend_on_key_model_and_block_and_on_nothing_else() {
        let first = numbers(&key("0123456789abcdef"), "m");
        assert_eq!(first, numbers(&key(" 0123456789abcdef\n"), "m"), "white space is not part of a key");
        let others = [numbers(&key("0123456789abcdeg"), "m"), numbers(&key("0123456789abcdef"), "n")];
        let mut all: Vec<u64> = [first, others.concat()].concat();
        assert!(all.iter().all(|number| *number < 1 << N_BITS), "{all:?}");
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 9);
    }

    #[test]
    fn what_is_no_key_is_refused_and_a_key_is_not_shown() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("key");
        assert!(matches!(Key::read(&path), Err(KeyError::Unreadable { .. })));
        std::fs::write(&path, " too short \n").expect("written");
        let refused = Key::read(&path).expect_err("no key").to_string();
        assert!(refused.ends_with("holds 9 bytes"), "{refused}");
        assert_eq!(format!("{:?}", key("0123456789abcdef")), "Key(secret)");
    }
}
