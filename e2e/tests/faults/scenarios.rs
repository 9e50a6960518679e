//! The router lives through every scenario. Those that take long run with `--ignored`.

use std::io::Write as _;
use std::time::Duration;

use e2e::faults::{Outcome, SCENARIOS, Scenario, Setting};

use crate::publisher::binary;

/// How long the thousand sources flap here; `cargo e2e faults crowd --flap-seconds` takes any length.
const FLAP: Duration = Duration::from_secs(60);

fn run(name: &str) {
    let scenario = Scenario::by_name(name).unwrap();
    match scenario.run(&Setting::new(binary(), FLAP)) {
        Ok(Outcome::Held(figures)) => println!("{name}: {figures:?}"),
        Ok(Outcome::Tokenized(figures)) => println!("{name}: {figures}"),
        // Not `eprintln!`, which the test harness swallows.
        Ok(Outcome::Skipped(reason)) => drop(writeln!(std::io::stderr(), "SKIPPED {name}: {reason}")),
        Err(error) => panic!("{error:#}"),
    }
}

macro_rules! scenarios {
    ($($(#[$attribute:meta])* $test:ident: $name:literal,)*) => {
        $(
            $(#[$attribute])*
            #[test]
            fn $test() {
                run($name);
            }
        )*

        #[test]
        fn every_scenario_has_a_test() {
            let names: Vec<&str> = SCENARIOS.iter().map(|scenario| scenario.name).collect();
            assert_eq!(names, [$($name),*]);
        }
    };
}

scenarios! {
    killed_and_restarted_publisher_is_credited_with_its_new_blocks_alone: "restart",
    restart_that_overtakes_the_old_numbers_is_noticed: "overtaken",
    address_of_another_model_gets_no_credit: "reused",
    #[ignore = "waits for heartbeats, 20 s"]
    half_open_connection_is_noticed_and_its_successor_believed: "half-open",
    #[ignore = "waits for heartbeats, 20 s; needs root"]
    half_open_connection_in_a_network_namespace_is_noticed: "half-open-netns",
    stalled_connection_loses_nothing: "stalled",
    #[ignore = "waits for heartbeats, 20 s"]
    deaf_connection_is_made_again: "deaf",
    lost_messages_are_replayed: "loss",
    repeated_messages_are_applied_once: "duplicates",
    cut_replays_converge: "truncated",
    lost_end_markers_cost_only_time: "end-lost",
    overrun_buffer_makes_the_source_incomplete: "overrun",
    what_the_publisher_drops_while_we_are_stopped_is_replayed: "hwm",
    #[ignore = "20 restarts, 10 s"]
    flapping_publisher_leaves_nothing_behind: "flapping",
    herd_is_let_in_a_few_at_a_time: "herd",
    #[ignore = "flaps for a minute"]
    flapping_crowd_costs_no_memory: "crowd",
    #[ignore = "hundreds of probes beside a load"]
    garbage_is_left_alone_and_its_neighbours_do_not_notice: "garbage",
    #[ignore = "a load of 110 s through Envoy, twice at the same time"]
    router_restart_under_load_keeps_the_hit_ratio: "router-restart",
    #[ignore = "a load of 100 s through Envoy, twice at the same time"]
    overrun_heals_under_load: "router-overrun",
    #[ignore = "a load of half a minute through Envoy, as all of these"]
    nobody_waits_for_slow_tokenizers: "tokenizer-slow",
    failing_tokenizers_cost_nothing_but_hits: "tokenizer-errors",
    #[ignore = "see the first"]
    nobody_waits_for_tokenizers_that_never_answer: "tokenizer-black-hole",
    #[ignore = "see the first"]
    cut_answers_of_tokenizers_cost_nothing_but_hits: "tokenizer-cut",
    #[ignore = "see the first"]
    nonsense_of_tokenizers_costs_nothing_but_hits: "tokenizer-nonsense",
    #[ignore = "see the first"]
    the_other_half_is_asked_when_half_of_the_tokenizers_are_dead: "tokenizer-half",
    #[ignore = "see the first"]
    saturated_tokenizers_hold_nobody_up: "tokenizer-saturated",
    #[ignore = "see the first"]
    foreign_ids_of_one_engine_cost_nothing_but_hits: "tokenizer-foreign-engine",
    #[ignore = "see the first"]
    foreign_ids_of_the_only_tokenizer_cost_nothing_but_hits: "tokenizer-foreign-endpoint",
    #[ignore = "see the first"]
    nobody_waits_for_a_stopped_tokenizer: "tokenizer-stopped",
    #[ignore = "see the first"]
    nobody_waits_for_a_tokenizer_that_is_gone: "tokenizer-gone",
}
