//! The cache directory of the harness: what is fetched or built once and used by every later run.
//!
//! An item is a directory below the root. It is filled under another name, one process at a time, and takes its own
//! name only when it is complete: an item that exists can be used without further checks, and an install that was
//! killed leaves nothing but a stale directory, which the next use of the item removes. An item's name holds the
//! version, and a digest where the contents follow from a file.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::tool::env_path;

/// Says where the cache is; else it is `warmroute` in `XDG_CACHE_HOME` or in `~/.cache`.
const CACHE_VAR: &str = "E2E_CACHE";

/// The cache directory of the harness.
#[derive(Debug, Clone)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// The cache at `E2E_CACHE`, else `$XDG_CACHE_HOME/warmroute`, else `~/.cache/warmroute`; created if need be.
    ///
    /// # Errors
    /// When none of these variables nor `HOME` is set, or the directory can't be created.
    pub fn from_env() -> Result<Self> {
        let root = if let Some(root) = env_path(CACHE_VAR) {
            root
        } else if let Some(base) = env_path("XDG_CACHE_HOME") {
            base.join("warmroute")
        } else if let Some(home) = env_path("HOME") {
            home.join(".cache").join("warmroute")
        } else {
            bail!("no cache directory: none of {CACHE_VAR}, XDG_CACHE_HOME and HOME is set");
        };
        Self::at(&root)
    }

    /// The cache at `root`, created if need be.
    ///
    /// # Errors
    /// When the directory can't be created.
    pub fn at(root: &Path) -> Result<Self> {
        let root = std::path::absolute(root).with_context(|| format!("cache directory {}", root.display()))?;
        fs::create_dir_all(&root).with_context(|| format!("cannot create the cache directory {}", root.display()))?;
        Ok(Self { root })
    }

    /// The directory that holds the items.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The directory of `item`, filled by `install` first when it is not there yet.
    ///
    /// `install` gets an empty directory, which is renamed when it returns, so what it writes must not hold its own
    /// path. Blocks while another process installs the same item.
    ///
    /// # Errors
    /// When `install` fails, or the directories or the lock can't be written.
    pub fn get(&self, item: &str, install: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        let dir = self.root.join(item);
        if dir.exists() {
            // Nobody fills an item that is there, but a child of a killed install may have gone on for a while.
            self.remove_partial(item);
            return Ok(dir);
        }
        let _lock = self.lock(item)?;
        if dir.exists() {
            return Ok(dir);
        }
        self.remove_partial(item);
        // The id keeps a child that outlived its killed install out of our directory.
        let partial = self.root.join(format!("{item}.partial-{}", process::id()));
        eprintln!("installing {item} into {}", self.root.display());
        fs::create_dir(&partial).with_context(|| format!("cannot create {}", partial.display()))?;
        install(&partial).with_context(|| format!("cannot install {item} into {}", self.root.display()))?;
        fs::rename(&partial, &dir)
            .with_context(|| format!("cannot rename {} to {}", partial.display(), dir.display()))?;
        Ok(dir)
    }

    /// Held until dropped, or until the process ends in any way.
    fn lock(&self, item: &str) -> Result<File> {
        let path = self.root.join(format!("{item}.lock"));
        let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
        if file.try_lock().is_err() {
            eprintln!("waiting for another process that installs {item}");
            file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
        }
        Ok(file)
    }

    /// Removes what killed installs left. What can't be removed costs space and nothing else.
    fn remove_partial(&self, item: &str) {
        let prefix = format!("{item}.partial-");
        let Ok(entries) = fs::read_dir(&self.root) else {
            return;
        };
        for entry in entries.flatten() {
            if entry.file_name().to_string_lossy().starts_with(&prefix) {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }
}

/// An item's name: `name` and the first digits of the SHA-256 of `contents`, the files that it follows from.
pub fn item_name(name: &str, contents: &[&str]) -> String {
    let mut hasher = Sha256::new();
    for content in contents {
        hasher.update(content);
    }
    format!("{name}-{}", hex::encode(&hasher.finalize()[..4]))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    use super::*;

    fn cache() -> (tempfile::TempDir, Cache) {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path()).unwrap();
        (dir, cache)
    }

    #[test]
    fn item_is_installed_once() {
        let (_dir, cache) = cache();
        let n_installs = AtomicUsize::new(0);
        let get = || {
            cache.get("item", |dir| {
                n_installs.fetch_add(1, Ordering::Relaxed);
                Ok(fs::write(dir.join("file"), "whole")?)
            })
        };
        let dirs: Vec<_> = thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(get)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap().unwrap()).collect()
        });
        assert_eq!(n_installs.into_inner(), 1);
        for dir in dirs {
            assert_eq!(fs::read_to_string(dir.join("file")).unwrap(), "whole");
        }
    }

    #[test]
    fn failed_install_is_not_taken_for_the_item() {
        let (_dir, cache) = cache();
        let failed = cache.get("item", |dir| {
            fs::write(dir.join("file"), "half")?;
            bail!("killed")
        });
        assert!(failed.is_err());
        let dir = cache.get("item", |_| Ok(())).unwrap();
        assert!(!dir.join("file").exists());
    }

    #[test]
    fn leftovers_of_a_killed_install_are_removed() {
        let (_dir, cache) = cache();
        let stale = cache.root().join("item.partial-0");
        fs::create_dir(&stale).unwrap();
        cache.get("item", |_| Ok(())).unwrap();
        assert!(!stale.exists());

        fs::create_dir(&stale).unwrap();
        cache.get("item", |_| bail!("installed already")).unwrap();
        assert!(!stale.exists());
    }

    #[test]
    fn item_name_follows_contents() {
        assert_eq!(item_name("a-1.0", &["x"]), item_name("a-1.0", &["x"]));
        assert_ne!(item_name("a-1.0", &["x"]), item_name("a-1.0", &["y"]));
    }
}
