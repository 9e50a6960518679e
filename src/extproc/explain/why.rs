//! Why the first of the candidates was picked and not the second, in a sentence.

use crate::routing::pick::{MOST_AHEAD, Standing};

/// The first term that decides between the pick and the runner-up; then who holds more and is too busy to count.
pub(super) fn why(standings: &[Standing]) -> String {
    let (first, second) = match standings {
        [] => return String::new(),
        [_] => return "it was the only candidate".to_owned(),
        [first, second, ..] => (first, second),
    };
    let is_discounted = |it: &&Standing| it.is_too_far_ahead && holdings(it) > holdings(first);
    let warmest = standings.iter().filter(is_discounted).max_by_key(|it| holdings(it));
    let reason =
        if is_discounted(&second) { discounted("the runner-up", second) } else { first_difference(first, second) };
    match warmest {
        Some(warmest) if warmest.endpoint != second.endpoint => {
            format!("{reason}; {}", discounted(&warmest.endpoint.to_string(), warmest))
        }
        _ => reason,
    }
}

/// What counts of a candidate that is not too busy, as far as it holds something.
fn holdings(standing: &Standing) -> (u32, u32) {
    (standing.matched_tokens, standing.offloaded_tokens)
}

fn discounted(who: &str, standing: &Standing) -> String {
    let Standing { in_flight, matched_tokens, offloaded_tokens, promised_tokens, .. } = *standing;
    let holds = if promised_tokens > 0 { "holds or was promised" } else { "holds" };
    let what = match (matched_tokens, offloaded_tokens) {
        (matched, 0) => format!("{matched} tokens that it {holds}"),
        (0, offloaded) => format!("{offloaded} tokens that it holds in other tiers"),
        (matched, offloaded) => format!("{matched} tokens that it {holds} and {offloaded} more in other tiers"),
    };
    format!(
        "{who} has {in_flight} requests in flight, more than {MOST_AHEAD} beyond the least loaded, so that the {what} do \
         not count"
    )
}

fn first_difference(first: &Standing, second: &Standing) -> String {
    let terms = |it: &Standing| (it.matched_tokens, it.offloaded_tokens, it.in_flight);
    let or_promised = |is_promised: bool| if is_promised { " or was promised" } else { "" };
    let (is_first, is_second) = (first.promised_tokens > 0, second.promised_tokens > 0);
    let both_hold = if is_first || is_second { "both hold or were promised" } else { "both hold" };
    match (terms(first), terms(second)) {
        ((a, ..), (b, ..)) if a != b && is_first == is_second => {
            format!("it holds{} {a} tokens of the prompt, the runner-up {b}", or_promised(is_first))
        }
        ((a, ..), (b, ..)) if a != b => format!(
            "it holds{} {a} tokens of the prompt, the runner-up holds{} {b}",
            or_promised(is_first),
            or_promised(is_second)
        ),
        ((_, a, _), (_, b, _)) if a != b => {
            format!("{both_hold} as much on their GPUs; in other tiers it holds {a} tokens more, the runner-up {b}")
        }
        ((held, _, a), (.., b)) if a != b => {
            format!("{both_hold} {held} tokens of the prompt; it has {a} requests in flight, the runner-up {b}")
        }
        ((held, _, n), _) => {
            format!("{both_hold} {held} tokens of the prompt and have {n} requests in flight; chance decided")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn standing(port: u16, matched_tokens: u32, offloaded_tokens: u32, in_flight: u32) -> Standing {
        Standing {
            endpoint: ([127, 0, 0, 1], port).into(),
            matched_tokens,
            offloaded_tokens,
            promised_tokens: 0,
            rank: None,
            in_flight,
            is_too_far_ahead: in_flight > 16,
        }
    }

    fn promised(standing: Standing) -> Standing {
        Standing { promised_tokens: standing.matched_tokens, ..standing }
    }

    const TOO_BUSY: &str = "has 17 requests in flight, more than 16 beyond the least loaded, so that the";

    #[test]
    fn the_first_term_that_differs_is_why() {
        let first = standing(1, 64, 16, 0);
        for (first, second, expected) in [
            (first, standing(2, 32, 0, 0), "it holds 64 tokens of the prompt, the runner-up 32".to_owned()),
            (
                first,
                standing(2, 64, 8, 0),
                "both hold as much on their GPUs; in other tiers it holds 16 tokens more, the runner-up 8".to_owned(),
            ),
            (
                first,
                standing(2, 64, 16, 3),
                "both hold 64 tokens of the prompt; it has 0 requests in flight, the runner-up 3".to_owned(),
            ),
            (
                first,
                standing(2, 64, 16, 0),
                "both hold 64 tokens of the prompt and have 0 requests in flight; chance decided".to_owned(),
            ),
            (first, standing(2, 640, 0, 17), format!("the runner-up {TOO_BUSY} 640 tokens that it holds do not count")),
            (
                first,
                standing(2, 64, 32, 17),
                format!("the runner-up {TOO_BUSY} 64 tokens that it holds and 32 more in other tiers do not count"),
            ),
            (
                standing(1, 0, 0, 0),
                standing(2, 0, 32, 17),
                format!("the runner-up {TOO_BUSY} 32 tokens that it holds in other tiers do not count"),
            ),
            (first, standing(2, 32, 64, 17), "it holds 64 tokens of the prompt, the runner-up 32".to_owned()),
            (
                first,
                standing(2, 64, 16, 17),
                "both hold 64 tokens of the prompt; it has 0 requests in flight, the runner-up 17".to_owned(),
            ),
        ] {
            assert_eq!(why(&[first, second]), expected);
        }
        assert_eq!((why(&[first]).as_str(), why(&[]).as_str()), ("it was the only candidate", ""));
    }

    #[test]
    fn the_warmest_of_those_that_do_not_count_is_told() {
        let (first, second) = (standing(1, 64, 0, 0), standing(2, 32, 0, 0));
        let reason = "it holds 64 tokens of the prompt, the runner-up 32";
        let [colder, warmer, warmest] = [(3, 64), (4, 96), (5, 640)].map(|(port, held)| standing(port, held, 0, 17));
        for (others, expected) in [
            (&[second, colder][..], reason.to_owned()),
            (
                &[second, warmest, warmer],
                format!("{reason}; 127.0.0.1:5 {TOO_BUSY} 640 tokens that it holds do not count"),
            ),
            (&[warmest, warmer], format!("the runner-up {TOO_BUSY} 640 tokens that it holds do not count")),
            (
                &[warmer, warmest],
                format!(
                    "the runner-up {TOO_BUSY} 96 tokens that it holds do not count; 127.0.0.1:5 {TOO_BUSY} 640 tokens that \
                     it holds do not count"
                ),
            ),
        ] {
            assert_eq!(why(&[&[first], others].concat()), expected);
        }
    }

    #[test]
    fn what_is_only_promised_is_not_said_to_be_held() {
        let (first, second) = (standing(1, 64, 0, 0), standing(2, 32, 0, 0));
        for (first, second, expected) in [
            (promised(first), second, "it holds or was promised 64 tokens of the prompt, the runner-up holds 32"),
            (first, promised(second), "it holds 64 tokens of the prompt, the runner-up holds or was promised 32"),
            (promised(first), promised(second), "it holds or was promised 64 tokens of the prompt, the runner-up 32"),
            (first, promised(standing(2, 64, 0, 0)), "both hold or were promised 64 tokens of the prompt and have 0"),
            (first, promised(standing(2, 96, 0, 17)), "96 tokens that it holds or was promised do not count"),
        ] {
            let found = why(&[first, second]);
            assert!(found.contains(expected), "{expected}\nis not in\n{found}");
        }
    }
}
