//! DECIDE: which block, from which tier, at what cost.
//!
//! This room holds the vocabulary and the one state machine, [`TierManager`]. It is pure: no clock (`now` is an
//! argument), no randomness, no thread, no I/O, no address. Absent on purpose: bytes, sockets, files, metrics clients.
//!
//! Read first: [`TierManager`] (commands in, [`Action`]s out, [`Event`]s back), [`BlockKey`] (what names a block),
//! [`Extent`] (where one copy lies) and, for whether a remote copy is worth fetching, [`cost::CostModel`].
#![forbid(unsafe_code)]

mod action;
mod answer;
mod block;
mod client_table;
pub mod cluster;
pub mod cost;
mod hbm_table;
mod holding;
mod host_table;
mod index;
mod key_map;
mod label;
mod label_table;
mod manager;
#[cfg(feature = "mutants")]
mod mutant;
mod namespace;
mod namespace_table;
mod nvme_table;
mod policy;
mod purge;
mod request;
mod restored;
mod settings;
mod statistics;
mod tier;
mod time;

pub use action::{Action, ClientId, Completion, Event, Failure, LeaseId, OperationId, RecordLabel, ReservationId};
pub use answer::{Answer, Fetched, Refusal, Reserved, Sealed};
pub use block::{BlockHash, BlockKey, Parent, Realization, RealizationId};
pub use label::{Label, Labels};
pub use manager::{Copied, Described, TierManager};
#[cfg(feature = "mutants")]
pub use mutant::Mutant;
pub use namespace::{Generation, NamespaceId, TrustDomain};
pub use policy::{
    Advice, BlockId, EvictionPolicy, ImageError, LeafFirstLru, LearnedTables, ListId, Plane, ReuseHazard, Use, Verdict,
};
pub use purge::{ForgetScope, PurgeEvidence};
pub use request::{Departure, FetchScope, Hints, Request, SealItem, SealRequest};
pub use restored::{Restored, RestoredRecord, RestoredSegment};
pub use settings::{CheckedCoreSettings, CoreSettings, Eviction, SettingsError};
pub use statistics::{DomainStatistics, Statistics};
pub use tier::{Extent, SegmentId, Tier};
pub use time::Time;
