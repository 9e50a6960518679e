//! `grpc.health.v1` on the ext_proc port: whether the process should be sent requests, as `/readyz` says it.
//!
//! Envoy's health checks and Kubernetes' gRPC probes ask for the empty name, the endpoint-picker protocol for `liveness`,
//! `readiness` and the name of the ext_proc service, its conformance tests for `inference-extension`. A watch is told
//! each change. Liveness depends on nothing.

use std::convert::Infallible;

use tokio::sync::watch;
use tonic_health::ServingStatus;
use tonic_health::pb::health_server::{Health, HealthServer};
use tonic_health::server::HealthReporter;

/// Names under which the health of requests is asked for.
const READINESS: [&str; 4] = ["", "readiness", "envoy.service.ext_proc.v3.ExternalProcessor", "inference-extension"];
const LIVENESS: &str = "liveness";

/// The service, and what has it follow `ready` for as long as it is polled.
pub async fn service(
    mut ready: watch::Receiver<bool>,
) -> (HealthServer<impl Health>, impl Future<Output = Infallible> + Send) {
    let (reporter, service) = tonic_health::server::health_reporter();
    reporter.set_service_status(LIVENESS, ServingStatus::Serving).await;
    // Before anybody can ask: the reporter begins with the empty name serving.
    let is_ready = *ready.borrow_and_update();
    report(&reporter, is_ready).await;
    (service, follow(reporter, ready))
}

async fn follow(reporter: HealthReporter, mut ready: watch::Receiver<bool>) -> Infallible {
    while ready.changed().await.is_ok() {
        let is_ready = *ready.borrow_and_update();
        report(&reporter, is_ready).await;
    }
    // Whoever could say otherwise is gone.
    std::future::pending().await
}

async fn report(reporter: &HealthReporter, is_ready: bool) {
    let status = if is_ready { ServingStatus::Serving } else { ServingStatus::NotServing };
    for name in READINESS {
        reporter.set_service_status(name, status).await;
    }
}
