//! Puts the pools together: where their endpoints come from, how these are asked, and the sources of events that follow
//! from it.

use std::sync::Arc;

use kube::Client;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::publisher::{Follower, Publisher, Syncing};
use super::{Error, Tasks, tokenizers};
use crate::admin::health::Readiness;
use crate::config::{self, Config, Discovery};
use crate::discovery::adapters::{self, ListAdapters};
use crate::discovery::ask::{self, Ask};
use crate::discovery::dns::{self, Dns};
use crate::discovery::file::File;
use crate::discovery::kubernetes::{self, Kubernetes};
use crate::discovery::registry::EndpointIds;
use crate::discovery::scrape::Scrape;
use crate::discovery::{OnFinding, OnUpdate};
use crate::engine::EngineClient;
use crate::events::apply::ModelSettings;
use crate::events::socket::EventPlane;
use crate::extproc::decide::{Pool, Pools};
use crate::extproc::report::Reports;
use crate::extproc::rollout::Switch;
use crate::routing::endpoint::EndpointSet;
use crate::routing::index::{PromiseLimits, Promises};
use crate::telemetry::metrics::Metrics;
use crate::tokenizer::Tokenizer;

/// What all pools share.
pub(super) struct Shared {
    metrics: Arc<Metrics>,
    events: Arc<EventPlane>,
    ids: Arc<EndpointIds>,
    syncing: Arc<Syncing>,
    /// One way to the API server; none where no pool is found there.
    kubernetes: Option<Client>,
}

impl Shared {
    /// # Errors
    /// [`Error::Kubernetes`] when a pool is found in Kubernetes and there are no credentials. Whether the API server
    /// can be reached is another matter.
    pub(super) async fn new(
        config: &Config,
        metrics: &Arc<Metrics>,
        events: &Arc<EventPlane>,
        readiness: &Readiness,
    ) -> Result<Self, Error> {
        let needs_client = config.models.iter().any(|model| matches!(model.discovery, Discovery::Kubernetes(_)));
        let kubernetes =
            if needs_client { Some(kubernetes::infer_client().await.map_err(Error::Kubernetes)?) } else { None };
        let syncing = Syncing::new(readiness.clone(), config.models.len());
        Ok(Self { metrics: metrics.clone(), events: events.clone(), ids: Arc::default(), syncing, kubernetes })
    }
}

/// The pools, and what feeds them.
#[derive(Default)]
pub(super) struct BuiltPools {
    pub(super) pools: Pools,
    pub(super) endpoints: Vec<(Arc<str>, watch::Receiver<Arc<EndpointSet>>)>,
    /// Whose lists never change. They hold the pools' channels open: a closed one would end whoever waits for it.
    pub(super) fixed: Vec<Publisher>,
    /// What lists the endpoints, to be started when all else stands.
    listing: Vec<Listing>,
    /// What asks the endpoints about themselves.
    adapters: Vec<ListAdapters>,
    asking: Vec<Ask>,
    scraping: Vec<Scrape>,
    /// By model.
    pub(super) tokenizers: Vec<(Arc<str>, Arc<Tokenizer>)>,
}

/// A source of endpoints that changes.
enum Listing {
    Kubernetes(Kubernetes),
    Dns(Dns),
    File(File),
}

impl BuiltPools {
    /// Builds the pools of a configuration and follows the events that it names.
    pub(super) fn new(config: &Config, shared: &Shared) -> Result<Self, Error> {
        let mut built = Self::default();
        for model in &config.models {
            built.add(model, config.limits.body_bytes, shared)?;
        }
        Ok(built)
    }

    fn add(&mut self, model: &config::Model, body_bytes: usize, shared: &Shared) -> Result<(), Error> {
        let client = EngineClient::new(&model.engine).map_err(Error::Engine)?;
        let Shared { metrics, events, ids, syncing, .. } = shared;
        let follower = model.events.sync.then(|| Follower::new(settings(model), events.clone(), metrics.clone()));
        metrics.add_model(&model.name);
        let (publisher, endpoints) =
            Publisher::new(model.name.clone(), ids.clone(), follower.clone(), metrics.clone(), syncing.clone());
        self.list(model, publisher, shared)?;
        if let Some(follower) = follower {
            self.watch_events(model, &client, &endpoints, follower);
        }
        let listing =
            ListAdapters { endpoints: endpoints.clone(), client: client.clone(), interval: adapters::INTERVAL };
        self.adapters.push(listing);
        let tokenizer = Arc::new(tokenizers::build(model, client)?);
        self.tokenizers.push((model.name.clone(), tokenizer.clone()));
        let pool = Arc::new(Pool {
            model: model.name.clone(),
            adapters: configured_adapters(model),
            hasher: model.block_hash.hasher(),
            reading: tokenizers::reading(&model.tokenizer),
            tokenizer,
            endpoints: endpoints.clone(),
            reports: model.events.report.then(|| Reports::new(body_bytes)),
            sync: model.events.sync,
            predictions: Arc::default(),
            learned: Promises::new(PromiseLimits::LEARNED),
            rollout: Switch::default(),
        });
        self.pools.add(&pool, &model.aliases, model.default);
        self.endpoints.push((model.name.clone(), endpoints));
        Ok(())
    }

    fn list(&mut self, model: &config::Model, mut publisher: Publisher, shared: &Shared) -> Result<(), Error> {
        let name = model.name.clone();
        match &model.discovery {
            Discovery::Static(endpoints) => {
                publisher.list(endpoints.iter().map(config::StaticEndpoint::listed).collect());
                self.fixed.push(publisher);
            }
            Discovery::Kubernetes(settings) => self.listing.push(Listing::Kubernetes(Kubernetes {
                client: shared.kubernetes.clone().expect("there is a client where a pool is found in Kubernetes"),
                namespace: settings.namespace.clone(),
                query: settings.query(&name),
                on_update: on_update(publisher),
                model: name,
            })),
            Discovery::Dns(settings) => self.listing.push(Listing::Dns(Dns {
                resolver: dns::system_resolver().map_err(Error::Dns)?,
                name: settings.name.clone(),
                records: settings.records(),
                interval: settings.interval.0,
                events: settings.event_ports(),
                on_update: on_update(publisher),
                model: name,
            })),
            Discovery::File(settings) => self.listing.push(Listing::File(File {
                path: settings.path.clone(),
                interval: settings.interval.0,
                parse: Arc::new(config::parse_endpoints),
                on_update: on_update(publisher),
                model: name,
            })),
        }
        Ok(())
    }

    fn watch_events(
        &mut self,
        model: &config::Model,
        client: &EngineClient,
        endpoints: &watch::Receiver<Arc<EndpointSet>>,
        follower: Arc<Follower>,
    ) {
        let on_finding: OnFinding = Arc::new(move |endpoint, finding| follower.take(endpoint, finding));
        if model.events.discover {
            let (endpoints, client, on_finding) = (endpoints.clone(), client.clone(), on_finding.clone());
            self.asking.push(Ask { endpoints, client, interval: ask::INTERVAL, on_finding });
        }
        if let Some(interval) = model.events.scrape {
            let (endpoints, client) = (endpoints.clone(), client.clone());
            self.scraping.push(Scrape { endpoints, client, interval: interval.0, on_finding });
        }
    }

    /// Starts listing the endpoints, and asking them about themselves.
    pub(super) fn spawn(&mut self, tasks: &mut Tasks, shutdown: &CancellationToken) {
        for listing in self.listing.drain(..) {
            match listing {
                Listing::Kubernetes(kubernetes) => {
                    tasks.spawn("discovery-kubernetes", kubernetes.run(shutdown.clone()));
                }
                Listing::Dns(dns) => tasks.spawn("discovery-dns", dns.run(shutdown.clone())),
                Listing::File(file) => tasks.spawn("discovery-file", file.run(shutdown.clone())),
            }
        }
        for adapters in self.adapters.drain(..) {
            tasks.spawn("discovery-adapters", adapters.run(shutdown.clone()));
        }
        for ask in self.asking.drain(..) {
            tasks.spawn("discovery-ask", ask.run(shutdown.clone()));
        }
        for scrape in self.scraping.drain(..) {
            tasks.spawn("discovery-scrape", scrape.run(shutdown.clone()));
        }
        for ((_, tokenizer), (_, endpoints)) in self.tokenizers.iter().zip(&self.endpoints) {
            let endpoints = endpoints.clone();
            let addresses = move || endpoints.borrow().endpoints.iter().map(|endpoint| endpoint.address).collect();
            tasks.spawn("tokenizer", tokenizer.clone().run(addresses, shutdown.clone()));
        }
    }
}

fn on_update(mut publisher: Publisher) -> OnUpdate {
    Box::new(move |update| publisher.take(update))
}

fn settings(model: &config::Model) -> Arc<ModelSettings> {
    Arc::new(ModelSettings {
        model: model.name.clone(),
        algorithm: model.block_hash.algorithm,
        pythonhashseed: model.block_hash.pythonhashseed.clone(),
        adapters: configured_adapters(model),
        reports: model.events.report,
    })
}

/// Names and paths; an empty path is one that is not known.
fn configured_adapters(model: &config::Model) -> Vec<(Arc<str>, Arc<str>)> {
    model.adapters.iter().map(|adapter| (adapter.name.clone(), adapter.path.clone().unwrap_or_default())).collect()
}
