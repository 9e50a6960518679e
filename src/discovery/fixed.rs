//! Endpoints that the configuration lists: always synced, never changing.

use std::net::SocketAddr;
use std::sync::Arc;

use crate::routing::endpoint::{Endpoint, EndpointId, EndpointSet};

/// Gives out numbers for endpoints: one counter for all pools of a process.
#[derive(Debug, Default)]
pub struct EndpointIds(u32);

impl EndpointIds {
    fn next(&mut self) -> EndpointId {
        self.0 += 1;
        EndpointId(self.0)
    }
}

/// The endpoint set of a list of addresses.
pub fn endpoint_set(addresses: impl IntoIterator<Item = SocketAddr>, ids: &mut EndpointIds) -> EndpointSet {
    let endpoints = addresses.into_iter().map(|address| Arc::new(Endpoint::new(ids.next(), address))).collect();
    EndpointSet { synced: true, endpoints }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_address_in_two_pools_is_two_endpoints() {
        let mut ids = EndpointIds::default();
        let address = SocketAddr::from(([127, 0, 0, 1], 8000));
        let (a, b) = (endpoint_set([address], &mut ids), endpoint_set([address], &mut ids));
        assert!(a.synced && b.synced);
        assert_ne!(a.endpoints[0].id, b.endpoints[0].id);
    }
}
