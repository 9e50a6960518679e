//! The event publisher: a PUB socket for live batches and a ROUTER socket for replays, on one thread.
//!
//! Follows `ZmqEventPublisher` in `vllm/distributed/kv_events.py` of vLLM 0.32.0, its weaknesses
//! included: replays are answered between batches only, the ROUTER keeps libzmq's default send
//! high-water mark of 1000 messages and silently drops what a slower client cannot take, the end marker
//! too, and a request with a wrong number of frames is never answered.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result};

/// Batches that stay available for replay by default (`buffer_steps`).
pub const BUFFER_STEPS: usize = 10_000;
/// `hwm` of the PUB socket, in batches per subscriber.
pub const PUB_HWM: i32 = 100_000;
/// `max_queue_size`: a scheduler that is so far ahead of the publisher blocks.
pub const MAX_QUEUE: usize = 100_000;
const END_SEQ: [u8; 8] = [0xff; 8];
/// How long an idle publisher leaves a replay request waiting, as in vLLM.
const IDLE_WAIT: Duration = Duration::from_millis(100);

/// Where to publish; `tcp://127.0.0.1:0` takes a free port.
#[derive(Clone, Debug)]
pub struct PublisherOptions {
    /// PUB socket, always bound (vLLM connects unless the endpoint contains `*`).
    pub endpoint: String,
    /// ROUTER socket.
    pub replay_endpoint: String,
    /// First frame of every message.
    pub topic: String,
    /// Batches that stay available for replay.
    pub buffer_steps: usize,
}

impl Default for PublisherOptions {
    fn default() -> Self {
        let any = "tcp://127.0.0.1:0".to_owned();
        Self { endpoint: any.clone(), replay_endpoint: any, topic: String::new(), buffer_steps: BUFFER_STEPS }
    }
}

/// A running publisher; its sockets close when it is dropped.
#[derive(Debug)]
pub struct Publisher {
    endpoint: String,
    replay_endpoint: String,
    batches: Option<SyncSender<Vec<u8>>>,
    thread: Option<JoinHandle<()>>,
}

impl Publisher {
    /// Binds both sockets and starts the thread.
    ///
    /// # Errors
    /// When an endpoint cannot be bound.
    pub fn start(options: PublisherOptions) -> Result<Self> {
        let context = zmq::Context::new();
        let live = context.socket(zmq::PUB)?;
        live.set_sndhwm(PUB_HWM)?;
        live.set_linger(0)?;
        let endpoint = bind(&live, &options.endpoint)?;
        let replay = context.socket(zmq::ROUTER)?;
        replay.set_linger(0)?;
        let replay_endpoint = bind(&replay, &options.replay_endpoint)?;

        let (batches, queue) = sync_channel(MAX_QUEUE);
        let worker = Worker {
            live,
            replay,
            topic: options.topic,
            buffer_steps: options.buffer_steps,
            queue,
            buffer: VecDeque::new(),
            next_seq: 0,
        };
        let thread = std::thread::Builder::new().name("kv-publisher".to_owned()).spawn(move || worker.run())?;
        Ok(Self { endpoint, replay_endpoint, batches: Some(batches), thread: Some(thread) })
    }

    /// Address of the PUB socket, with its real port.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Address of the ROUTER socket, with its real port.
    pub fn replay_endpoint(&self) -> &str {
        &self.replay_endpoint
    }

    /// Publishes one encoded batch under the next sequence number, counted from 0.
    pub fn publish(&self, payload: Vec<u8>) {
        let batches = self.batches.as_ref().expect("the queue lives until the publisher is dropped");
        if batches.send(payload).is_err() {
            eprintln!("event publisher has stopped, a batch was lost");
        }
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        self.batches.take();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            eprintln!("event publisher thread panicked");
        }
    }
}

fn bind(socket: &zmq::Socket, endpoint: &str) -> Result<String> {
    socket.bind(endpoint).with_context(|| format!("cannot bind event socket {endpoint}"))?;
    let bound = socket.get_last_endpoint()?;
    bound.map_err(|_| anyhow::anyhow!("libzmq names the bound endpoint in something else than UTF-8"))
}

struct Worker {
    live: zmq::Socket,
    replay: zmq::Socket,
    topic: String,
    buffer_steps: usize,
    queue: Receiver<Vec<u8>>,
    buffer: VecDeque<(u64, Vec<u8>)>,
    next_seq: u64,
}

impl Worker {
    fn run(mut self) {
        loop {
            if let Err(error) = self.serve_replay() {
                eprintln!("replay request failed: {error}");
            }
            match self.queue.recv_timeout(IDLE_WAIT) {
                Ok(payload) => self.publish(payload),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn publish(&mut self, payload: Vec<u8>) {
        let seq = self.next_seq;
        self.next_seq += 1;
        let frames = [self.topic.as_bytes(), &seq.to_be_bytes(), &payload];
        if let Err(error) = self.live.send_multipart(frames, 0) {
            eprintln!("cannot publish batch {seq}: {error}");
        }
        if self.buffer.len() >= self.buffer_steps {
            self.buffer.pop_front();
        }
        self.buffer.push_back((seq, payload));
    }

    fn serve_replay(&self) -> zmq::Result<()> {
        if self.replay.poll(zmq::POLLIN, 0)? == 0 {
            return Ok(());
        }
        let request = self.replay.recv_multipart(0)?;
        let [client, _, start] = request.as_slice() else {
            return Ok(());
        };
        let start = be_number(start);
        let wanted = self.buffer.iter().filter(|(seq, _)| u128::from(*seq) >= start);
        for (seq, payload) in wanted {
            let frames = [client.as_slice(), b"", self.topic.as_bytes(), &seq.to_be_bytes(), payload];
            self.replay.send_multipart(frames, 0)?;
        }
        self.replay.send_multipart([client.as_slice(), b"", b"", &END_SEQ, b""], 0)
    }
}

/// `int.from_bytes(bytes, "big")`, saturating: an empty frame is 0.
fn be_number(bytes: &[u8]) -> u128 {
    bytes.iter().fold(0_u128, |number, byte| number.saturating_mul(256).saturating_add(u128::from(*byte)))
}
