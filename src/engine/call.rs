//! One HTTP call as a span of the request that it is made for.
//!
//! The span is a client's (OpenTelemetry's semantic conventions for HTTP), and the engine is told of it: its own spans, if
//! it makes any, are below ours. Calls that are made for no request, or for one that is not sampled, have none.

use opentelemetry::propagation::{Injector, TextMapPropagator as _};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use reqwest::Request;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use tracing::field::Empty;
use tracing::{Span, info_span};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

use super::Error;

/// The span of a call; disabled where there is none.
pub(super) struct CallSpan(Span);

impl CallSpan {
    /// Opens the span of a call of `path`, and adds its trace context to the request.
    pub(super) fn open(request: &mut Request, path: &str) -> Self {
        if Span::current().is_disabled() {
            return Self(Span::none());
        }
        let url = request.url();
        let span = info_span!(
            "POST",
            otel.name = format!("{} {path}", request.method()),
            otel.kind = "client",
            http.request.method = request.method().as_str(),
            url.full = url.as_str(),
            url.template = path,
            server.address = url.host_str(),
            server.port = url.port_or_known_default().map(i64::from),
            http.response.status_code = Empty,
            error.type = Empty,
            otel.status_code = Empty,
        );
        TraceContextPropagator::new().inject_context(&span.context(), &mut Headers(request.headers_mut()));
        Self(span)
    }

    /// The span, for the call to be made within it.
    pub(super) fn span(&self) -> Span {
        self.0.clone()
    }

    /// Notes how the call ended. One that is given up has no end to tell of.
    pub(super) fn ended<T>(&self, result: &Result<T, Error>) {
        match result {
            Ok(_) => {
                self.0.record("http.response.status_code", 200_i64);
            }
            Err(error) => {
                self.0.record("otel.status_code", "error");
                match error {
                    Error::Status(status) => {
                        self.0.record("http.response.status_code", i64::from(*status));
                        self.0.record("error.type", tracing::field::display(status));
                    }
                    Error::TooLarge(_) => {
                        self.0.record("http.response.status_code", 200_i64);
                        self.0.record("error.type", "too_large");
                    }
                    Error::Unreachable(_) => {
                        self.0.record("error.type", "unreachable");
                    }
                }
            }
        }
    }
}

/// Writes the trace context into the request's headers.
struct Headers<'a>(&'a mut HeaderMap);

impl Injector for Headers<'_> {
    fn set(&mut self, key: &str, value: String) {
        if let (Ok(name), Ok(value)) = (HeaderName::try_from(key), HeaderValue::try_from(value)) {
            self.0.insert(name, value);
        }
    }
}
