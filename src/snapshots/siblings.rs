//! Asks the other replicas for what they know of sources that we know too little of.
//!
//! Once a second the states of our sources are looked at. If one of them has a need, all siblings list what they have,
//! and the snapshots that help are fetched, one at a time. A name may stand for many siblings, ourselves among them, as
//! that of a headless Service does: each of its addresses is asked, and who answers with our own number is left out.

use std::collections::BTreeSet;
use std::fmt::{self, Display};
use std::net::SocketAddr;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use reqwest::header::AUTHORIZATION;
use reqwest::{Client, Response, StatusCode, Url};
use serde::{Serialize, Serializer};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::needs::{Need, Needs, choose};
use super::serve::{INSTANCE_HEADER, Listed, Listing};
use super::{Error, InstanceId, key_of};
use crate::engine::{ApiKey, plain_http};
use crate::events::snapshot::{MAX_ENCODED_BYTES, Snapshot, SnapshotError, SourceKey};
use crate::events::socket::{EventPlane, SourceState};
use crate::telemetry::metrics::{Metrics, SnapshotStep};

/// Pause between two looks at the sources.
const LOOK: Duration = Duration::from_secs(1);
/// Longest that a name, a connection, a listing, or the next bytes of a snapshot may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// Longest that a whole snapshot may take.
const FETCH_TIMEOUT: Duration = Duration::from_secs(20);
/// Most bytes of a listing: a source takes some hundred.
const MAX_LISTING_BYTES: usize = 4 << 20;
/// Most addresses that are asked. Replicas are few; a name that resolves to more is not ours.
const MAX_SIBLINGS: usize = 32;

/// Base URL of a sibling's admin port, `http://host:port`. The host may be a name with many addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sibling {
    host: String,
    port: u16,
}

impl FromStr for Sibling {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let url: Url = text.parse().map_err(drop)?;
        let is_base = url.path() == "/" && url.query().is_none() && url.fragment().is_none();
        let is_anonymous = url.username().is_empty() && url.password().is_none();
        let (Some(host), Some(port)) = (url.host_str(), url.port_or_known_default()) else { return Err(()) };
        if url.scheme() != "http" || !is_base || !is_anonymous || port == 0 {
            return Err(());
        }
        Ok(Self { host: host.to_owned(), port })
    }
}

impl Sibling {
    /// Name or address, without brackets.
    pub fn host(&self) -> &str {
        self.host.trim_matches(['[', ']'])
    }

    /// Port.
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl Display for Sibling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}:{}", self.host, self.port)
    }
}

impl Serialize for Sibling {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// See the module.
#[derive(Debug)]
pub struct Siblings {
    siblings: Vec<Sibling>,
    token: Option<Arc<ApiKey>>,
    instance: InstanceId,
    client: Client,
    plane: Arc<EventPlane>,
    metrics: Arc<Metrics>,
    needs: Needs,
    started: Instant,
}

/// Why a sibling was of no help.
#[derive(Debug, thiserror::Error)]
enum FetchError {
    #[error("the sibling cannot be reached or broke off")]
    Unreachable(#[from] reqwest::Error),
    #[error("the sibling took longer than {0:?}")]
    Timeout(Duration),
    #[error("the sibling answered with status {0}")]
    Status(StatusCode),
    #[error("the answer is no replica's: found no header {INSTANCE_HEADER}")]
    Stranger,
    #[error("found an answer of more than {0} bytes")]
    TooLarge(usize),
    #[error("the listing is not valid")]
    Listing(#[source] serde_json::Error),
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
}

impl Siblings {
    pub(super) fn new(
        (siblings, token): (Vec<Sibling>, Option<Arc<ApiKey>>),
        instance: InstanceId,
        from_disk: &[SourceKey],
        plane: Arc<EventPlane>,
        metrics: Arc<Metrics>,
    ) -> Result<Self, Error> {
        let client = plain_http()
            .connect_timeout(PATIENCE)
            .read_timeout(PATIENCE)
            // A connection to an address that has another owner by now is not kept.
            .pool_max_idle_per_host(0)
            .build()
            .map_err(Error::Client)?;
        let needs = Needs::new(from_disk.iter().cloned());
        Ok(Self { siblings, token, instance, client, plane, metrics, needs, started: Instant::now() })
    }

    /// Asks until `shutdown`.
    ///
    /// # Errors
    /// None: a sibling that is of no help is logged and counted.
    pub async fn run(mut self, shutdown: CancellationToken) -> Result<(), std::convert::Infallible> {
        let ask = async {
            loop {
                tokio::time::sleep(LOOK).await;
                self.ask_if_needed().await;
            }
        };
        // Nothing is lost with an answer that nobody waits for.
        shutdown.run_until_cancelled(ask).await;
        Ok(())
    }

    async fn ask_if_needed(&mut self) {
        let sources: Vec<(SourceKey, SourceState)> =
            self.plane.status().iter().map(|status| (key_of(status), status.state)).collect();
        let needs = self.needs.due(self.started.elapsed(), &sources, &mut fastrand::Rng::new());
        if needs.is_empty() {
            return;
        }
        let offers = self.offers().await;
        for need in needs {
            if let Some((sibling, _)) = choose(&need, &offers).filter(|_| self.is_still_needed(&need)) {
                self.fetch(*sibling, &need.key).await;
            }
        }
    }

    /// The source may have caught up by itself while others were fetched.
    fn is_still_needed(&self, need: &Need) -> bool {
        self.plane.status().iter().any(|status| key_of(status) == need.key && status.state != SourceState::Live)
    }

    /// What all siblings have.
    async fn offers(&self) -> Vec<(SocketAddr, Listed)> {
        let listings = self.addresses().await.into_iter().map(|address| async move {
            let listed = self.list(address).await.unwrap_or_else(|error| {
                debug!(sibling = %address, %error, cause = cause(&error), "sibling lists no snapshots");
                Vec::new()
            });
            listed.into_iter().map(|listed| (address, listed)).collect::<Vec<_>>()
        });
        join_all(listings).await.into_iter().flatten().collect()
    }

    async fn addresses(&self) -> BTreeSet<SocketAddr> {
        let resolved = join_all(self.siblings.iter().map(resolve)).await;
        resolved.into_iter().flatten().take(MAX_SIBLINGS).collect()
    }

    /// What a sibling has; nothing, when it is ourselves.
    async fn list(&self, sibling: SocketAddr) -> Result<Vec<Listed>, FetchError> {
        let ask = async {
            let response = self.get(base(sibling)).await?;
            let instance = response.headers().get(&INSTANCE_HEADER).ok_or(FetchError::Stranger)?;
            if instance.as_bytes() == self.instance.to_string().as_bytes() {
                return Ok(Vec::new());
            }
            let body = read(response, MAX_LISTING_BYTES).await?;
            serde_json::from_slice(&body).map(|listing: Listing| listing.sources).map_err(FetchError::Listing)
        };
        tokio::time::timeout(PATIENCE, ask).await.unwrap_or(Err(FetchError::Timeout(PATIENCE)))
    }

    async fn fetch(&self, sibling: SocketAddr, key: &SourceKey) {
        let fetched = tokio::time::timeout(FETCH_TIMEOUT, self.snapshot(sibling, key)).await;
        match fetched.unwrap_or(Err(FetchError::Timeout(FETCH_TIMEOUT))) {
            Ok((snapshot, n_bytes)) => {
                self.metrics.count_snapshot(SnapshotStep::Fetch, n_bytes);
                let (seq, complete) = (snapshot.overlap.seq.0, snapshot.complete);
                info!(source = %key, %sibling, seq, complete, n_bytes, "KV event snapshot of a sibling is offered");
                self.plane.offer(snapshot);
            }
            Err(error) => {
                self.metrics.count_snapshot_failure(SnapshotStep::Fetch);
                warn!(source = %key, %sibling, %error, cause = cause(&error), "KV event snapshot of a sibling cannot be had");
            }
        }
    }

    async fn snapshot(&self, sibling: SocketAddr, key: &SourceKey) -> Result<(Snapshot, u64), FetchError> {
        let mut url = base(sibling);
        // Escapes the slashes of a model's name.
        url.path_segments_mut().expect("an http URL has a path").extend([
            &*key.model,
            &key.address.to_string(),
            &key.rank.to_string(),
        ]);
        let body = read(self.get(url).await?, MAX_ENCODED_BYTES).await?;
        let (key, n_bytes) = (key.clone(), body.len() as u64);
        let decode = tokio::task::spawn_blocking(move || Snapshot::decode_of(&key, &body));
        Ok((decode.await.expect("bytes, whatever they are, are no panic")?, n_bytes))
    }

    async fn get(&self, url: Url) -> Result<Response, FetchError> {
        let mut request = self.client.get(url);
        if let Some(token) = &self.token {
            request = request.header(AUTHORIZATION, token.bearer().await);
        }
        let response = request.send().await?;
        match response.status() {
            StatusCode::OK => Ok(response),
            status => Err(FetchError::Status(status)),
        }
    }
}

async fn resolve(sibling: &Sibling) -> Vec<SocketAddr> {
    // The name without the brackets of an IPv6 literal.
    let host = sibling.host();
    match tokio::time::timeout(PATIENCE, tokio::net::lookup_host((host, sibling.port))).await {
        Ok(Ok(addresses)) => addresses.collect(),
        Ok(Err(error)) => {
            debug!(%sibling, %error, "sibling has no address");
            Vec::new()
        }
        Err(_) => {
            debug!(%sibling, "the name of a sibling took too long to resolve");
            Vec::new()
        }
    }
}

fn base(sibling: SocketAddr) -> Url {
    format!("http://{sibling}/snapshots").parse().expect("an address makes a URL")
}

async fn read(mut response: Response, most: usize) -> Result<Vec<u8>, FetchError> {
    let announced = response.content_length().unwrap_or(0);
    if announced > most as u64 {
        return Err(FetchError::TooLarge(most));
    }
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await? {
        if body.len() + chunk.len() > most {
            return Err(FetchError::TooLarge(most));
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

/// The reason behind an error, for the log.
fn cause(error: &dyn std::error::Error) -> Option<String> {
    error.source().map(ToString::to_string)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_base_of_an_http_server_is_a_sibling() {
        for (given, shown) in [
            ("http://warmroute-headless:9090", "http://warmroute-headless:9090"),
            ("http://warmroute.ns.svc.cluster.local:9090/", "http://warmroute.ns.svc.cluster.local:9090"),
            ("http://10.0.0.1:9090", "http://10.0.0.1:9090"),
            ("http://[::1]:9090", "http://[::1]:9090"),
            ("http://router", "http://router:80"),
        ] {
            assert_eq!(given.parse::<Sibling>().map(|sibling| sibling.to_string()), Ok(shown.to_owned()), "{given}");
        }
        for bad in [
            "https://h:1",
            "h:9090",
            "http://h:9090/a",
            "http://h:1?a",
            "http://u:p@h:1",
            "http://:1",
            "http://h:0",
            "",
        ] {
            assert_eq!(bad.parse::<Sibling>(), Err(()), "{bad}");
        }
    }
}
