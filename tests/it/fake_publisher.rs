//! vLLM's KV event publisher as its users see it: a PUB socket, and a ROUTER that replays a buffer and can lose
//! replies.

use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use warmroute::routing::hash::{BlockHasher, BlockSize, Scope};

const DEADLINE: Duration = Duration::from_secs(20);

/// Frames of a replay's reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReplyForm {
    /// Up to vLLM 0.25.
    WithoutTopic,
    /// From vLLM 0.26 on.
    WithTopic,
}

/// How a publisher behaves.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Behaviour {
    pub(crate) form: ReplyForm,
    /// Probability that a reply, or END, is lost.
    pub(crate) reply_loss: f64,
    /// Most batches that can be replayed.
    pub(crate) buffer: usize,
    /// `topic` of the engine's `--kv-events-config`.
    pub(crate) topic: &'static str,
}

impl Default for Behaviour {
    fn default() -> Self {
        Self { form: ReplyForm::WithTopic, reply_loss: 0.0, buffer: 10_000, topic: "kv" }
    }
}

/// A running publisher; dropping it is a SIGKILL.
pub(crate) struct FakePublisher {
    pub(crate) events: String,
    pub(crate) replay: String,
    commands: Option<Sender<Command>>,
    thread: Option<JoinHandle<()>>,
}

enum Command {
    /// Put into the buffer and onto the live stream.
    Publish(Vec<u8>),
    /// Put into the buffer alone: lost on the live stream.
    Lose(Vec<u8>),
}

impl FakePublisher {
    pub(crate) fn start(behaviour: Behaviour) -> Self {
        Self::bind("tcp://127.0.0.1:*", "tcp://127.0.0.1:*", behaviour)
    }

    /// The next life of a publisher: same ports, numbers from 0, an empty buffer.
    pub(crate) fn restart(self, behaviour: Behaviour) -> Self {
        let (events, replay) = (self.events.clone(), self.replay.clone());
        drop(self);
        Self::bind(&events, &replay, behaviour)
    }

    fn bind(events: &str, replay: &str, behaviour: Behaviour) -> Self {
        let context = zmq::Context::new();
        let publisher = bound(&context, zmq::PUB, events);
        let router = bound(&context, zmq::ROUTER, replay);
        let (events, replay) = (endpoint(&publisher), endpoint(&router));
        let (commands, receiver) = channel();
        let worker = Worker { publisher, router, commands: receiver, behaviour, batches: Vec::new() };
        let thread = std::thread::spawn(move || worker.run());
        Self { events, replay, commands: Some(commands), thread: Some(thread) }
    }

    pub(crate) fn publish(&self, payload: Vec<u8>) {
        self.commands.as_ref().unwrap().send(Command::Publish(payload)).unwrap();
    }

    pub(crate) fn lose(&self, payload: Vec<u8>) {
        self.commands.as_ref().unwrap().send(Command::Lose(payload)).unwrap();
    }
}

impl Drop for FakePublisher {
    fn drop(&mut self) {
        drop(self.commands.take());
        self.thread.take().map(JoinHandle::join);
    }
}

fn bound(context: &zmq::Context, kind: zmq::SocketType, endpoint: &str) -> zmq::Socket {
    let socket = context.socket(kind).unwrap();
    socket.set_linger(0).unwrap();
    let started = Instant::now();
    // The port of a former life may be free only a moment later.
    while let Err(error) = socket.bind(endpoint) {
        assert!(started.elapsed() < DEADLINE, "{endpoint}: {error}");
        std::thread::sleep(Duration::from_millis(5));
    }
    socket
}

fn endpoint(socket: &zmq::Socket) -> String {
    socket.get_last_endpoint().unwrap().unwrap()
}

struct Worker {
    publisher: zmq::Socket,
    router: zmq::Socket,
    commands: Receiver<Command>,
    behaviour: Behaviour,
    batches: Vec<Vec<u8>>,
}

impl Worker {
    fn run(mut self) {
        let mut rng = fastrand::Rng::with_seed(7);
        loop {
            match self.commands.try_recv() {
                Ok(Command::Publish(payload)) => {
                    let seq = (self.batches.len() as u64).to_be_bytes();
                    self.publisher.send_multipart([self.behaviour.topic.as_bytes(), &seq, &payload], 0).unwrap();
                    self.batches.push(payload);
                }
                Ok(Command::Lose(payload)) => self.batches.push(payload),
                Err(TryRecvError::Empty) => {
                    if self.router.poll(zmq::POLLIN, 2).unwrap() > 0 {
                        self.replay(&mut rng);
                    }
                }
                Err(TryRecvError::Disconnected) => return,
            }
        }
    }

    fn replay(&self, rng: &mut fastrand::Rng) {
        let request = self.router.recv_multipart(0).unwrap();
        let [client, empty, start] = &request[..] else { panic!("a request has two frames: {request:?}") };
        assert!(empty.is_empty());
        let start = u64::from_be_bytes(start.as_slice().try_into().unwrap()) as usize;
        let oldest = self.batches.len().saturating_sub(self.behaviour.buffer);
        for (seq, payload) in self.batches.iter().enumerate().skip(start.max(oldest)) {
            self.reply(client, &(seq as u64).to_be_bytes(), payload, rng);
        }
        self.reply(client, &[0xff; 8], &[], rng);
    }

    fn reply(&self, client: &[u8], seq: &[u8], payload: &[u8], rng: &mut fastrand::Rng) {
        if rng.f64() < self.behaviour.reply_loss {
            return;
        }
        let topic = if seq == [0xff; 8] { "" } else { self.behaviour.topic }.as_bytes();
        let frames = match self.behaviour.form {
            ReplyForm::WithoutTopic => vec![client, b"", seq, payload],
            ReplyForm::WithTopic => vec![client, b"", topic, seq, payload],
        };
        self.router.send_multipart(frames, 0).unwrap();
    }
}

/// One batch, encoded as vLLM 0.32 does.
pub(crate) fn batch(events: &[Value]) -> Vec<u8> {
    rmp_serde::to_vec(&json!([1.5, events, 0])).unwrap()
}

/// A prompt's blocks from its first on.
pub(crate) fn stored(hasher: &BlockHasher, tokens: &[u32], block_size: BlockSize) -> Value {
    let hashes: Vec<u64> =
        hasher.scoped_chain(tokens, block_size, &Scope::default()).iter().map(|hash| hash.0).collect();
    json!({
        "type": "BlockStored", "block_hashes": hashes, "parent_block_hash": null, "token_ids": tokens,
        "block_size": block_size.get(), "lora_id": null, "medium": "GPU", "lora_name": null,
        "extra_keys": vec![Value::Null; hashes.len()], "group_idx": 0, "kv_cache_spec_kind": "full_attention",
    })
}

/// One block leaves the cache.
pub(crate) fn removed(hash: u64) -> Value {
    json!({"type": "BlockRemoved", "block_hashes": [hash], "medium": "GPU", "group_idx": 0})
}
