//! A body on its way back to Envoy, in pieces.
//!
//! In full duplex a body belongs to us from the moment on that Envoy has sent it: what is not sent back reaches nobody.

use envoy_types::pb::envoy::service::ext_proc::v3::ProcessingResponse;

use super::reply;

/// Most bytes of one piece. Envoy's API recommends 64 KiB for a whole message (`processing_mode.proto`).
pub const PIECE_BYTES: usize = 60 << 10;

/// Whose body it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The request's, on its way to the endpoint.
    Request,
    /// The response's, on its way to the client.
    Response,
}

/// What comes after the bytes that are there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// More of the body.
    Open,
    /// Nothing: the last piece says that it is the last.
    Body,
    /// Trailers, whose answer follows the last piece.
    Trailers,
}

/// The messages that send a body back, one after the other.
#[derive(Debug)]
pub struct Echo {
    side: Side,
    body: Vec<u8>,
    n_sent: usize,
    /// [`End::Open`] once the end has been sent.
    end: End,
}

impl Echo {
    /// Sends `body` back, and then what `end` says.
    pub fn new(side: Side, body: Vec<u8>, end: End) -> Self {
        Self { side, body, n_sent: 0, end }
    }

    /// What is due.
    fn piece(&mut self) -> Vec<u8> {
        let piece = if self.n_sent == 0 && self.body.len() <= PIECE_BYTES {
            std::mem::take(&mut self.body)
        } else {
            let rest = &self.body[self.n_sent..];
            rest[..rest.len().min(PIECE_BYTES)].to_vec()
        };
        self.n_sent = (self.n_sent + piece.len()).min(self.body.len());
        piece
    }

    fn is_sent(&self) -> bool {
        self.n_sent == self.body.len()
    }
}

impl Iterator for Echo {
    type Item = ProcessingResponse;

    fn next(&mut self) -> Option<ProcessingResponse> {
        if !self.is_sent() {
            let piece = self.piece();
            let is_last = self.end == End::Body && self.is_sent();
            if is_last {
                self.end = End::Open;
            }
            return Some(reply::piece(self.side, piece, is_last));
        }
        match std::mem::replace(&mut self.end, End::Open) {
            End::Open => None,
            End::Body => Some(reply::piece(self.side, Vec::new(), true)),
            End::Trailers => Some(reply::trailers(self.side)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The lengths of the pieces with their marks, and whether trailers follow.
    fn shape(len: usize, end: End) -> (Vec<(usize, bool)>, bool) {
        let body: Vec<u8> = (0..len).map(|idx| (idx % 251) as u8).collect();
        let (mut pieces, mut sent, mut has_trailers) = (Vec::new(), Vec::new(), false);
        for reply in Echo::new(Side::Request, body.clone(), end) {
            match reply::tests::request_piece(&reply) {
                Some((piece, is_last)) => {
                    assert!(!has_trailers, "trailers come last");
                    pieces.push((piece.len(), is_last));
                    sent.extend_from_slice(piece);
                }
                None => has_trailers = true,
            }
        }
        assert_eq!(sent, body);
        (pieces, has_trailers)
    }

    #[test]
    fn a_body_is_cut_into_pieces_of_which_only_the_last_ends_it() {
        const FULL: usize = PIECE_BYTES;
        for (len, pieces) in [
            (0, vec![]),
            (1, vec![1]),
            (FULL, vec![FULL]),
            (FULL + 1, vec![FULL, 1]),
            (2 * FULL, vec![FULL, FULL]),
            (3 * FULL - 1, vec![FULL, FULL, FULL - 1]),
        ] {
            let with = |is_last: bool| {
                let n_pieces = pieces.len();
                let marked = move |(idx, len): (usize, &usize)| (*len, is_last && idx + 1 == n_pieces);
                pieces.iter().enumerate().map(marked).collect::<Vec<_>>()
            };
            assert_eq!(shape(len, End::Open), (with(false), false), "{len} bytes, open");
            assert_eq!(shape(len, End::Trailers), (with(false), true), "{len} bytes, trailers");
            let ended = if len == 0 { vec![(0, true)] } else { with(true) };
            assert_eq!(shape(len, End::Body), (ended, false), "{len} bytes");
        }
    }
}
