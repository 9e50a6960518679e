//! A trace of the decisions without their content, to be replayed or evaluated elsewhere.
//!
//! Requests hand [`Line`]s to a [`Recorder`], which never waits: a full queue drops and counts. One background task, the
//! [`Writer`], turns them into JSON lines in the shape of the Mooncake traces, with a few fields more:
//!
//! ```json
//! {"timestamp":1520,"input_length":330,"output_length":null,"hash_ids":[0,1,2],"block_size":16,"model":"tiny","matched":320,"endpoint":"10.0.0.7:8000","mode":"active"}
//! ```
//!
//! **What it tells.** Lengths, times, and which requests begin alike: equal numbers in `hash_ids` are equal blocks with
//! equal prefixes. What it must not tell is what stands in them, and a plain hash would: who guesses a prompt could
//! compute it. Without a key, blocks are therefore numbered in order of their appearance in the file, anew in each, so
//! that a number is no function of any content. With a key, a number is a keyed hash, so that files of several replicas
//! and of several days can be compared by those who have all of them, and guessed at by nobody without the key.
//!
//! **What it costs.** A copy of the block hashes per request, 256 of which may wait; the rest is done by the task. A
//! file ends at its limit, or at a million numbered blocks, and becomes `<path>.1`, in the place of the one before. At
//! a start it does as well, since times, and numbers without a key, begin anew.

mod file;
mod key;
mod numbers;
mod writer;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use tokio::sync::{mpsc, watch};

pub use self::key::{Key, KeyError};
pub use self::writer::Writer;
use crate::routing::hash::BlockHash;
use crate::routing::load::Millis;
use crate::telemetry::metrics::{Metrics, RecordDropped};

/// Size of a file unless it is set.
pub const DEFAULT_MAX_BYTES: u64 = 64 << 20;
/// Lines that wait for the task: at 16 KB for a prompt of 32,768 tokens some megabytes.
const QUEUE: usize = 256;

/// What is written, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The file; none: nothing is written.
    pub path: Option<PathBuf>,
    /// Size at which it becomes the older one.
    pub max_bytes: u64,
    /// Under which blocks have the same number in every file.
    pub key: Option<Key>,
}

/// One decision.
#[derive(Clone, Debug)]
pub struct Line {
    /// When it was made.
    pub at: Millis,
    /// The pool's model.
    pub model: Arc<str>,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens of a block.
    pub block_size: u32,
    /// The blocks that could be reused.
    pub blocks: Vec<BlockHash>,
    /// Tokens that the pick was credited with.
    pub matched_tokens: u32,
    /// The pick.
    pub endpoint: SocketAddr,
    /// Whether Envoy was told.
    pub mode: &'static str,
}

/// Takes lines from requests.
#[derive(Clone, Debug)]
pub struct Recorder {
    lines: mpsc::Sender<Line>,
    /// Whether there is a file, so that no line is made for nobody. Guards no other memory.
    is_on: Arc<AtomicBool>,
    metrics: Arc<Metrics>,
}

impl Recorder {
    /// A recorder and the task that writes what it takes, as `config` says from time to time.
    pub fn new(config: watch::Receiver<Config>, metrics: Arc<Metrics>) -> (Self, Writer) {
        let (sender, lines) = mpsc::channel(QUEUE);
        let is_on = Arc::new(AtomicBool::new(config.borrow().path.is_some()));
        let writer = Writer::new(config, lines, is_on.clone(), metrics.clone());
        (Self { lines: sender, is_on, metrics }, writer)
    }

    /// Writes down what `line` makes, if anything is written at all.
    pub fn note(&self, line: impl FnOnce() -> Line) {
        if self.is_on.load(Relaxed) && self.lines.try_send(line()).is_err() {
            self.metrics.count_record_dropped(RecordDropped::QueueFull, 1);
        }
    }
}
