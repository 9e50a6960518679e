//! One source, as the socket code runs it, and the audit of what its state machine asks for.
//!
//! Obeys exactly as `events::socket::subscription` does, with the sockets' part handed to the [world](super::world).

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::library::settings;
use super::publisher::{Origin, ProcessId};
use crate::events::apply::{Applier, SourceName};
use crate::events::continuity::{Action, Continuity, Incident, Input, Phase, SeqNo};
use crate::events::stats::SourceStats;
use crate::events::wire::EventBatch;
use crate::routing::endpoint::EndpointId;
use crate::routing::index::PrefixIndex;

/// What the sockets are to do.
#[derive(Clone, Copy, Debug)]
pub(super) enum Command {
    RequestReplay { from: SeqNo, within: Duration },
    CloseReplay,
    Reconnect,
    /// Drop the connection; another one is made when the source is let out.
    Quarantine,
}

/// See the module.
pub(super) struct Source {
    pub(super) name: SourceName,
    continuity: Continuity,
    applier: Applier,
    pub(super) audit: Audit,
}

/// What has been applied in the running generation.
#[derive(Clone, Debug, Default)]
pub(super) struct Audit {
    generation: Option<Applied>,
    /// Replays asked for since [`Audit::n_replays`] was last set to 0.
    pub(super) n_replays: u32,
}

/// The batches of one generation, without holes.
#[derive(Clone, Debug, Default)]
pub(super) struct Applied {
    pub(super) first: Option<u64>,
    last: Option<u64>,
    /// The processes that sent them, without repetition.
    pub(super) processes: Vec<ProcessId>,
}

impl Source {
    pub(super) fn new(endpoint: EndpointId, rank: u32, has_replay: bool, index: &Arc<PrefixIndex>) -> Self {
        let stats = Arc::<SourceStats>::default();
        let name = SourceName { endpoint, address: SocketAddr::from(([127, 0, 0, 1], 8000)), rank };
        let applier = Applier::new(name, settings(), Arc::clone(index), stats);
        Self { name, continuity: Continuity::new(has_replay), applier, audit: Audit::default() }
    }

    pub(super) fn phase(&self) -> Phase {
        self.continuity.phase()
    }

    /// Moves the state machine and obeys it; what the sockets have to do is left to the caller.
    pub(super) fn step(&mut self, now: Duration, input: Input) -> Vec<Command> {
        let actions = self.continuity.step(now, input);
        actions.into_iter().filter_map(|action| self.obey(action)).collect()
    }

    fn obey(&mut self, action: Action) -> Option<Command> {
        match action {
            Action::StartGeneration(_) => {
                self.applier.start_generation();
                self.audit.generation = Some(Applied::default());
            }
            Action::EndGeneration => {
                self.applier.end_generation();
                self.audit.generation = None;
            }
            Action::Restore | Action::DropOffer => panic!("nothing was offered"),
            Action::RequestReplay { from, within } => {
                self.audit.n_replays += 1;
                return Some(Command::RequestReplay { from, within });
            }
            Action::CloseReplay => return Some(Command::CloseReplay),
            Action::Apply { seq, payload, via: _ } => {
                let batch = EventBatch::decode(&payload).expect("only readable batches are applied");
                self.audit.note(seq, batch.ts);
                self.applier.apply(&batch);
            }
            Action::Reconnect => return Some(Command::Reconnect),
            Action::Report(Incident::Gap { expected, received }) => assert!(expected <= received, "a gap goes back"),
            Action::Report(Incident::Quarantined(_)) => return Some(Command::Quarantine),
            Action::Report(_) => {}
        }
        None
    }
}

impl Audit {
    /// Every batch is applied at most once per generation, in ascending order and without holes.
    fn note(&mut self, seq: SeqNo, ts: f64) {
        let applied = self.generation.as_mut().expect("a batch is applied in a generation");
        let origin = Origin::of_ts(ts);
        assert_eq!(origin.seq, seq.0, "a batch is applied under the number that it was sent under");
        if let Some(last) = applied.last {
            assert_eq!(seq.0, last + 1, "batches are applied in order and without holes");
        }
        applied.first.get_or_insert(seq.0);
        applied.last = Some(seq.0);
        if applied.processes.last() != Some(&origin.process) {
            applied.processes.push(origin.process);
        }
    }

    pub(super) fn applied(&self) -> Option<&Applied> {
        self.generation.as_ref()
    }
}
