//! What is counted, and how it is shown.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};

use tokio::sync::Notify;

use crate::engine::{self, Target};
use crate::tokenizer::Error;

/// Counters of a model's remote tokenizer since its start, and the state of those that it asks.
#[derive(Clone, Debug)]
pub struct RemoteStatus {
    /// Calls of requests, refused ones not among them.
    pub n_calls: u64,
    /// Calls in which a second endpoint was asked.
    pub n_hedges: u64,
    /// Calls that the second endpoint answered.
    pub n_hedge_wins: u64,
    /// Answers that came when the caller no longer waited for them.
    pub n_late: u64,
    /// Calls that were given up by their caller before they were overdue, as when the client is gone.
    pub n_cancelled: u64,
    /// Times that an endpoint was not asked because as many calls as it may have were under way.
    pub n_busy: u64,
    /// Questions off the request path.
    pub n_checks: u64,
    /// Checks that were not answered as they should.
    pub n_failed_checks: u64,
    /// What went wrong with requests' questions.
    pub failures: [(Failure, u64); Failure::ALL.len()],
    /// Whether the endpoints disagree about the tokens of the fixed text, and none of the answers has a majority.
    pub is_split: bool,
    /// Those that are asked; in no order.
    pub endpoints: Vec<EndpointStatus>,
}

/// One that is asked for tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointStatus {
    /// Who it is.
    pub target: Target,
    /// Whether requests ask it.
    pub state: BreakerState,
    /// Questions of requests under way.
    pub n_in_flight: usize,
    /// Questions of requests.
    pub n_questions: u64,
    /// Those of them that failed by its fault.
    pub n_failures: u64,
}

/// Whether requests ask an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BreakerState {
    /// They do.
    Closed,
    /// They do not: it failed.
    Open,
    /// They do not yet: it is being checked.
    HalfOpen,
    /// They do not: its tokens are not those of the others, so it has another model or tokenizer.
    Differs,
}

impl BreakerState {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Closed, Self::Open, Self::HalfOpen, Self::Differs];

    /// Name in metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Open => "open",
            Self::HalfOpen => "half_open",
            Self::Differs => "differs",
        }
    }
}

/// What can be wrong with the answer to one question.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Failure {
    /// It had not come when the caller waited no longer.
    Overdue,
    /// It had not come when the endpoint that was asked later had answered.
    Outrun,
    /// There was no connection, or it broke off.
    Unreachable,
    /// A status that is no answer to any question.
    Status,
    /// A status that speaks of the question: 400, 404, 413 or 422. It is not the endpoint's fault.
    Refused,
    /// It is larger than any list of tokens could be.
    TooLarge,
    /// It is no list of tokens.
    Nonsense,
    /// It came from an endpoint that turned out to differ from the others.
    Differs,
}

impl Failure {
    /// All of them, in the order of the counters.
    pub const ALL: [Self; 8] = [
        Self::Overdue,
        Self::Outrun,
        Self::Unreachable,
        Self::Status,
        Self::Refused,
        Self::TooLarge,
        Self::Nonsense,
        Self::Differs,
    ];

    /// Name in metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Overdue => "overdue",
            Self::Outrun => "outrun",
            Self::Unreachable => "unreachable",
            Self::Status => "status",
            Self::Refused => "refused",
            Self::TooLarge => "too_large",
            Self::Nonsense => "nonsense",
            Self::Differs => "differs",
        }
    }

    pub(super) fn of(error: &Error) -> Self {
        match error {
            Error::Engine(engine::Error::Unreachable(_)) => Self::Unreachable,
            Error::Engine(engine::Error::Status(400 | 404 | 413 | 422)) => Self::Refused,
            Error::Engine(engine::Error::Status(_)) => Self::Status,
            Error::Engine(engine::Error::TooLarge(_)) => Self::TooLarge,
            Error::Budget(_) => Self::Overdue,
            Error::Differs => Self::Differs,
            // Whatever else there is does not come from an endpoint.
            Error::Nonsense
            | Error::NoEndpoint
            | Error::Busy
            | Error::Open
            | Error::TooLong
            | Error::Unsupported(_)
            | Error::Panicked => Self::Nonsense,
        }
    }

    /// Whether it tells something of the endpoint. vLLM answers 404 for a model or adapter that it does not have
    /// (0.32.0, `serve/engine/serving.py`), which is a matter of the name in the question; an endpoint without the API
    /// fails its checks, which name no model.
    pub(super) fn is_endpoints_fault(self) -> bool {
        self != Self::Refused
    }
}

/// What all endpoints of a tokenizer share.
#[derive(Debug, Default)]
pub(super) struct Shared {
    pub(super) counters: Counters,
    /// Endpoints that no request may ask: while it is 0, nothing else has to be looked at.
    pub(super) n_excluded: AtomicUsize,
    pub(super) is_split: AtomicBool,
    /// Endpoints found to differ so far.
    pub(super) epoch: AtomicU64,
    /// Wakes the checks when one is due earlier than they know of.
    pub(super) check_is_due: Notify,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) calls: Counter,
    pub(super) hedges: Counter,
    pub(super) hedge_wins: Counter,
    pub(super) late: Counter,
    pub(super) cancelled: Counter,
    pub(super) busy: Counter,
    pub(super) checks: Counter,
    pub(super) failed_checks: Counter,
    failures: [Counter; Failure::ALL.len()],
}

impl Counters {
    pub(super) fn failed(&self, failure: Failure) {
        self.failures[failure as usize].add();
    }
}

/// A number of events.
#[derive(Debug, Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn add(&self) {
        self.0.fetch_add(1, Relaxed);
    }

    pub(super) fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

impl Shared {
    pub(super) fn status(&self, endpoints: Vec<EndpointStatus>) -> RemoteStatus {
        let counters = &self.counters;
        RemoteStatus {
            n_calls: counters.calls.get(),
            n_hedges: counters.hedges.get(),
            n_hedge_wins: counters.hedge_wins.get(),
            n_late: counters.late.get(),
            n_cancelled: counters.cancelled.get(),
            n_busy: counters.busy.get(),
            n_checks: counters.checks.get(),
            n_failed_checks: counters.failed_checks.get(),
            failures: Failure::ALL.map(|failure| (failure, counters.failures[failure as usize].get())),
            is_split: self.is_split.load(Relaxed),
            endpoints,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_counted_under_their_names() {
        for (position, failure) in Failure::ALL.into_iter().enumerate() {
            assert_eq!(failure as usize, position, "{failure:?}");
            let shared = Shared::default();
            shared.counters.failed(failure);
            let counted = shared.status(Vec::new()).failures.into_iter().filter(|(_, n)| *n > 0).collect::<Vec<_>>();
            assert_eq!(counted, [(failure, 1)]);
        }
    }

    #[test]
    fn a_status_that_speaks_of_the_question_is_not_the_endpoints_fault() {
        for (status, is_fault) in [
            (400, false),
            (404, false),
            (413, false),
            (422, false),
            (401, true),
            (403, true),
            (408, true),
            (429, true),
            (500, true),
            (503, true),
            (302, true),
        ] {
            let failure = Failure::of(&Error::Engine(engine::Error::Status(status)));
            assert_eq!(failure.is_endpoints_fault(), is_fault, "{status}");
        }
    }
}
