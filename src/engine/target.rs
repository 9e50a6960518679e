//! Who is asked over HTTP: an endpoint by its address, or a server by its URL.

use std::fmt::{self, Display};
use std::net::SocketAddr;
use std::str::FromStr;
use std::sync::Arc;

use reqwest::Url;
use serde::{Serialize, Serializer};

use super::Scheme;

/// Who is asked.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// An endpoint, over the scheme of the model's engines.
    Endpoint(SocketAddr),
    /// A server with a URL of its own, which takes the endpoints' place.
    Base(Base),
}

impl From<SocketAddr> for Target {
    fn from(address: SocketAddr) -> Self {
        Self::Endpoint(address)
    }
}

impl From<Base> for Target {
    fn from(base: Base) -> Self {
        Self::Base(base)
    }
}

impl Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Endpoint(address) => address.fmt(f),
            Self::Base(base) => base.fmt(f),
        }
    }
}

/// What stands before the paths of a server: `http://tokenizer:8000`, or with a prefix `https://gateway/tokenizer`. It
/// ends without a slash. Its host may be a name, which is looked up for each new connection.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Base {
    text: Arc<str>,
    scheme: Scheme,
}

/// A text is not a [`Base`]. The text is no part of the message: it may hold a password.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("found {found}, expected a URL such as http://tokenizer:8000")]
pub struct BaseError {
    /// What is wrong with it.
    pub found: &'static str,
}

impl Base {
    /// How it is reached, whatever the scheme of the model's engines is.
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }
}

impl FromStr for Base {
    type Err = BaseError;

    fn from_str(text: &str) -> Result<Self, BaseError> {
        let refuse = |found| Err(BaseError { found });
        let Ok(url) = Url::parse(text) else { return refuse("no URL") };
        let Ok(scheme) = url.scheme().parse() else { return refuse("a scheme that is neither http nor https") };
        if !url.username().is_empty() || url.password().is_some() {
            return refuse("a URL with a user or a password");
        }
        if url.query().is_some() || url.fragment().is_some() {
            return refuse("a URL with a query or a fragment");
        }
        Ok(Self { text: url.as_str().trim_end_matches('/').into(), scheme })
    }
}

impl Display for Base {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Serialize for Base {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_base_is_what_stands_before_a_path() {
        for (text, shown, scheme) in [
            ("http://tokenizer:8000", "http://tokenizer:8000", Scheme::Http),
            ("http://tokenizer:8000/", "http://tokenizer:8000", Scheme::Http),
            ("https://Gateway/tokenizer/", "https://gateway/tokenizer", Scheme::Https),
            ("http://10.0.0.1:80", "http://10.0.0.1", Scheme::Http),
            ("http://[::1]:8000/a/b", "http://[::1]:8000/a/b", Scheme::Http),
        ] {
            let base: Base = text.parse().expect("a base");
            assert_eq!((base.to_string().as_str(), base.scheme()), (shown, scheme), "{text}");
            assert_eq!(base.to_string().parse(), Ok(base), "{text}");
        }
    }

    #[test]
    fn what_is_no_base_is_refused_without_being_shown() {
        for (text, found) in [
            ("tokenizer:8000", "a scheme that is neither http nor https"),
            ("10.0.0.1:8000", "no URL"),
            ("", "no URL"),
            ("http://", "no URL"),
            ("ftp://tokenizer", "a scheme that is neither http nor https"),
            ("http://user@tokenizer", "a URL with a user or a password"),
            ("http://:secret@tokenizer", "a URL with a user or a password"),
            ("http://tokenizer?model=m", "a URL with a query or a fragment"),
            ("http://tokenizer/#top", "a URL with a query or a fragment"),
        ] {
            let error = text.parse::<Base>().expect_err(text);
            assert_eq!(error, BaseError { found }, "{text}");
            assert!(!error.to_string().contains("secret"));
        }
    }
}
