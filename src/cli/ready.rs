//! `warmroute ready`: whether routers take requests, for `helm test` and other places where there is no shell and no curl.
//!
//! A name may stand for many routers: each of its addresses is asked, and all of them have to be ready. A router that is
//! not says why, and its reasons are shown.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use clap::Args;

use crate::config::Human;
use crate::engine::plain_http;
use crate::snapshots::Sibling;

/// Longest wait for one router's answer: as long as a probe of the kubelet is given at most.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause between two rounds: readiness changes with what takes seconds.
const PAUSE: Duration = Duration::from_millis(500);

/// Whom to ask, and how long.
#[derive(Debug, Args)]
pub struct Options {
    /// Admin port of a router, or of all that a name stands for, such as http://warmroute-headless:9090.
    #[arg(value_parser = router)]
    routers: Sibling,
    /// Ask again for this long until all are ready, such as 60s.
    #[arg(long, value_name = "DURATION", default_value = "0s")]
    wait: Human,
}

fn router(text: &str) -> Result<Sibling, String> {
    text.parse().map_err(|()| "expected a URL such as http://warmroute-headless:9090, without a path".to_owned())
}

/// The routers are not ready.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The HTTP client or the runtime cannot be made.
    #[error("cannot set up the HTTP client")]
    Setup(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The name cannot be looked up, or has no address.
    #[error("{routers} has no address")]
    Lookup {
        /// Whom to ask.
        routers: String,
        /// Why, if the look-up failed.
        #[source]
        source: Option<io::Error>,
    },
    /// Some are not ready.
    #[error("found {}, expected every router to be ready", .0.join("; "))]
    NotReady(Vec<String>),
}

/// Asks until all routers are ready or the time is over; their addresses.
///
/// # Errors
/// [`Error`] with what was found last.
pub fn run(options: &Options) -> Result<Vec<SocketAddr>, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Error::Setup(error.into()))?;
    let client = plain_http().timeout(ANSWER_TIMEOUT).build().map_err(|error| Error::Setup(error.into()))?;
    let end = Instant::now() + options.wait.0;
    runtime.block_on(async {
        loop {
            match ask_all(&client, &options.routers).await {
                Err(_) if Instant::now() < end => tokio::time::sleep(PAUSE).await,
                result => return result,
            }
        }
    })
}

async fn ask_all(client: &reqwest::Client, routers: &Sibling) -> Result<Vec<SocketAddr>, Error> {
    let unknown = |source| Error::Lookup { routers: routers.to_string(), source };
    let looked_up = tokio::net::lookup_host((routers.host(), routers.port())).await;
    let addresses: Vec<SocketAddr> = looked_up.map_err(|error| unknown(Some(error)))?.collect();
    if addresses.is_empty() {
        return Err(unknown(None));
    }
    let mut not_ready = Vec::new();
    for address in &addresses {
        if let Err(reason) = ask(client, *address).await {
            not_ready.push(format!("{address}: {reason}"));
        }
    }
    if not_ready.is_empty() { Ok(addresses) } else { Err(Error::NotReady(not_ready)) }
}

/// What keeps a router from being ready, in its own words.
async fn ask(client: &reqwest::Client, address: SocketAddr) -> Result<(), String> {
    let answer = client.get(format!("http://{address}/readyz")).send().await.map_err(|_| "no answer".to_owned())?;
    if answer.status().is_success() {
        return Ok(());
    }
    let status = answer.status().as_u16();
    let reasons = answer.text().await.unwrap_or_default();
    Err(format!("{status} {}", reasons.split_whitespace().collect::<Vec<_>>().join(" ")))
}
