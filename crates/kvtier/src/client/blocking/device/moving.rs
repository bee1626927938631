use std::mem::ManuallyDrop;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::client::locks::Mutex;
use kvtier_core::{BlockHash, FetchScope};
use kvtier_transfer::gpu::{Copy, EngineStream, Gpu, Mark, PinnedRegions, Place, Stream};
use kvtier_transfer::memory::MemorySlice;
use kvtier_transfer::{PIECES_MAX, Transfer};

use super::blocks::Blocks;
use crate::ErrorKind;
use crate::client::blocking::{BlockWriter, Namespace};
use crate::client::handle::LeasedBlock;
use crate::client::session::Leasehold;
use crate::client::{ClientError, GetOutcome, Lineage, PutOutcome, Writing};

/// How long blocks are read from host memory alone after device memory could not be mapped: a device that is full then need not be later.
const MAP_AGAIN_AFTER: Duration = Duration::from_secs(10);

/// What was leased of the keys of a get, and where each lies.
struct Found {
    leased: Vec<Option<LeasedBlock>>,
    places: Vec<Option<Place>>,
}

/// Moves blocks between a node and one device, over a stream of its own.
#[derive(Debug)]
pub(super) struct Mover {
    gpu: Arc<Gpu>,
    stream: Stream,
    pinned: PinnedRegions,
    /// Memory that the node shares could not be mapped: it is not asked for again before this.
    maps_again: Mutex<Option<Instant>>,
    /// Copies and marks of one call come together.
    order: Mutex<()>,
}

impl Mover {
    pub(super) fn new(gpu: &Arc<Gpu>) -> Result<Arc<Mover>, ClientError> {
        Ok(Arc::new(Mover {
            gpu: Arc::clone(gpu),
            stream: gpu.stream().map_err(device_failed)?,
            pinned: PinnedRegions::new(gpu),
            maps_again: Mutex::default(),
            order: Mutex::default(),
        }))
    }

    pub(super) fn begin_put(
        self: &Arc<Self>,
        namespace: &Namespace,
        lineage: Lineage,
        blocks: &impl Blocks,
        tokens: u32,
        engines: &[EngineStream],
    ) -> Result<Saving, ClientError> {
        let rooms = blocks.rooms(&self.gpu)?;
        self.check_device()?;
        let asked: Vec<(BlockHash, u32)> = blocks.hashes().into_iter().zip(rooms).collect();
        let mut saving = Saving {
            namespace: namespace.clone(),
            outcomes: Vec::with_capacity(asked.len()),
            open: Vec::new(),
            moving: Moving::new(self),
        };
        for (at, writing) in namespace.writers(lineage, &asked, tokens)?.into_iter().enumerate() {
            saving.outcomes.push(match writing {
                Writing::Open(writer) => {
                    saving.open.push((at, writer));
                    PutOutcome::Busy
                }
                Writing::Present => PutOutcome::Present,
                Writing::Busy => PutOutcome::Busy,
            });
        }
        let mut copies = Vec::new();
        for (at, writer) in &saving.open {
            copies.extend(blocks.gather(*at, &self.pin(writer.slice()))?);
        }
        saving.moving.begin(vec![copies], engines);
        if saving.moving.error.is_some() {
            return Err(saving.finish().expect_err("it failed"));
        }
        Ok(saving)
    }

    pub(super) fn begin_get(
        self: &Arc<Self>,
        namespace: &Namespace,
        blocks: &impl Blocks,
        scope: FetchScope,
        engines: &[EngineStream],
    ) -> Result<Loading, ClientError> {
        let rooms = blocks.rooms(&self.gpu)?;
        self.check_device()?;
        let Found { leased, places } = self.lease(namespace, &blocks.hashes(), scope)?;
        let mut outcomes = Vec::with_capacity(rooms.len());
        let mut wanted = Vec::new();
        for (at, ((leased, place), room)) in leased.iter().zip(places).zip(rooms).enumerate() {
            let (Some(leased), Some(place)) = (leased, place) else {
                outcomes.push(GetOutcome::Miss);
                continue;
            };
            let length = u32::try_from(place.len()).unwrap_or(u32::MAX);
            if !blocks.takes(place.len(), room)? {
                outcomes.push(GetOutcome::TooSmall { length });
                continue;
            }
            leased.guard.check()?;
            wanted.push((at, place));
            let tier = leased.tier;
            outcomes.push(GetOutcome::Hit { length, tier });
        }
        let mut steps = Vec::new();
        for step in 0..blocks.steps() {
            let mut copies = Vec::new();
            for (at, place) in &wanted {
                copies.extend(blocks.scatter(*at, step, place)?);
            }
            steps.push(copies);
        }
        let mut loading = Loading {
            outcomes,
            moving: Moving::new(self),
            leased,
        };
        loading.moving.begin(steps, engines);
        if loading.moving.error.is_some() {
            return Err(loading.finish().expect_err("it failed"));
        }
        Ok(loading)
    }

    /// Leases blocks, those that lie in memory of this device there; the place of each.
    fn lease(&self, namespace: &Namespace, hashes: &[BlockHash], scope: FetchScope) -> Result<Found, ClientError> {
        let place = |leased: &Option<LeasedBlock>| match leased.as_ref().map(|leased| &leased.place) {
            None => Ok(None),
            Some(Leasehold::Host(slice)) => Ok(Some(self.pin(slice))),
            Some(Leasehold::Device(extent)) => extent.on(&self.gpu).map(|slice| Some(Place::Device(slice))),
        };
        let may_map = self.maps_again.lock().is_none_or(|again| Instant::now() >= again);
        if may_map {
            let leased = namespace.get_from(hashes, scope, Some(self.gpu.uuid()))?;
            match leased.iter().map(place).collect() {
                Ok(places) => return Ok(Found { leased, places }),
                // The blocks lie elsewhere too.
                Err(words) => {
                    let words: String = words;
                    tracing::warn!(%words, "memory of the device that the node shares cannot be mapped: blocks are read from host memory for a while");
                    *self.maps_again.lock() = Some(Instant::now() + MAP_AGAIN_AFTER);
                }
            }
        }
        let leased = namespace.get_from(hashes, scope, None)?;
        let places: Result<Vec<Option<Place>>, String> = leased.iter().map(place).collect();
        let places = places.map_err(ClientError::protocol)?;
        Ok(Found { leased, places })
    }

    /// A device that is lost moves nothing: the node need not be asked.
    fn check_device(&self) -> Result<(), ClientError> {
        match self.gpu.memory() {
            Err(error) if self.gpu.is_lost() => Err(device_failed(error)),
            _ => Ok(()),
        }
    }

    /// Pins the memory of a slot for the device, where that can be; the place of its bytes.
    fn pin(&self, slice: &MemorySlice) -> Place {
        self.pinned.pin(slice.region());
        Place::Host(slice.clone())
    }
}

/// Copies of one call, in steps.
#[derive(Debug)]
struct Moving {
    mover: Arc<Mover>,
    running: Vec<Transfer>,
    /// The end of each step.
    marks: Vec<Mark>,
    began: bool,
    error: Option<ClientError>,
}

impl Moving {
    fn new(mover: &Arc<Mover>) -> Moving {
        Moving {
            mover: Arc::clone(mover),
            running: Vec::new(),
            marks: Vec::new(),
            began: false,
            error: None,
        }
    }

    /// Tells the device, step by step, in batches.
    fn begin(&mut self, steps: Vec<Vec<Copy>>, engines: &[EngineStream]) {
        let mover = Arc::clone(&self.mover);
        let _in_order = mover.order.lock();
        let begun = self.try_to_begin(&mover.stream, steps, engines);
        self.error = begun.err();
    }

    fn try_to_begin(
        &mut self,
        stream: &Stream,
        steps: Vec<Vec<Copy>>,
        engines: &[EngineStream],
    ) -> Result<(), ClientError> {
        for engine in engines {
            stream.after_engine(engine).map_err(device_failed)?;
        }
        for copies in steps {
            let mut rest = copies;
            while !rest.is_empty() {
                let later = rest.split_off(rest.len().min(PIECES_MAX));
                let batch = std::mem::replace(&mut rest, later);
                self.running.push(stream.submit(batch).map_err(device_failed)?);
                self.began = true;
            }
            self.marks.push(stream.mark().map_err(device_failed)?);
        }
        Ok(())
    }

    /// What `engine` is given from now on waits for a step and those before it.
    fn hold(&self, engine: &EngineStream, step: usize) -> Result<(), ClientError> {
        let mark = self.marks.get(step);
        let mark = mark.ok_or_else(|| ClientError::invalid(format!("there are {} layers", self.marks.len())))?;
        engine.wait_for(mark).map_err(device_failed)
    }

    /// Until the device is done, or lost.
    fn wait(&mut self) {
        for transfer in self.running.drain(..) {
            let waited = transfer.wait().map_err(device_failed);
            if let Err(error) = waited {
                self.error.get_or_insert(error);
            }
        }
    }

    /// Whether nobody can tell if the device is done.
    fn may_go_on(&self) -> bool {
        self.began && self.error.is_some() && self.mover.gpu.is_lost()
    }
}

/// A put under way: the device reads pages. Dropping it waits for that and publishes nothing.
#[derive(Debug)]
#[must_use = "nothing is published before it is finished"]
pub struct Saving {
    namespace: Namespace,
    outcomes: Vec<PutOutcome>,
    open: Vec<(usize, BlockWriter)>,
    moving: Moving,
}

impl Saving {
    /// What `engine` is given from now on waits until the pages were read: then they may be written again. The caller does not
    /// wait.
    ///
    /// # Errors
    /// `Unavailable` when the device fails.
    pub fn hold(&self, engine: &EngineStream) -> Result<(), ClientError> {
        self.moving.hold(engine, 0)
    }

    /// Waits for the device and publishes. One outcome for each block.
    ///
    /// # Errors
    /// `Unavailable` when the device fails, and nothing is published then; otherwise as any call.
    pub fn finish(mut self) -> Result<Vec<PutOutcome>, ClientError> {
        self.moving.wait();
        if let Some(error) = self.moving.error.clone() {
            return Err(error);
        }
        let (places, writers): (Vec<usize>, Vec<BlockWriter>) = self.open.drain(..).unzip();
        let mut outcomes = std::mem::take(&mut self.outcomes);
        if !writers.is_empty() {
            for (at, outcome) in places.into_iter().zip(self.namespace.seal(writers)?) {
                outcomes[at] = outcome;
            }
        }
        Ok(outcomes)
    }
}

impl Drop for Saving {
    fn drop(&mut self) {
        self.moving.wait();
        if self.moving.may_go_on() {
            // The device may still write them: the node must not give these slots to anybody.
            let _for_good = ManuallyDrop::new(std::mem::take(&mut self.open));
        }
    }
}

/// A get under way: the device writes pages, layer by layer. Blocks stay where they are until it is done; dropping it waits for
/// that.
#[derive(Debug)]
#[must_use = "pages are not what was asked for before the device is done"]
pub struct Loading {
    outcomes: Vec<GetOutcome>,
    // Waited for before leases are given back: fields are dropped in their order, after `drop`.
    moving: Moving,
    leased: Vec<Option<LeasedBlock>>,
}

impl Loading {
    /// What becomes of each block, if nothing fails.
    #[must_use]
    pub fn outcomes(&self) -> &[GetOutcome] {
        &self.outcomes
    }

    /// Steps that can be waited for: the layers of a cache, or one.
    #[must_use]
    pub fn layers(&self) -> u32 {
        u32::try_from(self.moving.marks.len()).unwrap_or(u32::MAX)
    }

    /// What `engine` is given from now on waits until these layers, and those before them, are in their pages. The caller does not
    /// wait. Whether they are what was asked for says [`Loading::finish`].
    ///
    /// # Errors
    /// `Invalid` for layers that there are not; `Unavailable` when the device fails.
    pub fn hold(&self, engine: &EngineStream, layers: Range<u32>) -> Result<(), ClientError> {
        let count = self.layers();
        if layers.start > layers.end || layers.end > count {
            return Err(ClientError::invalid(format!(
                "layers from {} to {}: there are {count} layers",
                layers.start, layers.end
            )));
        }
        match layers.end.checked_sub(1) {
            Some(last) if !layers.is_empty() => self.moving.hold(engine, last as usize),
            _ => Ok(()),
        }
    }

    /// Waits for the device. One outcome for each block.
    ///
    /// # Errors
    /// `Unavailable` when the device fails, `Closed` when the connection was lost meanwhile: then the bytes of all pages that were
    /// named are unspecified.
    pub fn finish(mut self) -> Result<Vec<GetOutcome>, ClientError> {
        // Slots that a lost device may still read may be somebody else's meanwhile: what it reads then goes where this call failed.
        self.moving.wait();
        if let Some(error) = self.moving.error.clone() {
            return Err(error);
        }
        // What was leased over a connection that is gone may be somebody else's by now.
        self.leased
            .iter()
            .flatten()
            .try_for_each(|leased| leased.guard.check())?;
        Ok(std::mem::take(&mut self.outcomes))
    }
}

impl Drop for Loading {
    fn drop(&mut self) {
        self.moving.wait();
    }
}

fn device_failed(error: impl std::fmt::Display) -> ClientError {
    ClientError::new(
        ErrorKind::Unavailable,
        format!("the device did not copy ({error}): recompute"),
    )
}
