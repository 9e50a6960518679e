//! The `process_*` metrics that every Prometheus client library has, read from `/proc/self` at each scrape.
//!
//! Names and meanings are those of the Prometheus client guidelines ("Standard and runtime collectors"), so that
//! dashboards for any process work for this one. Where there is no `/proc`, there are none.

use std::fmt;
use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};

use nix::unistd::{SysconfVar, sysconf};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;

use super::catalog::{Instrument, Kind};

/// Reads the process's own files.
#[derive(Debug)]
pub(super) struct Process {
    /// When the process began, in Unix time. Known once: a clock that is set later must not move it.
    started: f64,
}

/// What the kernel knows of the process.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Usage {
    cpu_seconds: f64,
    resident_bytes: u64,
    virtual_bytes: u64,
    open_fds: u64,
    max_fds: Option<u64>,
}

const CPU: (&str, &str) = ("process_cpu_seconds", "Total user and system CPU time spent in seconds");
const RESIDENT: (&str, &str) = ("process_resident_memory_bytes", "Resident memory size in bytes");
const VIRTUAL: (&str, &str) = ("process_virtual_memory_bytes", "Virtual memory size in bytes");
const OPEN: (&str, &str) = ("process_open_fds", "Number of open file descriptors");
const MAX: (&str, &str) = ("process_max_fds", "Maximum number of open file descriptors");
const START: (&str, &str) = (
    "process_start_time_seconds",
    "Start time of the process since unix epoch in seconds; time() minus it is the uptime",
);

impl Process {
    pub(super) fn new() -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        Self { started: now - age_seconds().unwrap_or_default() }
    }

    /// When the process began, in nanoseconds of Unix time.
    pub(super) fn started_unix_nanos(&self) -> u64 {
        (self.started * 1e9) as u64
    }

    /// What is declared here.
    pub(super) fn instruments() -> Vec<Instrument> {
        let declared = |(name, help): (&str, &'static str), kind| {
            let name = if kind == Kind::Counter { format!("{name}_total") } else { name.to_owned() };
            Instrument { name, help, kind, labels: Vec::new() }
        };
        let gauges = [RESIDENT, VIRTUAL, OPEN, MAX, START].map(|gauge| declared(gauge, Kind::Gauge));
        std::iter::once(declared(CPU, Kind::Counter)).chain(gauges).collect()
    }
}

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut gauge = |(name, help): (&str, &str), value: f64| {
            encoder.encode_descriptor(name, &format!("{help}."), None, MetricType::Gauge)?.encode_gauge(&value)
        };
        gauge(START, self.started)?;
        let Some(usage) = usage() else { return Ok(()) };
        gauge(RESIDENT, usage.resident_bytes as f64)?;
        gauge(VIRTUAL, usage.virtual_bytes as f64)?;
        gauge(OPEN, usage.open_fds as f64)?;
        if let Some(max_fds) = usage.max_fds {
            gauge(MAX, max_fds as f64)?;
        }
        let (name, help) = CPU;
        encoder
            .encode_descriptor(name, &format!("{help}."), None, MetricType::Counter)?
            .encode_counter::<NoLabelSet, f64, f64>(&usage.cpu_seconds, None)
    }
}

fn usage() -> Option<Usage> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    let limits = fs::read_to_string("/proc/self/limits").ok()?;
    let ticks = sysconf(SysconfVar::CLK_TCK).ok()?? as f64;
    let page_bytes = u64::try_from(sysconf(SysconfVar::PAGE_SIZE).ok()??).ok()?;
    Some(Usage {
        cpu_seconds: (field(&stat, UTIME)? + field(&stat, STIME)?) as f64 / ticks,
        resident_bytes: field(&stat, RSS)? * page_bytes,
        virtual_bytes: field(&stat, VSIZE)?,
        // One of them is the directory that is being read.
        open_fds: (fs::read_dir("/proc/self/fd").ok()?.count() as u64).saturating_sub(1),
        max_fds: limits
            .lines()
            .find_map(|line| line.strip_prefix("Max open files")?.split_whitespace().next()?.parse().ok()),
    })
}

/// How long ago the process began, by the kernel's clock, which nobody sets.
fn age_seconds() -> Option<f64> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    let uptime = fs::read_to_string("/proc/uptime").ok()?;
    let uptime: f64 = uptime.split_whitespace().next()?.parse().ok()?;
    Some(uptime - field(&stat, START_TIME)? as f64 / sysconf(SysconfVar::CLK_TCK).ok()?? as f64)
}

/// Numbers of the fields of `/proc/PID/stat`, as `proc_pid_stat(5)` counts them.
const UTIME: usize = 14;
const STIME: usize = 15;
const START_TIME: usize = 22;
const VSIZE: usize = 23;
const RSS: usize = 24;

/// A field after the program's name, which stands in parentheses and may hold anything, spaces included.
fn field(stat: &str, number: usize) -> Option<u64> {
    let (_, after_name) = stat.rsplit_once(") ")?;
    after_name.split_whitespace().nth(number - 3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_counted_from_behind_the_name() {
        let stat = format!("7 (a) b) S {}", (4..=24).map(|n| n.to_string()).collect::<Vec<_>>().join(" "));
        assert_eq!(field(&stat, UTIME), Some(14));
        assert_eq!(field(&stat, RSS), Some(24));
        assert_eq!(field(&stat, 99), None);
    }

    #[test]
    fn this_process_has_memory_files_and_a_start() {
        let usage = usage().expect("tests run where there is /proc");
        assert!(usage.resident_bytes > 1 << 20 && usage.virtual_bytes > usage.resident_bytes, "{usage:?}");
        assert!(usage.open_fds >= 3 && usage.max_fds.is_none_or(|max| max >= usage.open_fds), "{usage:?}");
        let age = age_seconds().expect("tests run where there is /proc");
        assert!((0.0..86_400.0).contains(&age), "{age}");
    }
}
