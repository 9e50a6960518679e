//! Which faults hit which messages.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use super::Side;
use super::frames::Unit;

/// The faults in force. The default is a proxy that does nothing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Faults {
    /// Added to the way of every byte.
    pub delay: Duration,
    /// At most so much more, at random; the order stays.
    pub jitter: Duration,
    /// Messages that are lost.
    pub drop: Which,
    /// Messages that come twice.
    pub duplicate: Which,
    /// Messages in whose last frame the connection ends.
    pub truncate: Which,
    /// Messages whose last frame arrives as bytes that are no msgpack.
    pub corrupt: Which,
    /// Bytes per second of each connection and direction.
    pub bandwidth: Option<u64>,
    /// Nothing moves, connections stay: neither data nor heartbeats, FIN or RST. What was sent meanwhile arrives late.
    pub blackhole: bool,
}

/// Some of the messages from the publisher.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Which {
    /// None of them.
    #[default]
    None,
    /// All of them.
    All,
    /// The one with this number, counted from 0 over all connections since the faults were set.
    Nth(u64),
    /// Every n-th, the n-th first.
    Every(u64),
    /// Each with this probability.
    Chance(f64),
    /// The END markers of replays.
    End,
}

/// What a proxy did since it was started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Connections accepted.
    pub connections: u64,
    /// Connections open now.
    pub open: u64,
    /// Messages that came from the publisher.
    pub messages: u64,
    /// Messages lost.
    pub dropped: u64,
    /// Messages sent twice.
    pub duplicated: u64,
    /// Messages cut.
    pub truncated: u64,
    /// Messages made unreadable.
    pub corrupted: u64,
    /// Bytes passed on to subscribers.
    pub bytes_down: u64,
    /// Bytes passed on to publishers.
    pub bytes_up: u64,
}

/// What becomes of one message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fate {
    pub(super) n_copies: usize,
    pub(super) is_truncated: bool,
}

/// The faults in force, with what they remember.
#[derive(Debug)]
pub(super) struct Rules {
    faults: Faults,
    rng: fastrand::Rng,
    /// Messages since the faults were set.
    n_messages: u64,
    pub(super) counts: Counts,
}

impl Rules {
    pub(super) fn new(seed: u64) -> Self {
        let rng = fastrand::Rng::with_seed(seed);
        Self { faults: Faults::default(), rng, n_messages: 0, counts: Counts::default() }
    }

    pub(super) fn set(&mut self, faults: Faults) {
        self.faults = faults;
        self.n_messages = 0;
    }

    pub(super) fn opened(&mut self) {
        self.counts.connections += 1;
        self.counts.open += 1;
    }

    pub(super) fn closed(&mut self) {
        self.counts.open -= 1;
    }

    /// Counts bytes that were passed on.
    pub(super) fn passed(&mut self, to: Side, n_bytes: usize) {
        match to {
            Side::Subscriber => self.counts.bytes_down += n_bytes as u64,
            Side::Publisher => self.counts.bytes_up += n_bytes as u64,
        }
    }

    pub(super) fn bandwidth(&self) -> Option<u64> {
        self.faults.bandwidth
    }

    /// How long the next bytes take.
    pub(super) fn delay(&mut self) -> Duration {
        self.faults.delay + self.faults.jitter.mul_f64(self.rng.f64())
    }

    /// Decides about one message and, where it is to be corrupted, does that.
    pub(super) fn judge(&mut self, message: &mut Unit) -> Fate {
        let number = self.n_messages;
        self.n_messages += 1;
        self.counts.messages += 1;
        let Faults { drop, duplicate, truncate, corrupt, .. } = self.faults;
        if self.hits(drop, number, message) {
            self.counts.dropped += 1;
            return Fate { n_copies: 0, is_truncated: false };
        }
        if self.hits(corrupt, number, message) {
            self.counts.corrupted += 1;
            self.corrupt(message);
        }
        let is_truncated = self.hits(truncate, number, message);
        self.counts.truncated += u64::from(is_truncated);
        let is_duplicated = self.hits(duplicate, number, message);
        self.counts.duplicated += u64::from(is_duplicated);
        Fate { n_copies: 1 + usize::from(is_duplicated), is_truncated }
    }

    fn hits(&mut self, which: Which, number: u64, message: &Unit) -> bool {
        match which {
            Which::None => false,
            Which::All => true,
            Which::Nth(nth) => number == nth,
            Which::Every(n) => (number + 1).is_multiple_of(n),
            Which::Chance(chance) => self.rng.f64() < chance,
            Which::End => message.is_replay_end(),
        }
    }

    fn corrupt(&mut self, message: &mut Unit) {
        let payload = message.payload();
        let payload = &mut message.bytes[payload];
        self.rng.fill(payload);
        if let Some(first) = payload.first_mut() {
            // The one byte that msgpack never uses: random bytes alone could be a batch.
            *first = 0xc1;
        }
    }
}

impl FromStr for Which {
    type Err = String;

    /// `none`, `all`, `end`, `nth:3`, `every:10` or a probability.
    fn from_str(text: &str) -> Result<Self, String> {
        let expected =
            || format!("{text:?} is none of none, all, end, nth:K, every:N (from 1) or a probability from 0 to 1");
        let number = |digits: &str| digits.parse::<u64>().map_err(|_| expected());
        match text.split_once(':') {
            Some(("nth", digits)) => Ok(Self::Nth(number(digits)?)),
            Some(("every", digits)) => number(digits)?.checked_sub(1).map(|n| Self::Every(n + 1)).ok_or_else(expected),
            Some(_) => Err(expected()),
            None => match text {
                "none" => Ok(Self::None),
                "all" => Ok(Self::All),
                "end" => Ok(Self::End),
                _ => {
                    let chance = text.parse::<f64>().ok().filter(|chance| (0.0..=1.0).contains(chance));
                    chance.map(Self::Chance).ok_or_else(expected)
                }
            },
        }
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { connections, open, messages, dropped, duplicated, truncated, corrupted, bytes_down, bytes_up } =
            self;
        write!(
            f,
            "{connections} connections ({open} open), {messages} messages: {dropped} dropped, {duplicated} duplicated, \
             {truncated} truncated, {corrupted} corrupted; {bytes_down} bytes to subscribers, {bytes_up} to publishers"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message() -> Unit {
        Unit { bytes: vec![0, 3, 1, 2, 3], is_command: false, bodies: std::iter::once(2..5).collect() }
    }

    fn dropped(which: Which, n_messages: u64) -> Vec<u64> {
        let mut rules = Rules::new(7);
        rules.set(Faults { drop: which, ..Faults::default() });
        (0..n_messages).filter(|_| rules.judge(&mut message()).n_copies == 0).collect()
    }

    #[test]
    fn rules_hit_what_they_name() {
        assert!(dropped(Which::None, 5).is_empty());
        assert_eq!(dropped(Which::All, 3), [0, 1, 2]);
        assert_eq!(dropped(Which::Nth(3), 9), [3]);
        assert_eq!(dropped(Which::Every(3), 9), [2, 5, 8]);
        let some = dropped(Which::Chance(0.2), 1000);
        assert!((150..250).contains(&some.len()), "{}", some.len());
        assert_eq!(some, dropped(Which::Chance(0.2), 1000), "the same seed hits the same messages");
    }

    #[test]
    fn corrupted_payload_is_no_msgpack_and_keeps_its_length() {
        let mut rules = Rules::new(7);
        rules.set(Faults { corrupt: Which::All, duplicate: Which::All, ..Faults::default() });
        let mut corrupted = message();
        assert_eq!(rules.judge(&mut corrupted), Fate { n_copies: 2, is_truncated: false });
        assert_eq!((corrupted.bytes.len(), corrupted.bytes[2]), (5, 0xc1));
    }

    #[test]
    fn which_is_read_from_text() {
        let good = [
            ("none", Which::None),
            ("all", Which::All),
            ("end", Which::End),
            ("nth:0", Which::Nth(0)),
            ("every:10", Which::Every(10)),
            ("0.2", Which::Chance(0.2)),
        ];
        for (text, which) in good {
            assert_eq!(text.parse(), Ok(which));
        }
        for text in ["", "every:0", "every:x", "first:1", "1.1", "-0.1", "NaN"] {
            assert!(text.parse::<Which>().is_err(), "{text}");
        }
    }
}
