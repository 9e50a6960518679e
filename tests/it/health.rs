//! `grpc.health.v1` on the ext_proc port.

use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};
use warmroute::extproc::reply::SelectionMode;

use crate::fakes::*;

fn about(service: &str) -> HealthCheckRequest {
    HealthCheckRequest { service: service.to_owned() }
}

fn status(answer: &HealthCheckResponse) -> ServingStatus {
    answer.status()
}

const READINESS: [&str; 4] = ["", "readiness", "envoy.service.ext_proc.v3.ExternalProcessor", "inference-extension"];

#[tokio::test]
async fn health_follows_readiness_and_liveness_follows_nothing() {
    let router = FakeRouter::start(&[([127, 0, 0, 1], 1).into()]).await;
    let mut client = health_client(router.address).await;
    let mut watch = client.watch(about("")).await.unwrap().into_inner();
    for expected in [ServingStatus::Serving, ServingStatus::NotServing, ServingStatus::Serving] {
        router.ready.send_replace(expected == ServingStatus::Serving);
        let told = async { while status(&watch.message().await.unwrap().unwrap()) != expected {} };
        tokio::time::timeout(DEADLINE, told).await.unwrap_or_else(|_| panic!("the watch is not told {expected:?}"));
        for name in READINESS {
            // The names change one after the other.
            let deadline = tokio::time::Instant::now() + DEADLINE;
            while status(client.check(about(name)).await.unwrap().get_ref()) != expected {
                assert!(tokio::time::Instant::now() < deadline, "{name:?} is not {expected:?}");
            }
        }
        let liveness = client.check(about("liveness")).await.unwrap();
        assert_eq!(status(liveness.get_ref()), ServingStatus::Serving);
    }
    let unknown = client.check(about("unknown")).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);
}

#[tokio::test]
async fn a_process_that_is_not_ready_yet_never_says_that_it_serves() {
    let silent = [([127, 0, 0, 1], 1).into()];
    let router = FakeRouter::start_unready(&silent, SelectionMode::OverrideHost, 1 << 20).await;
    let mut client = health_client(router.address).await;
    for name in READINESS {
        assert_eq!(status(client.check(about(name)).await.unwrap().get_ref()), ServingStatus::NotServing, "{name:?}");
    }
}

#[tokio::test]
async fn a_watch_keeps_no_router_from_stopping() {
    let router = FakeRouter::start(&[([127, 0, 0, 1], 1).into()]).await;
    let mut client = health_client(router.address).await;
    let mut watch = client.watch(about("")).await.unwrap().into_inner();
    watch.message().await.unwrap();
    router.shutdown.cancel();
    tokio::time::timeout(DEADLINE, router.server).await.unwrap().unwrap().unwrap();
}
