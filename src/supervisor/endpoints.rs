//! Puts the pools together: their endpoints, how these are asked, and the sources of events that follow from it.

use std::sync::Arc;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{Error, Tasks, tokenizers};
use crate::config::{self, Config, StaticEndpoint};
use crate::discovery::adapters::{self, ListAdapters};
use crate::discovery::ask::{self, Ask};
use crate::discovery::event_sources::RankSource;
use crate::discovery::fixed::{EndpointIds, endpoint_set};
use crate::discovery::scrape::Scrape;
use crate::discovery::{Finding, OnFinding};
use crate::engine::EngineClient;
use crate::events::apply::ModelSettings;
use crate::events::socket::{EventPlane, Source};
use crate::extproc::decide::{Pool, Pools};
use crate::extproc::report::Reports;
use crate::routing::endpoint::{Endpoint, EndpointSet};
use crate::routing::index::{PromiseLimits, Promises};
use crate::telemetry::metrics::Metrics;
use crate::tokenizer::Tokenizer;

/// The pools, and what feeds them.
#[derive(Default)]
pub(super) struct BuiltPools {
    pub(super) pools: Pools,
    pub(super) endpoints: Vec<(Arc<str>, watch::Receiver<Arc<EndpointSet>>)>,
    pub(super) senders: Vec<watch::Sender<Arc<EndpointSet>>>,
    /// What asks the endpoints about themselves, to be started when all else stands.
    listing: Vec<ListAdapters>,
    asking: Vec<Ask>,
    scraping: Vec<Scrape>,
    /// By model.
    pub(super) tokenizers: Vec<(Arc<str>, Arc<Tokenizer>)>,
}

impl BuiltPools {
    /// Builds the pools of a configuration and follows the events that it names.
    pub(super) fn new(config: &Config, metrics: &Arc<Metrics>, events: &Arc<EventPlane>) -> Result<Self, Error> {
        let mut built = Self::default();
        let mut ids = EndpointIds::default();
        for model in &config.models {
            built.add(model, config.limits.body_bytes, &mut ids, metrics, events)?;
        }
        Ok(built)
    }

    fn add(
        &mut self,
        model: &config::Model,
        body_bytes: usize,
        ids: &mut EndpointIds,
        metrics: &Arc<Metrics>,
        events: &Arc<EventPlane>,
    ) -> Result<(), Error> {
        let client = EngineClient::new(&model.engine).map_err(Error::Engine)?;
        let listed = &model.discovery.fixed;
        let set = Arc::new(endpoint_set(listed.iter().map(|endpoint| endpoint.address), ids));
        let follower =
            Arc::new(Follower { settings: settings(model), events: events.clone(), metrics: metrics.clone() });
        if model.events.sync {
            for (endpoint, listed) in set.endpoints.iter().zip(listed) {
                follower.follow(endpoint, configured_sources(listed));
            }
        }
        metrics.add_model(&model.name);
        metrics.set_endpoints(&model.name, set.endpoints.len());
        let (sender, endpoints) = watch::channel(set);
        if model.events.sync {
            self.watch_events(model, &client, &endpoints, follower);
        }
        let listing =
            ListAdapters { endpoints: endpoints.clone(), client: client.clone(), interval: adapters::INTERVAL };
        self.listing.push(listing);
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
            learned: Promises::new(PromiseLimits::LEARNED),
        });
        self.pools.add(&pool, &model.aliases, model.default);
        self.endpoints.push((model.name.clone(), endpoints));
        self.senders.push(sender);
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

    /// Starts asking the endpoints about themselves.
    pub(super) fn spawn(&mut self, tasks: &mut Tasks, shutdown: &CancellationToken) {
        for listing in self.listing.drain(..) {
            tasks.spawn("discovery-adapters", listing.run(shutdown.clone()));
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

/// The ranks of an endpoint as the configuration has them; the reader of the configuration has seen that each has a
/// port.
fn configured_sources(listed: &StaticEndpoint) -> Vec<RankSource> {
    let source = |rank| {
        let of_rank = |base: &config::ZmqEndpoint| Some(base.of_rank(rank)?.as_str().to_owned());
        let events = of_rank(listed.events.as_ref()?)?;
        Some(RankSource { rank, events, replay: listed.replay.as_ref().and_then(of_rank) })
    };
    (0..listed.ranks).filter_map(source).collect()
}

/// Turns what is known of a model's endpoints into sources of events.
struct Follower {
    settings: Arc<ModelSettings>,
    events: Arc<EventPlane>,
    metrics: Arc<Metrics>,
}

impl Follower {
    fn take(&self, endpoint: &Endpoint, finding: Finding) {
        match finding {
            Finding::Sources(sources) => self.follow(endpoint, sources),
            Finding::Refused(n) => self.metrics.count_event_sources_refused(&self.settings.model, n as u64),
            Finding::Cleared => self.events.cleared(endpoint.id),
            Finding::Restarted => self.events.suspect(endpoint.id),
        }
    }

    fn follow(&self, endpoint: &Endpoint, sources: Vec<RankSource>) {
        endpoint.ranks.set(sources.iter().map(|source| source.rank));
        let source = |RankSource { rank, events, replay }| Source {
            endpoint: endpoint.id,
            address: endpoint.address,
            events,
            replay,
            rank,
            endpoint_knowledge: endpoint.knowledge.clone(),
            model: self.settings.clone(),
        };
        self.events.reconcile(endpoint.id, sources.into_iter().map(source).collect());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configured_ranks_are_on_ports_after_the_first() {
        let endpoint = |tcp: &str| Some(tcp.parse().expect("a ZMQ endpoint"));
        let address = ([127, 0, 0, 1], 8000).into();
        let listed = StaticEndpoint { address, events: endpoint("tcp://h:1"), replay: endpoint("tcp://h:5"), ranks: 2 };
        let source = |rank, events: &str, replay: &str| RankSource {
            rank,
            events: events.to_owned(),
            replay: Some(replay.to_owned()),
        };
        assert_eq!(
            configured_sources(&listed),
            [source(0, "tcp://h:1", "tcp://h:5"), source(1, "tcp://h:2", "tcp://h:6")]
        );
        let silent = StaticEndpoint { address, events: None, replay: None, ranks: 1 };
        assert_eq!(configured_sources(&silent), []);
    }
}
