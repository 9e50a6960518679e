//! An engine's cache: which blocks it holds, and what it announces of that.
//!
//! Follows what `vllm/v1/core/block_pool.py` (0.32.0) lets a subscriber see, and leaves out what it does not: which
//! block is evicted is drawn at random, since a router must not guess it either.

use super::announce::{Announcement, Form, Medium};
use super::library::{Kind, Prompt, prompts, prompts_of_kind};
use crate::routing::hash::{BlockHash, Digest};

/// Copies that an offload tier keeps.
const OFFLOAD_CAPACITY: usize = 8;

/// What kind of engine it is.
#[derive(Clone, Copy, Debug)]
pub(super) struct EngineTraits {
    pub(super) form: Form,
    /// Physical blocks on the GPU.
    pub(super) n_blocks: usize,
    /// Whether a sliding-window group announces blocks, too.
    pub(super) sliding: bool,
    /// Whether blocks are offloaded.
    pub(super) offloads: bool,
    /// Whether some prompts are salted or name an adapter.
    pub(super) all_kinds: bool,
    /// Whether it hashes otherwise than configured.
    pub(super) is_foreign: bool,
    /// Whether the router asks for full reports, hence takes every store that begins a prompt for one.
    pub(super) reports: bool,
}

impl EngineTraits {
    pub(super) fn random(reports: bool, rng: &mut fastrand::Rng) -> Self {
        let groups = rng.u8(..4) > 0;
        Self {
            form: Form { maps: rng.u8(..4) > 0, int_hashes: rng.u8(..4) > 0, groups },
            n_blocks: rng.usize(8..32),
            sliding: groups && rng.u8(..4) == 0,
            offloads: rng.u8(..4) == 0,
            all_kinds: rng.bool(),
            is_foreign: rng.u8(..5) == 0,
            reports,
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Engine {
    pub(super) traits: EngineTraits,
    /// Physical copies on the GPU, in no order.
    gpu: Vec<Digest>,
    offloaded: Vec<(Digest, Medium)>,
    /// Hashes that the sliding-window group has announced and not removed.
    sparse: Vec<Digest>,
    /// A prompt whose prefill goes on in a later batch, and its next block and its end.
    running: Option<(&'static Prompt, usize, usize)>,
    /// Hashes of which a subscriber may count a copy too few, see [`Engine::doubt`].
    in_doubt: Vec<BlockHash>,
}

/// The events of one batch in the making.
#[derive(Debug, Default)]
struct Step {
    announcements: Vec<Announcement>,
    /// Positions of stores that begin a prompt, and which of their blocks were cached before: a further copy each.
    second_copies: Vec<(usize, Vec<BlockHash>)>,
}

impl Engine {
    pub(super) fn new(traits: EngineTraits) -> Self {
        Self { traits, gpu: Vec::new(), offloaded: Vec::new(), sparse: Vec::new(), running: None, in_doubt: Vec::new() }
    }

    /// Whether a lookup on the GPU hits the block.
    pub(super) fn holds(&self, hash: BlockHash) -> bool {
        self.gpu.iter().any(|digest| digest.low64() == hash)
    }

    /// Whether any tier has the block.
    pub(super) fn holds_anywhere(&self, hash: BlockHash) -> bool {
        self.holds(hash) || self.offloaded.iter().any(|(digest, _)| digest.low64() == hash)
    }

    /// Whether a correct subscriber may believe that the block is gone while it is not.
    pub(super) fn is_in_doubt(&self, hash: BlockHash) -> bool {
        self.in_doubt.contains(&hash)
    }

    /// Does some random work and tells of it, in the order of cause. Some work cannot be seen: then there are no
    /// events.
    pub(super) fn work(&mut self, rng: &mut fastrand::Rng) -> Vec<Announcement> {
        let mut step = Step::default();
        if rng.u8(..40) == 0 {
            self.clear(&mut step);
        }
        for _ in 0..rng.usize(1..4) {
            match rng.u8(..20) {
                0..12 => self.prefill(rng, &mut step),
                12..14 => self.evict_some(rng, &mut step),
                14..16 => self.offload(rng, &mut step),
                16 => step.announcements.push(Announcement::Unknown),
                17 => self.let_sparse_go(rng, &mut step),
                _ => self.go_on(rng, &mut step),
            }
        }
        self.doubt(&step);
        step.announcements
    }

    /// Computes one whole prompt of each kind that the engine sees, from its first block on and in one event, so that a
    /// subscriber of the live stream can prove all kinds.
    pub(super) fn show_all_kinds(&mut self, rng: &mut fastrand::Rng) -> Vec<Announcement> {
        let mut step = Step::default();
        let kinds: &[Kind] = if self.traits.all_kinds { &Kind::ALL } else { &[Kind::Plain] };
        for &kind in kinds {
            let prompt = rng.choice(prompts_of_kind(kind, self.traits.is_foreign)).expect("there is one per kind");
            self.store(prompt, 0, 3, rng, &mut step);
        }
        self.doubt(&step);
        step.announcements
    }

    fn prefill(&mut self, rng: &mut fastrand::Rng, step: &mut Step) {
        let is_foreign = self.traits.is_foreign;
        let prompts =
            if self.traits.all_kinds { prompts(is_foreign) } else { prompts_of_kind(Kind::Plain, is_foreign) };
        let prompt = rng.choice(prompts).expect("there are plain prompts");
        let end = rng.usize(1..=prompt.hashes.len());
        let n_hit = prompt.hashes[..end].iter().take_while(|hash| self.holds(**hash)).count();
        // The block with the last token is computed again; `prompt_logprobs` skips reading.
        let from = if rng.u8(..8) > 0 { n_hit.min(end - 1) } else { 0 };
        let to = rng.usize(from + 1..=end);
        if !self.make_room(prompt, from, to - from, rng, step) {
            return;
        }
        if from > 0 && rng.u8(..8) == 0 {
            // kv_cache_report_mode: full.
            step.announcements.push(Announcement::Stored { prompt, from: 0, to: from, medium: Medium::Gpu });
        }
        self.store(prompt, from, to, rng, step);
        self.running = (to < end).then_some((prompt, to, end));
        if rng.bool() {
            self.go_on(rng, step);
        }
    }

    /// The next chunk of the running prompt.
    fn go_on(&mut self, rng: &mut fastrand::Rng, step: &mut Step) {
        let Some((prompt, from, end)) = self.running.take() else { return };
        let to = rng.usize(from + 1..=end);
        if self.store(prompt, from, to, rng, step) && to < end {
            self.running = Some((prompt, to, end));
        }
    }

    /// Computes blocks of a prompt whose earlier ones are there; false: there is no room.
    fn store(
        &mut self,
        prompt: &'static Prompt,
        from: usize,
        to: usize,
        rng: &mut fastrand::Rng,
        step: &mut Step,
    ) -> bool {
        if !self.make_room(prompt, from, to - from, rng, step) {
            return false;
        }
        let sparse = self.traits.sliding.then_some(Announcement::Sparse { prompt, from, to });
        let (before, after) = if rng.bool() { (sparse, None) } else { (None, sparse) };
        if self.traits.sliding {
            self.sparse.push(prompt.digests[to - 1]);
        }
        step.announcements.extend(before);
        if from == 0 {
            let copied = prompt.hashes[..to].iter().copied().filter(|hash| self.holds(*hash)).collect();
            step.second_copies.push((step.announcements.len(), copied));
        }
        step.announcements.push(Announcement::Stored { prompt, from, to, medium: Medium::Gpu });
        step.announcements.extend(after);
        // Behind a block that is taken for gone, a chain leads to no root.
        if from > 0 && self.is_in_doubt(prompt.hashes[from - 1]) {
            self.in_doubt.extend(&prompt.hashes[from..to]);
        }
        self.gpu.extend(&prompt.digests[from..to]);
        true
    }

    /// Evicts until `n_blocks` fit, but not the `n_used` first blocks of `prompt`; false: they are in the way.
    fn make_room(
        &mut self,
        prompt: &Prompt,
        n_used: usize,
        n_blocks: usize,
        rng: &mut fastrand::Rng,
        step: &mut Step,
    ) -> bool {
        let mut evicted = Vec::new();
        while self.gpu.len() + n_blocks > self.traits.n_blocks {
            let Some(digest) = self.evict(&prompt.digests[..n_used], rng) else { break };
            evicted.push(digest);
        }
        announce_removed(evicted, Medium::Gpu, rng, step);
        self.gpu.len() + n_blocks <= self.traits.n_blocks
    }

    fn evict_some(&mut self, rng: &mut fastrand::Rng, step: &mut Step) {
        let evicted = (0..rng.usize(..4)).filter_map(|_| self.evict(&[], rng)).collect();
        announce_removed(evicted, Medium::Gpu, rng, step);
    }

    /// Drops one copy of a block that neither is among `used` nor belongs to the running prompt.
    fn evict(&mut self, used: &[Digest], rng: &mut fastrand::Rng) -> Option<Digest> {
        let running = self.running.map_or(&[][..], |(prompt, next, _)| &prompt.digests[..next]);
        let is_free = |digest: &Digest| !used.contains(digest) && !running.contains(digest);
        let free: Vec<usize> = (0..self.gpu.len()).filter(|idx| is_free(&self.gpu[*idx])).collect();
        rng.choice(free).map(|idx| self.gpu.swap_remove(idx))
    }

    fn offload(&mut self, rng: &mut fastrand::Rng, step: &mut Step) {
        if !self.traits.offloads || self.gpu.is_empty() {
            return;
        }
        let medium = if rng.bool() { Medium::Cpu } else { Medium::Storage };
        if self.offloaded.len() >= OFFLOAD_CAPACITY {
            let (digest, medium) = self.offloaded.swap_remove(rng.usize(..OFFLOAD_CAPACITY));
            announce_removed(vec![digest], medium, rng, step);
        }
        let digest = self.gpu[rng.usize(..self.gpu.len())];
        self.offloaded.push((digest, medium));
        step.announcements.push(match self.position(digest).filter(|_| rng.bool()) {
            Some((prompt, idx)) => Announcement::Stored { prompt, from: idx, to: idx + 1, medium },
            None => Announcement::Placeholder { digest, medium },
        });
    }

    fn let_sparse_go(&mut self, rng: &mut fastrand::Rng, step: &mut Step) {
        if !self.sparse.is_empty() {
            let digest = self.sparse.swap_remove(rng.usize(..self.sparse.len()));
            step.announcements.push(Announcement::SparseRemoved { digest });
        }
    }

    fn clear(&mut self, step: &mut Step) {
        *self = Self::new(self.traits);
        step.announcements.push(Announcement::Cleared);
    }

    /// Some prompt and position that have this digest.
    fn position(&self, digest: Digest) -> Option<(&'static Prompt, usize)> {
        let of = |prompt: &'static Prompt| Some((prompt, prompt.digests.iter().position(|other| *other == digest)?));
        prompts(self.traits.is_foreign).iter().find_map(of)
    }

    /// A further copy that is continued in the same batch looks like a full report of a reused prefix, which adds no
    /// copy: whoever is careful counts it too low.
    fn doubt(&mut self, step: &Step) {
        for (position, copied) in &step.second_copies {
            let Some((prompt, _, to)) = step.announcements[*position].stored_on_gpu() else { continue };
            let continues = |later: &Announcement| later.parent() == Some(prompt.hashes[to - 1]);
            if self.traits.reports || step.announcements[position + 1..].iter().any(continues) {
                self.in_doubt.extend(copied);
                self.doubt_what_follows(&step.announcements[position + 1..]);
            }
        }
    }

    /// Within the batch too, a chain behind a block that is taken for gone leads to no root.
    fn doubt_what_follows(&mut self, later: &[Announcement]) {
        for announcement in later {
            let Some((prompt, from, to)) = announcement.stored_on_gpu() else { continue };
            if announcement.parent().is_some_and(|parent| self.is_in_doubt(parent)) {
                self.in_doubt.extend(&prompt.hashes[from..to]);
            }
        }
    }
}

/// One event per block, as the GPU's pool writes them, or one for all.
fn announce_removed(digests: Vec<Digest>, medium: Medium, rng: &mut fastrand::Rng, step: &mut Step) {
    if digests.len() > 1 && rng.u8(..4) == 0 {
        step.announcements.push(Announcement::Removed { digests, medium });
    } else {
        let one_each = digests.into_iter().map(|digest| Announcement::Removed { digests: vec![digest], medium });
        step.announcements.extend(one_each);
    }
}
