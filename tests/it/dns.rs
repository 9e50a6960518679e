//! Endpoints by DNS, against a name server of which the test decides what it says.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hickory_resolver::TokioResolver;
use hickory_resolver::config::{ConnectionConfig, NameServerConfig, ResolverConfig};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::proto::op::{Message, OpCode, ResponseCode};
use hickory_resolver::proto::rr::rdata::SRV;
use hickory_resolver::proto::rr::{Name, RData, Record};
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use warmroute::discovery::Update;
use warmroute::discovery::dns::{Dns, Records};
use warmroute::discovery::listed::EventPorts;

use crate::fakes::DEADLINE;

const NAME: &str = "engines.test.";

/// What the name server does.
#[derive(Clone, Debug)]
enum Zone {
    /// It has these records, and says that there is no such name where it has none.
    Records(Vec<(&'static str, RData)>),
    Fails,
    Silent,
}

struct NameServer {
    address: SocketAddr,
    zone: Arc<Mutex<Zone>>,
}

impl NameServer {
    async fn start(zone: Zone) -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        let zone = Arc::new(Mutex::new(zone));
        let answers = zone.clone();
        tokio::spawn(async move {
            let mut buffer = [0; 4096];
            while let Ok((n, client)) = socket.recv_from(&mut buffer).await {
                let zone = answers.lock().unwrap().clone();
                if let Some(answer) = answer(&Message::from_vec(&buffer[..n]).unwrap(), &zone) {
                    socket.send_to(&answer.to_vec().unwrap(), client).await.unwrap();
                }
            }
        });
        Self { address, zone }
    }

    fn set(&self, zone: Zone) {
        *self.zone.lock().unwrap() = zone;
    }

    fn resolver(&self) -> TokioResolver {
        let mut udp = ConnectionConfig::udp();
        udp.port = self.address.port();
        let server = NameServerConfig::new(self.address.ip(), true, vec![udp]);
        let config = ResolverConfig::from_parts(None, Vec::new(), vec![server]);
        let mut builder = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default());
        let options = builder.options_mut();
        (options.cache_size, options.timeout, options.attempts) = (0, Duration::from_secs(1), 1);
        builder.build().unwrap()
    }
}

fn answer(question: &Message, zone: &Zone) -> Option<Message> {
    let mut answer = Message::response(question.metadata.id, OpCode::Query);
    let query = question.queries[0].clone();
    answer.add_query(query.clone());
    match zone {
        Zone::Silent => return None,
        Zone::Fails => answer.metadata.response_code = ResponseCode::ServFail,
        Zone::Records(records) => {
            let of_name = records.iter().filter(|(name, _)| name.parse::<Name>().unwrap() == *query.name());
            let (of_kind, others): (Vec<_>, Vec<_>) =
                of_name.partition(|(_, data)| data.record_type() == query.query_type());
            if of_kind.is_empty() && others.is_empty() {
                answer.metadata.response_code = ResponseCode::NXDomain;
            }
            for (_, data) in of_kind {
                answer.add_answer(Record::from_rdata(query.name().clone(), 1, data.clone()));
            }
        }
    }
    Some(answer)
}

fn v4(last: u8) -> RData {
    RData::A(Ipv4Addr::new(10, 0, 0, last).into())
}

fn v6(last: u16) -> RData {
    RData::AAAA(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, last).into())
}

fn srv(port: u16, target: &str) -> RData {
    RData::SRV(SRV::new(0, 0, port, target.parse().unwrap()))
}

/// Discovery at work.
struct Discovery {
    updates: mpsc::UnboundedReceiver<Update>,
    shutdown: CancellationToken,
}

impl Drop for Discovery {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

impl Discovery {
    fn start(server: &NameServer, records: Records) -> Self {
        let (sender, updates) = mpsc::unbounded_channel();
        let shutdown = CancellationToken::new();
        let dns = Dns {
            resolver: server.resolver(),
            name: NAME.to_owned(),
            records,
            interval: Duration::from_millis(50),
            events: EventPorts { events: 5557, replay: 5558, ranks: 1 },
            on_update: Box::new(move |update| drop(sender.send(update))),
            model: "tiny".into(),
        };
        tokio::spawn(dns.run(shutdown.clone()));
        Self { updates, shutdown }
    }

    async fn next(&mut self) -> Update {
        timeout(DEADLINE, self.updates.recv()).await.expect("an update").expect("discovery goes on")
    }

    /// The next listing; what is said before it.
    async fn listing(&mut self) -> (Vec<String>, Vec<Update>) {
        let mut before = Vec::new();
        loop {
            match self.next().await {
                Update::Listed(listed) => {
                    return (listed.iter().map(|listed| listed.address.to_string()).collect(), before);
                }
                other => before.push(other),
            }
        }
    }

    /// Waits for this listing. A change of the zone may come between two questions of a round, whose listing is then of
    /// both.
    async fn wait_for_listing(&mut self, expected: &[&str]) {
        while self.listing().await.0 != expected {}
    }

    /// Waits until `update` is said; there must be no listing before it.
    async fn wait_for(&mut self, update: &Update) {
        loop {
            match self.next().await {
                found if found == *update => return,
                Update::Listed(listed) => panic!("{listed:?} before {update:?}"),
                _ => {}
            }
        }
    }
}

#[tokio::test]
async fn addresses_of_both_families_are_followed() {
    let server = NameServer::start(Zone::Records(vec![(NAME, v4(1))])).await;
    let mut discovery = Discovery::start(&server, Records::Addresses { port: 8000 });
    let listed = loop {
        if let Update::Listed(listed) = discovery.next().await {
            break listed;
        }
    };
    assert_eq!((&*listed[0].identity, &*listed[0].sources[0].events), ("10.0.0.1:8000", "tcp://10.0.0.1:5557"));
    discovery.wait_for(&Update::Confirmed).await;
    server.set(Zone::Records(vec![(NAME, v4(2)), (NAME, v6(1)), ("other.test.", v4(9))]));
    discovery.wait_for_listing(&["10.0.0.2:8000", "[fd00::1]:8000"]).await;
    server.set(Zone::Records(vec![(NAME, v6(1))]));
    discovery.wait_for_listing(&["[fd00::1]:8000"]).await;
}

#[tokio::test]
async fn a_name_server_that_fails_takes_nothing_away() {
    let server = NameServer::start(Zone::Fails).await;
    let mut discovery = Discovery::start(&server, Records::Addresses { port: 8000 });
    discovery.wait_for(&Update::Failed("unresolved")).await;
    server.set(Zone::Records(vec![(NAME, v4(1))]));
    assert_eq!(discovery.listing().await.0, ["10.0.0.1:8000"]);
    for zone in [Zone::Fails, Zone::Silent] {
        server.set(zone);
        for _ in 0..2 {
            discovery.wait_for(&Update::Failed("unresolved")).await;
        }
        server.set(Zone::Records(vec![(NAME, v4(1))]));
        discovery.wait_for(&Update::Confirmed).await;
    }
}

#[tokio::test]
async fn a_name_that_is_gone_is_believed_to_be_when_that_is_repeated() {
    let server = NameServer::start(Zone::Records(vec![(NAME, v4(1))])).await;
    let mut discovery = Discovery::start(&server, Records::Addresses { port: 8000 });
    assert_eq!(discovery.listing().await.0.len(), 1);
    for gone in [vec![], vec![(NAME, srv(1, "a.test."))]] {
        server.set(Zone::Records(gone));
        let (listing, before) = discovery.listing().await;
        assert_eq!(listing, [] as [&str; 0]);
        assert_eq!(before.iter().filter(|update| **update == Update::Failed("empty")).count(), 2, "{before:?}");
        server.set(Zone::Records(vec![(NAME, v4(1))]));
        assert_eq!(discovery.listing().await.0.len(), 1);
    }
}

#[tokio::test]
async fn services_have_their_own_ports_and_a_target_that_is_gone_is_left_out() {
    let records = vec![
        (NAME, srv(8000, "a.test.")),
        (NAME, srv(8001, "a.test.")),
        (NAME, srv(8000, "b.test.")),
        (NAME, srv(8000, "gone.test.")),
        (NAME, srv(8000, ".")),
        ("a.test.", v4(1)),
        ("b.test.", v6(2)),
    ];
    let server = NameServer::start(Zone::Records(records)).await;
    let mut discovery = Discovery::start(&server, Records::Services);
    assert_eq!(discovery.listing().await.0, ["10.0.0.1:8000", "10.0.0.1:8001", "[fd00::2]:8000"]);
}
