//! The configuration of a running process changes: by its file, by a ConfigMap's swap, upon SIGHUP.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use envoy_types::pb::envoy::service::ext_proc::v3::external_processor_client::ExternalProcessorClient;
use envoy_types::pb::envoy::service::ext_proc::v3::processing_request::Request;
use envoy_types::pb::envoy::service::ext_proc::v3::{ProcessingRequest, processing_response};
use serde_json::json;
use tempfile::TempDir;
use tonic::transport::Channel;

use crate::fakes::{EnvoyStream, destination, headers, request_body, request_headers, set_header};
use crate::process::{Process, get, wait_for_metric};

const ENDPOINT: &str = "127.0.0.1:1";
const PATH: &str = "/v1/completions";

/// A configuration with one endpoint that is not there, and that nobody is asked for.
fn yaml(settings: &str, of_model: &str) -> String {
    format!(
        "listen: {{extproc: '127.0.0.1:0', admin: '127.0.0.1:0'}}\n{settings}\n\
         models: [{{name: tiny, default: true, events: {{sync: false}}, tokenizer: {{kind: text}}, {of_model}\
         discovery: {{static: [{{address: '{ENDPOINT}'}}]}}}}]"
    )
}

/// Looked at often.
fn often(rollout: &str) -> String {
    yaml(&format!("log: {{format: json}}\nrollout: {{reload: 100ms, {rollout}}}"), "")
}

/// A router whose configuration can change.
struct Running {
    process: Process,
    file: PathBuf,
    admin: String,
    client: ExternalProcessorClient<Channel>,
    _dir: TempDir,
}

impl Running {
    async fn start(text: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.yaml");
        std::fs::write(&file, text).unwrap();
        Self::start_with(dir, file, &[]).await
    }

    async fn start_with(dir: TempDir, file: PathBuf, env: &[(&str, &str)]) -> Self {
        let mut process = Process::serve(file.clone(), env);
        let addresses = process.wait_for_log("warmroute is starting");
        let admin = addresses["admin"].as_str().unwrap().to_owned();
        wait_for_metric(&admin, r#"warmroute_endpoints{model="tiny"} 1"#);
        let extproc = format!("http://{}", addresses["extproc"].as_str().unwrap());
        let client = ExternalProcessorClient::connect(extproc).await.unwrap();
        Self { process, file, admin, client, _dir: dir }
    }

    fn write(&self, text: &str) {
        std::fs::write(&self.file, text).unwrap();
    }

    fn wait_mode(&self, mode: &str) {
        wait_for_metric(&self.admin, &format!("warmroute_rollout_mode{{model=\"tiny\",mode=\"{mode}\"}} 1"));
    }

    fn wait_reloads(&self, result: &str, n: u32) {
        wait_for_metric(&self.admin, &format!("warmroute_config_reloads_total{{result=\"{result}\"}} {n}"));
    }

    async fn open(&self) -> EnvoyStream {
        EnvoyStream::open(self.client.clone()).await
    }

    /// Where a request goes.
    async fn destination(&self) -> Option<String> {
        destination(&self.open().await.post(PATH, b"{\"prompt\":\"kato\"}").await)
    }

    /// The same where Envoy dials whatever it is told.
    async fn target_pod(&self) -> Option<String> {
        set_header(&self.open().await.post(PATH, b"{\"prompt\":\"kato\"}").await, "target-pod")
    }

    /// The whole log, once the process has ended.
    fn stop(mut self) -> String {
        self.process.terminate();
        assert!(self.process.child.wait().unwrap().success());
        self.process.rest_of_log()
    }
}

fn response_headers() -> ProcessingRequest {
    let request = Some(Request::ResponseHeaders(headers(&[(":status", "200")], false)));
    ProcessingRequest { request, ..Default::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_the_file_switches_under_open_streams() {
    let running = Running::start(&often("mode: active")).await;
    running.wait_mode("active");
    let mut decided = running.open().await;
    assert_eq!(destination(&decided.post(PATH, b"{}").await).as_deref(), Some(ENDPOINT));
    let mut waiting = running.open().await;
    waiting.exchange(request_headers(PATH, false)).await;

    for (mode, expected) in [("off", None), ("shadow", None), ("active", Some(ENDPOINT.to_owned()))] {
        running.write(&often(&format!("mode: {mode}")));
        running.wait_mode(mode);
        assert_eq!(running.destination().await, expected, "{mode}");
    }
    running.wait_reloads("applied", 3);
    running.write(&often("mode: \"off\""));
    running.wait_mode("off");

    assert_eq!(destination(&waiting.exchange(request_body(b"{}")).await), None, "asked before, decided after");
    for stream in [&mut decided, &mut waiting] {
        let reply = stream.exchange(response_headers()).await.response;
        assert!(matches!(reply, Some(processing_response::Response::ResponseHeaders(_))), "{reply:?}");
        stream.close();
        assert!(stream.next().await.unwrap().is_none(), "it ends with OK");
    }
    wait_for_metric(&running.admin, r#"warmroute_left_to_envoy_total{reason="switched_off"} 2"#);
    let log = running.stop();
    assert_eq!(log.matches("the configuration has changed").count(), 4, "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn sighup_looks_at_once_and_ends_nothing() {
    let with = |mode: &str| yaml(&format!("log: {{format: json}}\nrollout: {{reload: 0s, mode: {mode}}}"), "");
    let running = Running::start(&with("active")).await;
    running.process.signal("-HUP");
    running.wait_reloads("unchanged_settings", 1);
    running.write(&with("shadow"));
    running.process.signal("-HUP");
    running.wait_mode("shadow");
    assert_eq!(running.destination().await, None);
    std::fs::remove_file(&running.file).unwrap();
    running.process.signal("-HUP");
    running.wait_reloads("unreadable", 1);
    wait_for_metric(&running.admin, "warmroute_config_last_reload_successful 0");
    running.wait_mode("shadow");
    running.write(&with("shadow"));
    running.process.signal("-HUP");
    running.wait_reloads("unchanged_settings", 2);
    wait_for_metric(&running.admin, "warmroute_config_last_reload_successful 1");
    running.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_file_keeps_the_old_and_is_named_once_with_all_faults() {
    let mut running = Running::start(&often("mode: shadow")).await;
    let hash = |metrics: &str| {
        let line = metrics.lines().find(|line| line.starts_with("warmroute_config_info{")).unwrap();
        line.to_owned()
    };
    let before = hash(&get(&running.admin, "/metrics"));
    running.write(&often("mode: dark, percent: 5"));
    let event = running.process.wait_for_log("the configuration cannot be used, the one in force stays");
    let faults = event["faults"].as_str().unwrap();
    for fault in ["rollout.percent: found an unknown setting", "rollout.mode: found \"dark\""] {
        assert!(faults.contains(fault), "{fault} is not in {faults}");
    }
    running.wait_reloads("refused", 1);
    let metrics = wait_for_metric(&running.admin, "warmroute_config_last_reload_successful 0");
    assert_eq!(hash(&metrics), before);
    running.wait_mode("shadow");
    // Other faults are another content; between the two the first one is looked at several times.
    tokio::time::sleep(std::time::Duration::from_millis(350)).await;
    running.write("rollout: [");
    running.wait_reloads("refused", 2);
    assert_eq!(running.destination().await, None, "still in shadow");
    running.write(&often("mode: active"));
    running.wait_reloads("applied", 1);
    let metrics = wait_for_metric(&running.admin, "warmroute_config_last_reload_successful 1");
    assert_ne!(hash(&metrics), before);
    assert_eq!(running.destination().await.as_deref(), Some(ENDPOINT));
    let log = running.stop();
    assert_eq!(log.matches("the configuration cannot be used").count(), 1, "the second one: {log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_switch_that_another_file_held_back_is_taken_once_that_file_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let (file, key) = (dir.path().join("config.yaml"), dir.path().join("key"));
    let with = |mode: &str| often(&format!("mode: {mode}, record: {{key_file: {}}}", key.display()));
    std::fs::write(&key, "a key of the record").unwrap();
    std::fs::write(&file, with("active")).unwrap();
    let mut running = Running::start_with(dir, file, &[]).await;
    std::fs::remove_file(&key).unwrap();
    running.write(&with("\"off\""));
    let event = running.process.wait_for_log("the configuration cannot be used, the one in force stays");
    assert!(event["faults"].as_str().unwrap().contains("rollout.record.key_file"), "{event}");
    // It is tried several times, and counted as one refusal.
    tokio::time::sleep(std::time::Duration::from_millis(350)).await;
    running.wait_reloads("refused", 1);
    running.wait_mode("active");

    std::fs::write(&key, "a key of the record").unwrap();
    running.wait_mode("off");
    running.wait_reloads("applied", 1);
    wait_for_metric(&running.admin, "warmroute_config_last_reload_successful 1");
    assert_eq!(running.destination().await, None);
    let log = running.stop();
    assert_eq!(log.matches("the configuration cannot be used").count(), 0, "it was named once: {log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_swap_of_a_config_map_is_seen() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for (version, mode) in [("..1", "active"), ("..2", "off")] {
        std::fs::create_dir(at(version)).unwrap();
        std::fs::write(at(version).join("config.yaml"), often(&format!("mode: {mode}"))).unwrap();
    }
    symlink("..1", at("..data")).unwrap();
    symlink("..data/config.yaml", at("config.yaml")).unwrap();
    let (data, swapped, file) = (at("..data"), at("..data_tmp"), at("config.yaml"));
    let running = Running::start_with(dir, file, &[]).await;
    running.wait_mode("active");
    symlink("..2", &swapped).unwrap();
    std::fs::rename(&swapped, &data).unwrap();
    running.wait_mode("off");
    assert_eq!(running.destination().await, None);
    running.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_filter_changes_and_what_the_environment_overrides_does_not() {
    let with = |filter: &str| {
        let settings = format!("log: {{format: json, filter: {filter}}}\nrollout: {{reload: 100ms, mode: shadow}}");
        yaml(&settings, "")
    };
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.yaml");
    std::fs::write(&file, with("info")).unwrap();
    let mut running = Running::start_with(dir, file, &[("WARMROUTE_ROLLOUT_MODE", "active")]).await;
    assert_eq!(running.destination().await.as_deref(), Some(ENDPOINT));
    running.write(&with("'warmroute=debug,info'"));
    running.wait_reloads("applied", 1);
    assert_eq!(running.destination().await.as_deref(), Some(ENDPOINT), "the environment holds");
    let picked = running.process.wait_for_log("endpoint picked");
    assert_eq!((&picked["level"], &picked["model"]), (&json!("DEBUG"), &json!("tiny")));
    running.write(&with("info"));
    running.wait_reloads("applied", 2);
    running.destination().await;
    let log = running.stop();
    assert!(!log.contains("endpoint picked"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_takes_effect_at_a_start_is_named_and_the_rest_holds() {
    let with = |mode: &str, more: &str, of_model: &str| {
        yaml(&format!("log: {{format: json}}\nrollout: {{reload: 100ms, mode: {mode}}}\n{more}"), of_model)
    };
    let mut running = Running::start(&with("active", "", "")).await;
    running.write(&with("shadow", "limits: {body_bytes: 2048}", "aliases: [small], rollout: {percent: 50}, "));
    let event = running.process.wait_for_log("settings have changed that take effect at the next start");
    assert_eq!(event["settings"], "limits.body_bytes, models[0].aliases[0]");
    running.wait_reloads("restart_needed", 1);
    running.wait_mode("shadow");
    wait_for_metric(&running.admin, r#"warmroute_rollout_percent{model="tiny"} 50"#);
    wait_for_metric(&running.admin, "warmroute_config_last_reload_successful 1");
    running.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rollout_that_waits_for_an_envoy_with_a_policy_of_its_own_is_refused() {
    let with = |selection: &str, mode: &str| {
        yaml(
            &format!(
                "log: {{format: json}}\nselection: {{mode: {selection}}}\nrollout: {{reload: 100ms, mode: {mode}}}"
            ),
            "",
        )
    };
    let mut running = Running::start(&with("original_dst", "active")).await;
    assert_eq!(running.target_pod().await.as_deref(), Some(ENDPOINT));
    running.write(&with("override_host", "shadow"));
    let event = running.process.wait_for_log("the configuration cannot be used, the one in force stays");
    assert!(event["faults"].as_str().unwrap().starts_with("rollout.mode: found shadow, expected active"), "{event}");
    running.wait_reloads("refused", 1);
    running.wait_mode("active");
    assert_eq!(running.target_pod().await.as_deref(), Some(ENDPOINT), "requests are served as before");
    running.write(&with("override_host", "active"));
    running.wait_reloads("restart_needed", 1);
    let log = running.stop();
    assert_eq!(log.matches("the configuration cannot be used").count(), 0, "it was named once: {log}");
}

/// In which a line that is under way is written.
const PAUSE: Duration = Duration::from_millis(500);

fn lines(path: &Path) -> usize {
    std::fs::read_to_string(path).map_or(0, |text| text.lines().count())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_begins_and_ends_with_the_configuration() {
    let running = Running::start(&often("mode: shadow")).await;
    let record = running.file.with_file_name("record.jsonl");
    running.write(&often(&format!("mode: shadow, record: {{path: {}}}", record.display())));
    running.wait_reloads("applied", 1);
    // It begins some time after it is told to.
    while lines(&record) == 0 {
        running.destination().await;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    tokio::time::sleep(PAUSE).await;
    let n_lines = lines(&record) + 3;
    for _ in 0..3 {
        running.destination().await;
    }
    wait_for_metric(&running.admin, &format!("warmroute_record_lines_total {n_lines}"));
    assert_eq!(lines(&record), n_lines);
    running.write(&often("mode: shadow"));
    running.wait_reloads("applied", 2);
    running.destination().await;
    // Time for one more line, if the record went on.
    tokio::time::sleep(PAUSE).await;
    assert_eq!(lines(&record), n_lines);
    assert!(std::fs::read_to_string(&record).unwrap().contains(r#""mode":"shadow""#));
    running.stop();
}
