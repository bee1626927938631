use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, anyhow};
use kvtier_core::{
    BlockHash, Completion, Extent, Failure, Generation, NamespaceId, OperationId, Parent, RealizationId, RecordLabel,
    SegmentId,
};
use kvtier_storage::nvme::format::{ENTRY_BYTES, HEADER_BYTES, padded};
use kvtier_storage::nvme::{DataKey, Encryption, NvmeSettings, NvmeTier, RecordKeys, StorageAction};
use kvtier_transfer::memory::MemorySlice;
use tokio::sync::oneshot;

use crate::cache::{Cache, Pending, READERS, Read};
use crate::once::WARM;
use crate::values::{Blocks, VALUE_BYTES, Values, draw};

const NAMESPACE: NamespaceId = NamespaceId(0);
const GENERATION: Generation = Generation(1);
const SEGMENT_BYTES: u64 = 256 << 20;

/// kvtier's NVMe tier with its default engine and bounds.
pub(crate) struct Tier {
    tier: NvmeTier,
    waiting: Arc<Waiting>,
    operations: AtomicU64,
    values: Arc<Values>,
    /// Blocks to read into that no reader has.
    targets: Mutex<Vec<MemorySlice>>,
    extents: Vec<Extent>,
    segments: Vec<SegmentId>,
    /// Of each value, as its write was answered.
    checksums: Vec<AtomicU32>,
}

/// Who waits for which operation.
#[derive(Default)]
struct Waiting(Mutex<HashMap<OperationId, oneshot::Sender<Result<Completion, Failure>>>>);

/// One key for everything: what is measured is nobody's secret.
struct FixedKey(Arc<DataKey>);

impl RecordKeys for FixedKey {
    fn data_key(&self, namespace: NamespaceId, generation: Generation) -> Option<Arc<DataKey>> {
        ((namespace, generation) == (NAMESPACE, GENERATION)).then(|| Arc::clone(&self.0))
    }
}

impl Tier {
    /// An empty tier in `directory`, with room for all values.
    pub(crate) async fn open(directory: &Path, encryption: Encryption, values: &Arc<Values>) -> anyhow::Result<Tier> {
        let waiting = Arc::new(Waiting::default());
        let (extents, segments) = places(values.count() + WARM);
        let settings = NvmeSettings {
            encryption,
            ..NvmeSettings::new(
                directory.to_owned(),
                segments.len() as u64 * SEGMENT_BYTES,
                Arc::new(FixedKey(Arc::new(DataKey::new([7; 32])))),
            )
        };
        let events = Arc::clone(&waiting);
        let (tier, _) = NvmeTier::open(
            settings,
            Arc::new(move |event| {
                if let Some(waiter) = events.lock().remove(&event.operation) {
                    // Nobody waits any more only when the measurement gave up.
                    let _ = waiter.send(event.outcome);
                }
            }),
        )?;
        let targets = Blocks::new(READERS)?;
        let tier = Tier {
            tier,
            waiting,
            operations: AtomicU64::new(0),
            values: Arc::clone(values),
            targets: Mutex::new((0..READERS).map(|reader| targets.block(reader)).collect()),
            extents,
            segments,
            checksums: (0..values.count() + WARM).map(|_| AtomicU32::new(0)).collect(),
        };
        tier.open_segments().await?;
        Ok(tier)
    }

    async fn open_segments(&self) -> anyhow::Result<()> {
        for &segment in &self.segments {
            self.carry_out(|operation| StorageAction::Open {
                operation,
                segment,
                bytes: SEGMENT_BYTES,
            })
            .await?
            .map_err(|failure| anyhow!("open a segment: {failure:?}"))?;
        }
        Ok(())
    }

    fn free_targets(&self) -> MutexGuard<'_, Vec<MemorySlice>> {
        self.targets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn carry_out(
        &self,
        action: impl FnOnce(OperationId) -> StorageAction,
    ) -> anyhow::Result<Result<Completion, Failure>> {
        let operation = OperationId(self.operations.fetch_add(1, Ordering::Relaxed));
        let (waiter, answer) = oneshot::channel();
        self.waiting.lock().insert(operation, waiter);
        self.tier.submit(action(operation));
        answer.await.context("the tier ended")
    }
}

impl Cache for Tier {
    fn put(&self, index: usize) -> Pending<'_, ()> {
        Box::pin(async move {
            let written = self
                .carry_out(|operation| StorageAction::Demote {
                    operation,
                    source: self.values.block(index),
                    target: self.extents[index],
                    label: label(index),
                })
                .await?;
            match written {
                Ok(Completion::Written { checksum }) => {
                    self.checksums[index].store(checksum, Ordering::Relaxed);
                    Ok(())
                }
                other => Err(anyhow!("{other:?}")),
            }
        })
    }

    /// Writes the indexes and syncs: after it a power cut loses nothing.
    fn settle(&self) -> Pending<'_, ()> {
        Box::pin(async move {
            self.carry_out(|operation| StorageAction::Sync { operation })
                .await?
                .map_err(|failure| anyhow!("sync: {failure:?}"))?;
            Ok(())
        })
    }

    fn read(&self, index: usize) -> Pending<'_, Read> {
        Box::pin(async move {
            let target = self.free_targets().pop().context("more readers than blocks")?;
            let read = self
                .carry_out(|operation| StorageAction::Promote {
                    operation,
                    source: self.extents[index],
                    target: target.clone(),
                    checksum: self.checksums[index].load(Ordering::Relaxed),
                    label: label(index),
                })
                .await?;
            let found = match read {
                Ok(_) => self.values.compare(index, target.crc32c()),
                Err(Failure::Corrupt) => Read::Absent,
                Err(failure) => return Err(anyhow!("{failure:?}")),
            };
            self.free_targets().push(target);
            Ok(found)
        })
    }

    fn close(&self) -> Pending<'_, ()> {
        Box::pin(async move {
            self.tier.shutdown();
            Ok(())
        })
    }
}

impl Waiting {
    fn lock(&self) -> MutexGuard<'_, HashMap<OperationId, oneshot::Sender<Result<Completion, Failure>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where each value goes, and the segments that takes.
fn places(count: usize) -> (Vec<Extent>, Vec<SegmentId>) {
    let each = padded(VALUE_BYTES as u64);
    let fit = ((SEGMENT_BYTES - HEADER_BYTES) / (each + ENTRY_BYTES)) as usize;
    let extents: Vec<Extent> = (0..count)
        .map(|index| Extent {
            segment: SegmentId(u32::try_from(index / fit + 1).expect("few segments")),
            offset: HEADER_BYTES + (index % fit) as u64 * each,
            length: u32::try_from(VALUE_BYTES).expect("less than 4 GiB"),
        })
        .collect();
    let mut segments: Vec<SegmentId> = extents.iter().map(|extent| extent.segment).collect();
    segments.dedup();
    (extents, segments)
}

fn label(index: usize) -> RecordLabel {
    let mut hash = [0; 16];
    hash[..8].copy_from_slice(&draw(index as u64).to_le_bytes());
    RecordLabel {
        namespace: NAMESPACE,
        generation: GENERATION,
        realization: RealizationId(0),
        hash: BlockHash(hash),
        parent: Parent::Root,
        tokens: 0,
        labels: kvtier_core::Labels::None,
    }
}
