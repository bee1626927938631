use std::collections::HashMap;
use std::sync::Arc;

use kvtier_core::{Generation, NamespaceId, RealizationId, RecordLabel, RestoredRecord, RestoredSegment, SegmentId};

use super::super::format::{FormatError, VERSION};
use super::super::keys::RecordKeys;
use super::super::segment::{Reopened, Segment};
use super::super::settings::NvmeError;
use super::super::volume::Volume;
use super::Found;

/// Segments of an earlier run, ready to be read, and what they hold.
pub(super) struct Restored {
    pub(super) segments: HashMap<SegmentId, Arc<Segment>>,
    pub(super) found: Found,
}

/// Reads headers and indexes of what is there. What cannot be used is removed.
pub(super) fn restore(volume: &Volume, keys: &dyn RecordKeys) -> Result<Restored, NvmeError> {
    let mut restored = Restored {
        segments: HashMap::new(),
        found: Found::default(),
    };
    for id in volume.segments()? {
        let path = volume.path_of(id);
        let reopened = match Segment::reopen(volume, id) {
            Ok(Ok((reopened, read_bytes))) => {
                restored.found.read_bytes += read_bytes;
                reopened
            }
            Ok(Err(error @ FormatError::Version(version))) if version > VERSION => {
                return Err(NvmeError::Newer { path, error });
            }
            Ok(Err(error)) => {
                tracing::warn!(path = %path.display(), %error, "removed a segment that cannot be read");
                restored.found.damaged += 1;
                volume.remove(id);
                continue;
            }
            // A file that the device cannot read now may be readable later, and is in nobody's way: its id is not used again.
            Err(source) => {
                tracing::warn!(path = %path.display(), error = %source, "left alone: a segment that the device does not read");
                restored.found.damaged += 1;
                continue;
            }
        };
        restored.add(reopened, keys);
    }
    if !restored.segments.is_empty() {
        tracing::info!(
            segments = restored.segments.len(),
            damaged = restored.found.damaged,
            sealed_off = restored.found.sealed_off,
            "found segments of an earlier run"
        );
    }
    Ok(restored)
}

impl Restored {
    fn add(&mut self, reopened: Reopened, keys: &dyn RecordKeys) {
        let Reopened {
            segment,
            entries,
            damaged,
        } = reopened;
        self.found.damaged += u64::from(damaged);
        let mut records = Vec::with_capacity(entries.len());
        for entry in &entries {
            let (namespace, generation) = (NamespaceId(entry.namespace), Generation(entry.generation));
            let Some(cipher) = segment.cipher(keys, namespace, generation) else {
                self.found.sealed_off += 1;
                continue;
            };
            let Ok(name) = cipher.open_name(entry, segment.id.0) else {
                self.found.damaged += 1;
                continue;
            };
            records.push(RestoredRecord {
                label: RecordLabel {
                    namespace,
                    generation,
                    realization: RealizationId(name.realization),
                    hash: name.hash,
                    parent: name.parent,
                    tokens: name.tokens,
                    labels: name.labels,
                },
                offset: entry.offset,
                length: entry.length,
                checksum: name.checksum,
            });
        }
        self.found.segments.push(RestoredSegment {
            segment: segment.id,
            bytes: segment.bytes,
            records,
        });
        self.segments.insert(segment.id, Arc::new(segment));
    }
}
