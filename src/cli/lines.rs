//! JSON lines in, JSON lines out: the frame of the debug commands.

use std::io::{self, BufRead, Write};
use std::process::ExitCode;

use serde_json::{Value, json};

/// Answers every line of `input` with one line: what `answer` returns, or `{"error": …}`. Blank lines are skipped.
///
/// The exit code is a failure when one of the lines was at fault.
///
/// # Errors
/// `input` cannot be read or `output` not be written.
pub(super) fn run(
    mut input: impl BufRead,
    mut output: impl Write,
    answer: impl Fn(&str) -> Result<Value, String>,
) -> io::Result<ExitCode> {
    let mut code = ExitCode::SUCCESS;
    let mut line = Vec::new();
    while input.read_until(b'\n', &mut line)? > 0 {
        if !line.trim_ascii().is_empty() {
            let text = std::str::from_utf8(&line).map_err(|error| format!("the line is not UTF-8: {error}"));
            let result = text.and_then(&answer).unwrap_or_else(|error| {
                code = ExitCode::FAILURE;
                json!({ "error": error })
            });
            writeln!(output, "{result}")?;
        }
        line.clear();
    }
    output.flush()?;
    Ok(code)
}
