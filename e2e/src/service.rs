//! A program that serves HTTP: started with its output in a file, waited for, measured.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use reqwest::StatusCode;

use crate::process::{ProcessGroup, cpu_time};
use crate::tool::tail;

const POLL_INTERVAL: Duration = Duration::from_millis(20);
const LASTING_PORTS: std::ops::Range<u16> = 20_000..32_000;
const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);

/// A running program; dropping it ends it.
#[derive(Debug)]
pub struct Service {
    name: &'static str,
    group: ProcessGroup,
    log: PathBuf,
}

impl Service {
    /// Starts `command` with its output in `log`.
    ///
    /// # Errors
    /// When the log can't be created or the program can't be started.
    pub fn start(name: &'static str, mut command: Command, log: &Path) -> Result<Self> {
        let output = File::create(log).with_context(|| format!("cannot create {}", log.display()))?;
        let output_too = output.try_clone().context("cannot share the log file")?;
        command.stdout(output).stderr(output_too);
        Ok(Self { name, group: ProcessGroup::spawn(name, &mut command)?, log: log.to_owned() })
    }

    /// Waits until `url` answers 200.
    ///
    /// # Errors
    /// When the program exits first, or when `limit` is over; the error ends with the log's last lines.
    pub async fn wait_ready(&self, url: &str, limit: Duration) -> Result<()> {
        self.poll(url, limit).await.with_context(|| {
            let log = std::fs::read(&self.log).unwrap_or_default();
            format!("{} ends with:\n{}", self.log.display(), tail(&String::from_utf8_lossy(&log)))
        })
    }

    /// Ends it by SIGTERM, and waits.
    ///
    /// # Errors
    /// When it cannot be signalled.
    pub async fn stop(self) -> Result<()> {
        self.group.stop().await.map(|_| ())
    }

    /// [`Self::stop`] for one that has as long for it.
    ///
    /// # Errors
    /// As [`Self::stop`].
    pub async fn stop_within(self, grace: Duration) -> Result<()> {
        self.group.stop_within(grace).await.map(|_| ())
    }

    /// Ends it by SIGKILL, and waits.
    ///
    /// # Errors
    /// When it cannot be signalled.
    pub async fn kill(self) -> Result<()> {
        self.group.kill().await.map(|_| ())
    }

    /// Whether it has exited.
    ///
    /// # Errors
    /// When the kernel does not know it.
    pub fn has_exited(&self) -> Result<bool> {
        self.group.has_exited()
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.group.id()
    }

    /// What the program wrote, standard output and error together.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Resident memory in bytes (`VmRSS` in `/proc/<pid>/status`).
    ///
    /// # Errors
    /// When the program has exited.
    pub fn resident_bytes(&self) -> Result<u64> {
        let id = self.group.id();
        let status = std::fs::read_to_string(format!("/proc/{id}/status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
        Ok(kib.with_context(|| format!("process {id} has no VmRSS"))? * 1024)
    }

    /// Processor time used so far, user and system.
    ///
    /// # Errors
    /// When the program has exited.
    pub fn cpu_time(&self) -> Result<Duration> {
        cpu_time(self.id())
    }

    async fn poll(&self, url: &str, limit: Duration) -> Result<()> {
        let http = crate::http::client_with_timeout(REQUEST_TIMEOUT);
        let deadline = Instant::now() + limit;
        loop {
            let answer = http.get(url).send().await;
            ensure!(!self.group.has_exited()?, "{} exited while starting", self.name);
            if answer.is_ok_and(|answer| answer.status() == StatusCode::OK) {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "{} is not ready {limit:?} after its start ({url})", self.name);
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }
}

/// Loopback addresses that a server can leave and come back to: their ports are below the range from which Linux takes
/// those of outgoing connections, one of which could have a port for itself in the meantime.
///
/// # Errors
/// When no port is free.
pub fn lasting_addresses<const N: usize>() -> Result<[SocketAddr; N]> {
    let mut listeners = Vec::with_capacity(N);
    let mut addresses = [SocketAddr::from((Ipv4Addr::LOCALHOST, 0)); N];
    for address in &mut addresses {
        let mut tries = (0..100).map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, fastrand::u16(LASTING_PORTS))));
        let listener = tries.find_map(Result::ok).with_context(|| format!("no free port in {LASTING_PORTS:?}"))?;
        *address = listener.local_addr().context("port of a listener")?;
        listeners.push(listener);
    }
    Ok(addresses)
}

/// Loopback addresses on whose ports nobody listened a moment ago, all different: they are held together before they
/// are given up.
///
/// # Errors
/// When no port is free.
pub fn free_addresses<const N: usize>() -> Result<[SocketAddr; N]> {
    let mut listeners = Vec::with_capacity(N);
    let mut addresses = [SocketAddr::from((Ipv4Addr::LOCALHOST, 0)); N];
    for address in &mut addresses {
        let listener = TcpListener::bind(*address).context("no free port")?;
        *address = listener.local_addr().context("port of a listener")?;
        listeners.push(listener);
    }
    Ok(addresses)
}
