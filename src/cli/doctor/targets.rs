//! Whom to look at, and what is expected of them: from the command line and the configuration.

use std::net::{IpAddr, SocketAddr};

use super::observe::chain;
use super::{Error, Options};
use crate::config::{Config, Discovery, Model, ZmqEndpoint};
use crate::discovery::event_sources::RankSource;
use crate::engine::{Access, Base};

/// One engine to look at.
#[derive(Clone, Debug)]
pub(super) struct EngineTarget {
    /// Where it is asked.
    pub(super) http: Base,
    /// Its address, at which its events are looked for; why there is none.
    pub(super) ip: Result<IpAddr, String>,
    /// `--events` and `--replay`.
    pub(super) events: Option<ZmqEndpoint>,
    pub(super) replay: Option<ZmqEndpoint>,
    /// What the configuration says of its ranks.
    pub(super) configured: Vec<RankSource>,
}

/// The model of the configuration that the engines are to serve; none without a configuration.
pub(super) fn configured<'a>(config: Option<&'a Config>, name: Option<&str>) -> Result<Option<&'a Model>, Error> {
    let Some(config) = config else { return Ok(None) };
    let has_name = |model: &&Model, name: &str| *model.name == *name || model.aliases.iter().any(|alias| alias == name);
    let found = match (name, config.models.as_slice()) {
        (Some(name), models) => models.iter().find(|model| has_name(model, name)),
        (None, [model]) => Some(model),
        (None, _) => None,
    };
    let names = || config.models.iter().map(|model| model.name.to_string()).collect::<Vec<_>>().join(", ");
    found.map(Some).ok_or_else(|| Error::Model { found: name.map(str::to_owned), expected: names() })
}

/// How the engines are reached, each over the scheme of its URL.
pub(super) fn access(options: &Options, model: Option<&Model>) -> Access {
    let mut access = model.map(|model| model.engine.clone()).unwrap_or_default();
    if let Some(path) = &options.api_key_file {
        access.api_key_file = Some(path.clone());
    }
    if let Some(path) = &options.ca {
        access.ca = Some(path.clone());
    }
    access
}

/// The engines: those of the command line, else those that the configuration lists.
pub(super) async fn targets(options: &Options, model: Option<&Model>) -> Result<Vec<EngineTarget>, Error> {
    let n_engines = options.engine.len();
    if options.events.len() > n_engines || options.replay.len() > n_engines {
        return Err(Error::Unpaired { n_engines, n_events: options.events.len(), n_replays: options.replay.len() });
    }
    let listed = match model.map(|model| &model.discovery) {
        Some(Discovery::Static(endpoints)) => endpoints.as_slice(),
        Some(_) | None => &[],
    };
    let listed: Vec<_> = listed.iter().map(crate::config::StaticEndpoint::listed).collect();
    if n_engines == 0 {
        let scheme = model.map(|model| model.engine.scheme).unwrap_or_default();
        let targets = listed.into_iter().map(|endpoint| EngineTarget {
            http: base(&format!("{scheme}://{}", endpoint.address)),
            ip: Ok(endpoint.address.ip()),
            events: None,
            replay: None,
            configured: endpoint.sources,
        });
        return Some(targets.collect()).filter(|targets: &Vec<_>| !targets.is_empty()).ok_or(Error::NoEngine);
    }
    let mut targets = Vec::new();
    for (engine_idx, engine) in options.engine.iter().enumerate() {
        let address = look_up(engine).await;
        let sources = listed.iter().find(|endpoint| address.as_ref() == Ok(&endpoint.address));
        targets.push(EngineTarget {
            http: engine.clone(),
            ip: address.map(|address| address.ip()),
            events: options.events.get(engine_idx).cloned(),
            replay: options.replay.get(engine_idx).cloned(),
            configured: sources.map(|endpoint| endpoint.sources.clone()).unwrap_or_default(),
        });
    }
    Ok(targets)
}

fn base(text: &str) -> Base {
    text.parse().expect("a scheme and an address are a URL")
}

async fn look_up(engine: &Base) -> Result<SocketAddr, String> {
    let url = reqwest::Url::parse(&engine.to_string()).expect("it was read as a URL before");
    let host = url.host_str().unwrap_or_default().to_owned();
    let port = url.port_or_known_default().unwrap_or_default();
    let addresses = tokio::net::lookup_host(format!("{host}:{port}")).await;
    let found = addresses.map_err(|error| format!("{host} cannot be looked up: {}", chain(&error)))?.next();
    found.ok_or_else(|| format!("{host} has no address"))
}
