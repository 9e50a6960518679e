//! The settings of [`EngineClient`](super::EngineClient), and the certificates that they name.

use std::fmt::{self, Display};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use reqwest::Certificate;
use serde::Serialize;

use super::Base;

/// How the engines of a model are reached over HTTP.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Access {
    /// `http` or `https`, default `http`. With `https` an endpoint's certificate must name its IP address.
    pub scheme: Scheme,
    /// PEM file with the certificates that an engine's may be signed by; null: those of the system. Needs `https`.
    pub ca: Option<PathBuf>,
    /// File with the key that goes into `authorization: Bearer …`; null: none. It is read again when it changes.
    pub api_key_file: Option<PathBuf>,
}

impl Access {
    /// How a server with a URL of its own is reached in the engines' place: over its own scheme, with the engines' key,
    /// and with their certificates where it needs any.
    pub fn of_base(&self, base: &Base) -> Self {
        Self { scheme: base.scheme(), ..self.clone() }
    }
}

/// `http` or `https`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Scheme {
    /// Without TLS.
    #[default]
    Http,
    /// With TLS.
    Https,
}

impl FromStr for Scheme {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "http" => Ok(Self::Http),
            "https" => Ok(Self::Https),
            _ => Err(()),
        }
    }
}

impl Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Http => "http",
            Self::Https => "https",
        })
    }
}

/// A file of the settings cannot be used. What is in it is never part of the message.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It is not there, or not ours to read.
    #[error("{} cannot be read: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The system's reason, which is part of the message because a fault of the configuration is one line.
        source: std::io::Error,
    },
    /// It is not what it should be.
    #[error("{} holds {found}, expected {expected}", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// What is in it.
        found: &'static str,
        /// What should be in it.
        expected: &'static str,
    },
}

/// The certificates in a PEM file.
///
/// # Errors
/// [`FileError`] when it cannot be read, or holds no certificate or one that is none.
pub fn read_ca(path: &Path) -> Result<Vec<Certificate>, FileError> {
    let unusable =
        |found| FileError::Unusable { path: path.to_owned(), found, expected: "PEM certificates (BEGIN CERTIFICATE)" };
    let pem = std::fs::read(path).map_err(|source| FileError::Unreadable { path: path.to_owned(), source })?;
    let certificates = Certificate::from_pem_bundle(&pem).map_err(|_| unusable("something else"))?;
    if certificates.is_empty() {
        return Err(unusable("no certificate"));
    }
    Ok(certificates)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_without_certificates_is_refused_by_name() {
        let path = std::env::temp_dir().join(format!("warmroute-ca-{}", std::process::id()));
        std::fs::write(&path, "not a certificate").expect("a temporary file");
        let refused = read_ca(&path).expect_err("no certificate").to_string();
        std::fs::remove_file(&path).expect("it is there");
        let missing = read_ca(&path).expect_err("no file").to_string();
        assert!(refused.contains("warmroute-ca-") && refused.contains("expected PEM certificates"), "{refused}");
        assert!(missing.contains("cannot be read: No such file"), "{missing}");
    }
}
