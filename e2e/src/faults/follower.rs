//! The event plane in a process of its own, as the router has it: it can be stopped, its memory is nobody else's, and
//! what it credits is read through the index as a request would.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};
use warmroute::events::socket::{EventPlane, ModelSettings, Source, SourceStatus};
use warmroute::routing::endpoint::EndpointId;
use warmroute::routing::hash::BlockHash;
use warmroute::routing::index::{ContentDigest, IndexLimits, KeyKinds, KeyspaceIndex, Overlaps, PrefixIndex};

use crate::publisher::process::Talker;
use crate::publisher::program::{ALGORITHM, Program, ProgramOptions, Truth};
use crate::publisher::standard_input;

const MODEL: &str = "tiny";
/// `PYTHONHASHSEED` that the follower is configured with.
const PYTHONHASHSEED: &str = "0";
/// Truths that are remembered: a purge asks for the same one again and again.
const N_TRUTHS: usize = 4;
const POLL: Duration = Duration::from_millis(1);

/// What a follower is asked.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Ask {
    Follow {
        endpoint: u32,
        events: String,
        replay: Option<String>,
    },
    Status,
    /// How much of what a program's cache holds is credited.
    Check {
        endpoint: u32,
        program: ProgramOptions,
        n_batches: u64,
    },
}

/// What it answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Answer {
    Done,
    Status(Vec<SourceView>),
    Check(Check),
}

/// A source as the follower sees it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct SourceView {
    /// Its endpoint.
    pub endpoint: u32,
    /// Its state.
    pub state: String,
    /// Whether its hashes are known to be others than the configured ones.
    pub is_disproved: bool,
    /// Number of the last batch applied.
    pub last_seq: Option<u64>,
    /// Blocks that the index holds for it.
    pub n_blocks: u64,
    /// Generations started.
    pub n_generations: u64,
    /// Batches applied.
    pub n_batches: u64,
    /// Events applied.
    pub n_events: u64,
    /// Gaps of the live stream.
    pub n_gaps: u64,
    /// Replays requested.
    pub n_replays: u64,
    /// Events that were of no use.
    pub n_skipped: u64,
    /// Batches that could not be decoded.
    pub n_decode_failures: u64,
}

/// What a source is credited with, held against what its publisher holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// Blocks that the publisher holds.
    pub n_held: u64,
    /// Of these, blocks that are credited.
    pub n_credited: u64,
    /// Blocks in the index, or credited, that the publisher does not hold.
    pub n_false: u64,
    /// Whether the source's digest is that of the blocks that the publisher holds.
    pub is_digest_equal: bool,
}

impl SourceView {
    fn of(status: &SourceStatus) -> Self {
        Self {
            endpoint: status.endpoint.0,
            state: status.state.as_str().to_owned(),
            is_disproved: !status.disproved.is_empty(),
            last_seq: status.last_seq.map(|seq| seq.0),
            n_blocks: status.n_blocks,
            n_generations: status.n_generations,
            n_batches: status.n_batches,
            n_events: status.n_stored + status.n_removed + status.n_cleared,
            n_gaps: status.n_gaps,
            n_replays: status.n_replays,
            n_skipped: status.n_skipped,
            n_decode_failures: status.n_decode_failures,
        }
    }

    /// Whether it claims to know everything.
    pub fn is_live(&self) -> bool {
        self.state == "live"
    }

    /// Whether it follows the live stream and waits for nothing.
    pub fn is_settled(&self) -> bool {
        self.is_live() || self.state == "incomplete"
    }
}

impl Check {
    /// Whether nothing is missing and nothing too much.
    pub fn is_exact(&self) -> bool {
        self.n_false == 0 && self.n_credited == self.n_held && self.is_digest_equal
    }
}

/// Runs a follower until standard input ends.
///
/// # Errors
/// When a question is not understood.
pub fn run_follower() -> Result<()> {
    raise_file_limit()?;
    let questions = standard_input()?;
    let mut follower = Plane::start();
    while let Ok(question) = questions.recv() {
        let ask = serde_json::from_str(&question).with_context(|| format!("question {question:?}"))?;
        println!("{}", serde_json::to_string(&follower.answer(ask)?)?);
    }
    Ok(())
}

/// As many files as may be: a source has about five.
pub(crate) fn raise_file_limit() -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("cannot read the limit of open files")?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("cannot raise the limit of open files")
}

/// A source as the configuration would describe a publisher of [`crate::publisher`].
pub(crate) fn source(endpoint: u32, events: String, replay: Option<String>) -> Source {
    // The address is a name here: nothing is dialled there.
    let address = SocketAddr::from((Ipv4Addr::from(0x0a00_0000 + endpoint), 8000));
    let model = ModelSettings {
        model: MODEL.into(),
        algorithm: ALGORITHM,
        pythonhashseed: Some(PYTHONHASHSEED.to_owned()),
        adapters: Vec::new(),
        reports: false,
    };
    Source {
        endpoint: EndpointId(endpoint),
        address,
        events,
        replay,
        rank: 0,
        model: Arc::new(model),
        endpoint_knowledge: Arc::default(),
    }
}

/// The event plane with its index.
struct Plane {
    index: Arc<PrefixIndex>,
    plane: EventPlane,
    truths: Vec<(ProgramOptions, u64, Truth)>,
}

impl Plane {
    fn start() -> Self {
        let index = Arc::new(PrefixIndex::new(IndexLimits::default()));
        let plane = EventPlane::start(&index);
        Self { index, plane, truths: Vec::new() }
    }

    fn follow(&self, endpoint: u32, events: String, replay: Option<String>) {
        self.plane.add(source(endpoint, events, replay));
    }

    fn views(&self) -> Vec<SourceView> {
        self.plane.status().iter().map(SourceView::of).collect()
    }

    fn answer(&mut self, ask: Ask) -> Result<Answer> {
        Ok(match ask {
            Ask::Follow { endpoint, events, replay } => {
                self.follow(endpoint, events, replay);
                Answer::Done
            }
            Ask::Status => Answer::Status(self.views()),
            Ask::Check { endpoint, program, n_batches } => Answer::Check(self.check(endpoint, program, n_batches)?),
        })
    }

    fn check(&mut self, endpoint: u32, program: ProgramOptions, n_batches: u64) -> Result<Check> {
        let position = self.remember(program, n_batches);
        let truth = &self.truths[position].2;
        let keyspaces: Vec<Arc<KeyspaceIndex>> =
            self.index.keyspaces_of(MODEL).into_iter().map(|(_, index)| index).collect();
        let mut overlaps = Overlaps::default();
        let mut is_credited = |hash: &BlockHash| {
            keyspaces.iter().any(|index| {
                index.overlaps(&[*hash], KeyKinds::PLAIN, &mut overlaps);
                overlaps.matched(EndpointId(endpoint)) > 0
            })
        };
        let n_credited = truth.held.iter().filter(|hash| is_credited(hash)).count() as u64;
        let n_gone = truth.gone.iter().filter(|hash| is_credited(hash)).count() as u64;
        let status = self.plane.status().into_iter().find(|status| status.endpoint == EndpointId(endpoint));
        let status = status.context("no such source")?;
        // What no question can name: once hashes are proved, all that the index holds for the source is credited.
        let n_unknown = if n_credited > 0 { status.n_blocks.saturating_sub(n_credited) } else { 0 };
        let mut digest = ContentDigest::default();
        truth.held.iter().for_each(|hash| digest.add(*hash));
        let n_held = truth.held.len() as u64;
        Ok(Check { n_held, n_credited, n_false: n_gone.max(n_unknown), is_digest_equal: digest == status.digest })
    }

    /// The truth's position.
    fn remember(&mut self, program: ProgramOptions, n_batches: u64) -> usize {
        let known = self.truths.iter().position(|(options, number, _)| (options, *number) == (&program, n_batches));
        known.unwrap_or_else(|| {
            if self.truths.len() == N_TRUTHS {
                self.truths.remove(0);
            }
            let truth = Program::truth_after(&program, n_batches);
            self.truths.push((program, n_batches, truth));
            self.truths.len() - 1
        })
    }
}

/// A follower in the harness's hand.
#[derive(Debug)]
pub(crate) struct Follower(Talker);

impl Follower {
    pub(crate) fn start(binary: &Path) -> Result<Self> {
        Ok(Self(Talker::start(Command::new(binary).arg("follower"))?))
    }

    pub(crate) fn follow(&mut self, endpoint: u32, events: &str, replay: Option<&str>) -> Result<()> {
        let ask = Ask::Follow { endpoint, events: events.to_owned(), replay: replay.map(str::to_owned) };
        self.ask(&ask).map(|_| ())
    }

    pub(crate) fn views(&mut self) -> Result<Vec<SourceView>> {
        match self.ask(&Ask::Status)? {
            Answer::Status(views) => Ok(views),
            answer => bail!("the follower answers {answer:?}, expected its status"),
        }
    }

    pub(crate) fn view(&mut self, endpoint: u32) -> Result<SourceView> {
        self.views()?.into_iter().find(|view| view.endpoint == endpoint).context("the follower has no such source")
    }

    pub(crate) fn check(&mut self, endpoint: u32, program: &ProgramOptions, n_batches: u64) -> Result<Check> {
        match self.ask(&Ask::Check { endpoint, program: program.clone(), n_batches })? {
            Answer::Check(check) => Ok(check),
            answer => bail!("the follower answers {answer:?}, expected a check"),
        }
    }

    /// Waits until `condition` holds for the source; the time that it took.
    pub(crate) fn wait(
        &mut self,
        endpoint: u32,
        what: &str,
        limit: Duration,
        mut condition: impl FnMut(&SourceView) -> bool,
    ) -> Result<Duration> {
        let started = Instant::now();
        loop {
            let view = self.view(endpoint)?;
            if condition(&view) {
                return Ok(started.elapsed());
            }
            if started.elapsed() > limit {
                bail!("{what}: not within {limit:?}, {view:?}");
            }
            std::thread::sleep(POLL);
        }
    }

    /// Waits until nothing of what the program's cache held is credited; the time that it took.
    pub(crate) fn wait_purged(
        &mut self,
        endpoint: u32,
        program: &ProgramOptions,
        n_batches: u64,
        limit: Duration,
    ) -> Result<Duration> {
        let started = Instant::now();
        loop {
            let Check { n_credited, .. } = self.check(endpoint, program, n_batches)?;
            if n_credited == 0 {
                return Ok(started.elapsed());
            }
            if started.elapsed() > limit {
                bail!("{n_credited} blocks of a dead engine are credited after {limit:?}: {:?}", self.view(endpoint)?);
            }
            std::thread::sleep(POLL);
        }
    }

    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        self.0.signal(signal)
    }

    pub(crate) fn resident_bytes(&self) -> Result<u64> {
        self.0.resident_bytes()
    }

    fn ask(&mut self, ask: &Ask) -> Result<Answer> {
        self.0.tell(&serde_json::to_string(ask)?)?;
        serde_json::from_str(&self.0.hear()?).context("the follower's answer")
    }
}
