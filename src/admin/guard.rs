//! Who may look: what shows more than health and metrics asks for a bearer token, where one is configured.
//!
//! Probes and scrapes ask for nothing, since the kubelet and Prometheus are given no secrets of ours. Neither does the
//! page at `/`: a browser sends no token with an address, and the page itself says nothing; what it shows it asks for.
//! Whatever else there is, or will be, is guarded without being listed.

use std::sync::Arc;

use axum::Router;
use axum::extract::Request;
use axum::http::header::{AUTHORIZATION, WWW_AUTHENTICATE};
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response};

use crate::engine::ApiKey;

/// What nobody needs a token for.
const OPEN: [&str; 4] = ["/metrics", "/livez", "/readyz", "/"];
/// Files of the page.
const PAGE: &str = "/page.";

/// Lets requests with the token pass; without a token, all of them.
#[derive(Clone, Debug, Default)]
pub struct Guard {
    token: Option<Arc<ApiKey>>,
}

impl Guard {
    /// Asks for `token`, if there is one.
    pub fn new(token: Option<Arc<ApiKey>>) -> Self {
        Self { token }
    }

    /// The routes behind it.
    pub(super) fn before(self, routes: Router) -> Router {
        let Some(token) = self.token else { return routes };
        routes.layer(from_fn(move |request: Request, next: Next| {
            let token = token.clone();
            async move {
                if is_open(request.uri().path()) || has_token(request.headers(), &token).await {
                    return next.run(request).await;
                }
                refused()
            }
        }))
    }
}

fn is_open(path: &str) -> bool {
    OPEN.contains(&path) || path.starts_with(PAGE)
}

async fn has_token(headers: &HeaderMap, token: &ApiKey) -> bool {
    let Some(value) = headers.get(AUTHORIZATION) else { return false };
    let Some((scheme, found)) = value.as_bytes().split_at_checked("bearer ".len()) else { return false };
    let expected = token.bearer().await;
    scheme.eq_ignore_ascii_case(b"bearer ") && is_equal(found, &expected.as_bytes()["bearer ".len()..])
}

/// Takes as long for one wrong byte as for another, so that nobody finds the token byte by byte.
fn is_equal(found: &[u8], expected: &[u8]) -> bool {
    let difference = found.iter().zip(expected).fold(0, |difference, (a, b)| difference | (a ^ b));
    found.len() == expected.len() && std::hint::black_box(difference) == 0
}

fn refused() -> Response {
    let sentence = "this needs the bearer token of admin.token_file\n";
    (StatusCode::UNAUTHORIZED, [(WWW_AUTHENTICATE, "Bearer")], sentence).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_equal_tokens_are_equal() {
        for (found, expected, is_same) in [
            ("abc", "abc", true),
            ("abd", "abc", false),
            ("ab", "abc", false),
            ("abcd", "abc", false),
            ("", "a", false),
        ] {
            assert_eq!(is_equal(found.as_bytes(), expected.as_bytes()), is_same, "{found} {expected}");
        }
    }

    #[test]
    fn health_metrics_and_the_page_are_open_and_nothing_else_is() {
        for path in ["/metrics", "/livez", "/readyz", "/", "/page.js", "/page.css"] {
            assert!(is_open(path), "{path}");
        }
        let guarded = ["/sources", "/snapshots", "/explain", "/overview", "/metrics/", "//", "/unknown", "/decisions"];
        for path in guarded {
            assert!(!is_open(path), "{path}");
        }
    }
}
