//! A publisher on a network of its own, whose packets can be dropped without anybody being told.
//!
//! Needs root and `ip`, `unshare` and `nsenter` (iproute2, util-linux), nothing else: packets are dropped by giving
//! each end of a veth pair a wrong hardware address for the other, so that frames arrive and are for nobody.

use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::follower::Follower;
use super::line::{ENDPOINT, SETTLE};
use super::restarts::DETECTION;
use super::{Figures, Outcome, Setting, SourceView};
use crate::publisher::PublisherArgs;
use crate::publisher::process::{PublisherProcess, Talker};

const BEFORE: u64 = 500;
const OUR_MAC: &str = "02:00:00:00:17:01";
const THEIR_MAC: &str = "02:00:00:00:17:02";
const NOBODYS_MAC: &str = "02:00:00:00:17:ff";

/// A network namespace with one link to ours. Both end with the process that holds it.
struct Namespace {
    holder: Talker,
    our_device: String,
    their_device: String,
    our_address: String,
    their_address: String,
}

impl Namespace {
    /// A namespace that has no link yet.
    fn create() -> Result<Self> {
        // Ends with its standard input, thus with the harness.
        let holder = Talker::start(Command::new("unshare").args(["--net", "cat"]))?;
        let id = std::process::id();
        // From the range for benchmarks of networks (RFC 2544): nobody's real address.
        let subnet = id % 200;
        let namespace = Self {
            holder,
            our_device: format!("wr{id}a"),
            their_device: format!("wr{id}b"),
            our_address: format!("198.18.{subnet}.1"),
            their_address: format!("198.18.{subnet}.2"),
        };
        namespace.wait_until_apart()?;
        Ok(namespace)
    }

    /// `unshare` has its namespace only a moment after its start.
    fn wait_until_apart(&self) -> Result<()> {
        let holder = self.holder.id();
        let (ours, theirs) = ("/proc/self/ns/net".to_owned(), format!("/proc/{holder}/ns/net"));
        let started = Instant::now();
        while std::fs::read_link(&ours)? == std::fs::read_link(&theirs)? {
            ensure!(started.elapsed() < SETTLE, "process {holder} has no namespace of its own");
            std::thread::yield_now();
        }
        Ok(())
    }

    fn link(&self) -> Result<()> {
        let Self { our_device, their_device, our_address, their_address, .. } = self;
        let holder = self.holder.id();
        let peer =
            ["peer", "name", their_device.as_str(), "address", THEIR_MAC, "netns", &holder.to_string()].join(" ");
        ip(&format!("link add {our_device} address {OUR_MAC} type veth {peer}"))?;
        ip(&format!("address add {our_address}/30 dev {our_device}"))?;
        ip(&format!("link set {our_device} up"))?;
        self.their_ip(&format!("address add {their_address}/30 dev {their_device}"))?;
        self.their_ip(&format!("link set {their_device} up"))
    }

    /// Says which hardware addresses the ends know each other by.
    fn know(&self, ours: &str, theirs: &str) -> Result<()> {
        let Self { our_device, their_device, our_address, their_address, .. } = self;
        ip(&format!("neighbour replace {their_address} lladdr {theirs} nud permanent dev {our_device}"))?;
        self.their_ip(&format!("neighbour replace {our_address} lladdr {ours} nud permanent dev {their_device}"))
    }

    fn drop_packets(&self) -> Result<()> {
        self.know(NOBODYS_MAC, NOBODYS_MAC)
    }

    fn pass_packets(&self) -> Result<()> {
        self.know(OUR_MAC, THEIR_MAC)
    }

    fn their_ip(&self, words: &str) -> Result<()> {
        succeed(self.inside("ip").args(words.split(' ')))
    }

    /// A program that runs in the namespace.
    fn inside(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--net", "--target", &self.holder.id().to_string()]).arg(program);
        command
    }

    fn publisher(&self, setting: &Setting, args: &PublisherArgs) -> Result<PublisherProcess> {
        PublisherProcess::start_by(self.inside(&setting.binary).arg("publisher"), args)
    }

    /// An endpoint of a publisher inside, as it is reached from outside.
    fn seen_from_outside(&self, endpoint: &str) -> String {
        endpoint.replace("0.0.0.0", &self.their_address)
    }
}

fn ip(words: &str) -> Result<()> {
    succeed(Command::new("ip").args(words.split(' ')))
}

fn succeed(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

pub(super) fn half_open(setting: &Setting) -> Result<Outcome> {
    let namespace = match Namespace::create() {
        Ok(namespace) => namespace,
        Err(error) => return Ok(Outcome::Skipped(format!("no network namespace here: {error:#}"))),
    };
    namespace.link()?;
    namespace.pass_packets()?;
    let any = "tcp://0.0.0.0:0".to_owned();
    let args = PublisherArgs { events: any.clone(), replay: any, start_batches: BEFORE, ..PublisherArgs::default() };
    let mut old = namespace.publisher(setting, &args)?;
    let [events, replay] = [old.events(), old.replay()].map(|endpoint| namespace.seen_from_outside(endpoint));
    let mut follower = Follower::start(&setting.binary)?;
    follower.follow(ENDPOINT, &events, Some(&replay))?;
    let settled = |last: u64| move |view: &SourceView| view.is_settled() && view.last_seq == Some(last);
    follower.wait(ENDPOINT, "the first connection", SETTLE, settled(BEFORE - 1))?;

    namespace.drop_packets()?;
    old.kill()?;
    let successor = PublisherArgs {
        events: old.events().to_owned(),
        replay: old.replay().to_owned(),
        seed: 77,
        start_batches: 2 * BEFORE,
        ..PublisherArgs::default()
    };
    let mut new = namespace.publisher(setting, &successor)?;
    let detection = follower.wait(ENDPOINT, "noticing a dead peer", DETECTION, |view| !view.is_settled())?;
    namespace.pass_packets()?;

    let healed = Instant::now();
    let purge = follower.wait_purged(ENDPOINT, &args.program(), BEFORE, SETTLE)?;
    let n_batches = 2 * BEFORE + 5;
    new.publish(n_batches)?;
    follower.wait(ENDPOINT, "settling after the heal", SETTLE, settled(n_batches - 1))?;
    let converge = healed.elapsed();
    let check = follower.check(ENDPOINT, &successor.program(), n_batches)?;
    let figures = Figures::of(&follower.view(ENDPOINT)?, check);
    let note = format!("noticed after {:.1} s", detection.as_secs_f64());
    let figures = Figures { purge: Some(purge), converge: Some(converge), note, ..figures };
    figures.verified().map(Outcome::Held)
}
