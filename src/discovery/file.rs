//! Endpoints from a file that is read again and again.
//!
//! The whole file is read and compared each time: a ConfigMap is changed by swapping a symlink to a directory two levels
//! up, which neither the file's own inode nor a watch on it tells, and a file of endpoints is small. One that cannot be
//! read, or does not hold a list of endpoints, leaves the endpoints as they were; one that is being written is left alone
//! until it stays the same.

use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio_util::sync::CancellationToken;

use super::listed::Listed;
use super::outage::Outage;
use super::{OnUpdate, Update};

/// Far more than the endpoints of any pool.
const MOST_BYTES: u64 = 4 << 20;

/// A file that has changed is looked at again after so long: half of a file may be a list, too.
const SETTLED: Duration = Duration::from_millis(50);

/// Reads a list of endpoints, or says what is wrong with it.
pub type Parse = Arc<dyn Fn(&str) -> Result<Vec<Listed>, String> + Send + Sync>;

/// The background task of one pool.
pub struct File {
    /// The file.
    pub path: PathBuf,
    /// Time between two reads.
    pub interval: Duration,
    /// Understands it.
    pub parse: Parse,
    /// Takes the listings.
    pub on_update: OnUpdate,
    /// The model, for the log.
    pub model: Arc<str>,
}

#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{} cannot be read", path.display())]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error("{} has more than {MOST_BYTES} bytes", path.display())]
    TooLarge { path: PathBuf },
    #[error("{} is not a list of endpoints: {fault}", path.display())]
    Nonsense { path: PathBuf, fault: String },
}

impl Failure {
    fn as_str(&self) -> &'static str {
        match self {
            Self::Unreadable { .. } => "unreadable",
            Self::TooLarge { .. } => "too_large",
            Self::Nonsense { .. } => "nonsense",
        }
    }
}

impl File {
    /// Reads until `shutdown`.
    ///
    /// # Errors
    /// None.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), Infallible> {
        let Self { path, interval, parse, mut on_update, model } = self;
        let mut reader = Reader { path, parse, known: None };
        let mut outage = Outage::new(model);
        let reading = async {
            loop {
                match reader.read().await {
                    Ok(update) => {
                        outage.ended();
                        on_update(update);
                    }
                    Err(failure) => {
                        outage.failed(&failure);
                        on_update(Update::Failed(failure.as_str()));
                    }
                }
                tokio::time::sleep(interval).await;
            }
        };
        let _: Option<Infallible> = shutdown.run_until_cancelled(reading).await;
        Ok(())
    }
}

struct Reader {
    path: PathBuf,
    parse: Parse,
    /// The text that was listed last.
    known: Option<String>,
}

impl Reader {
    async fn read(&mut self) -> Result<Update, Failure> {
        let text = self.text().await?;
        if self.known.as_ref() == Some(&text) {
            return Ok(Update::Confirmed);
        }
        tokio::time::sleep(SETTLED).await;
        if self.text().await? != text {
            return Ok(Update::Confirmed);
        }
        let listed = (self.parse)(&text).map_err(|fault| Failure::Nonsense { path: self.path.clone(), fault })?;
        self.known = Some(text);
        Ok(Update::Listed(listed))
    }

    async fn text(&self) -> Result<String, Failure> {
        let unreadable = |source| Failure::Unreadable { path: self.path.clone(), source };
        let file = tokio::fs::File::open(&self.path).await.map_err(unreadable)?;
        let mut text = String::new();
        file.take(MOST_BYTES + 1).read_to_string(&mut text).await.map_err(unreadable)?;
        if text.len() as u64 > MOST_BYTES { Err(Failure::TooLarge { path: self.path.clone() }) } else { Ok(text) }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    /// Lines with addresses.
    fn parse() -> Parse {
        Arc::new(|text| {
            let listed =
                |line: &str| line.parse().map(|address| Listed::at(address, Vec::new())).map_err(|_| line.into());
            text.lines().map(listed).collect()
        })
    }

    fn reader(path: PathBuf) -> Reader {
        Reader { path, parse: parse(), known: None }
    }

    fn ports(update: Result<Update, Failure>) -> Vec<u16> {
        match update {
            Ok(Update::Listed(listed)) => listed.iter().map(|listed| listed.address.port()).collect(),
            other => panic!("expected a listing, found {other:?}"),
        }
    }

    #[tokio::test]
    async fn a_file_is_listed_when_it_has_changed() {
        let dir = tempfile::TempDir::new().expect("a directory");
        let path = dir.path().join("endpoints");
        let mut reader = reader(path.clone());
        assert_eq!(reader.read().await.expect_err("no file").as_str(), "unreadable");
        fs::write(&path, "1.1.1.1:1").expect("written");
        assert_eq!(ports(reader.read().await), [1]);
        assert_eq!(reader.read().await.expect("the same"), Update::Confirmed);
        // Of the same length, and perhaps of the same time.
        fs::write(&path, "1.1.1.1:2").expect("written");
        assert_eq!(ports(reader.read().await), [2]);
        fs::write(&path, "").expect("written");
        assert_eq!(ports(reader.read().await), [] as [u16; 0], "an empty list is a list");
    }

    #[tokio::test]
    async fn the_swap_of_a_config_map_is_seen() {
        let dir = tempfile::TempDir::new().expect("a directory");
        let at = |name: &str| dir.path().join(name);
        for (version, text) in [("..1", "1.1.1.1:1"), ("..2", "1.1.1.1:2")] {
            fs::create_dir(at(version)).expect("made");
            fs::write(at(version).join("endpoints"), text).expect("written");
        }
        symlink("..1", at("..data")).expect("linked");
        symlink("..data/endpoints", at("endpoints")).expect("linked");
        let mut reader = reader(at("endpoints"));
        assert_eq!(ports(reader.read().await), [1]);
        symlink("..2", at("..data_tmp")).expect("linked");
        fs::rename(at("..data_tmp"), at("..data")).expect("swapped");
        assert_eq!(ports(reader.read().await), [2]);
    }

    #[tokio::test]
    async fn a_broken_file_is_a_failure_each_time_until_it_is_mended() {
        let dir = tempfile::TempDir::new().expect("a directory");
        let path = dir.path().join("endpoints");
        let mut reader = reader(path.clone());
        fs::write(&path, "1.1.1.1:1").expect("written");
        assert_eq!(ports(reader.read().await), [1]);
        fs::write(&path, "oops").expect("written");
        for _ in 0..2 {
            assert_eq!(reader.read().await.expect_err("broken").as_str(), "nonsense");
        }
        fs::write(&path, [0xff]).expect("written");
        assert_eq!(reader.read().await.expect_err("not text").as_str(), "unreadable");
        fs::write(&path, vec![b'\n'; 5 << 20]).expect("written");
        assert_eq!(reader.read().await.expect_err("too large").as_str(), "too_large");
        fs::write(&path, "1.1.1.1:1").expect("written");
        assert_eq!(reader.read().await.expect("mended"), Update::Confirmed, "what was listed is what is there");
    }

    #[tokio::test]
    async fn the_task_ends_at_shutdown() {
        let shutdown = CancellationToken::new();
        let (sender, mut updates) = tokio::sync::mpsc::unbounded_channel();
        let file = File {
            path: "/nonexistent/endpoints".into(),
            interval: Duration::from_millis(1),
            parse: parse(),
            on_update: Box::new(move |update| sender.send(update).expect("the test listens")),
            model: "tiny".into(),
        };
        let running = tokio::spawn(file.run(shutdown.clone()));
        for _ in 0..2 {
            assert_eq!(updates.recv().await, Some(Update::Failed("unreadable")));
        }
        shutdown.cancel();
        running.await.expect("no panic").expect("no error");
    }
}
