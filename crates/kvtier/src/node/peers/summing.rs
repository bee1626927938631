//! Checksums of what clients put, taken before a peer asks: a lease's answer carries one, and whoever waits for it waits for a pass
//! over the block's bytes.
//!
//! One thread leases what was published lately, sums it and gives it back. Nobody waits for it, and it may fall behind: what it
//! leaves out is summed when it is leased.

use std::sync::atomic::Ordering;

use crossbeam_channel::{Receiver, Sender};
use kvtier_core::{BlockHash, Extent, Fetched, LeaseId, NamespaceId, RealizationId, TrustDomain};
use parking_lot::RwLock;

use super::Shared;
use super::serving::request;

/// A pass over fewer bytes costs less than leasing them for it.
const BLOCK_BYTES_MIN: u32 = 64 << 10;
/// Bytes that are leased together, at least one block: few, so that they are not kept from being purged or evicted for long.
const PART_BYTES: u64 = 2 << 20;
/// Puts that may wait; further ones are left out.
const WAITING_MAX: usize = 1024;

/// Blocks that a client has just published.
pub(super) struct Published {
    domain: TrustDomain,
    namespace: NamespaceId,
    realization: RealizationId,
    blocks: Vec<(BlockHash, u32)>,
}

/// What waits for the summing thread. Without one nothing is taken.
pub(super) struct Summing {
    waiting: RwLock<Option<Sender<Published>>>,
}

impl Summing {
    /// The queue, and its end for the thread where there is to be one.
    pub(super) fn new(is_wanted: bool) -> (Summing, Option<Receiver<Published>>) {
        let (sender, receiver) = crossbeam_channel::bounded(WAITING_MAX);
        let waiting = RwLock::new(is_wanted.then_some(sender));
        (Summing { waiting }, is_wanted.then_some(receiver))
    }

    /// The thread ends.
    pub(super) fn stop(&self) {
        *self.waiting.write() = None;
    }
}

impl Shared {
    /// Blocks that were put a moment ago, with their lengths.
    pub(crate) fn published(
        &self,
        domain: TrustDomain,
        namespace: NamespaceId,
        realization: RealizationId,
        blocks: impl Iterator<Item = (BlockHash, u32)>,
    ) {
        let waiting = self.summing.waiting.read();
        let Some(waiting) = &*waiting else { return };
        if !self.domains.is_shared(domain) {
            return;
        }
        let blocks: Vec<(BlockHash, u32)> = blocks.filter(|(_, length)| *length >= BLOCK_BYTES_MIN).collect();
        if !blocks.is_empty() {
            let published = Published {
                domain,
                namespace,
                realization,
                blocks,
            };
            let _ = waiting.try_send(published);
        }
    }

    /// The summing thread.
    pub(super) fn sum(&self, work: &Receiver<Published>) {
        while let Ok(published) = work.recv() {
            let mut rest = published.blocks.as_slice();
            while !rest.is_empty() && !self.is_stopping() {
                let mut bytes = 0;
                let fit = rest.iter().take_while(|(_, length)| {
                    let fits = bytes == 0 || bytes + u64::from(*length) <= PART_BYTES;
                    bytes += u64::from(*length);
                    fits
                });
                let (part, others) = rest.split_at(fit.count());
                rest = others;
                self.sum_part(&published, part);
            }
        }
    }

    fn sum_part(&self, published: &Published, part: &[(BlockHash, u32)]) {
        let Some(own) = self.own_client(published.domain) else {
            return;
        };
        let hashes: Vec<BlockHash> = part.iter().map(|(hash, _)| *hash).collect();
        let leased = self.driver.with(|decider, now| {
            let asked = request(own, published.namespace, published.realization, &hashes, now);
            decider.manager.lease_unsummed(&asked, now).unwrap_or_default()
        });
        let leased = leased.iter().filter_map(|result| match *result {
            Fetched::Leased { lease, extent, .. } => Some((lease, extent)),
            Fetched::Miss | Fetched::Busy => None,
        });
        let leased: Vec<(LeaseId, Extent)> = leased.collect();
        let sum = |(lease, extent): &(LeaseId, Extent)| Some((*lease, self.driver.host.slice(extent).ok()?.crc32c()));
        let sums: Vec<(LeaseId, u32)> = leased.iter().filter_map(sum).collect();
        self.given.summed.fetch_add(sums.len() as u64, Ordering::Relaxed);
        if leased.is_empty() {
            return;
        }
        let leases: Vec<LeaseId> = leased.iter().map(|(lease, _)| *lease).collect();
        self.driver.with(|decider, now| {
            for (lease, checksum) in sums {
                decider.manager.note_checksum(own, lease, checksum);
            }
            decider.manager.release(own, &leases, now);
        });
    }
}
