use crate::{BlockHash, ClientId, Generation, Label, NamespaceId, Parent, RealizationId, ReservationId, Time};

/// What a client asks about: keys of one namespace and realization, in prefix order.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Who asks.
    pub client: ClientId,
    /// Whose blocks.
    pub namespace: NamespaceId,
    /// In which form.
    pub realization: RealizationId,
    /// Which blocks, the parent before its child.
    pub hashes: &'a [BlockHash],
    /// What else the caller knows.
    pub hints: Hints,
    /// When an answer stops being useful: what still waits then is answered as it stands.
    pub deadline: Time,
}

/// What a caller may know beyond the keys. Carried for policies that use it; leaf-first LRU does not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hints {
    /// Tokens of the whole prompt.
    pub prompt_tokens: Option<u32>,
    /// Tokens of the prefix that the engine already has.
    pub local_prefix_tokens: Option<u32>,
    /// How long the request has queued, microseconds.
    pub queue_wait_us: Option<u64>,
    /// The engine can recompute a part while the rest is fetched. Then the first blocks of a lookup, or of a fetch of each, may be left
    /// out though they exist elsewhere: those are its part.
    pub can_split: bool,
    /// What a put is part of, to be purged by: a block carries the labels of all its puts. Beside puts it means nothing.
    pub label: Option<Label>,
    /// The caller can read the pool in device memory: what it fetches may be leased there. Set by a node for who named its device; among
    /// a client's own hints it means nothing.
    pub device: bool,
    /// Requests of one conversation share this.
    pub session: Option<u64>,
}

/// Which keys of a fetch are worth reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FetchScope {
    /// Those before the first miss; the rest are answered as misses unread.
    Prefix,
    /// Each that is present.
    Each,
}

/// What a client publishes: slots that it wrote for one namespace, realization and generation.
#[derive(Clone, Copy, Debug)]
pub struct SealRequest<'a> {
    /// Who publishes.
    pub client: ClientId,
    /// Whose blocks.
    pub namespace: NamespaceId,
    /// In which form.
    pub realization: RealizationId,
    /// The generation that they were written for.
    pub generation: Generation,
    /// What they are part of.
    pub label: Option<Label>,
    /// In prefix order, so that a block finds its parent.
    pub items: &'a [SealItem],
}

/// A written slot to publish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SealItem {
    /// The slot.
    pub reservation: ReservationId,
    /// Under which hash.
    pub hash: BlockHash,
    /// After which block.
    pub parent: Parent,
    /// Bytes written; at most the slot's.
    pub length: u32,
    /// Tokens in the block.
    pub tokens: u32,
}

/// How a client left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Departure {
    /// It promised to touch nothing any more: all it held is free at once.
    Clean,
    /// Its process is dead: the same.
    Gone,
    /// The connection is lost but the process still maps the memory: all it held is quarantined until it is gone.
    Alive,
}
