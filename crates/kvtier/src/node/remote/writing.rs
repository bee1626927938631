//! Puts are written behind: a thread leases what was published, seals it and sends it. Nobody waits for it, and it may fall behind: then
//! blocks are left out.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};
use kvtier_core::{BlockHash, FetchScope, Fetched, LeaseId, NamespaceId, RealizationId, TrustDomain};
use kvtier_storage::remote::{Contents, OBJECT_OVERHEAD_BYTES, ObjectName, StoreError};
use parking_lot::{Mutex, MutexGuard};

use super::{Place, Remote};
use crate::node::peers::request;

/// Bytes that are sealed and sent together, at least one block.
const PART_BYTES: u64 = 4 << 20;
/// Blocks that are waited for together.
const GATHERED_MAX: usize = 512;
/// How long a wait for a GPU that a request told is reckoned with when blocks are chosen.
const WAIT_MEMORY: Duration = Duration::from_secs(300);

/// Blocks that a client has just published.
pub(super) struct Offer {
    pub(super) domain: TrustDomain,
    pub(super) namespace: NamespaceId,
    pub(super) realization: RealizationId,
    pub(super) hashes: Vec<BlockHash>,
}

/// The queue of the writing thread.
pub(super) struct Writing {
    offers: Sender<Offer>,
    /// Held while blocks are leased, sealed and sent.
    busy: Mutex<()>,
    /// The longest wait for a GPU that requests told lately, microseconds, and since when.
    wait_us: AtomicU64,
    told: Mutex<Option<Instant>>,
    stopping: AtomicBool,
}

impl Writing {
    pub(super) fn new(capacity: usize) -> (Writing, Receiver<Offer>) {
        let (offers, work) = crossbeam_channel::bounded(capacity);
        let writing = Writing {
            offers,
            busy: Mutex::default(),
            wait_us: AtomicU64::new(0),
            told: Mutex::default(),
            stopping: AtomicBool::new(false),
        };
        (writing, work)
    }

    /// False when too many wait.
    pub(super) fn submit(&self, offer: Offer) -> bool {
        self.offers.try_send(offer).is_ok()
    }

    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
    }

    /// Keeps the writing thread from writing; `None` when it was at it until then.
    pub(super) fn exclusive(&self, until: Instant) -> Option<MutexGuard<'_, ()>> {
        self.busy.try_lock_until(until)
    }

    /// A request said how long it waits for a GPU.
    pub(super) fn told_wait(&self, wait_us: u64) {
        let mut told = self.told.lock();
        let is_stale = told.is_none_or(|told| told.elapsed() > WAIT_MEMORY);
        if is_stale || wait_us >= self.wait_us.load(Ordering::Relaxed) {
            self.wait_us.store(wait_us, Ordering::Relaxed);
            *told = Some(Instant::now());
        }
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }
}

/// What is sent together.
#[derive(Default)]
struct Part {
    objects: Vec<(ObjectName, Vec<u8>)>,
    bytes: u64,
    block_bytes: u64,
    compressed: u64,
}

impl Remote {
    /// The writing thread.
    pub(super) fn write(&self, offers: &Receiver<Offer>) {
        let mut next = None;
        while !self.writing.is_stopping() {
            let waiting = Duration::from_millis(200);
            let Some(mut offer) = next.take().or_else(|| offers.recv_timeout(waiting).ok()) else {
                continue;
            };
            if !self.is_worth_keeping(&offer) {
                continue;
            }
            next = self.gather(&mut offer, offers);
            let mut rest = offer.hashes.as_slice();
            while !rest.is_empty() && !self.writing.is_stopping() {
                let tried = if self.is_away() {
                    0
                } else {
                    self.write_part(&offer, rest)
                };
                if tried == 0 {
                    self.counts.dropped.fetch_add(rest.len() as u64, Ordering::Relaxed);
                    break;
                }
                rest = &rest[tried..];
            }
        }
    }

    /// Adds what comes soon and belongs to the same, where the server has it cheaper together; what belongs to another.
    fn gather(&self, offer: &mut Offer, offers: &Receiver<Offer>) -> Option<Offer> {
        let until = Instant::now() + self.store.linger();
        while offer.hashes.len() < GATHERED_MAX {
            let more = offers.recv_deadline(until).ok()?;
            let is_same =
                (more.domain, more.namespace, more.realization) == (offer.domain, offer.namespace, offer.realization);
            if !is_same {
                return Some(more);
            }
            if self.is_worth_keeping(&more) {
                offer.hashes.extend(more.hashes);
            }
        }
        None
    }

    /// Whether these are ever worth fetching from there, together. It may be idle now, and busy when they are asked for.
    fn is_worth_keeping(&self, offer: &Offer) -> bool {
        let Some(weighing) = &self.weighing else { return true };
        let (count, wait_us) = (offer.hashes.len(), self.writing.wait_us.load(Ordering::Relaxed));
        let is_worth = weighing.would_pay(self.driver.clock.now(), self.name, count, wait_us);
        if !is_worth {
            self.counts.declined.fetch_add(count as u64, Ordering::Relaxed);
        }
        is_worth
    }

    /// Whether fewer bytes are worth decompressing them, from there.
    fn compression_pays(&self, stored_ratio: f64, decompress_bytes_per_s: f64) -> bool {
        let weighing = self.weighing.as_ref();
        weighing.is_some_and(|weighing| weighing.compression_pays(self.name, stored_ratio, decompress_bytes_per_s))
    }

    /// Writes the first of these; how many were gone through. 0: the server is away, or the namespace is being invalidated.
    fn write_part(&self, offer: &Offer, hashes: &[BlockHash]) -> usize {
        self.meet(offer.namespace);
        let until = Instant::now() + self.fetch_timeout;
        let Some(_writing) = self.writing.exclusive(until) else {
            return 0;
        };
        let Some(own) = self.own_client(offer.domain) else {
            return 0;
        };
        let generation = self.driver.look(|manager| manager.generation(offer.namespace));
        let places = self.places(offer.namespace, offer.realization, generation);
        let Some(place) = places.and_then(|places| places.into_iter().next()) else {
            return 0;
        };
        let (mut part, mut tried) = (Part::default(), 0);
        for &hash in hashes {
            if part.block_bytes >= PART_BYTES {
                break;
            }
            tried += 1;
            let name = place.name(hash);
            let leased = self.driver.with(|decider, now| {
                let asked = request(
                    own,
                    offer.namespace,
                    offer.realization,
                    std::slice::from_ref(&hash),
                    now,
                );
                let results = decider.manager.lease_unused(&asked, now).unwrap_or_default();
                let Some(&Fetched::Leased { lease, extent, .. }) = results.first() else {
                    return None;
                };
                Some((lease, extent, decider.manager.described(own, lease)))
            });
            let Some((lease, extent, described)) = leased else {
                continue;
            };
            if let (Some(described), Ok(slice)) = (described, self.driver.host.slice(&extent)) {
                let checksum = described.checksum.unwrap_or_else(|| slice.crc32c());
                let contents = Contents {
                    length: extent.length,
                    tokens: described.tokens,
                    parent: described.parent,
                    labels: described.labels,
                    checksum,
                };
                let pays = |ratio, rate| self.compression_pays(ratio, rate);
                let element = self.compressing.choose(
                    &slice,
                    self.weighing.is_some().then_some(&pays as &dyn Fn(f64, f64) -> bool),
                );
                let object = place.key.seal(name, &contents, &slice, element);
                part.bytes += object.len() as u64;
                part.block_bytes += u64::from(contents.length);
                part.compressed += u64::from(is_compressed(&object, &contents));
                part.objects.push((name, object));
                self.release(own, lease, described.checksum.is_none().then_some(checksum));
            } else {
                self.release(own, lease, None);
            }
        }
        // Under the same invalidations still: else these are no objects of a group that is in force.
        let again = self.places(offer.namespace, offer.realization, generation);
        if !again.is_some_and(|again| again.iter().any(|again| again.group == place.group)) {
            return 0;
        }
        if self.put(offer.namespace, &place, &part, until) {
            tried
        } else {
            0
        }
    }

    fn put(&self, namespace: NamespaceId, place: &Place, part: &Part, until: Instant) -> bool {
        if part.objects.is_empty() {
            return true;
        }
        let put = self.store.put(&place.group, &part.objects, Some(self.ttl), until);
        if let Err(StoreError::Refused { reason, .. }) = &put {
            // A server without room for more still gives what it has.
            self.counts.failed.fetch_add(1, Ordering::Relaxed);
            tracing::debug!(address = self.address, reason, "the remote tier takes no blocks");
            return false;
        }
        if self.noted(put).is_err() {
            self.unsettled.lock().insert(namespace);
            self.given_up_writes.lock().insert(namespace, Instant::now());
            return false;
        }
        let add = |counter: &AtomicU64, count| counter.fetch_add(count, Ordering::Relaxed);
        add(&self.counts.written, part.objects.len() as u64);
        add(&self.counts.written_bytes, part.bytes);
        add(&self.counts.compressed, part.compressed);
        add(&self.counts.written_block_bytes, part.block_bytes);
        true
    }

    fn release(&self, own: kvtier_core::ClientId, lease: LeaseId, checksum: Option<u32>) {
        self.driver.with(|decider, now| {
            if let Some(checksum) = checksum {
                decider.manager.note_checksum(own, lease, checksum);
            }
            decider.manager.release(own, &[lease], now)
        });
    }
}

/// A block that does not shrink is kept plain.
pub(super) fn is_compressed(object: &[u8], contents: &Contents) -> bool {
    object.len() < contents.length as usize + OBJECT_OVERHEAD_BYTES
}

/// Which of the keys asked for follow each other from the first on, of those that are there, and where each is.
pub(super) fn reach(which: FetchScope, missing: &[usize], there: &[Option<usize>]) -> Vec<(usize, usize)> {
    let end = match which {
        FetchScope::Each => there.len(),
        FetchScope::Prefix => there.iter().position(Option::is_none).unwrap_or(there.len()),
    };
    let found = missing.iter().zip(there).take(end);
    found
        .filter_map(|(&position, place)| Some((position, (*place)?)))
        .collect()
}
