//! The file that is written, and the older one.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Seek, SeekFrom, Write};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::numbers::Numbers;
use super::{Config, Line};

/// One line, its first four fields as the Mooncake traces have them (`FAST25-release/traces` of kvcache-ai/Mooncake).
#[derive(Serialize)]
struct Row<'a> {
    timestamp: u64,
    input_length: u32,
    /// Nobody tells us.
    output_length: Option<u32>,
    hash_ids: Vec<u64>,
    block_size: u32,
    model: &'a str,
    matched: u32,
    endpoint: SocketAddr,
    mode: &'static str,
}

/// What became of lines.
#[derive(Debug, Default)]
pub(super) struct Written {
    /// Lines that are in a file.
    pub(super) n_written: usize,
    /// Lines that no file of the size holds.
    pub(super) n_too_long: usize,
    /// Why the others are in none.
    pub(super) failure: Option<io::Error>,
}

/// A record on disk that does not outgrow its limit. After a failure it goes on in the same file, behind the last whole
/// line: a file begun at every attempt would soon have driven out the older one.
pub(super) struct RecordFile {
    path: PathBuf,
    max_bytes: u64,
    config: Config,
    file: File,
    /// Bytes of whole lines.
    n_bytes: u64,
    /// Whether there may be a part of a line behind them.
    is_torn: bool,
    numbers: Numbers,
}

impl RecordFile {
    /// Begins a new file; what is there becomes the older one.
    pub(super) fn begin(path: &Path, config: &Config) -> io::Result<Self> {
        if path.metadata().is_ok_and(|metadata| metadata.len() > 0) {
            make_older(path)?;
        }
        Ok(Self {
            path: path.to_owned(),
            max_bytes: config.max_bytes,
            file: create(path)?,
            n_bytes: 0,
            is_torn: false,
            numbers: Numbers::new(config.key.as_ref()),
            config: config.clone(),
        })
    }

    /// Whether it is what `config` asks for.
    pub(super) fn is_of(&self, config: &Config) -> bool {
        self.config == *config
    }

    /// Writes the lines, as far as possible.
    pub(super) fn write(&mut self, lines: &[Line]) -> Written {
        let mut written = Written::default();
        written.failure = self.write_each(lines, &mut written).err();
        written
    }

    fn write_each(&mut self, lines: &[Line], written: &mut Written) -> io::Result<()> {
        let (mut text, mut n_waiting) = (Vec::new(), 0);
        for line in lines {
            let start = text.len();
            self.add(line, &mut text);
            if (text.len() - start) as u64 > self.max_bytes {
                text.truncate(start);
                written.n_too_long += 1;
                continue;
            }
            if self.n_bytes + text.len() as u64 > self.max_bytes || self.numbers.are_full() {
                text.truncate(start);
                self.append(&text)?;
                written.n_written += std::mem::take(&mut n_waiting);
                *self = Self::begin(&self.path, &self.config)?;
                text.clear();
                self.add(line, &mut text);
            }
            n_waiting += 1;
        }
        self.append(&text)?;
        written.n_written += n_waiting;
        Ok(())
    }

    fn add(&mut self, line: &Line, text: &mut Vec<u8>) {
        let row = Row {
            timestamp: line.at.0,
            input_length: line.prompt_tokens,
            output_length: None,
            hash_ids: self.numbers.of(line),
            block_size: line.block_size,
            model: &line.model,
            matched: line.matched_tokens,
            endpoint: line.endpoint,
            mode: line.mode,
        };
        serde_json::to_writer(&mut *text, &row).expect("numbers and text are JSON, and memory takes them");
        text.push(b'\n');
    }

    fn append(&mut self, text: &[u8]) -> io::Result<()> {
        if self.is_torn {
            self.mend()?;
        }
        if let Err(error) = self.file.write_all(text) {
            self.is_torn = true;
            // Where that fails too, it is tried again before the next line.
            let _ = self.mend();
            return Err(error);
        }
        self.n_bytes += text.len() as u64;
        Ok(())
    }

    /// Cuts off what is behind the last whole line.
    fn mend(&mut self) -> io::Result<()> {
        self.file.set_len(self.n_bytes)?;
        self.file.seek(SeekFrom::Start(self.n_bytes))?;
        self.is_torn = false;
        Ok(())
    }
}

/// Who may read the router's configuration need not be who may read when requests came.
fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)
}

fn make_older(path: &Path) -> io::Result<()> {
    let mut older = path.as_os_str().to_owned();
    older.push(".1");
    match std::fs::rename(path, older) {
        // Someone has taken it away meanwhile.
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::record::Key;
    use crate::routing::hash::BlockHash;
    use crate::routing::load::Millis;

    fn line(at: u64, model: &str, blocks: &[u64]) -> Line {
        Line {
            at: Millis(at),
            model: model.into(),
            prompt_tokens: 16 * blocks.len() as u32 + 5,
            block_size: 16,
            blocks: blocks.iter().copied().map(BlockHash).collect(),
            matched_tokens: 16,
            endpoint: ([10, 0, 0, 1], 8000).into(),
            mode: "shadow",
        }
    }

    fn config(max_bytes: u64, key: Option<Key>) -> Config {
        Config { path: None, max_bytes, key }
    }

    fn rows(path: &Path) -> Vec<Value> {
        let text = std::fs::read_to_string(path).expect("a record");
        text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    }

    fn ids(row: &Value) -> Vec<u64> {
        serde_json::from_value(row["hash_ids"].clone()).expect("numbers")
    }

    fn all_written(file: &mut RecordFile, lines: &[Line]) -> usize {
        let Written { n_written, n_too_long, failure } = file.write(lines);
        assert!(failure.is_none() && n_too_long == 0, "{failure:?}");
        n_written
    }

    /// A file that takes no more.
    fn full() -> File {
        OpenOptions::new().write(true).open("/dev/full").expect("Linux has it")
    }

    #[test]
    fn after_a_failure_it_goes_on_in_the_same_file_behind_the_last_whole_line() {
        let dir = tempfile::tempdir().expect("a directory");
        let (path, older) = (dir.path().join("record.jsonl"), dir.path().join("record.jsonl.1"));
        std::fs::write(&path, "{}\n").expect("written");
        let mut file = RecordFile::begin(&path, &config(1 << 20, None)).expect("a file");
        assert_eq!(all_written(&mut file, &[line(0, "m", &[1])]), 1);
        for at in 1..4 {
            let whole = std::mem::replace(&mut file.file, full());
            let Written { n_written, failure, .. } = file.write(&[line(at, "m", &[1])]);
            assert!(n_written == 0 && failure.is_some_and(|error| error.kind() == ErrorKind::StorageFull));
            file.file = whole;
            // What a disk takes of a line before it is full.
            file.file.write_all(b"{\"timestamp\":").expect("written");
            file.is_torn = true;
            assert_eq!(all_written(&mut file, &[line(10 * at, "m", &[1])]), 1);
        }
        let times: Vec<u64> = rows(&path).iter().map(|row| row["timestamp"].as_u64().expect("a time")).collect();
        assert_eq!(times, [0, 10, 20, 30]);
        assert_eq!(std::fs::read_to_string(&older).expect("the older one"), "{}\n", "it is not driven out");
    }

    #[test]
    fn lines_that_are_written_before_a_failure_count_as_written() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("record.jsonl");
        let mut file = RecordFile::begin(&path, &config(1_000, None)).expect("a file");
        // No file can take the place of a directory that is not empty.
        std::fs::create_dir_all(dir.path().join("record.jsonl.1/taken")).expect("a directory");
        let lines: Vec<Line> = (0..20).map(|at| line(at, "m", &[at])).collect();
        let Written { n_written, n_too_long, failure } = file.write(&lines);
        assert!(failure.is_some() && n_too_long == 0);
        assert!(n_written > 3 && n_written == rows(&path).len(), "{n_written}");
    }

    #[test]
    fn lines_have_the_fields_of_a_mooncake_trace_and_ours() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("record.jsonl");
        let mut file = RecordFile::begin(&path, &config(1 << 20, None)).expect("a file");
        let lines = [line(7, "m", &[900, 901, 902]), line(9, "m", &[900, 901, 777]), line(9, "n", &[900])];
        assert_eq!(all_written(&mut file, &lines), 3);
        let rows = rows(&path);
        let expected = serde_json::json!({
            "timestamp": 7, "input_length": 53, "output_length": null, "hash_ids": [0, 1, 2], "block_size": 16,
            "model": "m", "matched": 16, "endpoint": "10.0.0.1:8000", "mode": "shadow",
        });
        assert_eq!(rows[0], expected);
        assert_eq!((ids(&rows[1]), ids(&rows[2])), (vec![0, 1, 3], vec![4]), "another model's block is another one");
    }

    #[test]
    fn a_file_keeps_its_limit_and_one_older_file_stays() {
        let dir = tempfile::tempdir().expect("a directory");
        let (path, older) = (dir.path().join("record.jsonl"), dir.path().join("record.jsonl.1"));
        let mut file = RecordFile::begin(&path, &config(1_000, None)).expect("a file");
        for at in 0..100 {
            assert_eq!(all_written(&mut file, &[line(at, "m", &[at])]), 1);
            assert!(path.metadata().expect("a file").len() <= 1_000);
        }
        let (old, new) = (rows(&older), rows(&path));
        assert!(older.metadata().expect("a file").len() <= 1_000 && old.len() > 3, "{}", old.len());
        let times: Vec<u64> = old.iter().chain(&new).map(|row| row["timestamp"].as_u64().expect("a time")).collect();
        assert!(times.is_sorted() && times.last() == Some(&99), "{times:?}");
        assert!(times.windows(2).all(|pair| pair[1] == pair[0] + 1), "nothing is lost at the turn: {times:?}");
        assert_eq!((ids(&old[0]), ids(&new[0])), (vec![0], vec![0]), "each file counts for itself");
        assert_eq!(std::fs::read_dir(dir.path()).expect("a directory").count(), 2);
    }

    #[test]
    fn lines_of_one_batch_may_fall_into_two_files() {
        let dir = tempfile::tempdir().expect("a directory");
        let (path, older) = (dir.path().join("record.jsonl"), dir.path().join("record.jsonl.1"));
        let mut file = RecordFile::begin(&path, &config(1_000, None)).expect("a file");
        let lines: Vec<Line> = (0..10).map(|at| line(at, "m", &[at])).collect();
        assert_eq!(all_written(&mut file, &lines), 10);
        assert_eq!(rows(&older).len() + rows(&path).len(), 10);
        let huge: Vec<u64> = (0..1_000).collect();
        let before = (rows(&older), rows(&path).len());
        let written = file.write(&[line(0, "m", &huge), line(1, "m", &[1])]);
        assert_eq!((written.n_written, written.n_too_long), (1, 1), "no file holds it");
        assert_eq!((rows(&older), rows(&path).len()), (before.0, before.1 + 1), "nor does one make room for it");
    }

    #[test]
    fn a_restart_begins_a_new_file_and_a_key_makes_numbers_comparable() {
        let dir = tempfile::tempdir().expect("a directory");
        let (path, older) = (dir.path().join("record.jsonl"), dir.path().join("record.jsonl.1"));
        let secret = dir.path().join("key");
        std::fs::write(&secret, "0123456789abcdef").expect("written");
        let key = Key::read(&secret).expect("a key");
        for blocks in [[1, 2], [2, 3]] {
            let mut file = RecordFile::begin(&path, &config(1 << 20, Some(key.clone()))).expect("a file");
            assert_eq!(all_written(&mut file, &[line(0, "m", &blocks)]), 1);
        }
        let (first, second) = (ids(&rows(&older)[0]), ids(&rows(&path)[0]));
        assert_eq!(first[1], second[0]);
        assert!(first[0] != second[0] && first[0] != second[1]);
        assert!(first.iter().all(|number| ![1, 2, 3].contains(number)), "a number is no block hash");
    }
}
