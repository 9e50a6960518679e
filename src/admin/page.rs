//! The page at `/`: what `/overview` says, live, for a browser.
//!
//! Its files are part of the program and load nothing from anywhere else. They hold no data, so they are served to
//! anyone: the page asks for the token itself when `/overview` wants one. What the router says, request ids that
//! clients chose and names that engines gave their adapters among it, is shown as text nodes; the content security
//! policy forbids scripts and styles that are not among these files, whatever a future edit gets wrong.

use axum::Router;
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use axum::routing::get;

/// `connect-src` is for the polls; nobody may show the page in a frame, where a click could be stolen.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";

/// Path, media type and content. The guard of the port lets `/` and `/page.…` pass without a token.
const FILES: [(&str, &str, &str); 7] = [
    ("/", HTML, include_str!("page/index.html")),
    ("/page.css", CSS, include_str!("page/page.css")),
    ("/page.js", SCRIPT, include_str!("page/page.js")),
    ("/page.charts.js", SCRIPT, include_str!("page/charts.js")),
    ("/page.explain.js", SCRIPT, include_str!("page/explain.js")),
    ("/page.tables.js", SCRIPT, include_str!("page/tables.js")),
    ("/page.words.js", SCRIPT, include_str!("page/words.js")),
];

/// The routes of the page; none of them needs a token.
pub fn routes() -> Router {
    FILES.iter().fold(Router::new(), |routes, &(path, media_type, content)| {
        let headers = [
            (CONTENT_TYPE, media_type),
            (CONTENT_SECURITY_POLICY, POLICY),
            (X_CONTENT_TYPE_OPTIONS, "nosniff"),
            (REFERRER_POLICY, "no-referrer"),
            // A new version of the program brings new files under the same names.
            (CACHE_CONTROL, "no-cache"),
        ];
        routes.route(path, get(move || async move { (headers, content) }))
    })
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use axum::http::{Request, StatusCode};
    use tower::ServiceExt as _;

    use super::*;

    #[tokio::test]
    async fn every_file_has_its_type_and_the_policy() {
        for (path, media_type, _) in FILES {
            let request = Request::get(path).body(Body::empty()).expect("a request");
            let answer = routes().oneshot(request).await.expect("an answer");
            assert_eq!(answer.status(), StatusCode::OK, "{path}");
            assert_eq!(answer.headers()[CONTENT_TYPE], media_type, "{path}");
            assert_eq!(answer.headers()[CONTENT_SECURITY_POLICY], POLICY, "{path}");
            assert_eq!(answer.headers()[X_CONTENT_TYPE_OPTIONS], "nosniff", "{path}");
        }
    }

    #[test]
    fn a_dry_run_is_waited_for_as_long_as_the_port_may_take() {
        let page = FILES.iter().find(|(path, ..)| *path == "/page.js").expect("it is one of them").2;
        let expected = format!("const DRY_RUN_PATIENCE_MS = {};", crate::admin::CONNECTION_TIMEOUT.as_millis());
        assert!(page.contains(&expected), "no {expected:?}");
        assert!(page.contains("patience: DRY_RUN_PATIENCE_MS"), "it is not used");
    }

    /// Everything that the files import or link is one of them, and there is nothing that the policy would refuse.
    #[test]
    fn files_name_each_other_and_nothing_else() {
        for (path, _, content) in FILES {
            for quoted in content.split("from \"").skip(1).chain(content.split("src=\"").skip(1)) {
                let (named, _) = quoted.split_once('"').expect("a closed quotation");
                assert!(FILES.iter().any(|(path, ..)| *path == named), "{path} names {named}, which is not served");
            }
            for refused in ["style=\"", "onclick=", "innerHTML", "insertAdjacentHTML", "document.write", "eval("] {
                assert!(!content.contains(refused), "{path} has {refused}");
            }
        }
    }
}
