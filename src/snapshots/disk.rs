//! The files: one per source, replaced as a whole.
//!
//! A file is written beside its place, synced and renamed, so that a crash leaves the old or the new one. The directory
//! itself is not synced: losing a rename means the older file, which is as good a claim as any.
//!
//! Everything here blocks.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use tracing::{info, warn};
use xxhash_rust::xxh3::xxh3_64;

use super::InstanceId;
use crate::events::snapshot::{MAX_ENCODED_BYTES, Snapshot, SnapshotError, SourceKey};
use crate::telemetry::metrics::{Metrics, SnapshotStep};

/// Files of sources, and of writes that are under way or were cut off.
const EXTENSION: &str = "snapshot";
const PART_EXTENSION: &str = "part";
/// A source that nothing was written for in this time is gone. A source that lives is written once a day at least.
const MAX_AGE: Duration = Duration::from_secs(7 * 24 * 3600);
/// A write that did not end in this time never will.
const MAX_PART_AGE: Duration = Duration::from_secs(600);
/// Most bytes that are loaded: they are held in memory until their source comes, or as long as it does not. The newest
/// files go first, and endpoints that a rollout replaced stay on disk.
const MAX_LOADED_BYTES: u64 = 512 << 20;
/// Longest part of a file's name that is the source's; the rest is for readers no more.
const MAX_NAME: usize = 100;

/// Where the files lie.
#[derive(Clone, Debug)]
pub(super) struct SnapshotDir {
    path: PathBuf,
    instance: InstanceId,
}

/// Why a file was not written or read.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("the file system refused")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Content(#[from] SnapshotError),
    #[error("found the snapshot of {key}, expected it in {expected}")]
    Misplaced { key: SourceKey, expected: String },
}

impl SnapshotDir {
    pub(super) fn new(path: PathBuf, instance: InstanceId) -> Self {
        Self { path, instance }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Replaces a source's file.
    pub(super) fn write(&self, key: &SourceKey, encoded: &[u8]) -> Result<(), Error> {
        if encoded.len() > MAX_ENCODED_BYTES {
            return Err(SnapshotError::TooLarge { found: encoded.len() }.into());
        }
        fs::create_dir_all(&self.path)?;
        // Replicas may share a directory: the unfinished file is of one process alone.
        let part = self.path.join(format!("{}.{}.{PART_EXTENSION}", file_stem(key), self.instance));
        let written = write_synced(&part, encoded).and_then(|()| fs::rename(&part, self.path.join(file_name(key))));
        if written.is_err() {
            // It may not even have come to be; what stays is removed at a later start.
            let _ = fs::remove_file(&part);
        }
        Ok(written?)
    }

    /// All that lies there, newest first. A directory that does not exist yet is an empty one.
    fn entries(&self) -> io::Result<Vec<Entry>> {
        let listed = match fs::read_dir(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            listed => listed?,
        };
        // A file that another process removes meanwhile is none of ours.
        let mut entries: Vec<Entry> = listed.filter_map(|entry| Entry::of(&entry.ok()?)).collect();
        entries.sort_by_key(|entry| std::cmp::Reverse(entry.modified));
        Ok(entries)
    }
}

/// Hands every readable snapshot to `offer` and says which sources they are of; removes what is old or unreadable.
pub(super) fn load(dir: &SnapshotDir, metrics: &Metrics, mut offer: impl FnMut(Snapshot)) -> Vec<SourceKey> {
    let path = dir.path().display();
    let entries = dir.entries().unwrap_or_else(|error| {
        metrics.count_snapshot_failure(SnapshotStep::Load);
        warn!(%path, %error, "the snapshot directory cannot be read");
        Vec::new()
    });
    let now = SystemTime::now();
    let (mut keys, mut n_bytes) = (Vec::new(), 0);
    for entry in entries {
        if entry.is_outdated(now) {
            entry.remove("snapshot file is removed, nobody wrote it for long");
        } else if entry.is_snapshot() && n_bytes + entry.n_bytes <= MAX_LOADED_BYTES {
            n_bytes += entry.n_bytes;
            keys.extend(load_file(&entry, metrics).map(|snapshot| {
                let key = snapshot.key.clone();
                offer(snapshot);
                key
            }));
        }
    }
    info!(%path, n_snapshots = keys.len(), n_bytes, "snapshots are loaded");
    keys
}

/// Reads a file; one that is no snapshot of ours is removed.
fn load_file(entry: &Entry, metrics: &Metrics) -> Option<Snapshot> {
    match entry.read() {
        Ok(snapshot) => {
            metrics.count_snapshot(SnapshotStep::Load, entry.n_bytes);
            Some(snapshot)
        }
        Err(error) => {
            metrics.count_snapshot_failure(SnapshotStep::Load);
            warn!(file = %entry.path.display(), %error, "snapshot file cannot be used");
            if !matches!(error, Error::Io(_)) {
                entry.remove("snapshot file is removed, it cannot be used");
            }
            None
        }
    }
}

/// A file in the directory.
struct Entry {
    path: PathBuf,
    modified: SystemTime,
    n_bytes: u64,
}

impl Entry {
    fn of(entry: &fs::DirEntry) -> Option<Self> {
        let metadata = entry.metadata().ok().filter(fs::Metadata::is_file)?;
        Some(Self { path: entry.path(), modified: metadata.modified().ok()?, n_bytes: metadata.len() })
    }

    fn has_extension(&self, extension: &str) -> bool {
        self.path.extension().is_some_and(|found| found == extension)
    }

    fn is_snapshot(&self) -> bool {
        self.has_extension(EXTENSION)
    }

    /// Whether it is ours and of no use any more. Other files are nothing to us.
    fn is_outdated(&self, now: SystemTime) -> bool {
        // A time ahead of ours is that of another clock, and not old.
        let age = now.duration_since(self.modified).unwrap_or_default();
        (self.is_snapshot() && age > MAX_AGE) || (self.has_extension(PART_EXTENSION) && age > MAX_PART_AGE)
    }

    fn read(&self) -> Result<Snapshot, Error> {
        let mut encoded = Vec::new();
        File::open(&self.path)?.take(MAX_ENCODED_BYTES as u64 + 1).read_to_end(&mut encoded)?;
        let snapshot = Snapshot::decode(&encoded)?;
        let expected = file_name(&snapshot.key);
        if self.path.file_name().is_none_or(|found| found != expected.as_str()) {
            return Err(Error::Misplaced { key: snapshot.key, expected });
        }
        Ok(snapshot)
    }

    fn remove(&self, why: &'static str) {
        let file = self.path.display();
        match fs::remove_file(&self.path) {
            Ok(()) => info!(%file, "{why}"),
            Err(error) => warn!(%file, %error, "snapshot file cannot be removed"),
        }
    }
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn file_name(key: &SourceKey) -> String {
    format!("{}.{EXTENSION}", file_stem(key))
}

/// The key as far as a file's name can show it, and a hash that tells apart what it cannot.
fn file_stem(key: &SourceKey) -> String {
    let shown = key.to_string();
    let plain = |c: char| if c.is_ascii_alphanumeric() || c == '-' || c == '.' { c } else { '_' };
    let readable: String = shown.chars().map(plain).take(MAX_NAME).collect();
    // A leading dot would hide the file.
    format!("{}-{:016x}", readable.trim_start_matches('.'), xxh3_64(shown.as_bytes()))
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use tempfile::TempDir;

    use super::*;
    use crate::events::continuity::{Overlap, PayloadDigest, SeqNo};
    use crate::events::snapshot::tests::image;

    fn dir() -> (TempDir, SnapshotDir) {
        let temporary = TempDir::new().unwrap();
        // Not there yet: it is made with the first write.
        let dir = SnapshotDir::new(temporary.path().join("a/b"), InstanceId(1));
        (temporary, dir)
    }

    fn key(model: &str) -> SourceKey {
        SourceKey { model: model.into(), address: SocketAddr::from(([127, 0, 0, 1], 8000)), rank: 0 }
    }

    fn snapshot(model: &str, seq: u64) -> Snapshot {
        let overlap = Overlap { seq: SeqNo(seq), digest: PayloadDigest::of(b"x") };
        Snapshot { key: key(model), overlap, complete: true, image: image(b"blocks") }
    }

    fn write(dir: &SnapshotDir, snapshot: &Snapshot) -> PathBuf {
        dir.write(&snapshot.key, &snapshot.encode()).unwrap();
        dir.path.join(file_name(&snapshot.key))
    }

    fn age(path: &Path, by: Duration) {
        File::options().append(true).open(path).unwrap().set_modified(SystemTime::now() - by).unwrap();
    }

    fn loaded(dir: &SnapshotDir) -> (Vec<Snapshot>, String) {
        let (metrics, mut found) = (Metrics::new(), Vec::new());
        let keys = load(dir, &metrics, |snapshot| found.push(snapshot));
        assert_eq!(keys, found.iter().map(|snapshot| snapshot.key.clone()).collect::<Vec<_>>());
        (found, metrics.encode())
    }

    fn names(dir: &SnapshotDir) -> Vec<String> {
        let name = |entry: Entry| entry.path.file_name().unwrap().to_str().unwrap().to_owned();
        dir.entries().unwrap().into_iter().map(name).collect()
    }

    #[test]
    fn the_latest_snapshot_of_each_source_is_found_at_the_next_start() {
        let (_temporary, dir) = dir();
        assert_eq!(loaded(&dir).0, []);
        age(&write(&dir, &snapshot("old", 1)), Duration::from_secs(60));
        write(&dir, &snapshot("a/b c", 1));
        write(&dir, &snapshot("a/b c", 2));

        let (found, metrics) = loaded(&dir);

        assert_eq!(found, [snapshot("a/b c", 2), snapshot("old", 1)]);
        assert!(metrics.contains("warmroute_snapshots_total{step=\"load\"} 2\n"), "{metrics}");
    }

    #[test]
    fn names_are_readable_distinct_and_stay_in_the_directory() {
        assert!(file_name(&key("a/b c")).starts_with("a_b_c_127.0.0.1_8000_rank_0-"));
        assert_ne!(file_name(&key("a/b")), file_name(&key("a_b")));
        assert_eq!(Path::new(&file_name(&key("../../etc"))).components().count(), 1);
        assert!(file_name(&key("..")).starts_with('_') && file_name(&key(&"long".repeat(99))).len() < 140);
    }

    #[test]
    fn a_file_that_is_no_snapshot_of_ours_is_counted_and_removed() {
        let (_temporary, dir) = dir();
        let damaged = write(&dir, &snapshot("damaged", 1));
        fs::write(&damaged, &snapshot("damaged", 1).encode()[..30]).unwrap();
        let misplaced = write(&dir, &snapshot("misplaced", 1));
        fs::write(&misplaced, snapshot("other", 1).encode()).unwrap();
        fs::write(dir.path.join("notes.txt"), "not ours").unwrap();
        write(&dir, &snapshot("good", 1));

        let (found, metrics) = loaded(&dir);

        assert_eq!(found, [snapshot("good", 1)]);
        assert!(metrics.contains("warmroute_snapshot_failures_total{step=\"load\"} 2\n"), "{metrics}");
        let mut left = names(&dir);
        left.sort();
        assert_eq!(left, [file_name(&key("good")), "notes.txt".to_owned()]);
    }

    #[test]
    fn files_of_sources_that_are_gone_and_of_writes_that_were_cut_off_are_removed() {
        let (_temporary, dir) = dir();
        age(&write(&dir, &snapshot("gone", 1)), MAX_AGE + Duration::from_secs(60));
        age(&write(&dir, &snapshot("idle", 1)), MAX_AGE - Duration::from_secs(60));
        let cut_off = dir.path.join("x.part");
        fs::write(&cut_off, "half").unwrap();
        age(&cut_off, MAX_PART_AGE + Duration::from_secs(60));
        fs::write(dir.path.join("y.part"), "under way").unwrap();

        assert_eq!(loaded(&dir).0, [snapshot("idle", 1)]);

        assert_eq!(names(&dir), ["y.part".to_owned(), file_name(&key("idle"))]);
    }

    #[test]
    fn a_write_that_fails_leaves_the_file_as_it_was_and_nothing_beside_it() {
        let (_temporary, dir) = dir();
        write(&dir, &snapshot("a", 1));
        let too_large = vec![0; MAX_ENCODED_BYTES + 1];
        assert!(matches!(dir.write(&key("a"), &too_large), Err(Error::Content(SnapshotError::TooLarge { .. }))));
        // A directory in the file's place refuses the rename.
        fs::create_dir(dir.path.join(file_name(&key("b")))).unwrap();
        assert!(matches!(dir.write(&key("b"), &snapshot("b", 1).encode()), Err(Error::Io(_))));

        assert_eq!(loaded(&dir).0, [snapshot("a", 1)]);
        assert_eq!(names(&dir), [file_name(&key("a"))]);
    }
}
