//! The engines behind a run: simulated ones or real vLLM servers.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use serde_json::json;
use tokio::task::JoinSet;

use crate::router::EngineAddress;
use crate::sim::{SimOptions, Simulator};
use crate::vllm::{MODEL, VllmOptions, VllmServer};

/// The model that both kinds serve.
pub const ENGINE_MODEL: &str = MODEL;

/// The engines of one run.
#[derive(Debug)]
pub enum Engines {
    /// Simulated ones in this process.
    Simulated(Vec<Simulator>),
    /// vLLM servers.
    Vllm(Vec<VllmServer>),
}

impl Engines {
    /// Starts `n_engines` equal simulated engines on free ports.
    ///
    /// # Errors
    /// When one does not start.
    pub fn simulated(n_engines: usize, options: &SimOptions) -> Result<Self> {
        let started = (0..n_engines).map(|_| Simulator::start(options.clone()));
        Ok(Self::Simulated(started.collect::<Result<_>>()?))
    }

    /// Starts `n_engines` equal vLLM servers at once, each on a core of its own; takes a minute or two.
    ///
    /// # Errors
    /// When one does not start.
    pub async fn vllm(n_engines: usize, options: &VllmOptions) -> Result<Self> {
        let mut starting = JoinSet::new();
        for core in 0..n_engines {
            starting.spawn(VllmServer::start(VllmOptions { core: Some(core), ..options.clone() }));
        }
        Ok(Self::Vllm(starting.join_all().await.into_iter().collect::<Result<_>>()?))
    }

    /// Where they are, as the router is told.
    pub fn addresses(&self) -> Vec<EngineAddress> {
        match self {
            Self::Simulated(engines) => engines.iter().map(EngineAddress::from).collect(),
            Self::Vllm(servers) => servers.iter().map(vllm_address).collect(),
        }
    }

    /// Their HTTP addresses.
    pub fn http(&self) -> Vec<SocketAddr> {
        self.addresses().iter().map(|engine| engine.http).collect()
    }

    /// Empties all caches and has the engines say so: the event waits for a step, so each gets a tiny request.
    ///
    /// # Errors
    /// When an engine refuses.
    pub async fn reset(&self) -> Result<()> {
        let client = crate::http::client();
        for address in self.http() {
            let post = |path: &str| client.post(format!("http://{address}{path}"));
            post("/reset_prefix_cache").send().await?.error_for_status().context("cannot empty the cache")?;
            let step = json!({"prompt": "the", "max_tokens": 1});
            post("/v1/completions").json(&step).send().await?.error_for_status().context("cannot make a step")?;
        }
        Ok(())
    }
}

impl From<&Simulator> for EngineAddress {
    fn from(engine: &Simulator) -> Self {
        Self { http: engine.address(), events: engine.events().to_owned(), replay: engine.replay().to_owned() }
    }
}

fn vllm_address(server: &VllmServer) -> EngineAddress {
    EngineAddress { http: server.addr(), events: server.events(), replay: server.replay() }
}
