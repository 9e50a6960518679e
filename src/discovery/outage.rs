//! Logs an outage of a source of endpoints once, and its end.

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tracing::{debug, info, warn};

/// Whether a source answers.
#[derive(Debug)]
pub(super) struct Outage {
    model: Arc<str>,
    since: Option<Instant>,
}

impl Outage {
    pub(super) fn new(model: Arc<str>) -> Self {
        Self { model, since: None }
    }

    /// The source has not answered, or not with anything that can be used.
    pub(super) fn failed(&mut self, error: &(dyn Error + 'static)) {
        let (model, error) = (&self.model, error_chain(error));
        if self.since.is_some() {
            debug!(%model, error, "discovery still fails");
        } else {
            self.since = Some(Instant::now());
            warn!(%model, error, "discovery fails: the endpoints stay as they were last listed");
        }
    }

    /// It has answered.
    pub(super) fn ended(&mut self) {
        if let Some(since) = self.since.take() {
            let after: Duration = since.elapsed();
            info!(model = %self.model, ?after, "discovery works again");
        }
    }
}

/// The error and its causes in one line.
pub(crate) fn error_chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
