//! The circuit breaker of one endpoint: whether requests ask it, and when it is asked off the request path.
//!
//! Closed: requests ask. It opens when three calls in a row fail, or ten of the last twenty: the first notices an
//! endpoint that is gone within three requests, the second one that is too slow for half of what it is asked.
//! Open: no request asks, so it costs none of them anything. A small question off the request path, the check, is asked
//! after a pause with full jitter, whose bound doubles from 250 ms to 10 s; while it is under way the state is
//! half-open. A good check closes it, on trial: an endpoint that answers small questions in time may still be too slow
//! for large ones, so the first failing request opens it again, with the next longer pause. What a request gets in time
//! ends the trial.
//!
//! Closed endpoints are checked as well, every 30 s, and sooner after a failed check; a check counts as a call does.
//! Calls that began before the breaker last moved tell nothing new.
//!
//! Pure: time and randomness are arguments.

use std::time::Duration;

use tokio::time::Instant;

use super::status::BreakerState;

/// Failures in a row that open it.
const IN_A_ROW: u32 = 3;
/// Calls that are remembered; those that were never made count as good.
const WINDOW: u32 = 20;
/// Failures among the remembered that open it.
const IN_WINDOW: u32 = WINDOW / 2;
/// Bound of the first pause.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// Bound of the longest pause: how long an endpoint that has recovered may stay unused.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Time from one good check to the next, and up to a tenth more, so that endpoints do not stay in step.
const INTERVAL: Duration = Duration::from_secs(30);
/// The same for an endpoint whose tokens are not the pool's: someone is at work on it.
const SUSPECT_INTERVAL: Duration = Duration::from_secs(5);

/// A breaker, which begins closed.
#[derive(Debug)]
pub(super) struct Breaker {
    state: State,
    /// Counts openings and closings.
    epoch: Epoch,
    /// Pauses since the last success; each doubles the bound.
    n_pauses: u32,
    /// When it is to be checked.
    due: Instant,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Closed {
        /// One bit per call, the last one lowest; 1 is a failure.
        recent: u32,
        /// No request has had an answer since it closed.
        on_trial: bool,
    },
    Open,
    HalfOpen,
}

/// The time between two movements of a breaker, in which a call began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Epoch(u32);

impl Breaker {
    /// A closed one, to be checked at once.
    pub(super) fn new(now: Instant) -> Self {
        Self { state: State::Closed { recent: 0, on_trial: false }, epoch: Epoch(0), n_pauses: 0, due: now }
    }

    pub(super) fn state(&self) -> BreakerState {
        match self.state {
            State::Closed { .. } => BreakerState::Closed,
            State::Open => BreakerState::Open,
            State::HalfOpen => BreakerState::HalfOpen,
        }
    }

    /// Whether it is closed and has been used since.
    pub(super) fn is_trusted(&self) -> bool {
        matches!(self.state, State::Closed { on_trial: false, .. })
    }

    /// What a call or a check that begins now is told apart by.
    pub(super) fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// When it is to be checked next.
    pub(super) fn due(&self) -> Instant {
        self.due
    }

    /// A request was answered in time.
    pub(super) fn call_passed(&mut self, begun: Epoch) {
        if begun == self.epoch {
            self.pass();
        }
    }

    /// A request was not answered as it should. `random` is from 0 to 1.
    pub(super) fn call_failed(&mut self, begun: Epoch, now: Instant, random: f64) {
        if begun == self.epoch && self.fail() {
            self.pause(now, random);
        }
    }

    /// A check begins.
    pub(super) fn check_began(&mut self) -> Epoch {
        if self.state == State::Open {
            self.state = State::HalfOpen;
        }
        self.epoch
    }

    /// The check was answered in time.
    pub(super) fn check_passed(&mut self, begun: Epoch, now: Instant, random: f64) {
        if begun != self.epoch {
            return;
        }
        match self.state {
            State::Closed { .. } => self.pass(),
            State::Open | State::HalfOpen => self.go(State::Closed { recent: 0, on_trial: true }),
        }
        self.due = now + INTERVAL + INTERVAL.mul_f64(random * 0.1);
    }

    /// The check was not answered as it should.
    pub(super) fn check_failed(&mut self, begun: Epoch, now: Instant, random: f64) {
        if begun != self.epoch {
            return;
        }
        match self.state {
            State::Closed { .. } => drop(self.fail()),
            State::Open | State::HalfOpen => self.state = State::Open,
        }
        self.pause(now, random);
    }

    /// Has the next check come soon, whatever the last one said of failures.
    pub(super) fn suspect(&mut self, now: Instant) {
        self.due = self.due.min(now + SUSPECT_INTERVAL);
    }

    fn pass(&mut self) {
        if let State::Closed { recent, on_trial } = &mut self.state {
            (*recent, *on_trial) = (*recent << 1 & mask(WINDOW), false);
            self.n_pauses = 0;
        }
    }

    /// Says whether that opened it.
    fn fail(&mut self) -> bool {
        let State::Closed { recent, on_trial } = &mut self.state else { return false };
        *recent = (*recent << 1 | 1) & mask(WINDOW);
        let in_a_row = *recent & mask(IN_A_ROW) == mask(IN_A_ROW);
        let opens = *on_trial || in_a_row || recent.count_ones() >= IN_WINDOW;
        if opens {
            self.go(State::Open);
        }
        opens
    }

    fn go(&mut self, state: State) {
        self.state = state;
        self.epoch.0 = self.epoch.0.wrapping_add(1);
    }

    fn pause(&mut self, now: Instant, random: f64) {
        let bound = FIRST_PAUSE.saturating_mul(2_u32.saturating_pow(self.n_pauses)).min(LONGEST_PAUSE);
        self.n_pauses = (self.n_pauses + 1).min(31);
        self.due = now + bound.mul_f64(random);
    }
}

/// The lowest `n` bits.
fn mask(n: u32) -> u32 {
    (1 << n) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Drives a breaker by a text: `.` a good call, `x` a failed one, `c` and `f` a good and a failed check.
    fn drive(breaker: &mut Breaker, now: Instant, steps: &str) {
        for step in steps.chars() {
            let epoch = breaker.epoch();
            match step {
                '.' => breaker.call_passed(epoch),
                'x' => breaker.call_failed(epoch, now, 1.0),
                'c' => {
                    let epoch = breaker.check_began();
                    breaker.check_passed(epoch, now, 0.0);
                }
                'f' => {
                    let epoch = breaker.check_began();
                    breaker.check_failed(epoch, now, 1.0);
                }
                other => panic!("{other:?} is no step"),
            }
        }
    }

    #[test]
    fn what_opens_and_what_closes_it() {
        for (steps, expected) in [
            ("", BreakerState::Closed),
            ("xx.xx.xx", BreakerState::Closed),
            ("xxx", BreakerState::Open),
            ("xxf", BreakerState::Open),
            ("fff", BreakerState::Open),
            ("xxcx", BreakerState::Closed),
            (".x.x.x.x.x.x.x.x.x.", BreakerState::Closed),
            (".x.x.x.x.x.x.x.x.x.x", BreakerState::Open),
            // Of ten failures the first is older than the last twenty calls.
            ("x...x.x.x.x.x.x.x.x...x", BreakerState::Closed),
            ("xxx.", BreakerState::Open),
            ("xxxf", BreakerState::Open),
            ("xxxc", BreakerState::Closed),
            ("xxxcx", BreakerState::Open),
            ("xxxcf", BreakerState::Open),
            ("xxxc.x", BreakerState::Closed),
            ("xxxccx", BreakerState::Closed),
        ] {
            let now = Instant::now();
            let mut breaker = Breaker::new(now);
            drive(&mut breaker, now, steps);
            assert_eq!(breaker.state(), expected, "{steps:?}");
        }
    }

    #[test]
    fn pauses_double_until_a_request_is_answered() {
        for (steps, pause_ms) in [
            ("xxx", 250),
            ("xxxf", 500),
            ("xxxff", 1_000),
            ("xxxffff", 4_000),
            ("xxxfffff", 8_000),
            ("xxxffffff", 10_000),
            ("xxxffffffffffffffffffffffffffffffffffffffff", 10_000),
            ("xxxcx", 500),
            ("xxxcxcx", 1_000),
            ("xxxcx.", 500),
            ("xxxc.xxx", 250),
            ("xxxccxxx", 250),
            // A closed one is not asked at once again either.
            ("f", 250),
            ("ff", 500),
            ("c", 30_000),
            ("xxxc", 30_000),
        ] {
            let now = Instant::now();
            let mut breaker = Breaker::new(now);
            drive(&mut breaker, now, steps);
            assert_eq!(breaker.due() - now, Duration::from_millis(pause_ms), "{steps:?}");
        }
        let now = Instant::now();
        let mut breaker = Breaker::new(now);
        drive(&mut breaker, now, "xx");
        breaker.call_failed(breaker.epoch(), now, 0.25);
        assert_eq!(breaker.due() - now, FIRST_PAUSE / 4, "full jitter");
    }

    #[test]
    fn a_suspect_is_checked_soon_but_not_put_off() {
        let now = Instant::now();
        let mut breaker = Breaker::new(now);
        drive(&mut breaker, now, "c");
        for later in [0, 1, 2] {
            breaker.suspect(now + Duration::from_secs(later));
            assert_eq!(breaker.due(), now + SUSPECT_INTERVAL);
        }
    }

    #[test]
    fn a_check_under_way_is_half_open_and_lets_no_request_through() {
        let now = Instant::now();
        let mut breaker = Breaker::new(now);
        assert!(breaker.due() <= now, "an endpoint is checked when it is first seen");
        breaker.check_began();
        assert_eq!(breaker.state(), BreakerState::Closed, "a closed one stays closed while it is checked");
        drive(&mut breaker, now, "xxx");
        breaker.check_began();
        assert_eq!(breaker.state(), BreakerState::HalfOpen);
    }

    #[test]
    fn what_began_before_it_moved_tells_nothing() {
        let now = Instant::now();
        let mut breaker = Breaker::new(now);
        let closed = breaker.check_began();
        drive(&mut breaker, now, "xxx");
        let due = breaker.due();
        breaker.call_failed(closed, now, 1.0);
        breaker.check_passed(closed, now, 1.0);
        assert_eq!((breaker.state(), breaker.due()), (BreakerState::Open, due), "asked before it opened");
        drive(&mut breaker, now, "c");
        breaker.call_failed(closed, now, 1.0);
        assert_eq!(breaker.state(), BreakerState::Closed, "a late failure from before does not end the trial");
        breaker.call_passed(closed);
        drive(&mut breaker, now, "x");
        assert_eq!(breaker.state(), BreakerState::Open, "nor does a late success");
    }
}
