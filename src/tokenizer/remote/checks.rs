//! What is asked off the request path: the fixed text, of every endpoint, in rounds.
//!
//! It is the trial of an endpoint whose breaker is open, the canary of one that answers for another model, and the
//! health check of one that nobody asks. A round asks all that are due, eight at a time, each with the budget that a
//! request of that size would get, and ends with the verdict on who differs.

use std::collections::HashSet;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::RemoteTokenizer;
use super::canary::{Fingerprint, Verdict, judge, question};
use super::server::Server;
use super::status::Failure;
use crate::request::Question;
use crate::tokenizer::Error;

/// Checks under way at a time.
const AT_A_TIME: usize = 8;
/// How often the list of endpoints is looked at: how long an endpoint may be asked by requests before it is checked.
const LIST_INTERVAL: Duration = Duration::from_secs(1);

impl RemoteTokenizer {
    /// Checks the endpoints, which `endpoints` lists anew for each round, until `shutdown`; with an endpoint of its
    /// own, that one. Forgets those that are listed no more.
    ///
    /// # Errors
    /// None.
    pub async fn run(
        self: Arc<Self>,
        endpoints: impl Fn() -> Vec<SocketAddr> + Send + 'static,
        shutdown: CancellationToken,
    ) -> Result<(), Infallible> {
        let rounds = async {
            loop {
                self.follow(&endpoints());
                self.check_due().await;
                let next = self.servers().iter().map(|server| server.check_due()).min();
                let listed = Instant::now() + LIST_INTERVAL;
                tokio::select! {
                    () = tokio::time::sleep_until(next.map_or(listed, |next| next.min(listed))) => {}
                    () = self.shared.check_is_due.notified() => {}
                }
            }
        };
        shutdown.run_until_cancelled(rounds).await;
        Ok(())
    }

    /// Knows `listed` and nobody else.
    fn follow(&self, listed: &[SocketAddr]) {
        if self.own.is_some() {
            return;
        }
        let listed: HashSet<SocketAddr> = listed.iter().copied().collect();
        for address in &listed {
            self.server(*address);
        }
        self.endpoints.pin().retain(|address, server| {
            let stays = listed.contains(address);
            if !stays {
                server.leave();
            }
            stays
        });
    }

    /// Checks all that are due.
    async fn check_due(&self) {
        let now = Instant::now();
        let due = self.servers().into_iter().filter(|server| server.check_due() <= now).collect::<Vec<_>>();
        if !due.is_empty() {
            let question = &Arc::new(question(self.renders.load(Relaxed)));
            stream::iter(due).for_each_concurrent(AT_A_TIME, |server| self.check(server, question)).await;
        }
        self.exclude_who_differs();
    }

    async fn check(&self, server: Arc<Server>, question: &Arc<Question>) {
        let begun = server.check_began();
        let budget = self.config.budget.of(question);
        let answer = tokio::time::timeout(budget, self.send(server.target.clone(), question.clone())).await;
        match answer.unwrap_or(Err(Error::Budget(budget))) {
            Ok(tokens) if !tokens.ids.is_empty() => server.check_passed(begun, Fingerprint::of(&tokens.ids)),
            Ok(_) => server.check_failed(begun, Failure::Nonsense),
            Err(error) => server.check_failed(begun, Failure::of(&error)),
        }
    }

    /// Has those that answer vote on what the tokens of the fixed text are. Without a majority, and where only one of
    /// several endpoints is left to vote, everybody stays what the last majority made of them: the failure of an
    /// endpoint must not bring one back that is known to differ.
    fn exclude_who_differs(&self) {
        let servers = self.servers();
        let known: Vec<(&Arc<Server>, Fingerprint)> =
            servers.iter().filter_map(|server| Some((server, server.vote()?))).collect();
        let fingerprints: Vec<Fingerprint> = known.iter().map(|(_, fingerprint)| *fingerprint).collect();
        let verdict = judge(&fingerprints);
        let is_alone = known.len() == 1 && servers.len() > 1;
        for (server, fingerprint) in known.iter().filter(|_| !is_alone && verdict != Verdict::Split) {
            server.set_differs(matches!(verdict, Verdict::Majority(majority) if majority != *fingerprint));
        }
        let is_split = verdict == Verdict::Split;
        match (self.shared.is_split.swap(is_split, Relaxed), is_split) {
            (false, true) => {
                let endpoints: Vec<String> = known.iter().map(|(server, _)| server.target.to_string()).collect();
                warn!(
                    ?endpoints,
                    "endpoints of one pool make different tokens of a fixed text, and none of the answers has a majority"
                );
            }
            (true, false) => {
                info!("an answer has a majority again among the endpoints that make tokens of a fixed text");
            }
            (false, false) | (true, true) => {}
        }
    }
}
