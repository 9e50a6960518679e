//! Asks a router's admin port, for the commands that show what it says.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use reqwest::header::{CONNECTION, CONTENT_TYPE};
use reqwest::{Client, Method, StatusCode};

use crate::admin::CONNECTION_TIMEOUT;
use crate::engine::plain_http;
use crate::snapshots::Sibling;

/// Longest wait for what the router has at hand.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest wait for a dry run: it tokenizes, which has the budget that the configuration gives it.
const DRY_RUN_TIMEOUT: Duration = CONNECTION_TIMEOUT;
/// Most characters of a refusal that are shown.
const MAX_REASON: usize = 400;

/// Which router, and what to show it.
#[derive(Debug, Args)]
// The commands' own options, in which these are, have the group that is named after the type.
#[group(id = "admin_port")]
pub struct Options {
    /// Admin port of the router, such as http://127.0.0.1:9090.
    #[arg(value_parser = router)]
    router: Sibling,
    /// File with the token that `admin.token_file` of the router asks for.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
}

fn router(text: &str) -> Result<Sibling, String> {
    text.parse().map_err(|()| "expected a URL such as http://127.0.0.1:9090, without a path".to_owned())
}

/// The router did not say what was asked for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The HTTP client or the runtime cannot be made.
    #[error("cannot set up the HTTP client")]
    Setup(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The token cannot be read.
    #[error("cannot read the token in {path:?}")]
    Token {
        /// Where it should be.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Nobody answers.
    #[error("{router} does not answer")]
    Unreachable {
        /// Whom we asked.
        router: Sibling,
        /// Why.
        #[source]
        source: reqwest::Error,
    },
    /// The token is missing or wrong.
    #[error("{router} asks for a token: give the one of its admin.token_file with --token-file")]
    Unauthorized {
        /// Whom we asked.
        router: Sibling,
    },
    /// Another answer than 200.
    #[error("{router} answers {status}: {reason}")]
    Refused {
        /// Whom we asked.
        router: Sibling,
        /// Status.
        status: StatusCode,
        /// The beginning of the answer.
        reason: String,
    },
}

/// A router that can be asked.
#[derive(Debug)]
pub struct AdminPort {
    router: Sibling,
    token: Option<String>,
    client: Client,
}

impl AdminPort {
    /// Reads the token, if there is one.
    ///
    /// # Errors
    /// When it cannot be read, or the client not be made.
    pub fn new(options: Options) -> Result<Self, Error> {
        let token = options.token_file.as_deref().map(read_token).transpose()?;
        let client = plain_http().build().map_err(|error| Error::Setup(error.into()))?;
        Ok(Self { router: options.router, token, client })
    }

    /// Its address.
    pub fn router(&self) -> &Sibling {
        &self.router
    }

    /// The body of what `path` answers.
    ///
    /// # Errors
    /// When there is no answer, or another than 200.
    pub async fn get(&self, path: &str) -> Result<String, Error> {
        self.ask(Method::GET, path, Vec::new(), ANSWER_TIMEOUT).await
    }

    /// What comes of a dry run: `path` is given a body of JSON to work on.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub async fn post(&self, path: &str, body: Vec<u8>) -> Result<String, Error> {
        self.ask(Method::POST, path, body, DRY_RUN_TIMEOUT).await
    }

    async fn ask(&self, method: Method, path: &str, body: Vec<u8>, patience: Duration) -> Result<String, Error> {
        let unreachable = |source| Error::Unreachable { router: self.router.clone(), source };
        let mut request = self.client.request(method, format!("{}{path}", self.router)).body(body).timeout(patience);
        // The port ends every connection after a minute, and one that is reused may end below a request.
        request = request.header(CONNECTION, "close").header(CONTENT_TYPE, "application/json");
        if let Some(token) = &self.token {
            request = request.bearer_auth(token);
        }
        let answer = request.send().await.map_err(unreachable)?;
        let status = answer.status();
        let text = answer.text().await.map_err(unreachable)?;
        let router = self.router.clone();
        match status {
            StatusCode::OK => Ok(text),
            StatusCode::UNAUTHORIZED => Err(Error::Unauthorized { router }),
            _ => Err(Error::Refused { router, status, reason: text.trim().chars().take(MAX_REASON).collect() }),
        }
    }
}

fn read_token(path: &Path) -> Result<String, Error> {
    let token = std::fs::read_to_string(path).map_err(|source| Error::Token { path: path.to_owned(), source })?;
    Ok(token.trim().to_owned())
}
