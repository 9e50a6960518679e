//! The way to the API server: kube's credentials, over connections that notice when nobody is there any more.

use std::time::Duration;

use hyper_util::client::legacy::Client as HttpClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::client::ConfigExt;
use kube::{Client, Config};
use tower::{BoxError, ServiceBuilder};

/// Longest that a connection may take.
const CONNECT: Duration = Duration::from_secs(5);
/// Silence on a connection after which the kernel asks whether the other side is still there, and then again.
const KEEPALIVE: Duration = Duration::from_secs(15);

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Neither a kubeconfig nor a pod's service account says where the API server is.
    #[error("there are no credentials for a Kubernetes API server, expected a kubeconfig or a pod's service account")]
    Credentials(#[source] kube::config::InferConfigError),
    /// The credentials cannot be used.
    #[error("the credentials for the Kubernetes API server cannot be used")]
    Build(#[source] kube::Error),
    /// A proxy is asked for.
    #[error("the kubeconfig names a proxy, expected an API server that is reached directly")]
    Proxy,
}

/// A client with the credentials of the kubeconfig (`KUBECONFIG`, `~/.kube/config`), or else of the pod's service
/// account. It connects when it is used.
///
/// # Errors
/// [`ClientError`] when there are none, or they cannot be used.
pub async fn infer_client() -> Result<Client, ClientError> {
    client(Config::infer().await.map_err(ClientError::Credentials)?)
}

/// A client for `config`. Must be called in a runtime of tokio.
///
/// It is put together here, of kube's parts, because kube's own stack retries and logs by itself: whoever asks has a
/// backoff, and logs an outage once.
///
/// # Errors
/// [`ClientError`] when its credentials cannot be used.
pub fn client(mut config: Config) -> Result<Client, ClientError> {
    if config.proxy_url.is_some() {
        return Err(ClientError::Proxy);
    }
    if config.cluster_url.scheme_str() == Some("http") {
        // Or the system's certificates would be looked for, which an image may not have.
        config.root_cert.get_or_insert_default();
    }
    let mut connector = HttpConnector::new();
    connector.enforce_http(false);
    connector.set_nodelay(true);
    connector.set_connect_timeout(Some(CONNECT));
    connector.set_keepalive(Some(KEEPALIVE));
    connector.set_keepalive_interval(Some(KEEPALIVE));
    connector.set_keepalive_retries(Some(2));
    let connector = config.rustls_https_connector_with_connector(connector).map_err(ClientError::Build)?;
    let http: HttpClient<_, kube::client::Body> = HttpClient::builder(TokioExecutor::new()).build(connector);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer().map_err(ClientError::Build)?)
        .layer(config.extra_headers_layer().map_err(ClientError::Build)?)
        .map_err(BoxError::from)
        .service(http);
    Ok(Client::new(service, config.default_namespace))
}
