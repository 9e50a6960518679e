//! `cargo e2e coverage FILE`: which share of the product's lines the tests ran, from what `cargo llvm-cov` has written.
//!
//! Counted is every line of `src` that is compiled to code, `src/main.rs` included, except the tests themselves: they run
//! whole and would only flatter. Tests are what is behind `#[cfg(test)]`: a module in its file, which ends with a `}` at
//! the line's beginning as rustfmt has it, or a file or directory of its own.

use std::collections::HashSet;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Args;

/// Files that are named, those with most lines that no test runs.
const N_NAMED: usize = 25;

/// Flags of the count.
#[derive(Clone, Debug, Args)]
pub struct CoverageArgs {
    /// What `cargo llvm-cov --lcov` has written.
    report: PathBuf,
    /// Fails below this share of the lines, in percent.
    #[arg(long, default_value_t = 0.0)]
    at_least: f64,
}

/// The lines of all files of `src`, those with most lines that no test runs first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Coverage {
    files: Vec<Lines>,
}

/// The lines of one file.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Lines {
    path: PathBuf,
    n_lines: usize,
    n_run: usize,
}

/// Counts and prints; false when the share is below the limit.
///
/// # Errors
/// When the report or a file of `src` cannot be read.
pub fn run(args: &CoverageArgs) -> Result<bool> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the harness lies in the project")?;
    let report = fs::read_to_string(&args.report).with_context(|| format!("cannot read {}", args.report.display()))?;
    let coverage = Coverage::of(&report, &root.join("src"))?;
    println!("{coverage}");
    let is_enough = coverage.percent() >= args.at_least;
    if !is_enough {
        println!("expected at least {} %", args.at_least);
    }
    Ok(is_enough)
}

impl Coverage {
    /// Reads a report in lcov's format, of which the lines of files in `src` count.
    ///
    /// # Errors
    /// When it cannot be read, names no file of `src`, or a file cannot be read.
    fn of(report: &str, src: &Path) -> Result<Self> {
        let mut tests = Tests::default();
        let mut files = Vec::new();
        for record in report.split("end_of_record") {
            let Some(path) = record.lines().find_map(|line| line.strip_prefix("SF:")) else { continue };
            let Ok(path) = Path::new(path).strip_prefix(src) else { continue };
            files.push((path.to_owned(), run_counts(record)?));
            tests.read(src, path)?;
        }
        ensure!(!files.is_empty(), "the report names no file in {}", src.display());
        let lines = |(path, counts): (PathBuf, Vec<(usize, u64)>)| {
            let counted: Vec<_> = counts.into_iter().filter(|(line, _)| !tests.has(&path, *line)).collect();
            let n_run = counted.iter().filter(|(_, n_runs)| *n_runs > 0).count();
            Lines { path, n_lines: counted.len(), n_run }
        };
        let mut files: Vec<Lines> = files.into_iter().map(lines).filter(|file| file.n_lines > 0).collect();
        files.sort_by(|a, b| (b.n_missed(), &a.path).cmp(&(a.n_missed(), &b.path)));
        Ok(Self { files })
    }

    fn percent(&self) -> f64 {
        let [n_run, n_lines] = self.sums();
        100.0 * n_run as f64 / n_lines.max(1) as f64
    }

    fn sums(&self) -> [usize; 2] {
        self.files.iter().fold([0, 0], |[n_run, n_lines], file| [n_run + file.n_run, n_lines + file.n_lines])
    }
}

impl Lines {
    fn n_missed(&self) -> usize {
        self.n_lines - self.n_run
    }
}

impl fmt::Display for Coverage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "lines that no test runs, of lines:")?;
        for Lines { path, n_lines, n_run } in self.files.iter().take(N_NAMED) {
            writeln!(f, "{:>6} of {n_lines:<6} src/{}", n_lines - n_run, path.display())?;
        }
        let [n_run, n_lines] = self.sums();
        write!(
            f,
            "coverage of src: {:.2} % of lines, {n_run} of {n_lines} in {} files",
            self.percent(),
            self.files.len()
        )
    }
}

/// Line number and count of each `DA:line,count`.
fn run_counts(record: &str) -> Result<Vec<(usize, u64)>> {
    let parse = |data: &str| {
        let mut numbers = data.split(',');
        let line = numbers.next()?.parse().ok()?;
        Some((line, numbers.next()?.parse().ok()?))
    };
    let data = record.lines().filter_map(|line| line.strip_prefix("DA:"));
    data.map(|data| parse(data).with_context(|| format!("found DA:{data}, expected DA:LINE,COUNT"))).collect()
}

/// What of `src` is tests.
#[derive(Debug, Default)]
struct Tests {
    lines: HashSet<(PathBuf, usize)>,
    /// Files and directories without extension: `routing/tests` is `routing/tests.rs` and all below `routing/tests`.
    modules: Vec<PathBuf>,
}

impl Tests {
    fn read(&mut self, src: &Path, path: &Path) -> Result<()> {
        let file = src.join(path);
        let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        self.find(path, &text);
        Ok(())
    }

    fn find(&mut self, path: &Path, text: &str) {
        let mut is_cfg_test = false;
        let mut is_inside = false;
        for (number, line) in (1..).zip(text.lines()) {
            if is_inside {
                self.lines.insert((path.to_owned(), number));
                is_inside = line != "}";
            } else if line == "#[cfg(test)]" {
                is_cfg_test = true;
            } else if is_cfg_test && !line.starts_with("#[") {
                is_cfg_test = false;
                let Some((_, module)) = line.split_once("mod ") else { continue };
                match module.strip_suffix(';') {
                    Some(name) => self.modules.push(directory(path).join(name)),
                    None => {
                        self.lines.insert((path.to_owned(), number));
                        is_inside = line.ends_with('{');
                    }
                }
            }
        }
    }

    fn has(&self, path: &Path, line: usize) -> bool {
        let is_in = |module: &PathBuf| path.starts_with(module) || path.with_extension("") == *module;
        self.modules.iter().any(is_in) || self.lines.contains(&(path.to_owned(), line))
    }
}

/// Where the modules of a file lie.
fn directory(path: &Path) -> PathBuf {
    match path.file_name().and_then(|name| name.to_str()) {
        Some("lib.rs" | "main.rs" | "mod.rs") => path.parent().unwrap_or(Path::new("")).to_owned(),
        _ => path.with_extension(""),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str =
        "pub fn half() {\n}\nfn other() {\n}\n\n#[cfg(test)]\nmod tests {\n    #[test]\n    fn t() {\n    }\n}\n";

    #[test]
    fn tests_in_a_file_do_not_count() {
        let src = tempfile::tempdir().unwrap();
        fs::create_dir(src.path().join("a")).unwrap();
        fs::write(src.path().join("a/mod.rs"), format!("#[cfg(test)]\nmod only;\n{FILE}")).unwrap();
        for name in ["a/only.rs", "a/other.rs"] {
            fs::write(src.path().join(name), "fn f() {}\n").unwrap();
        }
        let record = |name: &str, data: &str| format!("SF:{}/{name}\n{data}\nend_of_record\n", src.path().display());
        let report = record("a/mod.rs", "DA:3,4\nDA:4,4\nDA:5,0\nDA:6,0\nDA:11,1\nDA:12,1")
            + &record("a/only.rs", "DA:1,1")
            + &record("a/other.rs", "DA:1,7")
            + "SF:/elsewhere/x.rs\nDA:1,1\nend_of_record\n";
        let coverage = Coverage::of(&report, src.path()).unwrap();
        let lines = |path: &str, n_lines, n_run| Lines { path: path.into(), n_lines, n_run };
        assert_eq!(coverage.files, [lines("a/mod.rs", 4, 2), lines("a/other.rs", 1, 1)]);
        assert!((coverage.percent() - 60.0).abs() < 1e-9);
    }

    #[test]
    fn modules_of_a_file_lie_beside_or_below_it() {
        for (path, expected) in [("a/mod.rs", "a"), ("lib.rs", ""), ("a.rs", "a"), ("a/b.rs", "a/b")] {
            assert_eq!(directory(Path::new(path)), Path::new(expected), "{path}");
        }
    }

    #[test]
    fn report_without_our_files_is_an_error() {
        let error = Coverage::of("SF:/elsewhere/x.rs\nDA:1,1\nend_of_record\n", Path::new("/src")).unwrap_err();
        assert!(error.to_string().contains("names no file in /src"), "{error}");
    }
}
