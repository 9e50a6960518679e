//! Starts everything, watches it, and stops it in order.
//!
//! All ports are bound before anything runs, so that a port in use is an error at start and not later. Every task has a
//! name; one that ends unasked ends the process. Stopping reads top to bottom in `Running::stop`.

mod endpoints;
mod explain;
mod publisher;
mod reload;
mod tokenizers;
mod warmth;

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::task::{Id, JoinError, JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::admin::AdminState;
use crate::admin::guard::Guard;
use crate::admin::health::{Condition, Readiness};
use crate::admin::sources::{self, ReadSources};
use crate::config::{self, Alias, Config};
use crate::discovery::outage::error_chain;
use crate::engine::ApiKey;
use crate::events::socket::{EventPlane, LagObserver};
use crate::events::stats::{DECODE_FAILURES, SourceStatus};
use crate::extproc::decide::Router;
use crate::extproc::journal::Journal;
use crate::extproc::reply::Selection;
use crate::record::Recorder;
use crate::routing::endpoint::EndpointSet;
use crate::routing::index::{IndexLimits, PrefixIndex};
use crate::snapshots::Snapshots;
use crate::telemetry::LogFilter;
use crate::telemetry::metrics::{EndpointRow, EventPlaneRow, IndexRow, Metrics, SourceRow};
use crate::{discovery, engine, extproc, snapshots, telemetry};
use endpoints::{BuiltPools, Shared};
use publisher::Publisher;
pub use reload::ConfigText;
use reload::{Live, Reload};

/// Longest that the background work may take to end; snapshots at exit take 2 s at most.
const BACKGROUND_GRACE: Duration = Duration::from_secs(3);
/// Time after the start in which a source may come and claim the snapshot that is there for it.
const OFFERS_KEPT: Duration = Duration::from_secs(600);
/// Time between two sweeps of what was promised and is over.
const SWEEP_INTERVAL: Duration = Duration::from_secs(5);
/// Longest that the event threads may take to end.
const EVENTS_GRACE: Duration = Duration::from_secs(2);

/// Why the process could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A port cannot be opened.
    #[error("cannot listen on {address} ({setting})")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// The setting that names it.
        setting: &'static str,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// Logs or traces cannot be set up.
    #[error("cannot set up telemetry")]
    Telemetry(#[from] telemetry::Error),
    /// The exchange of snapshots cannot be set up.
    #[error("cannot set up the snapshots of event sources")]
    Snapshots(#[from] snapshots::Error),
    /// The engines cannot be asked over HTTP.
    #[error("cannot build the engines' HTTP client")]
    Engine(#[source] engine::BuildError),
    /// Endpoints are found in Kubernetes, and there is no way there.
    #[error("cannot discover endpoints in Kubernetes (models[].discovery.kubernetes)")]
    Kubernetes(#[source] discovery::kubernetes::ClientError),
    /// Endpoints are found by DNS, and there is nobody to ask.
    #[error("cannot discover endpoints by DNS (models[].discovery.dns)")]
    Dns(#[source] discovery::dns::NoNameServer),
    /// A model's local tokenizer cannot be used.
    #[error("cannot load the tokenizer of model {model:?} (models[].tokenizer.path)")]
    Tokenizer {
        /// The model.
        model: Arc<str>,
        /// What is wrong with its files.
        #[source]
        source: crate::tokenizer::local::LoadError,
    },
    /// The token of the admin port cannot be read any more.
    #[error("cannot read the token of the admin port (admin.token_file)")]
    Token(#[source] engine::FileError),
    /// Signals cannot be handled.
    #[error("cannot handle signals")]
    Signals(#[source] std::io::Error),
    /// A task ended although nobody asked it to.
    #[error("task {name:?} ended unasked: {reason}")]
    Task {
        /// Its name.
        name: &'static str,
        /// How it ended.
        reason: String,
    },
}

/// Runs the router until SIGTERM or SIGINT. `text` is what the configuration was read from, and is looked at again.
///
/// # Errors
/// [`Error`] when it cannot start, or when a part of it ends unasked.
pub async fn run(config: Config, text: ConfigText) -> Result<(), Error> {
    engine::install_tls();
    let telemetry = telemetry::init(&telemetry::Config {
        log_format: config.log.format,
        log_filter: config.log.filter.clone(),
        otlp_endpoint: config.trace.otlp_endpoint.clone(),
        sample_ratio: config.trace.sample_ratio,
    })?;
    let metrics = Arc::new(new_metrics(&config));
    metrics.set_span_counts(telemetry.span_counts());
    let result = serve(&config, metrics, text, telemetry.log_filter()).await;
    telemetry.shutdown().await;
    result
}

/// Signals, and what they have read again.
struct Reloading {
    hangup: Signal,
    text: ConfigText,
    log_filter: LogFilter,
}

async fn serve(config: &Config, metrics: Arc<Metrics>, text: ConfigText, log_filter: LogFilter) -> Result<(), Error> {
    let mut terminate = signal(SignalKind::terminate()).map_err(Error::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Error::Signals)?;
    // From here on SIGHUP no longer ends the process.
    let hangup = signal(SignalKind::hangup()).map_err(Error::Signals)?;
    let started = tokio::select! {
        started = Running::start(config, metrics, Reloading { hangup, text, log_filter }) => started,
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    };
    let mut running = started?;
    let ended = tokio::select! {
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
        ended = running.tasks.first_to_end() => Err(ended),
        ended = running.background.first_to_end() => Err(ended),
        ended = running.admin.first_to_end() => Err(ended),
    };
    let config::Shutdown { delay, grace } = config.shutdown;
    // Where a part of us has ended there is nothing to be served meanwhile.
    running.stop(if ended.is_ok() { delay.0 } else { Duration::ZERO }, grace.0).await;
    ended
}

/// Everything that runs.
struct Running {
    readiness: Readiness,
    /// Stops the servers of the data path.
    shutdown: CancellationToken,
    /// Stops the background work: what it writes at its end contains the last requests' events.
    shutdown_background: CancellationToken,
    /// Stops the admin port, last: until then it says that we are draining.
    shutdown_admin: CancellationToken,
    tasks: Tasks,
    background: Tasks,
    admin: Tasks,
    events: Arc<EventPlane>,
    /// Hold the pools' channels open.
    _fixed: Vec<Publisher>,
}

impl Running {
    async fn start(config: &Config, metrics: Arc<Metrics>, reloading: Reloading) -> Result<Self, Error> {
        let extproc_listener = bind(config.listen.extproc, "listen.extproc").await?;
        let admin_listener = bind(config.listen.admin, "listen.admin").await?;
        info!(
            extproc = %address_of(&extproc_listener), admin = %address_of(&admin_listener),
            version = env!("CARGO_PKG_VERSION"), "warmroute is starting"
        );
        for Alias { name, setting } in &config.aliases {
            warn!(name, setting, "a variable of AIBrix is taken for a setting of ours: use that");
        }
        let readiness = Readiness::default();
        let index =
            Arc::new(PrefixIndex::new(IndexLimits { bytes: config.limits.index_bytes, ..IndexLimits::default() }));
        let events = Arc::new(EventPlane::start_observed(&index, lag_observer(&metrics)));
        let token = read_token(&config.admin)?;
        let snapshots =
            Snapshots::load(snapshots_config(&config.events, token.clone()), events.clone(), metrics.clone()).await;
        let shared = Shared::new(config, &metrics, &events, &readiness).await?;
        let mut built = BuiltPools::new(config, &shared)?;
        observe(&metrics, &events, &built.endpoints);
        tokenizers::observe(&metrics, built.tokenizers.clone());
        observe_index(&metrics, &index, config.limits.index_bytes);

        let [shutdown, shutdown_background, shutdown_admin] = std::array::from_fn(|_| CancellationToken::new());
        let [mut tasks, mut background, mut admin] = std::array::from_fn(|_| Tasks::default());
        built.spawn(&mut tasks, &shutdown);
        let warmth = warmth::Warmth { readiness: readiness.clone(), deadline: config.readiness.warm_deadline.0 };
        background.spawn("warmth", warmth.run(warmth::states(&events), shutdown_background.clone()));
        background.spawn("offers", drop_unclaimed_offers(events.clone(), shutdown_background.clone()));
        if let Some(writer) = snapshots.writer() {
            background.spawn("snapshots", writer.run(shutdown_background.clone()));
        }
        if let Some(siblings) = snapshots.siblings()? {
            background.spawn("siblings", siblings.run(shutdown_background.clone()));
        }
        let (record, is_recorded) = watch::channel(config.rollout.record.config());
        let (recorder, writer) = Recorder::new(is_recorded, metrics.clone());
        background.spawn("record", writer.run(shutdown_background.clone()));
        let router = Router::new(built.pools, index, metrics.clone()).with_recorder(recorder);
        let router = router.with_journal(Journal::new(config.explain.decisions));
        let has_fallback = config.selection.mode.has_fallback();
        let router = Arc::new(if has_fallback { router } else { router.without_fallback() });
        let readable = config.limits.body_bytes;
        let state = AdminState {
            metrics: metrics.clone(),
            readiness: readiness.clone(),
            sources: read_sources(&events),
            guard: Guard::new(token),
        };
        let others = snapshots.routes().merge(explain::routes(&router, &events, &readiness, readable));
        admin.spawn("admin", crate::admin::run(admin_listener, state, others, shutdown_admin.clone()));
        let Reloading { hangup, text, log_filter } = reloading;
        let live = Live { router: router.clone(), log_filter, record, metrics: metrics.clone() };
        live.roll_out(config);
        background.spawn("reload", Reload::new(config, text, live).run(hangup, shutdown_background.clone()));
        let promising = router.clone();
        metrics.set_promise_collector(Box::new(move || promising.promise_rows()));
        if let Some(push) = config.metrics.push() {
            background.spawn("metrics-push", push.run(metrics.clone(), shutdown_background.clone()));
        }
        let predicting = router.clone();
        metrics.set_prediction_collector(Box::new(move || predicting.prediction_rows()));
        background.spawn("sweep", sweep_promises(router.clone(), shutdown_background.clone()));
        let serve = extproc::run(extproc_listener, extproc_config(config), router, readiness.watch(), shutdown.clone());
        tasks.spawn("extproc", serve);
        readiness.set(Condition::Serving, true);
        Ok(Self {
            readiness,
            shutdown,
            shutdown_background,
            shutdown_admin,
            tasks,
            background,
            admin,
            events,
            _fixed: built.fixed,
        })
    }

    async fn stop(mut self, delay: Duration, grace: Duration) {
        info!("stopping: no longer ready");
        self.readiness.set(Condition::NotDraining, false);
        // New streams are served as before until those who send them have heard.
        tokio::time::sleep(delay).await;
        self.shutdown.cancel();
        if tokio::time::timeout(grace, self.tasks.join_all()).await.is_err() {
            warn!(?grace, "streams were still open when the grace period ended");
            self.tasks.abort_all();
        }
        self.shutdown_background.cancel();
        if tokio::time::timeout(BACKGROUND_GRACE, self.background.join_all()).await.is_err() {
            warn!("the background work did not end within {BACKGROUND_GRACE:?}");
            self.background.abort_all();
        }
        if !stop_events(self.events.clone()).await {
            warn!("the KV event threads did not end within {EVENTS_GRACE:?}");
        }
        self.shutdown_admin.cancel();
        self.admin.join_all().await;
        info!("stopped");
    }
}

/// Gives up snapshots whose sources have not come within [`OFFERS_KEPT`].
async fn drop_unclaimed_offers(events: Arc<EventPlane>, shutdown: CancellationToken) -> Result<(), Infallible> {
    if shutdown.run_until_cancelled(tokio::time::sleep(OFFERS_KEPT)).await.is_some() {
        events.drop_unclaimed_offers();
        shutdown.cancelled().await;
    }
    Ok(())
}

/// Frees the memory of what was promised, also when nobody asks for anything any more.
async fn sweep_promises(router: Arc<Router>, shutdown: CancellationToken) -> Result<(), Infallible> {
    while shutdown.run_until_cancelled(tokio::time::sleep(SWEEP_INTERVAL)).await.is_some() {
        router.sweep();
    }
    Ok(())
}

/// Ends the event threads; false when they take too long, as libzmq does while it waits for a name server. The thread
/// that waits for them is none of the runtime's, which would wait for it in turn.
async fn stop_events(events: Arc<EventPlane>) -> bool {
    let (ended, has_ended) = tokio::sync::oneshot::channel();
    let stop = move || {
        events.stop();
        // Nobody listens any more if it took too long.
        let _ = ended.send(());
    };
    let thread = std::thread::Builder::new().name("warmroute-stop".to_owned()).spawn(stop);
    thread.is_ok() && tokio::time::timeout(EVENTS_GRACE, has_ended).await.is_ok()
}

fn extproc_config(config: &Config) -> extproc::Config {
    let config::Selection { mode, header, body_mode } = &config.selection;
    extproc::Config {
        selection: Selection { mode: *mode, header: header.clone() },
        assumed_mode: *body_mode,
        body_bytes: config.limits.body_bytes,
    }
}

/// The token of the admin port, which siblings are shown as well.
fn read_token(config: &config::Admin) -> Result<Option<Arc<ApiKey>>, Error> {
    let read = |path| ApiKey::read(path).map(Arc::new).map_err(Error::Token);
    config.token_file.as_deref().map(read).transpose()
}

fn snapshots_config(config: &config::Events, token: Option<Arc<ApiKey>>) -> snapshots::Config {
    snapshots::Config {
        dir: config.snapshots.dir.clone(),
        interval: config.snapshots.interval.0,
        siblings: config.siblings.clone(),
        token,
    }
}

fn new_metrics(config: &Config) -> Metrics {
    if config.metrics.aibrix_names { Metrics::with_aibrix_names() } else { Metrics::new() }
}

/// Lets a scrape read the index as a whole.
fn observe_index(metrics: &Metrics, index: &Arc<PrefixIndex>, limit_bytes: usize) {
    let index = index.clone();
    metrics.set_index_collector(Box::new(move || {
        let (n_bytes, n_keyspaces) = (index.n_bytes() as u64, index.n_keyspaces() as u64);
        vec![IndexRow { n_bytes, limit_bytes: limit_bytes as u64, n_keyspaces }]
    }));
}

/// Lets a scrape read what belongs to endpoints and sources from their owners.
fn observe(metrics: &Metrics, events: &Arc<EventPlane>, pools: &[(Arc<str>, watch::Receiver<Arc<EndpointSet>>)]) {
    let sources = events.clone();
    metrics.set_source_collector(Box::new(move || sources.status().into_iter().map(source_row).collect()));
    let plane = events.clone();
    metrics.set_event_plane_collector(Box::new(move || {
        vec![EventPlaneRow { n_foreign_messages: plane.n_foreign_messages(), n_replays: plane.n_replays() as u64 }]
    }));
    let pools = pools.to_vec();
    metrics.set_endpoint_collector(Box::new(move || {
        let rows = |(model, endpoints): &(Arc<str>, watch::Receiver<Arc<EndpointSet>>)| endpoint_rows(model, endpoints);
        pools.iter().flat_map(rows).collect()
    }));
}

fn lag_observer(metrics: &Arc<Metrics>) -> LagObserver {
    let metrics = metrics.clone();
    Arc::new(move |lag| metrics.observe_event_lag(lag))
}

fn source_row(status: SourceStatus) -> SourceRow {
    SourceRow {
        model: status.model,
        endpoint: status.address,
        rank: status.rank,
        state: status.state.as_str(),
        proved: !status.proved.is_empty(),
        disproved: !status.disproved.is_empty(),
        n_blocks: status.n_blocks,
        n_batches: status.n_batches,
        n_stored: status.n_stored,
        n_removed: status.n_removed,
        n_cleared: status.n_cleared,
        n_gaps: status.n_gaps,
        n_replays: status.n_replays,
        decode_failures: DECODE_FAILURES.into_iter().zip(status.decode_failures).collect(),
        n_skipped: status.n_skipped,
        n_refused: status.n_refused,
        n_quarantines: status.n_quarantines,
        n_panics: status.n_panics,
        n_generations: status.n_generations,
        lag: status.last_lag,
    }
}

/// Lets the admin port show what each source knows.
fn read_sources(events: &Arc<EventPlane>) -> ReadSources {
    let events = events.clone();
    ReadSources::new(move || events.status().iter().map(shown_source).collect())
}

fn shown_source(status: &SourceStatus) -> sources::SourceRow {
    sources::SourceRow {
        model: status.model.clone(),
        endpoint: status.address,
        rank: status.rank,
        state: status.state.as_str(),
        last_seq: status.last_seq.map(|seq| seq.0),
        n_blocks: status.digest.n_blocks,
        proved: status.proved.names(),
        generations: status.n_generations,
        gaps: status.n_gaps,
        replays: status.n_replays,
        last_event_ms: explain::last_event_ms(status),
        lag_ms: status.last_lag.map(explain::millis),
    }
}

fn endpoint_rows(model: &Arc<str>, endpoints: &watch::Receiver<Arc<EndpointSet>>) -> Vec<EndpointRow> {
    let row = |endpoint: &Arc<crate::routing::endpoint::Endpoint>| EndpointRow {
        model: model.clone(),
        endpoint: endpoint.address,
        n_in_flight: u64::from(endpoint.load.in_flight()),
    };
    endpoints.borrow().endpoints.iter().map(row).collect()
}

async fn bind(address: SocketAddr, setting: &'static str) -> Result<TcpListener, Error> {
    TcpListener::bind(address).await.map_err(|source| Error::Bind { address, setting, source })
}

fn address_of(listener: &TcpListener) -> SocketAddr {
    listener.local_addr().expect("a bound listener has an address")
}

/// The long-lived tasks, by name.
#[derive(Default)]
struct Tasks {
    set: JoinSet<Result<(), String>>,
    names: HashMap<Id, &'static str>,
}

impl Tasks {
    fn spawn<E: std::error::Error + 'static>(
        &mut self,
        name: &'static str,
        task: impl Future<Output = Result<(), E>> + Send + 'static,
    ) {
        let handle = self.set.spawn(async move { task.await.map_err(|error| error_chain(&error)) });
        self.names.insert(handle.id(), name);
    }

    /// Waits for the first task to end, which none of them should.
    async fn first_to_end(&mut self) -> Error {
        match self.set.join_next_with_id().await {
            Some(Ok((id, Ok(())))) => self.ended(id, "it returned".to_owned()),
            Some(Ok((id, Err(reason)))) => self.ended(id, reason),
            // What it panicked with is not shown: it may quote a prompt.
            Some(Err(error)) => self.ended(JoinError::id(&error), "it panicked".to_owned()),
            None => std::future::pending().await,
        }
    }

    fn ended(&self, id: Id, reason: String) -> Error {
        Error::Task { name: self.names.get(&id).copied().unwrap_or("unknown"), reason }
    }

    async fn join_all(&mut self) {
        while self.set.join_next().await.is_some() {}
    }

    fn abort_all(&mut self) {
        self.set.abort_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_task_that_panics_is_named_without_what_it_says() {
        let mut tasks = Tasks::default();
        tasks.spawn("events", async { panic!("the prompt of somebody") as Result<(), std::io::Error> });
        let error = tasks.first_to_end().await;
        let Error::Task { name, reason } = &error else { panic!("{error}") };
        assert_eq!((*name, reason.as_str()), ("events", "it panicked"));
    }
}
