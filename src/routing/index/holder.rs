//! Who holds a block: a rank of an endpoint, on one of its tiers.

use crate::routing::endpoint::EndpointId;

/// Where an engine keeps a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Tier {
    /// In the memory that the model runs in: reused at once.
    Gpu,
    /// In the host's memory: copied back before it is reused.
    Cpu,
    /// On a disk or a remote store.
    Storage,
}

impl Tier {
    /// Every tier, nearest first.
    pub const ALL: [Self; 3] = [Self::Gpu, Self::Cpu, Self::Storage];

    /// Name in metrics, spans and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Gpu => "gpu",
            Self::Cpu => "cpu",
            Self::Storage => "storage",
        }
    }
}

/// One tier of one data-parallel rank of one endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Holder {
    /// The endpoint.
    pub endpoint: EndpointId,
    /// Its data-parallel rank: each has a cache of its own.
    pub rank: u32,
    /// The tier.
    pub tier: Tier,
}
