//! The file that a configuration comes from, and the environment that overrides it.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::{Config, Error};

/// Far more than any configuration.
const MOST_BYTES: u64 = 4 << 20;

/// Where a configuration is read from, once or again. The environment is that of the start: nobody changes it in a
/// running process, and what it overrides then it overrides for ever.
#[derive(Clone, Debug)]
pub struct ConfigFile {
    path: PathBuf,
    env: Vec<(String, String)>,
}

/// The file cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read {path:?}")]
pub struct ReadError {
    /// The file.
    pub path: PathBuf,
    /// The system's reason.
    #[source]
    pub source: io::Error,
}

impl ConfigFile {
    /// The file at `path`, under the variables of this process.
    pub fn of_process(path: &Path) -> Self {
        // Variables that are not UTF-8 cannot be ours: every setting is text.
        let env =
            std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
        Self::new(path, env)
    }

    /// The file at `path`, under these variables.
    pub fn new(path: &Path, env: impl IntoIterator<Item = (String, String)>) -> Self {
        Self { path: path.to_owned(), env: env.into_iter().collect() }
    }

    /// The path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The whole text.
    ///
    /// # Errors
    /// [`ReadError`] when the file cannot be read, is larger than any configuration, or is not UTF-8.
    pub fn read(&self) -> Result<String, ReadError> {
        let error = |source| ReadError { path: self.path.clone(), source };
        let mut text = String::new();
        let n_bytes = File::open(&self.path).map_err(error)?.take(MOST_BYTES + 1).read_to_string(&mut text);
        if n_bytes.map_err(error)? as u64 > MOST_BYTES {
            return Err(error(io::Error::new(io::ErrorKind::FileTooLarge, format!("more than {MOST_BYTES} bytes"))));
        }
        Ok(text)
    }

    /// The settings that `text` makes.
    ///
    /// # Errors
    /// As [`Config::parse`].
    pub fn parse(&self, text: &str) -> Result<Config, Error> {
        Config::parse(text, self.env.iter().cloned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_configuration_by_its_size_or_bytes_cannot_be_read() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = ConfigFile::new(&dir.path().join("config.yaml"), []);
        let write = |bytes: &[u8]| std::fs::write(file.path(), bytes).expect("written");
        assert_eq!(file.read().expect_err("no file").source.kind(), io::ErrorKind::NotFound);
        write(&[0xff]);
        assert_eq!(file.read().expect_err("not text").source.kind(), io::ErrorKind::InvalidData);
        write(&vec![b'\n'; MOST_BYTES as usize + 1]);
        assert_eq!(file.read().expect_err("too large").source.kind(), io::ErrorKind::FileTooLarge);
        write(b"log: {}");
        assert_eq!(file.read().expect("text"), "log: {}");
    }

    #[test]
    fn the_environment_holds_at_every_reading() {
        let env = [("WARMROUTE_LOG_FILTER".to_owned(), "debug".to_owned())];
        let file = ConfigFile::new(Path::new("unread"), env);
        let models = "models: [{name: m, discovery: {static: [{address: 1.1.1.1:1}]}}]";
        for filter in ["info", "warn"] {
            let config = file.parse(&format!("log: {{filter: {filter}}}\n{models}")).expect("valid");
            assert_eq!(config.log.filter, "debug");
        }
    }
}
