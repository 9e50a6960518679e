//! The harness' HTTP client: no proxies and no TLS, since everything listens on the loopback address.

use std::time::Duration;

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

fn build(builder: reqwest::ClientBuilder) -> reqwest::Client {
    builder.build().expect("a client without TLS needs only a resolver")
}
