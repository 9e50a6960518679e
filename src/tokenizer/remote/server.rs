//! One that is asked for tokens: its breaker, what it made of the fixed text, and how many calls it has.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed, Ordering::Release};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tracing::{error, info, warn};

use super::breaker::{Breaker, Epoch};
use super::canary::Fingerprint;
use super::status::{BreakerState, Counter, EndpointStatus, Failure, Shared};
use crate::engine::Target;
use crate::tokenizer::Error;

/// An endpoint of the pool, or the one that takes their place.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) target: Target,
    /// Calls that it may have at a time; none waits for one.
    permits: Arc<Semaphore>,
    n_permits: usize,
    /// What `known` says, to be read without a lock.
    may_be_asked: AtomicBool,
    /// Held for a few instructions, never across a wait.
    known: Mutex<Known>,
    n_questions: Counter,
    n_failures: Counter,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Known {
    breaker: Breaker,
    /// What it made of the fixed text when it last answered that.
    fingerprint: Option<Fingerprint>,
    /// Whether it answered the last time that it was asked for that.
    check_is_good: bool,
    /// Whether that is not what most of the pool made of it.
    differs: bool,
    /// Whether it is counted as one that requests may not ask.
    is_excluded: bool,
    /// It is no longer in the pool. It lives on in the calls that have asked it, and until the map of endpoints frees
    /// it.
    has_left: bool,
    last_failure: Failure,
    /// Whether its failures are in the log. They stay there until a request has been answered: an endpoint that is
    /// checked with success and fails again is not worth a line each time.
    is_reported: bool,
}

/// Something for the log.
enum Report {
    Failing(Failure),
    Recovered,
}

impl Known {
    fn state(&self) -> BreakerState {
        if self.differs { BreakerState::Differs } else { self.breaker.state() }
    }

    /// What has not been in the log yet.
    fn report(&mut self) -> Option<Report> {
        let is_failing = self.breaker.state() == BreakerState::Open;
        let changes = if self.is_reported { self.breaker.is_trusted() } else { is_failing };
        self.is_reported ^= changes;
        changes.then_some(if is_failing { Report::Failing(self.last_failure) } else { Report::Recovered })
    }
}

/// The right to ask a server once; it lasts until the question has its answer.
#[derive(Debug)]
pub(super) struct Claim {
    pub(super) server: Arc<Server>,
    epoch: Epoch,
    _permits: [OwnedSemaphorePermit; 2],
}

impl Claim {
    /// Notes that the question was answered in time.
    pub(super) fn passed(&self) {
        self.server.change(|known, _| known.breaker.call_passed(self.epoch));
    }

    /// Counts a failure that is not the endpoint's fault.
    pub(super) fn excused(&self, failure: Failure) {
        self.server.shared.counters.failed(failure);
    }

    /// Notes that it was not answered as it should.
    pub(super) fn failed(&self, failure: Failure) {
        self.excused(failure);
        if failure.is_endpoints_fault() {
            self.server.n_failures.add();
            self.server.change(|known, now| {
                known.last_failure = failure;
                known.breaker.call_failed(self.epoch, now, fastrand::f64());
            });
        }
    }
}

impl Server {
    pub(super) fn new(target: Target, n_permits: usize, shared: Arc<Shared>) -> Arc<Self> {
        let known = Known {
            breaker: Breaker::new(Instant::now()),
            fingerprint: None,
            check_is_good: false,
            differs: false,
            is_excluded: false,
            has_left: false,
            last_failure: Failure::Unreachable,
            is_reported: false,
        };
        Arc::new(Self {
            target,
            permits: Arc::new(Semaphore::new(n_permits)),
            n_permits,
            may_be_asked: AtomicBool::new(true),
            known: Mutex::new(known),
            n_questions: Counter::default(),
            n_failures: Counter::default(),
            shared,
        })
    }

    /// Whether requests may ask it.
    pub(super) fn may_be_asked(&self) -> bool {
        self.may_be_asked.load(Relaxed)
    }

    /// Whether it has as many calls as it may have.
    pub(super) fn is_full(&self) -> bool {
        self.permits.available_permits() == 0
    }

    /// Claims the right to ask it, if it may be asked and neither it nor the whole has too many calls.
    pub(super) fn claim(self: &Arc<Self>, whole: &Arc<Semaphore>) -> Result<Claim, Error> {
        if !self.may_be_asked() {
            return Err(Error::Open);
        }
        let acquire = |permits: &Arc<Semaphore>| permits.clone().try_acquire_owned();
        let (Ok(own), Ok(shared)) = (acquire(&self.permits), acquire(whole)) else {
            self.shared.counters.busy.add();
            return Err(Error::Busy);
        };
        self.n_questions.add();
        let epoch = self.lock().breaker.epoch();
        Ok(Claim { server: self.clone(), epoch, _permits: [own, shared] })
    }

    /// When it is to be checked.
    pub(super) fn check_due(&self) -> Instant {
        self.lock().breaker.due()
    }

    /// Notes that a check begins.
    pub(super) fn check_began(&self) -> Epoch {
        self.shared.counters.checks.add();
        self.change(|known, _| known.breaker.check_began())
    }

    /// Notes that a check was answered in time.
    pub(super) fn check_passed(&self, begun: Epoch, fingerprint: Fingerprint) {
        self.change(|known, now| {
            (known.fingerprint, known.check_is_good) = (Some(fingerprint), true);
            known.breaker.check_passed(begun, now, fastrand::f64());
        });
    }

    /// Notes that a check was not answered as it should.
    pub(super) fn check_failed(&self, begun: Epoch, failure: Failure) {
        self.shared.counters.failed_checks.add();
        self.change(|known, now| {
            (known.last_failure, known.check_is_good) = (failure, false);
            known.breaker.check_failed(begun, now, fastrand::f64());
        });
    }

    /// What it makes of the fixed text; none unless its breaker is closed and it answered its last check, which is then
    /// as recent as the checks of closed ones are frequent. What an endpoint said before it was gone tells nothing of
    /// the tokens that the pool makes now.
    pub(super) fn vote(&self) -> Option<Fingerprint> {
        let known = self.lock();
        known.fingerprint.filter(|_| known.check_is_good && known.breaker.state() == BreakerState::Closed)
    }

    /// Notes whether it answers for another model or tokenizer than the others.
    pub(super) fn set_differs(&self, differs: bool) {
        let did = self.change(|known, now| {
            if differs {
                known.breaker.suspect(now);
            }
            std::mem::replace(&mut known.differs, differs)
        });
        if differs && !did {
            // After it has been excluded: who sees the new epoch does not ask it any more.
            self.shared.epoch.fetch_add(1, Release);
        }
        let target = &self.target;
        if differs && !did {
            error!(%target, "endpoint makes other tokens of a fixed text than most of its pool: another model or tokenizer; it is asked for tokens no more");
        } else if did && !differs {
            info!(%target, "endpoint makes the same tokens of a fixed text as its pool again");
        }
    }

    /// Whether it is known to answer for another model or tokenizer.
    pub(super) fn differs(&self) -> bool {
        self.lock().differs
    }

    /// Notes that it is no longer in the pool.
    pub(super) fn leave(&self) {
        self.change(|known, _| known.has_left = true);
    }

    pub(super) fn status(&self) -> EndpointStatus {
        EndpointStatus {
            target: self.target.clone(),
            state: self.lock().state(),
            n_in_flight: self.n_permits - self.permits.available_permits(),
            n_questions: self.n_questions.get(),
            n_failures: self.n_failures.get(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes what is known and lets those see it who do not look into it: requests, the checks and the log.
    fn change<T>(&self, step: impl FnOnce(&mut Known, Instant) -> T) -> T {
        let mut known = self.lock();
        let due = known.breaker.due();
        let result = step(&mut known, Instant::now());
        let may_be_asked = known.state() == BreakerState::Closed;
        self.may_be_asked.store(may_be_asked, Relaxed);
        let is_excluded = !may_be_asked && !known.has_left;
        if known.is_excluded != is_excluded {
            known.is_excluded = is_excluded;
            let n_excluded = &self.shared.n_excluded;
            if is_excluded {
                n_excluded.fetch_add(1, Relaxed)
            } else {
                n_excluded.fetch_sub(1, Relaxed)
            };
        }
        let (is_due_earlier, report) = (known.breaker.due() < due, known.report());
        drop(known);
        if is_due_earlier {
            self.shared.check_is_due.notify_one();
        }
        match report {
            Some(Report::Failing(failure)) => {
                let (target, reason) = (&self.target, failure.as_str());
                warn!(%target, reason, "endpoint is asked for tokens no more until a check succeeds");
            }
            Some(Report::Recovered) => info!(target = %self.target, "endpoint is asked for tokens again"),
            None => {}
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(shared: &Arc<Shared>, n_permits: usize) -> Arc<Server> {
        Server::new(Target::Endpoint(([127, 0, 0, 1], 1).into()), n_permits, shared.clone())
    }

    #[test]
    fn claims_are_bounded_and_come_back() {
        let shared = Arc::new(Shared::default());
        let (first, second) = (server(&shared, 2), server(&shared, 2));
        let whole = Arc::new(Semaphore::new(3));
        let held = [first.claim(&whole), first.claim(&whole)].map(|claim| claim.expect("room"));
        assert!(matches!(first.claim(&whole), Err(Error::Busy)), "its own bound");
        let other = second.claim(&whole).expect("room");
        assert!(matches!(second.claim(&whole), Err(Error::Busy)), "the bound of the whole");
        assert_eq!((first.status().n_in_flight, second.status().n_in_flight), (2, 1));
        drop((held, other));
        assert_eq!(whole.available_permits(), 3);
        assert_eq!((first.status().n_in_flight, first.status().n_questions), (0, 2));
        assert_eq!(shared.status(Vec::new()).n_busy, 2);
    }

    #[test]
    fn only_the_excluded_are_counted_and_until_they_leave() {
        let shared = Arc::new(Shared::default());
        let (server, whole) = (server(&shared, 8), Arc::new(Semaphore::new(8)));
        let n_excluded = || shared.n_excluded.load(Relaxed);
        for _ in 0..9 {
            server.claim(&whole).expect("refused questions do not open it").failed(Failure::Refused);
        }
        for n_failures in 1..=3 {
            assert_eq!(n_excluded(), 0);
            server.claim(&whole).expect("closed").failed(Failure::Unreachable);
            assert_eq!(server.status().n_failures, n_failures);
        }
        assert_eq!((n_excluded(), server.status().state), (1, BreakerState::Open));
        assert!(matches!(server.claim(&whole), Err(Error::Open)));
        server.set_differs(true);
        assert_eq!((n_excluded(), server.status().state), (1, BreakerState::Differs));
        let check = server.check_began();
        server.check_passed(check, Fingerprint::of(&[1]));
        assert_eq!((n_excluded(), server.status().state), (1, BreakerState::Differs), "it answers, for another model");
        server.set_differs(false);
        assert_eq!((n_excluded(), server.status().state), (0, BreakerState::Closed));
        server.claim(&whole).expect("closed, on trial").failed(Failure::Overdue);
        assert_eq!(n_excluded(), 1);
        server.leave();
        assert_eq!(n_excluded(), 0, "who has left is not kept from anyone");
        server.set_differs(true);
        assert_eq!(n_excluded(), 0);
    }

    #[tokio::test]
    async fn an_opening_wakes_the_checks() {
        let shared = Arc::new(Shared::default());
        let (server, whole) = (server(&shared, 8), Arc::new(Semaphore::new(8)));
        server.check_passed(server.check_began(), Fingerprint::of(&[1]));
        for _ in 0..3 {
            server.claim(&whole).expect("closed").failed(Failure::Status);
        }
        shared.check_is_due.notified().await;
        assert!(server.check_due() <= Instant::now() + std::time::Duration::from_millis(250));
    }
}
