//! The two directions of one proxied connection.

use std::io::{ErrorKind, Result};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::frames::{GREETING, Unit};
use super::{Fate, Shared, Side};

/// Messages on the way of a delayed connection; when there are more, the sender feels it.
const ON_THE_WAY: usize = 10_000;
/// Bytes written in one go under a bandwidth limit.
const CHUNK: usize = 4096;

/// Bytes that leave at a time.
struct Packet {
    due: Instant,
    bytes: Vec<u8>,
    /// The connection ends with these bytes.
    is_last: bool,
}

/// One direction.
struct Pump<'a> {
    /// Where the bytes go.
    to: Side,
    shared: &'a Arc<Shared>,
    half_closes: watch::Receiver<(u64, Option<Side>)>,
    /// Cancelled when the sender of this direction has closed.
    closed: CancellationToken,
    /// The same of the other direction.
    peer_closed: CancellationToken,
}

/// Moves bytes both ways until both sides have closed, or a fault cuts the connection.
pub(super) async fn relay(subscriber: TcpStream, publisher: TcpStream, shared: &Arc<Shared>) -> Result<()> {
    let (from_subscriber, to_subscriber) = subscriber.into_split();
    let (from_publisher, to_publisher) = publisher.into_split();
    let (subscriber_closed, publisher_closed) = (CancellationToken::new(), CancellationToken::new());
    let mut half_closes = shared.half_closes.subscribe();
    half_closes.mark_unchanged();
    let down = Pump {
        to: Side::Subscriber,
        shared,
        half_closes: half_closes.clone(),
        closed: publisher_closed.clone(),
        peer_closed: subscriber_closed.clone(),
    };
    let up =
        Pump { to: Side::Publisher, shared, half_closes, closed: subscriber_closed, peer_closed: publisher_closed };
    // The first error, a cut among them, ends both directions.
    tokio::try_join!(down.run(from_publisher, to_subscriber), up.run(from_subscriber, to_publisher)).map(|_| ())
}

impl Pump<'_> {
    async fn run(self, reader: OwnedReadHalf, writer: OwnedWriteHalf) -> Result<()> {
        let (packets, queue) = channel(ON_THE_WAY);
        let half_closes = self.half_closes.clone();
        let (to, shared) = (self.to, self.shared);
        let read = async {
            let result = self.read(reader, &packets).await;
            self.closed.cancel();
            self.hold_secret().await;
            // Only now: the writer takes the end of the queue for the end of the connection.
            drop(packets);
            result
        };
        let write = write(to, shared, half_closes, queue, writer);
        tokio::try_join!(read, write).map(|_| ())
    }

    async fn read(&self, mut reader: OwnedReadHalf, packets: &Sender<Packet>) -> Result<()> {
        self.greet(&mut reader, packets).await?;
        let mut reader = BufReader::new(reader);
        loop {
            self.shared.flow().await;
            let Some(unit) = Unit::read(&mut reader).await? else { return Ok(()) };
            if !self.forward(unit, packets).await {
                return Ok(());
            }
        }
    }

    /// The peers answer to parts of each other's greetings (libzmq sends its version only after it has seen the other's
    /// signature), so these bytes go on as they come.
    async fn greet(&self, reader: &mut OwnedReadHalf, packets: &Sender<Packet>) -> Result<()> {
        let mut greeting = [0; GREETING];
        let mut n_read = 0;
        while n_read < GREETING {
            self.shared.flow().await;
            let n_new = reader.read(&mut greeting[n_read..]).await?;
            if n_new == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            self.send(greeting[n_read..n_read + n_new].to_vec(), false, packets).await;
            n_read += n_new;
        }
        Ok(())
    }

    /// Passes one unit on, or what the faults leave of it; false: nobody takes it any more.
    async fn forward(&self, mut unit: Unit, packets: &Sender<Packet>) -> bool {
        if unit.is_command || self.to == Side::Publisher {
            return self.send(unit.bytes, false, packets).await;
        }
        let Fate { n_copies, is_truncated } = self.shared.rules().judge(&mut unit);
        if is_truncated {
            let payload = unit.payload();
            unit.bytes.truncate(payload.start + payload.len() / 2);
            return self.send(unit.bytes, true, packets).await;
        }
        for _ in 0..n_copies {
            if !self.send(unit.bytes.clone(), false, packets).await {
                return false;
            }
        }
        true
    }

    async fn send(&self, bytes: Vec<u8>, is_last: bool, packets: &Sender<Packet>) -> bool {
        let due = Instant::now() + self.shared.rules().delay();
        packets.send(Packet { due, bytes, is_last }).await.is_ok()
    }

    /// After a half-close of the sender's side its own FIN stays a secret, until the receiver leaves by itself.
    async fn hold_secret(&self) {
        let (_, side) = *self.half_closes.borrow();
        let was_half_closed =
            self.half_closes.has_changed().unwrap_or(false) && side.is_some_and(|side| side != self.to);
        if was_half_closed {
            self.peer_closed.cancelled().await;
        }
    }
}

/// Writes packets when they are due. When there are no more, the receiver gets its FIN.
async fn write(
    to: Side,
    shared: &Arc<Shared>,
    mut half_closes: watch::Receiver<(u64, Option<Side>)>,
    mut queue: Receiver<Packet>,
    mut writer: OwnedWriteHalf,
) -> Result<()> {
    loop {
        tokio::select! {
            packet = queue.recv() => match packet {
                Some(packet) => deliver(packet, to, shared, &mut writer).await?,
                None => break,
            },
            Ok(()) = half_closes.changed() => if half_closes.borrow_and_update().1 == Some(to) {
                writer.shutdown().await?;
                // What still comes for this side is lost.
                while queue.recv().await.is_some() {}
                return Ok(());
            },
        }
    }
    shared.flow().await;
    writer.shutdown().await
}

async fn deliver(packet: Packet, to: Side, shared: &Arc<Shared>, writer: &mut OwnedWriteHalf) -> Result<()> {
    tokio::time::sleep_until(packet.due).await;
    shared.flow().await;
    let bandwidth = shared.rules().bandwidth();
    match bandwidth {
        None => writer.write_all(&packet.bytes).await?,
        Some(bandwidth) => {
            for chunk in packet.bytes.chunks(CHUNK) {
                writer.write_all(chunk).await?;
                tokio::time::sleep(Duration::from_secs_f64(chunk.len() as f64 / bandwidth as f64)).await;
            }
        }
    }
    shared.rules().passed(to, packet.bytes.len());
    if packet.is_last { Err(ErrorKind::ConnectionAborted.into()) } else { Ok(()) }
}
