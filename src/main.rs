//! The `warmroute` program; everything is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    warmroute::cli::main()
}
