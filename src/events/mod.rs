//! KV events: from the engines' sockets to the index.
//!
//! `socket` → [`wire`] → [`continuity`] → [`apply`] → [`crate::routing::index`]
//!
//! A *source* is one rank of one endpoint. Its life is a row of *generations*: in each, the batches of one publisher
//! process are applied in order and without holes, under one slot of the index. Whatever breaks that row (a
//! reconnection, a restart, batches that are gone) ends the generation, and with it all credit that came from it.

pub mod apply;
pub mod continuity;
#[cfg(test)]
mod model;
pub mod snapshot;
pub mod socket;
pub mod stats;
pub mod wire;
