//! What the image says of its contents: `.ci/image-notices` against what cargo knows, and the Dockerfile's labels.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// Something of every text that has to be there for what is compiled from C and C++.
const BUNDLED_TEXTS: [&str; 2] = ["SPECIAL EXCEPTION GRANTED BY COPYRIGHT HOLDERS", "K.Kosako  <kkosako0@gmail.com>"];

/// Names and versions.
type Packages = BTreeSet<(String, String)>;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn bill_of_materials_names_what_is_linked_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let bill = write_notices(dir.path());
    let components = bill["components"].as_array().unwrap();
    let text = |component: &Value, key: &str| component[key].as_str().unwrap().to_owned();
    let purls: BTreeSet<String> = components.iter().map(|component| text(component, "purl")).collect();
    assert_eq!(purls.len(), components.len(), "a component is listed twice");
    let named: Packages = components
        .iter()
        .filter(|component| text(component, "purl").starts_with("pkg:cargo/"))
        .inspect(|component| assert_eq!(component["hashes"][0]["content"].as_str().unwrap().len(), 64, "{component}"))
        .map(|component| (text(component, "name"), text(component, "version")))
        .collect();

    let (direct, all) = linked();
    let missing: Vec<_> = direct.difference(&named).collect();
    let foreign: Vec<_> = named.difference(&all).collect();
    assert!(missing.is_empty(), "dependencies of warmroute that the bill does not name: {missing:?}");
    assert!(foreign.is_empty(), "the bill names what is not linked: {foreign:?}");
    for bundled in ["pkg:generic/libzmq@", "pkg:generic/oniguruma@", "pkg:generic/rust-std@"] {
        assert!(purls.iter().any(|purl| purl.starts_with(bundled)), "{bundled} is not in the bill");
    }

    let texts = std::fs::read_to_string(dir.path().join("THIRD-PARTY.txt")).unwrap();
    for text in BUNDLED_TEXTS {
        assert!(texts.contains(text), "{text:?} is not in THIRD-PARTY.txt");
    }
    for (name, version) in &named {
        assert!(texts.contains(&format!("    {name} {version}")), "{name} {version} is not in THIRD-PARTY.txt");
    }
}

#[test]
fn image_is_one_program_of_this_version_without_shell_and_root() {
    let dockerfile = std::fs::read_to_string(root().join("Dockerfile")).unwrap();
    let (_, image) = dockerfile.rsplit_once("\nFROM ").unwrap();
    for line in [
        concat!("ARG VERSION=", env!("CARGO_PKG_VERSION")),
        "COPY --from=builder /staging/ /",
        "USER 65532:65532",
        r#"ENTRYPOINT ["/usr/local/bin/warmroute"]"#,
        r#"CMD ["serve", "--config", "/etc/warmroute/config.yaml"]"#,
    ] {
        assert!(image.lines().any(|found| found == line), "{line:?} is not in the Dockerfile's last stage");
    }
    // Without a shell in the base image, a RUN would not even build.
    let adds = |line: &&str| ["RUN ", "ADD ", "COPY "].iter().any(|step| line.starts_with(step));
    assert_eq!(image.lines().filter(adds).count(), 1, "only what .ci/image-build has staged goes in");
    assert!(dockerfile.contains("\nARG RUNTIME_IMAGE=gcr.io/distroless/cc-debian12:nonroot\n"));
}

fn write_notices(dir: &Path) -> Value {
    let output = Command::new(root().join(".ci/image-notices")).arg(dir).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&std::fs::read(dir.join("warmroute.cdx.json")).unwrap()).unwrap()
}

/// Names and versions of what warmroute depends on itself, and of all that can be linked into it; procedural macros are
/// not. zeromq-src is a build dependency, but what it builds is linked.
fn linked() -> (Packages, Packages) {
    let metadata = metadata();
    let packages: BTreeMap<&str, &Value> = metadata["packages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|package| (package["id"].as_str().unwrap(), package))
        .collect();
    let nodes: BTreeMap<&str, &Value> = metadata["resolve"]["nodes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|node| (node["id"].as_str().unwrap(), node))
        .collect();
    let name_of = |id: &str| {
        let package = packages[id];
        (package["name"].as_str().unwrap().to_owned(), package["version"].as_str().unwrap().to_owned())
    };
    let is_macro = |id: &str| packages[id]["targets"][0]["kind"][0] == "proc-macro";
    let depends_on = |id: &str| -> Vec<&str> {
        let deps = nodes[id]["deps"].as_array().unwrap().iter();
        let is_linked = |dep: &&Value| {
            let kinds = dep["dep_kinds"].as_array().unwrap();
            kinds.iter().any(|kind| kind["kind"].is_null()) || dep["name"] == "zeromq_src"
        };
        deps.filter(is_linked).map(|dep| dep["pkg"].as_str().unwrap()).filter(|id| !is_macro(id)).collect()
    };
    let warmroute = packages.keys().find(|id| name_of(id).0 == "warmroute").copied().unwrap();
    let direct = depends_on(warmroute);
    let (mut seen, mut open) = (BTreeSet::new(), direct.clone());
    while let Some(id) = open.pop() {
        if seen.insert(id) {
            open.extend(depends_on(id));
        }
    }
    (direct.into_iter().map(name_of).collect(), seen.into_iter().map(name_of).collect())
}

fn metadata() -> Value {
    let rustc = Command::new("rustc").arg("-vV").output().unwrap();
    let version = String::from_utf8(rustc.stdout).unwrap();
    let host = version.lines().find_map(|line| line.strip_prefix("host: ")).unwrap();
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--locked", "--filter-platform", host])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}
