//! The file that is written, and the older one.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
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

/// A record on disk that does not outgrow its limit.
pub(super) struct RecordFile {
    path: PathBuf,
    max_bytes: u64,
    config: Config,
    file: File,
    n_bytes: u64,
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
            numbers: Numbers::new(config.key.as_ref()),
            config: config.clone(),
        })
    }

    /// Whether it is what `config` asks for.
    pub(super) fn is_of(&self, config: &Config) -> bool {
        self.config == *config
    }

    /// Writes the lines; those that no file of this size holds are left out. Says how many were written.
    pub(super) fn write(&mut self, lines: &[Line]) -> io::Result<usize> {
        let (mut text, mut n_written) = (Vec::new(), 0);
        for line in lines {
            let start = text.len();
            self.add(line, &mut text);
            if self.n_bytes + text.len() as u64 > self.max_bytes || self.numbers.are_full() {
                text.truncate(start);
                self.append(&text)?;
                *self = Self::begin(&self.path, &self.config)?;
                text.clear();
                self.add(line, &mut text);
                if text.len() as u64 > self.max_bytes {
                    text.clear();
                    continue;
                }
            }
            n_written += 1;
        }
        self.append(&text)?;
        Ok(n_written)
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
        self.file.write_all(text)?;
        self.n_bytes += text.len() as u64;
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

    #[test]
    fn lines_have_the_fields_of_a_mooncake_trace_and_ours() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("record.jsonl");
        let mut file = RecordFile::begin(&path, &config(1 << 20, None)).expect("a file");
        let lines = [line(7, "m", &[900, 901, 902]), line(9, "m", &[900, 901, 777]), line(9, "n", &[900])];
        assert_eq!(file.write(&lines).expect("written"), 3);
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
            assert_eq!(file.write(&[line(at, "m", &[at])]).expect("written"), 1);
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
        assert_eq!(file.write(&lines).expect("written"), 10);
        assert_eq!(rows(&older).len() + rows(&path).len(), 10);
        let huge: Vec<u64> = (0..1_000).collect();
        assert_eq!(file.write(&[line(0, "m", &huge), line(1, "m", &[1])]).expect("written"), 1, "no file holds it");
        assert_eq!(rows(&path).len(), 1);
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
            file.write(&[line(0, "m", &blocks)]).expect("written");
        }
        let (first, second) = (ids(&rows(&older)[0]), ids(&rows(&path)[0]));
        assert_eq!(first[1], second[0]);
        assert!(first[0] != second[0] && first[0] != second[1]);
        assert!(first.iter().all(|number| ![1, 2, 3].contains(number)), "a number is no block hash");
    }
}
