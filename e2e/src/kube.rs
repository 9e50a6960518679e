//! Kubernetes without nodes: the real API server on etcd, the real Helm and Envoy Gateway, on loopback addresses.
//!
//! - [`tools`] builds the programs, each from a Go module of its own below `e2e/tools/`.
//! - [`crds`] are the definitions that the chart's resources need, out of the modules that carry them.
//! - [`Cluster`] is etcd and an API server with RBAC.
//! - [`chart`] is what Helm makes of the chart, [`gateway`] what Envoy Gateway makes of that.

mod certificates;
pub mod chart;
mod cluster;
mod crds;
pub mod gateway;
mod go;
pub mod tools;

pub use cluster::{Cluster, ClusterOptions};
pub use crds::crds;
