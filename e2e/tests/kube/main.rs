//! What runs in a cluster, on the real parts of one: API server, etcd, Helm, Envoy Gateway.
//!
//! All are ignored: the first run builds the programs, which takes many minutes (`cargo e2e tools`).

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod chart;
mod cluster;
mod discovery;
mod gateway;
mod samples;
mod script;
mod standalone;
