//! Envoy Gateway with the resources of an API server.
//!
//! In its pod it finds its certificate in `/certs`, a path that cannot be set. So it runs with a root directory of its
//! own, in a user and mount namespace (`unshare`), which needs no rights on the machine.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use reqwest::Method;
use serde_json::{Value, json};

use crate::cache::Cache;
use crate::fetch;
use crate::kube::{Cluster, tools};
use crate::service::Service;
use crate::tool::run;

use super::{Ports, READY, START_DEADLINE, config_dump, wait_for, write_config};

/// Where it is installed, by its own default.
const NAMESPACE: &str = "envoy-gateway-system";
/// Envoy's admin interface, as it is told in its pod.
const ENVOY_ADMIN: &str = "127.0.0.1:19000";
/// Makes a root directory of nothing but what is named: `$1` the root, `$2` the certificates, then a directory to share
/// and the command.
const WITH_CERTS: &str = r#"
root=$1 certs=$2 shared=$3; shift 3
mount -t tmpfs none "$root"
mkdir -p "$root/certs" "$root/dev" "$root/proc" "$root/tmp" "$root/var/lib/eg" "$root/bin" "$root$shared"
mount --bind "$certs" "$root/certs"
mount --bind "$shared" "$root$shared"
mount --rbind /dev "$root/dev"
mount --rbind /proc "$root/proc"
mount --bind "$(dirname "$1")" "$root/bin"
program=/bin/$(basename "$1"); shift
exec chroot "$root" "$program" "$@"
"#;

/// A running Envoy Gateway; it ends when it is dropped.
#[derive(Debug)]
pub struct InCluster {
    dir: PathBuf,
    envoy: PathBuf,
    service: Service,
    _ports: Ports,
}

impl InCluster {
    /// Starts it on `cluster`, which has the definitions of its resources, and waits until it has read them.
    ///
    /// # Errors
    /// When it can't be built or does not start.
    pub async fn start(cache: &Cache, cluster: &Cluster) -> Result<Self> {
        let get = {
            let cache = cache.clone();
            move || Ok::<_, anyhow::Error>((tools::envoy_gateway(&cache)?, fetch::envoy(&cache)?))
        };
        let (binary, envoy) = tokio::task::spawn_blocking(get).await.context("getting Envoy Gateway panicked")??;
        let ports = Ports::take(cache).await?;
        let dir = cluster.dir().join("envoy-gateway");
        let [root, certs] = ["root", "certs"].map(|name| dir.join(name));
        fs::create_dir_all(&root).with_context(|| format!("cannot create {}", root.display()))?;
        cluster.create_namespace(NAMESPACE).await?;
        run(Command::new(&binary)
            .args(["certgen", "--disable-topology-injector"])
            .env("KUBECONFIG", cluster.kubeconfig()))?;
        write_secret(cluster, "envoy-gateway", &certs).await?;
        let config = dir.join("envoy-gateway.yaml");
        let kubernetes = json!({"leaderElection": {"disable": true}, "proxyTopologyInjector": {"disabled": true}});
        write_config(&config, &json!({"type": "Kubernetes", "kubernetes": kubernetes}))?;
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--mount", "sh", "-euc", WITH_CERTS, "sh"]);
        command.arg(&root).arg(&certs).arg(cluster.dir()).arg(&binary).arg("server").arg("--config-path").arg(&config);
        command.env("KUBECONFIG", cluster.kubeconfig());
        let service = Service::start("envoy-gateway", command, &dir.join("envoy-gateway.log"))?;
        service.wait_ready(READY, START_DEADLINE).await?;
        Ok(Self { dir, envoy, service, _ports: ports })
    }

    /// What it wrote.
    pub fn log(&self) -> &Path {
        self.service.log()
    }

    /// Runs the Envoy of `gateway`, as the kubelet would, and tells the API server that it runs, at `address`.
    ///
    /// # Errors
    /// When Envoy Gateway asks for none, or it does not become ready.
    pub async fn run_envoy(&self, cluster: &Cluster, gateway: &str, address: &str) -> Result<GatewayEnvoy> {
        let owned = format!("labelSelector=gateway.envoyproxy.io/owning-gateway-name={gateway}");
        let deployments = format!("/apis/apps/v1/namespaces/{NAMESPACE}/deployments?{owned}");
        let first = async || {
            let found = cluster.request(Method::GET, &deployments, None).await.ok()?;
            found["items"].get(0).cloned()
        };
        let deployment = wait_for(&format!("a Deployment of {gateway}"), START_DEADLINE, first).await?;
        let name = deployment["metadata"]["name"].as_str().context("a Deployment has a name")?;
        let envoy = self.start_envoy(cluster, name, &deployment).await?;
        let ready =
            json!({"status": {"replicas": 1, "readyReplicas": 1, "availableReplicas": 1, "updatedReplicas": 1}});
        let path = format!("/apis/apps/v1/namespaces/{NAMESPACE}/deployments/{name}/status");
        cluster.request(Method::PATCH, &path, Some(&ready)).await?;
        let ingress = json!({"status": {"loadBalancer": {"ingress": [{"ip": address}]}}});
        let path = format!("/api/v1/namespaces/{NAMESPACE}/services/{name}/status");
        cluster.request(Method::PATCH, &path, Some(&ingress)).await?;
        Ok(envoy)
    }

    /// Starts Envoy with the arguments and files of the container, but for where the files and Envoy Gateway are.
    async fn start_envoy(&self, cluster: &Cluster, name: &str, deployment: &Value) -> Result<GatewayEnvoy> {
        let [certs, sds] = ["envoy-certs", "sds"].map(|name| self.dir.join(name));
        let here = |text: &str| {
            let text = text.replace("envoy-gateway.envoy-gateway-system.svc.cluster.local.", "127.0.0.1");
            let text = text.replace("/certs/", &format!("{}/", certs.display()));
            text.replace("/sds/", &format!("{}/", sds.display())).replace("$(ENVOY_POD_NAME)", "envoy-pod")
        };
        write_secret(cluster, "envoy", &certs).await?;
        let path = format!("/api/v1/namespaces/{NAMESPACE}/configmaps/{name}");
        let files = cluster.request(Method::GET, &path, None).await?;
        fs::create_dir_all(&sds).with_context(|| format!("cannot create {}", sds.display()))?;
        for (file, contents) in files["data"].as_object().context("the ConfigMap of Envoy is empty")? {
            fs::write(sds.join(file), here(contents.as_str().context("a file is text")?))?;
        }
        let containers = deployment["spec"]["template"]["spec"]["containers"].as_array();
        let container = containers.and_then(|all| all.iter().find(|container| container["name"] == "envoy"));
        let args = container.context("the Deployment has no container envoy")?["args"].as_array();
        let args = args.context("Envoy has no arguments")?.iter().filter_map(Value::as_str).map(here);
        let mut command = Command::new(&self.envoy);
        command.args(args).args(["--use-dynamic-base-id", "--concurrency", "1"]);
        let service = Service::start("envoy", command, &self.dir.join("envoy.log"))?;
        service.wait_ready(&format!("http://{ENVOY_ADMIN}/ready"), START_DEADLINE).await?;
        Ok(GatewayEnvoy { service })
    }
}

/// The Envoy of a Gateway; it ends when it is dropped.
#[derive(Debug)]
pub struct GatewayEnvoy {
    service: Service,
}

impl GatewayEnvoy {
    /// What it wrote.
    pub fn log(&self) -> &Path {
        self.service.log()
    }

    /// Its configuration, as soon as `accept` finds in it what it looks for.
    ///
    /// # Errors
    /// When that takes longer than `limit`.
    pub async fn config_when(&self, limit: Duration, accept: impl Fn(&Value) -> bool) -> Result<Value> {
        wait_for("what is looked for in Envoy's configuration", limit, async || {
            config_dump(ENVOY_ADMIN).await.ok().filter(|config| accept(config))
        })
        .await
    }

    /// Where a listener of port 80 is: Envoy Gateway adds 10000 to ports that need rights.
    pub fn address(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], 10_080))
    }
}

/// Writes the files of a secret into `dir`.
async fn write_secret(cluster: &Cluster, name: &str, dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    for file in ["ca.crt", "tls.crt", "tls.key"] {
        let template = format!("{{{{index .data {file:?} | base64decode}}}}");
        let args = ["get", "secret", name, "-n", NAMESPACE, "-o", "go-template", "--template", &template];
        let contents = cluster.kubectl(&args, None).await?;
        fs::write(dir.join(file), contents).with_context(|| format!("cannot write {file}"))?;
    }
    Ok(())
}
