use std::fs;
use std::path::Path;
use std::time::Instant;

use kvtier_core::{CoreSettings, LeafFirstLru, Realization, TierManager, Time, TrustDomain};
use kvtier_storage::nvme::format::{ENTRY_BYTES, HEADER_BYTES};
use kvtier_storage::nvme::{NvmeSettings, StorageAction};

use super::keys::{GENERATION, NAMESPACE, REALIZATION, fixed_key, label};
use super::memory::Memory;
use super::row::Reopen;
use super::stand::Stand;
use super::{MIB, Options};
use crate::BenchError;

const BLOCK_BYTES: u32 = 4096;
const DEPTH: usize = 64;

/// Fills a tier with small blocks, ends it, and times how long a new one, and a tier manager above it, take to know them
/// all.
pub(super) fn measure(
    options: &Options,
    directory: &Path,
    progress: &mut dyn FnMut(&str),
) -> Result<Reopen, BenchError> {
    let blocks = options.reopen_blocks();
    let directory = directory.join("reopen");
    let settings = NvmeSettings::new(directory.clone(), options.disk_bytes(), fixed_key());
    progress(&format!("nvme: writing {blocks} blocks to find again"));
    let (mut stand, _) = Stand::open(settings.clone())?;
    let places = stand.make_room(blocks as usize, BLOCK_BYTES, options.segment_bytes())?;
    let memory = Memory::shared(2 * MIB)?;
    let extents = places.extents.clone();
    stand.drive("demote", DEPTH, extents.len(), move |index, operation| {
        StorageAction::Demote {
            operation,
            source: memory.slot(index, BLOCK_BYTES as usize),
            target: extents[index],
            label: label(index as u64),
        }
    })?;
    stand.seal(&places)?;
    drop(stand);

    let (read, read_before) = (bytes_read(), Instant::now());
    let (stand, found) = Stand::open(settings)?;
    let opened = read_before.elapsed();
    let accounted = found.read_bytes.max(bytes_read().saturating_sub(read));
    let mut manager = manager(options, blocks)?;
    let restored = manager.restore(found.segments, Time::default());
    let seconds = read_before.elapsed().as_secs_f64();
    progress(&format!(
        "nvme: opened in {:.2} s, known to the tier manager after {seconds:.2} s",
        opened.as_secs_f64()
    ));
    if restored.blocks != blocks {
        return Err(BenchError::Storage {
            what: "reopen",
            message: format!(
                "{} of {blocks} blocks came back, {} were left out",
                restored.blocks, restored.left_out
            ),
        });
    }
    drop(stand);
    fs::remove_dir_all(&directory).map_err(BenchError::system("the directory that was reopened"))?;
    Ok(Reopen {
        case: "reopen",
        seconds: crate::ranks::rounded(seconds),
        blocks,
        bytes_per_block: crate::ranks::rounded(accounted as f64 / blocks as f64),
    })
}

/// A tier manager that knows the namespace and the realization of the records.
fn manager(options: &Options, blocks: u64) -> Result<TierManager, BenchError> {
    let failed = |message: String| BenchError::Storage {
        what: "the tier manager",
        message,
    };
    let settings = CoreSettings {
        nvme_bytes: 2 * options.disk_bytes(),
        nvme_segment_bytes: options.segment_bytes(),
        nvme_segment_header_bytes: HEADER_BYTES,
        nvme_record_index_bytes: ENTRY_BYTES,
        blocks_max: 2 * blocks as usize,
        ..CoreSettings::default()
    };
    let settings = settings.check().map_err(|error| failed(error.to_string()))?;
    let mut manager = TierManager::new(settings, Box::new(LeafFirstLru::new()));
    let namespace = manager
        .restore_namespace(TrustDomain(0), "bench", GENERATION)
        .map_err(|refusal| failed(format!("{refusal:?}")))?;
    let realization = manager
        .open_realization(Realization::digest(&[]))
        .map_err(|refusal| failed(format!("{refusal:?}")))?;
    assert_eq!(
        (namespace, realization),
        (NAMESPACE, REALIZATION),
        "the first of their kind"
    );
    Ok(manager)
}

/// What this process made the system read from files so far, by its own account.
fn bytes_read() -> u64 {
    let text = fs::read_to_string("/proc/self/io").unwrap_or_default();
    let field = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(": ")?.parse::<u64>().ok())
            .unwrap_or(0)
    };
    field("rchar").max(field("read_bytes"))
}
