//! How far a publisher is believed: the batches that it may repeat, and the wrong things that it did.

use std::collections::VecDeque;
use std::time::Duration;

use super::input::{Overlap, PayloadDigest, SeqNo};

/// Batches that are recognised when they come again.
const MAX_RECENT: usize = 64;
/// So many wrong things within [`STRIKE_WINDOW`] put a source into quarantine.
const MAX_STRIKES: usize = 8;
const STRIKE_WINDOW: Duration = Duration::from_secs(60);
/// First quarantine; each further one is twice as long.
const MIN_QUARANTINE: Duration = Duration::from_secs(5);
const MAX_QUARANTINE: Duration = Duration::from_secs(300);
/// A source that was good for so long begins with a short quarantine again.
const FORGIVEN_AFTER: Duration = Duration::from_secs(600);

/// The latest batches of the running connection, ascending.
#[derive(Debug, Default)]
pub(super) struct Recent(VecDeque<Overlap>);

/// What is known of a batch that came with an old number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Repeat {
    /// The same batch came before.
    Same,
    /// Another batch came under that number.
    Other,
    /// It is too old to tell.
    Unknown,
}

impl Recent {
    /// Remembers a batch; the oldest is forgotten. Replies come after live batches with higher numbers.
    pub(super) fn push(&mut self, overlap: Overlap) {
        match self.0.binary_search_by_key(&overlap.seq, |known| known.seq) {
            Ok(position) => self.0[position] = overlap,
            Err(0) if self.0.len() == MAX_RECENT => {}
            Err(position) => {
                self.0.insert(position, overlap);
                if self.0.len() > MAX_RECENT {
                    self.0.pop_front();
                }
            }
        }
    }

    pub(super) fn compare(&self, seq: SeqNo, digest: PayloadDigest) -> Repeat {
        match self.0.binary_search_by_key(&seq, |overlap| overlap.seq) {
            Ok(position) if self.0[position].digest == digest => Repeat::Same,
            Ok(_) => Repeat::Other,
            Err(_) => Repeat::Unknown,
        }
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}

/// The wrong things that a source did lately.
#[derive(Debug, Default)]
pub(super) struct Strikes {
    times: VecDeque<Duration>,
    n_quarantines: u32,
    last_quarantine: Duration,
}

impl Strikes {
    /// Notes one more; says for how long the source is to be left alone, if it was one too many.
    pub(super) fn add(&mut self, now: Duration) -> Option<Duration> {
        while self.times.front().is_some_and(|time| now.saturating_sub(*time) > STRIKE_WINDOW) {
            self.times.pop_front();
        }
        self.times.push_back(now);
        (self.times.len() >= MAX_STRIKES).then(|| self.quarantine(now))
    }

    fn quarantine(&mut self, now: Duration) -> Duration {
        self.times.clear();
        if now.saturating_sub(self.last_quarantine) > FORGIVEN_AFTER {
            self.n_quarantines = 0;
        }
        let length = (MIN_QUARANTINE * 2_u32.pow(self.n_quarantines.min(10))).min(MAX_QUARANTINE);
        self.n_quarantines += 1;
        self.last_quarantine = now + length;
        length
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeated_batches_are_told_from_others_and_old_ones_are_forgotten() {
        let mut recent = Recent::default();
        (0..100).for_each(|seq| recent.push(Overlap { seq: SeqNo(seq), digest: PayloadDigest(u128::from(seq)) }));
        assert_eq!(recent.compare(SeqNo(99), PayloadDigest(99)), Repeat::Same);
        assert_eq!(recent.compare(SeqNo(99), PayloadDigest(1)), Repeat::Other);
        assert_eq!(recent.compare(SeqNo(35), PayloadDigest(35)), Repeat::Unknown);
        assert_eq!(recent.compare(SeqNo(36), PayloadDigest(36)), Repeat::Same);
    }

    #[test]
    fn quarantines_grow_and_are_forgiven() {
        let mut strikes = Strikes::default();
        let mut now = Duration::ZERO;
        let mut until_quarantine = |now: &mut Duration| loop {
            *now += Duration::from_secs(1);
            if let Some(length) = strikes.add(*now) {
                return length.as_secs();
            }
        };
        let lengths: Vec<u64> = (0..8).map(|_| until_quarantine(&mut now)).collect();
        assert_eq!(lengths, [5, 10, 20, 40, 80, 160, 300, 300]);
        now += Duration::from_secs(2000);
        assert_eq!(until_quarantine(&mut now), 5);
    }

    #[test]
    fn rare_strikes_never_quarantine() {
        let mut strikes = Strikes::default();
        assert!((0..1000).all(|minute| strikes.add(Duration::from_secs(minute * 61)).is_none()));
    }
}
