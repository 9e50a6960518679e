//! Pushes the registry to an OpenTelemetry collector, for those who do not scrape.
//!
//! The same names, labels and values as at `/metrics`, under cumulative temporality; a collector that is down costs one
//! warning per outage and a count. One push is under way at a time and has a deadline, and nobody waits for it.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceRequest;
use opentelemetry_proto::tonic::collector::metrics::v1::metrics_service_client::MetricsServiceClient;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};
use tracing::{info, warn};

use super::catalog::Catalog;
use super::labels::PUSH_RESULT;
use super::{Metrics, otlp};
use crate::telemetry::service;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;

/// Longest that a push may take: a collector that takes longer is as good as gone.
const DEADLINE: Duration = Duration::from_secs(5);
/// Longest that the last push may take, at the end of the process.
const LAST_DEADLINE: Duration = Duration::from_secs(1);

/// Where and how often.
#[derive(Clone, Debug)]
pub struct Push {
    /// OTLP/gRPC collector, checked to be a URL.
    pub endpoint: String,
    /// Time between two pushes.
    pub interval: Duration,
}

/// Registered with the others, in [`Metrics`].
#[derive(Debug)]
pub(super) struct Instruments {
    pushes: Family<PushLabels, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PushLabels {
    result: &'static str,
}

impl Instruments {
    pub(super) fn register(catalog: &mut Catalog) -> Self {
        let pushes: Family<PushLabels, Counter> =
            catalog.add("metric_pushes", "Pushes of these metrics over OTLP", &[PUSH_RESULT]);
        for result in ["sent", "failed"] {
            drop(pushes.get_or_create(&PushLabels { result }));
        }
        Self { pushes }
    }
}

impl Push {
    /// Pushes until `shutdown`, and once more then, so that the last requests are counted.
    ///
    /// # Errors
    /// None: a collector that is away is waited for.
    ///
    /// # Panics
    /// When the endpoint is no URL, which the configuration checks.
    pub async fn run(self, metrics: Arc<Metrics>, shutdown: CancellationToken) -> Result<(), Infallible> {
        let endpoint = Endpoint::from_shared(self.endpoint).expect("the configuration takes URLs only");
        // Connects with the first push and again whenever the connection is lost.
        let client = MetricsServiceClient::new(endpoint.connect_timeout(DEADLINE).connect_lazy());
        let mut pusher = Pusher { client, metrics, is_failing: false };
        let mut ticks = tokio::time::interval(self.interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while shutdown.run_until_cancelled(ticks.tick()).await.is_some() {
            // What is under way when the process ends is not waited for: the last push has all of it.
            if shutdown.run_until_cancelled(pusher.push(DEADLINE)).await.is_none() {
                break;
            }
        }
        pusher.push(LAST_DEADLINE).await;
        Ok(())
    }
}

struct Pusher {
    client: MetricsServiceClient<Channel>,
    metrics: Arc<Metrics>,
    is_failing: bool,
}

impl Pusher {
    async fn push(&mut self, deadline: Duration) {
        let result = match tokio::time::timeout(deadline, self.client.export(self.request())).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(status)) => Err(status.message().to_owned()),
            Err(_) => Err(format!("no answer within {deadline:?}")),
        };
        let was_failing = std::mem::replace(&mut self.is_failing, result.is_err());
        let name = if result.is_ok() { "sent" } else { "failed" };
        self.metrics.pushes.pushes.get_or_create(&PushLabels { result: name }).inc();
        match result {
            Err(error) if !was_failing => warn!(error, "metrics cannot be pushed, trying again at each interval"),
            Ok(()) if was_failing => info!("metrics are pushed again"),
            _ => {}
        }
    }

    fn request(&self) -> ExportMetricsServiceRequest {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let times = otlp::Times {
            start_unix_nanos: self.metrics.started_unix_nanos,
            unix_nanos: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
        };
        otlp::request(&self.metrics.encode(), service::attributes(), times)
    }
}
