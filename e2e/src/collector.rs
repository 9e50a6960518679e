//! A real OpenTelemetry Collector, and the spans and metrics that it has received.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tokio::net::TcpStream;

use crate::service::Service;

const START_DEADLINE: Duration = Duration::from_secs(20);
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// A running collector; it ends when it is dropped.
#[derive(Debug)]
pub struct Collector {
    service: Service,
    address: SocketAddr,
    file: PathBuf,
    metrics_file: PathBuf,
}

/// A span as the collector has received it.
#[derive(Clone, Debug)]
pub struct Span {
    /// `service.name` of who made it.
    pub service: String,
    /// Its name.
    pub name: String,
    /// Ids in hexadecimal; the parent's is empty for a root.
    pub trace_id: String,
    /// Its own id.
    pub id: String,
    /// Its parent's.
    pub parent_id: String,
    /// `SpanKind` of OTLP: 1 internal, 2 server, 3 client.
    pub kind: u64,
    /// `StatusCode` of OTLP: 0 unset, 1 ok, 2 error.
    pub status: u64,
    /// Start and end, nanoseconds since 1970.
    pub time: (u64, u64),
    attributes: Value,
}

impl Span {
    /// The value of an attribute, numbers as text.
    pub fn attribute(&self, key: &str) -> Option<String> {
        let found = self.attributes.as_array()?.iter().find(|attribute| attribute["key"] == key)?;
        let value = found["value"].as_object()?.values().next()?;
        Some(value.as_str().map_or_else(|| value.to_string(), str::to_owned))
    }
}

impl Collector {
    /// Starts `binary` at `address`, with its configuration, log and spans in `dir`, and waits until it takes spans.
    /// What an earlier one has written there is kept.
    ///
    /// # Errors
    /// When it does not start.
    pub async fn start(binary: &Path, dir: &Path, address: SocketAddr) -> Result<Self> {
        let (file, metrics_file) = (dir.join("spans.jsonl"), dir.join("metrics.jsonl"));
        let config = json!({
            "receivers": {"otlp": {"protocols": {"grpc": {"endpoint": address}}}},
            "exporters": {
                "file": {"path": file, "append": true, "flush_interval": "50ms"},
                "file/metrics": {"path": metrics_file, "append": true, "flush_interval": "50ms"},
            },
            "service": {
                // Its own metrics would take a port.
                "telemetry": {"metrics": {"level": "none"}},
                "pipelines": {
                    "traces": {"receivers": ["otlp"], "exporters": ["file"]},
                    "metrics": {"receivers": ["otlp"], "exporters": ["file/metrics"]},
                },
            },
        });
        let config_file = dir.join("otelcol.yaml");
        fs::write(&config_file, config.to_string())?;
        let mut command = Command::new(binary);
        command.arg("--config").arg(&config_file);
        let service = Service::start("otelcol", command, &dir.join("otelcol.log"))?;
        let collector = Self { service, address, file, metrics_file };
        collector.wait_ready().await?;
        Ok(collector)
    }

    async fn wait_ready(&self) -> Result<()> {
        let deadline = Instant::now() + START_DEADLINE;
        while TcpStream::connect(self.address).await.is_err() {
            let log = || fs::read_to_string(self.service.log()).unwrap_or_default();
            ensure!(!self.service.has_exited()?, "otelcol exited: {}", log());
            ensure!(Instant::now() < deadline, "otelcol takes no connections {START_DEADLINE:?} after its start");
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        Ok(())
    }

    /// Where it takes spans and metrics, OTLP over gRPC.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The program.
    pub fn service(&self) -> &Service {
        &self.service
    }

    /// Ends it without a word.
    ///
    /// # Errors
    /// When it cannot be signalled.
    pub async fn kill(self) -> Result<()> {
        self.service.kill().await
    }

    /// All that it has received of one service, as JSON, whatever it is.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn text_of(&self, service: &str) -> Result<String> {
        let of_service = |resource: &&Value| service_name(resource) == service;
        let batches = self.batches()?;
        let resources = batches.iter().flat_map(|batch| list(&batch["resourceSpans"]));
        Ok(resources.filter(of_service).map(Value::to_string).collect::<Vec<_>>().join("\n"))
    }

    /// All metrics that it has received, as JSON; empty before the first.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn metrics_text(&self) -> Result<String> {
        if !self.metrics_file.exists() {
            return Ok(String::new());
        }
        fs::read_to_string(&self.metrics_file).with_context(|| format!("cannot read {}", self.metrics_file.display()))
    }

    fn batches(&self) -> Result<Vec<Value>> {
        if !self.file.exists() {
            return Ok(Vec::new());
        }
        let text = fs::read_to_string(&self.file).with_context(|| format!("cannot read {}", self.file.display()))?;
        // The last line may not be whole yet.
        let lines = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
        lines.map(|line| serde_json::from_str(line).context("the collector wrote no JSON")).collect()
    }

    /// The spans received so far.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn spans(&self) -> Result<Vec<Span>> {
        let mut spans = Vec::new();
        for batch in self.batches()? {
            for resource in list(&batch["resourceSpans"]) {
                let scopes = list(&resource["scopeSpans"]);
                let service = service_name(resource);
                spans.extend(scopes.flat_map(|scope| list(&scope["spans"])).map(|span| read(service, span)));
            }
        }
        Ok(spans)
    }

    /// Waits until the spans received are as `is_complete` wants them, and returns them.
    ///
    /// # Errors
    /// When that takes longer than 20 s.
    pub async fn wait_spans(&self, is_complete: impl Fn(&[Span]) -> bool) -> Result<Vec<Span>> {
        let deadline = Instant::now() + START_DEADLINE;
        loop {
            let spans = self.spans()?;
            if is_complete(&spans) {
                return Ok(spans);
            }
            let names: Vec<_> = spans.iter().map(|span| format!("{} {}", span.service, span.name)).collect();
            ensure!(Instant::now() < deadline, "the collector has only {names:?}");
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn service_name(resource: &Value) -> &str {
    let name = list(&resource["resource"]["attributes"]).find(|attribute| attribute["key"] == "service.name");
    name.and_then(|attribute| attribute["value"]["stringValue"].as_str()).unwrap_or_default()
}

fn read(service: &str, span: &Value) -> Span {
    let text = |key: &str| span[key].as_str().unwrap_or_default().to_owned();
    let nanoseconds = |key: &str| text(key).parse().unwrap_or_default();
    Span {
        service: service.to_owned(),
        name: text("name"),
        trace_id: text("traceId"),
        id: text("spanId"),
        parent_id: text("parentSpanId"),
        kind: span["kind"].as_u64().unwrap_or_default(),
        status: span["status"]["code"].as_u64().unwrap_or_default(),
        time: (nanoseconds("startTimeUnixNano"), nanoseconds("endTimeUnixNano")),
        attributes: span["attributes"].clone(),
    }
}
