//! The files: one per source, replaced as a whole.
//!
//! A file is written beside its place, synced and renamed, so that a crash leaves the old or the new one. The directory
//! itself is not synced: losing a rename means the older file, which is as good a claim as any.
//!
//! Others may keep files in the same directory. Only what has a name that we give is read or removed, and what another
//! release wrote is left to it.
//!
//! Everything here blocks.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
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

    /// All of ours that lies there, newest first. A directory that does not exist yet is an empty one.
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
        warn!(%path, %error, "the directory of the KV event snapshots cannot be read");
        Vec::new()
    });
    let now = SystemTime::now();
    let (mut keys, mut n_bytes) = (Vec::new(), 0);
    for entry in entries {
        if entry.is_outdated(now) {
            entry.remove("KV event snapshot file is removed, nobody wrote it for long");
        } else if entry.kind == Kind::Snapshot && n_bytes + entry.n_bytes <= MAX_LOADED_BYTES {
            n_bytes += entry.n_bytes;
            keys.extend(load_file(&entry, metrics).map(|snapshot| {
                let key = snapshot.key.clone();
                offer(snapshot);
                key
            }));
        }
    }
    info!(%path, n_snapshots = keys.len(), n_bytes, "KV event snapshots are loaded");
    keys
}

/// Reads a file; one that is no snapshot is removed. That of another release stays: after a rollback it is wanted
/// again.
fn load_file(entry: &Entry, metrics: &Metrics) -> Option<Snapshot> {
    match entry.read() {
        Ok(snapshot) => {
            metrics.count_snapshot(SnapshotStep::Load, entry.n_bytes);
            Some(snapshot)
        }
        Err(error) => {
            metrics.count_snapshot_failure(SnapshotStep::Load);
            warn!(file = %entry.path.display(), %error, "KV event snapshot file cannot be used");
            if !matches!(error, Error::Io(_) | Error::Content(SnapshotError::Version { .. })) {
                entry.remove("KV event snapshot file is removed, it cannot be used");
            }
            None
        }
    }
}

/// What a file is by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// What is known of a source.
    Snapshot,
    /// A write that is under way or was cut off.
    Part,
}

impl Kind {
    /// None: the name is none that we give.
    fn of(name: &str) -> Option<Self> {
        let is_hash = |text: &str| text.len() == 16 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        let is_stem = |text: &str| text.rsplit_once('-').is_some_and(|(_, hash)| is_hash(hash));
        match name.rsplit_once('.')? {
            (stem, EXTENSION) if is_stem(stem) => Some(Self::Snapshot),
            (part, PART_EXTENSION) => {
                let (stem, instance) = part.rsplit_once('.')?;
                (is_stem(stem) && is_hash(instance)).then_some(Self::Part)
            }
            _ => None,
        }
    }
}

/// A file of ours in the directory.
struct Entry {
    path: PathBuf,
    kind: Kind,
    modified: SystemTime,
    n_bytes: u64,
}

impl Entry {
    fn of(entry: &fs::DirEntry) -> Option<Self> {
        let kind = Kind::of(entry.file_name().to_str()?)?;
        let metadata = entry.metadata().ok().filter(fs::Metadata::is_file)?;
        Some(Self { path: entry.path(), kind, modified: metadata.modified().ok()?, n_bytes: metadata.len() })
    }

    /// Whether it is of no use any more, whatever release wrote it.
    fn is_outdated(&self, now: SystemTime) -> bool {
        // A time ahead of ours is that of another clock, and not old.
        let age = now.duration_since(self.modified).unwrap_or_default();
        match self.kind {
            Kind::Snapshot => age > MAX_AGE,
            Kind::Part => age > MAX_PART_AGE,
        }
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
            Err(error) => warn!(%file, %error, "KV event snapshot file cannot be removed"),
        }
    }
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    // What prompts there were can be guessed from it: nobody else's to read.
    let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(path)?;
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
    use std::os::unix::fs::PermissionsExt as _;

    use tempfile::TempDir;

    use super::*;
    use crate::events::continuity::{Overlap, PayloadDigest, SeqNo};
    use crate::events::snapshot::MAGIC;
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
        let listed = fs::read_dir(&dir.path).unwrap().map(|entry| entry.unwrap());
        let files = listed.filter(|entry| entry.file_type().unwrap().is_file());
        let mut names: Vec<String> = files.map(|entry| entry.file_name().into_string().unwrap()).collect();
        names.sort();
        names
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
        assert_eq!(names(&dir), [file_name(&key("good")), "notes.txt".to_owned()]);
    }

    #[test]
    fn files_with_other_names_are_left_alone_however_old() {
        let (_temporary, dir) = dir();
        write(&dir, &snapshot("good", 1));
        let others = [
            "backup.snapshot",
            "db-0123456789abcde.snapshot",
            "db-0123456789ABCDEF.snapshot",
            "db-0123456789abcdef.part",
            "db.0123456789abcdef.part",
            "download.part",
        ];
        for name in others {
            let path = dir.path.join(name);
            fs::write(&path, "not ours").unwrap();
            age(&path, 2 * MAX_AGE);
        }

        let (found, metrics) = loaded(&dir);

        assert_eq!(found, [snapshot("good", 1)]);
        assert!(!metrics.contains("warmroute_snapshot_failures_total{step=\"load\"} "), "{metrics}");
        let left = names(&dir);
        assert!(others.iter().all(|name| left.iter().any(|found| found == name)), "{left:?}");
    }

    #[test]
    fn a_snapshot_of_another_release_is_counted_and_left_to_it() {
        let (_temporary, dir) = dir();
        let path = write(&dir, &snapshot("a", 1));
        let mut encoded = snapshot("a", 1).encode();
        encoded[MAGIC.len()] ^= 0x80;
        fs::write(&path, &encoded).unwrap();

        let (found, metrics) = loaded(&dir);

        assert_eq!(found, []);
        assert!(metrics.contains("warmroute_snapshot_failures_total{step=\"load\"} 1\n"), "{metrics}");
        assert_eq!(fs::read(&path).unwrap(), encoded);
    }

    #[test]
    fn files_are_for_their_owner_alone() {
        let (_temporary, dir) = dir();
        let path = write(&dir, &snapshot("a", 1));
        assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn files_of_sources_that_are_gone_and_of_writes_that_were_cut_off_are_removed() {
        let (_temporary, dir) = dir();
        age(&write(&dir, &snapshot("gone", 1)), MAX_AGE + Duration::from_secs(60));
        age(&write(&dir, &snapshot("idle", 1)), MAX_AGE - Duration::from_secs(60));
        let part = |name: &str, instance: u64| format!("{}.{instance:016x}.part", file_stem(&key(name)));
        let cut_off = dir.path.join(part("cut off", 1));
        fs::write(&cut_off, "half").unwrap();
        age(&cut_off, MAX_PART_AGE + Duration::from_secs(60));
        fs::write(dir.path.join(part("under way", 2)), "under way").unwrap();

        assert_eq!(loaded(&dir).0, [snapshot("idle", 1)]);

        assert_eq!(names(&dir), [file_name(&key("idle")), part("under way", 2)]);
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
