//! The chart `charts/warmroute`: what it renders, refuses, promises and installs.
//!
//! `charts/warmroute/ci` holds sets of values which together use every value; whatever is true of the chart is shown on
//! each of them.

mod agreement;
mod helm;
mod install;
mod metrics;
mod pods;
mod readme;
mod refused;
mod rights;
mod translation;
mod walkthrough;
