//! Where endpoints come from.
//!
//! A source publishes immutable [`EndpointSet`](crate::routing::endpoint::EndpointSet)s in a `watch` channel: they change
//! rarely and every request reads the newest one without a lock that anybody holds for long.

pub mod fixed;
