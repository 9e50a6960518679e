//! The client of the API server.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use reqwest::{Method, StatusCode};
use serde_json::Value;

use crate::http::client_with_authority;

const TIMEOUT: Duration = Duration::from_secs(30);

/// A client with the admin's token.
#[derive(Debug)]
pub(super) struct Api {
    http: reqwest::Client,
    address: SocketAddr,
    token: String,
}

impl Api {
    pub(super) fn new(address: SocketAddr, authority: &str, token: &str) -> Result<Self> {
        Ok(Self { http: client_with_authority(authority, TIMEOUT)?, address, token: token.to_owned() })
    }

    pub(super) async fn is_ready(&self) -> bool {
        let request = self.http.get(format!("https://{}/readyz", self.address)).bearer_auth(&self.token);
        request.send().await.is_ok_and(|answer| answer.status() == StatusCode::OK)
    }

    pub(super) async fn request(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Value> {
        let what = format!("{method} {path}");
        let is_patch = method == Method::PATCH;
        let mut request = self.http.request(method, format!("https://{}{path}", self.address)).bearer_auth(&self.token);
        if is_patch {
            request = request.header("content-type", "application/merge-patch+json");
        }
        if let Some(body) = body {
            // It leaves a content type that is set as it is.
            request = request.json(body);
        }
        let answer = request.send().await.with_context(|| what.clone())?;
        let status = answer.status();
        let text = answer.text().await.with_context(|| format!("{what}: answer"))?;
        ensure!(status.is_success(), "{what}: {status}: {text}");
        serde_json::from_str(&text).with_context(|| format!("{what}: {text:?} is not JSON"))
    }
}
