//! The slot table of one keyspace: whose slot is which, and what is proved of it.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use super::{Holder, KeyKinds, Tier};
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

/// Rank and tier of a slot's holder in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place(u64);

impl Place {
    fn new(holder: Holder) -> Self {
        Self(u64::from(holder.rank) << 2 | holder.tier as u64)
    }

    pub(super) fn rank(self) -> u32 {
        (self.0 >> 2) as u32
    }

    pub(super) fn tier(self) -> Tier {
        Tier::ALL[(self.0 & 3) as usize]
    }
}

/// Slots that are allocated together: most keyspaces need few of those that they may have.
const SLOTS_PER_CHUNK: usize = 64;

/// See the module. Readers only load; a slot is stored to by its one writer.
#[derive(Debug)]
pub(super) struct SlotTable {
    chunks: Box<[OnceLock<Box<[Slot; SLOTS_PER_CHUNK]>>]>,
    n_slots: usize,
    /// Slots that were ever used: readers look no further.
    n_used: AtomicUsize,
    /// Slots that are acquired and not retired.
    n_live: AtomicUsize,
    /// Taken when a source starts or ends a generation, never by a request.
    free: Mutex<FreeSlots>,
}

#[derive(Debug)]
struct Slot {
    owner: AtomicU64,
    /// Written while the slot has no owner, so that it is that of the owner which a reader saw before and after.
    place: AtomicU64,
    proved: AtomicU64,
}

#[derive(Debug, Default)]
struct FreeSlots {
    /// Used before and swept since.
    swept: Vec<SlotId>,
    last_generation: u32,
    /// The keyspace was dropped from the index: nobody would find what is written under a slot of it.
    is_closed: bool,
}

/// What became of a call of [`SlotTable::acquire`].
#[derive(Debug)]
pub(super) enum Acquired {
    Slot(SlotId),
    /// Every slot is taken.
    Full,
    /// The keyspace is dropped; a new one takes its place.
    Closed,
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
        let n_slots = usize::from(n_slots);
        Self {
            chunks: (0..n_slots.div_ceil(SLOTS_PER_CHUNK)).map(|_| OnceLock::new()).collect(),
            n_slots,
            n_used: AtomicUsize::new(0),
            n_live: AtomicUsize::new(0),
            free: Mutex::default(),
        }
    }

    pub(super) fn n_live(&self) -> usize {
        self.n_live.load(Ordering::Relaxed)
    }

    /// A slot that no block names, with nothing proved, owned by `holder` from now on.
    pub(super) fn acquire(&self, holder: Holder) -> Acquired {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        if free.is_closed {
            return Acquired::Closed;
        }
        let n_used = self.n_used.load(Ordering::Relaxed);
        let slot = match free.swept.pop() {
            Some(slot) => slot,
            None if n_used < self.n_slots => SlotId(u16::try_from(n_used).expect("a table has at most u16::MAX slots")),
            None => return Acquired::Full,
        };
        self.chunks[usize::from(slot.0) / SLOTS_PER_CHUNK].get_or_init(|| Box::new([const { Slot::new() }; _]));
        self.slot(slot).proved.store(0, Ordering::Release);
        self.slot(slot).place.store(Place::new(holder).0, Ordering::Release);
        self.slot(slot).owner.store(Owner::new(free.next_generation(), holder.endpoint).0, Ordering::Release);
        self.n_used.store(n_used.max(usize::from(slot.0) + 1), Ordering::Release);
        self.n_live.fetch_add(1, Ordering::Relaxed);
        Acquired::Slot(slot)
    }

    pub(super) fn is_closed(&self) -> bool {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).is_closed
    }

    /// Lets no slot be acquired any more, unless one is; says whether that is so.
    pub(super) fn close_if_unused(&self) -> bool {
        // Slots are acquired under the same lock, so none can be in between.
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        free.is_closed |= self.n_live() == 0;
        free.is_closed
    }

    /// Takes the slot's credit away at once. Its blocks still name it: sweep them, then [`Self::revive`] or
    /// [`Self::release`] it.
    pub(super) fn kill(&self, slot: SlotId) {
        // Sequentially consistent, as is all that readers compare: it costs nothing here and keeps the protocol easy to
        // argue.
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
        let used = self.chunks.iter().filter_map(OnceLock::get).flat_map(|chunk| chunk.iter()).take(n_used);
        owners.extend(used.map(|slot| slot.creditable(required)));
    }

    /// The owner of `slot`, or [`Owner::DEAD`] when it is not creditable for `required`.
    pub(super) fn creditable(&self, slot: SlotId, required: KeyKinds) -> Owner {
        self.slot(slot).creditable(required)
    }

    /// Rank and tier of the slot's owner, if that is the same before and after.
    pub(super) fn place(&self, slot: SlotId) -> Place {
        Place(self.slot(slot).place.load(Ordering::SeqCst))
    }

    fn slot(&self, slot: SlotId) -> &Slot {
        let chunk = self.chunks[usize::from(slot.0) / SLOTS_PER_CHUNK].get();
        &chunk.expect("a slot is allocated before it is named")[usize::from(slot.0) % SLOTS_PER_CHUNK]
    }
}

impl Slot {
    const fn new() -> Self {
        Self { owner: AtomicU64::new(0), place: AtomicU64::new(0), proved: AtomicU64::new(0) }
    }

    /// The owner is read first: if `proved` is already that of the next owner, the compare after the walk sees the next
    /// owner too.
    fn creditable(&self, required: KeyKinds) -> Owner {
        let owner = Owner(self.owner.load(Ordering::SeqCst));
        let proved = KeyKinds::from_bits(self.proved.load(Ordering::SeqCst));
        if proved.contains(required) { owner } else { Owner::DEAD }
    }
}
