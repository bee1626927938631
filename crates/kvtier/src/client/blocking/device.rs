use std::mem::ManuallyDrop;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvtier_core::{BlockHash, FetchScope, Tier};
use kvtier_transfer::gpu::{Copy, DeviceSlice, Gpu, HostRegistration, KvLayout, LayoutError, Place, Stream};
use kvtier_transfer::memory::MemorySlice;
use kvtier_transfer::{PIECES_MAX, Transfer};
use parking_lot::Mutex;

use super::{BlockWriter, Namespace};
use crate::ErrorKind;
use crate::client::handle::LeaseGuard;
use crate::client::session::Leasehold;
use crate::client::{ClientError, GetOutcome, Lineage, PutOutcome, Writing};

/// An engine's KV cache on a GPU, as the source of puts and the target of gets.
///
/// A block is some of the engine's pages, all layers of them, in the order that [`KvLayout`] describes. Bytes go straight between
/// the pages and the memory that the node shares: host memory, which is pinned for the device where the system allows that, or memory
/// of the same device, where the node keeps copies of blocks that are used again. Calls wait for the device. The engine's own work on the same pages must be done before a put and must not begin before a get has returned.
#[derive(Debug)]
pub struct DeviceCache {
    gpu: Arc<Gpu>,
    stream: Stream,
    layout: KvLayout,
    tensors: Vec<DeviceSlice>,
    pinned: Mutex<Vec<HostRegistration>>,
    /// Memory that the node shares could not be mapped: it is not asked for again.
    maps_nothing: AtomicBool,
}

/// A leased block, and where it was found.
type Lease = (Leasehold, Tier, LeaseGuard);

/// References that a registration has to its region.
const HELD_BY_PINNING: usize = 2;

/// A block and the engine's pages that hold, or are to hold, its bytes.
pub type Pages<'a> = (BlockHash, &'a [u32]);

impl DeviceCache {
    /// The cache that lies in `tensors`.
    ///
    /// # Errors
    /// `Invalid` when they do not fit the layout; `Unavailable` when the device has no stream.
    pub fn new(gpu: &Arc<Gpu>, layout: KvLayout, tensors: Vec<DeviceSlice>) -> Result<DeviceCache, ClientError> {
        layout.check(&tensors)?;
        if tensors.iter().any(|tensor| !Arc::ptr_eq(tensor.region().gpu(), gpu)) {
            return Err(ClientError::invalid("a tensor is memory of another device"));
        }
        Ok(DeviceCache {
            gpu: Arc::clone(gpu),
            stream: gpu.stream().map_err(device_failed)?,
            layout,
            tensors,
            pinned: Mutex::default(),
            maps_nothing: AtomicBool::new(false),
        })
    }

    /// Puts blocks from the engine's pages, keys in prefix order. One outcome each; a block that is cached moves no bytes.
    ///
    /// # Errors
    /// `Invalid` for pages that the layout does not have; `Unavailable` when the device fails, and nothing is published then;
    /// otherwise as any call.
    pub fn put(
        &self,
        namespace: &Namespace,
        lineage: impl Into<Lineage>,
        blocks: &[Pages<'_>],
        tokens: u32,
    ) -> Result<Vec<PutOutcome>, ClientError> {
        let lengths = self.lengths(blocks)?;
        self.check_device()?;
        let asked: Vec<(BlockHash, u32)> = blocks.iter().map(|(hash, _)| *hash).zip(lengths).collect();
        let mut outcomes = Vec::with_capacity(blocks.len());
        let mut open: Vec<(usize, BlockWriter)> = Vec::new();
        for (at, writing) in namespace.writers(lineage, &asked, tokens)?.into_iter().enumerate() {
            outcomes.push(match writing {
                Writing::Open(writer) => {
                    open.push((at, writer));
                    PutOutcome::Busy
                }
                Writing::Present => PutOutcome::Present,
                Writing::Busy => PutOutcome::Busy,
            });
        }
        let mut copies = Vec::new();
        for (at, writer) in &open {
            let slot = self.pin(writer.slice());
            copies.extend(self.layout.gather(&self.tensors, blocks[*at].1, self.layers(), &slot)?);
        }
        if let Err(failed) = self.run(copies) {
            if failed.may_go_on {
                // The device may still write them: the node must not give these slots to anybody.
                let _for_good = ManuallyDrop::new(open);
            }
            return Err(failed.error);
        }
        let (places, writers): (Vec<usize>, Vec<BlockWriter>) = open.into_iter().unzip();
        if !writers.is_empty() {
            for (at, outcome) in places.into_iter().zip(namespace.seal(writers)?) {
                outcomes[at] = outcome;
            }
        }
        Ok(outcomes)
    }

    /// Gets blocks into the engine's pages, keys in prefix order; with [`FetchScope::Prefix`] nothing behind the first miss is
    /// read.
    ///
    /// # Errors
    /// `Invalid` for pages that the layout does not have, or a block of another size than its pages; `Unavailable` when the device
    /// fails; otherwise as any call. On an error the bytes of all pages that were named are unspecified.
    pub fn get(
        &self,
        namespace: &Namespace,
        blocks: &[Pages<'_>],
        scope: FetchScope,
    ) -> Result<Vec<GetOutcome>, ClientError> {
        let lengths = self.lengths(blocks)?;
        self.check_device()?;
        let hashes: Vec<BlockHash> = blocks.iter().map(|(hash, _)| *hash).collect();
        let (leased, places) = self.lease(namespace, &hashes, scope)?;
        let mut copies = Vec::new();
        let mut outcomes = Vec::with_capacity(blocks.len());
        for (((leased, place), length), (_, pages)) in leased.iter().zip(places).zip(lengths).zip(blocks) {
            let (Some((_, tier, guard)), Some(place)) = (leased, place) else {
                outcomes.push(GetOutcome::Miss);
                continue;
            };
            if place.len() != length as usize {
                let given = place.len();
                return Err(ClientError::invalid(format!(
                    "the block has {given} bytes, its pages {length}: engines with other layouts need another realization"
                )));
            }
            guard.check()?;
            copies.extend(self.layout.scatter(&place, &self.tensors, pages, self.layers())?);
            outcomes.push(GetOutcome::Hit { length, tier: *tier });
        }
        // Slots that the device may still read may be somebody else's meanwhile: what it reads then goes where this call failed.
        self.run(copies).map_err(|failed| failed.error)?;
        // What was leased over a connection that is gone may be somebody else's by now.
        leased.iter().flatten().try_for_each(|(_, _, guard)| guard.check())?;
        Ok(outcomes)
    }

    /// Leases blocks, those that lie in memory of this device there; the place of each.
    fn lease(
        &self,
        namespace: &Namespace,
        hashes: &[BlockHash],
        scope: FetchScope,
    ) -> Result<(Vec<Option<Lease>>, Vec<Option<Place>>), ClientError> {
        let place = |leased: &Option<Lease>| match leased {
            None => Ok(None),
            Some((Leasehold::Host(slice), ..)) => Ok(Some(self.pin(slice))),
            Some((Leasehold::Device(extent), ..)) => extent.on(&self.gpu).map(|slice| Some(Place::Device(slice))),
        };
        if !self.maps_nothing.load(Ordering::Relaxed) {
            let leased = namespace.get_from(hashes, scope, Some(self.gpu.uuid()))?;
            match leased.iter().map(place).collect() {
                Ok(places) => return Ok((leased, places)),
                // The blocks lie elsewhere too.
                Err(words) => {
                    tracing::warn!(%words, "memory of the device that the node shares cannot be mapped: blocks are read from host memory");
                    self.maps_nothing.store(true, Ordering::Relaxed);
                }
            }
        }
        let leased = namespace.get_from(hashes, scope, None)?;
        let places: Result<Vec<Option<Place>>, String> = leased.iter().map(place).collect();
        Ok((leased, places.map_err(ClientError::protocol)?))
    }

    fn layers(&self) -> Range<u32> {
        0..self.layout.layers
    }

    fn lengths(&self, blocks: &[Pages<'_>]) -> Result<Vec<u32>, ClientError> {
        let length = |(_, pages): &Pages<'_>| {
            self.layout.check_pages(pages)?;
            let bytes = self.layout.block_bytes(pages.len())?;
            u32::try_from(bytes)
                .map_err(|_| ClientError::invalid(format!("a block of {bytes} bytes is over any limit")))
        };
        blocks.iter().map(length).collect()
    }

    /// A device that is lost moves nothing: the node need not be asked.
    fn check_device(&self) -> Result<(), ClientError> {
        match self.gpu.memory() {
            Err(error) if self.gpu.is_lost() => Err(device_failed(error)),
            _ => Ok(()),
        }
    }

    /// Copies everything, in batches, and returns when the device is done with all of them.
    fn run(&self, copies: Vec<Copy>) -> Result<(), Failed> {
        let mut running: Vec<Transfer> = Vec::new();
        let mut error = None;
        let mut rest = copies;
        while !rest.is_empty() {
            let later = rest.split_off(rest.len().min(PIECES_MAX));
            match self.stream.submit(std::mem::replace(&mut rest, later)) {
                Ok(transfer) => running.push(transfer),
                Err(refused) => {
                    error = Some(device_failed(refused));
                    break;
                }
            }
        }
        let began = !running.is_empty();
        for transfer in running {
            error = error.or(transfer.wait().map_err(device_failed).err());
        }
        let may_go_on = began && self.gpu.is_lost();
        error.map_or(Ok(()), |error| Err(Failed { error, may_go_on }))
    }

    /// Pins the memory of a slot for the device, where that can be; the place of its bytes.
    fn pin(&self, slice: &MemorySlice) -> Place {
        let region = slice.region();
        let mut pinned = self.pinned.lock();
        if !pinned.iter().any(|known| Arc::ptr_eq(known.region(), region)) {
            // Segments that the node took back are held by this and its registration alone.
            pinned.retain(|known| Arc::strong_count(known.region()) > HELD_BY_PINNING);
            // Without it the driver copies through buffers of its own: slower, and no less right.
            pinned.extend(self.gpu.register(region));
        }
        Place::Host(slice.clone())
    }
}

/// A copy that failed.
struct Failed {
    error: ClientError,
    /// Whether nobody can tell if the device is done.
    may_go_on: bool,
}

fn device_failed(error: impl std::fmt::Display) -> ClientError {
    ClientError::new(
        ErrorKind::Unavailable,
        format!("the device did not copy ({error}): recompute"),
    )
}

impl From<LayoutError> for ClientError {
    fn from(error: LayoutError) -> Self {
        ClientError::invalid(error.to_string())
    }
}
