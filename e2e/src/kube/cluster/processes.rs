//! The two programs, with the flags that make a control plane of them.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::kube::certificates::{ACCOUNTS_KEY, ACCOUNTS_PUBLIC_KEY, SERVER_CERTIFICATE, SERVER_KEY};
use crate::service::{Service, lasting_addresses};
use crate::tool::tail;

use super::api::Api;

/// The API server takes 5 s on an idle machine of two cores.
const START_DEADLINE: Duration = Duration::from_secs(90);
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// Who signs the tokens of service accounts, and whom they are for when nobody else is named.
const ISSUER: &str = "https://kubernetes.default.svc";

/// What the API server is started with, each time anew.
#[derive(Debug)]
pub(super) struct Settings {
    binary: PathBuf,
    dir: PathBuf,
    pub(super) address: SocketAddr,
    pub(super) etcd: EtcdAddresses,
    pub(super) admin_token: String,
    args: Vec<String>,
}

impl Settings {
    /// Chooses the addresses, and writes the admin's token to where the API server reads it.
    pub(super) fn new(dir: &Path, binary: PathBuf, args: Vec<String>) -> Result<Self> {
        let [address, client, peer] = lasting_addresses()?;
        let admin_token = format!("{:032x}", fastrand::u128(..));
        let tokens = format!("{admin_token},admin,admin,system:masters\n");
        fs::write(dir.join("tokens.csv"), tokens).context("cannot write tokens.csv")?;
        let etcd = EtcdAddresses { client, peer };
        Ok(Self { binary, dir: dir.to_owned(), address, etcd, admin_token, args })
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.binary);
        let mut flag = |name: &str, value: &str| {
            command.arg(format!("--{name}={value}"));
        };
        let file = |name: &str| self.dir.join(name).to_string_lossy().into_owned();
        flag("etcd-servers", &format!("http://{}", self.etcd.client));
        // It would compact every five minutes; tests say when.
        flag("etcd-compaction-interval", "0");
        flag("bind-address", &self.address.ip().to_string());
        flag("secure-port", &self.address.port().to_string());
        flag("tls-cert-file", &file(SERVER_CERTIFICATE));
        flag("tls-private-key-file", &file(SERVER_KEY));
        flag("token-auth-file", &file("tokens.csv"));
        flag("authorization-mode", "RBAC");
        flag("service-account-issuer", ISSUER);
        flag("service-account-key-file", &file(ACCOUNTS_PUBLIC_KEY));
        flag("service-account-signing-key-file", &file(ACCOUNTS_KEY));
        flag("service-cluster-ip-range", "10.96.0.0/16");
        // Endpoints of the service `kubernetes` may not be on the loopback address.
        flag("endpoint-reconciler-type", "none");
        flag("allow-privileged", "true");
        command.args(&self.args);
        command
    }
}

/// A running API server.
#[derive(Debug)]
pub(super) struct ApiServer {
    service: Service,
}

impl ApiServer {
    /// Starts it, and waits until it is ready.
    pub(super) async fn start(settings: &Settings, api: &Api) -> Result<Self> {
        let log = settings.dir.join("kube-apiserver.log");
        let service = Service::start("kube-apiserver", settings.command(), &log)?;
        let deadline = Instant::now() + START_DEADLINE;
        while !api.is_ready().await {
            let said =
                || format!("{} ends with:\n{}", log.display(), tail(&fs::read_to_string(&log).unwrap_or_default()));
            ensure!(!service.has_exited()?, "kube-apiserver exited while starting; {}", said());
            ensure!(Instant::now() < deadline, "kube-apiserver is not ready after {START_DEADLINE:?}; {}", said());
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        // Whatever else might answer there has not our authority's certificate.
        Ok(Self { service })
    }

    pub(super) async fn kill(self) -> Result<()> {
        self.service.kill().await
    }
}

/// Where etcd listens.
#[derive(Clone, Copy, Debug)]
pub(super) struct EtcdAddresses {
    client: SocketAddr,
    peer: SocketAddr,
}

/// A running etcd.
#[derive(Debug)]
pub(super) struct Etcd {
    _service: Service,
    client: SocketAddr,
}

impl Etcd {
    /// Starts it on an empty directory, and waits until it is ready.
    pub(super) async fn start(binary: &Path, dir: &Path, addresses: EtcdAddresses) -> Result<Self> {
        let EtcdAddresses { client, peer } = addresses;
        let mut command = Command::new(binary);
        command.arg("--data-dir").arg(dir.join("etcd"));
        command.arg(format!("--listen-client-urls=http://{client}"));
        command.arg(format!("--advertise-client-urls=http://{client}"));
        command.arg(format!("--listen-peer-urls=http://{peer}"));
        command.arg(format!("--initial-advertise-peer-urls=http://{peer}"));
        command.arg(format!("--initial-cluster=default=http://{peer}"));
        // What it holds need not outlive the machine.
        command.arg("--unsafe-no-fsync");
        let service = Service::start("etcd", command, &dir.join("etcd.log"))?;
        service.wait_ready(&format!("http://{client}/health"), START_DEADLINE).await?;
        Ok(Self { _service: service, client })
    }

    /// Forgets all revisions before the present one.
    pub(super) async fn compact(&self) -> Result<()> {
        // Any key will do, "AA==" is a zero byte: the answer's header tells the revision.
        let answer = self.call("kv/range", &json!({"key": "AA=="})).await?;
        let revision = &answer["header"]["revision"];
        ensure!(revision.is_string(), "etcd answered {answer}, expected its revision");
        self.call("kv/compaction", &json!({"revision": revision, "physical": true})).await.map(drop)
    }

    /// Calls etcd's JSON gateway.
    async fn call(&self, method: &str, body: &Value) -> Result<Value> {
        let request = crate::http::client().post(format!("http://{}/v3/{method}", self.client)).json(body);
        let answer = request.send().await.with_context(|| format!("etcd: {method}"))?;
        let status = answer.status();
        let text = answer.text().await.with_context(|| format!("etcd: {method}: answer"))?;
        ensure!(status.is_success(), "etcd: {method}: {status}: {text}");
        serde_json::from_str(&text).with_context(|| format!("etcd: {method}: {text:?} is not JSON"))
    }
}
