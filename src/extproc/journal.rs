//! The last decisions, for those who ask why a request went where it went, and what became of it.
//!
//! A ring of slots: a decision takes the place of the oldest one. Writing costs one atomic add, an allocation, and a
//! mutex that nobody else wants but who reads that very slot at this moment. What becomes known later (who served, how
//! it ended) is written into the [`Record`], which the request's stream shares with the ring.
//!
//! Counts and addresses only: nothing of a prompt, no token ids and no hashes. No endpoint is kept from going.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use super::decide::Verdict;
use super::message::Served;
use super::rollout::Mode;
use super::settle::Settled;
use crate::routing::index::Seen;
use crate::routing::pick::{Decision, Outcome, Policy, Standing, Timings};

/// How many decisions are kept unless told otherwise: a few seconds of a busy router, and less than 1 MiB.
pub const DEFAULT_DECISIONS: usize = 1024;
/// Most that may be kept: some 60 MiB.
pub const MOST_DECISIONS: usize = 65_536;
/// Longest request id that is kept as it is; Envoy's own have 36 characters.
const MOST_ID_BYTES: usize = 128;

/// The last decisions. See the module.
#[derive(Debug)]
pub struct Journal {
    /// Each is locked for as long as it takes to copy a pointer.
    slots: Box<[Mutex<Option<Arc<Record>>>]>,
    /// Decisions so far; the next one's slot, modulo their number. Guards nothing: relaxed.
    n_records: AtomicUsize,
}

/// One decision, and what became of its request.
#[derive(Debug)]
pub struct Record {
    /// `x-request-id`, or a random one where the request had none that can be shown.
    pub request_id: String,
    /// When it was decided.
    pub at: SystemTime,
    /// The same, to measure from.
    pub decided: Instant,
    /// Whether Envoy was to be told; none where there is no pool and the pools differ.
    pub mode: Option<Mode>,
    /// What was decided.
    pub told: Told,
    /// What the events have told of the blocks that were predicted; none where nobody watches.
    pub seen: Option<Arc<Seen>>,
    /// Locked to copy it, at most three times in a request's life.
    later: Mutex<Later>,
}

/// What was decided.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "almost every record is a pick, which would only be an allocation more")]
pub enum Told {
    /// An endpoint was picked.
    Picked(Picked),
    /// The request was left to Envoy's own policy, for this reason.
    Left(&'static str),
    /// The request was refused, for this reason.
    Refused(&'static str),
}

/// A [`Decision`] without what keeps endpoints alive.
#[derive(Clone, Debug)]
pub struct Picked {
    /// Name of the pool's model.
    pub model: Arc<str>,
    /// The name that the client used.
    pub requested: Arc<str>,
    /// What ordered the candidates.
    pub policy: Policy,
    /// What came of the lookup.
    pub outcome: Outcome,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens of it that the pick was said to hold.
    pub matched_tokens: u32,
    /// The picked endpoint.
    pub endpoint: SocketAddr,
    /// The rank that holds what matched.
    pub rank: Option<u32>,
    /// Endpoints that were compared.
    pub n_candidates: u32,
    /// Endpoints that were avoided.
    pub n_avoided: u32,
    /// The best of them, best first.
    pub standings: Vec<Standing>,
    /// How long each step took.
    pub timings: Timings,
}

impl Picked {
    /// What is kept of a decision.
    pub fn of(decision: &Decision) -> Self {
        Self {
            model: decision.model.clone(),
            requested: decision.requested.clone(),
            policy: decision.policy,
            outcome: decision.outcome,
            prompt_tokens: decision.prompt_tokens,
            matched_tokens: decision.pick.matched_tokens,
            endpoint: decision.pick.endpoint.address,
            rank: decision.pick.rank,
            n_candidates: decision.n_candidates,
            n_avoided: decision.n_avoided,
            standings: decision.standings.clone(),
            timings: decision.timings,
        }
    }
}

/// What became of a request, as far as it is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Later {
    /// Who answered; none where Envoy did, or does not say.
    pub served_by: Option<SocketAddr>,
    /// Status of the answer.
    pub status: Option<u16>,
    /// Attempts that Envoy has made.
    pub n_attempts: Option<u32>,
    /// How the pick turned out.
    pub settled: Option<Settled>,
    /// Time from the decision to the end of the stream.
    pub ended_after: Option<Duration>,
}

impl Default for Journal {
    fn default() -> Self {
        Self::new(DEFAULT_DECISIONS)
    }
}

impl Journal {
    /// A ring with room for `n` decisions; with none, nothing is kept.
    pub fn new(n: usize) -> Self {
        Self { slots: (0..n).map(|_| Mutex::default()).collect(), n_records: AtomicUsize::new(0) }
    }

    /// Keeps what was decided on a request under `mode`; none where nothing is kept.
    pub fn keep(&self, request_id: Option<&str>, verdict: &Verdict, mode: Option<Mode>) -> Option<Arc<Record>> {
        if self.slots.is_empty() {
            return None;
        }
        let mut seen = None;
        let told = match verdict {
            Verdict::Route(routed) => {
                seen = routed.watched.as_ref().map(|watched| watched.seen().clone());
                Told::Picked(Picked::of(&routed.decision))
            }
            Verdict::Shadow(shadowed) => Told::Picked(Picked::of(&shadowed.decision)),
            Verdict::Leave(leave) => Told::Left(leave.as_str()),
            Verdict::Refuse(refusal) => Told::Refused(refusal.as_str()),
        };
        let record = Arc::new(Record {
            request_id: shown_id(request_id),
            at: SystemTime::now(),
            decided: Instant::now(),
            mode,
            told,
            seen,
            later: Mutex::default(),
        });
        let number = self.n_records.fetch_add(1, Relaxed);
        let former = self.slot(number).replace(record.clone());
        // The last owner frees it, outside of the lock.
        drop(former);
        Some(record)
    }

    /// The newest decision on a request with this id; a client may have given several the same one.
    pub fn find(&self, request_id: &str) -> Option<Arc<Record>> {
        let has_id = |record: &&Arc<Record>| record.request_id == request_id;
        self.newest_first().find_map(|number| self.slot(number).as_ref().filter(has_id).cloned())
    }

    /// The decisions that are kept, newest first. What is replaced meanwhile may be missing.
    pub fn newest(&self) -> impl Iterator<Item = Arc<Record>> + '_ {
        self.newest_first().filter_map(|number| self.slot(number).clone())
    }

    fn newest_first(&self) -> impl Iterator<Item = usize> + use<> {
        let n_records = self.n_records.load(Relaxed);
        let oldest = n_records.saturating_sub(self.slots.len());
        (oldest..n_records).rev()
    }

    /// How many decisions can be kept.
    pub fn capacity(&self) -> usize {
        self.slots.len()
    }

    fn slot(&self, number: usize) -> MutexGuard<'_, Option<Arc<Record>>> {
        // A pointer is replaced as a whole.
        self.slots[number % self.slots.len()].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The id as it is kept: what is long or has odd characters is nobody's idea of an id, and is not shown.
fn shown_id(request_id: Option<&str>) -> String {
    let is_shown = |id: &&str| id.len() <= MOST_ID_BYTES && id.bytes().all(|byte| byte.is_ascii_graphic());
    match request_id.filter(is_shown) {
        Some(id) if !id.is_empty() => id.to_owned(),
        _ => format!("{:032x}", fastrand::u128(..)),
    }
}

impl Record {
    /// What has become of the request so far.
    pub fn later(&self) -> Later {
        *self.lock()
    }

    /// The response headers have come.
    pub fn served(&self, served: &Served, settled: Option<Settled>) {
        let mut later = self.lock();
        later.served_by = served.address;
        later.status = (served.status != 0).then_some(served.status);
        later.n_attempts = served.n_attempts;
        later.settled = settled;
    }

    /// The stream has ended.
    pub fn ended(&self) {
        self.lock().ended_after = Some(self.decided.elapsed());
    }

    fn lock(&self) -> MutexGuard<'_, Later> {
        self.later.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::super::decide::{Leave, Refusal};
    use super::*;

    fn ids(journal: &Journal) -> Vec<String> {
        journal.newest().map(|record| record.request_id.clone()).collect()
    }

    #[test]
    fn ring_keeps_the_newest_and_no_more() {
        let journal = Journal::new(3);
        assert_eq!(ids(&journal), [""; 0]);
        for n in 0..8 {
            journal.keep(Some(&format!("id-{n}")), &Verdict::Leave(Leave::NoModel), None).expect("it is kept");
            assert_eq!(ids(&journal).len(), 3.min(n + 1));
        }
        assert_eq!(ids(&journal), ["id-7", "id-6", "id-5"]);
        assert!(journal.find("id-4").is_none());
        assert_eq!(journal.find("id-6").expect("it is kept").request_id, "id-6");
    }

    #[test]
    fn of_requests_with_one_id_the_newest_is_found() {
        let journal = Journal::new(3);
        journal.keep(Some("id"), &Verdict::Leave(Leave::NoModel), None);
        journal.keep(Some("id"), &Verdict::Refuse(Refusal::NoEndpoint), Some(Mode::Active));
        let found = journal.find("id").expect("it is kept");
        assert!(matches!(found.told, Told::Refused("no_endpoint")), "{found:?}");
    }

    #[test]
    fn nothing_is_kept_where_nothing_should_be() {
        let journal = Journal::new(0);
        assert!(journal.keep(Some("id"), &Verdict::Leave(Leave::NoModel), None).is_none());
        assert!(journal.find("id").is_none() && journal.newest().next().is_none());
    }

    #[test]
    fn ids_that_are_none_are_replaced() {
        let long = "a".repeat(MOST_ID_BYTES + 1);
        for id in [None, Some(""), Some("two words"), Some("line\n"), Some("ü"), Some(&*long)] {
            let shown = shown_id(id);
            assert!(shown.len() == 32 && Some(&*shown) != id, "{id:?} became {shown:?}");
            assert_ne!(shown, shown_id(id), "each has its own");
        }
        assert_eq!(shown_id(Some("7a1f-x:1")), "7a1f-x:1");
    }

    #[test]
    fn what_becomes_of_a_request_is_seen_by_whoever_reads_its_record() {
        let journal = Journal::new(3);
        let record = journal.keep(Some("id"), &Verdict::Leave(Leave::NoModel), None).expect("it is kept");
        assert_eq!(journal.find("id").expect("it is kept").later(), Later::default());
        let address = SocketAddr::from(([127, 0, 0, 1], 1));
        let served = Served { status: 200, address: Some(address), n_attempts: Some(2) };
        record.served(&served, Some(Settled::Retried));
        record.ended();
        let later = journal.find("id").expect("it is kept").later();
        assert_eq!((later.served_by, later.status, later.n_attempts), (Some(address), Some(200), Some(2)));
        assert!(later.settled == Some(Settled::Retried) && later.ended_after.is_some());
    }
}
