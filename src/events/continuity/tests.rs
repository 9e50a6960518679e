use proptest::prelude::*;

use super::*;

const ZERO: Duration = Duration::ZERO;
const SPREAD: Duration = Duration::from_millis(100);

/// The payload that the publisher's `life`-th process has under `seq`.
fn payload_of(life: u8, seq: u64) -> Vec<u8> {
    vec![life, seq as u8]
}

fn live_of(life: u8, seq: u64) -> Input {
    Input::Live { seq: SeqNo(seq), payload: Payload::Readable(payload_of(life, seq)) }
}

fn reply_of(life: u8, seq: u64) -> Input {
    Input::Reply { seq: SeqNo(seq), payload: Payload::Readable(payload_of(life, seq)) }
}

fn apply_of(life: u8, seq: u64, via: Via) -> Action {
    Action::Apply { seq: SeqNo(seq), payload: payload_of(life, seq), via }
}

fn live(seq: u64) -> Input {
    live_of(0, seq)
}

fn reply(seq: u64) -> Input {
    reply_of(0, seq)
}

fn apply(seq: u64, via: Via) -> Action {
    apply_of(0, seq, via)
}

fn overlap(seq: u64) -> Overlap {
    Overlap { seq: SeqNo(seq), digest: PayloadDigest::of(&payload_of(0, seq)) }
}

fn damaged(seq: u64) -> Payload {
    Payload::Unreadable(PayloadDigest(u128::from(seq)))
}

/// A request that has to prove the process.
fn ask(from: u64) -> Action {
    Action::RequestReplay { from: SeqNo(from), within: ZERO }
}

/// A request for the whole buffer.
const ASK_ALL: Action = Action::RequestReplay { from: SeqNo(0), within: SPREAD };

fn gap(expected: u64, received: u64) -> Action {
    Action::Report(Incident::Gap { expected: SeqNo(expected), received: SeqNo(received) })
}

const FIRST: Action = Action::StartGeneration(Cause::First);
const RESTARTED: Action = Action::StartGeneration(Cause::Restarted);
const UNPROVED: Action = Action::StartGeneration(Cause::Unproved);
const LOST: Action = Action::StartGeneration(Cause::BatchesLost);

/// Feeds one input; a request is sent at once.
fn feed(continuity: &mut Continuity, now: Duration, input: Input) -> Vec<Action> {
    let actions = continuity.step(now, input);
    if actions.iter().any(|action| matches!(action, Action::RequestReplay { .. })) {
        assert_eq!(continuity.step(now, Input::ReplayStarted), []);
    }
    actions
}

/// Feeds `inputs` at one moment and returns everything that was answered.
fn run(continuity: &mut Continuity, inputs: impl IntoIterator<Item = Input>) -> Vec<Action> {
    inputs.into_iter().flat_map(|input| feed(continuity, ZERO, input)).collect()
}

/// Live, with `n_batches` applied.
fn live_after(n_batches: u64) -> Continuity {
    let mut continuity = Continuity::new(true);
    run(&mut continuity, [Input::Connected]);
    run(&mut continuity, (0..n_batches).map(reply));
    run(&mut continuity, [Input::ReplayEnd, reply(n_batches - 1), Input::ReplayEnd]);
    assert_eq!(continuity.phase(), Phase::Live);
    continuity
}

/// Lets one round after the other pass in silence for two minutes.
fn starve(continuity: &mut Continuity) -> Vec<Action> {
    (1..50).flat_map(|second| feed(continuity, Duration::from_secs(second), Input::Tick)).collect()
}

/// Replies of the buffer from `from` on, then END.
fn buffer(life: u8, from: u64, to: u64) -> impl Iterator<Item = Input> {
    (from..to).map(move |seq| reply_of(life, seq)).chain([Input::ReplayEnd])
}

#[test]
fn first_connection_starts_a_generation_and_asks_for_the_whole_buffer() {
    let mut continuity = Continuity::new(true);
    assert_eq!(continuity.phase(), Phase::Connecting);
    assert_eq!(run(&mut continuity, [Input::Connected]), [FIRST, ASK_ALL]);
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
    assert_eq!(run(&mut continuity, [Input::ReplayEnd]), [ask(1)]);
    assert_eq!(run(&mut continuity, [reply(1), Input::ReplayEnd]), [Action::CloseReplay]);
    assert_eq!(run(&mut continuity, [live(2)]), [apply(2, Via::Live)]);
}

#[test]
fn publisher_that_published_nothing_is_expected_to_begin_at_0() {
    let mut continuity = Continuity::new(true);
    run(&mut continuity, [Input::Connected, Input::ReplayEnd]);
    assert_eq!(continuity.phase(), Phase::Live);
    assert_eq!(run(&mut continuity, [live(1)]), [gap(0, 1), ASK_ALL]);
    run(&mut continuity, [reply(1)]);
    assert_eq!(continuity.phase(), Phase::Incomplete, "batch 0 is unknown");
}

#[test]
fn hole_in_a_replay_is_asked_for_from_the_last_known_batch() {
    let mut continuity = Continuity::new(true);
    run(&mut continuity, [Input::Connected, reply(0), reply(1)]);
    assert_eq!(run(&mut continuity, [reply(5)]), [ask(1)]);
    assert_eq!(run(&mut continuity, [reply(1), reply(2)]), [apply(2, Via::Replay)]);
}

#[test]
fn silence_after_progress_asks_again_at_once() {
    let mut continuity = Continuity::new(true);
    run(&mut continuity, [Input::Connected, reply(0)]);
    assert_eq!(continuity.step(Duration::from_millis(499), Input::Tick), []);
    assert_eq!(continuity.step(Duration::from_millis(500), Input::Tick), [ask(0)]);
}

#[test]
fn time_of_a_round_begins_when_its_request_is_sent() {
    let mut continuity = Continuity::new(true);
    continuity.step(ZERO, Input::Connected);
    assert_eq!(continuity.step(Duration::from_secs(60), Input::Tick), []);
    continuity.step(Duration::from_secs(60), Input::ReplayStarted);
    assert_eq!(continuity.step(Duration::from_secs(60), reply(0)), [apply(0, Via::Replay)]);
}

#[test]
fn request_that_is_never_sent_ends_in_following_the_live_stream() {
    let mut continuity = Continuity::new(true);
    continuity.step(ZERO, Input::Connected);
    continuity.step(ZERO, live(7));
    assert_eq!(continuity.step(MAX_CATCH_UP, Input::Tick), []);
    let actions = continuity.step(MAX_WAIT, Input::Tick);
    assert_eq!(actions, [Action::Report(Incident::ReplayGaveUp), Action::CloseReplay, apply(7, Via::Live)]);
}

#[test]
fn buffer_that_begins_late_makes_the_source_incomplete() {
    let mut continuity = Continuity::new(true);
    assert_eq!(run(&mut continuity, [Input::Connected, reply(7)]), [FIRST, ASK_ALL, apply(7, Via::Replay)]);
    run(&mut continuity, [Input::ReplayEnd, reply(7), Input::ReplayEnd]);
    assert_eq!(continuity.phase(), Phase::Incomplete);
}

#[test]
fn gap_is_filled_once_the_process_is_proved() {
    let mut continuity = live_after(3);
    assert_eq!(run(&mut continuity, [live(5)]), [gap(3, 5), ask(2)]);
    assert_eq!(
        run(&mut continuity, [live(6), reply(2), reply(3), reply(4)]),
        [apply(3, Via::Replay), apply(4, Via::Replay), Action::CloseReplay, apply(5, Via::Live), apply(6, Via::Live)]
    );
    assert_eq!(continuity.phase(), Phase::Live);
}

#[test]
fn gap_that_hides_a_restart_retires_what_was_known() {
    let mut continuity = live_after(3);
    run(&mut continuity, [live_of(1, 5)]);
    assert_eq!(run(&mut continuity, [reply_of(1, 2)]), [UNPROVED, ASK_ALL]);
    let actions = run(&mut continuity, buffer(1, 0, 6));
    assert_eq!(actions[..6], (0..6).map(|seq| apply_of(1, seq, Via::Replay)).collect::<Vec<_>>());
}

#[test]
fn gap_among_held_batches_is_caught_up_too() {
    let mut continuity = live_after(1);
    run(&mut continuity, [live(2), live(4)]);
    assert_eq!(
        run(&mut continuity, [reply(0), reply(1)]),
        [apply(1, Via::Replay), Action::CloseReplay, apply(2, Via::Live), gap(3, 4), ask(2)]
    );
}

#[test]
fn buffer_that_has_moved_on_starts_a_generation_where_it_begins() {
    let mut continuity = live_after(3);
    run(&mut continuity, [live(20)]);
    assert_eq!(run(&mut continuity, [reply(10)]), [Action::CloseReplay]);
    assert_eq!(feed(&mut continuity, Duration::from_secs(1), Input::Tick), [ask(2)]);
    assert_eq!(feed(&mut continuity, Duration::from_secs(1), reply(10)), [UNPROVED, ASK_ALL]);
    assert_eq!(feed(&mut continuity, Duration::from_secs(1), reply(10)), [apply(10, Via::Replay)]);
    assert_eq!(continuity.phase(), Phase::CatchingUp);
}

#[test]
fn repeated_live_batch_is_dropped_and_another_under_its_number_is_a_restart() {
    let mut continuity = live_after(3);
    assert_eq!(run(&mut continuity, [live(3), live(4), live(3), live(4)]), [apply(3, Via::Live), apply(4, Via::Live)]);
    assert_eq!(run(&mut continuity, [live_of(1, 4)]), [RESTARTED, ASK_ALL]);
    let mut continuity = live_after(3);
    run(&mut continuity, [live(3), live(4)]);
    assert_eq!(
        run(&mut continuity, [live_of(1, 0), reply_of(1, 0)]),
        [RESTARTED, ASK_ALL, apply_of(1, 0, Via::Replay), Action::CloseReplay]
    );
}

#[test]
fn restart_while_catching_up_drops_what_was_held() {
    let mut continuity = Continuity::new(true);
    run(&mut continuity, [Input::Connected, live(8), live(9)]);
    assert_eq!(run(&mut continuity, [live_of(1, 0)]), [RESTARTED, ASK_ALL]);
    assert_eq!(
        run(&mut continuity, [live_of(1, 1), reply_of(1, 0)]),
        [apply_of(1, 0, Via::Replay), Action::CloseReplay, apply_of(1, 1, Via::Live)]
    );
}

#[test]
fn live_copies_of_replayed_batches_are_dropped() {
    let mut continuity = live_after(3);
    assert_eq!(run(&mut continuity, [live(1), live(2), live(3)]), [apply(3, Via::Live)]);
}

#[test]
fn reconnection_keeps_what_the_process_proves() {
    let mut continuity = live_after(3);
    assert_eq!(run(&mut continuity, [Input::Disconnected]), [Action::CloseReplay]);
    assert_eq!(continuity.phase(), Phase::Stale);
    assert_eq!(run(&mut continuity, [live(3), reply(3)]), [], "of the former connection");
    assert_eq!(run(&mut continuity, [Input::Connected]), [ask(2)]);
    assert_eq!(continuity.phase(), Phase::Stale);
    assert_eq!(run(&mut continuity, [live(3)]), [], "not proved yet");
    assert_eq!(run(&mut continuity, [reply(2)]), [Action::CloseReplay, apply(3, Via::Live)]);
    assert_eq!(continuity.phase(), Phase::Live);
}

#[test]
fn reconnection_to_another_process_retires_everything_even_if_numbers_went_on() {
    let mut continuity = live_after(3);
    run(&mut continuity, [Input::Disconnected, Input::Connected, live_of(1, 9)]);
    assert_eq!(run(&mut continuity, [reply_of(1, 2)]), [UNPROVED, ASK_ALL]);
    let actions = run(&mut continuity, buffer(1, 0, 9));
    assert_eq!(actions[8..], [apply_of(1, 8, Via::Replay), Action::CloseReplay, apply_of(1, 9, Via::Live)]);
}

#[test]
fn reconnection_to_an_empty_process_retires_everything() {
    let mut continuity = live_after(3);
    run(&mut continuity, [Input::Disconnected, Input::Connected]);
    assert_eq!(run(&mut continuity, [Input::ReplayEnd]), [Action::CloseReplay]);
    let second = Duration::from_secs(1);
    assert_eq!(feed(&mut continuity, second, Input::Tick), [ask(2)]);
    assert_eq!(feed(&mut continuity, second, Input::ReplayEnd), [UNPROVED, ASK_ALL]);
}

#[test]
fn knowledge_of_a_broken_connection_expires() {
    let mut continuity = live_after(3);
    run(&mut continuity, [Input::Disconnected]);
    assert_eq!(continuity.step(DISCONNECTED_GRACE - Duration::from_millis(1), Input::Tick), []);
    assert_eq!(continuity.step(DISCONNECTED_GRACE, Input::Tick), [Action::EndGeneration]);
    assert_eq!(continuity.phase(), Phase::Connecting);
    assert_eq!(continuity.step(2 * DISCONNECTED_GRACE, Input::Tick), []);
}

#[test]
fn connections_that_prove_nothing_do_not_prolong_the_credit() {
    let mut continuity = live_after(3);
    let mut n_retired = 0;
    for turn in 0..20 {
        let now = Duration::from_secs(turn * 15);
        continuity.step(now, Input::Connected);
        for second in 0..10 {
            let actions = continuity.step(now + Duration::from_secs(second), Input::Tick);
            n_retired += actions.iter().filter(|action| **action == UNPROVED).count();
        }
        continuity.step(now + Duration::from_secs(10), Input::Disconnected);
        let actions = continuity.step(now + Duration::from_secs(12), Input::Tick);
        n_retired += actions.iter().filter(|action| **action == Action::EndGeneration).count();
        if turn == 5 {
            assert_eq!(n_retired, 1, "after {now:?}");
            return;
        }
    }
}

#[test]
fn batches_far_behind_what_is_known_are_doubted_once() {
    let mut continuity = Continuity::new(true);
    run(&mut continuity, [Input::Connected]);
    run(&mut continuity, (0..100).map(reply));
    run(&mut continuity, [Input::ReplayEnd, reply(99), Input::ReplayEnd]);
    assert_eq!(run(&mut continuity, [live_of(1, 0)]), [ask(99)]);
    assert_eq!(continuity.phase(), Phase::Stale);
    run(&mut continuity, [reply(99), Input::ReplayEnd]);
    assert_eq!(continuity.phase(), Phase::Live);
    assert_eq!(run(&mut continuity, [live_of(1, 1)]), [], "proved once on this connection");
}

#[test]
fn suspicion_goes_before_a_snapshot() {
    let mut continuity = Continuity::new(true);
    run(&mut continuity, [Input::Connected]);
    run(&mut continuity, buffer(0, 5, 9));
    run(&mut continuity, buffer(0, 8, 9));
    run(&mut continuity, [Input::Offer { overlap: overlap(6), complete: true }]);
    assert_eq!(run(&mut continuity, [Input::Suspect]), [ask(8)]);
    assert_eq!(run(&mut continuity, [reply_of(1, 8)]), [UNPROVED, ASK_ALL]);
}

#[test]
fn incomplete_snapshot_is_no_better_than_a_buffer_that_has_not_overflowed() {
    let mut continuity = Continuity::new(true);
    run(&mut continuity, [Input::Offer { overlap: overlap(7), complete: false }]);
    assert_eq!(run(&mut continuity, [Input::Connected]), [FIRST, ASK_ALL]);
    let mut continuity = Continuity::new(true);
    run(&mut continuity, [Input::Offer { overlap: overlap(10_000), complete: false }]);
    assert_eq!(run(&mut continuity, [Input::Connected]), [ask(10_000)]);
}

#[test]
fn dead_replay_endpoint_ends_in_following_the_live_stream() {
    let mut continuity = Continuity::new(true);
    run(&mut continuity, [Input::Connected, live(5), live(6)]);
    let actions = starve(&mut continuity);
    assert_eq!(actions.iter().filter(|action| **action == ASK_ALL).count(), MAX_STALLED_ROUNDS as usize);
    assert_eq!(
        actions[actions.len() - 4..],
        [Action::Report(Incident::ReplayGaveUp), Action::CloseReplay, apply(5, Via::Live), apply(6, Via::Live)]
    );
    assert_eq!(continuity.phase(), Phase::Incomplete);
    assert_eq!(continuity.step(10 * PROBE_AFTER, Input::Tick), [], "not asked in silence");
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
    let large = |seq| {
        let payload = vec![seq as u8; MAX_HELD_BYTES / 2 + 1];
        Input::Live { seq: SeqNo(seq), payload: Payload::Readable(payload) }
    };
    assert_eq!(run(&mut continuity, [large(1), large(2)]), [Action::Report(Incident::HeldOverflow)]);
    run(&mut continuity, [reply(0), reply(1), live(3)]);
    assert_eq!(continuity.phase(), Phase::CatchingUp);
    assert_eq!(run(&mut continuity, [reply(2)]), [apply(2, Via::Replay), Action::CloseReplay, apply(3, Via::Live)]);
}

#[test]
fn silence_is_probed_and_changes_nothing_if_nothing_was_missed() {
    let mut continuity = live_after(3);
    assert_eq!(continuity.step(PROBE_AFTER, Input::Tick), [ask(2)]);
    continuity.step(PROBE_AFTER, Input::ReplayStarted);
    assert_eq!(continuity.phase(), Phase::Live);
    continuity.step(PROBE_AFTER, reply(2));
    assert_eq!(continuity.step(PROBE_AFTER, Input::ReplayEnd), [Action::CloseReplay]);
    assert_eq!(continuity.step(PROBE_AFTER, Input::Tick), []);
}

#[test]
fn end_that_is_always_lost_costs_nothing() {
    let mut continuity = Continuity::new(true);
    run(&mut continuity, [Input::Connected]);
    run(&mut continuity, (0..3).map(reply));
    let mut answered = |second| {
        let now = Duration::from_secs(second);
        let mut actions = feed(&mut continuity, now, Input::Tick);
        actions.extend(continuity.step(now, reply(2)));
        (continuity.phase(), actions)
    };
    let phases: Vec<Phase> = (1..40).map(|second| answered(second).0).collect();
    assert_eq!(phases.last(), Some(&Phase::Live));
    let probed: Vec<(Phase, Vec<Action>)> = (40..130).map(answered).collect();
    assert!(probed.iter().all(|(phase, _)| *phase == Phase::Live));
    assert!(probed.iter().any(|(_, actions)| actions.contains(&ask(2))));
    assert!(!probed.iter().any(|(_, actions)| actions.contains(&Action::Reconnect)));
}

#[test]
fn deaf_connection_is_made_anew_and_nothing_is_lost() {
    let mut continuity = live_after(3);
    feed(&mut continuity, PROBE_AFTER, Input::Tick);
    continuity.step(PROBE_AFTER, reply(2));
    assert_eq!(continuity.step(PROBE_AFTER, reply(3)), [apply(3, Via::Replay)]);
    assert_eq!(feed(&mut continuity, PROBE_AFTER, Input::ReplayEnd), [ask(3)]);
    continuity.step(PROBE_AFTER, reply(3));
    let actions = continuity.step(PROBE_AFTER, Input::ReplayEnd);
    assert_eq!(actions, [Action::CloseReplay, Action::Report(Incident::Deaf), Action::Reconnect]);
    assert_eq!(continuity.step(PROBE_AFTER, Input::Connected), [ask(3)]);
}

#[test]
fn publisher_that_answers_no_probe_is_connected_anew() {
    let mut continuity = live_after(3);
    let actions: Vec<Action> =
        (60..110).flat_map(|second| feed(&mut continuity, Duration::from_secs(second), Input::Tick)).collect();
    assert_eq!(
        actions[actions.len() - 3..],
        [Action::Report(Incident::ReplayGaveUp), Action::CloseReplay, Action::Reconnect]
    );
    assert_eq!(continuity.phase(), Phase::Stale);
}

#[test]
fn suspicion_is_settled_by_the_replay() {
    let mut continuity = live_after(3);
    assert_eq!(run(&mut continuity, [Input::Suspect]), [ask(2)]);
    assert_eq!(continuity.phase(), Phase::Stale);
    assert_eq!(run(&mut continuity, [reply(2), Input::ReplayEnd]), [Action::CloseReplay]);
    assert_eq!(continuity.phase(), Phase::Live);
    run(&mut continuity, [Input::Suspect]);
    assert_eq!(run(&mut continuity, [reply_of(1, 2)]), [UNPROVED, ASK_ALL]);
}

#[test]
fn damaged_live_batch_is_fetched_by_replay() {
    let mut continuity = live_after(3);
    let actions = run(&mut continuity, [Input::Live { seq: SeqNo(3), payload: damaged(3) }]);
    assert_eq!(actions, [gap(3, 3), ask(2)]);
    assert_eq!(run(&mut continuity, [reply(2), reply(3)]), [apply(3, Via::Replay)]);
}

#[test]
fn batch_that_nobody_can_read_costs_what_was_known() {
    let mut continuity = live_after(3);
    run(&mut continuity, [Input::Live { seq: SeqNo(3), payload: damaged(3) }, reply(2)]);
    let lost = Action::Report(Incident::UnreadableBatch { seq: SeqNo(3) });
    assert_eq!(run(&mut continuity, [Input::Reply { seq: SeqNo(3), payload: damaged(3) }]), [lost, LOST]);
    assert_eq!(run(&mut continuity, [reply(4)]), [apply(4, Via::Replay)]);
    run(&mut continuity, [Input::ReplayEnd, reply(4), Input::ReplayEnd]);
    assert_eq!(continuity.phase(), Phase::Incomplete);
}

#[test]
fn source_of_garbage_is_left_alone_for_a_while() {
    let mut continuity = Continuity::new(false);
    run(&mut continuity, [Input::Connected, live(0)]);
    let garbage = (1..100).map(|seq| Input::Live { seq: SeqNo(seq), payload: damaged(seq) });
    let actions = run(&mut continuity, garbage);
    let quarantined = Action::Report(Incident::Quarantined(Duration::from_secs(5)));
    assert_eq!(actions[actions.len() - 3..], [Action::CloseReplay, Action::EndGeneration, quarantined]);
    assert_eq!(continuity.phase(), Phase::Quarantined);
    assert_eq!(run(&mut continuity, [live(200), Input::Disconnected, Input::Connected, Input::Tick]), []);
    assert_eq!(continuity.step(Duration::from_secs(5), Input::Tick), []);
    assert_eq!(continuity.phase(), Phase::Connecting);
    assert_eq!(continuity.step(Duration::from_secs(5), Input::Connected), [FIRST]);
}

#[test]
fn numbers_that_never_rise_end_in_quarantine() {
    let mut continuity = Continuity::new(true);
    run(&mut continuity, [Input::Connected, Input::ReplayEnd]);
    let actions = run(&mut continuity, (0..100).map(|life| live_of(life, 0)));
    assert_eq!(continuity.phase(), Phase::Quarantined);
    let n_asked = actions.iter().filter(|action| matches!(action, Action::RequestReplay { .. })).count();
    assert!(n_asked < 10, "{n_asked} replays asked for");
}

#[test]
fn snapshot_is_restored_at_its_number_and_followed_from_there() {
    let mut continuity = Continuity::new(true);
    run(&mut continuity, [Input::Offer { overlap: overlap(7), complete: true }]);
    assert_eq!(run(&mut continuity, [Input::Connected]), [ask(7)]);
    assert_eq!(run(&mut continuity, [live(9), reply(7)]), [Action::Restore]);
    assert_eq!(run(&mut continuity, [reply(8)]), [apply(8, Via::Replay), Action::CloseReplay, apply(9, Via::Live)]);
    assert_eq!(continuity.phase(), Phase::Live);
}

#[test]
fn snapshot_of_another_process_is_dropped() {
    let mut continuity = Continuity::new(true);
    run(&mut continuity, [Input::Offer { overlap: overlap(7), complete: true }, Input::Connected]);
    assert_eq!(run(&mut continuity, [reply_of(1, 7)]), [Action::DropOffer, FIRST, ASK_ALL]);
}

#[test]
fn incomplete_source_takes_the_snapshot_of_one_who_knew_more() {
    let mut continuity = Continuity::new(true);
    run(&mut continuity, [Input::Connected]);
    run(&mut continuity, buffer(0, 5, 9));
    run(&mut continuity, buffer(0, 8, 9));
    assert_eq!(continuity.phase(), Phase::Incomplete);
    let partial = Input::Offer { overlap: overlap(8), complete: false };
    assert_eq!(run(&mut continuity, [partial]), [Action::DropOffer]);

    assert_eq!(run(&mut continuity, [Input::Offer { overlap: overlap(6), complete: true }]), [ask(6)]);
    assert_eq!(continuity.phase(), Phase::Incomplete, "goes on as before meanwhile");
    let actions = run(&mut continuity, [reply(6), reply(7), reply(8), live(9)]);
    assert_eq!(actions[0], Action::Restore);
    assert_eq!(actions[1..3], [apply(7, Via::Replay), apply(8, Via::Replay)]);
    assert_eq!(actions.last(), Some(&apply(9, Via::Live)));
    assert_eq!(continuity.phase(), Phase::Live);
}

#[test]
fn engine_that_dropped_its_cache_is_known_whole() {
    let mut continuity = Continuity::new(true);
    run(&mut continuity, [Input::Connected]);
    run(&mut continuity, buffer(0, 5, 9));
    run(&mut continuity, buffer(0, 8, 9));
    assert_eq!(continuity.phase(), Phase::Incomplete);
    assert_eq!(run(&mut continuity, [live(9), Input::Cleared]), [apply(9, Via::Live)]);
    assert_eq!(continuity.phase(), Phase::Live);
}

#[test]
fn refused_snapshot_leaves_an_incomplete_source_as_it_was() {
    let mut continuity = Continuity::new(true);
    run(&mut continuity, [Input::Connected]);
    run(&mut continuity, buffer(0, 5, 9));
    run(&mut continuity, buffer(0, 8, 9));
    run(&mut continuity, [Input::Offer { overlap: overlap(6), complete: true }, live(9)]);
    assert_eq!(run(&mut continuity, [reply_of(1, 6)]), [Action::DropOffer, Action::CloseReplay, apply(9, Via::Live)]);
    assert_eq!(continuity.phase(), Phase::Incomplete);
}

#[test]
fn without_replay_endpoint_the_first_batch_decides_completeness() {
    for (first, phase) in [(0, Phase::Live), (4, Phase::Incomplete)] {
        let mut continuity = Continuity::new(false);
        assert_eq!(run(&mut continuity, [Input::Connected, live(first)]), [FIRST, apply(first, Via::Live)]);
        assert_eq!(continuity.phase(), phase);
    }
}

#[test]
fn without_replay_endpoint_gaps_and_reconnections_start_a_generation() {
    let mut continuity = Continuity::new(false);
    run(&mut continuity, [Input::Connected, live(0)]);
    assert_eq!(run(&mut continuity, [live(2)]), [gap(1, 2), LOST, apply(2, Via::Live)]);
    assert_eq!(continuity.phase(), Phase::Incomplete);
    assert_eq!(run(&mut continuity, [live_of(1, 0)]), [RESTARTED, apply_of(1, 0, Via::Live)]);
    assert_eq!(continuity.phase(), Phase::Live);
    let actions = run(&mut continuity, [Input::Disconnected, Input::Connected, live_of(1, 1)]);
    assert_eq!(actions, [Action::CloseReplay, UNPROVED, apply_of(1, 1, Via::Live)]);
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
                Action::RequestReplay { from, .. } => {
                    self.request = Some(from.0);
                    self.continuity.step(self.now, Input::ReplayStarted);
                }
                Action::CloseReplay => self.request = None,
                Action::Apply { seq, .. } => self.generations.last_mut().expect("started").push(seq.0),
                Action::Reconnect => unreachable!("nothing here is silent for long enough"),
                Action::EndGeneration | Action::Report(_) | Action::Restore | Action::DropOffer => {}
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
        for _ in 0..300 {
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
