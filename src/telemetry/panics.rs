//! What a panic leaves in the log: where it was, and never what a client sent.
//!
//! Rust's own hook prints the message, which may be made of values: that of a slice beyond the bounds of a text quotes
//! the text. Only a message that stands in the source as it is may be printed.

use std::any::Any;
use std::backtrace::{Backtrace, BacktraceStatus};
use std::panic::PanicHookInfo;

use tracing::error;

/// Said in place of a message that is made of values.
const WITHHELD: &str = "a message with values, which may be a client's";

/// Has panics reported as one line of the log each, in the place of Rust's report.
pub fn report_without_content() {
    std::panic::set_hook(Box::new(report));
}

fn report(info: &PanicHookInfo<'_>) {
    let location = info.location().map(ToString::to_string).unwrap_or_default();
    let thread = std::thread::current().name().unwrap_or("unnamed").to_owned();
    let message = message(info.payload());
    let backtrace = Backtrace::capture();
    if backtrace.status() == BacktraceStatus::Captured {
        error!(location, thread, message, %backtrace, "panic");
    } else {
        error!(location, thread, message, "panic");
    }
}

/// What may be told of a panic's message.
fn message(payload: &(dyn Any + Send)) -> &'static str {
    // A message without values is a literal; all others are made at run time.
    payload.downcast_ref::<&'static str>().copied().unwrap_or(WITHHELD)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told_of(code: impl FnOnce() + std::panic::UnwindSafe) -> &'static str {
        message(&*std::panic::catch_unwind(code).expect_err("a panic"))
    }

    #[test]
    fn only_a_message_without_values_is_told() {
        assert_eq!(told_of(|| panic!("the index is locked")), "the index is locked");
        let prompt = std::hint::black_box("grüße".to_owned());
        assert_eq!(told_of(|| panic!("cannot read {prompt}")), WITHHELD);
        let cut = std::hint::black_box(3);
        let prompt = std::hint::black_box("grüße".to_owned());
        assert_eq!(told_of(move || drop(prompt[..cut].to_owned())), WITHHELD, "Rust's own message quotes the text");
    }
}
