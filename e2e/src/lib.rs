//! Harness of warmroute: gets, starts and stops the real parts that the tests, the demo and the measurements run
//! against, and simulates engines.
//!
//! - [`cache`] keeps what is fetched or built once; [`fetch`] gets Envoy into it, [`vllm`] installs and runs vLLM.
//! - [`process`] ends programs together with their children, [`tool`] runs programs to their end, [`service`] waits
//!   until a program serves; [`envoy`] and [`router`] are such programs.
//! - [`http`] is the client that all of them are asked with.
//! - [`sim`] is an engine without a model: vLLM's cache rules, events and HTTP surface; [`engines`] are these or real
//!   ones.
//! - [`kube`] builds and runs Kubernetes' API server, Helm and Envoy Gateway.
//! - [`collector`] is an OpenTelemetry Collector and the spans that it has received.
//! - [`stack`] is engines, router and Envoy as one value, for tests.
//! - [`publisher`] is an engine's event publisher alone, to be killed and replaced; [`proxy`] makes the network between
//!   it and a subscriber bad.
//! - [`faults`] has the event plane live through what can go wrong between them, and the router through tokenizers that
//!   fail.
//! - [`audit`] counts what was sent and applied without faults; [`lag`] measures how long it takes.
//! - [`cost`] measures what the router takes of processors and network, [`coverage`] which lines the tests run.
//! - [`suites`] are all tests or measurements of one kind by one command.
//! - [`workload`] → [`load`] → [`report`] is the flow of a measurement, which [`demo`] runs for each policy.

pub mod audit;
pub mod cache;
pub mod cli;
pub mod collector;
pub mod cost;
pub mod coverage;
pub mod demo;
pub mod engines;
pub mod envoy;
pub mod faults;
pub mod fetch;
pub mod http;
pub mod interrupt;
pub mod kube;
pub mod lag;
pub mod load;
pub mod process;
pub mod proxy;
pub mod publisher;
pub mod report;
pub mod router;
pub mod service;
pub mod sim;
pub mod stack;
pub mod suites;
pub mod tool;
pub mod vllm;
pub mod workload;
