//! One request's question, put to one endpoint and, if that is slow or fails, to a second one.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, Sleep};

use super::RemoteTokenizer;
use super::server::{Claim, Server};
use super::status::Failure;
use crate::engine;
use crate::request::Question;
use crate::tokenizer::{Error, Tokens};

/// Share of the budget after which the second endpoint is asked. Tokenizing takes a small part of the budget, so half
/// of it is far beyond the usual, and the other half is as far enough for the second one.
const HEDGE_AFTER: f64 = 0.5;
/// Share of the caller's wait by which an endpoint must have been asked to be blamed for its end: the second one is,
/// when it was asked because the first was slow, and not when it was asked in the last moment because the first had
/// failed.
const LATEST_TO_BLAME: f64 = 0.6;
/// Budgets after which a call ends even though its answer would still be worth having: what a tokenizer that has gone
/// silent may cost in memory and connections.
const HARD_DEADLINE: u32 = 4;

/// A question under way. It goes on for as long as it is polled, also when it is [overdue](Self::overdue). Dropping it
/// closes its connections, and is no failure of an endpoint.
pub struct Call {
    tokenizer: Arc<RemoteTokenizer>,
    question: Arc<Question>,
    asks: Vec<Ask>,
    /// Who is asked second.
    spare: Option<Arc<Server>>,
    /// Ends when the second is to be asked, then at the hard deadline.
    timer: Pin<Box<Sleep>>,
    hard_deadline: Instant,
    longest: Duration,
    /// Whether the question may honestly take longer than any budget: then nobody is blamed for being late with it, and
    /// nobody else is asked because the first is.
    is_capped: bool,
    is_overdue: bool,
    /// Why there is no answer yet, once there is a reason.
    error: Option<Error>,
}

/// The question, put to one endpoint.
struct Ask {
    answer: Pin<Box<dyn Future<Output = Result<Tokens, Error>> + Send>>,
    claim: Claim,
    is_hedge: bool,
    since: Instant,
    /// Its endpoint's breaker knows how it ended.
    is_settled: bool,
}

impl Ask {
    fn failed(&mut self, failure: Failure) {
        if !std::mem::replace(&mut self.is_settled, true) {
            self.claim.failed(failure);
        }
    }

    /// Notes that it is late, which is the endpoint's fault or that of a question too large for any budget.
    fn late(&mut self, is_capped: bool) {
        if !is_capped {
            self.failed(Failure::Overdue);
        } else if !std::mem::replace(&mut self.is_settled, true) {
            self.claim.excused(Failure::Overdue);
        }
    }
}

impl Call {
    /// Asks the first of `servers` that may be asked, and keeps the one after it as the second.
    pub(super) fn start(
        tokenizer: &Arc<RemoteTokenizer>,
        question: Arc<Question>,
        servers: impl IntoIterator<Item = Arc<Server>>,
    ) -> Self {
        let (now, budget) = (Instant::now(), tokenizer.config.budget.of(&question));
        let longest = budget * HARD_DEADLINE;
        let is_capped = tokenizer.config.budget.is_capped(&question);
        let mut call = Self {
            tokenizer: tokenizer.clone(),
            question,
            asks: Vec::with_capacity(2),
            spare: None,
            timer: Box::pin(tokio::time::sleep_until(now + budget.mul_f64(HEDGE_AFTER))),
            hard_deadline: now + longest,
            longest,
            is_capped,
            is_overdue: false,
            error: None,
        };
        let mut servers = servers.into_iter();
        while call.asks.is_empty()
            && let Some(server) = servers.next()
        {
            call.ask(&server, false);
        }
        if call.asks.is_empty() {
            call.error.get_or_insert_with(|| tokenizer.nobody());
        } else {
            tokenizer.shared.counters.calls.add();
            call.spare = servers.next();
        }
        call
    }

    /// The caller waits no longer. That is a failure of whoever has not answered, unless it was asked too late to tell
    /// or the question is too large for any budget ([`Budget::is_capped`](crate::tokenizer::Budget::is_capped)); the
    /// call may go on, and what it brings is still worth caching. Nobody else is asked any more.
    pub fn overdue(&mut self) {
        self.is_overdue = true;
        self.spare = None;
        let begun = self.hard_deadline - self.longest;
        let asked_by = begun + begun.elapsed().mul_f64(LATEST_TO_BLAME);
        for ask in &mut self.asks {
            if ask.since <= asked_by {
                ask.late(self.is_capped);
            }
            ask.is_settled = true;
        }
    }

    fn ask(&mut self, server: &Arc<Server>, is_hedge: bool) {
        match server.claim(&self.tokenizer.permits) {
            Ok(claim) => {
                let answer = Box::pin(self.tokenizer.send(server.target.clone(), self.question.clone()));
                self.asks.push(Ask { answer, claim, is_hedge, since: Instant::now(), is_settled: false });
            }
            Err(error) => self.error = self.error.take().or(Some(error)),
        }
    }

    /// Asks the second endpoint, if there is one that has not been asked.
    fn hedge(&mut self) {
        if let Some(server) = self.spare.take() {
            let n_asks = self.asks.len();
            self.ask(&server, true);
            if self.asks.len() > n_asks {
                self.tokenizer.shared.counters.hedges.add();
            }
        }
    }

    /// Polls those that are asked. Some: the call has ended.
    fn poll_asks(&mut self, cx: &mut Context<'_>) -> Option<Result<Tokens, Error>> {
        let mut i = 0;
        while i < self.asks.len() {
            match self.asks[i].answer.as_mut().poll(cx) {
                Poll::Pending => i += 1,
                Poll::Ready(answer) => {
                    let mut ask = self.asks.remove(i);
                    match checked(answer, &ask) {
                        Ok(tokens) => return Some(Ok(self.won(&ask, tokens))),
                        Err(error) => {
                            ask.failed(Failure::of(&error));
                            if speaks_of_question(&error) {
                                return Some(Err(error));
                            }
                            self.error = Some(error);
                            // Appended, hence polled by this loop.
                            self.hedge();
                        }
                    }
                }
            }
        }
        self.asks.is_empty().then(|| Err(self.error.take().unwrap_or_else(|| self.tokenizer.nobody())))
    }

    fn won(&mut self, ask: &Ask, tokens: Tokens) -> Tokens {
        if ask.is_hedge {
            self.tokenizer.shared.counters.hedge_wins.add();
            // Without this a silent endpoint whose calls are always saved by the second would cost them all half a
            // budget.
            self.asks.iter_mut().for_each(|ask| ask.failed(Failure::Outrun));
        }
        if self.is_overdue {
            self.tokenizer.shared.counters.late.add();
        } else {
            ask.claim.passed();
        }
        tokens
    }
}

/// The answer, unless its endpoint has turned out to have other tokens meanwhile.
fn checked(answer: Result<Tokens, Error>, ask: &Ask) -> Result<Tokens, Error> {
    if answer.is_ok() && ask.claim.server.differs() { Err(Error::Differs) } else { answer }
}

/// Whether another endpoint would say the same. Not so 404: only some may have an adapter.
fn speaks_of_question(error: &Error) -> bool {
    matches!(error, Error::Engine(engine::Error::Status(400 | 413 | 422)))
}

impl Future for Call {
    type Output = Result<Tokens, Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        loop {
            if let Some(ended) = this.poll_asks(cx) {
                this.asks.clear();
                return Poll::Ready(ended);
            }
            if this.timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            if Instant::now() >= this.hard_deadline {
                this.asks.iter_mut().for_each(|ask| ask.late(this.is_capped));
                this.asks.clear();
                return Poll::Ready(Err(Error::Budget(this.longest)));
            }
            if !this.is_capped {
                this.hedge();
            }
            this.timer.as_mut().reset(this.hard_deadline);
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        if !self.asks.is_empty() && !self.is_overdue {
            self.tokenizer.shared.counters.cancelled.add();
        }
    }
}

impl fmt::Debug for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let asked: Vec<String> = self.asks.iter().map(|ask| ask.claim.server.target.to_string()).collect();
        f.debug_struct("Call").field("asked", &asked).field("is_overdue", &self.is_overdue).finish_non_exhaustive()
    }
}
