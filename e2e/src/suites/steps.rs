//! The steps of each suite.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::cache::Cache;
use crate::vllm;

/// Seconds for which each fuzz target runs.
const FUZZ_SECONDS: &str = "-max_total_time=600";
/// Tests that cannot run without are marked `#[ignore]`.
const IGNORED_TOO: &str = "--include-ignored";

/// A kind of tests or measurements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suite {
    /// Several parts together, on this machine.
    Integration,
    /// Kubernetes' API server, Helm and Envoy Gateway.
    K8s,
    /// What things cost, in short.
    Bench,
    /// Everything that can go wrong.
    Chaos,
    /// What is too long for every day.
    Deep,
}

/// A program that is run to its end.
#[derive(Clone, Copy, Debug)]
pub(super) struct Step {
    pub(super) name: &'static str,
    pub(super) program: Program,
    pub(super) arguments: &'static [&'static str],
    pub(super) needs: &'static [Need],
}

/// Whose arguments a step has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Program {
    /// The cargo that has built us.
    Cargo,
    /// That of the nightly toolchain.
    Nightly,
    /// This program.
    Harness,
}

/// What is not on every machine.
#[derive(Clone, Copy, Debug)]
pub(super) enum Need {
    /// Programs on `PATH`.
    Programs(&'static [&'static str]),
    /// The nightly toolchain.
    Nightly,
    /// vLLM, which is large: it is not installed by the way.
    Vllm,
}

const fn cargo(name: &'static str, arguments: &'static [&'static str]) -> Step {
    Step { name, program: Program::Cargo, arguments, needs: &[] }
}

const fn harness(name: &'static str, arguments: &'static [&'static str]) -> Step {
    Step { name, program: Program::Harness, arguments, needs: &[] }
}

const INTEGRATION: &[Step] = &[
    cargo("router", &["test", "--locked", "-p", "warmroute", "--test", "it"]),
    cargo("sim", &["test", "--locked", "-p", "e2e", "--test", "sim", "--test", "doctor"]),
    cargo("envoy", &["test", "--locked", "-p", "e2e", "--test", "envoy", "--test", "modes", "--test", "adapters"]),
    Step {
        needs: &[Need::Programs(&["prometheus", "promtool", "chromium", "chromedriver", "tmux"])],
        ..cargo("observe", &["test", "--locked", "-p", "e2e", "--test", "observe", "--", IGNORED_TOO])
    },
    Step {
        needs: &[Need::Vllm],
        ..cargo("vllm", &["test", "--locked", "-p", "e2e", "--test", "vllm", "--", IGNORED_TOO])
    },
];

const K8S: &[Step] = &[
    harness("tools", &["tools"]),
    cargo("kube", &["test", "--locked", "-p", "e2e", "--test", "kube", "--", IGNORED_TOO]),
];

const BENCH: &[Step] = &[
    cargo(
        "core",
        &["bench", "--locked", "--bench", "core", "--", "--warm-up-time", "0.3", "--measurement-time", "1.5"],
    ),
    cargo(
        "decision",
        &["bench", "--locked", "--bench", "decision", "--", "--warm-up-time", "0.3", "--measurement-time", "1.5"],
    ),
    cargo(
        "tokenizer",
        &["bench", "--locked", "--bench", "tokenizer", "--", "--warm-up-time", "0.3", "--measurement-time", "1.5"],
    ),
    cargo("observability", &["bench", "--locked", "--bench", "observability"]),
    harness("ratios", &["ratios"]),
    harness("lag", &["lag", "--seconds", "5", "--rounds", "2"]),
    harness("cost", &["cost", "--seconds", "10", "--rounds", "1"]),
];

const CHAOS: &[Step] = &[harness("faults", &["faults"])];

const DEEP: &[Step] = &[
    cargo("programs", &["test", "--locked", "--lib", "events::model", "--", IGNORED_TOO]),
    fuzz("fuzz-decode", &["fuzz", "run", "decode", "fuzz/corpus/decode", "--", "-max_len=4096", FUZZ_SECONDS]),
    fuzz(
        "fuzz-continuity",
        &["fuzz", "run", "continuity", "fuzz/corpus/continuity", "--", "-max_len=1024", FUZZ_SECONDS],
    ),
    harness("audit", &["audit", "--events", "100000000"]),
    cargo("ignored", &["test", "--locked", "--workspace", "--", "--ignored"]),
    harness("crowd", &["faults", "crowd", "--flap-seconds", "600"]),
    cargo("bench", &["bench", "--locked", "-p", "warmroute"]),
    harness("ratios", &["ratios"]),
    harness("lag", &["lag", "--seconds", "30", "--rounds", "5"]),
    harness("cost", &["cost", "--seconds", "30", "--rounds", "3"]),
];

const fn fuzz(name: &'static str, arguments: &'static [&'static str]) -> Step {
    let needs = &[Need::Programs(&["rustup", "cargo-fuzz"]), Need::Nightly];
    Step { name, program: Program::Nightly, arguments, needs }
}

impl Suite {
    /// What it consists of.
    pub(super) fn steps(self) -> &'static [Step] {
        match self {
            Self::Integration => INTEGRATION,
            Self::K8s => K8S,
            Self::Bench => BENCH,
            Self::Chaos => CHAOS,
            Self::Deep => DEEP,
        }
    }

    /// What belongs to the kind and is not run.
    pub(super) fn note(self) -> Option<&'static str> {
        match self {
            Self::Chaos => Some(
                "Not run: envoy/chaos has experiments for Chaos Mesh, which needs a cluster with nodes: kubectl apply -f, \
                 after envoy/kind/up.sh for example.",
            ),
            Self::K8s => {
                Some("Not run: envoy/kind/up.sh, which needs docker and kind: pods on nodes, with real vLLM servers.")
            }
            Self::Integration | Self::Bench | Self::Deep => None,
        }
    }
}

impl Step {
    /// What it needs and is not here.
    pub(super) fn missing(&self) -> Option<String> {
        let missing: Vec<String> = self.needs.iter().filter_map(Need::missing).collect();
        (!missing.is_empty()).then(|| missing.join("; "))
    }

    /// As one would type it.
    pub(super) fn command_line(&self) -> String {
        let program = match self.program {
            Program::Cargo => "cargo",
            Program::Nightly => "cargo +nightly",
            Program::Harness => "cargo e2e",
        };
        format!("{program} {}", self.arguments.join(" "))
    }
}

impl Need {
    fn missing(&self) -> Option<String> {
        match self {
            Self::Programs(names) => {
                let absent: Vec<_> = names.iter().copied().filter(|name| on_path(name).is_none()).collect();
                (!absent.is_empty()).then(|| format!("no {} on PATH", absent.join(", ")))
            }
            Self::Nightly => {
                let mut rustc = Command::new("rustup");
                rustc.args(["run", "nightly", "rustc", "--version"]).stdout(Stdio::null()).stderr(Stdio::null());
                let is_there = rustc.status().is_ok_and(|status| status.success());
                (!is_there).then(|| "no nightly toolchain: rustup toolchain install nightly".to_owned())
            }
            Self::Vllm => {
                let is_there = Cache::from_env().is_ok_and(|cache| vllm::is_installed(&cache));
                (!is_there).then(|| "vLLM is not installed: cargo demo -- --engine vllm does that, 5 GB".to_owned())
            }
        }
    }
}

fn on_path(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path).map(|dir| dir.join(program)).find(|file| Path::is_file(file))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SUITES: [Suite; 5] = [Suite::Integration, Suite::K8s, Suite::Bench, Suite::Chaos, Suite::Deep];

    /// Values of `flag` in the arguments of all steps.
    fn values(flag: &str) -> Vec<&'static str> {
        let steps = SUITES.into_iter().flat_map(Suite::steps);
        let values =
            steps.flat_map(|step| step.arguments.windows(2).filter(|pair| pair[0] == flag).map(|pair| pair[1]));
        values.collect()
    }

    #[test]
    fn tests_and_benchmarks_that_are_named_exist() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let exists = |path: &str| root.join(path).exists();
        for name in values("--test") {
            let paths = ["tests", "e2e/tests"].map(|dir| [format!("{dir}/{name}.rs"), format!("{dir}/{name}/main.rs")]);
            assert!(paths.iter().flatten().any(|path| exists(path)), "--test {name}");
        }
        for name in values("--bench") {
            assert!(exists(&format!("benches/{name}.rs")), "--bench {name}");
        }
        for step in SUITES.into_iter().flat_map(Suite::steps).filter(|step| step.program == Program::Nightly) {
            assert!(exists(&format!("fuzz/targets/{}.rs", step.arguments[2])) && exists(step.arguments[3]), "{step:?}");
        }
    }

    #[test]
    fn every_benchmark_is_run() {
        let files = std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../benches")).unwrap();
        let mut names: Vec<_> = files.map(|file| file.unwrap().path()).filter(|file| file.is_file()).collect();
        names.sort();
        let mut run = values("--bench");
        run.sort_unstable();
        assert_eq!(names.iter().map(|file| file.file_stem().unwrap().to_str().unwrap()).collect::<Vec<_>>(), run);
    }

    #[test]
    fn names_of_steps_are_unique_and_command_lines_can_be_typed() {
        for suite in SUITES {
            let mut names: Vec<_> = suite.steps().iter().map(|step| step.name).collect();
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), suite.steps().len(), "{suite:?}");
        }
        let lines: Vec<_> = K8S.iter().chain(CHAOS).map(Step::command_line).collect();
        let kube = "cargo test --locked -p e2e --test kube -- --include-ignored";
        assert_eq!(lines, ["cargo e2e tools", kube, "cargo e2e faults"]);
        assert!(DEEP[1].command_line().starts_with("cargo +nightly fuzz run decode "));
    }

    #[test]
    fn what_is_missing_is_named() {
        let needs = &[Need::Programs(&["sh", "no-such-program", "nor-this-one"])];
        let step = Step { needs, ..harness("step", &[]) };
        assert_eq!(step.missing().as_deref(), Some("no no-such-program, nor-this-one on PATH"));
        assert_eq!(Step { needs: &[Need::Programs(&["sh"])], ..step }.missing(), None);
    }
}
