//! A simulated vLLM server: the real cache rules, event stream and HTTP surface, without a model.
//!
//! [`pool`] and [`engine`] are plain computation: the block pool and the scheduler, whose events equal
//! those recorded from vLLM 0.32 for the same requests (`tests/sim/captures.rs`). [`driver`] gives each step the
//! time that a GPU would need; [`publisher`] is the ZMQ side and `http` the OpenAI side.
//!
//! ```text
//! http ── Command ──▶ driver { engine { sequence, pool } } ── batches ──▶ publisher ──▶ PUB, ROUTER
//!      ◀── Sampled ──
//! ```
//!
//! [`fault`] makes its `/tokenize` fail while everything else goes on.
//!
//! What it does not have: several KV-cache groups, data-parallel ranks, offloading, multimodal prompts.

mod answer;
pub mod api;
pub mod driver;
pub mod engine;
pub mod event;
mod exposition;
pub mod fault;
mod http;
pub mod pool;
pub mod publisher;
mod sequence;
pub mod tokenizer;

use std::collections::HashMap;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread::JoinHandle;

use anyhow::{Context, Result, ensure};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use self::api::Served;
use self::driver::{Driver, Snapshot, TimeModel};
use self::engine::{Engine, EngineOptions};
use self::event::WireHash;
use self::fault::TokenizeControl;
use self::publisher::{Publisher, PublisherOptions};

pub use self::sequence::{Adapter, CacheRead, NewRequest, ReportMode, RequestId};

/// Requests that may wait between the HTTP server and the engine's loop.
const COMMAND_QUEUE: usize = 1024;

/// Everything about one simulated server.
#[derive(Clone, Debug)]
pub struct SimOptions {
    /// HTTP address; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Event sockets.
    pub events: PublisherOptions,
    /// `--served-model-name`.
    pub model: String,
    /// `--lora-modules`: name and path of each adapter.
    pub adapters: Vec<(String, String)>,
    /// Cache and scheduler.
    pub engine: EngineOptions,
    /// Speed.
    pub time: TimeModel,
    /// Form of the hashes in events.
    pub wire_hash: WireHash,
}

impl Default for SimOptions {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            events: PublisherOptions::default(),
            model: "tiny".to_owned(),
            adapters: Vec::new(),
            engine: EngineOptions::default(),
            time: TimeModel::default(),
            wire_hash: WireHash::default(),
        }
    }
}

/// A running simulated server.
///
/// It has a thread and a runtime of its own, so that stopping it ends every connection, as the end of a
/// process would: open answers are cut and kept-alive connections closed.
#[derive(Debug)]
pub struct Simulator {
    address: SocketAddr,
    endpoint: String,
    replay_endpoint: String,
    snapshot: watch::Receiver<Snapshot>,
    tokenize: TokenizeControl,
    shutdown: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

impl Simulator {
    /// Binds all sockets and starts the server.
    ///
    /// # Errors
    /// When an address cannot be bound, or when the cache cannot hold one prompt of the greatest length.
    pub fn start(options: SimOptions) -> Result<Self> {
        let engine = &options.engine;
        let n_usable = engine.n_blocks.saturating_sub(1) * engine.block_size as usize;
        ensure!(
            engine.max_model_len <= n_usable,
            "max_model_len={} does not fit into the cache of {n_usable} tokens",
            engine.max_model_len
        );
        let listener = TcpListener::bind(options.listen);
        let listener = listener.with_context(|| format!("cannot listen on {}", options.listen))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let (topic, buffer_steps) = (options.events.topic.clone(), options.events.buffer_steps);
        let publisher = Publisher::start(options.events)?;
        let endpoint = publisher.endpoint().to_owned();
        let replay_endpoint = publisher.replay_endpoint().to_owned();

        let (sender, commands) = mpsc::channel(COMMAND_QUEUE);
        let (snapshot_sender, snapshot) = watch::channel(Snapshot::default());
        let driver = Driver {
            engine: Engine::new(options.engine.clone())?,
            time: options.time,
            publisher,
            wire_hash: options.wire_hash,
            commands,
            snapshot: snapshot_sender,
            clients: HashMap::new(),
        };
        let tokenize = TokenizeControl::default();
        let router = http::router(http::Api {
            served: served(options.model, options.adapters, options.engine.max_model_len),
            options: options.engine,
            commands: sender,
            snapshot: snapshot.clone(),
            endpoint: endpoint.clone(),
            replay_endpoint: replay_endpoint.clone(),
            topic,
            buffer_steps,
            tokenize: tokenize.clone(),
        });
        let shutdown = CancellationToken::new();
        let thread = spawn(listener, router, driver, shutdown.clone())?;
        Ok(Self { address, endpoint, replay_endpoint, snapshot, tokenize, shutdown, thread: Some(thread) })
    }

    /// HTTP address, with its real port.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// PUB socket's address.
    pub fn events(&self) -> &str {
        &self.endpoint
    }

    /// ROUTER socket's address.
    pub fn replay(&self) -> &str {
        &self.replay_endpoint
    }

    /// Makes its `/tokenize` fail, and counts the calls.
    pub fn tokenize(&self) -> &TokenizeControl {
        &self.tokenize
    }

    /// What its metrics show now.
    pub fn snapshot(&self) -> Snapshot {
        *self.snapshot.borrow()
    }
}

impl Drop for Simulator {
    fn drop(&mut self) {
        self.shutdown.cancel();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            eprintln!("a simulated engine panicked");
        }
    }
}

fn spawn(
    listener: TcpListener,
    router: axum::Router,
    driver: Driver,
    shutdown: CancellationToken,
) -> Result<JoinHandle<()>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let listener = {
        let _entered = runtime.enter();
        tokio::net::TcpListener::from_std(listener)?
    };
    let body = async move {
        let server = axum::serve(listener, router);
        tokio::select! {
            () = driver.run(shutdown) => {}
            result = async { server.await } => eprintln!("HTTP server of a simulated engine ended: {result:?}"),
        }
    };
    let thread = std::thread::Builder::new().name("sim-engine".to_owned());
    Ok(thread.spawn(move || runtime.block_on(body))?)
}

fn served(model: String, adapters: Vec<(String, String)>, max_model_len: usize) -> Served {
    let adapters = adapters.into_iter().zip(1..);
    let adapters = adapters.map(|((name, path), id)| Arc::new(Adapter { id, name, path })).collect();
    Served { model, adapters, max_model_len }
}
