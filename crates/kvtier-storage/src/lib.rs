//! KEEP: bytes in device memory, in host memory, on NVMe and in Redis.
//!
//! This room carries out what the core decided and answers with events. Absent on purpose: choosing a victim, a tier or
//! a retry; block lookups; clients.
//!
//! Read first: [`host::HostTier`] (segments of shared memory), [`nvme::NvmeTier`] (actions in, events out) and
//! [`nvme::NvmeEngine`] (who moves the bytes: an io_uring ring or a pool of threads). What leaves the node is sealed by [`remote::ObjectKey`]; slow tiers keep fewer
//! bytes by [`compression`].

pub mod compression;
pub mod hbm;
pub mod host;
pub mod nvme;
pub mod remote;
