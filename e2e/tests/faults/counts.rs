//! Without faults: nothing is lost, and the lag can be measured.

use e2e::audit::{self, AuditArgs};
use e2e::lag::{self, LagArgs};

use crate::publisher::binary;

fn audit(args: &AuditArgs) {
    let balance = audit::run(binary(), args).unwrap();
    println!("{balance}");
    assert!(balance.is_even(), "{balance:?}");
    assert!(balance.n_events_sent >= args.events && balance.n_held > 0, "{balance:?}");
}

#[test]
fn everything_that_is_sent_is_applied() {
    audit(&AuditArgs { events: 100_000, ..AuditArgs::default() });
}

/// `cargo e2e audit` is the same with ten million, in a release build.
#[test]
#[ignore = "a million events"]
fn a_million_events_that_are_sent_are_applied() {
    audit(&AuditArgs { events: 1_000_000, ..AuditArgs::default() });
}

#[test]
fn every_batch_has_a_lag() {
    let args = LagArgs { rate: 4000.0, publishers: 2, events_per_batch: 20, seconds: 1.0, rounds: 1 };
    let mut measured = lag::run(binary(), &args).unwrap();
    assert_eq!((measured.plane.n_sent, measured.plane.lags.len()), (200, 200));
    assert_eq!(measured.baseline.lags.len(), 200);
    assert!(measured.plane.quantile(0.5) > std::time::Duration::ZERO);
}
