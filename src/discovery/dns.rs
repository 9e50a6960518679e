//! Endpoints that a DNS name stands for: its A and AAAA records, or the targets of its SRV records.
//!
//! The name is asked for anew when its records expire, at the latest after the configured interval and at the earliest
//! after a second; nothing is remembered in between. A name server that does not answer, or answers with an error,
//! leaves the endpoints as they were.
//!
//! "No such name" and "no records" are what a headless Service without ready pods looks like, and what a DNS server says
//! that has just been started and knows nothing yet. Such an answer is therefore believed only when it has come
//! three times in a row.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use hickory_resolver::TokioResolver;
use hickory_resolver::lookup::Lookup;
use hickory_resolver::net::NetError;
use hickory_resolver::proto::rr::{Name, RData, RecordType};
use tokio_util::sync::CancellationToken;

use super::listed::{EventPorts, Listed};
use super::outage::Outage;
use super::pause::pause;
use super::{OnUpdate, Update};

/// So often in a row has a name to have no records before its endpoints are taken away.
const EMPTY_IN_A_ROW: u32 = 3;
/// Shortest time between two questions, and the one after an empty answer.
const SHORTEST: Duration = Duration::from_secs(1);
/// Greatest pause after failures.
const GREATEST_PAUSE: Duration = Duration::from_secs(10);

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Records {
    /// A and AAAA; the engines listen on this port.
    Addresses {
        /// The port.
        port: u16,
    },
    /// SRV, which has the ports.
    Services,
}

/// The background task of one pool.
pub struct Dns {
    /// Asks the name servers.
    pub resolver: TokioResolver,
    /// The name.
    pub name: String,
    /// What is asked for.
    pub records: Records,
    /// Longest time between two questions.
    pub interval: Duration,
    /// Where the engines publish KV events.
    pub events: EventPorts,
    /// Takes the listings.
    pub on_update: OnUpdate,
    /// The model, for the log.
    pub model: Arc<str>,
}

/// There is no name server to ask.
#[derive(Debug, thiserror::Error)]
#[error("the system's name servers are not known")]
pub struct NoNameServer(#[source] NetError);

/// Asks the system's name servers, and remembers nothing.
///
/// # Errors
/// [`NoNameServer`] when the system's configuration cannot be read.
pub fn system_resolver() -> Result<TokioResolver, NoNameServer> {
    let mut builder = TokioResolver::builder_tokio().map_err(NoNameServer)?;
    builder.options_mut().cache_size = 0;
    builder.build().map_err(NoNameServer)
}

#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("the name cannot be resolved")]
    Resolve(#[from] NetError),
    #[error("the name has no records: believed if it is so {EMPTY_IN_A_ROW} times in a row")]
    Empty,
}

impl Failure {
    fn as_str(&self) -> &'static str {
        match self {
            Self::Resolve(_) => "unresolved",
            Self::Empty => "empty",
        }
    }
}

/// The addresses that a name stands for, and for how long.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Answer {
    addresses: BTreeSet<SocketAddr>,
    ttl: Duration,
}

impl Dns {
    /// Asks until `shutdown`.
    ///
    /// # Errors
    /// None.
    pub async fn run(mut self, shutdown: CancellationToken) -> Result<(), Infallible> {
        let mut outage = Outage::new(self.model.clone());
        let mut following = Following { interval: self.interval, ..Following::default() };
        let asking = async {
            loop {
                let answer = self.ask().await;
                let update = match following.take(answer) {
                    Ok(Some(addresses)) => Ok(Update::Listed(self.listed(addresses))),
                    Ok(None) => Ok(Update::Confirmed),
                    Err(failure) => Err(failure),
                };
                let update = update.inspect(|_| outage.ended()).unwrap_or_else(|failure| {
                    outage.failed(&failure);
                    Update::Failed(failure.as_str())
                });
                (self.on_update)(update);
                tokio::time::sleep(following.next).await;
            }
        };
        let _: Option<Infallible> = shutdown.run_until_cancelled(asking).await;
        Ok(())
    }

    fn listed(&self, addresses: BTreeSet<SocketAddr>) -> Vec<Listed> {
        let listed = |address: SocketAddr| Listed::at(address, self.events.sources(address.ip(), 0));
        addresses.into_iter().map(listed).collect()
    }

    async fn ask(&self) -> Result<Answer, Failure> {
        match self.records {
            Records::Addresses { port } => {
                let (ips, ttl) = self.addresses(&self.name).await?;
                Ok(Answer { addresses: ips.into_iter().map(|ip| SocketAddr::new(ip, port)).collect(), ttl })
            }
            Records::Services => self.services().await,
        }
    }

    /// A target without addresses has left already; one that cannot be asked for is a failure.
    async fn services(&self) -> Result<Answer, Failure> {
        let (targets, mut ttl) = self.records(&self.name, RecordType::SRV, service).await?;
        let mut addresses = BTreeSet::new();
        for (target, port) in targets {
            let (ips, lasts) = self.addresses(&target).await?;
            ttl = ttl.min(lasts);
            addresses.extend(ips.into_iter().map(|ip| SocketAddr::new(ip, port)));
        }
        Ok(Answer { addresses, ttl })
    }

    async fn addresses(&self, name: &str) -> Result<(Vec<IpAddr>, Duration), Failure> {
        let v4 = self.records(name, RecordType::A, address);
        let v6 = self.records(name, RecordType::AAAA, address);
        let ((mut ips, ttl), (v6, v6_ttl)) = tokio::try_join!(v4, v6)?;
        ips.extend(v6);
        Ok((ips, ttl.min(v6_ttl)))
    }

    async fn records<T>(
        &self,
        name: &str,
        kind: RecordType,
        read: impl Fn(&RData) -> Option<T>,
    ) -> Result<(Vec<T>, Duration), Failure> {
        match self.resolver.lookup(name, kind).await {
            Ok(lookup) => Ok((lookup.answers().iter().filter_map(|record| read(&record.data)).collect(), ttl(&lookup))),
            Err(error) if error.is_no_records_found() => Ok((Vec::new(), Duration::MAX)),
            Err(error) => Err(error.into()),
        }
    }
}

fn ttl(lookup: &Lookup) -> Duration {
    let seconds = lookup.answers().iter().map(|record| record.ttl).min().unwrap_or(0);
    Duration::from_secs(seconds.into())
}

fn address(data: &RData) -> Option<IpAddr> {
    let ip: IpAddr = match data {
        RData::A(a) => a.0.into(),
        RData::AAAA(aaaa) => aaaa.0.into(),
        _ => return None,
    };
    (!ip.is_unspecified()).then_some(ip)
}

/// Target and port; a target `.` means that there is no such service (RFC 2782).
fn service(data: &RData) -> Option<(String, u16)> {
    let RData::SRV(srv) = data else { return None };
    (srv.target != Name::root() && srv.port > 0).then(|| (srv.target.to_string(), srv.port))
}

/// What the answers so far come to.
#[derive(Debug, Default)]
struct Following {
    interval: Duration,
    /// What was listed last.
    known: Option<BTreeSet<SocketAddr>>,
    n_empty: u32,
    n_failures: u32,
    /// When to ask again.
    next: Duration,
}

impl Following {
    /// The addresses to list now; none when they are those that were listed last.
    fn take(&mut self, answer: Result<Answer, Failure>) -> Result<Option<BTreeSet<SocketAddr>>, Failure> {
        let Answer { addresses, ttl } = answer.inspect_err(|_| {
            self.n_failures = self.n_failures.saturating_add(1);
            self.next = SHORTEST.min(self.interval) + pause(self.n_failures, SHORTEST, GREATEST_PAUSE, fastrand::f64());
        })?;
        self.n_failures = 0;
        self.next = ttl.max(SHORTEST).min(self.interval);
        self.n_empty = if addresses.is_empty() { self.n_empty.saturating_add(1) } else { 0 };
        if self.known.as_ref() == Some(&addresses) {
            return Ok(None);
        }
        if (1..EMPTY_IN_A_ROW).contains(&self.n_empty) {
            self.next = SHORTEST.min(self.interval);
            return Err(Failure::Empty);
        }
        self.known = Some(addresses.clone());
        Ok(Some(addresses))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_secs(10);

    fn following() -> Following {
        Following { interval: INTERVAL, ..Following::default() }
    }

    fn answer(ports: &[u16], ttl: u64) -> Result<Answer, Failure> {
        let addresses = ports.iter().map(|port| ([10, 0, 0, 1], *port).into()).collect();
        Ok(Answer { addresses, ttl: Duration::from_secs(ttl) })
    }

    fn ports(taken: Result<Option<BTreeSet<SocketAddr>>, Failure>) -> Result<Option<Vec<u16>>, &'static str> {
        let ports = |addresses: BTreeSet<SocketAddr>| addresses.iter().map(SocketAddr::port).collect();
        taken.map(|taken| taken.map(ports)).map_err(|failure| failure.as_str())
    }

    #[test]
    fn an_empty_answer_counts_when_it_is_repeated() {
        let mut following = following();
        assert_eq!(ports(following.take(answer(&[1], 5))), Ok(Some(vec![1])));
        for _ in 1..EMPTY_IN_A_ROW {
            assert_eq!(ports(following.take(answer(&[], 5))), Err("empty"));
            assert_eq!(following.next, SHORTEST, "soon again");
        }
        assert_eq!(ports(following.take(answer(&[], 5))), Ok(Some(vec![])));
        assert_eq!(ports(following.take(answer(&[], 5))), Ok(None));
        assert_eq!(ports(following.take(answer(&[1], 5))), Ok(Some(vec![1])), "at once");
        assert_eq!(ports(following.take(answer(&[], 5))), Err("empty"));
        assert_eq!(ports(following.take(answer(&[1], 5))), Ok(None));
        assert_eq!(ports(following.take(answer(&[], 5))), Err("empty"), "counted anew");
    }

    #[test]
    fn failures_neither_list_nor_count_as_empty() {
        let mut following = following();
        let failure = || Err(Failure::Resolve(NetError::Timeout));
        assert_eq!(ports(following.take(failure())), Err("unresolved"));
        assert_eq!(ports(following.take(answer(&[2], 5))), Ok(Some(vec![2])));
        for _ in 0..10 {
            assert_eq!(ports(following.take(failure())), Err("unresolved"));
            assert!((SHORTEST..=SHORTEST + GREATEST_PAUSE).contains(&following.next));
        }
        assert_eq!(ports(following.take(answer(&[2], 5))), Ok(None));
    }

    #[test]
    fn a_name_is_asked_for_again_when_its_records_expire() {
        let mut following = following();
        for (ttl, next) in [(0, 1), (1, 1), (5, 5), (10, 10), (3_600, 10)] {
            following.take(answer(&[1], ttl)).expect("an answer");
            assert_eq!(following.next, Duration::from_secs(next), "{ttl}");
        }
    }
}
