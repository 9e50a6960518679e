//! One source, as the socket code runs it, and the audit of what its state machine asks for.
//!
//! Obeys exactly as `events::socket::subscription` does, with the sockets' part handed to the [world](super::world).

use std::sync::Arc;
use std::time::Duration;

use super::library::settings;
use super::publisher::{Origin, ProcessId};
use crate::events::apply::{Applier, Image, SourceName, When};
use crate::events::continuity::{Action, Continuity, Incident, Input, Overlap, Phase, SeqNo};
use crate::events::stats::SourceStats;
use crate::events::wire::{Event, EventBatch};
use crate::routing::index::PrefixIndex;

/// What the sockets are to do.
#[derive(Clone, Copy, Debug)]
pub(super) enum Command {
    RequestReplay {
        from: SeqNo,
        within: Duration,
    },
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
    offer: Option<Snapshot>,
    pub(super) audit: Audit,
}

/// What a source knew at some time, and what it came from.
#[derive(Clone, Debug)]
pub(super) struct Snapshot {
    overlap: Overlap,
    is_complete: bool,
    image: Image,
    applied: Applied,
}

/// What has been applied in the running generation.
#[derive(Clone, Debug, Default)]
pub(super) struct Audit {
    generation: Option<Applied>,
    pub(super) n_restored: u64,
    /// Replays asked for since [`Audit::n_replays`] was last set to 0.
    pub(super) n_replays: u32,
}

/// The batches of one generation, without holes.
#[derive(Clone, Debug, Default)]
pub(super) struct Applied {
    pub(super) first: Option<u64>,
    last: Option<u64>,
    /// Whether the cache was dropped since, so that nothing from before it matters.
    pub(super) is_cleared: bool,
    /// The processes that sent them, without repetition.
    pub(super) processes: Vec<ProcessId>,
}

impl Source {
    pub(super) fn new(name: SourceName, has_replay: bool, reports: bool, index: &Arc<PrefixIndex>) -> Self {
        let applier = Applier::new(name, settings(reports), Arc::clone(index), Arc::<SourceStats>::default());
        Self { name, continuity: Continuity::new(has_replay), applier, offer: None, audit: Audit::default() }
    }

    /// What a replica that knows the same would give away.
    pub(super) fn snapshot(&self) -> Option<Snapshot> {
        Some(Snapshot {
            overlap: self.continuity.overlap()?,
            is_complete: self.continuity.is_complete(),
            image: self.applier.image()?,
            applied: self.audit.generation.clone()?,
        })
    }

    /// Takes a snapshot; the state machine is to be told of it.
    pub(super) fn offer(&mut self, snapshot: Snapshot) -> Input {
        let (overlap, complete) = (snapshot.overlap, snapshot.is_complete);
        self.offer = Some(snapshot);
        Input::Offer { overlap, complete }
    }

    pub(super) fn phase(&self) -> Phase {
        self.continuity.phase()
    }

    /// Moves the state machine and obeys it; what the sockets have to do is left to the caller.
    pub(super) fn step(&mut self, now: Duration, input: Input) -> Vec<Command> {
        let mut is_cleared = false;
        let mut commands = Vec::new();
        for action in self.continuity.step(now, input) {
            is_cleared &= !matches!(action, Action::StartGeneration(_) | Action::EndGeneration | Action::Restore);
            is_cleared |= clears(&action);
            commands.extend(self.obey(action));
        }
        if is_cleared {
            self.audit.generation.iter_mut().for_each(|applied| applied.is_cleared = true);
            assert_eq!(self.continuity.step(now, Input::Cleared), []);
        }
        commands
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
            Action::Restore => {
                let snapshot = self.offer.take().expect("what is restored was offered");
                assert!(self.applier.restore(&snapshot.image), "an image does not fit the settings it was made under");
                self.audit.n_restored += 1;
                self.audit.generation = Some(snapshot.applied);
            }
            Action::DropOffer => self.offer = None,
            Action::RequestReplay { from, within } => {
                self.audit.n_replays += 1;
                return Some(Command::RequestReplay { from, within });
            }
            Action::CloseReplay => return Some(Command::CloseReplay),
            Action::Apply { seq, payload, via: _ } => {
                let batch = EventBatch::decode(&payload).expect("only readable batches are applied");
                self.audit.note(seq, batch.ts);
                self.applier.apply(&batch, When::Now);
            }
            Action::Reconnect => return Some(Command::Reconnect),
            Action::Report(Incident::Gap { expected, received }) => assert!(expected <= received, "a gap goes back"),
            Action::Report(Incident::Quarantined(_)) => return Some(Command::Quarantine),
            Action::Report(_) => {}
        }
        None
    }
}

/// Whether the action applies a batch that says that the whole cache is gone.
fn clears(action: &Action) -> bool {
    let Action::Apply { payload, .. } = action else { return false };
    let batch = EventBatch::decode(payload).expect("only readable batches are applied");
    batch.events.iter().any(|event| matches!(event, Event::AllBlocksCleared))
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
