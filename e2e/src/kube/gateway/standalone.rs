//! Envoy Gateway without Kubernetes: resources from a file, Envoy as its child.
//!
//! It runs Envoy through func-e, which takes `<dataHome>/envoy-versions/<version>/bin/envoy` if that is there, and
//! would fetch it if not. Envoy ends with it, even when it is killed.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::cache::Cache;
use crate::fetch;
use crate::kube::tools;
use crate::service::{Service, free_addresses};
use crate::tool::{run, tail};

use super::{CONTROLLER, POLL_INTERVAL, Ports, READY, START_DEADLINE, config_dump, wait_for, write_config};

/// Name of the Gateway and of its class, in the namespace `default`.
const GATEWAY: &str = "llm";

/// A running Envoy Gateway with its Envoy; both end when it is dropped.
#[derive(Debug)]
pub struct Standalone {
    service: Service,
    address: SocketAddr,
    admin: String,
    _ports: Ports,
}

impl Standalone {
    /// Starts it in `dir` with `objects`, such as [`super::gateway_objects`] gives, and waits until Envoy serves. They
    /// find a Gateway `llm` in the namespace `default`, with one HTTP listener.
    ///
    /// # Errors
    /// When Envoy Gateway or Envoy can't be had or don't start.
    pub async fn start(cache: &Cache, dir: &Path, objects: &[Value]) -> Result<Self> {
        let get = {
            let cache = cache.clone();
            move || Ok::<_, anyhow::Error>((tools::envoy_gateway(&cache)?, fetch::envoy(&cache)?))
        };
        let (binary, envoy) = tokio::task::spawn_blocking(get).await.context("getting Envoy Gateway panicked")??;
        let ports = Ports::take(cache).await?;
        let [address] = free_addresses()?;
        let files = Files::write(dir, &envoy, address.port(), objects)?;
        run(files.command(&binary).args(["certgen", "--local", "--config-home"]).arg(&files.config_home))?;
        let mut command = files.command(&binary);
        command.arg("server").arg("--config-path").arg(&files.config);
        let service = Service::start("envoy-gateway", command, &dir.join("envoy-gateway.log"))?;
        service.wait_ready(READY, START_DEADLINE).await?;
        let admin = wait_for("the address of Envoy's admin interface", START_DEADLINE, async || files.admin()).await;
        let admin = admin.with_context(|| said(&service))?;
        let standalone = Self { service, address, admin, _ports: ports };
        standalone.wait_listening().await.with_context(|| said(&standalone.service))?;
        Ok(standalone)
    }

    /// The URL of `path` behind Envoy.
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// Envoy's admin interface, `host:port`.
    pub fn admin(&self) -> &str {
        &self.admin
    }

    /// What Envoy Gateway and Envoy wrote, and the conditions of each resource.
    pub fn log(&self) -> &Path {
        self.service.log()
    }

    /// Envoy's configuration.
    ///
    /// # Errors
    /// When Envoy does not answer.
    pub async fn config_dump(&self) -> Result<Value> {
        config_dump(&self.admin).await
    }

    /// Envoy is ready as soon as it has asked for its configuration; its listener comes with that.
    async fn wait_listening(&self) -> Result<()> {
        let limit = START_DEADLINE;
        let connect = async || tokio::net::TcpStream::connect(self.address).await.ok();
        wait_for(&format!("a listener on {}", self.address), limit, connect).await?;
        ensure!(!self.service.has_exited()?, "Envoy Gateway exited, but somebody listens on {}", self.address);
        tokio::time::sleep(POLL_INTERVAL).await;
        Ok(())
    }
}

fn said(service: &Service) -> String {
    let log = fs::read(service.log()).unwrap_or_default();
    format!("{} ends with:\n{}", service.log().display(), tail(&String::from_utf8_lossy(&log)))
}

/// What it reads and where it writes, all in one directory.
struct Files {
    dir: PathBuf,
    config: PathBuf,
    config_home: PathBuf,
    runtime_dir: PathBuf,
}

impl Files {
    fn write(dir: &Path, envoy: &Path, port: u16, objects: &[Value]) -> Result<Self> {
        let [config_home, data_home, state_home, runtime_dir, resources] =
            ["config", "data", "state", "run", "resources"].map(|name| dir.join(name));
        let bin = data_home.join("envoy-versions").join(fetch::ENVOY_VERSION).join("bin");
        for dir in [&config_home, &state_home, &runtime_dir, &resources, &bin] {
            fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        }
        symlink(envoy, bin.join("envoy")).context("cannot link to Envoy")?;
        let documents = gateway(port).into_iter().chain(objects.iter().cloned());
        // Documents of JSON are documents of YAML.
        let documents: Vec<_> = documents.map(|object| object.to_string()).collect();
        fs::write(resources.join("all.yaml"), documents.join("\n---\n")).context("cannot write the resources")?;
        let config = dir.join("envoy-gateway.yaml");
        write_config(
            &config,
            &json!({
                "type": "Custom",
                "custom": {
                    "resource": {"type": "File", "file": {"paths": [resources]}},
                    "infrastructure": {"type": "Host", "host": {
                        "configHome": config_home,
                        "dataHome": data_home,
                        "stateHome": state_home,
                        "runtimeDir": runtime_dir,
                    }},
                },
            }),
        )?;
        Ok(Self { dir: dir.to_owned(), config, config_home, runtime_dir })
    }

    fn command(&self, binary: &Path) -> Command {
        let mut command = Command::new(binary);
        // It keeps a cache of WebAssembly below the home directory.
        command.env("HOME", &self.dir).env_remove("KUBECONFIG");
        command
    }

    /// The address that Envoy has written into the directory of its run, the only one.
    fn admin(&self) -> Option<String> {
        let run = fs::read_dir(&self.runtime_dir).ok()?.flatten().next()?;
        let address = fs::read_to_string(run.path().join("admin-address.txt")).ok()?;
        Some(address.trim().to_owned()).filter(|address| !address.is_empty())
    }
}

/// The Gateway, its class, and how its Envoy is run: what an operator has before the chart is installed.
fn gateway(port: u16) -> Vec<Value> {
    let api = "gateway.networking.k8s.io/v1";
    let own_api = "gateway.envoyproxy.io/v1alpha1";
    let metadata = json!({"name": GATEWAY, "namespace": "default"});
    let parameters = json!({"group": "gateway.envoyproxy.io", "kind": "EnvoyProxy", "name": GATEWAY});
    vec![
        json!({"apiVersion": api, "kind": "GatewayClass", "metadata": {"name": GATEWAY},
               "spec": {"controllerName": CONTROLLER}}),
        json!({"apiVersion": own_api, "kind": "EnvoyProxy", "metadata": metadata, "spec": {
            "provider": {"type": "Host", "host": {"envoyVersion": fetch::ENVOY_VERSION}},
            "concurrency": 1,
            // Other Envoys of the harness run beside it.
            "extraArgs": ["--use-dynamic-base-id"],
        }}),
        json!({"apiVersion": api, "kind": "Gateway", "metadata": metadata, "spec": {
            "gatewayClassName": GATEWAY,
            "infrastructure": {"parametersRef": parameters},
            "listeners": [{"name": "http", "protocol": "HTTP", "port": port}],
        }}),
    ]
}
