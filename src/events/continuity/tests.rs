use proptest::prelude::*;

use super::*;

const ZERO: Duration = Duration::ZERO;

fn live(seq: u64) -> Input {
    Input::Live { seq: SeqNo(seq), payload: vec![seq as u8] }
}

fn reply(seq: u64) -> Input {
    Input::Reply { seq: SeqNo(seq), payload: vec![seq as u8] }
}

fn apply(seq: u64, via: Via) -> Action {
    Action::Apply { seq: SeqNo(seq), payload: vec![seq as u8], via }
}

fn ask(from: u64) -> Action {
    Action::RequestReplay { from: SeqNo(from) }
}

fn gap(expected: u64, received: u64) -> Action {
    Action::Report(Incident::Gap { expected: SeqNo(expected), received: SeqNo(received) })
}

const CONNECTED: Action = Action::StartGeneration(Cause::Connected);
const RESTARTED: Action = Action::StartGeneration(Cause::Restarted);
const LOST: Action = Action::StartGeneration(Cause::BatchesLost);

/// Feeds `inputs` at one moment and returns everything that was answered.
fn run(continuity: &mut Continuity, inputs: impl IntoIterator<Item = Input>) -> Vec<Action> {
    inputs.into_iter().flat_map(|input| continuity.step(ZERO, input)).collect()
}

/// Live, with `n_batches` applied.
fn live_after(n_batches: u64) -> Continuity {
    let mut continuity = Continuity::new(true);
    run(&mut continuity, [Input::Connected]);
    run(&mut continuity, (0..n_batches).map(reply));
    run(&mut continuity, [Input::ReplayEnd, Input::ReplayEnd]);
    assert_eq!(continuity.phase(), Phase::Live);
    continuity
}

/// Lets one round after the other pass in silence until nothing is asked any more.
fn starve(continuity: &mut Continuity) -> Vec<Action> {
    let mut actions = Vec::new();
    for second in 1..120 {
        actions.extend(continuity.step(Duration::from_secs(second), Input::Tick));
    }
    actions
}

#[test]
fn connection_starts_a_generation_and_asks_from_0() {
    let mut continuity = Continuity::new(true);
    assert_eq!(run(&mut continuity, [Input::Connected]), [CONNECTED, ask(0)]);
    assert_eq!(continuity.phase(), Phase::CatchingUp);
}

#[test]
fn live_batches_are_held_until_the_replay_joins_them() {
    let mut continuity = Continuity::new(true);
    run(&mut continuity, [Input::Connected]);
    assert_eq!(run(&mut continuity, [live(2), live(3)]), []);
    assert_eq!(run(&mut continuity, [reply(0)]), [apply(0, Via::Replay)]);
    assert_eq!(
        run(&mut continuity, [reply(1)]),
        [apply(1, Via::Replay), Action::CloseReplay, apply(2, Via::Live), apply(3, Via::Live)]
    );
    assert_eq!(continuity.phase(), Phase::Live);
    assert_eq!(run(&mut continuity, [reply(2), live(4)]), [apply(4, Via::Live)]);
}

#[test]
fn end_after_replies_is_confirmed_by_asking_again() {
    let mut continuity = Continuity::new(true);
    run(&mut continuity, [Input::Connected, reply(0), reply(1)]);
    assert_eq!(run(&mut continuity, [Input::ReplayEnd]), [ask(2)]);
    assert_eq!(run(&mut continuity, [Input::ReplayEnd]), [Action::CloseReplay]);
    assert_eq!(run(&mut continuity, [live(2)]), [apply(2, Via::Live)]);
}

#[test]
fn publisher_that_published_nothing_is_expected_to_begin_at_0() {
    let mut continuity = Continuity::new(true);
    run(&mut continuity, [Input::Connected, Input::ReplayEnd]);
    assert_eq!(continuity.phase(), Phase::Live);
    assert_eq!(run(&mut continuity, [live(1)]), [gap(0, 1), ask(0)]);
}

#[test]
fn hole_in_a_replay_requests_from_the_first_missing_batch() {
    let mut continuity = Continuity::new(true);
    run(&mut continuity, [Input::Connected, reply(0), reply(1)]);
    assert_eq!(run(&mut continuity, [reply(5)]), [ask(2)]);
    assert_eq!(run(&mut continuity, [reply(2)]), [apply(2, Via::Replay)]);
}

#[test]
fn silence_after_progress_asks_again_at_once() {
    let mut continuity = Continuity::new(true);
    run(&mut continuity, [Input::Connected, reply(0)]);
    assert_eq!(continuity.step(Duration::from_millis(499), Input::Tick), []);
    assert_eq!(continuity.step(Duration::from_millis(500), Input::Tick), [ask(1)]);
}

#[test]
fn buffer_that_begins_late_makes_the_source_incomplete() {
    let mut continuity = Continuity::new(true);
    assert_eq!(run(&mut continuity, [Input::Connected, reply(7)]), [CONNECTED, ask(0), apply(7, Via::Replay)]);
    run(&mut continuity, [Input::ReplayEnd, Input::ReplayEnd]);
    assert_eq!(continuity.phase(), Phase::Incomplete);
}

#[test]
fn live_gap_requests_replay_from_first_missing_batch() {
    let mut continuity = live_after(3);
    assert_eq!(run(&mut continuity, [live(5)]), [gap(3, 5), ask(3)]);
    assert_eq!(
        run(&mut continuity, [live(6), reply(3), reply(4)]),
        [apply(3, Via::Replay), apply(4, Via::Replay), Action::CloseReplay, apply(5, Via::Live), apply(6, Via::Live)]
    );
    assert_eq!(continuity.phase(), Phase::Live);
}

#[test]
fn gap_among_held_batches_is_caught_up_too() {
    let mut continuity = live_after(1);
    run(&mut continuity, [live(2), live(4)]);
    assert_eq!(
        run(&mut continuity, [reply(1)]),
        [apply(1, Via::Replay), Action::CloseReplay, apply(2, Via::Live), gap(3, 4), ask(3)]
    );
}

#[test]
fn gap_that_the_buffer_no_longer_has_starts_a_generation_behind_it() {
    let mut continuity = live_after(3);
    run(&mut continuity, [live(20)]);
    let mut now = ZERO;
    for _ in 0..MAX_STALLED_ROUNDS {
        continuity.step(now, reply(10));
        now += Duration::from_secs(10);
        assert_eq!(continuity.step(now, Input::Tick), [ask(3)]);
    }
    assert_eq!(continuity.step(now, reply(10)), [LOST, apply(10, Via::Replay)]);
    assert_eq!(continuity.step(now, reply(11)), [apply(11, Via::Replay)]);
}

#[test]
fn lower_live_number_means_a_restart() {
    let mut continuity = live_after(3);
    run(&mut continuity, [live(3), live(4)]);
    assert_eq!(run(&mut continuity, [live(4)]), [RESTARTED, ask(0)]);
    let mut continuity = live_after(3);
    run(&mut continuity, [live(3), live(4)]);
    assert_eq!(
        run(&mut continuity, [live(0), reply(0)]),
        [RESTARTED, ask(0), apply(0, Via::Replay), Action::CloseReplay]
    );
}

#[test]
fn restart_while_catching_up_drops_what_was_held() {
    let mut continuity = Continuity::new(true);
    run(&mut continuity, [Input::Connected, live(8), live(9)]);
    assert_eq!(run(&mut continuity, [live(0)]), [RESTARTED, ask(0)]);
    assert_eq!(
        run(&mut continuity, [live(1), reply(0)]),
        [apply(0, Via::Replay), Action::CloseReplay, apply(1, Via::Live)]
    );
}

#[test]
fn live_copies_of_replayed_batches_are_dropped() {
    let mut continuity = live_after(3);
    assert_eq!(run(&mut continuity, [live(1), live(2), live(3)]), [apply(3, Via::Live)]);
}

#[test]
fn reconnection_always_starts_a_generation() {
    let mut continuity = live_after(3);
    assert_eq!(run(&mut continuity, [Input::Disconnected]), [Action::CloseReplay]);
    assert_eq!(run(&mut continuity, [live(3), reply(3)]), [], "of the former connection");
    assert_eq!(run(&mut continuity, [Input::Connected]), [CONNECTED, ask(0)]);
}

#[test]
fn knowledge_of_a_broken_connection_expires() {
    let mut continuity = live_after(3);
    run(&mut continuity, [Input::Disconnected]);
    assert_eq!(continuity.step(DISCONNECTED_GRACE - Duration::from_millis(1), Input::Tick), []);
    assert_eq!(continuity.step(DISCONNECTED_GRACE, Input::Tick), [Action::EndGeneration]);
    assert_eq!(continuity.step(2 * DISCONNECTED_GRACE, Input::Tick), []);
}

#[test]
fn dead_replay_endpoint_ends_in_following_the_live_stream() {
    let mut continuity = Continuity::new(true);
    run(&mut continuity, [Input::Connected, live(5), live(6)]);
    let actions = starve(&mut continuity);
    assert_eq!(actions.iter().filter(|action| **action == ask(0)).count(), MAX_STALLED_ROUNDS as usize);
    assert_eq!(
        actions[actions.len() - 4..],
        [Action::Report(Incident::ReplayGaveUp), Action::CloseReplay, apply(5, Via::Live), apply(6, Via::Live)]
    );
    assert_eq!(continuity.phase(), Phase::Incomplete);
}

#[test]
fn dead_replay_endpoint_without_live_batches_takes_the_first_that_comes() {
    let mut continuity = Continuity::new(true);
    run(&mut continuity, [Input::Connected]);
    starve(&mut continuity);
    assert_eq!(continuity.phase(), Phase::Incomplete);
    assert_eq!(run(&mut continuity, [live(42)]), [apply(42, Via::Live)]);
}

#[test]
fn gap_that_nothing_fills_costs_what_was_known() {
    let mut continuity = live_after(3);
    run(&mut continuity, [live(5)]);
    let actions = starve(&mut continuity);
    assert_eq!(actions[actions.len() - 2..], [LOST, apply(5, Via::Live)]);
    assert_eq!(continuity.phase(), Phase::Incomplete);
}

#[test]
fn too_many_held_batches_are_left_to_the_replay() {
    let mut continuity = Continuity::new(true);
    run(&mut continuity, [Input::Connected]);
    let large = |seq| Input::Live { seq: SeqNo(seq), payload: vec![0; MAX_HELD_BYTES / 2 + 1] };
    assert_eq!(run(&mut continuity, [large(1), large(2)]), [Action::Report(Incident::HeldOverflow)]);
    run(&mut continuity, [reply(0), reply(1), live(3)]);
    assert_eq!(continuity.phase(), Phase::CatchingUp);
    assert_eq!(run(&mut continuity, [reply(2)]), [apply(2, Via::Replay), Action::CloseReplay, apply(3, Via::Live)]);
}

#[test]
fn without_replay_endpoint_the_first_batch_decides_completeness() {
    for (first, phase) in [(0, Phase::Live), (4, Phase::Incomplete)] {
        let mut continuity = Continuity::new(false);
        assert_eq!(run(&mut continuity, [Input::Connected, live(first)]), [CONNECTED, apply(first, Via::Live)]);
        assert_eq!(continuity.phase(), phase);
    }
}

#[test]
fn without_replay_endpoint_a_gap_starts_a_generation() {
    let mut continuity = Continuity::new(false);
    run(&mut continuity, [Input::Connected, live(0)]);
    assert_eq!(run(&mut continuity, [live(2)]), [gap(1, 2), LOST, apply(2, Via::Live)]);
    assert_eq!(continuity.phase(), Phase::Incomplete);
    assert_eq!(run(&mut continuity, [live(0)]), [RESTARTED, apply(0, Via::Live)]);
    assert_eq!(continuity.phase(), Phase::Live);
}

/// A publisher with a bounded buffer and a lossy replay, and the source under test.
struct World {
    rng: fastrand::Rng,
    continuity: Continuity,
    now: Duration,
    n_published: u64,
    buffer: u64,
    /// Probability that a reply or END is lost, doubled or misplaced, that a live batch is lost.
    faults: f64,
    request: Option<u64>,
    /// What was applied in each generation.
    generations: Vec<Vec<u64>>,
}

impl World {
    fn new(seed: u64, n_published: u64, buffer: u64, faults: f64) -> Self {
        let rng = fastrand::Rng::with_seed(seed);
        let continuity = Continuity::new(true);
        Self { rng, continuity, now: ZERO, n_published, buffer, faults, request: None, generations: Vec::new() }
    }

    fn fault(&mut self) -> bool {
        self.rng.f64() < self.faults
    }

    fn feed(&mut self, input: Input) {
        for action in self.continuity.step(self.now, input) {
            match action {
                Action::StartGeneration(_) => self.generations.push(Vec::new()),
                Action::RequestReplay { from } => self.request = Some(from.0),
                Action::CloseReplay => self.request = None,
                Action::Apply { seq, .. } => self.generations.last_mut().expect("started").push(seq.0),
                Action::EndGeneration | Action::Report(_) => {}
            }
        }
    }

    fn publish(&mut self) {
        let seq = self.n_published;
        self.n_published += 1;
        if !self.fault() {
            self.feed(live(seq));
        }
    }

    /// Answers the latest request; a request made meanwhile supersedes it, as a fresh socket does.
    fn serve(&mut self) {
        let Some(from) = self.request.take() else { return };
        let mut replies: Vec<_> = (from.max(self.n_published.saturating_sub(self.buffer))..self.n_published).collect();
        replies.retain(|_| self.rng.f64() >= self.faults);
        for position in 1..replies.len() {
            if self.fault() {
                replies.swap(position - 1, position);
            } else if self.fault() {
                replies[position] = replies[position - 1];
            }
        }
        for seq in replies {
            if self.request.is_some() {
                return;
            }
            self.feed(reply(seq));
        }
        if self.request.is_none() && !self.fault() {
            self.feed(Input::ReplayEnd);
        }
    }

    fn pass(&mut self) {
        self.now += Duration::from_millis(100);
        self.feed(Input::Tick);
    }
}

proptest! {
    #[test]
    fn lossy_replays_converge_on_one_sequence_without_holes(
        seed in any::<u64>(),
        n_before in 0..60_u64,
        buffer in prop_oneof![Just(20_u64), Just(10_000)],
        faults in 0.0..0.4_f64,
    ) {
        let mut world = World::new(seed, n_before, buffer, faults);
        world.feed(Input::Connected);
        for _ in 0..40 {
            match world.rng.u8(0..4) {
                0 => world.publish(),
                1 => world.serve(),
                _ => world.pass(),
            }
        }
        world.faults = 0.0;
        world.publish();
        for _ in 0..600 {
            world.serve();
            world.pass();
        }
        for applied in &world.generations {
            prop_assert!(applied.windows(2).all(|pair| pair[1] == pair[0] + 1), "hole or repetition in {:?}", applied);
        }
        let last = world.generations.last().expect("connected");
        prop_assert_eq!(last.last(), Some(&(world.n_published - 1)));
        let phase = if last[0] == 0 { Phase::Live } else { Phase::Incomplete };
        prop_assert!(world.continuity.phase() == phase || world.continuity.phase() == Phase::Incomplete);
        if faults == 0.0 {
            prop_assert_eq!(world.continuity.phase(), phase);
        }
    }
}
