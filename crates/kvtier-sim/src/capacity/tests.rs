use kvtier_core::{CheckedCoreSettings, CoreSettings};

use super::replay;
use crate::lru;
use crate::workload::ChatWorkload;

const BLOCK_BYTES: u32 = 16 << 10;

fn settings(host_bytes: u64, nvme_bytes: u64) -> CheckedCoreSettings {
    CoreSettings {
        host_bytes,
        host_segment_bytes: 1 << 20,
        nvme_bytes,
        nvme_segment_bytes: 1 << 20,
        ..CoreSettings::default()
    }
    .check()
    .expect("sound settings")
}

#[test]
fn room_for_everything_hits_what_an_endless_cache_hits() {
    let requests = ChatWorkload {
        sessions: 120,
        ..ChatWorkload::default()
    }
    .generate();
    let unique = lru::unique_blocks(&requests);
    let report = replay(
        &requests,
        settings(unique as u64 * u64::from(BLOCK_BYTES) * 2, 0),
        BLOCK_BYTES,
    );
    assert_eq!(report.tokens, lru::replay(&requests, unique));
    assert_eq!(report.busy, 0);
}

#[test]
fn two_tiers_hit_nearly_what_an_exact_cache_of_their_joint_size_hits() {
    let requests = ChatWorkload {
        sessions: 300,
        ..ChatWorkload::default()
    }
    .generate();
    let host_blocks = lru::unique_blocks(&requests) as u64 / 20;
    let block = u64::from(BLOCK_BYTES);
    let report = replay(
        &requests,
        settings(host_blocks * block, host_blocks * 4 * block),
        BLOCK_BYTES,
    );
    let exact = lru::replay(&requests, host_blocks as usize * 5).ratio();
    let reached = report.tokens.ratio();
    assert!(report.hits_host > 0 && report.hits_nvme > 0, "{report:?}");
    assert!(reached > exact * 0.85, "{reached:.3} of {exact:.3}: {report:?}");
    assert_eq!(report.busy, 0, "{report:?}");
}
