mod leaf_first_lru;

pub use leaf_first_lru::LeafFirstLru;

use crate::{Tier, Time};

/// A block as the policy sees it: its place in the index. Reused after the block is forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(pub u32);

/// What a list orders. A block is on at most one list of each plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Plane {
    /// Host copies: per host group one list of blocks in use and one of those that can be dropped at once.
    Host,
    /// NVMe copies.
    Nvme,
    /// All blocks of a namespace that has a quota.
    Namespace,
}

/// One order of blocks, from the next victim to the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ListId {
    /// Of which plane.
    pub plane: Plane,
    /// Which list of it; small numbers, reused.
    pub index: u32,
}

/// What the manager says of a candidate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// It can go.
    Take,
    /// Its children are cached: set it aside until [`EvictionPolicy::unpark`], then it is next.
    Park,
    /// Somebody holds it: take it off the order until [`EvictionPolicy::unpark`], then it is next.
    Shelve,
}

/// The order in which copies go. Sees places in the index, lists and times: no key, no byte, no address.
///
/// The manager judges whether a candidate may go (see [`Verdict`]); the policy only proposes, best victim first.
pub trait EvictionPolicy: Send {
    /// A copy appeared: `block` joins `list` as the one used last; with `beside`, which is on the list and was used
    /// together with it, as the one that goes just before that.
    fn insert(&mut self, list: ListId, block: BlockId, beside: Option<BlockId>, now: Time);

    /// `block` joins `list` as the next victim; when it was used last stays as it is.
    fn insert_oldest(&mut self, list: ListId, block: BlockId);

    /// A copy was used: `block` becomes the last of `list`, parked and shelved ones too; with `beside`, the one before that.
    fn touch(&mut self, list: ListId, block: BlockId, beside: Option<BlockId>, now: Time);

    /// Whether `block` was used so lately that what is used now counts as used together with it.
    fn is_recent(&self, block: BlockId, now: Time) -> bool;

    /// A copy is gone: `block` leaves `list`.
    fn remove(&mut self, list: ListId, block: BlockId);

    /// Takes `block` off the order of `list` until it is unparked or touched.
    fn shelve(&mut self, list: ListId, block: BlockId);

    /// The reason for parking or shelving `block` is gone: it is the next victim. Nothing where it was neither.
    fn unpark(&mut self, list: ListId, block: BlockId);

    /// The next victim of `list`, which stays on it. With `parked`, those set aside because of their children count too,
    /// first; the judge must not park then.
    fn victim(&mut self, list: ListId, parked: bool, judge: &mut dyn FnMut(BlockId) -> Verdict) -> Option<BlockId>;

    /// How long ago the next candidate of `list` was last used, in units of 2^20 ns, to compare lists.
    fn age(&self, list: ListId, now: Time) -> Option<u32>;

    /// Whether a copy of `block` is worth writing to `tier` when its host slot is needed; else the block is forgotten. Not asked
    /// where its children are cached, nor by a flush.
    fn admit(&mut self, block: BlockId, tier: Tier) -> bool;

    /// Whether `block` is worth copying when its NVMe segment is reclaimed.
    fn keep(&mut self, block: BlockId) -> bool;

    /// Whether `block` is on `list`, parked and shelved included.
    fn contains(&self, list: ListId, block: BlockId) -> bool;

    /// Blocks on `list`, parked and shelved included.
    fn length(&self, list: ListId) -> usize;

    /// Memory of the policy's tables, bytes.
    fn memory_bytes(&self) -> u64;

    /// Panics where the policy's tables contradict each other.
    fn check_invariants(&self);
}
