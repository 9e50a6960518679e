//! The event sockets of one rank: the live stream, and the replay.

use std::collections::BTreeSet;
use std::time::{Duration, Instant, SystemTime};

use tokio::net::TcpStream;

use super::http::chain;
use crate::cli::doctor::seen::{Hash, Link, Origin, RankSeen, Replayed, Stored, Wire};
use crate::cli::sockets::{self, END, LinkEvent};
use crate::events::wire::{BlockStored, EngineHash, Event, EventBatch};

/// Time between two looks at the sockets.
pub(super) const POLL: Duration = Duration::from_millis(10);
/// `BlockStored` events that are kept for the trial of hashes: of the live stream all that a busy engine publishes in
/// the seconds that we listen, of the replay the newest.
const MOST_STORED: usize = 4096;
/// Longest wait for a connection, and longest silence within a replay.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where a rank is to be dialled.
#[derive(Clone, Debug)]
pub(super) struct Dial {
    pub(super) rank: u32,
    pub(super) origin: Origin,
    pub(super) events: String,
    pub(super) replay: Option<String>,
}

/// A rank that is looked at.
pub(super) struct Watch {
    /// One per rank, since the names of monitors are a context's own.
    context: zmq::Context,
    live: Option<zmq::Socket>,
    pub(super) seen: RankSeen,
    /// Batches that came live, which the replay repeats.
    live_seqs: BTreeSet<u64>,
    patience: Duration,
}

impl Watch {
    /// Dials a rank and waits until its live stream stands, or does not.
    pub(super) async fn open(dial: Dial, timeout: Duration) -> Self {
        let Dial { rank, origin, events, replay } = dial;
        let seen = RankSeen {
            rank,
            origin,
            events,
            events_link: Link::NotDialled("it is a port of the router's own, which the engine dials"),
            replay,
            replay_link: Link::NotDialled("no address is known"),
            replayed: None,
            wire: Wire::default(),
            stored: Vec::new(),
            skew: None,
        };
        let mut watch = Self {
            context: zmq::Context::new(),
            live: None,
            seen,
            live_seqs: BTreeSet::new(),
            patience: timeout.min(PATIENCE),
        };
        if !watch.seen.events.starts_with("tcp://*:") {
            watch.seen.events_link = watch.subscribe().await;
        }
        watch
    }

    async fn subscribe(&mut self) -> Link {
        let start = Instant::now();
        let address = self.seen.events.clone();
        if let Err(why) = connects(&address, self.patience).await {
            return Link::Down(why);
        }
        match sockets::subscribe(&self.context, &address, "") {
            Ok((live, monitor)) => {
                self.live = Some(live);
                stands(&monitor, start, self.patience, "PUB").await
            }
            Err(error) => Link::Down(chain(&error)),
        }
    }

    /// Reads what waits in the live stream.
    pub(super) fn pump(&mut self) {
        while let Some(frames) = self.live.as_ref().and_then(sockets::receive) {
            self.live_seqs.extend(sockets::split(&frames).map(|(seq, _)| seq));
            if let Some(ts) = self.take(&frames, true) {
                let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
                let skew = now.as_secs_f64() - ts;
                self.seen.skew = Some(self.seen.skew.map_or(skew, |least: f64| least.min(skew)));
            }
        }
    }

    /// Asks for everything that the engine still has.
    pub(super) async fn replay(&mut self) {
        let Some(address) = self.seen.replay.clone().filter(|address| !address.starts_with("tcp://*:")) else { return };
        let start = Instant::now();
        if let Err(why) = connects(&address, self.patience).await {
            self.seen.replay_link = Link::Down(why);
            return;
        }
        let dealer = match sockets::dealer(&self.context, &address) {
            Ok((dealer, monitor)) => {
                self.seen.replay_link = stands(&monitor, start, self.patience, "ROUTER").await;
                dealer
            }
            Err(error) => {
                self.seen.replay_link = Link::Down(chain(&error));
                return;
            }
        };
        if matches!(self.seen.replay_link, Link::Up(_)) {
            match sockets::ask(&dealer, 0) {
                Ok(()) => self.seen.replayed = Some(self.read_replies(&dealer).await),
                Err(error) => self.seen.replay_link = Link::Down(chain(&error)),
            }
        }
    }

    /// Replies get lost, END too: silence ends a replay as well.
    async fn read_replies(&mut self, dealer: &zmq::Socket) -> Replayed {
        let mut replayed = Replayed::default();
        let mut heard_at = Instant::now();
        while heard_at.elapsed() < self.patience {
            while let Some(frames) = sockets::receive(dealer) {
                heard_at = Instant::now();
                let Some((seq, _)) = sockets::split(&frames) else { continue };
                if seq == END {
                    replayed.has_end = true;
                    return replayed;
                }
                replayed.first = Some(replayed.first.map_or(seq, |first| first.min(seq)));
                replayed.last = replayed.last.max(Some(seq));
                replayed.n_batches += 1;
                if !self.live_seqs.contains(&seq) {
                    self.take(&frames, false);
                }
            }
            tokio::time::sleep(POLL).await;
        }
        replayed
    }

    /// Notes what a message shows; the publisher's clock, if it is a batch.
    fn take(&mut self, frames: &[Vec<u8>], is_live: bool) -> Option<f64> {
        let decoded = match sockets::split(frames) {
            Some((_, payload)) => EventBatch::decode(payload).map_err(|error| chain(&error)),
            None => Err(format!("a message of {} frame(s), expected topic, sequence number and payload", frames.len())),
        };
        let wire = &mut self.seen.wire;
        wire.n_live += u64::from(is_live);
        if let ([topic, _, _], true) = (frames, is_live) {
            wire.topics.insert(String::from_utf8_lossy(topic).into_owned());
        }
        let batch = match decoded {
            Ok(batch) => batch,
            Err(why) => {
                wire.n_unreadable += 1;
                wire.fault.get_or_insert(why);
                return None;
            }
        };
        wire.take(&batch);
        for event in &batch.events {
            if let Event::BlockStored(event) = event
                && event.is_of_main_group()
            {
                self.keep(stored(event, is_live));
            }
        }
        Some(batch.ts)
    }

    fn keep(&mut self, stored: Stored) {
        if self.seen.stored.len() == MOST_STORED {
            self.seen.stored.remove(0);
        }
        self.seen.stored.push(stored);
    }
}

impl Wire {
    fn take(&mut self, batch: &EventBatch<'_>) {
        self.ranks.extend(batch.rank);
        self.n_skipped += u64::from(batch.n_skipped);
        for event in &batch.events {
            match event {
                Event::BlockStored(event) => self.take_stored(event),
                Event::BlockRemoved(event) => {
                    self.n_removed += 1;
                    self.media.extend(event.medium.map(str::to_owned));
                }
                Event::AllBlocksCleared | Event::TierBlocksCleared { .. } => self.n_cleared += 1,
            }
        }
    }

    fn take_stored(&mut self, event: &BlockStored<'_>) {
        self.n_stored += 1;
        self.media.extend(event.medium.map(str::to_owned));
        self.kinds.extend(event.spec_kind.map(str::to_owned));
        self.has_tokens |= !event.token_ids.is_empty();
        self.shows_extra_keys |= event.extra_keys.is_some();
        for hash in &event.block_hashes {
            match hash {
                EngineHash::Int(_) => self.has_int_hashes = true,
                EngineHash::Bytes(bytes) => {
                    self.hash_bytes.insert(bytes.len());
                }
            }
        }
        if event.block_size > 0 && event.is_of_main_group() {
            self.block_sizes.insert(event.block_size);
        }
    }
}

impl BlockStored<'_> {
    /// Whether it tells of the group and the tier whose blocks are matched first.
    fn is_of_main_group(&self) -> bool {
        self.medium.is_none_or(|medium| medium == "GPU") && self.spec_kind.is_none_or(|kind| kind == "full_attention")
    }
}

fn stored(event: &BlockStored<'_>, is_live: bool) -> Stored {
    let hash = |hash: &EngineHash<'_>| match hash {
        EngineHash::Int(_) => Hash::Low(hash.low64()),
        EngineHash::Bytes(bytes) => Hash::Whole(bytes.to_vec()),
    };
    let has_keys = event.extra_keys.is_some_and(|keys| keys.iter().any(|keys| !keys.is_empty()));
    Stored {
        is_live,
        parent: event.parent.as_ref().map(hash),
        hashes: event.block_hashes.iter().map(hash).collect(),
        tokens: event.token_ids.to_vec(),
        block_size: event.block_size,
        is_plain: !has_keys && event.lora_id.is_none() && event.lora_name.is_none(),
    }
}

/// Whether somebody takes connections there: libzmq would try again and never say why it cannot.
async fn connects(address: &str, patience: Duration) -> Result<(), String> {
    let Some(address) = address.strip_prefix("tcp://") else { return Ok(()) };
    match tokio::time::timeout(patience, TcpStream::connect(address)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(chain(&error)),
        Err(_) => Err(format!("no connection within {patience:?}")),
    }
}

async fn stands(monitor: &zmq::Socket, start: Instant, patience: Duration, kind: &str) -> Link {
    while start.elapsed() < patience {
        while let Some(event) = sockets::next_event(monitor) {
            match event {
                LinkEvent::Up => return Link::Up(start.elapsed()),
                // A socket of the wrong kind hangs up, and libzmq does not always say why.
                LinkEvent::Refused | LinkEvent::Down => {
                    return Link::Down(format!("what listens there is not a {kind} socket of ZeroMQ"));
                }
                LinkEvent::Other => {}
            }
        }
        tokio::time::sleep(POLL).await;
    }
    Link::Down(format!("somebody listens there, but has not spoken ZeroMQ within {patience:?}"))
}
