use kvtier_core::{Generation, Tier};

use super::ClientError;

/// What became of one key of a `get_into`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GetOutcome {
    /// The first `length` bytes of the target are the block.
    Hit {
        /// Bytes of the block.
        length: u32,
        /// Where it was found.
        tier: Tier,
    },
    /// Not cached, or not in time: recompute.
    Miss,
    /// Cached, but a bound was reached: back off or recompute.
    Busy,
    /// The block is longer than the target, which was not touched.
    TooSmall {
        /// Bytes of the block.
        length: u32,
    },
}

impl GetOutcome {
    /// Whether the target holds the block.
    #[must_use]
    pub fn is_hit(self) -> bool {
        matches!(self, GetOutcome::Hit { .. })
    }
}

/// How many of the first keys of a lookup are cached.
#[must_use]
pub fn prefix_len(tiers: &[Option<Tier>]) -> usize {
    tiers.iter().take_while(|tier| tier.is_some()).count()
}

/// What became of one block of a put.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PutOutcome {
    /// Visible from now on.
    Published,
    /// It was cached already.
    Present,
    /// The namespace was invalidated meanwhile, or the slot expired: the bytes may be of an older generation.
    Stale,
    /// No room in time, or a bound was reached: skip it.
    Busy,
    /// An empty block, one over the node's limit, or a write that does not fit its slot: fix the call.
    Invalid,
}

/// What a request for a slot came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Writing<W> {
    /// Write, then seal.
    Open(W),
    /// The block is cached: move no bytes.
    Present,
    /// No room in time: skip it.
    Busy,
}

impl<W> Writing<W> {
    /// The writer, if there is one.
    pub fn writer(self) -> Option<W> {
        if let Writing::Open(writer) = self {
            Some(writer)
        } else {
            None
        }
    }

    pub(super) fn map<V>(self, map: impl FnOnce(W) -> V) -> Writing<V> {
        match self {
            Writing::Open(writer) => Writing::Open(map(writer)),
            Writing::Present => Writing::Present,
            Writing::Busy => Writing::Busy,
        }
    }
}

/// What a flush wrote.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flushed {
    /// Blocks that were written for it.
    pub written: u64,
    /// Blocks that could not be written: no room, too large, or the device is out of service.
    pub left_out: u64,
}

/// Answer to a watch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Watched {
    /// To ask with next.
    pub sequence: u64,
    /// Every namespace of the trust domain that was ever invalidated, with its generation in force.
    pub namespaces: Vec<(String, Generation)>,
}

impl Watched {
    pub(super) fn parse(sequence: u64, json: &str) -> Result<Watched, ClientError> {
        let listed: Vec<(String, u64)> = serde_json::from_str(json).map_err(ClientError::protocol)?;
        let namespaces = listed
            .into_iter()
            .map(|(name, generation)| (name, Generation(generation)));
        Ok(Watched {
            sequence,
            namespaces: namespaces.collect(),
        })
    }
}
