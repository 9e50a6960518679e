//! The key of an engine's HTTP server, from a file that may be replaced while we run.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use reqwest::header::HeaderValue;
use tracing::warn;

use super::access::FileError;

/// A key is at most this old. Reading a mounted secret costs microseconds, and a rotated key should not cost requests.
const MAX_AGE: Duration = Duration::from_secs(1);

/// A key that follows its file. A key that cannot be read again stays what it was.
#[derive(Debug)]
pub struct ApiKey {
    path: PathBuf,
    /// Held for as long as it takes to copy a header, never across a wait.
    known: Mutex<Known>,
}

#[derive(Debug)]
struct Known {
    /// Marked sensitive, so that no `Debug` shows it.
    bearer: HeaderValue,
    read_at: Instant,
    /// Whether the last reading failed: only the first failure of a row is worth a line in the log.
    is_stale: bool,
}

impl ApiKey {
    /// The key in a file.
    ///
    /// # Errors
    /// As [`read_key`].
    pub fn read(path: &Path) -> Result<Self, FileError> {
        let known = Known { bearer: read_key(path)?, read_at: Instant::now(), is_stale: false };
        Ok(Self { path: path.to_owned(), known: Mutex::new(known) })
    }

    /// Value of the `authorization` header.
    pub async fn bearer(&self) -> HeaderValue {
        if let Some(fresh) = self.claim_fresh() {
            return fresh;
        }
        let path = self.path.clone();
        // The runtime's blocking threads: a file system may hang.
        let read = tokio::task::spawn_blocking(move || read_key(&path)).await;
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let was_stale = std::mem::replace(&mut known.is_stale, !matches!(read, Ok(Ok(_))));
        match read {
            Ok(Ok(bearer)) => known.bearer = bearer,
            Ok(Err(error)) if !was_stale => warn!(%error, "API key cannot be read again, the former one stays"),
            Ok(Err(_)) | Err(_) => {}
        }
        known.bearer.clone()
    }

    /// The key if it is young enough. Otherwise the caller alone reads it, and the others take the old one meanwhile.
    fn claim_fresh(&self) -> Option<HeaderValue> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.read_at.elapsed() < MAX_AGE {
            return Some(known.bearer.clone());
        }
        known.read_at = Instant::now();
        None
    }
}

/// The header value with the key in a file; white space around the key is not part of it.
///
/// # Errors
/// [`FileError`] when it cannot be read, is empty, or holds what no header may.
pub fn read_key(path: &Path) -> Result<HeaderValue, FileError> {
    let unusable = |found| FileError::Unusable { path: path.to_owned(), found, expected: "a key of printable ASCII" };
    let text = std::fs::read(path).map_err(|source| FileError::Unreadable { path: path.to_owned(), source })?;
    let key = text.trim_ascii();
    if key.is_empty() {
        return Err(unusable("nothing"));
    }
    if !key.iter().all(u8::is_ascii_graphic) {
        return Err(unusable("other characters"));
    }
    let mut bearer = HeaderValue::from_bytes(&[b"Bearer ", key].concat()).expect("printable ASCII is a header value");
    bearer.set_sensitive(true);
    Ok(bearer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_key_follows_its_file_outlives_it_and_is_not_shown() {
        let path = std::env::temp_dir().join(format!("warmroute-key-{}", std::process::id()));
        std::fs::write(&path, "first-key\n").expect("a temporary file");
        let key = ApiKey::read(&path).expect("a key");
        assert_eq!(key.bearer().await, "Bearer first-key");
        assert!(!format!("{key:?}").contains("first-key"), "a key must not reach a log");

        let age = || key.known.lock().expect("no panic").read_at -= MAX_AGE;
        std::fs::write(&path, "second-key").expect("a temporary file");
        age();
        assert_eq!(key.bearer().await, "Bearer second-key");
        std::fs::remove_file(&path).expect("it is there");
        age();
        assert_eq!(key.bearer().await, "Bearer second-key", "a file that is gone for a moment costs no request");
    }

    #[test]
    fn what_cannot_be_a_key_is_refused_without_being_shown() {
        let path = std::env::temp_dir().join(format!("warmroute-no-key-{}", std::process::id()));
        for (content, found) in [("", "nothing"), (" \n", "nothing"), ("secret\nsecret", "other characters")] {
            std::fs::write(&path, content).expect("a temporary file");
            let refused = read_key(&path).expect_err("no key").to_string();
            assert!(refused.contains(&format!("holds {found}")) && !refused.contains("secret"), "{refused}");
        }
        std::fs::remove_file(&path).expect("it is there");
    }
}
