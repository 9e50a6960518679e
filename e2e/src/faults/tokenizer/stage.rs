//! What stands behind Envoy in these scenarios, and who is asked for tokens.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use serde_json::json;

use crate::cache::Cache;
use crate::engines::ENGINE_MODEL;
use crate::load::Target;
use crate::publisher::process::Talker;
use crate::router::{self, EngineAddress, Router, RouterOptions};
use crate::sim::driver::TimeModel;
use crate::sim::engine::EngineOptions;
use crate::sim::fault::TokenizeFault;
use crate::sim::{SimOptions, Simulator};
use crate::stack::Stack;

pub(super) const N_ENGINES: usize = 4;

/// Who is asked for tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    /// The engines that serve.
    Engines,
    /// `tokenizer.endpoint`, an engine that does nothing else.
    OwnEndpoint,
    /// The same, in a process of its own.
    OwnProcess,
}

/// Engines, router and Envoy.
pub(super) struct Stage {
    stack: Stack,
    engines: Vec<Simulator>,
    endpoint: Option<Simulator>,
    process: Option<Process>,
}

/// A tokenizer in a process of its own.
struct Process {
    binary: PathBuf,
    address: SocketAddr,
    talker: Talker,
}

impl Stage {
    /// Starts all of it; `binary` is this harness's program.
    pub(super) async fn start(name: &str, asked: Asked, binary: &Path) -> Result<Self> {
        // Before anything is timed.
        tokio::task::spawn_blocking(router::binary).await.context("building the router panicked")??;
        let logs = Cache::from_env()?.root().join("logs");
        let dir = logs.join(format!("faults-{}-tokenizer-{name}", std::process::id()));
        std::fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let engines = (0..N_ENGINES).map(|_| Simulator::start(engine())).collect::<Result<Vec<_>>>()?;
        let endpoint = (asked == Asked::OwnEndpoint).then(|| Simulator::start(engine())).transpose()?;
        let process = (asked == Asked::OwnProcess).then(|| Process::start(binary, None)).transpose()?;
        let own = endpoint.as_ref().map(Simulator::address).or(process.as_ref().map(|process| process.address));
        let url = own.map(|address| format!("http://{address}"));
        let addresses = engines.iter().map(EngineAddress::from).collect();
        let tokenizer = Some(match url {
            Some(url) => json!({"kind": "remote", "endpoint": url}),
            None => json!({"kind": "remote"}),
        });
        let stack = Stack::start(&dir, &RouterOptions { tokenizer, ..RouterOptions::new(addresses) }).await?;
        Ok(Self { stack, engines, endpoint, process })
    }

    /// Where the load goes.
    pub(super) fn target(&self) -> Target {
        Target { url: self.stack.url(""), model: ENGINE_MODEL.to_owned() }
    }

    pub(super) fn router(&self) -> Result<&Router> {
        self.stack.router.as_ref().context("the router was stopped")
    }

    /// Has the first `n_engines` engines answer `/tokenize` like this, and the endpoint of its own if there is one.
    pub(super) fn tell(&self, n_engines: usize, fault: TokenizeFault) {
        for engine in self.engines.iter().take(n_engines).chain(&self.endpoint) {
            engine.tokenize().set(fault);
        }
    }

    /// Sends the process a signal.
    pub(super) fn signal(&self, signal: Signal) -> Result<()> {
        self.process.as_ref().context("there is no process of its own")?.talker.signal(signal)
    }

    /// Kills the process: nobody listens at its address any more.
    pub(super) fn kill_process(&mut self) -> Result<()> {
        self.process.as_mut().context("there is no process of its own")?.talker.kill()
    }

    /// Starts another one at the address of the first.
    pub(super) fn start_process(&mut self) -> Result<()> {
        let Process { binary, address, .. } = self.process.take().context("there is no process of its own")?;
        self.process = Some(Process::start(&binary, Some(address))?);
        Ok(())
    }
}

impl Process {
    fn start(binary: &Path, address: Option<SocketAddr>) -> Result<Self> {
        let mut command = Command::new(binary);
        command.arg("tokenizer").args(address.map(|address| address.to_string()));
        let talker = Talker::start(&mut command)?;
        let said = talker.hear()?;
        let address = said.parse().with_context(|| format!("the tokenizer says {said:?}, expected its address"))?;
        Ok(Self { binary: binary.to_owned(), address, talker })
    }
}

/// Fast enough that a prompt that has to be computed anew does not look like a wait for its tokens.
fn engine() -> SimOptions {
    SimOptions {
        engine: EngineOptions { n_blocks: 8000, max_model_len: 8192, ..EngineOptions::default() },
        time: TimeModel { prefill_tokens_per_second: 1e6, decode_step: Duration::from_millis(5) },
        ..SimOptions::default()
    }
}
