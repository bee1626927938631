use crate::{Extent, LeaseId, OperationId, ReservationId, Tier};

/// An answer, or the promise of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer<T> {
    /// Now.
    Ready(T),
    /// Later: [`crate::Action::FetchDone`] or [`crate::Action::ReserveDone`] will carry this operation.
    Pending(OperationId),
}

/// What became of one key of a fetch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fetched {
    /// Not here, or not in time: recompute.
    Miss,
    /// Here, but a bound was reached: back off or recompute.
    Busy,
    /// Here, and not reclaimed before the lease is released or expires.
    Leased {
        /// To release.
        lease: LeaseId,
        /// Where: in device memory where `tier` says so, else in host memory.
        extent: Extent,
        /// Where it was found.
        tier: Tier,
        /// CRC32C of the payload, where it is known: always when the block crossed a device.
        checksum: Option<u32>,
    },
}

/// What became of one key of a reserve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reserved {
    /// The block is cached: move no bytes.
    Present,
    /// No room in time, or a bound was reached: skip it.
    Busy,
    /// Write here, then seal.
    Granted {
        /// To seal or abandon.
        reservation: ReservationId,
        /// Where in host memory; its length is the one asked for.
        extent: Extent,
    },
}

/// What became of one item of a seal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Sealed {
    /// Visible from now on.
    Published,
    /// Someone was first; the slot is free again.
    Present,
    /// The generation moved on, or the reservation expired or is unknown; the slot is free again.
    Stale,
    /// The namespace's quota or the index is full; the slot is free again.
    Busy,
    /// A length over the slot's, or another client's reservation; nothing changed.
    Invalid,
}

/// A command that was not carried out at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Refusal {
    /// The namespace is of another trust domain, or does not exist: the same answer for both.
    #[error("denied: the namespace is not one of this client's trust domain")]
    Denied,
    /// A bound was reached: back off or recompute.
    #[error("busy: back off or recompute")]
    Busy,
    /// No new leases or reservations are given any more.
    #[error("draining: no new leases or reservations")]
    Draining,
    /// The call cannot be right.
    #[error("invalid: {0}")]
    Invalid(&'static str),
    /// Connect first.
    #[error("unknown client: connect first")]
    UnknownClient,
}
