//! A TCP proxy between a subscriber and a publisher that knows ZMTP 3.x, so that its faults act on whole messages.
//!
//! `frames` finds the messages in a stream, `rules` says what becomes of each, `connection` moves the bytes, and
//! [`Proxy`] is the handle by which a test changes the faults while traffic flows. What random faults hit follows from
//! a seed and the order of the messages.
//!
//! Message faults (drop, duplicate, truncate, corrupt) hit messages from the publisher alone, never ZMTP commands: a
//! handshake or a heartbeat that is lost is another fault, and a black hole has it. Delay, bandwidth and black hole act
//! both ways and on everything.

mod cli;
mod connection;
mod frames;
mod rules;

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::watch;

pub use cli::{ProxyArgs, run_proxy};
pub use rules::{Counts, Faults, Which};
use rules::{Fate, Rules};

/// Pause before a publisher that refuses is tried again on behalf of a subscriber that waits behind a black hole.
const ACCEPT_PAUSE: Duration = Duration::from_millis(10);

/// An end of a proxied connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Who connected to the proxy.
    Subscriber,
    /// Whom the proxy connected to.
    Publisher,
}

/// A running proxy. Dropping it ends its connections.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    runtime: Option<Runtime>,
}

/// What the handle and all connections share.
#[derive(Debug)]
struct Shared {
    rules: Mutex<Rules>,
    /// Whether bytes move; false is a black hole.
    flowing: watch::Sender<bool>,
    /// Counts the orders to end all connections.
    kills: watch::Sender<u64>,
    /// The last order to half-close, counted.
    half_closes: watch::Sender<(u64, Option<Side>)>,
    upstream: Mutex<SocketAddr>,
}

impl Proxy {
    /// Listens on a free port of the loopback interface, in front of `upstream`.
    ///
    /// # Errors
    /// When no port is free.
    pub fn start(upstream: SocketAddr, seed: u64) -> Result<Self> {
        Self::listen(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), upstream, seed)
    }

    /// Listens on `address`.
    ///
    /// # Errors
    /// When the address is taken.
    pub fn listen(address: SocketAddr, upstream: SocketAddr, seed: u64) -> Result<Self> {
        // A runtime of its own: tests of blocking sockets have none, and dropping it ends every connection.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("fault-proxy")
            .enable_all()
            .build()
            .context("cannot start the proxy's runtime")?;
        let listener =
            runtime.block_on(TcpListener::bind(address)).with_context(|| format!("cannot bind {address}"))?;
        let address = listener.local_addr().context("address of the proxy")?;
        let shared = Arc::new(Shared {
            rules: Mutex::new(Rules::new(seed)),
            flowing: watch::Sender::new(true),
            kills: watch::Sender::new(0),
            half_closes: watch::Sender::new((0, None)),
            upstream: Mutex::new(upstream),
        });
        runtime.spawn(accept(listener, shared.clone()));
        Ok(Self { address, shared, runtime: Some(runtime) })
    }

    /// Where subscribers connect.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// [`Self::address`] as a ZMQ endpoint.
    pub fn endpoint(&self) -> String {
        format!("tcp://{}", self.address)
    }

    /// From now on these faults; messages are counted anew.
    pub fn set(&self, faults: Faults) {
        self.shared.flowing.send_replace(!faults.blackhole);
        self.shared.rules().set(faults);
    }

    /// Ends all connections at once, those in a black hole too.
    pub fn kill(&self) {
        self.shared.kills.send_modify(|n_kills| *n_kills += 1);
    }

    /// Sends FIN to `side` of every connection and tells the other side nothing, which then talks to nobody.
    pub fn half_close(&self, side: Side) {
        self.shared.half_closes.send_modify(|(n_orders, last)| (*n_orders, *last) = (*n_orders + 1, Some(side)));
    }

    /// New connections go to `upstream`, as if its address had moved there. Standing ones stay.
    pub fn redirect(&self, upstream: SocketAddr) {
        *self.shared.upstream.lock().unwrap_or_else(PoisonError::into_inner) = upstream;
    }

    /// What was done so far.
    pub fn counts(&self) -> Counts {
        self.shared.rules().counts
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // Without waiting: the proxy may be dropped by async code, which must not block.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Shared {
    fn rules(&self) -> MutexGuard<'_, Rules> {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn upstream(&self) -> SocketAddr {
        *self.upstream.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits while there is a black hole.
    async fn flow(&self) {
        // The sender lives as long as `self`.
        let _ = self.flowing.subscribe().wait_for(|flowing| *flowing).await;
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    loop {
        match listener.accept().await {
            Ok((subscriber, _)) => {
                tokio::spawn(serve(subscriber, shared.clone()));
            }
            // Out of file descriptors, most likely: some may be free soon.
            Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
        }
    }
}

/// One connection from its first byte to its last.
async fn serve(subscriber: TcpStream, shared: Arc<Shared>) {
    let mut kills = shared.kills.subscribe();
    kills.mark_unchanged();
    shared.rules().opened();
    tokio::select! {
        result = relay(subscriber, &shared) => match result {
            Err(error) if error.kind() == ErrorKind::InvalidData => eprintln!("proxy: {error}"),
            // A peer that went away is what a proxy of faults is for.
            Ok(()) | Err(_) => {}
        },
        _ = kills.changed() => {}
    }
    shared.rules().closed();
}

async fn relay(subscriber: TcpStream, shared: &Arc<Shared>) -> std::io::Result<()> {
    shared.flow().await;
    // A refusal ends the subscriber's connection, as the closed port itself would have.
    let publisher = TcpStream::connect(shared.upstream()).await?;
    subscriber.set_nodelay(true)?;
    publisher.set_nodelay(true)?;
    connection::relay(subscriber, publisher, shared).await
}
