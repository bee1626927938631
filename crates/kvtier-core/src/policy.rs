mod hazard;
mod leaf_first_lru;

pub use hazard::{ImageError, LearnedTables, ReuseHazard};
pub use leaf_first_lru::LeafFirstLru;

use std::time::Duration;

use crate::{NamespaceId, Tier, Time};

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

/// What the manager knows of a block that appears or is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Use {
    /// The block before it in its prefix, where that is in the index.
    pub parent: Option<BlockId>,
    /// Tokens in the block.
    pub tokens: u16,
    /// Bytes that it takes where it lies; 0 where that is not known, or the same for all.
    pub bytes: u32,
    /// Whose it is.
    pub namespace: NamespaceId,
    /// Names the block's key, for as long as the manager lives: the same key, the same number.
    pub fingerprint: u64,
}

/// What a client says about the future of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Advice {
    /// There will be no further turn: its blocks go first.
    Closed,
    /// There will be one before this time: its blocks go last until then.
    PinnedUntil(Time),
    /// An agent works on it and will ask again by this time, as far as can be said: its blocks go after all others that are not pinned,
    /// until then.
    ExpectedBy(Time),
    /// The prompt that these blocks are of, and what is cached of its answer behind it, has been answered, with so many tokens. Who gets a word or two asks again at other times than who reads a page.
    Answered(u32),
}

/// The order in which copies go. Sees places in the index, lists and times: no key, no byte, no address.
///
/// The manager judges whether a candidate may go (see [`Verdict`]); the policy only proposes, best victim first.
pub trait EvictionPolicy: Send {
    /// `block` is cached from now on, on whichever tier. Before it joins any list.
    fn appeared(&mut self, block: BlockId, usage: Use, now: Time) {
        let _ = (block, usage, now);
    }

    /// A request uses the cached `block`. Its parent, where it uses that too, was named before it.
    fn used(&mut self, block: BlockId, usage: Use, now: Time) {
        let _ = (block, usage, now);
    }

    /// The last copy of `block` is gone, after it left its lists: its place may name another block from now on.
    fn forgotten(&mut self, block: BlockId, fingerprint: u64) {
        let _ = (block, fingerprint);
    }

    /// A client says what will become of the session that these blocks, in prefix order, are the prompt of. Ignored where a policy has no
    /// use for it.
    fn advise(&mut self, blocks: &[BlockId], advice: Advice, now: Time) {
        let _ = (blocks, advice, now);
    }

    /// The share of blocks like this one that are used again within this time from now; `None` where the policy does not know.
    fn return_share(&mut self, block: BlockId, within: Duration) -> Option<f64> {
        let _ = (block, within);
        None
    }

    /// What was learned so far, to be kept across restarts; `None` where a policy learns nothing.
    fn learned(&self) -> Option<LearnedTables> {
        None
    }

    /// Adds what was learned earlier or elsewhere.
    fn learn(&mut self, learned: &LearnedTables) {
        let _ = learned;
    }

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

    /// Whether what was used longest ago goes first, and nothing else counts: then age in the log of NVMe is age in use.
    fn goes_by_age(&self) -> bool {
        true
    }

    /// How long ago the next candidate of `list` was last used, in units of 2^20 ns, to compare lists.
    fn age(&self, list: ListId, now: Time) -> Option<u32>;

    /// Whether a copy of `block` is worth writing to `tier` when its host slot is needed; else the block is forgotten. Not asked
    /// where its children are cached, nor by a flush.
    fn admit(&mut self, block: BlockId, tier: Tier) -> bool;

    /// Whether `block`, which is on `list`, is worth copying when its NVMe segment is reclaimed. `again`: it was used since it
    /// was written there.
    fn keep(&mut self, list: ListId, block: BlockId, again: bool) -> bool;

    /// Whether `block` is on `list`, parked and shelved included.
    fn contains(&self, list: ListId, block: BlockId) -> bool;

    /// Blocks on `list`, parked and shelved included.
    fn length(&self, list: ListId) -> usize;

    /// Memory of the policy's tables, bytes.
    fn memory_bytes(&self) -> u64;

    /// Panics where the policy's tables contradict each other.
    fn check_invariants(&self);
}
