//! A plain SUB socket in a process of its own: what libzmq costs whoever receives the events, and nothing else.

use std::path::Path;
use std::process::Command;
use std::sync::mpsc::TryRecvError;

use anyhow::{Context as _, Result};
use clap::Args;

use crate::publisher::process::Talker;
use crate::publisher::{say, standard_input};

/// As the router's own sockets.
const LIVE_QUEUE: i32 = 10_000;
/// Longest wait for a message before the next look at standard input.
const WAIT_MS: i32 = 100;

/// Where a subscriber listens.
#[derive(Clone, Debug, Args)]
pub struct SubscriberArgs {
    /// ZMQ endpoints of the publishers.
    #[arg(required = true)]
    endpoints: Vec<String>,
}

/// Receives until standard input ends, and says after each line of it how many messages have come.
///
/// # Errors
/// When a socket cannot be connected.
pub fn run_subscriber(args: &SubscriberArgs) -> Result<()> {
    let context = zmq::Context::new();
    let socket = context.socket(zmq::SUB)?;
    socket.set_linger(0)?;
    socket.set_rcvhwm(LIVE_QUEUE)?;
    socket.set_rcvtimeo(WAIT_MS)?;
    socket.set_subscribe(b"")?;
    for endpoint in &args.endpoints {
        socket.connect(endpoint).with_context(|| format!("cannot connect to {endpoint}"))?;
    }
    let questions = standard_input()?;
    let mut n_messages = 0_u64;
    loop {
        n_messages += u64::from(socket.recv_multipart(0).is_ok());
        match questions.try_recv() {
            Ok(_) => say(&n_messages.to_string())?,
            Err(TryRecvError::Empty) => {}
            Err(TryRecvError::Disconnected) => return Ok(()),
        }
    }
}

/// A subscriber in the harness's hand.
#[derive(Debug)]
pub(super) struct Subscriber(Talker);

impl Subscriber {
    pub(super) fn start<'a>(binary: &Path, endpoints: impl Iterator<Item = &'a str>) -> Result<Self> {
        let mut subscriber = Self(Talker::start(Command::new(binary).arg("subscriber").args(endpoints))?);
        // It answers when its sockets are there.
        subscriber.n_messages()?;
        Ok(subscriber)
    }

    pub(super) fn id(&self) -> u32 {
        self.0.id()
    }

    pub(super) fn n_messages(&mut self) -> Result<u64> {
        self.0.tell("count")?;
        let answer = self.0.hear()?;
        answer.parse().with_context(|| format!("the subscriber says {answer:?}, expected a number"))
    }
}
