//! A router under load, for those who look at it while it works.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use e2e::cache::Cache;
use e2e::engines::{ENGINE_MODEL, Engines};
use e2e::envoy::{Balancing, Envoy};
use e2e::load::{self, Target};
use e2e::router::{Router, RouterOptions};
use e2e::service::lasting_addresses;
use e2e::sim::driver::TimeModel;
use e2e::sim::engine::EngineOptions;
use e2e::sim::{SimOptions, tokenizer};
use e2e::workload::{Workload, WorkloadOptions};
use e2e::{fetch, router};
use tempfile::TempDir;
use tokio::task::JoinSet;

/// Engines that are simulated.
pub(crate) const N_ENGINES: usize = 4;
/// Conversations that last longer than any test; what is left of them is dropped.
const N_CONVERSATIONS: usize = 2000;

/// Everything, in the order in which it is to end.
pub(crate) struct Live {
    _load: JoinSet<()>,
    _envoy: Envoy,
    pub(crate) router: Option<Router>,
    pub(crate) engines: Engines,
    pub(crate) binary: PathBuf,
    addresses: [SocketAddr; 2],
    options: RouterOptions,
    pub(crate) dir: TempDir,
}

impl Live {
    /// Conversations on four engines, with this in the router's environment.
    pub(crate) async fn start(env: &[(&str, &str)]) -> Self {
        let dir = TempDir::new().unwrap();
        let engines = engines();
        let mut options = RouterOptions::new(engines.addresses());
        options.env = env.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect();
        let programs = tokio::task::spawn_blocking(|| {
            (fetch::envoy(&Cache::from_env().unwrap()).unwrap(), router::binary().unwrap())
        });
        let (envoy, binary) = programs.await.unwrap();
        // A router that comes back finds its ports free.
        let addresses = lasting_addresses().unwrap();
        let router = Router::start_at(&binary, dir.path(), &options, addresses).await.unwrap();
        let balancing = Balancing::Warmroute(router.extproc(), options.gateway);
        let envoy = Envoy::start(&envoy, dir.path(), balancing, &engines.http()).await.unwrap();
        let target = Target { url: format!("http://{}", envoy.address()), model: ENGINE_MODEL.to_owned() };
        let mut load = JoinSet::new();
        load.spawn(async move {
            load::run(target, Arc::new(workload()), Arc::new(AtomicUsize::new(0))).await.unwrap();
        });
        Self { _load: load, _envoy: envoy, router: Some(router), engines, binary, addresses, options, dir }
    }

    /// The admin port.
    pub(crate) fn admin(&self) -> String {
        format!("http://{}", self.addresses[1])
    }

    /// Ends the router, as an upgrade does.
    pub(crate) async fn stop_router(&mut self) {
        self.router.take().unwrap().stop().await.unwrap();
    }

    /// Starts it again where it was.
    pub(crate) async fn restart_router(&mut self) {
        let router = Router::start_at(&self.binary, self.dir.path(), &self.options, self.addresses).await.unwrap();
        self.router = Some(router);
    }
}

fn engines() -> Engines {
    let engine = EngineOptions { max_model_len: 4096, max_num_batched_tokens: 2048, ..EngineOptions::default() };
    let time = TimeModel { prefill_tokens_per_second: 20_000.0, decode_step: Duration::from_millis(10) };
    Engines::simulated(N_ENGINES, &SimOptions { engine, time, ..SimOptions::default() }).unwrap()
}

/// Conversations with shared system prompts.
fn workload() -> Workload {
    Workload::generate(WorkloadOptions {
        seed: 1,
        n_conversations: N_CONVERSATIONS,
        n_users: 8,
        n_turns: 4,
        n_shared_prompts: 2,
        system_words: 400,
        opening_words: 300,
        question_words: 60,
        answer_tokens: 12,
        think: Duration::from_millis(600),
        words: (0..tokenizer::N_WORDS).map(tokenizer::word).collect(),
    })
}
