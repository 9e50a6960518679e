//! Looks at one engine: what it says over HTTP, what it publishes, and what it publishes of a request of ours.
//!
//! The live streams stand before a request is sent, and the replay is asked for last, so that what a slow subscription
//! missed is in it. Nothing here judges.

mod http;
mod probe;
mod watch;

use std::net::IpAddr;
use std::pin::pin;
use std::time::{Duration, Instant};

use futures_util::future::join_all;

use self::http::Http;
use self::probe::Length;
use self::watch::{Dial, POLL, Watch};
use super::seen::{Asked, Link, Origin, Probe, ProbeKind, Seen, Served, Stored, Told};
use super::targets::EngineTarget;
use crate::discovery::event_sources::RankSource;
use crate::discovery::listed::EventPorts;
use crate::engine::EngineClient;
use crate::tokenizer::local::LocalTokenizer;

pub(super) use self::http::chain;

/// vLLM's port, and that of the replay in its documentation.
const USUAL_PORTS: EventPorts = EventPorts { events: 5557, replay: 5558, ranks: 1 };
/// A publisher learns of a subscription a moment after the connection stands.
const SETTLE: Duration = Duration::from_millis(200);
/// Longest wait for the events of a request that is answered, and for any where none is sent: they come with the first
/// token at the latest.
const EVENTS_WAIT: Duration = Duration::from_secs(3);
/// Longest block in use that no engine has named: enough words are sent for two of these.
const USUAL_BLOCK_SIZE: usize = 64;

/// How engines are looked at.
pub(super) struct Means<'a> {
    /// Longest wait for one answer.
    pub(super) timeout: Duration,
    /// Whether requests may be sent.
    pub(super) sends: bool,
    /// The name to ask for; none: the first that the engine lists.
    pub(super) model: Option<&'a str>,
    /// What else may tell the tokens of a prompt.
    pub(super) local: Option<&'a LocalTokenizer>,
}

/// Looks at an engine.
pub(super) async fn observe(target: &EngineTarget, client: EngineClient, means: &Means<'_>) -> Seen {
    let http = Http { client, target: target.http.clone().into(), timeout: means.timeout };
    let (reach, date_skew) = match &target.ip {
        Ok(_) => http.reach().await,
        Err(why) => (Err(why.clone()), None),
    };
    let mut seen = Seen {
        name: target.http.to_string(),
        reach,
        date_skew,
        version: Asked::Unasked,
        models: Asked::Unasked,
        told: Asked::Unasked,
        cache: Asked::Unasked,
        ranks: Vec::new(),
        wanted: means.model.map(str::to_owned),
        model: None,
        probes: Vec::new(),
        fixed_tokens: Asked::Unasked,
    };
    let Ok(ip) = target.ip else { return seen };
    if seen.reach.is_ok() {
        (seen.version, seen.models, seen.told, seen.cache) =
            tokio::join!(http.version(), http.models(), http.told(ip), http.cache());
        seen.model = asked_for(&seen);
    }
    let dials = dials(target, ip, &seen.told);
    let mut watches = join_all(dials.into_iter().map(|dial| Watch::open(dial, means.timeout))).await;
    tokio::time::sleep(SETTLE).await;
    if seen.reach.is_ok() {
        (seen.fixed_tokens, seen.probes) = send(&http, &seen, means, &mut watches).await;
    }
    listen(&mut watches, &seen.probes, means.timeout.min(EVENTS_WAIT)).await;
    join_all(watches.iter_mut().map(Watch::replay)).await;
    seen.ranks = watches.into_iter().map(|watch| watch.seen).collect();
    seen
}

/// The wanted model; where the engine lists others, the first of these, so that the rest can be looked at all the same.
fn asked_for(seen: &Seen) -> Option<String> {
    let Some(models) = seen.models.answer() else { return seen.wanted.clone() };
    let wanted = seen.wanted.clone().filter(|wanted| models.iter().any(|model| model.id == *wanted));
    wanted.or_else(|| models.iter().find(|model| model.parent.is_none()).map(|model| model.id.clone()))
}

/// Sends the requests and reads the live streams meanwhile: the time at which a batch comes shows the clocks.
async fn send(http: &Http, seen: &Seen, means: &Means<'_>, watches: &mut [Watch]) -> (Asked<Vec<u32>>, Vec<Probe>) {
    let Some(model) = seen.model.as_deref() else { return (Asked::Unasked, Vec::new()) };
    let ranks: Vec<u32> =
        if watches.is_empty() { vec![0] } else { watches.iter().map(|watch| watch.seen.rank).collect() };
    let length = length(seen, model);
    let mut sending = pin!(async {
        let fixed = probe::fixed_tokens(http, model).await;
        let mut probes = Vec::new();
        for rank in ranks.iter().copied().filter(|_| means.sends) {
            for kind in [ProbeKind::Completion, ProbeKind::Chat] {
                probes.push(probe::send(http, (kind, rank, ranks.len()), model, length, means.local).await);
            }
        }
        (fixed, probes)
    });
    loop {
        tokio::select! {
            sent = &mut sending => return sent,
            () = tokio::time::sleep(POLL) => watches.iter_mut().for_each(Watch::pump),
        }
    }
}

fn length(seen: &Seen, model: &str) -> Length {
    let named = seen.cache.answer().and_then(Option::as_ref).and_then(|cache| cache.block_size);
    let is_asked = |served: &&Served| served.id == model;
    let served = seen.models.answer().and_then(|models| models.iter().find(is_asked));
    let max_model_len = served.and_then(|served| served.max_model_len).and_then(|len| usize::try_from(len).ok());
    Length { block_size: named.map_or(USUAL_BLOCK_SIZE, |size| size as usize), max_model_len }
}

/// Reads the live streams until the events of all requests are there; without a request, for a while.
async fn listen(watches: &mut [Watch], probes: &[Probe], patience: Duration) {
    let start = Instant::now();
    let is_up = |watch: &Watch| matches!(watch.seen.events_link, Link::Up(_));
    while start.elapsed() < patience && watches.iter().any(is_up) {
        watches.iter_mut().for_each(Watch::pump);
        let is_there = |probe: &Probe| {
            let tokens = probe.tokens().unwrap_or_default();
            watches.iter().any(|watch| announced(&watch.seen.stored, tokens).is_some())
        };
        if !probes.is_empty() && probes.iter().filter(|probe| probe.answer.answer().is_some()).all(is_there) {
            return;
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Where the ranks of an engine are dialled: as the command line says, else as the engine does, else as the
/// configuration does, else at the usual ports.
fn dials(target: &EngineTarget, ip: IpAddr, told: &Asked<Told>) -> Vec<Dial> {
    let sources = told.answer().map(|told| told.answer.sources.as_slice()).unwrap_or_default();
    if let Some(events) = &target.events {
        let rank = |rank: u32| {
            let replay = target.replay.as_ref().and_then(|replay| replay.of_rank(rank));
            let events = events.of_rank(rank)?.as_str().to_owned();
            let replay = replay.map(|replay| replay.as_str().to_owned());
            Some(Dial { rank, origin: Origin::Given, events, replay })
        };
        let n_ranks = sources.len().max(1) as u32;
        return (0..n_ranks).filter_map(rank).collect();
    }
    let dial = |origin| move |RankSource { rank, events, replay }| Dial { rank, origin, events, replay };
    match told {
        Asked::Answer(told) if told.is_off => Vec::new(),
        Asked::Answer(told) if !told.answer.sources.is_empty() => {
            told.answer.sources.iter().cloned().map(dial(Origin::Told)).collect()
        }
        _ if !target.configured.is_empty() => target.configured.iter().cloned().map(dial(Origin::Configured)).collect(),
        _ => USUAL_PORTS.sources(ip, 0).into_iter().map(dial(Origin::Assumed)).collect(),
    }
}

/// How many of a prompt's tokens are in blocks that are announced as stored, counted to the end of the last one; none
/// where no block is. One prompt may come in several events.
pub(super) fn announced(stored: &[Stored], tokens: &[u32]) -> Option<usize> {
    let first = stored.iter().find(|event| event.parent.is_none() && event.is_at(tokens, 0));
    // A chat template's own text may fill the first blocks, which are cached then and not announced.
    let later = || stored.iter().filter(|event| event.is_live && event.parent.is_some());
    let (mut last, mut n_tokens) = match first {
        Some(first) => (first, first.tokens.len()),
        None => later().find_map(|event| {
            let starts = (1..tokens.len()).take_while(|start| start * event.block_size as usize <= tokens.len());
            let mut starts = starts.map(|start| start * event.block_size as usize);
            starts.find(|start| event.is_at(tokens, *start)).map(|start| (event, start + event.tokens.len()))
        })?,
    };
    let follows =
        |event: &&Stored, last: &Stored| event.parent.is_some() && event.parent.as_ref() == last.hashes.last();
    while let Some(next) = stored.iter().find(|event| follows(event, last) && event.is_at(tokens, n_tokens)) {
        n_tokens += next.tokens.len();
        last = next;
    }
    Some(n_tokens)
}

impl Stored {
    /// Whether its tokens are those of `tokens` from `start` on.
    fn is_at(&self, tokens: &[u32], start: usize) -> bool {
        !self.tokens.is_empty() && tokens.get(start..).is_some_and(|rest| rest.starts_with(&self.tokens))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::trial::tests::announced as chain;
    use crate::routing::hash::HashAlgorithm;

    #[test]
    fn a_prompt_is_found_in_one_event_or_in_several() {
        let tokens: Vec<u32> = (0..14).collect();
        let whole = chain(HashAlgorithm::Sha256, None, &tokens[..12]);
        assert_eq!(announced(std::slice::from_ref(&whole), &tokens), Some(12));
        let first = Stored { hashes: whole.hashes[..1].to_vec(), tokens: tokens[..4].to_vec(), ..whole.clone() };
        let rest = Stored {
            parent: first.hashes.last().cloned(),
            hashes: whole.hashes[1..].to_vec(),
            tokens: tokens[4..12].to_vec(),
            ..whole.clone()
        };
        assert_eq!(announced(&[rest.clone(), first.clone()], &tokens), Some(12));
        assert_eq!(announced(&[first], &tokens), Some(4));
        assert_eq!(announced(std::slice::from_ref(&rest), &tokens), Some(12), "the first block was cached before");
        assert_eq!(announced(&[Stored { is_live: false, ..rest }], &tokens), None);
        assert_eq!(announced(&[whole], &[7, 8, 9, 10]), None);
    }
}
