//! Endpoints and the sets that requests choose from.

use std::net::SocketAddr;
use std::sync::Arc;

use super::load::Load;

/// Number of an endpoint, given once by discovery and never reused within a process.
///
/// An endpoint that leaves and comes back gets a new one, so that late knowledge about the old one can
/// never be credited to the new one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EndpointId(pub u32);

/// One vLLM server, as Envoy dials it.
#[derive(Debug)]
pub struct Endpoint {
    /// Identity inside this process.
    pub id: EndpointId,
    /// IP literal and port, exactly as in Envoy's cluster.
    pub address: SocketAddr,
    /// What this router knows of its load and its recent failures.
    pub load: Load,
}

impl Endpoint {
    /// A new endpoint with nothing in flight.
    pub fn new(id: EndpointId, address: SocketAddr) -> Self {
        Self { id, address, load: Load::default() }
    }
}

/// Immutable snapshot of the endpoints of one pool.
#[derive(Clone, Debug, Default)]
pub struct EndpointSet {
    /// Whether discovery has listed the pool at least once; an unsynced set says nothing about the pool.
    pub synced: bool,
    /// The endpoints, in no particular order, without duplicates.
    pub endpoints: Vec<Arc<Endpoint>>,
}
