use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use kvtier_core::{BlockHash, Extent, Fetched, Generation, LeaseId, Realization, SegmentId, Tier};
use kvtier_transfer::memory::{Access, MemoryRegion, MemorySlice};

use super::device_memory::{DeviceExtent, SharedDeviceMemory};
use super::known::KnownKeys;
use super::slots::Slots;
use super::{ClientError, ClientOptions};
use crate::wire::{Array, KEYS_MAX, Reply, VERSION_MAX, VERSION_MIN, Welcome};

/// A namespace in one form, by name. Registered once per client; its index names it in every session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct NamespaceName {
    pub(super) name: Arc<str>,
    pub(super) realization: Realization,
}

/// A namespace on this connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Opened {
    pub(super) handle: u32,
    pub(super) generation: Generation,
}

/// Memory that the node shares.
#[derive(Debug)]
enum SharedSegment {
    Host(Arc<MemoryRegion>),
    Device(Arc<SharedDeviceMemory>),
}

/// Where leased bytes lie.
#[derive(Clone, Debug)]
pub(super) enum Leasehold {
    Host(MemorySlice),
    Device(DeviceExtent),
}

/// One key of a fetch that was leased.
#[derive(Debug)]
pub(super) struct Leased {
    pub(super) lease: LeaseId,
    pub(super) place: Leasehold,
    pub(super) tier: Tier,
}

impl Leased {
    /// The bytes, for who did not ask for device memory.
    pub(super) fn slice(&self) -> Result<&MemorySlice, ClientError> {
        match &self.place {
            Leasehold::Host(slice) => Ok(slice),
            Leasehold::Device(_) => Err(ClientError::protocol("a block in device memory that nobody asked for")),
        }
    }
}

/// One key of a fetch.
#[derive(Debug)]
pub(super) enum Got {
    Miss,
    Busy,
    Leased(Leased),
}

/// What both clients know about one connection. Sans I/O: told what arrived, asked what to send.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) welcome: Welcome,
    pub(super) epoch: u64,
    pub(super) slots: Slots,
    pub(super) known: KnownKeys,
    segments: HashMap<SegmentId, SharedSegment>,
    /// By the index of the registered name.
    opened: Vec<Option<Opened>>,
}

impl Session {
    /// Checks the node's welcome.
    pub(super) fn begin(welcome: Welcome, epoch: u64, options: &ClientOptions) -> Result<Session, ClientError> {
        if !(VERSION_MIN..=VERSION_MAX).contains(&welcome.version) || welcome.batch_keys_max == 0 {
            return Err(ClientError::protocol(
                "a welcome with a version or limit that was not offered",
            ));
        }
        Ok(Session {
            welcome,
            epoch,
            slots: Slots::new(options.ahead_bytes_max, welcome.reservation_ttl_ms),
            known: KnownKeys::new(options.known_keys_max),
            segments: HashMap::new(),
            opened: Vec::new(),
        })
    }

    /// Most keys in one request.
    pub(super) fn keys_max(&self) -> usize {
        usize::try_from(self.welcome.batch_keys_max)
            .unwrap_or(KEYS_MAX)
            .min(KEYS_MAX)
    }

    pub(super) fn opened(&self, index: usize) -> Option<Opened> {
        self.opened.get(index).copied().flatten()
    }

    pub(super) fn open(&mut self, index: usize, opened: Opened) {
        if self.opened.len() <= index {
            self.opened.resize(index + 1, None);
        }
        self.opened[index] = Some(opened);
    }

    /// The node said which generation is in force.
    pub(super) fn observe(&mut self, index: usize, generation: Generation) {
        let Some(Some(opened)) = self.opened.get_mut(index) else {
            return;
        };
        if opened.generation != generation {
            opened.generation = generation;
            self.known.clear();
        }
    }

    /// The part of host memory that an extent names.
    pub(super) fn slice(&self, extent: &Extent) -> Result<MemorySlice, ClientError> {
        match self.leasehold(extent)? {
            Leasehold::Host(slice) => Ok(slice),
            Leasehold::Device(_) => Err(ClientError::protocol("a slot in device memory")),
        }
    }

    /// The memory, of whatever kind, that an extent names.
    fn leasehold(&self, extent: &Extent) -> Result<Leasehold, ClientError> {
        let segment = self.segments.get(&extent.segment);
        let segment = segment.ok_or_else(|| ClientError::protocol("a block in memory that was not shared"))?;
        let offset = usize::try_from(extent.offset).unwrap_or(usize::MAX);
        let length = usize::try_from(extent.length).unwrap_or(usize::MAX);
        Ok(match segment {
            SharedSegment::Host(region) => {
                Leasehold::Host(region.slice(offset, length).map_err(ClientError::protocol)?)
            }
            SharedSegment::Device(memory) => Leasehold::Device(DeviceExtent::new(memory, offset, length)),
        })
    }

    /// A notice of the node's own. `fds` are the descriptors that came and were not used yet.
    pub(super) fn absorb_notice(&mut self, reply: &Reply<'_>, fds: &mut VecDeque<OwnedFd>) -> Result<(), ClientError> {
        match *reply {
            Reply::SegmentAdded { segment, bytes } => {
                let fd = fds
                    .pop_front()
                    .ok_or_else(|| ClientError::protocol("a segment without its descriptor"))?;
                let bytes = usize::try_from(bytes).map_err(ClientError::protocol)?;
                let shared = if segment.is_on_device() {
                    SharedSegment::Device(Arc::new(SharedDeviceMemory::new(fd, bytes)))
                } else {
                    SharedSegment::Host(MemoryRegion::attach(fd, bytes, Access::ReadWrite, true)?)
                };
                self.segments.insert(segment, shared);
            }
            Reply::SegmentRemoved { segment } => {
                self.segments.remove(&segment);
            }
            _ => {}
        }
        Ok(())
    }

    /// Appends what a fetch brought, one entry per key.
    pub(super) fn absorb_fetched(
        &mut self,
        index: usize,
        hashes: &[BlockHash],
        generation: Generation,
        outcomes: Array<'_, Fetched>,
        got: &mut Vec<Got>,
    ) -> Result<(), ClientError> {
        if outcomes.len() != hashes.len() {
            return Err(ClientError::protocol("another number of answers than keys"));
        }
        self.observe(index, generation);
        let handle = self.opened(index).map_or(0, |opened| opened.handle);
        for (outcome, hash) in outcomes.iter().zip(hashes) {
            got.push(match outcome {
                Fetched::Miss => {
                    self.known.remove(handle, *hash);
                    Got::Miss
                }
                Fetched::Busy => Got::Busy,
                Fetched::Leased {
                    lease, extent, tier, ..
                } => Got::Leased(Leased {
                    lease,
                    place: self.leasehold(&extent)?,
                    tier,
                }),
            });
        }
        Ok(())
    }

    /// Slots came: for the next puts.
    pub(super) fn absorb_slots(&mut self, slots: Array<'_, crate::wire::Slot>) {
        if !slots.is_empty() {
            self.slots.put(slots.iter(), Instant::now());
        }
    }
}
