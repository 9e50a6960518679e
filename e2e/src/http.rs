//! The harness' HTTP client: no proxies, and TLS only where a server insists, since everything listens on the loopback
//! address.

use std::time::Duration;

use anyhow::{Context, Result};
use axum::http;
use axum::http::header::CONTENT_TYPE;
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use reqwest::Certificate;
use warmroute::engine::plain_http;

/// A client without a deadline of its own.
///
/// # Panics
/// When the system can't give it a resolver.
pub fn client() -> reqwest::Client {
    build(plain_http())
}

/// A client that gives each request `timeout`.
///
/// # Panics
/// As [`client`].
pub fn client_with_timeout(timeout: Duration) -> reqwest::Client {
    build(plain_http().timeout(timeout))
}

/// A client that trusts one authority (PEM), and gives each request `timeout`.
///
/// # Errors
/// When this is no certificate.
pub fn client_with_authority(certificate: &str, timeout: Duration) -> Result<reqwest::Client> {
    let certificate = Certificate::from_pem(certificate.as_bytes()).context("no certificate in PEM")?;
    Ok(build(plain_http().timeout(timeout).tls_certs_only([certificate])))
}

/// Posts JSON over HTTP/2 without TLS, as proxies do; what is answered, without its body.
///
/// # Errors
/// When there is no answer.
pub async fn post_http2(url: &str, json: String) -> Result<http::response::Parts> {
    let client = Client::builder(TokioExecutor::new()).http2_only(true).build_http::<axum::body::Body>();
    let request = http::Request::post(url).header(CONTENT_TYPE, "application/json").body(json.into())?;
    let response = client.request(request).await.with_context(|| format!("no answer of {url} over HTTP/2"))?;
    Ok(response.into_parts().0)
}

fn build(builder: reqwest::ClientBuilder) -> reqwest::Client {
    builder.build().expect("a client whose certificates were read needs only a resolver")
}
