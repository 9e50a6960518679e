//! The task that writes the record.

use std::convert::Infallible;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::file::{RecordFile, Written};
use super::{Config, Line};
use crate::telemetry::metrics::{Metrics, RecordDropped};

/// Lines that are written at once.
const BATCH: usize = 64;
/// After a failure a file is begun again at the earliest after so long: a full disk is not emptied by trying.
const PAUSE: Duration = Duration::from_secs(5);

/// Writes what a [`super::Recorder`] takes.
pub struct Writer {
    config: watch::Receiver<Config>,
    lines: mpsc::Receiver<Line>,
    is_on: Arc<AtomicBool>,
    metrics: Arc<Metrics>,
    state: State,
}

/// Where the record stands.
enum State {
    /// Nothing is open: nothing is to be written, or nothing has come yet.
    Closed,
    Open(Box<RecordFile>),
    /// The file could not be written.
    Failed {
        since: Instant,
        /// The one to go on with; none where none could be begun.
        file: Option<Box<RecordFile>>,
    },
}

impl Writer {
    pub(super) fn new(
        config: watch::Receiver<Config>,
        lines: mpsc::Receiver<Line>,
        is_on: Arc<AtomicBool>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self { config, lines, is_on, metrics, state: State::Closed }
    }

    /// Writes until `shutdown`, and then what is still in the queue.
    ///
    /// # Errors
    /// None.
    pub async fn run(mut self, shutdown: CancellationToken) -> Result<(), Infallible> {
        let mut batch = Vec::with_capacity(BATCH);
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                changed = self.config.changed() => match changed {
                    Ok(()) => self.change(),
                    Err(_) => break,
                },
                n_lines = self.lines.recv_many(&mut batch, BATCH) => match n_lines {
                    0 => break,
                    _ => self.write(&mut batch).await,
                },
            }
        }
        self.lines.close();
        while self.lines.recv_many(&mut batch, BATCH).await > 0 {
            self.write(&mut batch).await;
        }
        shutdown.cancelled().await;
        Ok(())
    }

    /// Takes what is set now. Lines that wait were meant for the former file; they go to the new one, or nowhere.
    fn change(&mut self) {
        let config = self.config.borrow_and_update();
        self.is_on.store(config.path.is_some(), Relaxed);
        let file = match &self.state {
            State::Closed => None,
            State::Open(file) => Some(file),
            State::Failed { file, .. } => file.as_ref(),
        };
        if !file.is_some_and(|file| file.is_of(&config)) {
            self.state = State::Closed;
        }
    }

    async fn write(&mut self, batch: &mut Vec<Line>) {
        let lines = std::mem::take(batch);
        let (n_lines, config) = (lines.len(), self.config.borrow().clone());
        let Some(path) = config.path.clone() else { return };
        let was_failed = match &self.state {
            State::Failed { since, .. } if since.elapsed() < PAUSE => {
                return self.metrics.count_record_dropped(RecordDropped::WriteFailed, n_lines as u64);
            }
            state => matches!(state, State::Failed { .. }),
        };
        let file = match std::mem::replace(&mut self.state, State::Closed) {
            State::Open(file) => Some(file),
            State::Failed { file, .. } => file,
            State::Closed => None,
        };
        // The runtime's blocking threads: a file system may hang.
        let written = tokio::task::spawn_blocking(move || written(file, &path, &config, &lines));
        let (file, Written { n_written, n_too_long, failure }) =
            written.await.unwrap_or_else(|_| (None, failed(io::Error::other("the writer panicked"))));
        self.metrics.count_recorded(n_written as u64);
        self.metrics.count_record_dropped(RecordDropped::TooLong, n_too_long as u64);
        let n_failed = if failure.is_some() { n_lines - n_written - n_too_long } else { 0 };
        self.metrics.count_record_dropped(RecordDropped::WriteFailed, n_failed as u64);
        if let Some(error) = failure {
            self.state = State::Failed { since: Instant::now(), file };
            if !was_failed {
                warn!(%error, "the record of decisions cannot be written (rollout.record)");
            }
            return;
        }
        self.state = file.map_or(State::Closed, State::Open);
        if was_failed {
            info!("the record of decisions is written again");
        }
    }
}

/// Writes the lines to `file` or, where there is none, to a new one.
fn written(
    file: Option<Box<RecordFile>>,
    path: &Path,
    config: &Config,
    lines: &[Line],
) -> (Option<Box<RecordFile>>, Written) {
    let file = file.map_or_else(|| RecordFile::begin(path, config).map(Box::new), Ok);
    match file {
        Ok(mut file) => {
            let written = file.write(lines);
            (Some(file), written)
        }
        Err(error) => (None, failed(error)),
    }
}

fn failed(error: io::Error) -> Written {
    Written { failure: Some(error), ..Written::default() }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::record::{QUEUE, Recorder};
    use crate::routing::load::Millis;

    fn config(path: Option<PathBuf>) -> Config {
        Config { path, max_bytes: 1 << 20, key: None }
    }

    fn line() -> Line {
        Line {
            at: Millis(0),
            model: "m".into(),
            prompt_tokens: 1,
            block_size: 16,
            blocks: Vec::new(),
            matched_tokens: 0,
            endpoint: ([10, 0, 0, 1], 8000).into(),
            mode: "active",
        }
    }

    fn n_lines(path: &Path) -> usize {
        std::fs::read_to_string(path).map_or(0, |text| text.lines().count())
    }

    async fn eventually(what: &str, condition: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !condition() {
            assert!(Instant::now() < deadline, "{what}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    fn assert_metric(metrics: &Metrics, line: &str) {
        let text = metrics.encode();
        assert!(text.lines().any(|found| found == line), "no {line} in\n{text}");
    }

    #[tokio::test]
    async fn lines_go_to_the_file_that_is_set_and_the_last_ones_before_the_end() {
        let dir = tempfile::tempdir().expect("a directory");
        let (first, second) = (dir.path().join("a"), dir.path().join("b"));
        let metrics = Arc::new(Metrics::new());
        let (set, is_set) = watch::channel(config(None));
        let (recorder, writer) = Recorder::new(is_set, metrics.clone());
        recorder.note(|| panic!("nobody reads it"));
        let shutdown = CancellationToken::new();
        let running = tokio::spawn(writer.run(shutdown.clone()));
        for path in [&first, &second] {
            set.send_replace(config(Some(path.clone())));
            eventually("it is switched on", || {
                recorder.note(line);
                n_lines(path) > 0
            })
            .await;
        }
        let before = n_lines(&first);
        for _ in 0..QUEUE / 2 {
            recorder.note(line);
        }
        shutdown.cancel();
        running.await.expect("no panic").expect("no error");
        assert!(n_lines(&second) > QUEUE / 2, "what was in the queue is written");
        assert_eq!(n_lines(&first), before);
        assert_metric(&metrics, &format!("warmroute_record_lines_total {}", before + n_lines(&second)));
    }

    #[tokio::test]
    async fn a_full_queue_and_a_bad_path_drop_and_are_counted() {
        let metrics = Arc::new(Metrics::new());
        let (_set, is_set) = watch::channel(config(Some("/nonexistent/record".into())));
        let (recorder, writer) = Recorder::new(is_set, metrics.clone());
        for _ in 0..QUEUE + 3 {
            recorder.note(line);
        }
        assert_metric(&metrics, r#"warmroute_record_dropped_total{reason="queue_full"} 3"#);
        let shutdown = CancellationToken::new();
        shutdown.cancel();
        writer.run(shutdown).await.expect("no error");
        assert_metric(&metrics, &format!(r#"warmroute_record_dropped_total{{reason="write_failed"}} {QUEUE}"#));
    }
}
