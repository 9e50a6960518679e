//! The configuration is looked at again while the router runs: at an interval, and upon SIGHUP.
//!
//! The whole file is read and compared each time, for the reasons of [`crate::discovery::file`]: a ConfigMap changes by
//! the swap of a symlink. What is found is parsed whole, as at a start. A file with faults changes nothing and is named
//! once with all of them, and so is one that would take effect too early: a rollout that waits for Envoy to be set up
//! otherwise. It is tried again at each interval all the same, since a fault may lie in another file that it names, and
//! a key that cannot be read for a moment must not hold back the `off` that is written in that moment. Of a good one,
//! what may change at run time does, for requests that come from then on; streams that are open go on as they began.
//! What else differs is named once, and waits for the next start.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::Signal;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::config::{self, Config, ConfigFile, ReadError};
use crate::discovery::outage::error_chain;
use crate::extproc::decide::Router;
use crate::extproc::rollout::Mode;
use crate::record;
use crate::telemetry::LogFilter;
use crate::telemetry::metrics::{self, Metrics};

/// A file that has changed is looked at again after so long: half of a file may be a configuration, too.
const SETTLED: Duration = Duration::from_millis(50);
/// How often, at most, while it goes on changing.
const MOST_LOOKS: usize = 20;

/// Where a running configuration came from.
#[derive(Clone, Debug)]
pub struct ConfigText {
    /// The file.
    pub file: ConfigFile,
    /// What stood in it.
    pub text: String,
}

/// What may change at run time.
pub(super) struct Live {
    pub(super) router: Arc<Router>,
    pub(super) log_filter: LogFilter,
    pub(super) record: watch::Sender<record::Config>,
    pub(super) metrics: Arc<Metrics>,
}

impl Live {
    /// Makes the rollout of `config` hold.
    pub(super) fn roll_out(&self, config: &Config) {
        let of = |model: &config::Model| model.rollout.under(config.rollout.mode);
        // The instruments come last: who has seen what they say can rely on it.
        self.router.roll_out(|name| config.models.iter().find(|model| &*model.name == name).map(of));
        for model in &config.models {
            let rollout = of(model);
            let modes = Mode::ALL.map(|mode| (mode.as_str(), mode == rollout.mode));
            self.metrics.set_rollout(&model.name, modes, rollout.percent.get());
        }
        self.metrics.set_config_hash(config.hash());
    }

    fn set(&self, config: &Config) {
        self.roll_out(config);
        self.record.send_if_modified(|record| {
            let new = config.rollout.record.config();
            let is_other = *record != new;
            *record = new;
            is_other
        });
        if let Err(error) = self.log_filter.set(&config.log.filter) {
            warn!(error = error_chain(&error), "the log filter cannot be changed");
        }
    }
}

/// The background task.
pub(super) struct Reload {
    /// What is in force: the settings of the start, with those that have changed since.
    in_force: Config,
    file: ConfigFile,
    seen: Seen,
    live: Live,
}

/// What came of the file when it was looked at last.
#[derive(Debug)]
enum Seen {
    /// This text was taken: it holds, or will at the next start.
    Taken(String),
    /// This text has faults, which may be those of other files.
    Refused { text: String, faults: String },
    /// It could not be read.
    Unreadable,
}

/// Why the file is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reason {
    Interval,
    /// Someone wants to know, also of what is known already.
    Signal,
}

impl Reload {
    pub(super) fn new(config: &Config, ConfigText { file, text }: ConfigText, live: Live) -> Self {
        Self { in_force: config.clone(), file, seen: Seen::Taken(text), live }
    }

    /// Looks until `shutdown`.
    ///
    /// # Errors
    /// None.
    pub(super) async fn run(mut self, mut hangup: Signal, shutdown: CancellationToken) -> Result<(), Infallible> {
        let watching = async {
            loop {
                let reason = tokio::select! {
                    () = pause(self.in_force.rollout.reload.0) => Reason::Interval,
                    _ = hangup.recv() => Reason::Signal,
                };
                self.look(reason).await;
            }
        };
        let _: Option<Infallible> = shutdown.run_until_cancelled(watching).await;
        Ok(())
    }

    async fn look(&mut self, reason: Reason) {
        let text = match self.read().await {
            Ok(text) => text,
            Err(error) => return self.unreadable(&error, reason),
        };
        match &self.seen {
            Seen::Taken(seen) if *seen == text && reason == Reason::Interval => {}
            Seen::Taken(seen) | Seen::Refused { text: seen, .. } if *seen == text => self.take(text, reason).await,
            _ => match self.settled(text).await {
                Ok(text) => self.take(text, reason).await,
                Err(error) => self.unreadable(&error, reason),
            },
        }
    }

    /// The text once it stays the same, or after a while whatever it is: then nobody is in the middle of writing it.
    async fn settled(&self, mut text: String) -> Result<String, ReadError> {
        for _ in 0..MOST_LOOKS {
            tokio::time::sleep(SETTLED).await;
            let again = self.read().await?;
            if again == text {
                break;
            }
            text = again;
        }
        Ok(text)
    }

    async fn read(&self) -> Result<String, ReadError> {
        self.blocking(ConfigFile::read).await?
    }

    /// Works with the file on the runtime's blocking threads: a file system may hang, and the files of keys that a
    /// configuration names may lie on another one.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&ConfigFile) -> T + Send + 'static,
    ) -> Result<T, ReadError> {
        let file = self.file.clone();
        // What it panicked with is not shown: it may quote the file.
        let panicked =
            |_| ReadError { path: self.file.path().to_owned(), source: io::Error::other("reading it panicked") };
        tokio::task::spawn_blocking(move || work(&file)).await.map_err(panicked)
    }

    fn unreadable(&mut self, error: &ReadError, reason: Reason) {
        let is_known = matches!(std::mem::replace(&mut self.seen, Seen::Unreadable), Seen::Unreadable);
        if !is_known || reason == Reason::Signal {
            let error = error_chain(error);
            warn!(error, "the configuration cannot be read again, the one in force stays");
            self.live.metrics.count_reload(metrics::Reload::Unreadable);
        }
    }

    async fn take(&mut self, text: String, reason: Reason) {
        let parsed = self.blocking(move |file| (file.parse(&text), text)).await;
        let (parsed, text) = match parsed {
            Ok(parsed) => parsed,
            Err(error) => return self.unreadable(&error, reason),
        };
        match parsed.and_then(|config| self.usable(config)) {
            Ok(config) => {
                let result = self.apply(&config);
                self.seen = Seen::Taken(text);
                self.live.metrics.count_reload(result);
            }
            Err(error) => self.refuse(text, &error, reason),
        }
    }

    fn refuse(&mut self, text: String, error: &config::Error, reason: Reason) {
        let faults = shown(error);
        let is_known =
            matches!(&self.seen, Seen::Refused { text: old, faults: known } if *old == text && *known == faults);
        if !is_known || reason == Reason::Signal {
            let path = self.file.path().display();
            warn!(%path, faults, "the configuration cannot be used, the one in force stays");
            self.live.metrics.count_reload(metrics::Reload::Refused);
        }
        self.seen = Seen::Refused { text, faults };
    }

    /// A configuration that the router can take as it runs.
    fn usable(&self, config: Config) -> Result<Config, config::Error> {
        let faults = self.in_force.live_faults(&config);
        if faults.is_empty() { Ok(config) } else { Err(config::Error::Faults(faults)) }
    }

    fn apply(&mut self, config: &Config) -> metrics::Reload {
        let difference = self.in_force.difference(config);
        self.in_force.take_live(config);
        // Also when nothing differs: the key of the record may be another one in the same file.
        self.live.set(&self.in_force);
        let (live, waiting) = (difference.live.join(", "), difference.at_start.join(", "));
        if !live.is_empty() {
            info!(settings = live, hash = self.in_force.hash(), "the configuration has changed");
        }
        if !waiting.is_empty() {
            warn!(settings = waiting, "settings have changed that take effect at the next start");
            return metrics::Reload::RestartNeeded;
        }
        if live.is_empty() { metrics::Reload::UnchangedSettings } else { metrics::Reload::Applied }
    }
}

fn shown(error: &config::Error) -> String {
    match error {
        config::Error::Faults(faults) => faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "),
        config::Error::Yaml(_) => error.to_string(),
    }
}

/// Without an interval only a signal ends the wait.
async fn pause(interval: Duration) {
    if interval.is_zero() {
        return std::future::pending().await;
    }
    tokio::time::sleep(interval).await;
}
