//! The harness' HTTP client: no proxies and no TLS, since everything listens on the loopback address.

use std::time::Duration;

/// A client without a deadline of its own.
///
/// # Panics
/// When the system can't give it a resolver.
pub fn client() -> reqwest::Client {
    build(reqwest::Client::builder())
}

/// A client that gives each request `timeout`.
///
/// # Panics
/// As [`client`].
pub fn client_with_timeout(timeout: Duration) -> reqwest::Client {
    build(reqwest::Client::builder().timeout(timeout))
}

fn build(builder: reqwest::ClientBuilder) -> reqwest::Client {
    // The router's build of reqwest has TLS without a provider of cryptography, and makes no client before one is named.
    warmroute::engine::install_tls();
    builder.no_proxy().tls_certs_only([]).build().expect("a client without TLS needs only a resolver")
}
