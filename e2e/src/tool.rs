//! Programs of the machine that the harness runs to their end: one call, their output, and an error that shows what
//! they said.

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::{env, fmt, thread};

use anyhow::{Context, Result, bail};

/// How much of a failed program's output goes into the error.
const TAIL_LINES: usize = 20;

/// Runs `command` without standard input and returns its standard output.
///
/// # Errors
/// When it can't be started or fails; the error ends with the last lines of its output.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot start {}", name(command)))?;
    stdout(command, &output)
}

/// As [`run`], with `input` as standard input.
///
/// # Errors
/// As [`run`].
pub fn run_with_input(command: &mut Command, input: &str) -> Result<String> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {}", name(command)))?;
    let mut stdin = child.stdin.take().context("standard input is a pipe")?;
    // Written beside reading what it says: either pipe may fill while the other side waits.
    let output = thread::scope(|scope| {
        scope.spawn(move || stdin.write_all(input.as_bytes()));
        child.wait_with_output()
    });
    // That it did not read all of the input is no error: if it is one to the program, its status says so.
    stdout(command, &output.with_context(|| format!("cannot wait for {}", name(command)))?)
}

fn name(command: &Command) -> String {
    Path::new(command.get_program()).display().to_string()
}

fn stdout(command: &Command, output: &Output) -> Result<String> {
    let name = name(command);
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        let said = stdout + &String::from_utf8_lossy(&output.stderr);
        bail!("{name} ended with {}:\n{}", output.status, tail(&said));
    }
    Ok(stdout)
}

/// The last lines of `text`.
pub fn tail(text: &str) -> String {
    let lines: Vec<_> = text.trim_end().lines().collect();
    lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
}

/// A Python interpreter of the machine.
#[derive(Debug, Clone)]
pub struct Python {
    /// The interpreter itself, never a shim.
    pub path: PathBuf,
    /// Major and minor version.
    pub version: (u32, u32),
}

impl fmt::Display for Python {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}.{})", self.path.display(), self.version.0, self.version.1)
    }
}

impl Python {
    /// The first interpreter with pip, which fetches wheels.
    ///
    /// # Errors
    /// When there is none.
    pub fn with_pip() -> Result<Self> {
        let has_pip = |python: &Self| run(Command::new(&python.path).args(["-m", "pip", "--version"])).is_ok();
        Self::find(has_pip, "a Python 3 with pip; install Debian's python3 and python3-pip, or their like")
    }

    /// The first interpreter from `oldest` to `newest`.
    ///
    /// # Errors
    /// When there is none.
    pub fn within(oldest: (u32, u32), newest: (u32, u32)) -> Result<Self> {
        let expected = format!(
            "a Python from {}.{} to {}.{}; install one of them and put it on PATH",
            oldest.0, oldest.1, newest.0, newest.1
        );
        Self::find(|python| (oldest..=newest).contains(&python.version), &expected)
    }

    /// Looks for plain `python3` first, then for other names on `PATH`, then for what pyenv installed.
    fn find(accept: impl Fn(&Self) -> bool, expected: &str) -> Result<Self> {
        let mut found = Vec::new();
        for candidate in candidates() {
            let Some(python) = Self::probe(&candidate) else {
                continue;
            };
            if accept(&python) {
                return Ok(python);
            }
            found.push(python.to_string());
        }
        if found.is_empty() {
            found.push("no Python 3 on PATH".to_owned());
        }
        bail!("found {}, expected {expected}", found.join(", "))
    }

    fn probe(candidate: &Path) -> Option<Self> {
        let script = "import sys; print(sys.executable, *sys.version_info[:2], sep='\\n')";
        let output = run(Command::new(candidate).args(["-c", script])).ok()?;
        let mut lines = output.lines();
        let path = PathBuf::from(lines.next()?);
        let version = (lines.next()?.parse().ok()?, lines.next()?.parse().ok()?);
        Some(Self { path, version })
    }
}

fn candidates() -> Vec<PathBuf> {
    let names = ["python3", "python3.12", "python3.11", "python3.13", "python3.14", "/usr/bin/python3"];
    let mut candidates: Vec<_> = names.iter().map(PathBuf::from).collect();
    let pyenv = env::var_os("PYENV_ROOT")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".pyenv")));
    let versions = pyenv.and_then(|root| fs::read_dir(root.join("versions")).ok());
    let mut installed: Vec<_> =
        versions.into_iter().flatten().flatten().map(|entry| entry.path().join("bin/python3")).collect();
    installed.retain(|path| path.exists());
    installed.sort();
    candidates.append(&mut installed);
    candidates
}

/// `PATH` with `dir` in front.
pub fn path_with(dir: &Path) -> Result<std::ffi::OsString> {
    let path = env::var_os("PATH").unwrap_or_default();
    let dirs = [dir.as_os_str().to_owned()].into_iter().chain(env::split_paths(&path).map(Into::into));
    env::join_paths(dirs).with_context(|| format!("{} cannot be put on PATH", dir.display()))
}

/// The cargo that has built or runs us, else the one on `PATH`.
pub fn cargo() -> Command {
    let mut command = Command::new(env_path("CARGO").unwrap_or_else(|| "cargo".into()));
    // Cargo tells what it runs of the package it belongs to. Build scripts that read the same names, such as ring's, would
    // run anew, now and at the next build outside of a test.
    let of_package = |name: &str| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_");
    for (name, _) in env::vars_os().filter(|(name, _)| of_package(&name.to_string_lossy())) {
        command.env_remove(name);
    }
    command
}

/// The value of `name`, unless it is empty.
pub fn env_path(name: impl AsRef<OsStr>) -> Option<PathBuf> {
    env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failure_shows_what_the_program_said() {
        let error = run(Command::new("sh").args(["-c", "echo out; echo why >&2; exit 3"])).unwrap_err().to_string();
        assert!(error.contains("exit status: 3") && error.contains("out\nwhy"), "{error}");
    }

    #[test]
    fn input_longer_than_a_pipe_comes_back() {
        let input = "kato ".repeat(100_000);
        assert_eq!(run_with_input(&mut Command::new("cat"), &input).unwrap(), input);
        // A program that reads nothing ends by itself.
        assert_eq!(run_with_input(&mut Command::new("true"), &input).unwrap(), "");
    }

    #[test]
    fn missing_program_is_named() {
        let error = run(&mut Command::new("no-such-program")).unwrap_err().to_string();
        assert_eq!(error, "cannot start no-such-program");
    }

    #[test]
    fn unmet_version_names_what_was_found() {
        let error = Python::within((9, 0), (9, 1)).unwrap_err().to_string();
        assert!(error.starts_with("found ") && error.contains("expected a Python from 9.0 to 9.1"), "{error}");
    }
}
