//! Endpoints from a file, as a ConfigMap brings it.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use crate::process::{Process, get, wait_for_metric, wait_ready};

/// What the kubelet does when a ConfigMap changes.
fn swap(mount: &Path, version: &str, text: &str) {
    let dir = mount.join(version);
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("endpoints.yaml"), text).unwrap();
    symlink(version, mount.join("..data_tmp")).unwrap();
    fs::rename(mount.join("..data_tmp"), mount.join("..data")).unwrap();
}

#[test]
fn a_config_map_of_endpoints_is_followed_and_a_broken_one_is_not() {
    let mount = tempfile::TempDir::new().unwrap();
    symlink("..data/endpoints.yaml", mount.path().join("endpoints.yaml")).unwrap();
    let path = mount.path().join("endpoints.yaml");
    let models = format!(
        "readiness: {{warm_deadline: 0s}}\nmodels: [{{name: tiny, default: true, discovery: {{file: {{path: '{}', interval: 100ms}}}}}}]",
        path.display()
    );
    let mut process = Process::with_models("file", &models, &[]);
    let admin = process.wait_for_log("warmroute is starting")["admin"].as_str().unwrap().to_owned();
    process.wait_for_log("discovery fails: the endpoints stay as they were last listed");
    assert!(get(&admin, "/readyz").contains("discovery: not synced"));

    swap(mount.path(), "..1", "- {address: 127.0.0.1:1, events: tcp://127.0.0.1:2}\n- {address: 127.0.0.2:1}");
    wait_for_metric(&admin, "warmroute_endpoints{model=\"tiny\"} 2");
    wait_ready(&admin);
    assert!(get(&admin, "/sources").contains("\"127.0.0.1:1\""));

    swap(mount.path(), "..2", "- {address: 127.0.0.1:1, events: tcp://127.0.0.1:2}\n- {adress: 127.0.0.2:1}");
    process.wait_for_log("discovery fails: the endpoints stay as they were last listed");
    wait_for_metric(&admin, "warmroute_endpoints{model=\"tiny\"} 2");

    swap(mount.path(), "..3", "- {address: 127.0.0.2:1}");
    let metrics = wait_for_metric(&admin, "warmroute_endpoints{model=\"tiny\"} 1");
    assert!(!metrics.contains("endpoint=\"127.0.0.1:1\""), "series of one that has left\n{metrics}");
    assert!(!get(&admin, "/sources").contains("\"127.0.0.1:1\""));
    process.terminate();
    process.wait_for_log("stopped");
    assert!(process.child.wait().unwrap().success());
}
