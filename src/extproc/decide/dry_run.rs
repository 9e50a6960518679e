//! A decision that changes nothing: what would be picked for a request, and why.
//!
//! It takes the steps of a real one, by the same functions, up to the pick. What follows a pick (the count in flight, the
//! promise, the trial of an endpoint that had failed, the instruments) does not happen. A tokenizer that is asked counts
//! and remembers the question as ever, for its answer is as good as any.

use std::net::SocketAddr;
use std::sync::Arc;

use super::lookup::{Chain, LEARNED_BLOCK};
use super::timer::Timer;
use super::{Considered, Leave, Pool, Router, Verdict, decision};
use crate::extproc::journal::Picked;
use crate::extproc::message::RequestHead;
use crate::extproc::rollout::Mode;
use crate::routing::endpoint::Endpoint;
use crate::routing::index::{KeyspaceKind, Promises};
use crate::routing::pick::{Standing, choose_keeping};
use crate::routing::score::{Candidates, candidate, candidates};
use crate::telemetry::metrics::Stage;

/// What would become of a request.
#[derive(Debug)]
pub struct DryRun {
    /// What would be picked, with the standings of all candidates; or why nobody would be.
    pub verdict: Result<Picked, Verdict>,
    /// Whether Envoy would be told; none where there is no pool and the pools differ.
    pub mode: Option<Mode>,
    /// The share of the pool's requests that is active, where there is a pool.
    pub percent: Option<u8>,
    /// The name of the pool's model and the one that the client uses, where there is a pool.
    pub model: Option<(Arc<str>, Arc<str>)>,
    /// The prompt's blocks.
    pub blocks: Vec<KeyspaceBlocks>,
    /// Every endpoint of the pool, best first.
    pub endpoints: Vec<Considering>,
}

/// How many blocks a prompt has in a keyspace.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct KeyspaceBlocks {
    /// Who defines the hashes, and the tokens per block.
    pub keyspace: String,
    /// Full blocks that an engine could reuse.
    pub n_blocks: u32,
}

/// An endpoint of the pool, and how it stands.
#[derive(Clone, Debug)]
pub struct Considering {
    /// What it has to offer.
    pub standing: Standing,
    /// The same in blocks of the longest chain; 0 where nothing was looked up.
    pub matched_blocks: u32,
    /// Requests in flight beyond those of the least loaded candidate.
    pub ahead_of_least: u32,
    /// How long it is still avoided.
    pub avoided_ms: Option<u64>,
    /// Why it does not come into question; none for candidates.
    pub not_because: Option<&'static str>,
}

impl Router {
    /// What would become of a request. `random` breaks ties, as in a decision.
    pub async fn dry_run(&self, head: &RequestHead, body: &[u8], random: &mut fastrand::Rng) -> DryRun {
        let mut timer = Timer::silent();
        let considered = match self.consider(head, body, &mut timer).await {
            Ok(considered) => considered,
            Err(leave) => return self.not_considered(leave),
        };
        let rollout = considered.target.pool.rollout.get();
        let mode = rollout.mode_for(head.request_id.as_deref(), random);
        let found = timer.timed(Stage::Pick, || self.candidates(head, &considered));
        let choice = timer.timed(Stage::Pick, || choose_keeping(usize::MAX, &found, random));
        let nobody = || match mode {
            Mode::Active => Verdict::Refuse(considered.refusal()),
            Mode::Shadow => self.left(considered.leave_in_shadow()),
            Mode::Off => self.left(Leave::SwitchedOff),
        };
        let picked = choice.filter(|_| mode != Mode::Off).ok_or_else(nobody).map(|choice| {
            let decision = decision(&considered.target, choice, &considered.lookup);
            let timings = timer.picked();
            Picked { timings, ..Picked::of(&decision) }
        });
        DryRun {
            model: Some((considered.target.pool.model.clone(), considered.target.requested.clone())),
            blocks: considered.lookup.iter().flat_map(|lookup| &lookup.chains).map(Chain::counted).collect(),
            endpoints: self.all_endpoints(head, &considered, picked.as_ref().map_or(&[], |picked| &picked.standings)),
            verdict: picked,
            mode: Some(mode),
            percent: Some(rollout.percent.get()),
        }
    }

    /// The request is nobody's of ours, or not yet.
    fn not_considered(&self, leave: Leave) -> DryRun {
        let verdict = self.left(leave);
        let mode = verdict.mode().or_else(|| self.common_mode());
        DryRun { verdict: Err(verdict), mode, percent: None, model: None, blocks: Vec::new(), endpoints: Vec::new() }
    }

    /// The endpoints that come into question, with what they hold.
    pub(super) fn candidates(&self, head: &RequestHead, considered: &Considered) -> Candidates {
        let Considered { target, endpoints, lookup, .. } = considered;
        let matches = lookup.as_ref().map_or(&[][..], |lookup| &lookup.matches);
        let is_allowed = target.servers(endpoints, |endpoint| head.allows(&endpoint.address));
        candidates(endpoints, matches, is_allowed, self.now())
    }

    /// The candidates as they stand, and then everybody else.
    fn all_endpoints(&self, head: &RequestHead, considered: &Considered, standings: &[Standing]) -> Vec<Considering> {
        let Considered { target, endpoints, lookup, .. } = considered;
        let lookup = lookup.as_ref().ok();
        let matches = lookup.map_or(&[][..], |lookup| &lookup.matches);
        let block_size = lookup.and_then(|lookup| Some(lookup.longest()?.block_size.get()));
        let fewest = standings.iter().map(|standing| standing.in_flight).min().unwrap_or(0);
        let of_address = |address: SocketAddr| endpoints.endpoints.iter().find(|it| it.address == address);
        let considering = |standing: Standing, not_because| Considering {
            standing,
            matched_blocks: block_size.map_or(0, |block_size| standing.matched_tokens / block_size),
            ahead_of_least: standing.in_flight.saturating_sub(fewest),
            avoided_ms: of_address(standing.endpoint).and_then(|it| it.load.avoided_for(self.now())).map(|it| it.0),
            not_because,
        };
        let is_candidate = |endpoint: &&Arc<Endpoint>| standings.iter().any(|it| it.endpoint == endpoint.address);
        let can_serve = target.servers(endpoints, |endpoint| head.allows(&endpoint.address));
        let not_because = |endpoint: &Endpoint| match () {
            () if !head.allows(&endpoint.address) => "the gateway does not allow it",
            () if !can_serve(endpoint) => "others have the adapter",
            () => "it failed to serve and is avoided for a while",
        };
        let others = endpoints.endpoints.iter().filter(|endpoint| !is_candidate(endpoint));
        let mut others: Vec<_> = others
            .map(|endpoint| {
                considering(Standing::new(&candidate(endpoint, matches), false), Some(not_because(endpoint)))
            })
            .collect();
        others.sort_by_key(|it| (std::cmp::Reverse(it.standing.matched_tokens), it.standing.endpoint));
        let standing = standings.iter().map(|standing| considering(*standing, None));
        standing.chain(others).collect()
    }
}

/// The name of a keyspace's kind, for people.
pub(super) fn kind_name(kind: Option<&KeyspaceKind>) -> String {
    match kind {
        Some(KeyspaceKind::Engine { algorithm, .. }) => format!("engine {algorithm}"),
        Some(KeyspaceKind::Own) => "own".to_owned(),
        None => "learned".to_owned(),
    }
}

impl Chain {
    fn counted(&self) -> KeyspaceBlocks {
        KeyspaceBlocks {
            keyspace: format!("{} / {}", kind_name(self.kind.as_ref()), self.block_size.get()),
            n_blocks: u32::try_from(self.hashes.len()).unwrap_or(u32::MAX),
        }
    }
}

/// What is shown of a keyspace.
#[derive(Clone, Debug, serde::Serialize)]
pub struct KeyspaceRow {
    /// Name of the pool's model.
    pub model: Arc<str>,
    /// Who defines the hashes.
    pub kind: String,
    /// Tokens per block.
    pub block_size: u32,
    /// Distinct blocks.
    pub n_blocks: usize,
    /// Tiers of event sources that write here.
    pub n_slots: usize,
    /// Blocks that our own picks will make endpoints hold.
    pub promised_blocks: usize,
    /// Promised blocks that made room for others.
    pub promised_evicted: u64,
    /// Blocks that were not promised for want of room.
    pub n_refused: u64,
}

impl Router {
    /// The keyspaces that are in use, those learned from picks included.
    pub fn keyspace_rows(&self) -> Vec<KeyspaceRow> {
        let mut rows = Vec::new();
        for pool in self.pools.iter() {
            let row = |kind: Option<&KeyspaceKind>, block_size, promises: &Promises| KeyspaceRow {
                model: pool.model.clone(),
                kind: kind_name(kind),
                block_size,
                n_blocks: 0,
                n_slots: 0,
                promised_blocks: promises.n_blocks(),
                promised_evicted: promises.n_evicted(),
                n_refused: promises.n_refused(),
            };
            rows.extend(self.index.keyspaces_of(&pool.model).into_iter().map(|(keyspace, index)| KeyspaceRow {
                n_blocks: index.n_blocks(),
                n_slots: index.n_slots(),
                ..row(Some(&keyspace.kind), keyspace.block_size.get(), index.promises())
            }));
            rows.push(row(None, LEARNED_BLOCK, &pool.learned));
        }
        rows
    }

    /// Bytes that the index takes, and most that it may take.
    pub fn index_bytes(&self) -> (usize, usize) {
        (self.index.n_bytes(), self.index.limit_bytes())
    }

    /// Every endpoint of every pool, with its model.
    pub fn endpoints(&self) -> Vec<(Arc<str>, Arc<Endpoint>)> {
        let of_pool = |pool: &Pool| {
            let endpoints = pool.endpoints.borrow().endpoints.clone();
            endpoints.into_iter().map(|endpoint| (pool.model.clone(), endpoint)).collect::<Vec<_>>()
        };
        self.pools.iter().flat_map(of_pool).collect()
    }
}
