//! etcd and an API server: a cluster as far as its API goes.
//!
//! There is no kubelet, no scheduler and no controller manager, so what they would do is left to the tests:
//! - A pod never runs. Its status is what a test writes ([`Cluster::set_pod_status`]). Given a `nodeName`, a deleted
//!   pod stays, terminating, until it is deleted without grace ([`Cluster::force_delete_pod`]); without, it is gone at
//!   once.
//! - Deployments make no pods, Services no EndpointSlices, and what an object owns outlives it. A deleted namespace
//!   stays.
//! - A new namespace has no service account `default`, without which it takes no pods ([`Cluster::create_namespace`]).
//!   Tokens are those of the TokenRequest API ([`Cluster::kubeconfig_for`]).
//!
//! The API server refuses loopback addresses in Endpoints and EndpointSlices, and takes them in the status of a pod.

mod api;
mod processes;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use reqwest::Method;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::cache::Cache;
use crate::tool::run_with_input;

use super::{certificates, crds, tools};
use api::Api;
use processes::{ApiServer, Etcd};

/// What a cluster is started with.
#[derive(Clone, Debug, Default)]
pub struct ClusterOptions {
    /// Whether the definitions of [`super::crds`] are loaded.
    pub crds: bool,
    /// Further flags of the API server.
    pub api_server_args: Vec<String>,
}

/// A running cluster; dropping it ends it and removes its files.
#[derive(Debug)]
pub struct Cluster {
    api_server: Option<ApiServer>,
    etcd: Etcd,
    api: Api,
    kubectl: PathBuf,
    kubeconfig: PathBuf,
    settings: processes::Settings,
    dir: TempDir,
}

impl Cluster {
    /// Starts etcd and the API server on free loopback ports, and waits until it is ready. Builds the programs first
    /// when `cache` does not hold them.
    ///
    /// # Errors
    /// When a program can't be built, or does not become ready: then the error ends with what its log says.
    pub async fn start(cache: &Cache, options: ClusterOptions) -> Result<Self> {
        let cache = cache.clone();
        let with_crds = options.crds;
        let get = move || Programs::get(&cache, with_crds);
        let programs = tokio::task::spawn_blocking(get).await.context("building the programs panicked")??;
        let dir = tempfile::Builder::new().prefix("warmroute-cluster-").tempdir().context("no directory")?;
        let authority = certificates::write(dir.path())?;
        let settings = processes::Settings::new(dir.path(), programs.kube_apiserver, options.api_server_args)?;
        let etcd = Etcd::start(&programs.etcd, dir.path(), settings.etcd).await?;
        let api = Api::new(settings.address, &authority, &settings.admin_token)?;
        let api_server = Some(ApiServer::start(&settings, &api).await?);
        let kubeconfig = dir.path().join("admin.kubeconfig");
        let kubectl = programs.kubectl;
        let cluster = Self { api_server, etcd, api, kubectl, kubeconfig, settings, dir };
        cluster.write_kubeconfig(&cluster.kubeconfig, &cluster.settings.admin_token, "default")?;
        cluster.create_default_account("default").await?;
        cluster.load_crds(&programs.crds).await?;
        Ok(cluster)
    }

    /// Where the cluster keeps its files and logs; the place for a test's own.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The URL of the API server.
    pub fn url(&self) -> String {
        format!("https://{}", self.settings.address)
    }

    /// A kubeconfig of a user who may do anything.
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// A kubeconfig with a token of a service account, whose namespace is that of the context.
    ///
    /// # Errors
    /// When there is no such account.
    pub async fn kubeconfig_for(&self, namespace: &str, service_account: &str) -> Result<PathBuf> {
        let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts/{service_account}/token");
        let request = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}});
        let answer = self.request(Method::POST, &path, Some(&request)).await?;
        let token = answer["status"]["token"].as_str().context("the TokenRequest was answered without a token")?;
        let file = self.dir.path().join(format!("{namespace}-{service_account}.kubeconfig"));
        self.write_kubeconfig(&file, token, namespace)?;
        Ok(file)
    }

    /// Runs `kubectl` as the admin, and returns what it prints.
    ///
    /// # Errors
    /// When it fails; the error ends with what it said.
    pub async fn kubectl(&self, args: &[&str], stdin: Option<&str>) -> Result<String> {
        let mut command = Command::new(&self.kubectl);
        command.arg("--kubeconfig").arg(&self.kubeconfig).args(args);
        // Its caches of the API's shape would be the owner's, and outlive the cluster.
        command.env("HOME", self.dir.path()).env_remove("KUBECONFIG").env_remove("KUBECACHEDIR");
        let input = stdin.unwrap_or_default().to_owned();
        let work = move || run_with_input(&mut command, &input);
        tokio::task::spawn_blocking(work).await.context("running kubectl panicked")?
    }

    /// Creates or changes the objects of `yaml`, with `kubectl apply --server-side`.
    ///
    /// # Errors
    /// When the API server refuses one of them.
    pub async fn apply(&self, yaml: &str) -> Result<()> {
        self.kubectl(&["apply", "--server-side", "--force-conflicts", "-f", "-"], Some(yaml)).await.map(drop)
    }

    /// Calls the API as the admin, without the time that `kubectl` takes to start. A PATCH is a JSON merge patch.
    ///
    /// # Errors
    /// When the answer is not of status 2xx.
    pub async fn request(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Value> {
        self.api.request(method, path, body).await
    }

    /// Creates a namespace with its service account `default`.
    ///
    /// # Errors
    /// When the API server refuses it.
    pub async fn create_namespace(&self, name: &str) -> Result<()> {
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
        self.request(Method::POST, "/api/v1/namespaces", Some(&namespace)).await?;
        self.create_default_account(name).await
    }

    /// Creates the pod of `yaml` in its namespace, or in `default`, and returns it as it was created.
    ///
    /// # Errors
    /// When this is no YAML, or the API server refuses it.
    pub async fn create_pod(&self, yaml: &str) -> Result<Value> {
        let pod: Value = serde_saphyr::from_str(yaml).context("the pod is not YAML")?;
        let namespace = pod["metadata"]["namespace"].as_str().unwrap_or("default");
        self.request(Method::POST, &format!("/api/v1/namespaces/{namespace}/pods"), Some(&pod)).await
    }

    /// Merges `status` into that of a pod, as its kubelet would.
    ///
    /// # Errors
    /// When the API server refuses it.
    pub async fn set_pod_status(&self, namespace: &str, pod: &str, status: &Value) -> Result<()> {
        let path = format!("/api/v1/namespaces/{namespace}/pods/{pod}/status");
        self.request(Method::PATCH, &path, Some(&json!({"status": status}))).await.map(drop)
    }

    /// Merges `patch` into a pod, all but its status.
    ///
    /// # Errors
    /// When the API server refuses it.
    pub async fn patch_pod(&self, namespace: &str, pod: &str, patch: &Value) -> Result<()> {
        let path = format!("/api/v1/namespaces/{namespace}/pods/{pod}");
        self.request(Method::PATCH, &path, Some(patch)).await.map(drop)
    }

    /// Deletes a pod with its grace period: one on a node is terminating then.
    ///
    /// # Errors
    /// When there is none.
    pub async fn delete_pod(&self, namespace: &str, pod: &str) -> Result<()> {
        let path = format!("/api/v1/namespaces/{namespace}/pods/{pod}");
        self.request(Method::DELETE, &path, None).await.map(drop)
    }

    /// Deletes a pod at once, as its kubelet does when it has ended.
    ///
    /// # Errors
    /// When there is none.
    pub async fn force_delete_pod(&self, namespace: &str, pod: &str) -> Result<()> {
        let path = format!("/api/v1/namespaces/{namespace}/pods/{pod}");
        self.request(Method::DELETE, &path, Some(&json!({"gracePeriodSeconds": 0}))).await.map(drop)
    }

    /// Ends the API server without a word (SIGKILL); etcd goes on.
    ///
    /// # Errors
    /// When it can't be signalled.
    pub async fn stop_api_server(&mut self) -> Result<()> {
        match self.api_server.take() {
            Some(api_server) => api_server.kill().await,
            None => Ok(()),
        }
    }

    /// Starts the API server again, on the same port, and waits until it is ready.
    ///
    /// # Errors
    /// When it does not become ready.
    pub async fn start_api_server(&mut self) -> Result<()> {
        self.stop_api_server().await?;
        self.api_server = Some(ApiServer::start(&self.settings, &self.api).await?);
        Ok(())
    }

    /// Makes etcd forget all but the present state. Who then asks the API server to go on from an older one is told
    /// 410, unless the API server remembers it: start it anew to be sure.
    ///
    /// # Errors
    /// When etcd refuses.
    pub async fn compact_etcd(&self) -> Result<()> {
        self.etcd.compact().await
    }

    async fn create_default_account(&self, namespace: &str) -> Result<()> {
        let account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}});
        let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts");
        self.request(Method::POST, &path, Some(&account)).await.map(drop)
    }

    async fn load_crds(&self, files: &[PathBuf]) -> Result<()> {
        if files.is_empty() {
            return Ok(());
        }
        let files: Vec<_> = files.iter().map(|file| file.to_string_lossy().into_owned()).collect();
        let mut args = vec!["apply", "--server-side"];
        args.extend(files.iter().flat_map(|file| ["-f", file.as_str()]));
        self.kubectl(&args, None).await?;
        let established = ["wait", "--for=condition=Established", "--timeout=60s", "crd", "--all"];
        self.kubectl(&established, None).await.map(drop)
    }

    fn write_kubeconfig(&self, file: &Path, token: &str, namespace: &str) -> Result<()> {
        let authority = self.dir.path().join(certificates::AUTHORITY);
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "e2e", "cluster": {"server": self.url(), "certificate-authority": authority}}],
            "users": [{"name": "e2e", "user": {"token": token}}],
            "contexts": [{"name": "e2e", "context": {"cluster": "e2e", "user": "e2e", "namespace": namespace}}],
            "current-context": "e2e",
        });
        // JSON is YAML.
        fs::write(file, serde_json::to_vec_pretty(&config)?).with_context(|| format!("cannot write {}", file.display()))
    }
}

/// What a cluster is made of.
struct Programs {
    etcd: PathBuf,
    kube_apiserver: PathBuf,
    kubectl: PathBuf,
    crds: Vec<PathBuf>,
}

impl Programs {
    fn get(cache: &Cache, with_crds: bool) -> Result<Self> {
        Ok(Self {
            etcd: tools::etcd(cache)?,
            kube_apiserver: tools::kube_apiserver(cache)?,
            kubectl: tools::kubectl(cache)?,
            crds: if with_crds { crds(cache)? } else { Vec::new() },
        })
    }
}
