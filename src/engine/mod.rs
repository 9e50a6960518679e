//! How an engine is asked over HTTP: its scheme, whose certificates are believed, and the key that it wants.
//!
//! One [`EngineClient`] per model serves everything that warmroute asks an engine: `/tokenize`, `/kv_event_sources`,
//! `/metrics` and `/v1/models`. It dials the endpoint's address itself, without proxies and without following redirects, since the
//! address is the endpoint's identity; with `https` the certificate must therefore name that IP address. An answer has
//! a status, a size and, through the caller's budget, a time that it must keep.
//!
//! A server that tokenizes in the engines' place has a URL of its own ([`Base`]), whose host may be a name. It is asked
//! as they are, the key included: a client for it is made from [`Access::of_base`].
//!
//! vLLM's `--api-key` guards `/v1` and its like, hence the list of adapters and none of the others (0.32.0,
//! `entrypoints/serve`), but gateways and sidecars in front of an engine guard everything.

mod access;
mod call;
mod key;
mod target;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use reqwest::{Body, ClientBuilder, Method, Request, RequestBuilder, Response, StatusCode, header};
use tracing::Instrument as _;

pub use access::{Access, FileError, Scheme, read_ca};
use call::CallSpan;
pub use key::{ApiKey, read_key};
pub use target::{Base, BaseError, Target};

/// An idle connection is kept this long: shorter than uvicorn's keep-alive of 5 s (vLLM's default), so that a call
/// never races with the server's closing of the connection.
const IDLE: Duration = Duration::from_secs(4);

/// Asks the engines of one model.
#[derive(Clone, Debug)]
pub struct EngineClient {
    http: reqwest::Client,
    scheme: Scheme,
    key: Option<Arc<ApiKey>>,
}

/// The client cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A file of the settings cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// TLS cannot be set up, as when the system has no certificates and the settings name none.
    #[error("cannot set up the HTTP client")]
    Client(#[source] reqwest::Error),
}

/// An engine did not answer as it should.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It could not be reached, or broke off.
    #[error("the endpoint did not answer")]
    Unreachable(#[source] reqwest::Error),
    /// It answered with another status than 200.
    #[error("the endpoint answered with status {0}, expected 200")]
    Status(u16),
    /// Its answer is larger than it may be.
    #[error("the answer is larger than {0} bytes")]
    TooLarge(usize),
}

/// What is sent with a question that is not only a path.
#[derive(Clone, Debug, Default)]
pub struct Question {
    /// The body.
    pub json: Vec<u8>,
    /// Headers beside those that every question has.
    pub headers: Vec<(&'static str, String)>,
}

/// An answer with what stands beside its body.
#[derive(Clone, Debug)]
pub struct Examined {
    /// HTTP status.
    pub status: u16,
    /// The `date` header.
    pub date: Option<String>,
    /// The body.
    pub body: Vec<u8>,
}

impl EngineClient {
    /// A client for engines that are reached as `access` says.
    ///
    /// # Errors
    /// [`BuildError`] when a file cannot be used or TLS cannot be set up.
    pub fn new(access: &Access) -> Result<Self, BuildError> {
        let builder = match (access.scheme, &access.ca) {
            (Scheme::Http, _) => plain_http(),
            (Scheme::Https, Some(ca)) => direct().tls_certs_only(read_ca(ca)?),
            (Scheme::Https, None) => direct(),
        };
        let builder = builder.pool_idle_timeout(IDLE).tcp_nodelay(true);
        let key = access.api_key_file.as_deref().map(ApiKey::read).transpose()?;
        let http = builder.build().map_err(BuildError::Client)?;
        Ok(Self { http, scheme: access.scheme, key: key.map(Arc::new) })
    }

    /// The body of `GET path`.
    ///
    /// # Errors
    /// [`Error`], also when the body has more than `limit` bytes. The caller bounds the time.
    pub async fn get(&self, endpoint: SocketAddr, path: &str, limit: usize) -> Result<Vec<u8>, Error> {
        self.exchange(self.request(Method::GET, &endpoint.into(), path), path, limit).await
    }

    /// The body of the answer to `POST path` with a JSON body.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub async fn post_json(
        &self,
        target: &Target,
        path: &str,
        json: impl Into<Body>,
        limit: usize,
    ) -> Result<Vec<u8>, Error> {
        let request = self.request(Method::POST, target, path);
        let request = request.header(header::CONTENT_TYPE, "application/json").body(json);
        self.exchange(request, path, limit).await
    }

    /// Sends the request and reads the answer, as a span where there is one of a request above it.
    async fn exchange(&self, request: RequestBuilder, path: &str, limit: usize) -> Result<Vec<u8>, Error> {
        let mut request = self.with_key(request).await.build().map_err(Error::Unreachable)?;
        let call = CallSpan::open(&mut request, path);
        let answer = async { body(self.send(request).await?, limit).await };
        let result = answer.instrument(call.span()).await;
        call.ended(&result);
        result
    }

    /// The whole answer to a question, whatever its status is, for those who examine a server and not only use it. A
    /// question with a JSON body is a `POST`, one without a `GET`.
    ///
    /// # Errors
    /// [`Error`], but not for a status. The caller bounds the time.
    pub async fn examine(
        &self,
        target: &Target,
        path: &str,
        question: Option<Question>,
        limit: usize,
    ) -> Result<Examined, Error> {
        let request = match question {
            None => self.request(Method::GET, target, path),
            Some(Question { json, headers }) => {
                let request = self.request(Method::POST, target, path).header(header::CONTENT_TYPE, "application/json");
                headers.iter().fold(request.body(json), |request, (name, value)| request.header(*name, value))
            }
        };
        let request = self.with_key(request).await.build().map_err(Error::Unreachable)?;
        let response = self.http.execute(request).await.map_err(Error::Unreachable)?;
        let date = response.headers().get(header::DATE).and_then(|date| date.to_str().ok()).map(str::to_owned);
        let status = response.status().as_u16();
        Ok(Examined { status, date, body: body(response, limit).await? })
    }

    fn request(&self, method: Method, target: &Target, path: &str) -> RequestBuilder {
        let url = match target {
            Target::Endpoint(address) => format!("{}://{address}{path}", self.scheme),
            Target::Base(base) => format!("{base}{path}"),
        };
        self.http.request(method, url)
    }

    async fn with_key(&self, request: RequestBuilder) -> RequestBuilder {
        match &self.key {
            Some(key) => request.header(header::AUTHORIZATION, key.bearer().await),
            None => request,
        }
    }

    async fn send(&self, request: Request) -> Result<Response, Error> {
        let response = self.http.execute(request).await.map_err(Error::Unreachable)?;
        match response.status() {
            StatusCode::OK => Ok(response),
            other => Err(Error::Status(other.as_u16())),
        }
    }
}

async fn body(mut response: Response, limit: usize) -> Result<Vec<u8>, Error> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(Error::Unreachable)? {
        if body.len() + chunk.len() > limit {
            return Err(Error::TooLarge(limit));
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

/// A client that dials `http` addresses themselves, by way of no proxy and no redirect. It looks for no certificates:
/// it needs none, and an image may have none, which would be an error.
pub fn plain_http() -> ClientBuilder {
    direct().tls_certs_only([])
}

fn direct() -> ClientBuilder {
    install_tls();
    reqwest::Client::builder().redirect(reqwest::redirect::Policy::none()).no_proxy()
}

/// Names the process's provider of cryptography. reqwest is built without one of its own, since its default needs
/// more than a C compiler to build, and refuses to make any client, even for `http`, before one is named.
pub fn install_tls() {
    // An error only says that there is one already.
    let _ = rustls::crypto::ring::default_provider().install_default();
}
