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

    /// Set in the process whose panics are read.
    const CHILD: &str = "WARMROUTE_TEST_PANICS";
    /// No part of it is a word of any program.
    const MARKER: &str = "zqx7kanaryvw9";

    /// The hook and the log are the process's, so another process has them as the program has.
    #[test]
    fn what_panics_leave_in_the_log_has_nothing_of_what_was_worked_on() {
        if std::env::var_os(CHILD).is_some() {
            return panic_as_the_program_does();
        }
        let mut command = std::process::Command::new(std::env::current_exe().expect("the path of this program"));
        let name = format!("{}::what_panics_leave_in_the_log_has_nothing_of_what_was_worked_on", module_path!());
        let (_, name) = name.split_once("::").expect("the crate and what follows");
        command.args([name, "--exact", "--nocapture"]).envs([(CHILD, "1"), ("RUST_BACKTRACE", "1")]);
        let output = command.output().expect("this program starts");
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        assert!(output.status.success() && !text.contains(MARKER), "{text}");
        let lines = || text.lines().filter(|line| line.contains("\"level\":\"ERROR\"") && line.contains("panics.rs:"));
        assert_eq!(lines().filter(|line| line.contains(WITHHELD)).count(), 3, "{text}");
        assert_eq!(lines().filter(|line| line.contains("the index is locked")).count(), 1, "{text}");
        assert!(lines().all(|line| line.contains("backtrace") && line.contains("\"thread\":\"events-3\"")), "{text}");
    }

    fn panic_as_the_program_does() {
        let config = crate::telemetry::Config {
            log_format: crate::telemetry::LogFormat::Json,
            log_filter: "trace".to_owned(),
            otlp_endpoint: None,
            sample_ratio: 1.0,
        };
        let _telemetry = crate::telemetry::init(&config).expect("nobody has set a subscriber in this process");
        let prompt = || std::hint::black_box(format!("ü{MARKER}"));
        let quoting: [fn(String); 4] = [
            |prompt| panic!("cannot read {prompt}"),
            |prompt| drop(prompt[1..].to_owned()),
            |prompt| std::hint::black_box(Err::<(), _>(prompt)).expect("a request that can be read"),
            |_| panic!("the index is locked"),
        ];
        for panic in quoting {
            let prompt = prompt();
            let thread = std::thread::Builder::new().name("events-3".to_owned()).spawn(move || panic(prompt));
            thread.expect("a thread starts").join().expect_err("it panics");
        }
    }
}
