//! The slot table of one keyspace: whose slot is which, and what is proved of it.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use super::KeyKinds;
use crate::routing::endpoint::EndpointId;

/// Number of a slot within its keyspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct SlotId(pub(super) u16);

/// Whose slot it is: generation and endpoint in one word, so that one compare shows whether anything changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Owner(u64);

impl Owner {
    /// The slot is credited to nobody. Generations begin at 1, so no owner looks like this.
    pub(super) const DEAD: Self = Self(0);

    fn new(generation: u32, endpoint: EndpointId) -> Self {
        Self(u64::from(generation) << 32 | u64::from(endpoint.0))
    }

    pub(super) fn endpoint(self) -> EndpointId {
        EndpointId((self.0 & u64::from(u32::MAX)) as u32)
    }
}

/// See the module. Readers only load; a slot is stored to by its one writer.
#[derive(Debug)]
pub(super) struct SlotTable {
    slots: Box<[Slot]>,
    /// Slots that were ever used: readers look no further.
    n_used: AtomicUsize,
    /// Slots that are acquired and not retired.
    n_live: AtomicUsize,
    /// Taken when a source starts or ends a generation, never by a request.
    free: Mutex<FreeSlots>,
}

#[derive(Debug, Default)]
struct Slot {
    owner: AtomicU64,
    proved: AtomicU64,
}

#[derive(Debug, Default)]
struct FreeSlots {
    /// Used before and swept since.
    swept: Vec<SlotId>,
    last_generation: u32,
}

impl FreeSlots {
    /// Numbers differ between any two owners of a slot that one lookup can see: they repeat after 2³² owners.
    fn next_generation(&mut self) -> u32 {
        self.last_generation = self.last_generation.checked_add(1).unwrap_or(1);
        self.last_generation
    }
}

impl SlotTable {
    pub(super) fn new(n_slots: u16) -> Self {
        Self {
            slots: (0..n_slots).map(|_| Slot::default()).collect(),
            n_used: AtomicUsize::new(0),
            n_live: AtomicUsize::new(0),
            free: Mutex::default(),
        }
    }

    pub(super) fn n_live(&self) -> usize {
        self.n_live.load(Ordering::Relaxed)
    }

    /// A slot that no block names, with nothing proved, owned by `endpoint` from now on.
    pub(super) fn acquire(&self, endpoint: EndpointId) -> Option<SlotId> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let n_used = self.n_used.load(Ordering::Relaxed);
        let slot = match free.swept.pop() {
            Some(slot) => slot,
            None if n_used < self.slots.len() => {
                SlotId(u16::try_from(n_used).expect("a table has at most u16::MAX slots"))
            }
            None => return None,
        };
        self.slot(slot).proved.store(0, Ordering::Release);
        self.slot(slot).owner.store(Owner::new(free.next_generation(), endpoint).0, Ordering::Release);
        self.n_used.store(n_used.max(usize::from(slot.0) + 1), Ordering::Release);
        self.n_live.fetch_add(1, Ordering::Relaxed);
        Some(slot)
    }

    /// Takes the slot's credit away at once. Its blocks still name it: sweep them, then [`Self::revive`] or
    /// [`Self::release`] it.
    pub(super) fn kill(&self, slot: SlotId) {
        // Sequentially consistent, as is all that readers compare: it costs nothing here and keeps the protocol easy to argue.
        self.slot(slot).owner.store(Owner::DEAD.0, Ordering::SeqCst);
    }

    /// Gives a killed and swept slot back to its endpoint, under a new generation; what was proved stays proved.
    pub(super) fn revive(&self, slot: SlotId, endpoint: EndpointId) {
        let generation = self.free.lock().unwrap_or_else(PoisonError::into_inner).next_generation();
        self.slot(slot).owner.store(Owner::new(generation, endpoint).0, Ordering::SeqCst);
    }

    /// Lets a killed and swept slot be acquired again.
    pub(super) fn release(&self, slot: SlotId) {
        self.n_live.fetch_sub(1, Ordering::Relaxed);
        self.free.lock().unwrap_or_else(PoisonError::into_inner).swept.push(slot);
    }

    pub(super) fn set_proved(&self, slot: SlotId, kinds: KeyKinds) {
        self.slot(slot).proved.store(kinds.bits(), Ordering::SeqCst);
    }

    /// Writes the owner of every slot that is creditable for `required`, and [`Owner::DEAD`] for the others.
    pub(super) fn snapshot(&self, required: KeyKinds, owners: &mut Vec<Owner>) {
        let n_used = self.n_used.load(Ordering::Acquire);
        owners.clear();
        owners.extend(self.slots[..n_used].iter().map(|slot| slot.creditable(required)));
    }

    /// The owner of `slot`, or [`Owner::DEAD`] when it is not creditable for `required`.
    pub(super) fn creditable(&self, slot: SlotId, required: KeyKinds) -> Owner {
        self.slot(slot).creditable(required)
    }

    fn slot(&self, slot: SlotId) -> &Slot {
        &self.slots[usize::from(slot.0)]
    }
}

impl Slot {
    /// The owner is read first: if `proved` is already that of the next owner, the compare after the walk sees the next
    /// owner too.
    fn creditable(&self, required: KeyKinds) -> Owner {
        let owner = Owner(self.owner.load(Ordering::SeqCst));
        let proved = KeyKinds::from_bits(self.proved.load(Ordering::SeqCst));
        if proved.contains(required) { owner } else { Owner::DEAD }
    }
}
