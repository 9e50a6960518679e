//! A Chromium without a window, driven as a person would: by what is on the page, clicks and keys, over WebDriver.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use e2e::http::client_with_timeout;
use e2e::service::{Service, free_addresses};
use reqwest::Method;
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(60);
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// A desktop's window, so that no table is cut.
const WINDOW: &str = "--window-size=1280,900";
/// No word to anybody but the router, and no help from a graphics card.
const FLAGS: [&str; 10] = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-breakpad",
    WINDOW,
];
/// Key under which WebDriver names an element (W3C WebDriver, "web element identifier").
const ELEMENT: &str = "element-6066-11e4-a52e-4f735466cecf";

/// A running browser with one tab. Both programs end when it is dropped: the driver first, which would else complain.
pub(crate) struct Browser {
    session: String,
    _driver: Service,
    _chromium: Service,
}

/// Installed by the system's packages.
pub(crate) fn program(name: &str, package: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap();
    let found = std::env::split_paths(&path).map(|dir| dir.join(name)).find(|path| path.is_file());
    found.unwrap_or_else(|| panic!("{name} is not installed: it comes with Debian's package {package}"))
}

impl Browser {
    /// Starts it, with everything that it writes in `dir`.
    pub(crate) async fn start(dir: &Path) -> Self {
        let (chromium, debugger) = start_chromium(dir).await;
        let [address] = free_addresses().unwrap();
        let mut command = Command::new(program("chromedriver", "chromium-driver"));
        command.arg(format!("--port={}", address.port()));
        let driver = Service::start("chromedriver", command, &dir.join("chromedriver.log")).unwrap();
        driver.wait_ready(&format!("http://{address}/status"), PATIENCE).await.unwrap();
        let capabilities = json!({
            "goog:chromeOptions": {"debuggerAddress": debugger},
            "goog:loggingPrefs": {"browser": "ALL"},
        });
        let url = format!("http://{address}/session");
        let made = call(Method::POST, &url, json!({"capabilities": {"alwaysMatch": capabilities}})).await.unwrap();
        let session = format!("{url}/{}", made["sessionId"].as_str().unwrap());
        Self { session, _driver: driver, _chromium: chromium }
    }

    pub(crate) async fn open(&self, url: &str) {
        self.ask(Method::POST, "/url", json!({"url": url})).await;
    }

    /// What a person reads where `selector` is; none where it is not shown.
    pub(crate) async fn text(&self, selector: &str) -> Option<String> {
        let script = "const node = document.querySelector(arguments[0]);
                      return node && node.getClientRects().length ? node.innerText : null";
        self.run(script, json!([selector])).await.as_str().map(str::to_owned)
    }

    /// How many elements there are.
    pub(crate) async fn count(&self, selector: &str) -> u64 {
        let script = "return document.querySelectorAll(arguments[0]).length";
        self.run(script, json!([selector])).await.as_u64().unwrap()
    }

    /// Waits until the text where `selector` is shown is as wanted.
    pub(crate) async fn wait(&self, selector: &str, is_wanted: impl Fn(&str) -> bool) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let text = self.text(selector).await;
            match text {
                Some(text) if is_wanted(&text) => return text,
                text => assert!(Instant::now() < deadline, "{selector} shows {text:?}"),
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    /// Clicks in the middle of it, as a mouse does: what lies above it gets the click.
    pub(crate) async fn click(&self, selector: &str) {
        let element = self.element(selector).await;
        self.ask(Method::POST, &format!("/element/{element}/click"), json!({})).await;
    }

    /// Types into it.
    pub(crate) async fn enter(&self, selector: &str, text: &str) {
        let element = self.element(selector).await;
        self.ask(Method::POST, &format!("/element/{element}/value"), json!({"text": text})).await;
    }

    /// What the browser complained of since it was asked last: errors of scripts, and what the policy of the page
    /// forbids.
    pub(crate) async fn complaints(&self) -> Vec<String> {
        let log = self.ask(Method::POST, "/se/log", json!({"type": "browser"})).await;
        log.as_array().unwrap().iter().map(Value::to_string).collect()
    }

    /// A picture of the whole page, PNG.
    pub(crate) async fn screenshot(&self) -> Vec<u8> {
        let how = json!({"cmd": "Page.captureScreenshot", "params": {"captureBeyondViewport": true}});
        let answer = self.ask(Method::POST, "/goog/cdp/execute", how).await;
        BASE64_STANDARD.decode(answer["data"].as_str().unwrap()).unwrap()
    }

    async fn element(&self, selector: &str) -> String {
        let how = json!({"using": "css selector", "value": selector});
        self.ask(Method::POST, "/element", how).await[ELEMENT].as_str().unwrap().to_owned()
    }

    async fn run(&self, script: &str, arguments: Value) -> Value {
        self.ask(Method::POST, "/execute/sync", json!({"script": script, "args": arguments})).await
    }

    async fn ask(&self, method: Method, path: &str, body: Value) -> Value {
        call(method, &format!("{}{path}", self.session), body).await.unwrap_or_else(|fault| panic!("{path}: {fault}"))
    }
}

/// Chromium is not left to the driver, which would have it outlive a driver that is killed.
async fn start_chromium(dir: &Path) -> (Service, SocketAddr) {
    let profile = dir.join("profile");
    let mut command = Command::new(program("chromium", "chromium"));
    command.args(FLAGS).arg("--remote-debugging-port=0").arg(format!("--user-data-dir={}", profile.display()));
    command.arg("about:blank");
    let chromium = Service::start("chromium", command, &dir.join("chromium.log")).unwrap();
    let deadline = Instant::now() + PATIENCE;
    loop {
        // Its first line is the port, once there is one.
        let text = fs::read_to_string(profile.join("DevToolsActivePort")).unwrap_or_default();
        if let Some(port) = text.lines().next().and_then(|line| line.parse::<u16>().ok()) {
            return (chromium, ([127, 0, 0, 1], port).into());
        }
        let log = || fs::read_to_string(chromium.log()).unwrap_or_default();
        assert!(!chromium.has_exited().unwrap(), "chromium exited: {}", log());
        assert!(Instant::now() < deadline, "chromium does not listen: {}", log());
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// `value` of the answer, or of an error its text.
async fn call(method: Method, url: &str, body: Value) -> Result<Value, String> {
    let answer = client_with_timeout(PATIENCE).request(method, url).json(&body).send().await.unwrap();
    let status = answer.status();
    let mut answer: Value = serde_json::from_str(&answer.text().await.unwrap()).unwrap();
    let value = answer["value"].take();
    if status.is_success() { Ok(value) } else { Err(format!("{status}: {value}")) }
}
