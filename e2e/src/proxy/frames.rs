//! Where the frames of a ZMTP 3.x stream begin and end (RFC 23/ZMTP 3.0 and 37/ZMTP 3.1, rfc.zeromq.org, "Framing").
//!
//! A connection begins with a greeting of 64 bytes each way. After it there are only frames: a byte of flags, a length
//! of 1 or 8 bytes in network order, and the body. A frame is a command or a part of a message; a message ends with the
//! first frame without MORE.

use std::io::{Error, ErrorKind, Result};
use std::ops::Range;

use tokio::io::{AsyncRead, AsyncReadExt};

/// Length of the greeting: signature 10, version 2, mechanism 20, as-server 1, filler 31.
pub(super) const GREETING: usize = 64;
const MORE: u8 = 1;
const LONG: u8 = 2;
const COMMAND: u8 = 4;
const RESERVED: u8 = !(MORE | LONG | COMMAND);
/// A longer frame is taken for a stream that is not ZMTP. warmroute itself takes at most 16 MiB.
const MAX_FRAME: u64 = 256 << 20;

/// A command or a whole message, as it is on the wire.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Unit {
    pub(super) bytes: Vec<u8>,
    pub(super) is_command: bool,
    /// The bodies of its frames, as positions in `bytes`.
    pub(super) bodies: Vec<Range<usize>>,
}

impl Unit {
    /// The next command or message; none at the end of the stream.
    pub(super) async fn read(reader: &mut (impl AsyncRead + Unpin)) -> Result<Option<Self>> {
        let mut unit = Self::default();
        loop {
            let flags = match reader.read_u8().await {
                Ok(flags) => flags,
                Err(error) if error.kind() == ErrorKind::UnexpectedEof && unit.bytes.is_empty() => return Ok(None),
                Err(error) => return Err(error),
            };
            unit.frame(flags, reader).await?;
            if flags & MORE == 0 {
                return Ok(Some(unit));
            }
        }
    }

    async fn frame(&mut self, flags: u8, reader: &mut (impl AsyncRead + Unpin)) -> Result<()> {
        if flags & RESERVED != 0 {
            return Err(invalid(format!("frame flags {flags:#04x}, expected at most {:#04x}", MORE | LONG | COMMAND)));
        }
        self.is_command |= flags & COMMAND != 0;
        self.bytes.push(flags);
        let len = if flags & LONG == 0 {
            let len = reader.read_u8().await?;
            self.bytes.push(len);
            u64::from(len)
        } else {
            let len = reader.read_u64().await?;
            self.bytes.extend(len.to_be_bytes());
            len
        };
        if len > MAX_FRAME {
            return Err(invalid(format!("a frame of {len} bytes, expected at most {MAX_FRAME}")));
        }
        let start = self.bytes.len();
        self.bytes.resize(start + len as usize, 0);
        reader.read_exact(&mut self.bytes[start..]).await?;
        self.bodies.push(start..self.bytes.len());
        Ok(())
    }

    /// The last frame: a batch's payload.
    pub(super) fn payload(&self) -> Range<usize> {
        self.bodies.last().cloned().unwrap_or_default()
    }

    /// Whether this is the END marker of vLLM's replay: the last but one frame is the sequence number with all bits
    /// set.
    pub(super) fn is_replay_end(&self) -> bool {
        self.bodies.iter().rev().nth(1).is_some_and(|body| self.bytes[body.clone()] == [0xff; 8])
    }
}

fn invalid(message: String) -> Error {
    Error::new(ErrorKind::InvalidData, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn frames_are_gathered_into_messages() {
        let mut long = vec![LONG];
        long.extend(300_u64.to_be_bytes());
        long.extend([7; 300]);
        let stream = [&[MORE, 1, b'k', 0, 2, 1, 2][..], &[COMMAND, 3, 1, 2, 3], &long].concat();
        let mut reader = &stream[..];
        let units: [Unit; 3] = [
            Unit::read(&mut reader).await.unwrap().unwrap(),
            Unit::read(&mut reader).await.unwrap().unwrap(),
            Unit::read(&mut reader).await.unwrap().unwrap(),
        ];
        assert_eq!(units.each_ref().map(|unit| unit.bytes.len()), [7, 5, 309]);
        assert_eq!(units.each_ref().map(|unit| unit.is_command), [false, true, false]);
        assert_eq!((units[0].bodies.clone(), units[0].payload()), (vec![2..3, 5..7], 5..7));
        assert_eq!(units[2].payload(), 9..309);
        assert_eq!(Unit::read(&mut reader).await.unwrap(), None);
    }

    #[tokio::test]
    async fn what_is_not_zmtp_or_cut_is_an_error() {
        let huge = [&[LONG][..], &u64::MAX.to_be_bytes()].concat();
        for stream in [&b"GET / HTTP/1.1"[..], &huge, &[MORE, 1, 0], &[0, 5, 1]] {
            let mut reader = stream;
            assert!(Unit::read(&mut reader).await.is_err(), "{stream:?}");
        }
    }

    #[tokio::test]
    async fn end_of_a_replay_is_known_in_both_forms() {
        let end = [&[MORE, 0, MORE, 8][..], &[0xff; 8], &[0, 0]].concat();
        let with_topic = [&[MORE, 0][..], &end].concat();
        let batch = [&[MORE, 0, MORE, 8][..], &[0; 8], &[0, 0]].concat();
        for (stream, is_end) in [(end, true), (with_topic, true), (batch, false)] {
            let unit = Unit::read(&mut &stream[..]).await.unwrap().unwrap();
            assert_eq!(unit.is_replay_end(), is_end, "{stream:?}");
        }
    }
}
