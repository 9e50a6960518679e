//! Traces: one server span per ext_proc stream, below the span of Envoy that the stream belongs to, and below that one
//! span per step of its decision.
//!
//! - [`span`] makes them. A request that is not sampled has none, and costs the look at its trace context.
//! - [`export`] sends them, off the path of requests, and counts what it could not send.
//!
//! Spans are of the `tracing` crate, so that modules which know nothing of this one, such as [`crate::engine`], can add
//! their own. They are no part of log lines, and log lines no part of them.

pub mod export;
pub mod span;

pub use export::SHUTDOWN_DEADLINE;
pub use span::{RequestSpan, StageSpan, attribute, request_span, stage_failed};
