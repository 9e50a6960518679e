//! What each event source knows, for people and for scripts.
//!
//! Counts only: neither hashes of blocks nor anything of a prompt, nor a digest of what a source holds, since of a single
//! block it would be the hash. Who compares the contents of two replicas finds it at `/snapshots`, which has the
//! hashes themselves.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use serde::Serialize;

/// One source, as an object of the JSON list.
#[derive(Clone, Debug, Serialize)]
pub struct SourceRow {
    /// Model name of the endpoint's pool, as configured.
    pub model: Arc<str>,
    /// Address that Envoy dials.
    pub endpoint: SocketAddr,
    /// Data-parallel rank.
    pub rank: u32,
    /// Name of the state that the source is in.
    pub state: &'static str,
    /// Number of the last batch applied; null: none yet.
    pub last_seq: Option<u64>,
    /// Blocks that the index holds for the source.
    pub n_blocks: u64,
    /// Names of the kinds of hashes that are proved, hence credited.
    pub proved: Vec<String>,
    /// Generations started since the source was added, as are the counts below.
    pub generations: u64,
    /// Times that sequence numbers were missing.
    pub gaps: u64,
    /// Replays requested.
    pub replays: u64,
    /// Time since the last batch was applied; null: none yet.
    pub last_event_ms: Option<u64>,
    /// Time from the engine's clock in the last live batch to the index; null: none yet. It contains the difference of
    /// two machines' clocks, and is 0 where the engine's is ahead by more.
    pub lag_ms: Option<u64>,
}

/// Reads the rows from their owner at each request; neither blocks nor awaits.
#[derive(Clone)]
pub struct ReadSources(Arc<dyn Fn() -> Vec<SourceRow> + Send + Sync>);

impl ReadSources {
    /// Reads with `read`.
    pub fn new(read: impl Fn() -> Vec<SourceRow> + Send + Sync + 'static) -> Self {
        Self(Arc::new(read))
    }

    pub(super) fn read(&self) -> Vec<SourceRow> {
        in_order(self.0())
    }
}

/// The rows by model, endpoint and rank, so that the lists of two replicas can be compared line by line.
pub(super) fn in_order(mut rows: Vec<SourceRow>) -> Vec<SourceRow> {
    rows.sort_by(|a, b| (&a.model, a.endpoint, a.rank).cmp(&(&b.model, b.endpoint, b.rank)));
    rows
}

impl fmt::Debug for ReadSources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ReadSources")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn row(port: u16, rank: u32) -> SourceRow {
        SourceRow {
            model: "m".into(),
            endpoint: ([127, 0, 0, 1], port).into(),
            rank,
            state: "live",
            last_seq: Some(7),
            n_blocks: 3,
            proved: vec!["plain".to_owned()],
            generations: 1,
            gaps: 2,
            replays: 4,
            last_event_ms: Some(5),
            lag_ms: Some(2),
        }
    }

    #[test]
    fn row_is_a_json_object_of_counts() {
        let expected = json!({
            "model": "m", "endpoint": "127.0.0.1:8000", "rank": 0, "state": "live", "last_seq": 7,
            "n_blocks": 3, "proved": ["plain"], "generations": 1, "gaps": 2,
            "replays": 4,
            "last_event_ms": 5, "lag_ms": 2,
        });
        assert_eq!(serde_json::to_value(row(8000, 0)).expect("a row is JSON"), expected);
        let unknown = SourceRow { last_seq: None, lag_ms: None, ..row(8000, 0) };
        let unknown = serde_json::to_value(unknown).expect("a row is JSON");
        assert_eq!((&unknown["last_seq"], &unknown["lag_ms"]), (&json!(null), &json!(null)));
    }

    #[test]
    fn rows_come_in_the_same_order_whoever_keeps_them() {
        let read = ReadSources::new(|| vec![row(8001, 0), row(8000, 1), row(8000, 0)]);
        let order: Vec<_> = read.read().iter().map(|row| (row.endpoint.port(), row.rank)).collect();
        assert_eq!(order, [(8000, 0), (8000, 1), (8001, 0)]);
    }
}
