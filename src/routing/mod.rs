//! The pure core: endpoints, block hashes, the prefix index, load, scoring and the pick.
//!
//! Nothing in here awaits, reads a clock or a socket, draws randomness of its own, or logs: time and
//! randomness are arguments. The same code therefore runs in the router, in a simulation and under a
//! deterministic test.

pub mod decision;
pub mod endpoint;
pub mod hash;
pub mod index;
pub mod load;
pub mod pick;
pub mod score;
pub mod standing;
